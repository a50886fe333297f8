"""Speed and honesty of lesson 11: ``python tests/benchmarks/evaluation.py [speed] [rates] [coverage]`` prints one JSON object a line.

Speed: CPU seconds of one thread, best of three, both sides on the same data. Coverage: thousands of simulated logs, as in the lesson but more.
"""

import json
import math
import sys
import time

import numpy as np
import pandas as pd
from scipy import stats

from adlib import evaluation, experiments, off_policy


def say(name: str, value: float, unit: str, target: str, holds: bool, **more) -> None:
    facts = {"name": name, "value": round(float(value), 4), "unit": unit, "target": target, "holds": bool(holds)}
    print(json.dumps(facts | more), flush=True)


def cpu(task, times: int = 3) -> float:
    """Fewest CPU seconds of some calls."""
    seconds = []
    for _ in range(times):
        begin = time.process_time()
        task()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def bootstrap() -> None:
    """10,000 resamples of IPS at the market's click rate against the loop that draws every row; then the distributions."""
    rng, draws = np.random.default_rng(0), 10_000
    for n in (10_000, 100_000):
        weight, click = rng.gamma(1, 1, n), (rng.random(n) < 0.015).astype(float)

        def naive(times=500, n=n, weight=weight, click=click):
            found = np.empty(times)
            for k in range(times):
                rows = rng.integers(n, size=n)
                found[k] = (weight[rows] * click[rows]).mean()
            return found

        ours = cpu(lambda n=n, w=weight, r=click: off_policy.bootstrap_means(w * r, draws))
        loop = cpu(naive) * draws / 500
        p = stats.ks_2samp(
            naive(3000 if n == 10_000 else 500), off_policy.bootstrap_means(weight * click, draws)
        ).pvalue
        ratio = loop / ours
        say(f"evaluation.bootstrap_{n}", ratio, "times the naive loop", ">= 50", ratio >= 50, seconds=round(ours, 4), same_distribution_p=round(p, 3))  # fmt: skip


def rerandomisation() -> None:
    """10,000 A/A runs of 4,000 users as matrix products against `user_level_lift` on the table of impressions, run by run."""
    rng, users = np.random.default_rng(0), 4000
    visits = rng.geometric(0.03, users)
    rate = 0.015 * rng.gamma(2, 0.5, users)
    rows = pd.DataFrame({"user_id": np.repeat(np.arange(users), visits)})
    rows["click"] = (rng.random(len(rows)) < rate[rows.user_id]).astype(int)
    by_user = rows.groupby("user_id").click.agg(["sum", "size"]).assign(before=rng.binomial(visits, rate)).to_numpy()

    def one_run():
        arm = pd.Series(np.where(rng.random(users) < 0.5, "treatment", "control"))
        evaluation.user_level_lift(rows.assign(arm=rows.user_id.map(arm)), "click")

    ours, single = cpu(lambda: experiments.rerandomise(by_user, 10_000)), cpu(one_run, 10)
    ratio = single * 10_000 / ours
    say("evaluation.rerandomise", ratio, "times a run by run analysis", ">= 100", ratio >= 100, seconds=round(ours, 3), one_run=round(single, 4), impressions=len(rows))  # fmt: skip


def error_rates() -> None:
    """10,000 A/A tests: five methods that must keep 5 %, and three that must not be trusted."""
    rng, runs, looks = np.random.default_rng(1), 10_000, 14
    users = 4000
    visits, rate = rng.geometric(0.02, users), 0.015 * rng.gamma(1.5, 1 / 1.5, users)
    by_user = np.column_stack([rng.binomial(visits, rate), visits, rng.binomial(visits, rate)])
    found = (experiments.rerandomise(by_user, runs) < 0.05).mean().to_dict()
    clicks = rng.binomial(10_000, 0.015, (2, runs, looks)).cumsum(axis=2)
    shown = 10_000 * np.arange(1, looks + 1)
    estimate, variance = np.log(clicks[1] / clicks[0]), (1 / clicks).sum(axis=0) - 2 / shown
    z = np.abs(estimate) / np.sqrt(variance)
    found["z"] = (z[:, -1] > 1.96).mean()
    for kind in ("obrien-fleming", "pocock"):
        found[kind] = (z > experiments.spending_bounds(shown / shown[-1], kind=kind)).any(axis=1).mean()
    for name in ("z", "user", "cuped", "obrien-fleming", "pocock"):
        say(f"evaluation.aa_{name}", found[name], "share", "0.045 to 0.055", 0.045 <= found[name] <= 0.055, runs=runs)
    always = (experiments.confidence_sequence(estimate, variance, 0.1)[2][:, -1] < 0.05).mean()
    say("evaluation.aa_always_valid", always, "share", "<= 0.05", always <= 0.05, runs=runs)
    say("evaluation.aa_impression", found["impression"], "share", "> 0.06: fails", found["impression"] > 0.06)
    peeking = (z > 1.96).any(axis=1).mean()
    say("evaluation.aa_peeking", peeking, "share", "> 0.15: fails", peeking > 0.15)


def coverage() -> None:
    """Intervals of IPS, SNIPS and DR, and the log ratio of two proportions, over many logs; error of DR over 200 logs each."""
    rng, people, ads = np.random.default_rng(0), 2000, 20
    p = 0.013 * np.exp(rng.normal(0, 0.5, (people, ads)))
    logged = 0.8 * rng.dirichlet(np.full(ads, 1.5), people) + 0.2 / ads
    q = p * np.exp(rng.normal(0, 0.4, p.shape))
    target = np.full(p.shape, 0.1 / ads) + 0.9 * (q == q.max(1, keepdims=True))
    truth, promised = (target * p).sum(1).mean(), (target * q).sum(1)
    edges = np.cumsum(logged / people)
    flat = {"p": p.ravel(), "b": logged.ravel(), "e": target.ravel(), "q": q.ravel()}

    def values(n, names):
        cell = np.searchsorted(edges / edges[-1], rng.random(n))
        at = {k: v[cell] for k, v in flat.items()}
        log = off_policy.Log(rng.random(n) < at["p"], at["b"], at["e"], at["q"], promised[cell // ads])
        return [off_policy.estimate_interval(log, name) for name in names]

    names = ("ips", "snips", "dr")
    for n, runs, least in ((10_000, 4000, 0.94), (100_000, 1500, 0.93)):
        found = [values(n, names) for _ in range(runs)]
        for k, name in enumerate(names):
            held = np.mean([row[k].low <= truth <= row[k].high for row in found])
            say(f"evaluation.cover_{name}_{n}", held, "share", f">= {least}", held >= least, runs=runs)
        x = np.maximum(rng.binomial(n // 2, [0.015, 0.018], (4 * runs, 2)), 1)
        log, error = np.log(x[:, 1] / x[:, 0]), np.sqrt((1 / x).sum(1) - 4 / n)
        held = (np.abs(log - math.log(0.018 / 0.015)) <= 1.959964 * error).mean()
        say(f"evaluation.cover_log_ratio_{n}", held, "share", f">= {least}", held >= least, runs=4 * runs)
    for n, limit in ((10_000, 0.45), (100_000, 0.16), (1_000_000, 0.05)):
        errors = [values(n, ("dr",))[0].estimate / truth - 1 for _ in range(200)]
        rmse = float(np.sqrt(np.mean(np.square(errors))))
        say(f"evaluation.dr_error_{n}", rmse, "relative RMSE", f"<= {limit}", rmse <= limit, runs=200)


if __name__ == "__main__":
    parts = {"speed": (bootstrap, rerandomisation), "rates": (error_rates,), "coverage": (coverage,)}
    for part in sys.argv[1:] or parts:
        for task in parts[part]:
            task()
