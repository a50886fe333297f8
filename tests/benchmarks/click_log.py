"""A click log of known truth for the benchmarks of `adlib.ctr`: 20 categorical fields, 8 numbers, 5 % clicks.

logit = b + Σ_j w_j[x_j] + Σ_{i<j} <u_i[x_i], u_j[x_j]> + f(numbers, x): main effects, interactions of rank four and a part that is
neither linear nor additive. The values of a field follow Zipf's law, so most of the 300,000 are rare.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

FIELDS, NUMBERS, RANK = 20, 8, 4
SIZES = np.geomspace(8, 118_000, FIELDS).astype(int)  # about 300,000 values in all


class Part(NamedTuple):
    """Ids (n, 20) counted from 0 in each field, numbers (n, 8), clicks (n,) and true click probabilities (n,)."""

    ids: np.ndarray
    numbers: np.ndarray
    y: np.ndarray
    truth: np.ndarray

    def frame(self) -> pd.DataFrame:
        """The part as a table: c0 … c19 categorical, x0 … x7 numeric."""
        columns = {f"c{j}": pd.Categorical.from_codes(self.ids[:, j], range(SIZES[j])) for j in range(FIELDS)}
        return pd.DataFrame(columns | {f"x{j}": self.numbers[:, j] for j in range(NUMBERS)})


class ClickLog:
    """Draws parts of a log; two parts of one log share the truth."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        less = (SIZES[0] / SIZES) ** 0.5  # the more values a field has, the less one of them says
        self.main = [rng.normal(0, 0.7 * s, size) for s, size in zip(less, SIZES, strict=True)]
        self.factors = [rng.normal(0, 0.18 * s**0.5, (size, RANK)) for s, size in zip(less[:8], SIZES, strict=False)]
        self.slopes = rng.normal(0, 0.18, (SIZES[2], 2))  # two numbers mean something else in each value of a field
        self.cumulative = [np.cumsum(p / p.sum()) for p in (1 / np.arange(3, size + 3) ** 1.5 for size in SIZES)]
        self.bias = 0.0
        logit = self._logit(*self._draw(200_000, rng))
        for _ in range(50):  # the bias that makes 5 % clicks
            p = 1 / (1 + np.exp(-logit - self.bias))
            self.bias += (0.05 - p.mean()) / (p * (1 - p)).mean()

    def _draw(self, n: int, rng: np.random.Generator):
        ids = [np.searchsorted(c, rng.random(n)) for c in self.cumulative]
        ids = np.column_stack([np.minimum(i, size - 1) for i, size in zip(ids, SIZES, strict=True)])
        return ids.astype(np.int32), rng.normal(size=(n, NUMBERS))

    def _logit(self, ids: np.ndarray, x: np.ndarray) -> np.ndarray:
        main = sum(w[ids[:, j]] for j, w in enumerate(self.main))
        v = [u[ids[:, j]] for j, u in enumerate(self.factors)]
        pairs = 0.5 * (sum(v) ** 2 - sum(part**2 for part in v)).sum(1)
        curved = 0.5 * np.sin(2 * x[:, 0]) + 0.4 * np.abs(x[:, 1]) - 0.3 * x[:, 2] ** 2 + 0.3 * x[:, 5]
        stepped = 0.6 * (x[:, 3] > 0.5) * (x[:, 4] > 0)
        return self.bias + main + pairs + curved + stepped + (self.slopes[ids[:, 2]] * x[:, :2]).sum(1)

    def part(self, n: int, seed: int) -> Part:
        """Draw n rows."""
        rng = np.random.default_rng(seed)
        ids, numbers = self._draw(n, rng)
        truth = 1 / (1 + np.exp(-self._logit(ids, numbers)))
        return Part(ids, numbers.astype(np.float32), (rng.random(n) < truth).astype(np.float32), truth)
