"""Claims as records: read them from YAML, measure them on a randomised test, hold what was found against what was claimed.

The course's own cases stand in ``cases.yaml``; ``adlib.case_pages`` shows them. Taught in notebooks/12_case_studies.ipynb, sections 9 to 13.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from adlib import tables
from adlib.evaluation import VERDICTS, Lift, _check_columns, _log_lift, sample_ratio_test, user_level_lift, verdict
from adlib.preregistration import SampleRatioAlarm

DRAWBACKS = ("privacy", "cost", "feedback")
SCOPES = {"world": "the world: the people of this test, then", "method": "the method only: the people are simulated"}
NOT_TESTED = "not tested"
LOSS = "the whole interval lies below zero: a loss"
COLUMNS = (
    "case",
    "claim",
    "by",
    "claimed",
    "found",
    "low",
    "high",
    "n",
    "unit",
    "traffic_needed",
    "verdict",
    "speaks_about",
    "reason",
)


@dataclass(frozen=True)
class Claim:
    """One claimed lift: `metric`, per impression or per another column, at least `claim` (0.2 is +20 %), said `by` whom."""

    what: str
    claim: float
    metric: str = ""
    per: str = ""
    by: str = ""
    scope: str = ""


@dataclass(frozen=True)
class Case:
    """A case as written in YAML: texts by heading, claims, planned shares of the arms, whom it can speak about, what was not tested."""

    name: str
    claims: tuple[Claim, ...]
    background: str = ""
    plan: str = ""
    done: str = ""
    advantages: str = ""
    drawbacks: Mapping[str, str] = field(default_factory=dict)
    scope: str = "world"
    shares: Mapping[str, float] = field(default_factory=lambda: {"control": 0.5, "treatment": 0.5})
    not_tested: Mapping[str, str] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """The lift of one claim and how many `unit` it was measured on: impressions an arm; tests or learners, where each met both arms."""

    lift: Lift
    n: float
    unit: str = "impressions an arm"


def read_case(path: str | Path) -> Case:
    """Read a case from a YAML file.

    Parameters
    ----------
    path : the file. Needed: name and claims, a list of {what, metric, claim} and, where it is a ratio of two columns, per. The other
        fields of `Case` are texts; what is left out is shown as "not stated".

    Raises ValueError: no such file, broken YAML, an unknown or missing key, a claim outside 0 to 5. Taught in section 13.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path.name} in {path.parent.name or 'this folder'}: a case is a YAML file")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise ValueError(f"{path.name}{where}: this is not YAML in UTF-8; check colons, quotes and indents") from None
    return _case(found, path.name)


def built_in(name: str) -> Case:
    """Return a case of the course by its key in ``cases.yaml``. Raises ValueError for another key. Taught in section 9."""
    known = _course()
    if name not in known:
        raise ValueError(f"there is no case {name!r}; the course has {', '.join(known)}")
    return known[name]


def names() -> tuple[str, ...]:
    """Keys of the course's cases, in the order of the lesson. Taught in section 13."""
    return tuple(_course())


def read_own(path: str | Path) -> tuple[Case, pd.DataFrame]:
    """Read a case and the impressions of its test, which lie in the same folder.

    Parameters
    ----------
    path : YAML file as in `read_case`; beside it ``impressions`` (.csv, .csv.gz, .parquet), with the columns of the course and arm.

    Returns the case and its rows. Raises ValueError as `read_case`, and tables.TableError. Taught in section 13.
    """
    case = read_case(path)
    return case, tables.read_tables(Path(path).parent, only=["impressions"])["impressions"]


def measure(case: Case, rows: pd.DataFrame) -> dict[str, Found]:
    """Measure every claim of a case on the rows of its randomised test: sample ratio first, then lifts by user.

    Parameters
    ----------
    rows : one row an impression; user_id, arm ("control" and one other) and the columns that the claims name.

    Returns
    -------
    what was claimed -> `Found`, with an interval that knows that users were randomised.

    Raises
    ------
    ValueError : no column arm, arms other than planned, a metric that the rows lack, and as `evaluation.user_level_lift`.
    SampleRatioAlarm : before any lift is computed. Taught in section 9.
    """
    if "arm" not in rows:
        raise ValueError(
            f"{case.name}: impressions need a column arm that says {' or '.join(case.shares)} in every row"
        )
    _check_columns(rows, ["arm", "user_id"], [])
    for claim in case.claims:
        for column in filter(None, (claim.metric, claim.per)):
            if column not in rows:
                raise ValueError(f"{case.name}: unknown metric {column!r}; impressions have {', '.join(rows.columns)}")
    users = rows.groupby("arm")["user_id"].nunique()
    if len(users) == 1:
        raise ValueError(f"{case.name}: one arm only ({users.index[0]}): a comparison needs a control and a treatment")
    ratio = sample_ratio_test(users, case.shares)
    if ratio.alarm:
        seen = ", ".join(f"{name} {share:.1%}" for name, share in ratio.observed.items())
        raise SampleRatioAlarm(
            f"{case.name}: sample-ratio alarm (p = {ratio.p_value:.1g}; {seen}): find the fault, test again"
        )
    tested = [claim for claim in case.claims if claim.metric]
    lifts = {c.what: user_level_lift(rows, c.metric, per=c.per or None) for c in tested}
    return {what: Found(lift, len(rows) / len(users)) for what, lift in lifts.items()}


def paired_lift(treatment: np.ndarray, control: np.ndarray, alpha: float = 0.05) -> Lift:
    r"""Relative lift of a mean when each unit met both arms (a replayed test, a learner with two lists), by the delta method.

    .. math:: \ln(1 + lift) = \ln\frac{\bar t}{\bar c} \pm z_{1-\alpha/2} \sqrt{\frac1n Var\Big(\frac{t}{\bar t} - \frac{c}{\bar c}\Big)}

    Parameters
    ----------
    treatment, control : (n,) outcomes of the same units, in the same order, in the same unit of measure.

    Raises ValueError: lengths that differ, fewer than two units, a mean that is not above zero, no variation. Taught in section 11.1.
    """
    t, c = np.asarray(treatment, float), np.asarray(control, float)
    if t.ndim != 1 or t.shape != c.shape or len(t) < 2:
        raise ValueError(f"paired outcomes need the same two or more units, got shapes {t.shape} and {c.shape}")
    if not (t.mean() > 0 and c.mean() > 0):
        raise ValueError("a relative lift needs a mean above zero in both arms; collect more traffic")
    spread = np.var(t / t.mean() - c / c.mean(), ddof=1) / len(t)
    return _log_lift(math.log(t.mean() / c.mean()), float(spread), alpha)


def implied_lift(estimate: float, p_value: float) -> Lift:
    r"""Interval that a published lift and its two-sided p-value imply: :math:`error = \ln(1 + lift) / z_{1 - p/2}`.

    Raises ValueError: a lift of 0 or at most -1, a p-value outside (0, 1). Taught in section 11.10.
    """
    if estimate <= -1 or estimate == 0 or not 0 < p_value < 1:
        raise ValueError("an implied interval needs a lift above -1 that is not 0, and a p-value between 0 and 1")
    return _log_lift(math.log1p(estimate), (math.log1p(estimate) / stats.norm.isf(p_value / 2)) ** 2, 0.05)


def traffic_needed(claim: float, lift: Lift, n: float, power: float = 0.8) -> float:
    r"""Units that tell `claim` from zero, scaled from a lift measured on n of them (an arm, or paired): :math:`n ((z_{.975} + z_{power}) error / \ln(1 + claim))^2`.

    Raises ValueError: a claim not above 0, a power outside (0, 1). Taught in section 7.
    """
    if not claim > 0 or not 0 < power < 1:
        raise ValueError(f"traffic needs a claim above 0 and a power between 0 and 1, got {claim} and {power}")
    z = stats.norm.ppf(0.975)
    error = (math.log1p(lift.high) - math.log1p(lift.low)) / (2 * z)
    return float(n * ((z + stats.norm.ppf(power)) * error / math.log1p(claim)) ** 2)


def judge(case: Case, found: Mapping[str, Found]) -> pd.DataFrame:
    """Hold what was found against every claim of a case, and list what was not tested.

    Returns
    -------
    DataFrame, one row a claim: case, claim, by, claimed, found, low, high (relative lifts), n and traffic_needed (in `unit`), unit,
    verdict (`evaluation.VERDICTS` or "not tested"), speaks_about, reason; the reason says so where the whole interval lies below zero.

    Raises ValueError: a claim that was neither measured nor declared as not tested. Taught in section 9.
    """
    rows = []
    for claim in case.claims:
        about = SCOPES[claim.scope or case.scope]
        row = {"case": case.name, "claim": claim.what, "by": claim.by or "not stated", "claimed": claim.claim}
        if claim.what in found:
            f = found[claim.what]
            said = verdict(claim.claim, f.lift.low, f.lift.high)
            numbers = {"found": f.lift.estimate, "low": f.lift.low, "high": f.lift.high, "n": f.n, "unit": f.unit}
            row |= numbers | {"traffic_needed": traffic_needed(claim.claim, f.lift, f.n), "verdict": said}
            rows.append(row | {"speaks_about": about, "reason": LOSS if f.lift.high < 0 else VERDICTS[said]})
        elif claim.what in case.not_tested:
            rows.append(row | {"verdict": NOT_TESTED, "speaks_about": "nothing", "reason": case.not_tested[claim.what]})
        else:
            raise ValueError(f"{case.name}: {claim.what!r} was not measured; measure it, or say why under not_tested")
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS))


@cache
def _course() -> dict[str, Case]:
    written = yaml.safe_load(Path(__file__).with_name("cases.yaml").read_text(encoding="utf-8"))
    return {key: _case(entry, f"cases.yaml, {key}") for key, entry in written.items()}


def _known(entry, kind: type, needed: tuple[str, ...], where: str) -> None:
    """Raise unless `entry` is a mapping of the fields of `kind` that holds the needed ones."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected 'key: value' lines, found {type(entry).__name__}")
    names = [f.name for f in fields(kind)]
    for key in entry:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{where}: unknown key {key!r}; {hint}Known are {', '.join(names)}")
    if missing := [key for key in needed if entry.get(key) in (None, "", [])]:
        raise ValueError(f"{where}: {' and '.join(missing)} missing; a case needs at least that to be judged")


def _case(entry, where: str) -> Case:
    _known(entry, Case, ("name", "claims"), where)
    claims = entry["claims"]
    if not isinstance(claims, list):
        raise ValueError(f"{where}: claims must be a list, each line of it '- {{what: …, metric: …, claim: 0.2}}'")
    found = tuple(_claim(c, f"{where}, claim {i}") for i, c in enumerate(claims, start=1))
    texts = {k: v for k, v in entry.items() if k != "claims"}
    for key, allowed in (("scope", SCOPES), ("drawbacks", DRAWBACKS)):
        for value in [texts[key]] if key == "scope" and key in texts else texts.get(key, ()):
            if value not in allowed:
                raise ValueError(f"{where}: {key} {value!r} is unknown; choose {' or '.join(allowed)}")
    return Case(**texts | {"claims": found})


def _claim(entry, where: str) -> Claim:
    _known(entry, Claim, ("what", "claim"), where)
    claim = Claim(**entry)
    number = isinstance(claim.claim, int | float) and not isinstance(claim.claim, bool)
    if not number or not 0 < claim.claim < 5:
        raise ValueError(f"{where}: claim must be a number between 0 and 5 (0.20 is +20 %), got {claim.claim!r}")
    if claim.scope and claim.scope not in SCOPES:
        raise ValueError(f"{where}: scope {claim.scope!r} is unknown; choose {' or '.join(SCOPES)}")
    return claim
