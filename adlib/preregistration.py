"""A plan that is written down before the data is read, cannot be changed afterwards, and then judges the test.

Taught in notebooks/11_evaluation.ipynb, sections 1, 2 and 6.
"""

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from statsmodels.stats.multitest import multipletests

from adlib.evaluation import _check_columns, sample_ratio_test, user_level_lift

ROLES = ("primary", "secondary", "guardrail")


class SampleRatioAlarm(RuntimeError):
    """The arms do not hold the planned shares of users, so no lift may be read."""


def register(path: str | Path, plan: dict, now: datetime | None = None) -> dict:
    """Write a plan with its time and its hash, once; the same plan again changes nothing.

    Parameters
    ----------
    path : file to write, JSON.
    plan : dict
        ``shares`` (arm -> planned share, "control" and one more), ``metrics`` (list of dict with name, metric, role, one of
        `ROLES`, and where needed per and margin, the relative loss that a guardrail accepts), ``alpha``, and whatever else.
    now : time of registration (with a time zone), default the clock's.

    Returns
    -------
    The record: plan, registered (ISO 8601, UTC), sha256.

    Raises ValueError: an incomplete plan; another plan is registered there. Taught in notebooks/11_evaluation.ipynb, section 1.
    """
    path, roles = Path(path), [m.get("role") for m in plan.get("metrics", [])]
    if "control" not in plan.get("shares", {}) or "alpha" not in plan or roles.count("primary") != 1:
        raise ValueError("a plan needs shares (with a control), alpha and metrics, exactly one of them primary")
    if set(roles) - set(ROLES) or any(m["role"] == "guardrail" and not m.get("margin", 0) > 0 for m in plan["metrics"]):
        raise ValueError(f"each metric needs a role ({', '.join(ROLES)}), and a guardrail a margin above 0")
    if path.exists():
        record = read_plan(path)
        changed = [k for k in {**record["plan"], **plan} if record["plan"].get(k) != plan.get(k)]
        if changed:
            raise ValueError(
                f"{path.name} was registered {record['registered']} and says otherwise on {', '.join(changed)}: "
                "a plan is not changed afterwards; a new test gets a new record"
            )
        return record
    moment = (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
    record = {"plan": plan, "registered": moment}
    record["sha256"] = _digest(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:  # "x": never over another record
        json.dump(record, file, indent=1)
    os.chmod(path, 0o444)
    return record


def read_plan(path: str | Path) -> dict:
    """Return a record that `register` wrote, if nothing in it was changed since.

    Raises ValueError: the content does not fit the hash. FileNotFoundError : nothing was registered there.
    Taught in notebooks/11_evaluation.ipynb, section 1.
    """
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    if record.get("sha256") != _digest(record):
        raise ValueError(f"{Path(path).name} was changed after it was registered: its hash does not fit its content")
    return record


def read_test(path: str | Path, rows: pd.DataFrame, *, after_the_fact: bool = False) -> pd.DataFrame:
    """Judge a test by its registered plan: sample ratio first, then every metric with an interval, corrected, and the guardrails.

    The primary metric is tested at alpha. The secondary ones are corrected together (Holm). A guardrail is *safe* if the whole interval lies
    above -margin (non-inferiority, one-sided at alpha / 2).

    Parameters
    ----------
    path : the record.
    rows : DataFrame, one row an impression, with arm, user_id, timestamp and the columns of the metrics.
    after_the_fact : accept rows older than the record; say so wherever the result is shown.

    Returns
    -------
    DataFrame, one row a metric: role, estimate, low, high, p_value, p_adjusted, verdict.

    Raises SampleRatioAlarm: before any lift is computed. ValueError : rows older than the record, and as `evaluation.user_level_lift`.
    Fabijan et al. (2019); Holm (1979). Taught in notebooks/11_evaluation.ipynb, sections 2 and 6.
    """
    record = read_plan(path)
    plan, alpha = record["plan"], record["plan"]["alpha"]
    _check_columns(rows, ["arm", "user_id", "timestamp"], [])
    first = rows["timestamp"].min()
    if not after_the_fact and first < pd.Timestamp(record["registered"]):
        raise ValueError(f"the plan was registered {record['registered']}, after the first row of {first}")
    ratio = sample_ratio_test(rows.groupby("arm")["user_id"].nunique(), plan["shares"])
    if ratio.alarm:
        found = ", ".join(f"{name} {share:.1%}" for name, share in ratio.observed.items())
        raise SampleRatioAlarm(f"sample-ratio alarm (p = {ratio.p_value:.1g}; {found}): find the fault and test again")
    result = []
    for m in plan["metrics"]:
        lift = user_level_lift(rows, m["metric"], per=m.get("per"), alpha=alpha)
        result.append((m["name"], m["role"], lift.estimate, lift.low, lift.high, lift.p_value, m.get("margin")))
    columns = ["name", "role", "estimate", "low", "high", "p_value", "margin"]
    table = pd.DataFrame(result, columns=columns).set_index("name").assign(p_adjusted=lambda t: t["p_value"])
    second = table["role"] == "secondary"
    if second.any():
        table.loc[second, "p_adjusted"] = multipletests(table.loc[second, "p_value"], alpha, method="holm")[1]
    table["verdict"] = [_verdict(row, alpha) for row in table.itertuples()]
    return table.drop(columns="margin")


def _verdict(row, alpha: float) -> str:
    if row.role == "guardrail":
        return "safe" if row.low > -row.margin else "a loss is not excluded"
    if row.p_adjusted >= alpha:
        return "no effect shown"
    return "better" if row.estimate > 0 else "worse"


def _digest(record: dict) -> str:
    content = {k: v for k, v in record.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
