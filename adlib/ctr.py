"""Click models: will this person click this ad? One estimator, the features it reads, and the measures that judge it.

Taught in notebooks/03_ctr_modeling.ipynb.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from statsmodels.stats.proportion import proportion_confint
from torch import nn

from adlib.features import Encoder, impression_features, time_split

__all__ = [
    "CTRModel", "Encoder", "Interval", "RowAdagrad", "gap_to_oracle", "impression_features", "log_loss_interval", "log_losses",
    "reliability", "time_split",
]  # fmt: skip

ARCHITECTURES = ("lr", "fm", "deepfm")


class Interval(NamedTuple):
    """An estimate and its interval, in the unit of the estimate."""

    estimate: float
    low: float
    high: float


class RowAdagrad:
    """Adagrad with one accumulator a table row, which reads and writes only the rows that a batch needs.

    G_r ← G_r + mean(g_r²), row_r ← row_r − rate · g_r / √G_r, with g_r the summed gradient of row r. A large starting value
    of G works like a prior: a row that was seen a few times moves little. Duchi, Hazan, Singer (2011), JMLR 12.
    """

    def __init__(self, table: torch.Tensor, initial: float):
        self.table, self.gradient = table, torch.zeros_like(table)
        self.accumulated = torch.full((len(table), 1), float(initial), device=table.device)

    @torch.no_grad()
    def step(self, slots: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        """Apply one batch; slots (k,) may repeat, gradient (k, 1 + dim)."""
        self.gradient.index_add_(0, slots, gradient)
        g = self.gradient[slots]  # a repeated slot carries its total each time, so writing it twice changes nothing
        accumulated = self.accumulated[slots] + g.square().mean(1, keepdim=True)
        self.accumulated[slots] = accumulated
        self.table[slots] = self.table[slots] - rate * g / accumulated.sqrt()
        self.gradient[slots] = 0.0


class _Network(nn.Module):
    """What follows the table: bias + linear + factorisation machine + perceptron, as far as the architecture goes."""

    def __init__(self, architecture: str, fields: int, numbers: int, dim: int, hidden, dropout: float, bias: float):
        super().__init__()
        self.architecture, self.fields, self.bias = architecture, fields, nn.Parameter(torch.tensor(bias))
        if architecture == "deepfm":
            steps = list(itertools.pairwise([fields * dim + numbers, *hidden]))
            layers = [layer for a, b in steps for layer in (nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout))]
            self.mlp = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))
            nn.init.zeros_(self.mlp[-1].weight)  # so that the first prediction is the base rate
            nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, rows: torch.Tensor, numbers: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        """Logits (n,) from numbers (n, m) and table rows: (n · fields, 1 + dim) of the values, then (m, 1 + dim)."""
        n, m = numbers.shape
        values = rows[: len(rows) - m].view(n, self.fields, rows.shape[1])
        terms = torch.cat([values, numbers.unsqueeze(2) * rows[len(rows) - m :]], dim=1)  # a number scales its row
        logit, v = self.bias + terms[..., 0].sum(1), terms[..., 1:]
        if self.architecture != "lr":
            logit = logit + 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1)  # = Σ_{i<j} <v_i, v_j>
        if self.architecture == "deepfm":
            with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=bf16):
                logit = logit + self.mlp(torch.cat([values[..., 1:].flatten(1), numbers], dim=1)).squeeze(1).float()
        return logit


class CTRModel(ClassifierMixin, BaseEstimator):
    """Click probability from a DataFrame of categorical and numeric columns: a scikit-learn classifier.

    logit = bias + Σ_i w_i + Σ_{i<j} <v_i, v_j> + MLP(v_1, …, v_f, numbers). ``"lr"`` (logistic regression) is the first two
    terms, ``"fm"`` the first three, ``"deepfm"`` all four. Every value has its row (w, v) in one stacked table, and every
    number one that it scales; ``RowAdagrad`` trains them, Adam the dense weights. Both rates rise over a tenth of the steps
    and then fall to zero. The bias starts at the base rate and is settled in the end, so that the mean prediction is right.

    Parameters
    ----------
    architecture : "deepfm", "fm" or "lr".
    dim, hidden, dropout : length of v; widths of the perceptron; share of its units that a training step leaves out.
    epochs, batch_size : passes over the rows; rows a step.
    learning_rate, dense_learning_rate : highest rate of the table; of the dense weights.
    initial_accumulator, init_scale : start of the Adagrad sums; standard deviation of the first v.
    min_count : values seen in fewer rows share one slot.
    bf16 : compute the perceptron in bfloat16, which is faster where the processor multiplies it; else exact float32.
    device, seed : a torch device; decides first weights and order of rows.

    Attributes
    ----------
    classes_ (0, 1), base_rate_, encoder_, table_ (slots, 1 + dim), network_; saved_curve_, ten values an epoch: nats saved
    against the base rate on batches before they are learnt from (progressive validation, as long as it is epoch one).

    Raises
    ------
    ValueError : a target not 0/1 or of one class, infinite numbers, other columns than in ``fit``, unknown architecture.

    Guo et al. (2017), DeepFM, IJCAI; Rendle (2010), Factorization machines, ICDM.
    Taught in notebooks/03_ctr_modeling.ipynb, section 4.
    """

    def __init__(
        self,
        architecture="deepfm",
        dim=8,
        hidden=(64, 32),
        dropout=0.0,
        epochs=1,
        batch_size=1024,
        learning_rate=0.1,
        dense_learning_rate=0.003,
        initial_accumulator=50.0,
        init_scale=0.01,
        min_count=1,
        bf16=False,
        device="cpu",
        seed=0,
    ):
        self.architecture, self.dim, self.hidden, self.dropout = architecture, dim, hidden, dropout
        self.epochs, self.batch_size = epochs, batch_size
        self.learning_rate, self.dense_learning_rate = learning_rate, dense_learning_rate
        self.initial_accumulator, self.init_scale, self.min_count = initial_accumulator, init_scale, min_count
        self.bf16, self.device, self.seed = bf16, device, seed

    def fit(self, X: pd.DataFrame, y) -> "CTRModel":
        """Train on X: (n, d) and clicks y: (n,) of 0 and 1."""
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture={self.architecture!r} is unknown; choose one of {', '.join(ARCHITECTURES)}."
            )
        X, y = pd.DataFrame(X), _clicks(y, len(X))
        self.encoder_ = Encoder(self.min_count).fit(X)
        self.feature_names_in_, self.n_features_in_ = self.encoder_.feature_names_in_, X.shape[1]
        self.classes_, self.base_rate_ = np.array([0, 1]), float(y.mean())
        slots, numbers = map(torch.from_numpy, self.encoder_.transform(X))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            dim, bias = 0 if self.architecture == "lr" else self.dim, math.log(self.base_rate_ / (1 - self.base_rate_))
            shape = self.architecture, slots.shape[1], numbers.shape[1], dim
            self.network_ = _Network(*shape, self.hidden, self.dropout, bias).to(self.device)
            self.table_ = self.init_scale * torch.randn(int(self.encoder_.offsets_[-1]) + numbers.shape[1], 1 + dim)
            self.table_[:, 0] = 0.0
            self.table_ = self.table_.to(self.device)
            self._train(slots, numbers, torch.from_numpy(y))
        self._settle_bias(self._logits(slots, numbers), self.base_rate_)
        return self

    def _train(self, slots: torch.Tensor, numbers: torch.Tensor, y: torch.Tensor) -> None:
        table = RowAdagrad(self.table_, self.initial_accumulator)
        dense = torch.optim.Adam(self.network_.parameters(), lr=self.dense_learning_rate, fused=True)
        order = torch.cat([torch.randperm(len(y)) for _ in range(self.epochs)])
        batches, saved = order.split(self.batch_size), []
        self.network_.train()
        for step, batch in enumerate(batches):
            decay = min(1 - step / len(batches), (step + 1) / (0.1 * len(batches)))
            dense.param_groups[0]["lr"] = self.dense_learning_rate * decay
            part = (t[batch].to(self.device) for t in (slots, numbers, y))
            saved.append(self._step(*part, table, dense, self.learning_rate * decay))
        self.network_.eval()
        self.saved_curve_ = [float(part.mean()) for part in np.array_split(saved, min(10 * self.epochs, len(saved)))]

    def _step(self, slots, numbers, y, table: RowAdagrad, dense: torch.optim.Optimizer, rate: float) -> float:
        """One step down the summed loss of a batch, the sum being what the accumulators are measured in."""
        used = self._used(slots, numbers)
        rows = self.table_[used].requires_grad_()
        logit = self.network_(rows, numbers, self.bf16)
        loss = nn.functional.binary_cross_entropy_with_logits(logit, y, reduction="sum")
        dense.zero_grad()
        loss.backward()
        dense.step()
        table.step(used, rows.grad, rate)
        return log_losses(y.cpu(), self.base_rate_).mean() - loss.item() / len(y)  # of rows not yet learnt from

    def _used(self, slots: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Table rows that a batch reads: one a value, then the last ones of the table, one a number."""
        size, m = self.table_.shape[0], numbers.shape[1]
        return torch.cat([slots.flatten(), torch.arange(size - m, size, dtype=slots.dtype, device=slots.device)])

    def _settle_bias(self, logits: torch.Tensor, rate: float) -> None:
        """Shift the bias so that the mean prediction is the click rate: the last noisy steps leave it some percent off."""
        shift = torch.zeros(())
        for _ in range(5):  # Newton
            p = torch.sigmoid(logits + shift)
            shift += (rate - p.mean()) / (p * (1 - p)).mean()
        with torch.no_grad():
            self.network_.bias += shift.to(self.network_.bias.device)

    @torch.no_grad()
    def _logits(self, slots: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        parts = zip(slots.split(8192), numbers.split(8192), strict=True)
        moved = ((s.to(self.device), v.to(self.device)) for s, v in parts)
        return torch.cat([self.network_(self.table_[self._used(s, v)], v, self.bf16).cpu() for s, v in moved])

    def decision_function(self, X: pd.DataFrame) -> np.ndarray:
        """Logits (n,) of a click."""
        check_is_fitted(self)
        return self._logits(*map(torch.from_numpy, self.encoder_.transform(pd.DataFrame(X)))).double().numpy()

    def predict_proba(self, X: pd.DataFrame) -> np.ndarray:
        """Probabilities (n, 2) of no click and of a click."""
        p = 1 / (1 + np.exp(-self.decision_function(X)))
        return np.column_stack([1 - p, p])

    def predict(self, X: pd.DataFrame) -> np.ndarray:
        """1 where a click is more likely than not, else 0; at usual click rates almost never: use ``predict_proba``."""
        return (self.decision_function(X) > 0).astype(int)


# -- measures ------------------------------------------------------------------------------------------------------------


def log_losses(y, p) -> np.ndarray:
    """Log loss −(y log p + (1 − y) log(1 − p)) of each row, in nats; y: (n,) in [0, 1], p: (n,) or one number.

    With the true probabilities as y this is the expected loss, free of the luck of single clicks.
    Taught in notebooks/03_ctr_modeling.ipynb, section 2.
    """
    y, p = np.asarray(y, dtype=float), np.clip(np.asarray(p, dtype=float), 1e-15, 1 - 1e-15)
    return -(y * np.log(p) + (1 - y) * np.log1p(-p))


def log_loss_interval(
    y, p, users=None, baseline=None, repeats: int = 500, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean log loss, or its difference to a baseline, with a bootstrap interval that redraws whole users.

    Impressions of one person are alike: redrawing single rows would promise too narrow an interval.

    Parameters
    ----------
    y, p : clicks (n,) and predicted probabilities (n,) or one number.
    users : (n,) whose row it is; without it every row is a person of its own.
    baseline : other probabilities; the result is loss(p) − loss(baseline), below zero where p is better.
    repeats, level, seed : bootstrap draws, coverage, random seed.

    Efron (1979), Annals of Statistics 7. Taught in notebooks/03_ctr_modeling.ipynb, section 2.
    """
    losses = log_losses(y, p) - (0.0 if baseline is None else log_losses(y, baseline))
    who = np.arange(len(losses)) if users is None else pd.factorize(np.asarray(users))[0]
    total, rows = np.bincount(who, losses), np.bincount(who)
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(len(rows), size=len(rows)), minlength=len(rows)) for _ in range(repeats))
    means = [(weight @ total) / (weight @ rows) for weight in draws]
    return Interval(float(losses.mean()), *map(float, np.quantile(means, [(1 - level) / 2, (1 + level) / 2])))


def gap_to_oracle(loss: float, base_loss: float, oracle_loss: float) -> float:
    """Share of what could be learnt that is still missing: (loss − oracle) / (base − oracle).

    0 is the truth itself, 1 no better than always saying the base rate; all three are mean log losses on the same rows.
    Raises ValueError if the oracle is not better than the base. Taught in notebooks/03_ctr_modeling.ipynb, section 2.
    """
    if not base_loss > oracle_loss:
        raise ValueError(
            f"The oracle's loss {oracle_loss:.5f} is not below the base's {base_loss:.5f}: nothing to learn."
        )
    return (loss - oracle_loss) / (base_loss - oracle_loss)


def reliability(y, p, bins: int = 10, level: float = 0.95) -> pd.DataFrame:
    """Compare predicted with observed click rates in at most ``bins`` bins of equally many rows; equal p share a bin.

    Returns
    -------
    DataFrame, one row a bin: predicted (mean), observed (click rate), low, high (Wilson 1927, JASA 22), clicks, rows.

    Taught in notebooks/03_ctr_modeling.ipynb, section 5.
    """
    frame = pd.DataFrame({"y": np.asarray(y), "p": np.asarray(p, dtype=float)})
    which = (frame["p"].rank(method="min") - 1) * bins // len(frame)
    out = frame.groupby(which).agg(
        predicted=("p", "mean"), observed=("y", "mean"), clicks=("y", "sum"), rows=("y", "size")
    )
    low, high = proportion_confint(out["clicks"], out["rows"], alpha=1 - level, method="wilson")
    columns = ["predicted", "observed", "low", "high", "clicks", "rows"]
    return out.assign(low=low, high=high)[columns].reset_index(drop=True).rename_axis("bin")


# -- checks --------------------------------------------------------------------------------------------------------------


def _clicks(y, n: int) -> np.ndarray:
    """Clicks (n,) in float32, or a sentence that says what is wrong with them."""
    y = np.asarray(y)
    if y.shape != (n,) or n == 0:
        raise ValueError(f"The table has {n} rows and the target has shape {y.shape}: give one click, 0 or 1, a row.")
    found = pd.unique(pd.Series(y)).tolist()
    if not set(found) <= {0, 1}:
        raise ValueError(f"The target must be 0 (no click) or 1 (click); it holds {', '.join(map(str, found[:5]))}.")
    if len(found) == 1:
        raise ValueError(
            f"Every row of the target is {int(found[0])}: a click model needs rows with and without a click."
        )
    return y.astype(np.float32)
