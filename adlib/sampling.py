"""Sampling texts from a language model, many at a time. Taught in notebooks/05_gpu_fine_tuning.ipynb, section 5."""

from collections.abc import Sequence

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

    A prompt is read once for all of its ``n`` texts, and rows that have ended leave the batch.

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
    if (longest := max(map(len, rows))) > MAX_TOKENS:
        raise ValueError(f"A prompt has {longest} tokens, more than {MAX_TOKENS}: shorten its description.")
    source = torch.Generator(model.device).manual_seed(seed)
    texts: list = [None] * len(rows)
    bar = tqdm(total=n * len(rows), desc="writing", disable=not progress)
    with bar, compute.memory_guard(batch_size), arithmetic(model.device, model.dtype):
        for batch in length_batches([len(row) for row in rows], max(1, batch_size // n)):
            ids, mask = padded([rows[i] for i in batch], tokenizer.pad_token_id, model.device, left=True)
            pick = lambda logits: _pick(logits, temperature, top_p, source)  # noqa: E731
            written = _continue(model, ids, mask, n, pick, tokenizer.eos_token_id, max_new_tokens)
            written = [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
            for k, i in enumerate(batch):
                texts[i] = written[k * n : (k + 1) * n]
            bar.update(len(written))
    return [text for (text,) in texts] if n == 1 else texts


def _continue(model, ids, mask, n, pick, stop, max_new_tokens) -> list[list[int]]:
    """Token ids of n continuations of each row of ids: (rows, length) int64, padded on the left."""
    cache = DynamicCache(config=model.config)

    def read(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits (rows, words) of the token that follows."""
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        return out.logits[:, -1].float()

    logits = read(ids, (mask.cumsum(1) - 1).clamp(min=0)).repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    mask = mask.repeat_interleave(n, 0)
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
    likely, tokens = (logits / temperature).topk(64)
    share = likely.softmax(-1)
    share[share.cumsum(-1) - share >= top_p] = 0
    return tokens.gather(1, torch.multinomial(share, 1, generator=source))[:, 0]
