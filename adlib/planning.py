"""From a list to a plan: which product, which appeal and which promotion for whom; and a learning path that respects prerequisites.

Taught in notebooks/04_recommendation.ipynb, sections 7 and 8.
"""

from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from types import MappingProxyType

import numpy as np
import pandas as pd
from scipy import stats

PLAN_COLUMNS = ("segment", "rank", "product_id", "title", "appeal", "promotion", "reason")
# An appeal that makes a claim may only be used for a product whose features keep it
CLAIMS = MappingProxyType({"sustainability": ("organic", "recycled", "vegan")})


def appeal_response(
    impressions: pd.DataFrame, creatives: pd.DataFrame, segment: pd.Series, prior: float = 300.0
) -> pd.DataFrame:
    """Click rate of each appeal in each segment, with a 95 % interval, drawn to the segment's own rate.

    Beta(prior · r, prior · (1 − r)) before and clicks after, r the segment's rate: `prior` counts in impressions. Fair only where ads were shown at
    random; otherwise who saw an appeal differs from who did not.

    Parameters
    ----------
    impressions : user_id, creative_id, click (0/1). creatives : creative_id, appeal.
    segment : by user_id, the name of the segment; people without one are left out.

    Returns
    -------
    DataFrame, one row a segment and appeal: segment, appeal, shown, clicks, rate, low, high (0–1).

    Raises
    ------
    ValueError : if no impression belongs to a segment and an ad with an appeal.

    Notes
    -----
    Taught in notebooks/04_recommendation.ipynb, section 7.
    """
    appeal = creatives.set_index("creative_id")["appeal"]
    frame = pd.DataFrame(
        {
            "segment": impressions["user_id"].map(segment),
            "appeal": impressions["creative_id"].map(appeal),
            "click": impressions["click"],
        }
    ).dropna()
    if frame.empty:
        raise ValueError(
            "no impression belongs to both a segment and an ad with an appeal: check user_id and creative_id"
        )
    table = frame.groupby(["segment", "appeal"], observed=True)["click"].agg(shown="size", clicks="sum").reset_index()
    rate = frame.groupby("segment", observed=True)["click"].mean()
    own = table["segment"].map(rate).astype(float).clip(1e-6, 1 - 1e-6)
    a, b = prior * own + table["clicks"], prior * (1 - own) + table["shown"] - table["clicks"]
    return table.assign(rate=a / (a + b), low=stats.beta.ppf(0.025, a, b), high=stats.beta.ppf(0.975, a, b))


def plan(
    lists: np.ndarray,
    segment: Sequence[str],
    products: pd.DataFrame,
    appeals: pd.DataFrame,
    *,
    price_taste: Mapping[str, float] | None = None,
    n: int = 3,
) -> pd.DataFrame:
    """Which products, with which appeal and promotion, for each segment: a table for a marketer, and the briefs of lesson 06.

    A segment's products are those in most of its members' lists. The appeal is the one that the segment clicks most among those that the
    product keeps (``CLAIMS``). The promotion is a rule: where the segment takes the cheaper of two and the product is dear for its
    category, a voucher; where it is cheap for its category, its price in the ad; otherwise none, since a discount that nobody needs is a gift.

    Parameters
    ----------
    lists : (users, k) positions in `products`; segment : (users,) names; products : product_id, title and, where known, category, price, features.
    appeals : from ``appeal_response``. price_taste : by segment, above 0 where it takes the dearer of two. n : products a segment.

    Returns
    -------
    DataFrame with ``PLAN_COLUMNS``, n rows a segment; `reason` says in numbers why.

    Raises
    ------
    ValueError : if lists and segments differ in length, or a segment has no row in `appeals`.

    Notes
    -----
    Taught in notebooks/04_recommendation.ipynb, section 7.
    """
    lists, segment, stock = np.asarray(lists), np.asarray(segment), products.reset_index(drop=True)
    if len(lists) != len(segment):
        raise ValueError(f"{len(lists)} lists do not match {len(segment)} segments")
    overall, prices = _shares(lists, len(stock)), {} if price_taste is None else dict(price_taste)
    typical = stock.groupby("category")["price"].transform("median") if {"category", "price"} <= set(stock) else None
    rows = []
    for name in pd.unique(segment):
        response = appeals[appeals["segment"] == name].sort_values("rate", ascending=False)
        if response.empty:
            raise ValueError(f"segment {name} has no row in appeals: were its members shown any ad?")
        share, taste = _shares(lists[segment == name], len(stock)), prices.get(name, 0.0)
        for rank, i in enumerate(np.argsort(-share, kind="stable")[:n], start=1):
            best = next(
                r for r in response.itertuples() if _keeps(stock.loc[i], r.appeal) or r.Index == response.index[-1]
            )
            dear = float(stock.loc[i, "price"] / typical[i]) if typical is not None else 1.0
            mean = np.average(response["rate"], weights=response["shown"])
            reason = (
                f"in {share[i]:.0%} of the segment's lists ({overall[i]:.0%} of all); "
                f"{best.appeal} ads are clicked {best.rate:.2%}, its average is {mean:.2%}"
            )
            facts = name, rank, stock.loc[i, "product_id"], stock.loc[i, "title"], best.appeal
            rows.append((*facts, _promotion(taste, dear), reason))
    return pd.DataFrame(rows, columns=list(PLAN_COLUMNS))


def _shares(lists: np.ndarray, n: int) -> np.ndarray:
    return np.bincount(lists.ravel(), minlength=n) / max(len(lists), 1)


def _keeps(product: Mapping, appeal: str) -> bool:
    return appeal not in CLAIMS or any(word in str(product.get("features", "")) for word in CLAIMS[appeal])


def _promotion(taste: float, dear: float) -> str:
    if taste < 0 and dear > 1.1:
        return "10 % voucher"
    return "show the price" if taste < 0 and dear < 0.9 else "none"


# ---- courses ---------------------------------------------------------------------------------------------------------

TRACKS = MappingProxyType(
    {
        "data": ("Spreadsheets", "Statistics", "Python", "Machine learning", "Deep learning", "Language models"),
        "design": ("Drawing", "Colour and type", "Layout", "Photo editing", "Motion", "Brand design"),
        "business": ("Bookkeeping", "Pricing", "Marketing", "Web shop", "Advertising", "Growth"),
        "languages": ("English A1", "English A2", "English B1", "English B2", "Business English", "Public speaking"),
    }
)
CROSS = MappingProxyType(
    {"Advertising": "Statistics", "Growth": "Python", "Brand design": "Marketing"}
)  # from other tracks


def courses(n_learners: int = 1500, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A small simulated catalogue of online courses with prerequisites, and who took what when: the course's second catalogue.

    Learners like one or two tracks, and enrol only where the prerequisites are done, so every history is a valid path.

    Returns
    -------
    courses : course_id, title, track, level (1–6), hours, prerequisites (course ids, "a|b"). enrolments : user_id, course_id, timestamp (UTC).

    Notes
    -----
    Taught in notebooks/04_recommendation.ipynb, section 8.
    """
    rng = np.random.default_rng([seed, 40])
    rows = [(title, track, level) for track, titles in TRACKS.items() for level, title in enumerate(titles, start=1)]
    table = pd.DataFrame(rows, columns=["title", "track", "level"])
    table.insert(0, "course_id", [f"k{i:02d}" for i in range(len(table))])
    table["hours"] = rng.integers(6, 25, len(table))
    id_of = dict(zip(table["title"], table["course_id"], strict=True))
    before = [id_of[TRACKS[r.track][r.level - 2]] if r.level > 1 else "" for r in table.itertuples()]
    also = [id_of[CROSS[t]] if t in CROSS else "" for t in table["title"]]
    table["prerequisites"] = ["|".join(filter(None, pair)) for pair in zip(before, also, strict=True)]
    needs = prerequisites_of(table)
    taste = rng.gumbel(0, 1.5, (n_learners, len(TRACKS)))[:, pd.factorize(table["track"])[0]]
    taken = []
    for learner in range(n_learners):
        done: list[int] = []
        for _ in range(min(2 + rng.poisson(4), len(table))):
            open_now = [c for c in range(len(table)) if c not in done and needs[c] <= set(done)]
            done.append(open_now[int(np.argmax(taste[learner, open_now] + rng.gumbel(size=len(open_now))))])
        day = np.cumsum(rng.integers(7, 40, len(done)))
        taken += [(f"l{learner:04d}", table["course_id"][c], d) for c, d in zip(done, day, strict=True)]
    enrolments = pd.DataFrame(taken, columns=["user_id", "course_id", "day"])
    when = pd.Timestamp("2025-01-01", tz="UTC") + pd.to_timedelta(enrolments.pop("day"), unit="D")
    return table, enrolments.assign(timestamp=when)


def prerequisites_of(table: pd.DataFrame) -> list[set[int]]:
    """For each course the positions of those that must be done before, directly.

    Raises ValueError for a prerequisite that is no course and for courses that wait for each other in a circle.
    """
    row = {course: i for i, course in enumerate(table["course_id"])}
    needs = []
    for course, text in zip(table["course_id"], table["prerequisites"].fillna(""), strict=True):
        named = [part.strip() for part in text.split("|") if part.strip()]
        if unknown := [part for part in named if part not in row]:
            raise ValueError(f"course {course} needs {unknown[0]}, which is no course of the catalogue")
        needs.append({row[part] for part in named})
    try:
        TopologicalSorter(dict(enumerate(needs))).prepare()
    except CycleError as error:
        circle = " → ".join(str(table["course_id"].iloc[i]) for i in reversed(error.args[1]))
        raise ValueError(f"these courses wait for each other: {circle}. Nobody could ever begin") from None
    return needs


def learning_path(
    scores: np.ndarray, needs: Sequence[set[int]], done: Sequence[int] = (), length: int = 4
) -> list[int]:
    """The next courses in an order in which each can be taken.

    Again and again the goal whose bundle, itself and all that is missing for it, has the highest mean score and still fits is put on the path,
    prerequisites first. The path may be shorter than `length` if nothing else fits.

    Parameters
    ----------
    scores : (courses,) of one learner, higher is better, finite; needs : from ``prerequisites_of``; done : courses already taken.

    Returns
    -------
    list of at most `length` courses, as positions.

    Raises
    ------
    ValueError : if scores are not finite or not one a course.

    Notes
    -----
    Taught in notebooks/04_recommendation.ipynb, section 8.
    """
    scores = np.asarray(scores, float)
    if scores.shape != (len(needs),) or not np.isfinite(scores).all():
        raise ValueError(
            f"a path needs one finite score for each of the {len(needs)} courses; got shape {scores.shape}"
        )
    path: list[int] = []
    known = set(done)
    missing = _missing(needs)
    while len(path) < length:
        bundles = [missing(c, known) for c in range(len(needs)) if c not in known]
        fitting = [b for b in bundles if len(path) + len(b) <= length]
        if not fitting:
            break
        best = max(fitting, key=lambda bundle: scores[bundle].mean())
        path += best
        known |= set(best)
    return path


def _missing(needs: Sequence[set[int]]) -> Callable[[int, set[int]], list[int]]:
    """A function that lists what is to be taken for a course, prerequisites first and the course itself last."""

    def missing(course: int, known: set[int]) -> list[int]:
        """Courses to take for `course` by somebody who knows `known`, in order."""
        order: list[int] = []
        for before in sorted(needs[course] - known):
            order += [c for c in missing(before, known) if c not in order]
        return [*order, course]

    return missing
