"""Prompts, pairs of prompt and target, and how likely a model finds the target: loss and perplexity.

Taught in notebooks/05_gpu_fine_tuning.ipynb, section 3.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import peft
import torch
from peft.helpers import disable_input_dtype_casting
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from adlib import compute
from adlib.pretrained import MAX_TOKENS, arithmetic, checked_texts, length_batches, padded


def prompt(attributes: str | Mapping[str, object], audience: str) -> str:
    """The compact prompt, about 40 tokens, on which the copywriter of lessons 05 and 06 is trained and asked.

    Line breaks, control characters and the model's own control tokens are taken out of what comes from data, so that a product
    cannot end the prompt and begin another.

    Parameters
    ----------
    attributes : "brand: Okaro; colour: navy; …", or a mapping of them.
    audience : for whom, e.g. "bargain hunters".

    Raises
    ------
    ValueError
        If either is empty.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 3.
    """
    if isinstance(attributes, Mapping):
        attributes = "; ".join(f"{name}: {value}" for name, value in attributes.items())
    facts, audience = (
        " ".join(re.sub(r"<\|.*?\|>|[\x00-\x1f\x7f]", " ", str(t)).split()) for t in (attributes, audience)
    )
    if not facts or not audience:
        raise ValueError("A prompt needs attributes and an audience, but one of them is empty.")
    return f"Product: {facts}\nAd for {audience}:"


class Pair(NamedTuple):
    """Token ids of a prompt and of the target that should follow it."""

    prompt: list[int]
    target: list[int]


def token_pairs(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], targets: Sequence[str]) -> list[Pair]:
    """Token ids of prompts and targets; a target starts with a space and ends with the end-of-text token."""
    prompts, targets = checked_texts(prompts, "prompts"), checked_texts(targets, "targets")
    if len(prompts) != len(targets):
        raise ValueError(f"{len(prompts)} prompts do not match {len(targets)} targets.")
    asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    written = tokenizer([f" {text.strip()}" for text in targets], add_special_tokens=False)["input_ids"]
    pairs = [Pair(p, [*t, tokenizer.eos_token_id]) for p, t in zip(asked, written, strict=True)]
    for i, pair in enumerate(pairs):
        if (length := len(pair.prompt) + len(pair.target)) > MAX_TOKENS:
            raise ValueError(
                f"Pair {i} has {length} tokens, more than {MAX_TOKENS}: shorten its description or its text."
            )
    return pairs


ROWS = 16  # of logits that are worked on at a time


class _CrossEntropy(torch.autograd.Function):
    """-log p of each label under a row of logits, (n, words) and (n,) to (n,).

    Loss and gradient, p - 1 at the label and p elsewhere, are computed together and a few rows at a time, which stay in a
    processor's cache meanwhile; the gradient is kept in the logits' own number format.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Losses (n,) in nats, float32; their gradient is computed only where one is asked for."""
        losses, gradient = torch.empty(len(labels), device=logits.device), None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(logits)
        for part in (slice(k, k + ROWS) for k in range(0, len(labels), ROWS)):
            log_p, label = logits[part].log_softmax(-1, dtype=torch.float32), labels[part, None]
            losses[part] = -log_p.gather(1, label)[:, 0]
            if gradient is not None:
                gradient[part] = log_p.exp_().scatter_add_(1, label, -torch.ones_like(label, dtype=log_p.dtype))
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Gradient of the logits (n, words) from that of the losses (n,)."""
        (gradient,) = ctx.saved_tensors
        return gradient * slope[:, None].to(gradient.dtype), None


def token_losses(model: PreTrainedModel, pairs: Sequence[Pair], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log likelihood of each target token given its prompt and the tokens before it, in nats, and the pair it belongs to.

    The output layer, 49,152 words wide, is the dearest of all; it is applied only where a token of a target is predicted. Rows are
    padded on the left, so that all targets end in the last column; the last token of each predicts nothing and is not read.
    """
    place = model.device
    ids, mask = padded([pair.prompt + pair.target[:-1] for pair in pairs], pad, place, left=True)
    longest = max(len(pair.target) for pair in pairs)
    labels = torch.tensor([[-100] * (longest - len(pair.target)) + pair.target for pair in pairs], device=place)
    whole = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with arithmetic(place, model.dtype), disable_input_dtype_casting(model):
        hidden = whole.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, -longest:]
        logits = whole.get_output_embeddings()(hidden[labels != -100])
    return _CrossEntropy.apply(logits, labels[labels != -100]), (labels != -100).nonzero()[:, 0]


def target_loss(model: PreTrainedModel, pairs: Sequence[Pair], pad: int) -> tuple[torch.Tensor, int]:
    """Summed negative log likelihood of the targets given their prompts, and the number of target tokens."""
    losses, _ = token_losses(model, pairs, pad)
    return losses.sum(), len(losses)


def log_likelihoods(model: PreTrainedModel, pairs: Sequence[Pair], pad: int) -> torch.Tensor:
    """Log likelihood of each target given its prompt, summed over its tokens, in nats, (n,), through which a gradient can go back.

    Equal prompts are read once: the targets of one go on from the same keys and values.
    """
    prompts = list(dict.fromkeys(tuple(pair.prompt) for pair in pairs))
    place = {prompt: k for k, prompt in enumerate(prompts)}
    of = torch.tensor([place[tuple(pair.prompt)] for pair in pairs], device=model.device)
    ids, mask = padded([list(prompt) for prompt in prompts], pad, model.device, left=True)
    labels, there = padded([pair.target for pair in pairs], pad, model.device, left=False)
    whole = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    read = partial(whole.base_model, past_key_values=DynamicCache(config=whole.config), use_cache=True)
    with arithmetic(model.device, model.dtype), disable_input_dtype_casting(model):
        first = read(input_ids=ids, attention_mask=mask)
        first.past_key_values.batch_select_indices(of)  # gradients go through it
        rest = read(input_ids=labels[:, :-1], attention_mask=torch.cat([mask[of], there[:, :-1]], 1))
        hidden = torch.cat([first.last_hidden_state[of, -1:], rest.last_hidden_state], 1)[there == 1]
        logits = whole.get_output_embeddings()(hidden)  # dear, so only where a token of a target is predicted
    losses, row = _CrossEntropy.apply(logits, labels[there == 1]), (there == 1).nonzero()[:, 0]
    return torch.zeros(len(pairs), device=losses.device).index_add(0, row, -losses)


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    batch_size: int = 16,
) -> float:
    """How surprised a model is by targets after their prompts: exp of the mean negative log likelihood a token; 1 is the least.

    Raises
    ------
    ValueError
        For empty or unequal lists, empty or overlong texts. MemoryError with the batch size to try.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 3.
    """
    pairs = token_pairs(tokenizer, prompts, targets)
    batches = length_batches([len(pair.prompt) + len(pair.target) for pair in pairs], batch_size)
    with compute.memory_guard(batch_size):
        sums = [target_loss(model, [pairs[i] for i in batch], tokenizer.pad_token_id) for batch in batches]
    return math.exp(sum(loss.item() for loss, _ in sums) / sum(n for _, n in sums))
