"""From a table to what a network reads: integer slots of one stacked table, and robustly scaled numbers.

Taught in notebooks/03_ctr_modeling.ipynb, section 4.
"""

import warnings
from collections.abc import Iterable

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

UNSEEN, MISSING, KNOWN = 0, 1, 2  # the first slots of every categorical field; the known values start at KNOWN
SAMPLE = 200_000  # rows that medians, quantiles and the words of texts are learnt from


class Encoder(TransformerMixin, BaseEstimator):
    """Turn a table into integer slots (categorical columns) and scaled numbers (numeric, vector and text columns).

    Each categorical column owns a run of slots in one stacked table: one for values that training did not hold, one for
    missing values, then the known ones. A number becomes (x − median) / interquartile range, clipped to ±5; a missing one
    becomes 0, the median, and is flagged in a column of its own if training had such rows. A column of lists or arrays of
    one length is a vector of numbers. A text column becomes the leading directions of its words (TF-IDF, then SVD).

    Parameters
    ----------
    min_count : values seen in fewer rows share the first slot, which so learns what a rare value is like.
    buckets : hash the values of a categorical column into so many slots instead of listing them; for streams and huge ids.
    bins : give each numeric column a categorical twin, cut at so many quantiles; catches what is not linear.
    text, text_dim : names of the text columns; numbers that each becomes.

    Deerwester et al. (1990), JASIS 41 (text directions); Weinberger et al. (2009), ICML (hashing).
    """

    def __init__(self, min_count: int = 1, buckets: int | None = None, bins: int | None = None, text=(), text_dim=16):
        self.min_count, self.buckets, self.bins = min_count, buckets, bins
        self.text, self.text_dim = text, text_dim

    def fit(self, X: pd.DataFrame, y=None) -> "Encoder":
        """Learn the values of each categorical column, and centre and scale of each numeric one; X: (n, d)."""
        return self.fit_batches([X])

    def fit_batches(self, batches: Iterable[pd.DataFrame]) -> "Encoder":
        """Learn from a table that comes in parts; memory grows with the number of different values, not of rows."""
        counts, pool, rng, self.feature_names_in_, held = {}, [], np.random.default_rng(0), None, set()
        for part in map(named, batches):
            if self.feature_names_in_ is None:
                self._set_columns(part)
            self._check_columns(part)
            held |= {name for name in part.columns.difference(held) if part[name].notna().any()}
            for name in self.categorical_ if not self.buckets else ():
                seen = _texts(part[name]).value_counts(sort=False)
                seen = seen[seen > 0].set_axis(seen.index[seen > 0].astype(object))
                counts[name] = counts[name].add(seen, fill_value=0) if name in counts else seen
            part = part[[*self.numeric_, *self.vectors_, *self.text_]]  # of the others all values are counted
            pool.append(
                part if len(part) <= SAMPLE else part.iloc[np.sort(rng.choice(len(part), SAMPLE, replace=False))]
            )
            if sum(map(len, pool)) > 2 * SAMPLE:  # later parts weigh more; the medians of a shop do not notice
                pool = [pd.concat(pool).sample(SAMPLE, random_state=0)]
        if self.feature_names_in_ is None:
            raise ValueError("There is no row to learn the columns from.")
        for name in (name for name in self.feature_names_in_ if name not in held):
            warnings.warn(f"Column '{name}' holds no value at all: the model learns nothing from it.", stacklevel=4)
        self._learn(counts, pd.concat(pool) if len(pool) > 1 else pool[0])
        return self

    def _set_columns(self, X: pd.DataFrame) -> None:
        """Sort the columns into kinds by what they hold."""
        self.feature_names_in_, self.n_features_in_ = np.array(X.columns, dtype=object), X.shape[1]
        if unknown := [name for name in self.text if name not in X]:
            raise ValueError(f"text={unknown!r} is not a column of the table; it has {', '.join(map(str, X.columns))}.")
        self.text_ = list(self.text)
        self.vectors_ = {name: width for name in X if name not in self.text_ and (width := _width(X[name]))}
        rest = [name for name in X if name not in self.text_ and name not in self.vectors_]
        self.numeric_ = [name for name in rest if is_numeric(X[name])]
        self.categorical_ = [name for name in rest if name not in self.numeric_]

    def _learn(self, counts: dict[str, pd.Series], sample: pd.DataFrame) -> None:
        self.values_ = {
            n: pd.Index(c.index[c >= self.min_count], dtype=object).sort_values() for n, c in counts.items()
        }
        sizes = [KNOWN + (self.buckets or len(self.values_[name])) for name in self.categorical_]
        numbers = _numbers(sample, self.numeric_)
        inner = np.linspace(0, 1, (self.bins or 1) + 1)[1:-1]
        known = {name: column[~np.isnan(column)] for name, column in zip(self.numeric_, numbers.T, strict=True)}
        self.edges_ = {n: np.unique(np.quantile(v, inner)) if len(v) else np.empty(0) for n, v in known.items()}
        self.edges_ = self.edges_ if self.bins else {}
        self.offsets_ = np.cumsum([0, *sizes, *(KNOWN + len(edges) + 1 for edges in self.edges_.values())])
        self.words_ = {name: _learn_words(sample[name], self.text_dim) for name in self.text_}
        block = self._block(sample)
        self.flagged_ = np.isnan(block).any(axis=0)
        self.centre_, self.scale_ = _centre_and_scale(block)

    def _block(self, X: pd.DataFrame) -> np.ndarray:
        """All numbers (n, m) as they are: numeric columns, then vectors, then directions of texts; missing is NaN."""
        vectors = [_stack(X[name], width) for name, width in self.vectors_.items()]
        texts = [_directions(X[name], *words) for name, words in self.words_.items()]
        return np.hstack([_numbers(X, self.numeric_), *vectors, *texts])

    def _check_columns(self, X: pd.DataFrame) -> None:
        known = list(self.feature_names_in_)
        missing, new = [str(c) for c in known if c not in X], [str(c) for c in X if c not in known]
        if missing or new:
            found = f"missing: {', '.join(missing) or 'none'}; not known: {', '.join(new) or 'none'}"
            raise ValueError(f"The columns differ from those the model was fitted on ({found}).")

    def transform(self, X: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Encode a table with the columns of ``fit``, in any order: slots (n, fields) int32, numbers (n, m) float32."""
        X = named(X)
        self._check_columns(X)
        slots = np.empty((len(X), len(self.offsets_) - 1), dtype=np.int32)
        for j, name in enumerate(self.categorical_):
            texts = _texts(X[name])
            names = texts.cat.categories.astype(object)
            if self.buckets:
                at = (pd.util.hash_array(names.to_numpy(), categorize=False) % np.uint64(self.buckets)).astype(np.int64)
            else:
                at = self.values_[name].get_indexer(names)
            lookup = np.append(np.where(at < 0, UNSEEN, at + KNOWN), MISSING).astype(np.int32)  # missing has code −1
            slots[:, j] = self.offsets_[j] + lookup[texts.cat.codes]
        block = self._block(X)
        for j, (name, edges) in enumerate(self.edges_.items(), start=len(self.categorical_)):
            column = block[:, self.numeric_.index(name)]
            bins = KNOWN + np.searchsorted(edges, column, side="right")
            slots[:, j] = self.offsets_[j] + np.where(np.isnan(column), MISSING, bins)
        scaled = np.nan_to_num(np.clip((block - self.centre_) / self.scale_, -5, 5))
        return slots, np.hstack([scaled, np.isnan(block[:, self.flagged_])]).astype(np.float32)


def named(X: pd.DataFrame) -> pd.DataFrame:
    """The table with texts as names of columns (an array's are "0", "1", ...); two columns of one name are an error."""
    names = [str(name) for name in X.columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"The table has more than one column named {', '.join(twice)}: rename or drop all but one.")
    return X if names == list(X.columns) else X.set_axis(names, axis=1)


# -- kinds of columns ----------------------------------------------------------------------------------------------------


def is_numeric(column: pd.Series) -> bool:
    """Say whether a column holds numbers (truth values count as categories); a column of times is an error."""
    if pd.api.types.is_datetime64_any_dtype(column):
        raise ValueError(f"Column '{column.name}' holds times: turn it into hour, weekday or an age in days first.")
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _text(value) -> str:
    """How a value is known: a whole number the same whether it comes as 1, 1.0 or "1", a truth value as 1 or 0."""
    if isinstance(value, bool | np.bool_ | float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _texts(column: pd.Series) -> pd.Series:
    """The column as categories of text; missing values stay missing."""
    try:
        column = column.astype("category")
    except TypeError:
        raise ValueError(
            f"Column '{column.name}' holds lists or dicts of its own kind: give numbers, names, texts or equal vectors."
        ) from None
    codes, names = pd.factorize(np.array([_text(v) for v in column.cat.categories], dtype=object))
    known = pd.Categorical.from_codes(np.append(codes, -1)[column.cat.codes], names)  # missing has code −1
    return pd.Series(known, index=column.index, name=column.name)


def _numbers(X: pd.DataFrame, names: list[str]) -> np.ndarray:
    """Numeric columns (n, m) in float64; a missing number is NaN, infinity an error that names column and row."""
    out = np.empty((len(X), len(names)))
    for j, name in enumerate(names):
        if not is_numeric(X[name]):
            raise ValueError(f"Column '{name}' held numbers when the model was fitted; now it holds {X[name].dtype}.")
        out[:, j] = X[name].to_numpy(dtype=float, na_value=np.nan)
        _refuse_infinity(out[:, j], name)
    return out


def _refuse_infinity(values: np.ndarray, name: str) -> None:
    if len(rows := np.flatnonzero(np.isinf(np.atleast_2d(values.T)).any(axis=0))):
        raise ValueError(f"Column '{name}' holds an infinite number (first in row {rows[0]}): correct or empty it.")


def _width(column: pd.Series) -> int:
    """Length of the vectors in a column, 0 if it holds none."""
    first = column.dropna().iloc[:1] if column.dtype == object else ()
    return len(first.iloc[0]) if len(first) and isinstance(first.iloc[0], list | tuple | np.ndarray) else 0


def _stack(column: pd.Series, width: int) -> np.ndarray:
    """Vectors of a column (n, width); a missing one is a row of NaN."""
    whole = column.notna().to_numpy()
    lengths = {len(v) if isinstance(v, list | tuple | np.ndarray) else 1 for v in column[whole]}
    if lengths - {width}:
        found = ", ".join(map(str, sorted(lengths)))
        raise ValueError(f"Column '{column.name}' must hold vectors of length {width}; it holds lengths {found}.")
    out = np.full((len(column), width), np.nan)
    out[whole] = np.array(column[whole].tolist(), dtype=float).reshape(-1, width)
    _refuse_infinity(out, column.name)
    return out


def _learn_words(column: pd.Series, dim: int) -> tuple[TfidfVectorizer, np.ndarray]:
    """TF-IDF of the different texts of a column, and its leading directions (words, dim or fewer)."""
    texts = column.dropna().astype(str).unique()
    vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=50_000, token_pattern=r"(?u)\b\w+\b")
    try:
        weights = vectorizer.fit_transform(texts)
    except ValueError:
        raise ValueError(f"Column '{column.name}' is to be read as text and holds no word.") from None
    svd = TruncatedSVD(min(dim, min(weights.shape)), random_state=0, algorithm="randomized").fit(weights)
    return vectorizer, svd.components_.T


def _directions(column: pd.Series, vectorizer: TfidfVectorizer, directions: np.ndarray) -> np.ndarray:
    """Texts (n,) as numbers (n, dim); each different text is read once."""
    codes, texts = pd.factorize(column.astype("str").where(column.notna(), None))
    out = vectorizer.transform(texts.astype(object)) @ directions if len(texts) else np.empty((0, directions.shape[1]))
    return np.vstack([out, np.full((1, directions.shape[1]), np.nan)])[codes]  # a missing text has code −1: the last


def _centre_and_scale(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and interquartile range a column; where that is 0 the standard deviation, and 1 where that is 0 too."""
    centre, scale = np.zeros(numbers.shape[1]), np.ones(numbers.shape[1])
    for j, column in enumerate(numbers.T):
        if len(known := column[~np.isnan(column)]):
            low, centre[j], high = np.quantile(known, [0.25, 0.5, 0.75])
            scale[j] = (high - low) or known.std() or 1.0
    return centre, scale
