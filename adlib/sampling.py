"""Sampling texts from a language model, many at a time. Taught in notebooks/05_gpu_fine_tuning.ipynb, section 5."""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from adlib import compute
from adlib.pretrained import MAX_TOKENS, arithmetic, checked_texts, length_batches, padded


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    n: int = 1,
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_new_tokens: int = 60,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> list[str] | list[list[str]]:
    """Continue prompts by sampling, many at a time; a text ends at the end-of-text token or after ``max_new_tokens``.

    Equal prompts of a batch are read once, and rows that have ended leave it.

    Parameters
    ----------
    n : texts a prompt. temperature : 0 takes the likeliest token always, 1 samples from the model as it is.
    top_p : nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751) among the 64 likeliest tokens.
    batch_size : texts at a time.

    Returns
    -------
    list of len(prompts) texts, or of lists of ``n`` texts if n > 1.

    Raises
    ------
    ValueError
        For empty prompts and impossible settings. MemoryError with the batch size to try.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 5.
    """
    if n < 1 or batch_size < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError("generate needs n, batch_size and max_new_tokens ≥ 1, temperature ≥ 0 and 0 < top_p ≤ 1.")
    rows = tokenizer(checked_texts(prompts, "prompts"), add_special_tokens=False)["input_ids"]
    rows = [row for row in rows for _ in range(n)]
    if (longest := max(map(len, rows))) > MAX_TOKENS:
        raise ValueError(f"A prompt has {longest} tokens, more than {MAX_TOKENS}: shorten its description.")
    source = torch.Generator(model.device).manual_seed(seed)
    texts = [""] * len(rows)
    bar = tqdm(total=len(rows), desc="writing", disable=not progress)
    with bar, compute.memory_guard(batch_size), arithmetic(model.device, model.dtype), packed(model):
        for batch in length_batches([len(row) for row in rows], batch_size):
            pick = lambda logits: _pick(logits, temperature, top_p, source)  # noqa: E731
            asked = [tuple(rows[i]) for i in batch]
            written = _continue(model, asked, pick, tokenizer.pad_token_id, tokenizer.eos_token_id, max_new_tokens)
            for i, text in zip(batch, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                texts[i] = text.strip()
            bar.update(len(written))
    return texts if n == 1 else [texts[i : i + n] for i in range(0, len(texts), n)]


def _continue(model, asked, pick, pad, stop, max_new_tokens) -> list[list[int]]:
    """Token ids of the continuations of prompts, each a tuple of token ids."""
    different = list(dict.fromkeys(asked))
    ids, mask = padded([list(row) for row in different], pad, model.device, left=True)
    place = {row: k for k, row in enumerate(different)}
    of, cache = torch.tensor([place[row] for row in asked], device=ids.device), DynamicCache(config=model.config)

    def read(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits (rows, words) of the token that follows."""
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        return out.logits[:, -1]

    logits = read(ids, (mask.cumsum(1) - 1).clamp(min=0))[of]
    cache.batch_select_indices(of)
    mask = mask[of]
    rows, written = torch.arange(len(mask)), [[] for _ in range(len(mask))]
    for _ in range(max_new_tokens):
        token = pick(logits)
        for row, one in zip(rows.tolist(), token.tolist(), strict=True):
            written[row].append(one)
        on = (token != stop).nonzero()[:, 0]
        if len(on) == 0:
            break
        if len(on) < len(token):
            cache.batch_select_indices(on)
            rows, mask, token = rows[on.cpu()], mask[on], token[on]
        mask = F.pad(mask, (0, 1), value=1)
        logits = read(token[:, None], mask.sum(1, keepdim=True) - 1)
    return written


def _pick(logits: torch.Tensor, temperature: float, top_p: float, source: torch.Generator) -> torch.Tensor:
    """One token a row of logits (rows, words)."""
    if temperature == 0:
        return logits.argmax(-1)
    likely, tokens = logits.topk(64)
    share = (likely.float() / temperature).softmax(-1)
    share[share.cumsum(-1) - share >= top_p] = 0
    return tokens.gather(1, torch.multinomial(share, 1, generator=source))[:, 0]


@contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the linear layers of a bfloat16 model on the CPU hold a second copy of their weights in the order that oneDNN computes in.

    Else each product brings the weights into that order again, which for a few rows, as in writing token by token, takes longer than
    the product itself. On other devices and in other number formats nothing changes.
    """
    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear and _packs(layer)]
    try:
        for layer in layers:
            layer.forward = partial(_product, torch.ops.mkldnn._reorder_linear_weight(layer.weight), layer.bias)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _packs(layer: torch.nn.Linear) -> bool:
    """Whether PyTorch can bring this layer's weights into oneDNN's order (a bfloat16 layer on an x86 processor)."""
    if (
        layer.weight.dtype != torch.bfloat16
        or layer.weight.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    return platform.machine().lower() in ("x86_64", "amd64") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _product(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """W x + b with the weights (out, in) in oneDNN's order."""
    return torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), weight, bias, "none", [], "")
