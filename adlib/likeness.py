"""How like each other texts are: self-BLEU for variety; BLEU and ROUGE against human copy. Taught in notebooks/06_creative_text.ipynb, section 5.

BLEU comes from sacrebleu and ROUGE from rouge-score, which are needed only here.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import pandas as pd

LIBRARIES = ("sacrebleu", "rouge_score")


def available() -> bool:
    """Whether the two libraries that measure likeness are installed."""
    return all(find_spec(name) for name in LIBRARIES)


def _library(name: str):
    try:
        if name == "sacrebleu":
            import sacrebleu as library
        else:
            from rouge_score import rouge_scorer as library
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}. BLEU and ROUGE need: python -m pip install sacrebleu rouge-score"
        ) from error
    return library


def _checked(texts: Sequence[str], what: str) -> list[str]:
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"The {what} must be a list of at least one text.")
    if bad := [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]:
        raise ValueError(f"Text {bad[0]} of the {what} is empty or not a text: {texts[bad[0]]!r}. Remove it first.")
    return list(texts)


def self_bleu(texts: Sequence[str], *, words: int = 4) -> float:
    """How much a writer repeats itself: mean BLEU of each text against all others, 0 (never) to 1 (always the same).

    Smoothed (method 2 of Chen and Cherry 2014: one is added to the counts from word pairs on), since a short ad often shares no four words in
    a row with another, and plain BLEU is then zero. It rises with the number of texts: compare sets of the same size.

    Parameters
    ----------
    texts : two or more. words : longest run of words that is looked at.

    Raises
    ------
    ValueError : for fewer than two texts or an empty one. ModuleNotFoundError : without sacrebleu.

    Zhu et al. (2018), arXiv 1802.01886. Taught in notebooks/06_creative_text.ipynb, section 5.
    """
    texts = _checked(texts, "texts")
    if len(texts) < 2:
        raise ValueError("self-BLEU compares each text with the others, so it needs two or more.")
    measure = _library("sacrebleu").BLEU(
        smooth_method="add-k", smooth_value=1, max_ngram_order=words, effective_order=True, lowercase=True
    )
    scores = [measure.sentence_score(t, [*texts[:i], *texts[i + 1 :]]).score for i, t in enumerate(texts)]
    return float(np.mean(scores)) / 100


def against_reference(texts: Sequence[str], references: Sequence[str]) -> pd.DataFrame:
    """BLEU and ROUGE of each text against the text that a person wrote for the same brief, 0 to 1, one row a text.

    Returns
    -------
    DataFrame: bleu (smoothed, up to four words), rouge1, rouge2, rougeL (F1 of single words, word pairs, longest common sequence; stemmed).

    Raises
    ------
    ValueError : for unequal or empty lists or an empty text. ModuleNotFoundError : without the libraries.

    Papineni et al. (2002), ACL; Lin (2004), ACL workshop. Taught in notebooks/06_creative_text.ipynb, section 5.
    """
    texts, references = _checked(texts, "texts"), _checked(references, "references")
    if len(texts) != len(references):
        raise ValueError(f"{len(texts)} texts do not match {len(references)} references.")
    bleu = _library("sacrebleu").BLEU(smooth_method="add-k", smooth_value=1, effective_order=True, lowercase=True)
    kinds = ["rouge1", "rouge2", "rougeL"]
    rouge = _library("rouge_score").RougeScorer(kinds, use_stemmer=True)
    rows = []
    for text, reference in zip(texts, references, strict=True):
        found = rouge.score(reference, text)
        row = {"bleu": bleu.sentence_score(text, [reference]).score / 100}
        rows.append(row | {kind: found[kind].fmeasure for kind in kinds})
    return pd.DataFrame(rows)
