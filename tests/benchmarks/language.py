"""Speed of the language models on one core: loading, fine-tuning beside transformers and trl, writing many texts beside one by one.

    python tests/benchmarks/language.py

prints one JSON line a result: name, value, unit, target, holds. The sides of a comparison run in turn, best of three rounds, so that what else
the machine does hurts both. Absolute numbers are of the machine they were measured on; ratios travel.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from adlib import assets, language, market, tuning

ROUNDS, BATCH, STEPS = 3, 4, 12


def tell(name, value, unit, target=None, *, at_least=True):
    """Print one result."""
    holds = None if target is None else bool(value >= target if at_least else value <= target)
    print(
        json.dumps({"name": name, "value": round(value, 3), "unit": unit, "target": target, "holds": holds}), flush=True
    )


def seconds(work):
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def loading():
    """Time the first load (decode and keep) and the next ones, with torch and transformers imported."""
    source, real = assets.path("smollm2"), assets.cache_folder
    first, cached = [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            assets.cache_folder = lambda folder=folder: Path(folder)
            assets.path, kept = (lambda name: source), assets.path
            try:
                first.append(seconds(language.load_smollm2))
                cached.append(seconds(language.load_smollm2))
            finally:
                assets.path, assets.cache_folder = kept, real
    tell("load_first", min(first), "s", 3.0, at_least=False)
    tell("load_cached", min(cached), "s", 1.0, at_least=False)


def adapted(dtype):
    """Load SmolLM2 in a number format, with the adapters of the lesson."""
    model, tokenizer = language.load_smollm2(dtype=dtype, device="cpu")
    return language.fine_tune(model, tokenizer, ["a"], ["b"], steps=0, progress=False)[0].train(), tokenizer


def ours(pairs, dtype):
    """Seconds of our loop for one pass over the pairs."""
    model, tokenizer = adapted(dtype)
    steps = len(pairs) // BATCH
    training = tuning.Training(model, pairs, steps, BATCH, 8e-3, "linear", 1, tokenizer.pad_token_id, 0)
    return seconds(lambda: list(training))


class Clock(TrainerCallback):
    """Adds up the seconds between the first step's begin and the last step's end."""

    def on_step_begin(self, args, state, control, **_):
        """Note the first begin."""
        self.begin = getattr(self, "begin", time.perf_counter())

    def on_step_end(self, args, state, control, **_):
        """Note the latest end."""
        self.seconds = time.perf_counter() - self.begin


def settings(kind, folder, dtype, **more):
    """Arguments of a trainer that say what our loop does."""
    return kind(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=8e-3,
        warmup_steps=0.1,
        weight_decay=0.0,
        bf16=dtype == torch.bfloat16,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )


def run(trainer):
    """Train without the lines that a trainer prints, which are no results."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def plain_trainer(pairs, dtype):
    """Seconds of transformers' Trainer for the same pass; labels on the targets only."""
    model, tokenizer = adapted(dtype)
    rows = [{"input_ids": p.prompt + p.target, "labels": [-100] * len(p.prompt) + p.target} for p in pairs]
    clock, collate = Clock(), DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    with tempfile.TemporaryDirectory() as folder:
        args = settings(TrainingArguments, folder, dtype, remove_unused_columns=False)
        run(Trainer(model, args, collate, rows, callbacks=[clock]))
    return clock.seconds


def trl_trainer(pairs, dtype):
    """Seconds of trl's SFTTrainer for the same pass; loss on the completions only. None without trl."""
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        return None
    model, tokenizer = adapted(dtype)
    rows = [
        {"input_ids": p.prompt + p.target, "completion_mask": [0] * len(p.prompt) + [1] * len(p.target)} for p in pairs
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = settings(SFTConfig, folder, dtype, gradient_checkpointing=False, completion_only_loss=True)
        data = Dataset.from_list(rows)
        run(SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[clock]))
    return clock.seconds


def training(prompts, copies, steps):
    """Time one pass of `steps` batches: our loop in both number formats, transformers' Trainer, trl's SFTTrainer, in turn."""
    _, tokenizer = language.load_smollm2(device="cpu")
    pairs = language.token_pairs(tokenizer, prompts, copies)[: BATCH * steps]
    tokens = sum(len(p.prompt) + len(p.target) for p in pairs)
    sides = {"sft": ours, "sft_transformers": plain_trainer, "sft_trl": trl_trainer}
    speed = {}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            took = side(pairs, torch.bfloat16)
            speed.setdefault(name, []).append(tokens / took if took else 0.0)
        speed.setdefault("sft_float32", []).append(tokens / ours(pairs, torch.float32))
    best = {name: max(found) for name, found in speed.items()}
    tell("sft", best["sft"], "tokens/s", 350)
    for name in ("sft_float32", "sft_transformers", "sft_trl"):
        if best[name]:
            tell(name, best[name], "tokens/s")
    tell("sft_over_float32", best["sft"] / best["sft_float32"], "x", 1.5)
    tell("sft_over_transformers", best["sft"] / best["sft_transformers"], "x", 1.0)
    if best["sft_trl"]:
        tell("sft_over_trl", best["sft"] / best["sft_trl"], "x", 1.5)


def writing(prompts):
    """Time new tokens a second: 32 texts at once in bfloat16, and one by one in float32."""
    speed = {("bfloat16", 32): [], ("bfloat16", 1): [], ("float32", 1): []}
    for _ in range(ROUNDS):
        for (number, size), found in speed.items():
            model, tokenizer = language.load_smollm2(dtype=getattr(torch, number), device="cpu")
            tokenizer.eos_token = "<|endoftext|>"  # rarely written: all texts run to the limit, and the count is known
            asked = prompts[: size if size > 1 else 2]
            options = {"max_new_tokens": 40, "batch_size": size, "temperature": 1.0, "top_p": 1.0}
            begin = time.perf_counter()
            texts = language.generate(model, tokenizer, asked, **options)
            took = time.perf_counter() - begin
            found.append(sum(len(tokenizer(text)["input_ids"]) for text in texts) / took)
    best = {key: max(found) for key, found in speed.items()}
    tell("writing_bfloat16_batch_32", best["bfloat16", 32], "new tokens/s", 200)
    tell("writing_bfloat16_one_by_one", best["bfloat16", 1], "new tokens/s")
    tell("writing_float32_one_by_one", best["float32", 1], "new tokens/s")
    tell("writing_batch_32_over_float32_one_by_one", best["bfloat16", 32] / best["float32", 1], "x", 8.0)


def main():
    """Run all, or the parts named on the command line: loading, training, writing; ``steps=2`` makes the training short."""
    torch.set_num_threads(1)
    steps = int(next((word.removeprefix("steps=") for word in sys.argv[1:] if word.startswith("steps=")), STEPS))
    wanted = [word for word in sys.argv[1:] if "=" not in word] or ["loading", "training", "writing"]
    pairs = market.training_pairs(market.Market(seed=0, n_users=50), 64, seed=0)
    prompts = [language.prompt(*row) for row in pairs[["attributes", "audience"]].to_numpy()]
    if "loading" in wanted:
        loading()
    if "training" in wanted:
        training(prompts, list(pairs["copy"]), steps)
    if "writing" in wanted:
        writing(prompts)


if __name__ == "__main__":
    main()
