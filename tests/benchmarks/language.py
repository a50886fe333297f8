"""Speed of the language models on one core: loading, fine-tuning in bfloat16 beside float32, writing many texts beside one by one.

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

from adlib import assets, language, market

ROUNDS, STEPS = 3, 3


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


def training(prompts, copies):
    """Time fine-tuning steps of 8 pairs in both number formats."""
    speed = {"bfloat16": [], "float32": []}
    for _ in range(ROUNDS):
        for number, found in speed.items():
            model, tokenizer = language.load_smollm2(dtype=getattr(torch, number), device="cpu")
            _, history = language.fine_tune(model, tokenizer, prompts, copies, steps=STEPS + 1, progress=False)
            found.append(history.tokens_per_second.iloc[1:].max())  # the first step warms up
    tell("sft_bfloat16", max(speed["bfloat16"]), "tokens/s", 350)
    tell("sft_float32", max(speed["float32"]), "tokens/s")
    tell("sft_bfloat16_over_float32", max(speed["bfloat16"]) / max(speed["float32"]), "x", 1.5)


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
    """Run all, or the parts named on the command line: loading, training, writing."""
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["loading", "training", "writing"]
    pairs = market.training_pairs(market.Market(seed=0, n_users=50), 64, seed=0)
    prompts = [language.prompt(*row) for row in pairs[["attributes", "audience"]].to_numpy()]
    if "loading" in wanted:
        loading()
    if "training" in wanted:
        training(prompts, list(pairs["copy"]))
    if "writing" in wanted:
        writing(prompts)


if __name__ == "__main__":
    main()
