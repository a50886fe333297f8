"""Latency of a decision: ``OMP_NUM_THREADS=1 python tests/benchmarks/serving.py [decisions]``, on one core.

Prints one JSON object a line. A decision scores 200 candidates, caps, paces, chooses and logs. Wall time and computing time stand side by
side, since a busy machine adds waiting to the first. Models: the logistic regression of lesson 08, a DeepFM of lesson 03, and none (the loop
alone); and the loop with every commit on the disk (`sync`), which survives a power cut.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from adlib import ctr, delivery, traffic

CANDIDATES, FEATURES, WARM = 200, 27, 50


def say(name: str, value: float, unit: str, target: str = "", holds: bool = True, **more) -> None:
    facts = {"name": name, "value": round(float(value), 4), "unit": unit, "target": target, "holds": bool(holds)}
    print(json.dumps(facts | more), flush=True)


def logistic(rng: np.random.Generator):
    """A linear model on what is known of the ad, the visitor and the showings so far, as in lesson 08."""
    about, weights = rng.normal(size=(1200, FEATURES - 1)), rng.normal(0, 0.1, FEATURES)
    return lambda v: expit(np.column_stack([about[v.ads], np.log2(1 + v.shown)]) @ weights - 4)


def deepfm(rng: np.random.Generator):
    """A DeepFM on six numbers and two categories, fitted on 20,000 rows."""

    def table(ads, shown, device):
        columns = {"kind": pd.Categorical.from_codes(ads % 10, [f"k{i}" for i in range(10)])}
        columns |= {f"x{j}": facts[ads, j] for j in range(5)} | {"shown": np.log2(1 + shown)}
        return pd.DataFrame(columns | {"device": pd.Categorical.from_codes(device, ["mobile", "desktop"])})

    facts, n = rng.normal(size=(1200, 5)), 20_000
    ads = rng.integers(0, 1200, n)
    X = table(ads, rng.integers(0, 4, n), rng.integers(0, 2, n))
    model = ctr.CTRModel("deepfm", dim=4, hidden=(16,), bf16=False).fit(
        X, rng.random(n) < expit(facts[ads].sum(1) * 0.3 - 3)
    )
    return lambda v: model.predict_proba(table(v.ads, v.shown, np.zeros(len(v.ads), int)))[:, 1]


def measure(name: str, predict, n: int, target: float | None = None, **options) -> None:
    """Time n decisions of one day with a budget for six in ten of them."""
    rng = np.random.default_rng(0)
    settings = {"budget": 0.006 * n, "cost": 0.01, "cap": 3, "traffic": traffic.HOURS} | options
    with tempfile.TemporaryDirectory() as folder:
        loop, took, worked = delivery.DecisionLoop(Path(folder) / "log.db", predict, **settings), [], []
        for i in range(n):
            ads = rng.choice(1200, CANDIDATES, replace=False)
            user, begin, work = f"u{rng.integers(0, 700)}", time.perf_counter(), time.process_time()
            loop.decide(f"r{i}", user, 86_400 * (20_000 + i / n), ads)
            worked.append(time.process_time() - work)
            took.append(time.perf_counter() - begin)
        wrong = sum(loop.audit().values())
        loop.close()
    for kind, times in (("wall", took), ("computing", worked)):
        p50, p99 = 1000 * np.percentile(times[WARM:], [50, 99])
        aim = f"p99 <= {target:g} ms" if target and kind == "computing" else ""
        rate = 1 / np.mean(times[WARM:])
        say(
            f"{name}, {kind}",
            p99,
            "ms p99",
            aim,
            not aim or p99 <= target,
            p50=round(p50, 3),
            decisions_a_second=round(rate),
        )
    say(f"{name}, counters that disagree with the log", wrong, "rows", "0", wrong == 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    decisions, rng = int(sys.argv[1]) if len(sys.argv) > 1 else 3000, np.random.default_rng(0)
    measure("loop alone", lambda v: np.full(len(v.ads), 0.02), decisions)
    measure("logistic regression", logistic(rng), decisions, target=10)
    measure("logistic regression, every commit on disk", logistic(rng), decisions, sync=True)
    measure("DeepFM", deepfm(rng), decisions)
