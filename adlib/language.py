"""A language model that learns the shop: prompts, fine-tuning with LoRA, perplexity, adapters, and the copywriter of lesson 06.

Loading (`adlib.pretrained`), sampling (`adlib.sampling`) and reading with MiniLM (`adlib.reading`) are part of this module's interface.
Taught in notebooks/05_gpu_fine_tuning.ipynb.
"""

import hashlib
import math
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import peft
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adlib import checkpoints, compute, lesson
from adlib.pretrained import MAX_TOKENS, arithmetic, checked_texts, length_batches, load_minilm, load_smollm2, padded
from adlib.reading import SentimentClassifier, embed
from adlib.sampling import generate

__all__ = [
    "Copywriter",
    "SentimentClassifier",
    "copywriter",
    "embed",
    "fine_tune",
    "generate",
    "load_adapter",
    "load_minilm",
    "load_smollm2",
    "perplexity",
    "prompt",
    "save_adapter",
    "target_loss",
    "token_pairs",
]

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- prompts and pairs -----------------------------------------------------------------------------------------------


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

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 2.
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


def target_loss(model: PreTrainedModel, pairs: Sequence[Pair], pad: int) -> tuple[torch.Tensor, int]:
    """Summed negative log likelihood of the targets given their prompts, and the number of target tokens.

    The output layer, 49,152 words wide, is the dearest of all; it is applied only where a token of a target is predicted. Rows are
    padded on the left, so that all targets end in the last column.
    """
    place = model.device
    ids, mask = padded([pair.prompt + pair.target for pair in pairs], pad, place, left=True)
    longest = max(len(pair.target) for pair in pairs)
    labels = torch.tensor([[-100] * (longest - len(pair.target)) + pair.target for pair in pairs], device=place)
    whole = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with arithmetic(place, model.dtype):
        hidden = whole.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = hidden[:, -longest - 1 : -1]  # position i predicts token i + 1
        logits = whole.get_output_embeddings()(hidden[labels != -100])
    return F.cross_entropy(logits.float(), labels[labels != -100], reduction="sum"), len(logits)


# ---- fine-tuning the writer ------------------------------------------------------------------------------------------


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    steps: int = 80,
    batch_size: int = 4,
    learning_rate: float = 8e-3,
    rank: int = 8,
    top_layers: float = 0.5,
    held_out: tuple[Sequence[str], Sequence[str]] | None = None,
    evaluate_every: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> tuple[peft.PeftModel, pd.DataFrame]:
    """Teach a causal language model to continue prompts with targets, by low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685).

    Each chosen matrix W gets ΔW = 2·B·A with A: (rank, in), B: (out, rank), B = 0 at the start; W itself stays as it is. AdamW, a
    warm-up over the first tenth of the steps, then linear decay.

    Parameters
    ----------
    model : a model, or one that already has an adapter, whose training then goes on. It is changed in place.
    prompts, targets : n texts each. steps : optimiser steps; 0 leaves the model as it was.
    learning_rate : the highest. rank : of the adapters. top_layers : share of the layers, from the top, that get adapters.
    held_out : (prompts, targets) whose perplexity is measured before, every ``evaluate_every`` steps, and at the end.

    Returns
    -------
    (model with adapter, history): history has one row a step: step, loss (nats a token), tokens_per_second (prompts and targets
    without padding), perplexity (of ``held_out``, missing where not measured).

    Raises
    ------
    ValueError
        For empty or unequal lists, empty or overlong texts, and impossible settings. MemoryError with the batch size to try.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 3.
    """
    if steps < 0 or batch_size < 1 or rank < 1 or not 0 < top_layers <= 1:
        raise ValueError("fine_tune needs steps ≥ 0, batch_size ≥ 1, rank ≥ 1 and 0 < top_layers ≤ 1.")
    pairs = token_pairs(tokenizer, prompts, targets)
    tuned = model if isinstance(model, peft.PeftModel) else _with_adapter(model, rank, top_layers, seed)
    history = [{"step": 0, "perplexity": perplexity(tuned, tokenizer, *held_out)}] if held_out else []
    with tqdm(total=steps, desc="fine-tuning", disable=not progress) as bar, compute.memory_guard(batch_size):
        for row in _train(tuned.train(), pairs, steps, batch_size, learning_rate, tokenizer.pad_token_id, seed):
            if held_out and (row["step"] % evaluate_every == 0 or row["step"] == steps):
                row["perplexity"] = perplexity(tuned, tokenizer, *held_out)
            history.append(row)
            bar.set_postfix_str(f"loss {row['loss']:.2f}, {row['tokens_per_second']:.0f} tokens/s", refresh=False)
            bar.update()
    return tuned.eval(), pd.DataFrame(history, columns=["step", "loss", "tokens_per_second", "perplexity"])


def _train(
    model: PreTrainedModel, pairs: list[Pair], steps: int, batch_size: int, learning_rate: float, pad: int, seed: int
) -> Iterator[dict]:
    """The training loop; yields step, loss and speed after every step."""
    rng, queue = np.random.default_rng(seed), []
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, steps // 10)
    shape = lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, shape)
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        queue = queue or length_batches([len(pair.prompt) + len(pair.target) for pair in pairs], batch_size, rng)
        batch = [pairs[i] for i in queue.pop()]
        loss, n = target_loss(model, batch, pad)
        (loss / n).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        tokens = sum(len(pair.prompt) + len(pair.target) for pair in batch)
        yield {"step": step, "loss": loss.item() / n, "tokens_per_second": tokens / (time.perf_counter() - begin)}


def _with_adapter(model: PreTrainedModel, rank: int, top_layers: float, seed: int) -> peft.PeftModel:
    layers = model.config.num_hidden_layers
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(LORA_TARGETS),
        layers_to_transform=list(range(layers - max(1, round(top_layers * layers)), layers)),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _peft_model(model, config)


def _peft_model(model: PreTrainedModel, config: peft.LoraConfig) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still asks transformers under an old name
        return peft.get_peft_model(model, config)


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

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 2.
    """
    pairs = token_pairs(tokenizer, prompts, targets)
    batches = length_batches([len(pair.prompt) + len(pair.target) for pair in pairs], batch_size)
    with compute.memory_guard(batch_size):
        sums = [target_loss(model, [pairs[i] for i in batch], tokenizer.pad_token_id) for batch in batches]
    return math.exp(sum(loss.item() for loss, _ in sums) / sum(n for _, n in sums))


# ---- adapters --------------------------------------------------------------------------------------------------------


def save_adapter(model: peft.PeftModel, folder: str | Path) -> Path:
    """Write a model's adapter, a few MB, as safetensors with a manifest of hashes; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(folder)
    checkpoints.seal(folder)
    return folder


def load_adapter(model: PreTrainedModel, folder: str | Path) -> peft.PeftModel:
    """Put a saved adapter on the model it was trained for; it can be used at once or trained further.

    Raises
    ------
    checkpoints.DamagedFile
        If a file is missing or was changed. ValueError if the adapter belongs to another model.
    """
    folder = Path(folder)
    try:
        checkpoints.verify(folder)
    except checkpoints.DamagedFile as error:
        raise checkpoints.DamagedFile(
            f"The adapter cannot be used: {error} Delete the folder and train it again."
        ) from error
    config = peft.LoraConfig.from_pretrained(folder)
    if config.base_model_name_or_path != model.name_or_path:
        raise ValueError(
            f"This adapter was trained for {config.base_model_name_or_path}, not for {model.name_or_path}."
        )
    config.inference_mode = False
    tuned = _peft_model(model, config)
    peft.set_peft_model_state_dict(tuned, load_file(folder / "adapter_model.safetensors"))
    return tuned.eval()


class Copywriter(NamedTuple):
    """A model that writes the shop's ads, its tokenizer, and the history of its training (see ``fine_tune``)."""

    model: peft.PeftModel
    tokenizer: PreTrainedTokenizerFast
    history: pd.DataFrame


def copywriter(pairs: pd.DataFrame, *, seed: int = 0, steps: int = 80, again: bool = False, **options) -> Copywriter:
    """SmolLM2, fine-tuned on pairs of attributes, audience and copy: what lesson 05 leaves to lesson 06.

    The adapter is an artefact (``lesson.artefact("sft", …)``) whose key holds the pairs, seed, steps and options; it is trained only
    where it is missing or damaged, or ``again`` is set.

    Parameters
    ----------
    pairs : columns attributes, audience and copy, as ``market.training_pairs`` gives them.
    options : of ``fine_tune``; ``held_out``, ``evaluate_every`` and ``progress`` do not change the key.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 3.
    """
    prompts = [prompt(*pair) for pair in zip(pairs["attributes"], pairs["audience"], strict=True)]
    text = "\0".join([*prompts, *pairs["copy"]])
    key = (fine_tune.__kwdefaults__ | options) | {"seed": seed, "steps": steps}
    key = {name: value for name, value in key.items() if name not in ("held_out", "evaluate_every", "progress")}
    folder = lesson.artefact("sft", pairs=hashlib.sha256(text.encode()).hexdigest(), **key)
    model, tokenizer = load_smollm2()
    if lesson.ready(folder) and not again:
        try:
            return Copywriter(load_adapter(model, folder), tokenizer, pd.read_csv(folder / "history.csv"))
        except checkpoints.DamagedFile as error:
            warnings.warn(f"{error} That is done now.", stacklevel=2)
    tuned, history = fine_tune(model, tokenizer, prompts, list(pairs["copy"]), seed=seed, steps=steps, **options)
    lesson.begin(folder)
    history.to_csv(folder / "history.csv", index=False)
    save_adapter(tuned, folder)
    lesson.finish(folder)
    return Copywriter(tuned, tokenizer, history)
