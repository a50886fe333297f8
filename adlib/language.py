"""A language model that learns the shop: what lessons 05 and 06 import, and the copywriter that 05 leaves to 06.

Loading (`adlib.pretrained`), likelihood (`adlib.likelihood`), training (`adlib.tuning`), sampling (`adlib.sampling`), reading with BERT
(`adlib.reading`), lighter models (`adlib.compression`) and memory (`adlib.footprint`) are part of this module's interface.
Taught in notebooks/05_gpu_fine_tuning.ipynb.
"""

import hashlib
import shutil
import warnings
from typing import NamedTuple

import pandas as pd
import peft
from transformers import PreTrainedTokenizerFast

from adlib import checkpoints, lesson
from adlib.checkpoints import load_adapter, save_adapter
from adlib.likelihood import Pair, log_likelihoods, perplexity, prompt, target_loss, token_losses, token_pairs
from adlib.pretrained import load_minilm, load_reader, load_smollm2, load_writer
from adlib.reading import SentimentClassifier, embed
from adlib.sampling import generate
from adlib.tuning import fine_tune, rate_share

__all__ = [
    "Copywriter",
    "Pair",
    "SentimentClassifier",
    "copywriter",
    "embed",
    "fine_tune",
    "generate",
    "load_adapter",
    "load_minilm",
    "load_reader",
    "load_smollm2",
    "load_writer",
    "log_likelihoods",
    "perplexity",
    "prompt",
    "rate_share",
    "save_adapter",
    "target_loss",
    "token_losses",
    "token_pairs",
]


class Copywriter(NamedTuple):
    """A model that writes the shop's ads, its tokenizer, and the history of its training (see ``fine_tune``)."""

    model: peft.PeftModel
    tokenizer: PreTrainedTokenizerFast
    history: pd.DataFrame


def copywriter(
    pairs: pd.DataFrame, *, seed: int = 0, steps: int = 120, writer: str = "smollm2", again: bool = False, **options
) -> Copywriter:
    """A language model, SmolLM2 unless another is named, fine-tuned on pairs of attributes, audience and copy: what lesson 05 leaves to lesson 06.

    The adapter is an artefact (``lesson.artefact("sft", …)``) whose key holds the pairs, seed, steps, writer and options; it is trained
    only where it is missing or damaged, or ``again`` is set. An interrupted training goes on where it was last written down.

    Parameters
    ----------
    pairs : columns attributes, audience and copy, as ``market.training_pairs`` gives them.
    writer : see ``load_writer``.
    options : of ``fine_tune``; what does not change the trained weights (``held_out``, ``checkpoint``, ``recompute``, …) does not
        change the key either.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 4.
    """
    prompts = [prompt(*pair) for pair in zip(pairs["attributes"], pairs["audience"], strict=True)]
    text = "\0".join([*prompts, *pairs["copy"]])
    key = (fine_tune.__kwdefaults__ | options) | {"seed": seed, "steps": steps, "writer": writer}
    idle = ["held_out", "progress", "checkpoint", "recompute", *([] if key["patience"] else ["evaluate_every"])]
    key = {name: value for name, value in key.items() if name not in idle}
    folder = lesson.artefact("sft", pairs=hashlib.sha256(text.encode()).hexdigest(), **key)
    model, tokenizer = load_writer(writer)
    if lesson.ready(folder) and not again:
        try:
            return Copywriter(load_adapter(model, folder), tokenizer, pd.read_csv(folder / "history.csv"))
        except checkpoints.DamagedFile as error:
            warnings.warn(f"{error} That is done now.", stacklevel=2)
    half = folder.with_name(f"{folder.name}-unfinished")  # where an interrupted training goes on
    options = {"checkpoint": half, "seed": seed, "steps": steps} | options
    try:
        tuned, history = fine_tune(model, tokenizer, prompts, list(pairs["copy"]), **options)
    except (checkpoints.DamagedFile, checkpoints.OtherTraining):  # cut off, or left by another version
        shutil.rmtree(half)
        tuned, history = fine_tune(model, tokenizer, prompts, list(pairs["copy"]), **options)
    shutil.rmtree(half, ignore_errors=True)
    lesson.begin(folder)
    history.to_csv(folder / "history.csv", index=False)
    save_adapter(tuned, folder)
    lesson.finish(folder)
    return Copywriter(tuned, tokenizer, history)
