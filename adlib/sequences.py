"""Behaviour sequences: what a person did lately, event by event, as an input of a click model.

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
from torch import nn

from adlib import compute
from adlib.encoding import Encoder
from adlib.features import clicks
from adlib.networks import RowAdagrad, RowSums, bias_shift

__all__ = ["KINDS", "Histories", "Rows", "SequenceModel", "histories"]

KINDS = ("none", "cnn", "rnn", "lstm", "gru", "transformer")
HOURS_SCALE = math.log1p(24 * 90)  # log(1 + hours) of a season is about 1


class Histories(NamedTuple):
    """The last L events before each of n impressions, the most recent one in the last place; 0 stands for no event.

    codes (n, L, c) int32 and ad (n, c) int32 share their numbering, column by column, so that ad and past can be compared;
    hours (n, L) float32, time from the event to the impression; columns, c names; sizes, c numbers of codes with the 0;
    values, c arrays: what the codes 1, 2, ... stand for.
    """

    codes: np.ndarray
    hours: np.ndarray
    ad: np.ndarray
    columns: tuple[str, ...]
    sizes: tuple[int, ...]
    values: tuple[np.ndarray, ...] = ()

    def take(self, rows) -> "Histories":
        """The histories of these impressions (positions or a mask)."""
        return self._replace(codes=self.codes[rows], hours=self.hours[rows], ad=self.ad[rows])


class Rows(NamedTuple):
    """What a sequence model reads of n impressions: flat features, DataFrame (n, d), and histories."""

    flat: pd.DataFrame
    past: Histories

    def take(self, rows) -> "Rows":
        """These impressions (positions or a mask)."""
        return Rows(self.flat.iloc[rows], self.past.take(rows))


# -- histories -------------------------------------------------------------------------------------------------------------


def histories(
    tables: dict[str, pd.DataFrame], length: int = 16, columns=("category", "event"), known: Histories | None = None
) -> Histories:
    """Collect for each impression the last events of that person strictly before it.

    Parameters
    ----------
    tables : needs impressions and events; products and creatives where a column comes from the product.
    length : L, events kept; older ones are forgotten.
    columns : what is told of an event: a column of events (event, product_id) or of products (category, brand, ...). The
        ad is told in the same columns of its own product; a column that only events have is 0 there.
    known : histories whose columns and codes to use again, for a model that was trained on them; a new value gets 0.

    Returns
    -------
    Histories of the rows of ``tables["impressions"]``, in their order. A person without events has zeros only.

    Raises
    ------
    ValueError : length below 1, no columns, a table or a column that is not there, a missing time.

    Taught in notebooks/03_ctr_modeling.ipynb, section "Behaviour sequences".
    """
    if length < 1:
        raise ValueError(f"length={length}: a history needs room for at least one event.")
    columns = columns if known is None else known.columns
    if not columns:
        raise ValueError("columns is empty: name at least one thing that is told of an event.")
    shown, events = (_timed(tables, name) for name in ("impressions", "events"))
    users, span = pd.factorize(pd.concat([shown["user_id"], events["user_id"]]))[0], len(shown) + len(events)
    moments = pd.concat([shown["timestamp"], events["timestamp"]]).astype("datetime64[us, UTC]")
    times = moments.astype("int64").to_numpy()
    key = users * span + np.unique(times, return_inverse=True)[1]  # by person, then by moment
    n, order = len(shown), np.argsort(key[len(shown) :], kind="stable")
    happened = key[n:][order]
    end = np.searchsorted(happened, key[:n], side="left")  # left: what happens at the same moment is not yet known
    begin = np.searchsorted(happened, users[:n] * span)
    at = end[:, None] + np.arange(-length, 0)
    there = (at >= begin[:, None]) & (users[:n, None] >= 0)
    row = np.append(order, len(order))[np.where(there, at, len(order))]  # one row past the events stands for none
    numbered = zip(columns, known.values if known else [None] * len(columns), strict=True)
    codes, ad, values = zip(*(_codes(tables, shown, events, *pair) for pair in numbered), strict=True)
    past = [np.append(code, 0)[row] for code in codes]
    hours = np.where(there, (times[:n, None] - np.append(times[n:], 0)[row]) / 3.6e9, 0).astype(np.float32)
    sizes, ad = tuple(len(v) + 1 for v in values), np.stack(ad, 1).astype(np.int32)
    return Histories(np.stack(past, 2).astype(np.int32), hours, ad, tuple(columns), sizes, values)


def _timed(tables: dict[str, pd.DataFrame], name: str) -> pd.DataFrame:
    """A table with the two columns that put an event into a history, or a sentence that says what is missing."""
    if name not in tables:
        raise ValueError(f"There is no table of {name}: a history needs impressions and events.")
    table = tables[name]
    if missing := [c for c in ("user_id", "timestamp") if c not in table]:
        raise ValueError(f"The table of {name} lacks {' and '.join(missing)}: a history needs to know who and when.")
    if lost := int(table["timestamp"].isna().sum()):
        raise ValueError(f"The table of {name} lacks the time of {lost} rows; clean the table first.")
    return table


def _codes(tables, shown, events, name: str, values) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of one column for events (m,) and for the ads shown (n,), and what they stand for; 0 is unknown."""
    if name in events and name != "product_id":
        past, ad = events[name], pd.Series(pd.NA, index=shown.index)
    else:
        if "product_id" not in events:
            raise ValueError(f"The table of events lacks product_id, which the history's column '{name}' is read from.")
        past, ad = events["product_id"], _product(tables, shown)
        if name != "product_id":
            if name not in tables.get("products", ()):
                raise ValueError(f"Neither events nor products hold the column '{name}' that the history should tell.")
            of = tables["products"].drop_duplicates("product_id").set_index("product_id")[name]
            past, ad = past.map(of), ad.map(of)
    both = pd.concat([past.astype("object"), ad.astype("object")], ignore_index=True)
    if values is None:
        code, values = pd.factorize(both)
    else:
        code = pd.Index(values).get_indexer(both)
    return code[: len(past)] + 1, code[len(past) :] + 1, np.asarray(values)  # a missing or new value has code −1


def _product(tables, shown: pd.DataFrame) -> pd.Series:
    """The product that each ad shows, missing where nobody knows."""
    if "product_id" in shown:
        return shown["product_id"]
    if "creative_id" in shown and "creatives" in tables:
        ads = tables["creatives"].drop_duplicates("creative_id").set_index("creative_id")["product_id"]
        return shown["creative_id"].map(ads)
    return pd.Series(pd.NA, index=shown.index, dtype="object")


# -- encoders: (n, L, width) events, (n, width) ad, (n, L) which of them are there -> (n, dim) ------------------------------


class _Convolution(nn.Module):
    """Patterns of three events in a row, wherever they stand: a 1-D convolution, then mean and maximum over time."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.convolution, self.join = nn.Conv1d(width, dim, kernel_size=3, padding=1), nn.Linear(2 * dim, dim)

    def forward(self, steps, ad, there):
        """Summary (n, dim) of events `steps` (n, length, width) for the vector `ad` (n, width); `there` marks real events."""
        h = torch.relu(self.convolution(steps.transpose(1, 2))) * there.unsqueeze(1)
        return self.join(torch.cat([h.mean(2), h.amax(2)], dim=1))


class _Recurrence(nn.Module):
    """Read event after event and keep a state; the state after the latest event is the summary."""

    def __init__(self, width: int, dim: int, cell=nn.RNN):
        super().__init__()
        self.cell = cell(width, dim, batch_first=True)

    def forward(self, steps, ad, there):
        """State after the latest event, (batch, dim), of steps (batch, events, width)."""
        return self.cell(steps)[0][:, -1]


class _Attention(nn.Module):
    """One layer of a Transformer whose last token is the ad: what it gathers from the events is the summary."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.enter = nn.Linear(width, dim)
        self.attention = nn.MultiheadAttention(dim, num_heads=2, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])

    def forward(self, steps, ad, there):
        """Only the ad asks, since with one layer nothing else would be read: the same result at a fraction of the cost."""
        tokens = self.enter(torch.cat([steps, ad.unsqueeze(1)], dim=1))
        absent = torch.cat([~there, torch.zeros_like(there[:, :1])], dim=1)
        own, normed = tokens[:, -1:], self.norms[0](tokens)
        h = own + self.attention(normed[:, -1:], normed, normed, key_padding_mask=absent, need_weights=False)[0]
        return (h + self.feed(self.norms[1](h))).squeeze(1)


ENCODERS = {
    "cnn": _Convolution,
    "rnn": _Recurrence,
    "lstm": lambda width, dim: _Recurrence(width, dim, nn.LSTM),
    "gru": lambda width, dim: _Recurrence(width, dim, nn.GRU),
    "transformer": _Attention,
}


class _Network(nn.Module):
    """Bias + linear + perceptron over the flat features and, unless kind is "none", a summary of the history."""

    def __init__(self, kind: str, fields: int, numbers: int, sizes, dim: int, hidden, bias: float):
        super().__init__()
        self.kind, self.fields, self.bias = kind, fields, nn.Parameter(torch.tensor(bias))
        width = (dim + 1) * len(sizes) + 2
        if kind != "none":
            self.embeddings = nn.ModuleList(nn.Embedding(size, dim) for size in sizes)
            for table in self.embeddings:  # small, so that at first "same as the ad" is heard above the names
                nn.init.normal_(table.weight, std=0.1)
            self.encoder = ENCODERS[kind](width, dim)
        inner = fields * dim + numbers + (dim if kind != "none" else 0)
        pairs = itertools.pairwise([inner, *hidden])
        layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))
        nn.init.zeros_(self.mlp[-1].weight)  # so that the first prediction is the base rate
        nn.init.zeros_(self.mlp[-1].bias)

    def summary(self, codes, hours, ad) -> torch.Tensor:
        """(n, dim) from codes (n, L, c), hours (n, L) and the ad's codes (n, c)."""
        there = (codes > 0).any(2)
        same = ((codes == ad.unsqueeze(1)) & (codes > 0)).float()  # does this event concern what the ad shows?
        told = [table(codes[..., j]) for j, table in enumerate(self.embeddings)]
        age = torch.log1p(hours) / HOURS_SCALE
        place = 1 / torch.arange(hours.shape[1], 0, -1, device=hours.device).expand_as(hours)  # 1 for the latest event
        steps = torch.cat([*told, same, torch.stack([age, place], 2)], dim=2) * there.unsqueeze(2)
        own = [table(ad[:, j]) for j, table in enumerate(self.embeddings)]
        return self.encoder(steps, torch.cat([*own, (ad > 0).float(), hours.new_zeros(len(hours), 2)], dim=1), there)

    def forward(self, rows, numbers, past) -> torch.Tensor:
        """Logits (n,) from table rows (n · fields, 1 + dim), numbers (n, m) and the three parts of a history."""
        values = rows.view(len(numbers), self.fields, -1)
        parts = [values[..., 1:].flatten(1), numbers, *([] if self.kind == "none" else [self.summary(*past)])]
        return self.bias + values[..., 0].sum(1) + self.mlp(torch.cat(parts, dim=1)).squeeze(1)


# -- the estimator ---------------------------------------------------------------------------------------------------------


class SequenceModel(ClassifierMixin, BaseEstimator):
    """Click probability from flat features and the sequence of what the person did before: a scikit-learn classifier.

    logit = bias + Σ_i w_i + MLP(v_1, ..., v_f, numbers, h), h = encoder(events, ad). An event is told by the embeddings of
    its columns, by whether it equals the ad in each of them, by its age and by its place. Encoders: 1-D convolution,
    recurrent network (plain, LSTM, GRU), one Transformer layer in which the ad is the last token; "none" leaves h out.

    Parameters
    ----------
    kind : "none", "cnn", "rnn", "lstm", "gru" or "transformer".
    dim, hidden : length of v, of an event's embeddings and of h; widths of the perceptron.
    epochs, batch_size : passes over the rows; rows a step.
    learning_rate, dense_learning_rate : highest rate of the table (Adagrad); of all other weights (Adam). Both rise over a
        tenth of the steps and then fall to zero.
    initial_accumulator : start of the Adagrad sums. device, seed : a torch device; first weights and order of rows.

    Raises
    ------
    ValueError : unknown kind, clicks other than 0/1 or of one class, features and histories of different lengths, histories
        with other columns or codes than in ``fit``.

    Hochreiter, Schmidhuber (1997), LSTM; Cho et al. (2014), GRU; Vaswani et al. (2017), Attention is all you need;
    Chen et al. (2019), Behavior sequence transformer, DLP-KDD. Taught in notebooks/03_ctr_modeling.ipynb.
    """

    def __init__(
        self,
        kind="gru",
        dim=8,
        hidden=(64, 32),
        epochs=1,
        batch_size=2048,
        learning_rate=0.1,
        dense_learning_rate=0.01,
        initial_accumulator=50.0,
        device="cpu",
        seed=0,
    ):
        self.kind, self.dim, self.hidden, self.epochs, self.batch_size = kind, dim, hidden, epochs, batch_size
        self.learning_rate, self.dense_learning_rate = learning_rate, dense_learning_rate
        self.initial_accumulator, self.device, self.seed = initial_accumulator, device, seed

    def fit(self, X: Rows, y) -> "SequenceModel":
        """Train on the rows X and clicks y: (n,) of 0 and 1."""
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is unknown; choose one of {', '.join(KINDS)}.")
        y = clicks(y, len(X.flat))
        self.encoder_ = Encoder().fit(X.flat)
        self.classes_, self.base_rate_ = np.array([0, 1]), float(y.mean())
        self.columns_, self.sizes_, self.values_ = X.past.columns, X.past.sizes, X.past.values
        parts = self._tensors(X)
        with torch.random.fork_rng(devices=[]), compute.fast_cpu(place=self.device):
            torch.manual_seed(self.seed)
            bias = math.log(self.base_rate_ / (1 - self.base_rate_))
            shape = self.kind, parts[0].shape[1], parts[1].shape[1], X.past.sizes, self.dim
            self.network_ = _Network(*shape, self.hidden, bias).to(self.device)
            self.table_ = 0.01 * torch.randn(int(self.encoder_.offsets_[-1]), 1 + self.dim)
            self.table_[:, 0] = 0.0
            self.table_ = self.table_.to(self.device)
            self._train(parts, torch.from_numpy(y))
        some = self._logits([t[:: 1 + len(y) // 50_000] for t in parts])  # enough to see how far the mean is off
        with torch.no_grad():
            self.network_.bias += bias_shift(some, self.base_rate_).to(self.network_.bias)
        return self

    def _tensors(self, X: Rows) -> list[torch.Tensor]:
        """Slots, numbers, and the history's codes, hours and ad."""
        if len(X.flat) != len(X.past.hours):
            raise ValueError(f"{len(X.flat)} rows of features and {len(X.past.hours)} histories: take the same rows.")
        same = (X.past.columns, X.past.sizes) == (self.columns_, self.sizes_)
        if not same or not all(map(np.array_equal, X.past.values, self.values_)):
            told = f"{', '.join(self.columns_)} ({', '.join(map(str, self.sizes_))} codes)"
            raise ValueError(f"The model was fitted on {told}: call histories(..., known=those it learnt from).")
        return [torch.from_numpy(a) for a in (*self.encoder_.transform(X.flat), X.past.codes, X.past.hours, X.past.ad)]

    def _train(self, parts: list[torch.Tensor], y: torch.Tensor) -> None:
        table, sums = RowAdagrad(self.table_, self.initial_accumulator), RowSums(self.table_)
        dense = torch.optim.Adam(self.network_.parameters(), lr=self.dense_learning_rate, fused=True)
        batches = torch.cat([torch.randperm(len(y)) for _ in range(self.epochs)]).split(self.batch_size)
        for step, batch in enumerate(batches):
            decay = min(1 - step / len(batches), (step + 1) / (0.1 * len(batches)))
            dense.param_groups[0]["lr"] = self.dense_learning_rate * decay
            slots, numbers, *past = (t[batch].to(self.device) for t in parts)
            used = slots.flatten().long()
            rows = self.table_.index_select(0, used).requires_grad_()
            logit = self.network_(rows, numbers, past)
            loss = nn.functional.binary_cross_entropy_with_logits(logit, y[batch].to(self.device), reduction="sum")
            dense.zero_grad()
            loss.backward()
            dense.step()
            touched = sums.rows(used)
            table.step(touched, *sums(used, touched, rows.grad), self.learning_rate * decay)

    @torch.no_grad()
    def _logits(self, parts: list[torch.Tensor]) -> torch.Tensor:
        logits = []
        with compute.fast_cpu(place=self.device):
            for part in zip(*(t.split(8192) for t in parts), strict=True):
                slots, numbers, *past = (t.to(self.device) for t in part)
                logits.append(self.network_(self.table_.index_select(0, slots.flatten()), numbers, past).cpu())
        return torch.cat(logits).double()

    def decision_function(self, X: Rows) -> np.ndarray:
        """Logits (n,) of a click."""
        check_is_fitted(self)
        return self._logits(self._tensors(X)).numpy()

    def predict_proba(self, X: Rows) -> np.ndarray:
        """Probabilities (n, 2) of no click and of a click."""
        p = 1 / (1 + np.exp(-self.decision_function(X)))
        return np.column_stack([1 - p, p])
