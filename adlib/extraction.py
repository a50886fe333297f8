"""Key features out of product descriptions (a tagger on MiniLM), and selling points out of reviews.

Taught in notebooks/05_gpu_fine_tuning.ipynb, section 7.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.utils.validation import check_is_fitted
from torch.nn import functional as F
from tqdm.auto import tqdm

from adlib import compute
from adlib.pretrained import arithmetic, checked_texts, length_batches, load_reader, padded
from adlib.tuning import rate_share

OUTSIDE, BEGIN, INSIDE = 0, 1, 2


class PhraseTagger(BaseEstimator):
    """Finds phrases in texts: MiniLM gives each token one of three tags, outside, begin or inside of a phrase (Ramshaw and Marcus 1995).

    Parameters
    ----------
    model : see ``load_reader``. frozen : layers from the bottom that stay as they are.
    epochs, batch_size, learning_rate : of AdamW with warm-up and linear decay. max_tokens : longer texts are cut off.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 7.
    """

    def __init__(
        self,
        *,
        model="minilm",
        frozen=3,
        epochs=1,
        batch_size=16,
        learning_rate=3e-4,
        max_tokens=96,
        device="auto",
        seed=0,
        progress=True,
    ):
        self.model, self.frozen, self.epochs, self.batch_size = model, frozen, epochs, batch_size
        self.learning_rate, self.max_tokens, self.device = learning_rate, max_tokens, device
        self.seed, self.progress = seed, progress

    def fit(self, X: Sequence[str], y: Sequence[Sequence[str]]) -> "PhraseTagger":
        """Learn from n texts and, for each, the phrases that should be found in it (case is ignored).

        Raises
        ------
        ValueError
            For empty texts, unequal lengths, or if no phrase occurs in any text. MemoryError with the batch size to try.
        """
        texts = checked_texts(X, "texts")
        if len(texts) != len(y):
            raise ValueError(f"{len(texts)} texts do not match {len(y)} lists of phrases.")
        self.encoder_, self.tokenizer_ = load_reader(self.model, device=self.device)
        self.encoder_.embeddings.requires_grad_(False)
        for layer in self.encoder_.encoder.layer[: self.frozen]:
            layer.requires_grad_(False)
        rows, spans = self._tokens(texts)
        tags = [_tags(text, phrases, places) for text, phrases, places in zip(texts, y, spans, strict=True)]
        if not any(BEGIN in row for row in tags):
            raise ValueError("None of the phrases occurs in its text: there is nothing to learn.")
        self.head_ = torch.nn.Linear(self.encoder_.config.hidden_size, 3, device=self.encoder_.device)
        torch.nn.init.zeros_(self.head_.weight)
        torch.nn.init.zeros_(self.head_.bias)
        with compute.own_randomness(self.seed), compute.memory_guard(self.batch_size):
            self._fit(rows, tags)
        self.encoder_.eval()
        return self

    def _fit(self, rows: list[list[int]], tags: list[list[int]]) -> None:
        body = [weight for weight in self.encoder_.parameters() if weight.requires_grad]
        groups = [{"params": body}, {"params": self.head_.parameters(), "lr": 10 * self.learning_rate}]
        optimiser = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=0.01, fused=True)
        rng, lengths = np.random.default_rng(self.seed), [len(row) for row in rows]
        batches = [batch for _ in range(self.epochs) for batch in length_batches(lengths, self.batch_size, rng)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_share(step, len(batches)))
        self.encoder_.train()
        for batch in tqdm(batches, desc="tagging", disable=not self.progress):
            right, _ = padded([tags[i] for i in batch], -100, self.encoder_.device, left=False)
            F.cross_entropy(self._logits([rows[i] for i in batch]).flatten(0, 1), right.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(body, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()

    def _tokens(self, texts: list[str]) -> tuple[list, list]:
        found = self.tokenizer_(texts, truncation=True, max_length=self.max_tokens, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    def _logits(self, rows: list[list[int]]) -> torch.Tensor:
        ids, mask = padded(rows, self.tokenizer_.pad_token_id, self.encoder_.device, left=False)
        with arithmetic(ids.device, compute.dtype(ids.device)):
            return self.head_(self.encoder_(input_ids=ids, attention_mask=mask).last_hidden_state.float()).float()

    @torch.inference_mode()
    def predict(self, X: Sequence[str]) -> list[list[str]]:
        """The phrases found in each of n texts, in lower case and in order."""
        check_is_fitted(self, "encoder_")
        texts = checked_texts(X, "texts")
        rows, spans = self._tokens(texts)
        found: list = [None] * len(texts)
        for batch in length_batches([len(row) for row in rows], 64):
            tags = self._logits([rows[i] for i in batch]).argmax(-1).tolist()
            for i, row in zip(batch, tags, strict=True):
                found[i] = _phrases(texts[i], row, spans[i])
        return found


def _tags(text: str, phrases: Sequence[str], places: Sequence[tuple[int, int]]) -> list[int]:
    """Tags of the tokens at the given places (first and last character) of a text."""
    tags = [OUTSIDE] * len(places)
    for phrase in phrases:
        for match in re.finditer(rf"\b{re.escape(phrase.lower())}\b", text.lower()):
            inside = [k for k, (a, b) in enumerate(places) if match.start() <= a < b <= match.end()]
            for k in inside:
                tags[k] = BEGIN if k == inside[0] else INSIDE
    return tags


def _phrases(text: str, tags: Sequence[int], places: Sequence[tuple[int, int]]) -> list[str]:
    """The phrases that tags mark in a text; a part of a word marks the whole word."""
    found: list[list[int]] = []
    for tag, (a, b) in zip(tags, places, strict=False):
        if tag == OUTSIDE or a == b:
            continue
        if found and (tag == INSIDE or a == found[-1][1]) and not text[found[-1][1] : a].strip():
            found[-1][1] = b
        elif tag == BEGIN:
            found.append([a, b])
    return [text[a:b].lower() for a, b in found]


def selling_points(texts: Sequence[str], liking: Sequence[float], *, minimum: int = 6) -> pd.DataFrame:
    """What pleases and what displeases: words and pairs of words of reviews, with how much the sentences that name them are liked.

    A phrase's score is the mean liking of its sentences minus that of the others, with a 95 % interval (Welch); several phrases
    are looked at, so the interval of a single one is too narrow by chance alone.

    Parameters
    ----------
    texts : n sentences. liking : n numbers, such as the probability that a sentence is pleased. minimum : sentences a phrase needs.

    Returns
    -------
    DataFrame, best first: phrase, sentences (number), score, low, high.

    Raises
    ------
    ValueError
        For empty texts, or if no phrase is that frequent.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 7.
    """
    counter = CountVectorizer(
        ngram_range=(1, 2), min_df=minimum, binary=True, stop_words="english", token_pattern=r"[a-z]{3,}"
    )
    texts, liking = checked_texts(texts, "texts"), np.asarray(liking, float)
    try:
        there = counter.fit_transform(texts).toarray().astype(bool)
    except ValueError as error:
        raise ValueError(f"No phrase stands in {minimum} of the {len(texts)} texts: lower minimum.") from error
    rows = []
    for phrase, named in zip(counter.get_feature_names_out(), there.T, strict=True):
        own, other = liking[named], liking[~named]
        gap = own.mean() - other.mean()
        reach = 1.96 * np.sqrt(own.var(ddof=1) / len(own) + other.var(ddof=1) / len(other))
        rows.append([phrase, len(own), gap, gap - reach, gap + reach])
    table = pd.DataFrame(rows, columns=["phrase", "sentences", "score", "low", "high"])
    return table.sort_values("score", ascending=False, ignore_index=True)
