"""Randomised tests of headlines become pairs with a winner, grouped by story. Taught in notebooks/06_creative_text.ipynb, section 15."""

import re

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from adlib.evaluation import sample_ratio_alarms

TROUBLE = (
    201325,
    201401,
)  # year and week (weeks begin on Sunday) of 25 June 2013 and 10 January 2014: randomisation in doubt (erratum of 2024)


def stories(variants: pd.DataFrame) -> np.ndarray:
    """Number of the story of each variant, (n,): tests that share a headline or lede tell one story and must not be split.

    A text that stands in more than ten tests is a slogan of the site and links nothing.
    """
    nodes, links = [pd.factorize(variants["test_id"])[0]], []
    for column in ("headline", "lede"):
        plain = [re.sub(r"<.*?>|\W+", " ", str(text)).strip().lower() for text in variants[column].fillna("")]
        codes = pd.factorize(np.array(plain, object))[0]
        tests = pd.Series(nodes[0]).groupby(codes).transform("nunique").to_numpy()
        known = (tests <= 10) & (np.char.str_len(np.array(plain)) > 0)
        links.append((nodes[0][known], codes[known] + sum(n.max() + 1 for n in nodes)))
        nodes.append(codes)
    size = sum(n.max() + 1 for n in nodes)
    row, column = (np.concatenate(parts) for parts in zip(*links, strict=True))
    return connected_components(coo_matrix((np.ones(len(row)), (row, column)), (size, size)), directed=False)[1][
        nodes[0]
    ]


def headline_pairs(variants: pd.DataFrame, *, alpha: float = 0.001) -> tuple[pd.DataFrame, pd.Series]:
    r"""Pairs of headlines that were tested against each other with the same picture, and which got more clicks a showing.

    .. math:: z = \frac{\hat p_1 - \hat p_2}{\sqrt{\hat p (1 - \hat p)(1 / n_1 + 1 / n_2)}}

    Parameters
    ----------
    variants : as ``assets.read("upworthy")`` gives them. alpha : a test whose variants were shown so unequally that chance explains it with a
        smaller probability is left out (sample-ratio check, chi-square), as is the window ``TROUBLE``.

    Returns
    -------
    (pairs, report). pairs: story, test_id, winner, loser (headlines), z (≥ 0; above 1.96 significant at 5 %), lift (of the winner, relative).
    report: how many tests were left out and why, pairs and significant pairs.

    Raises
    ------
    ValueError : for missing columns, or if no pair is left.

    Matias et al. (2021), Scientific Data 8:195. Taught in notebooks/06_creative_text.ipynb, section 15.
    """
    needed = ["test_id", "headline", "lede", "picture", "impressions", "clicks", "week"]
    if missing := [c for c in needed if c not in variants]:
        raise ValueError(f"Headline tests need the column(s) {', '.join(missing)}.")
    frame = variants[needed].assign(story=stories(variants))
    doubtful = frame.week.astype(int).between(*TROUBLE)
    left = frame[~doubtful & (frame.impressions > 0) & frame.test_id.notna()]
    alarms = sample_ratio_alarms(left.test_id, left.impressions, alpha)
    uneven = alarms.index[alarms]
    kept = left[~left.test_id.isin(uneven)].drop_duplicates(["test_id", "picture", "headline"]).reset_index()
    both = kept.merge(kept, on=["test_id", "picture", "story"], suffixes=("_a", "_b"))
    both = both[both.index_a < both.index_b]
    if both.empty:
        raise ValueError("No two headlines of one test share a picture, so there is no pair.")
    n_a, n_b, x_a, x_b = (both[c].to_numpy(float) for c in ("impressions_a", "impressions_b", "clicks_a", "clicks_b"))
    pooled = (x_a + x_b) / (n_a + n_b)
    error = np.sqrt(np.maximum(pooled * (1 - pooled), 1e-12) * (1 / n_a + 1 / n_b))
    z, first = (x_a / n_a - x_b / n_b) / error, x_a / n_a >= x_b / n_b
    pairs = both[["story", "test_id"]].assign(
        winner=np.where(first, both.headline_a, both.headline_b),
        loser=np.where(first, both.headline_b, both.headline_a),
        z=np.abs(z),
        lift=np.maximum(x_a / n_a, x_b / n_b) / np.maximum(np.minimum(x_a / n_a, x_b / n_b), 1e-9) - 1,
    )
    report = {"tests": frame.test_id.nunique(), "in the doubtful window": frame.test_id[doubtful].nunique()}
    report |= {"shown unequally": len(uneven), "pairs": len(pairs), "significant pairs": int((pairs.z > 1.96).sum())}
    return pairs.reset_index(drop=True), pd.Series(report)
