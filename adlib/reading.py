"""Reading texts with MiniLM: vectors, and a classifier fine-tuned on them. Taught in notebooks/05_gpu_fine_tuning.ipynb, section 5."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adlib import compute
from adlib.pretrained import arithmetic, checked_texts, length_batches, load_minilm, padded


def _mean_vector(model: PreTrainedModel, rows: Sequence[list[int]], pad: int, exact: bool = False) -> torch.Tensor:
    """Mean of the last hidden states over the tokens of each row, (rows, 384) float32."""
    ids, mask = padded(rows, pad, model.device, left=False)
    with arithmetic(model.device, torch.float32 if exact else compute.dtype(model.device)):
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.inference_mode()
def embed(
    texts: Sequence[str],
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    batch_size: int = 64,
    max_tokens: int = 128,
    exact: bool = False,
    progress: bool = False,
) -> np.ndarray:
    """Texts as MiniLM vectors of length 1, so that a dot product is a cosine similarity.

    Parameters
    ----------
    texts : n texts; more than ``max_tokens`` tokens are cut off.
    model, tokenizer : from ``load_minilm``; loaded here if not given.
    exact : float32 throughout; otherwise bfloat16 where the hardware has it (cosine to the exact vector above .999).

    Returns
    -------
    (n, 384) float32.

    Raises
    ------
    ValueError
        For an empty list or an empty text. MemoryError with the batch size to try.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 5.
    """
    texts = checked_texts(texts, "texts")
    if model is None or tokenizer is None:
        model, tokenizer = load_minilm()
    rows = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    vectors = np.empty((len(rows), model.config.hidden_size), np.float32)
    batches = length_batches([len(row) for row in rows], batch_size)
    with compute.memory_guard(batch_size):
        for batch in tqdm(batches, desc="reading", disable=not progress):
            vector = _mean_vector(model, [rows[i] for i in batch], tokenizer.pad_token_id, exact)
            vectors[batch] = F.normalize(vector, dim=1).cpu().numpy()
    return vectors


class SentimentClassifier(ClassifierMixin, BaseEstimator):
    """MiniLM with a linear layer on its mean vector, all trained together; labels may be anything scikit-learn takes as classes.

    Parameters
    ----------
    epochs, batch_size, learning_rate : of AdamW with warm-up and linear decay.
    frozen : layers from the bottom that stay as they are (0-6); the word embeddings always do.
    max_tokens : longer texts are cut off.

    Attributes
    ----------
    classes_ : the classes, in the order of the columns of ``predict_proba``.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 5.
    """

    def __init__(
        self,
        *,
        epochs=1,
        batch_size=16,
        learning_rate=2e-4,
        frozen=0,
        max_tokens=64,
        device="auto",
        seed=0,
        progress=True,
    ):
        self.epochs, self.batch_size, self.learning_rate, self.frozen = epochs, batch_size, learning_rate, frozen
        self.max_tokens, self.device, self.seed, self.progress = max_tokens, device, seed, progress

    def fit(self, X: Sequence[str], y: Sequence) -> "SentimentClassifier":
        """Fine-tune on n texts and their n labels.

        Raises
        ------
        ValueError
            For empty texts, unequal lengths, or labels of one class only. MemoryError with the batch size to try.
        """
        texts, labels = checked_texts(X, "texts"), np.asarray(y)
        if len(texts) != len(labels):
            raise ValueError(f"{len(texts)} texts do not match {len(labels)} labels.")
        self.classes_, target = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"All labels are {str(self.classes_[0])!r}: there is nothing to tell apart.")
        self.encoder_, self.tokenizer_ = load_minilm(device=self.device)
        self.encoder_.embeddings.requires_grad_(False)
        for layer in self.encoder_.encoder.layer[: self.frozen]:
            layer.requires_grad_(False)
        self.head_ = torch.nn.Linear(self.encoder_.config.hidden_size, len(self.classes_), device=self.encoder_.device)
        torch.nn.init.zeros_(self.head_.weight)  # so that no random number decides where training starts
        torch.nn.init.zeros_(self.head_.bias)
        with torch.random.fork_rng(devices=[]), compute.memory_guard(self.batch_size):
            torch.manual_seed(self.seed)  # dropout
            self._fit(self._tokens(texts), torch.from_numpy(target).to(self.encoder_.device))
        self.encoder_.eval()
        return self

    def _fit(self, rows: list[list[int]], target: torch.Tensor) -> None:
        rng = np.random.default_rng(self.seed)
        body = [weight for weight in self.encoder_.parameters() if weight.requires_grad]
        groups = [
            {"params": body, "lr": self.learning_rate},
            {"params": self.head_.parameters(), "lr": 10 * self.learning_rate},
        ]
        steps = self.epochs * math.ceil(len(rows) / self.batch_size)
        shape = lambda step: min((step + 1) / max(1, steps // 10), (steps - step) / steps)  # noqa: E731
        optimiser = torch.optim.AdamW(groups, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, shape)
        self.encoder_.train()
        lengths = [len(row) for row in rows]
        batches = [batch for _ in range(self.epochs) for batch in length_batches(lengths, self.batch_size, rng)]
        for batch in tqdm(batches, desc="fine-tuning", disable=not self.progress):
            loss = F.cross_entropy(self._logits([rows[i] for i in batch]), target[batch])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(body, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer_(texts, truncation=True, max_length=self.max_tokens)["input_ids"]

    def _logits(self, rows: list[list[int]]) -> torch.Tensor:
        return self.head_(_mean_vector(self.encoder_, rows, self.tokenizer_.pad_token_id))

    @torch.inference_mode()
    def predict_proba(self, X: Sequence[str]) -> np.ndarray:
        """Probability of each class for n texts, (n, classes), columns as in ``classes_``."""
        check_is_fitted(self, "encoder_")
        rows = self._tokens(checked_texts(X, "texts"))
        share = np.empty((len(rows), len(self.classes_)))
        for batch in length_batches([len(row) for row in rows], 64):
            share[batch] = self._logits([rows[i] for i in batch]).softmax(-1).cpu().numpy()
        return share

    def predict(self, X: Sequence[str]) -> np.ndarray:
        """The likeliest class of n texts, (n,)."""
        share = self.predict_proba(X)
        return self.classes_[share.argmax(1)]
