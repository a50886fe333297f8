"""People judge ads: a blind sheet in random order, and what its answers say. Taught in notebooks/06_creative_text.ipynb, section 13."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.proportion import proportion_confint

ANSWERS = ("left", "right", "tie")


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    estimate: float
    low: float
    high: float


def rating_sheet(
    briefs: Sequence[str], ads: Mapping[str, Sequence[str]], seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A blind sheet to compare two writers, and the key that stays with whoever evaluates it.

    The order of the items and which writer stands on the left are random; two equal ads are left out, since nobody can prefer one.

    Parameters
    ----------
    briefs : n texts that say what the ad had to do. ads : two writers' names, each with n ads. seed : decides both orders.

    Returns
    -------
    (sheet, key). sheet: item, brief, left, right, better (empty: left, right or tie), remark (empty). key: item, row (of `briefs`), left,
    right (names of the writers).

    Raises
    ------
    ValueError : unless there are two writers with an ad for every brief, of which one pair differs.

    Taught in notebooks/06_creative_text.ipynb, section 13.
    """
    if len(ads) != 2 or any(len(texts) != len(briefs) for texts in ads.values()):
        sizes = ", ".join(f"{name} {len(texts)}" for name, texts in ads.items())
        raise ValueError(f"A sheet compares two writers with one ad for each of the {len(briefs)} briefs; got {sizes}.")
    names, rng = list(ads), np.random.default_rng(seed)
    rows = [i for i in rng.permutation(len(briefs)) if ads[names[0]][i] != ads[names[1]][i]]
    if not rows:
        raise ValueError("The two writers wrote the same ads: there is nothing to compare.")
    swap = rng.permutation(np.arange(len(rows)) % 2)  # each writer stands on the left for half of the items
    sides = [(names[s], names[1 - s]) for s in swap]
    items = [f"{k:03d}" for k in range(1, len(rows) + 1)]
    sheet = pd.DataFrame({"item": items, "brief": [briefs[i] for i in rows]})
    for column, side in (("left", 0), ("right", 1)):
        sheet[column] = [ads[pair[side]][i] for pair, i in zip(sides, rows, strict=True)]
    key = pd.DataFrame({"item": items, "row": rows, "left": [s[0] for s in sides], "right": [s[1] for s in sides]})
    return sheet.assign(better="", remark=""), key


def export_sheet(sheet: pd.DataFrame, path: str | Path) -> Path:
    """Write a sheet as CSV for a spreadsheet: UTF-8 with a mark, and no cell that a spreadsheet would run as a formula."""
    safe = sheet.map(lambda v: f"'{v}" if isinstance(v, str) and v.lstrip()[:1] in tuple("=+-@") and v.strip() else v)
    safe.to_csv(path, index=False, encoding="utf-8-sig")
    return Path(path)


def read_answers(path: str | Path, key: pd.DataFrame) -> pd.Series:
    """Who won each item, by the item's number: a writer's name or "tie"; items without an answer are left out.

    Raises
    ------
    ValueError : for a missing column, an item that is not in the key or stands twice, or an answer other than left, right, tie or nothing.

    Taught in notebooks/06_creative_text.ipynb, section 13.
    """
    sheet = pd.read_csv(path, dtype=str, encoding="utf-8-sig", keep_default_na=False)
    name, key = Path(path).name, key.set_index("item")
    if missing := {"item", "better"} - set(sheet):
        raise ValueError(
            f"{name} has no column {', '.join(sorted(missing))}: export the sheet again and fill in better."
        )
    if strange := sorted(set(sheet.item) - set(key.index)):
        raise ValueError(f"{name}: item {strange[0]!r} is not in the key; this sheet belongs to another key.")
    if sheet.item.duplicated().any():
        raise ValueError(f"{name}: item {sheet.item[sheet.item.duplicated()].iloc[0]!r} stands there twice; keep one.")
    answer = sheet.set_index("item").better.str.strip().str.lower()
    if bad := [i for i, a in answer.items() if a not in (*ANSWERS, "")]:
        raise ValueError(f"{name}: item {bad[0]} is answered {answer[bad[0]]!r}; write left, right or tie.")
    answer = answer[answer != ""]
    return pd.Series(
        {i: "tie" if a == "tie" else key.loc[i, a] for i, a in answer.items()}, name="winner", dtype="object"
    )


def win_rate(winners: Sequence[str], writer: str) -> Estimate:
    """Share of the decided items that `writer` won, with Wilson's 95 % interval; ties decide nothing.

    Raises ValueError if no item was decided. Taught in notebooks/06_creative_text.ipynb, section 13.
    """
    decided = [w for w in winners if w != "tie"]
    if not decided:
        raise ValueError("No item was decided: all answers are ties or missing.")
    wins = sum(w == writer for w in decided)
    return Estimate(wins / len(decided), *map(float, proportion_confint(wins, len(decided), method="wilson")))


def agreement(one: pd.Series, other: pd.Series, *, draws: int = 2000, seed: int = 0) -> Estimate:
    r"""Cohen's kappa of two people on the items that both answered, with a bootstrap interval over items.

    .. math:: \kappa = \frac{p_o - p_e}{1 - p_e}

    p_o is the share of equal answers and p_e the share that two people with their habits would reach by chance: 1 is full agreement, 0 chance.

    Parameters
    ----------
    one, other : answers by item, as from ``read_answers``. draws, seed : of the bootstrap.

    Raises
    ------
    ValueError : if fewer than two items were answered by both, or both gave one and the same answer throughout.

    Cohen (1960), Educational and Psychological Measurement 20. Taught in notebooks/06_creative_text.ipynb, section 13.
    """
    both = pd.concat([pd.Series(one), pd.Series(other)], axis=1, join="inner").astype(str).to_numpy()
    if len(both) < 2:
        raise ValueError(f"Both people answered {len(both)} of the same items; kappa needs at least two.")
    if len(np.unique(both)) < 2:
        raise ValueError(
            f"Both people answered {both[0, 0]!r} throughout: kappa is not defined, report the agreement itself."
        )
    rng, values = np.random.default_rng(seed), []
    for _ in range(draws):
        a, b = both[rng.integers(0, len(both), len(both))].T
        if len(set(a) | set(b)) > 1:
            values.append(cohen_kappa_score(a, b))
    return Estimate(float(cohen_kappa_score(*both.T)), *map(float, np.quantile(values, [0.025, 0.975])))
