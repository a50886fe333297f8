"""Reading texts with BERT (MiniLM unless another is named): vectors, and a classifier that is fine-tuned in one of four ways.

Taught in notebooks/05_gpu_fine_tuning.ipynb, sections 6 and 7.
"""

import copy
import time
from collections.abc import Sequence

import numpy as np
import peft
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.validation import check_is_fitted
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adlib import compute
from adlib.pretrained import arithmetic, checked_texts, length_batches, load_minilm, load_reader, padded
from adlib.tuning import rate_share

ENCODER_MATRICES = (
    r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
)


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

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 6.
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
    """BERT with a linear layer on its mean vector, trained together; labels may be anything scikit-learn takes as classes.

    What is trained besides the linear layer decides the way of transfer: all layers; with ``frozen`` only those above; with ``rank``
    low-rank adapters in all of them (Hu et al. 2021). The word embeddings always stay as they are.

    Parameters
    ----------
    model : see ``load_reader``. layers : so many of its layers are kept, spread evenly (a smaller student); None: all.
    frozen : layers from the bottom that stay as they are. rank : of the adapters; None: no adapters.
    epochs, batch_size, learning_rate : of AdamW with warm-up and linear decay; the linear layer learns ten times as fast
        (twice with adapters).
    class_weight : None, or "balanced": a rare class counts as much as a common one.
    max_tokens : longer texts are cut off.

    Attributes
    ----------
    classes_ : the classes, in the order of the columns of ``predict_proba``. trained_ : number of weights that were trained.
    seconds_ : of the training.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, sections 6 and 7.
    """

    def __init__(
        self,
        *,
        model="minilm",
        layers=None,
        frozen=0,
        rank=None,
        epochs=1,
        batch_size=16,
        learning_rate=2e-4,
        class_weight=None,
        max_tokens=64,
        device="auto",
        seed=0,
        progress=True,
    ):
        self.model, self.layers, self.frozen, self.rank = model, layers, frozen, rank
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.class_weight, self.max_tokens, self.device = class_weight, max_tokens, device
        self.seed, self.progress = seed, progress

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
        classes, target = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"All labels are {str(classes[0])!r}: there is nothing to tell apart.")
        weight = np.ones(len(classes))
        if self.class_weight:
            weight = compute_class_weight(self.class_weight, classes=classes, y=labels)
        encoder, self.tokenizer_ = load_reader(self.model, device=self.device)
        return self._begin(encoder, classes)._fit(texts, torch.from_numpy(target), weight)

    def distil(
        self, teacher: "SentimentClassifier", X: Sequence[str], temperature: float = 2.0
    ) -> "SentimentClassifier":
        """Learn a fitted teacher's probabilities of n texts, which need no labels (Hinton et al. 2015, arXiv 1503.02531).

        The student starts from the teacher's own layers, as many as ``layers`` says; its target is softmax(z / ``temperature``) of
        the teacher's logits z.

        Raises
        ------
        ValueError
            For empty texts. MemoryError with the batch size to try.
        """
        texts, self.tokenizer_ = checked_texts(X, "texts"), teacher.tokenizer_
        share = torch.from_numpy(teacher.predict_proba(texts)).clamp(min=1e-6).log() / temperature
        self._begin(copy.deepcopy(teacher.encoder_), teacher.classes_)
        return self._fit(texts, share.softmax(-1).float(), np.ones(len(self.classes_)))

    def _begin(self, encoder: PreTrainedModel, classes: np.ndarray) -> "SentimentClassifier":
        stack = encoder.encoder.layer
        if self.layers is not None:
            if not 1 <= self.layers <= len(stack):
                raise ValueError(f"layers must lie between 1 and {len(stack)}, got {self.layers}.")
            kept = np.linspace(len(stack) - 1, 0, self.layers).round().astype(int)[::-1]
            stack = encoder.encoder.layer = torch.nn.ModuleList(stack[i] for i in kept)
            encoder.config.num_hidden_layers = len(stack)
        encoder.requires_grad_(True).embeddings.requires_grad_(False)
        encoder.pooler = None  # never used: the mean vector stands for the text
        if self.rank:
            config = peft.LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=ENCODER_MATRICES)
            with compute.own_randomness(self.seed):
                encoder = peft.inject_adapter_in_model(config, encoder)
        for layer in stack[: self.frozen]:
            layer.requires_grad_(False)
        self.encoder_, self.classes_, self.exact_ = encoder, classes, False
        self.head_ = torch.nn.Linear(encoder.config.hidden_size, len(classes), device=encoder.device)
        torch.nn.init.zeros_(self.head_.weight)  # so that no random number decides where training starts
        torch.nn.init.zeros_(self.head_.bias)
        return self

    def _fit(self, texts: list[str], target: torch.Tensor, weight: np.ndarray) -> "SentimentClassifier":
        rows, place, begin = self._tokens(texts), self.head_.weight.device, time.perf_counter()
        target, weight = target.to(place), torch.tensor(weight, dtype=torch.float32, device=place)
        body = [weight for weight in self.encoder_.parameters() if weight.requires_grad]
        rates = self.learning_rate, self.learning_rate * (2 if self.rank else 10)
        groups = [{"params": body, "lr": rates[0]}, {"params": self.head_.parameters(), "lr": rates[1]}]
        optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.01, fused=True)
        rng, lengths = np.random.default_rng(self.seed), [len(row) for row in rows]
        batches = [batch for _ in range(self.epochs) for batch in length_batches(lengths, self.batch_size, rng)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_share(step, len(batches)))
        self.encoder_.train()
        with compute.own_randomness(self.seed), compute.memory_guard(self.batch_size):  # the seed is for dropout
            for batch in tqdm(batches, desc="fine-tuning", disable=not self.progress):
                F.cross_entropy(self._logits([rows[i] for i in batch]), target[batch], weight).backward()
                torch.nn.utils.clip_grad_norm_(body, 1.0)
                optimiser.step()
                schedule.step()
                optimiser.zero_grad()
        self.encoder_.eval()
        self.trained_ = sum(w.numel() for w in (*body, *self.head_.parameters()))
        self.seconds_ = time.perf_counter() - begin
        return self

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer_(texts, truncation=True, max_length=self.max_tokens)["input_ids"]

    def logits(self, X: Sequence[str]) -> torch.Tensor:
        """Logits of n texts, (n, classes), through which a gradient can go back."""
        check_is_fitted(self, "encoder_")
        return self._logits(self._tokens(checked_texts(X, "texts")))

    def _logits(self, rows: list[list[int]]) -> torch.Tensor:
        return self.head_(_mean_vector(self.encoder_, rows, self.tokenizer_.pad_token_id, self.exact_))

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
