"""Click models: will this person click this ad? One scikit-learn classifier for five architectures.

Taught in notebooks/03_ctr_modeling.ipynb.
"""

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import nn
from tqdm.auto import tqdm

from adlib import click_files, compute, parallel
from adlib.click_metrics import (
    Interval,
    expected_calibration_error,
    gap_to_oracle,
    log_loss_interval,
    log_losses,
    mean_interval,
    rank_slate,
    reliability,
    slate_value,
    threshold_table,
)  # fmt: skip
from adlib.encoding import UNSEEN, Encoder
from adlib.features import clicks, impression_features, leaking_columns, time_split, warn_of_leaks
from adlib.networks import ARCHITECTURES, Network, RowAdagrad, RowAdam, RowSums, bias_shift

__all__ = [
    "CTRModel", "Encoder", "Interval", "expected_calibration_error", "gap_to_oracle", "impression_features", "leaking_columns",
    "log_loss_interval", "log_losses", "mean_interval", "rank_slate", "reliability", "slate_value", "threshold_table", "time_split",
]  # fmt: skip

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # slots (n, fields) int32, numbers (n, m), clicks (n,) float32
CHOICES = {"architecture": ARCHITECTURES, "optimizer": ("adagrad", "adam"), "schedule": ("decay", "constant")}


class CTRModel(ClassifierMixin, BaseEstimator):
    """Click probability from a DataFrame: a scikit-learn classifier over one stacked table of embeddings.

    Every value of a categorical column has a row v and a weight w in the table; ``networks.Network`` turns the rows of an
    impression and its numbers into a logit. Row-wise Adagrad trains the table, Adagrad the linear weights and factors of the
    numbers at the same rate, Adam the dense weights. All rates rise over
    a tenth of the steps and then fall to zero, so that a second pass does not learn rare values by heart. The bias starts at
    the base rate and is settled in the end, so that the mean prediction is right.

    Parameters
    ----------
    architecture : "lr", "fm", "dnn", "deepfm" or "dcnv2".
    dim, hidden, dropout : length of v; widths of the perceptron; share of its units that a training step leaves out.
    feature_dropout : share of values that a training step replaces by "unseen", which so learns to stand in for them.
    l2 : weight decay; pulls dense weights, and rows each time they are used, towards zero, but never the bias.
    epochs, patience : passes over the rows; with ``validation``, stop after so many epochs without gain and keep the best.
    batch_size : rows a step.
    learning_rate, dense_learning_rate : highest rate of the table; of the dense weights.
    optimizer, schedule : "adagrad" (row-wise) or "adam" for the table; "decay" or "constant" rates.
    initial_accumulator, init_scale : start of the Adagrad sums; standard deviation of the first v.
    min_count, buckets, bins, text, text_dim : see ``Encoder``.
    bf16 : compute the perceptron in bfloat16: True, False (exact float32) or "auto", where the hardware multiplies it.
    device, seed : a torch device; decides first weights and order of rows.

    Attributes
    ----------
    classes_ (0, 1), base_rate_, encoder_, table_ (slots, dim), weights_ (slots,), network_; validation_curve_, mean log loss
    after each epoch; saved_curve_, at most ten values an epoch: nats saved against the base rate on batches before they are learnt
    from (progressive validation, as long as it is epoch one).

    Raises
    ------
    ValueError : a target not 0/1 or of one class, infinite numbers, other columns than in ``fit``, an unknown choice, a size
    below 1, ``patience`` without ``validation``.

    Taught in notebooks/03_ctr_modeling.ipynb, section 4.
    """

    def __init__(
        self,
        architecture="deepfm",
        dim=8,
        hidden=(64, 32),
        dropout=0.0,
        feature_dropout=0.0,
        l2=0.0,
        epochs=1,
        patience=None,
        batch_size=1024,
        learning_rate=0.1,
        dense_learning_rate=0.003,
        optimizer="adagrad",
        schedule="decay",
        initial_accumulator=50.0,
        init_scale=0.01,
        min_count=1,
        buckets=None,
        bins=None,
        text=(),
        text_dim=16,
        bf16="auto",
        device="cpu",
        seed=0,
    ):
        self.architecture, self.dim, self.hidden, self.dropout = architecture, dim, hidden, dropout
        self.feature_dropout, self.l2, self.epochs, self.patience = feature_dropout, l2, epochs, patience
        self.batch_size, self.learning_rate, self.dense_learning_rate = batch_size, learning_rate, dense_learning_rate
        self.optimizer, self.schedule = optimizer, schedule
        self.initial_accumulator, self.init_scale, self.min_count = initial_accumulator, init_scale, min_count
        self.buckets, self.bins, self.text, self.text_dim = buckets, bins, text, text_dim
        self.bf16, self.device, self.seed = bf16, device, seed

    def fit(self, X: pd.DataFrame, y, validation=None) -> "CTRModel":
        """Train on X: (n, d) and clicks y: (n,) of 0 and 1; validation is such a pair, scored after each epoch."""
        X, y = pd.DataFrame(X), clicks(y, len(X))
        self._start(self._encoder().fit(X), float(y.mean(dtype=float)))
        rows = self._encode(X, y)
        warn_of_leaks(X, y)
        if self.patience is not None and validation is None:
            raise ValueError(
                f"patience={self.patience} needs rows to watch: call fit(X, y, validation=(X_later, y_later))."
            )
        score = None
        if validation is not None:
            held = self._encode(pd.DataFrame(validation[0]), clicks(validation[1], len(validation[0]), both=False))
            score = lambda: float(log_losses(held[2], _sigmoid(self._logits(*held[:2]))).mean())  # noqa: E731
        return self._train(lambda epoch: [rows], len(y), score)

    def partial_fit(self, X: pd.DataFrame, y, classes=None) -> "CTRModel":
        """Learn from the next rows of a stream, once, at constant rates.

        The first call decides columns, values and scales; values that come later share the slot "unseen", unless
        ``buckets`` hashes them. A part may hold no click, the first one must. ``classes`` is ignored (scikit-learn's signature).
        """
        X = pd.DataFrame(X)
        y = clicks(y, len(X), both=not hasattr(self, "table_"))
        if not hasattr(self, "table_"):
            self._start(self._encoder().fit(X), float(y.mean(dtype=float)))
            warn_of_leaks(X, y)
        with compute.own_randomness(self.seed + self.steps_), compute.fast_cpu(exact=True, place=self._place):
            self._epoch([self._encode(X, y)], lambda step: 1.0)
        return self

    # -- training -------------------------------------------------------------------------------------------------------

    def _encoder(self) -> Encoder:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}.")
        sizes = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "dim": self.dim,
            "hidden": min(self.hidden, default=0),
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: give at least 1 (hidden: one width or more).")
        return Encoder(self.min_count, self.buckets, self.bins, self.text, self.text_dim)

    def _encode(self, X: pd.DataFrame, y: np.ndarray) -> Rows:
        return (*map(torch.from_numpy, self.encoder_.transform(X)), torch.from_numpy(y))

    def _start(self, encoder: Encoder, base_rate: float) -> None:
        """First weights of a model for an encoder that has seen the columns."""
        self.encoder_, self.classes_, self.base_rate_ = encoder, np.array([0, 1]), base_rate
        self.feature_names_in_, self.n_features_in_ = encoder.feature_names_in_, encoder.n_features_in_
        self._place = compute.device(str(self.device))
        dim, slots = 0 if self.architecture == "lr" else self.dim, int(encoder.offsets_[-1])
        fields, numbers = len(encoder.offsets_) - 1, len(encoder.centre_) + int(encoder.flagged_.sum())
        with compute.own_randomness(self.seed):
            bias = math.log(base_rate / (1 - base_rate))
            network = Network(self.architecture, fields, numbers, dim, self.hidden, self.dropout, bias)
            table = self.init_scale * torch.randn(slots, dim)
        self.network_, self.table_ = network.to(self._place), table.to(self._place)
        self.weights_ = torch.zeros(slots, device=self._place)
        self._sums = RowSums(self.table_, self.weights_)
        kind = RowAdagrad if self.optimizer == "adagrad" else RowAdam
        self._tables = kind(self.table_, self.initial_accumulator), kind(self.weights_, self.initial_accumulator)
        named = dict(network.named_parameters())
        numeric = [named.pop(name) for name in ("weights", "rows") if name in named]  # the table of the numbers
        free = {"params": [named.pop("bias")], "weight_decay": 0.0}
        often = {"initial_accumulator_value": self.initial_accumulator, "weight_decay": self.l2 * self.batch_size}
        self._dense = (
            torch.optim.Adagrad(numeric, self.learning_rate, **often),
            torch.optim.AdamW(
                [free, {"params": list(named.values())}], self.dense_learning_rate, weight_decay=self.l2, fused=True
            ),
        )
        self.steps_, self._saved, self.validation_curve_ = 0, [], []

    def _train(self, parts: Callable[[int], Iterable[Rows]], n: int, score: Callable[[], float] | None) -> "CTRModel":
        """Pass ``epochs`` times over parts(epoch), which hold n rows together; ``score`` gives a loss on held-out rows."""
        total, best = max(1, self.epochs * math.ceil(n / self.batch_size)), None
        decay = lambda step: min(max(1 - step / total, 0.0), (step + 1) / (0.1 * total))  # noqa: E731
        with (
            compute.own_randomness(self.seed),
            compute.fast_cpu(exact=True, place=self._place),
            tqdm(total=total, desc="click model", unit="step", delay=2, mininterval=0.5, leave=False) as bar,
        ):
            factor = decay if self.schedule == "decay" else lambda step: 1.0
            for epoch in range(self.epochs):
                some = self._epoch(parts(epoch), factor, bar, max(1, n // 2**16))
                self.validation_curve_ += [score()] if score else []
                if self.patience is not None and score:
                    if self.validation_curve_[-1] == min(self.validation_curve_):
                        best = copy.deepcopy((self.table_, self.weights_, self.network_.state_dict()))
                    elif epoch - int(np.argmin(self.validation_curve_)) >= self.patience:
                        break
        if best:
            self.table_.copy_(best[0])
            self.weights_.copy_(best[1])
            self.network_.load_state_dict(best[2])
        pieces = np.array_split(self._saved, min(10 * (epoch + 1), len(self._saved)))
        self.saved_curve_ = [float(piece.mean()) for piece in pieces]
        self._settle_bias(*some)
        return self

    def _epoch(
        self, parts: Iterable[Rows], factor: Callable[[int], float], bar=None, every: int = 1
    ) -> Iterable[torch.Tensor]:
        """One pass in random order within each part; returns slots and numbers of every so-many-th row of all parts."""
        self.network_.train()
        some = []
        for part in parts:
            some.append([t[::every] for t in part[:2]])
            for batch in torch.randperm(len(part[2])).split(self.batch_size):
                batch = parallel.share(batch)
                self._saved.append(self._step(*(t[batch].to(self._place) for t in part), factor(self.steps_)))
                self.steps_ += 1
                if bar is not None:
                    bar.update()
        self.network_.eval()
        return map(torch.cat, zip(*some, strict=True))

    def _step(self, slots: torch.Tensor, x: torch.Tensor, y: torch.Tensor, factor: float) -> float:
        """One step down the summed loss of a batch, the sum being what the accumulators are measured in."""
        if self.feature_dropout:
            first = torch.from_numpy(self.encoder_.offsets_[:-1] + UNSEEN).to(slots)
            slots = torch.where(torch.rand(slots.shape, device=slots.device) < self.feature_dropout, first, slots)
        start, own, used, V = self._look_up(slots, x)
        rows = self._sums.rows(used)
        together = parallel.Exchange(rows, len(used)) if parallel.size() > 1 else None
        start.requires_grad_()
        own.requires_grad_()
        loss = nn.functional.binary_cross_entropy_with_logits(self.network_(start, own, x), y, reduction="sum")
        self.network_.zero_grad()
        loss.backward()
        width = slots.shape[1] * self.table_.shape[1]
        gradients = (
            start.grad[:, :width].float().reshape(len(used), -1) if width else V.flatten(0, 1),
            own.grad[:, None].expand(slots.shape).flatten(),
        )
        sums = self._sums(used, rows, *gradients)
        if self.network_.paired:  # the squares in `own`
            sums[0].addcmul_(self.table_[rows], sums[1][:, None], value=-1)
        if self.l2:
            often = self.l2 * torch.bincount(used, minlength=len(self.table_))[rows]
            sums[0].addcmul_(self.table_[rows], often[:, None])
            sums[1].addcmul_(self.weights_[rows], often)
        if together:
            used, *gradients = together(self.network_, *sums)
            rows = self._sums.rows(used)
            sums = self._sums(used, rows, *gradients)
        for table, total in zip(self._tables, sums, strict=True):
            if total.numel():
                table.step(rows, total, self.learning_rate * factor)
        for optimizer in self._dense:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * factor
            optimizer.step()
        return log_losses(y.cpu(), self.base_rate_).mean() - loss.item() / len(y)  # of rows not yet learnt from

    def _look_up(self, slots: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For rows of slots (n, f) and numbers (n, m): what the network reads, start and own; the slots in one line; V."""
        used = slots.flatten().long()
        V, w = (
            self.table_.index_select(0, used).view(*slots.shape, self.table_.shape[1]),
            self.weights_[used].view(slots.shape),
        )
        return self.network_.start(V, x, self._dtype()), self.network_.own(V, w), used, V

    def _dtype(self) -> torch.dtype:
        if self.bf16 == "auto":
            return compute.dtype(self._place)
        return torch.bfloat16 if self.bf16 else torch.float32

    @torch.no_grad()
    def _settle_bias(self, slots: torch.Tensor, x: torch.Tensor) -> None:
        """Move the bias until the mean prediction on these rows, a sample of all, is the base rate."""
        self.network_.bias += bias_shift(self._logits(slots, x), self.base_rate_).to(self._place)

    # -- prediction -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _logits(self, slots: torch.Tensor, x: torch.Tensor, rows: int = 4096) -> torch.Tensor:
        out = [torch.empty(0)]
        with compute.fast_cpu(exact=True, place=self._place):
            parts = zip(slots.split(rows), x.to(self._place).split(rows), strict=True) if len(slots) else ()
            for s, numbers in parts:
                start, own, *_ = self._look_up(s.to(self._place), numbers)
                out.append(self.network_(start, own, numbers).cpu())
        return torch.cat(out)

    def decision_function(self, X: pd.DataFrame) -> np.ndarray:
        """Logits (n,) of a click."""
        check_is_fitted(self, "table_")
        return self._logits(*map(torch.from_numpy, self.encoder_.transform(pd.DataFrame(X)))).double().numpy()

    def predict_proba(self, X: pd.DataFrame) -> np.ndarray:
        """Probabilities (n, 2) of no click and of a click."""
        p = _sigmoid(self.decision_function(X))
        return np.column_stack([1 - p, p])

    def predict(self, X: pd.DataFrame) -> np.ndarray:
        """1 where a click is more likely than not, else 0; at usual click rates almost never: use ``predict_proba``."""
        return (self.decision_function(X) > 0).astype(int)

    # -- files ----------------------------------------------------------------------------------------------------------

    def save(self, folder) -> Path:
        """Write model.json (parameters, columns, values) and model.safetensors (weights) into a folder."""
        check_is_fitted(self, "table_")
        columns, tensors = click_files.encoder_state(self.encoder_)
        facts = {"params": self.get_params(), "encoder": columns, "base_rate": self.base_rate_}
        tensors |= {"table": self.table_, "weights": self.weights_}
        tensors |= {f"network.{name}": value for name, value in self.network_.state_dict().items()}
        return click_files.write(folder, facts, tensors)

    @classmethod
    def load(cls, folder, device: str = "cpu") -> "CTRModel":
        """Read a saved model; it predicts as before, and ``partial_fit`` goes on with fresh accumulators.

        Raises ValueError for a missing, damaged or foreign file, or if the two files are not of one model.
        """
        facts, tensors = click_files.read(folder)
        model = cls(**facts["params"] | {"device": device})
        model._start(click_files.encoder_from(facts["encoder"], tensors), facts["base_rate"])
        model.table_.copy_(tensors["table"])
        model.weights_.copy_(tensors["weights"])
        state = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        model.network_.load_state_dict(state)
        model.network_.eval()
        return model


def _sigmoid(logits) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(logits, dtype=float)))
