"""Speed of the recommenders: ``python tests/benchmarks/recommendation.py`` prints one JSON object a line.

One thread a process unless OMP_NUM_THREADS says otherwise; the targets are for two cores.
"""

import json
import multiprocessing
import os
import resource
import sys
import time

import numpy as np
import pandas as pd


def say(name: str, value: float, unit: str, target: str, holds: bool, **more) -> None:
    line = {"name": name, "value": round(value, 3), "unit": unit, "target": target, "holds": bool(holds), **more}
    print(json.dumps(line), flush=True)


def peak_mib() -> float:
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def top_ten() -> None:
    """Best of five: 1,000 users against 1,000 items, ten best of each; then twenty times the users in the memory of one batch."""
    from adlib import ranking, recommendation

    rng, users, items = np.random.default_rng(0), 20_000, 1000
    pairs = pd.DataFrame(
        {"user_id": rng.integers(users, size=400_000), "product_id": rng.integers(items, size=400_000)}
    )
    pairs["timestamp"] = np.arange(len(pairs))
    made = ranking.Interactions.of(pairs, users=range(users), items=range(items))
    model, seconds = recommendation.ALS(32, iterations=2).fit(made), []
    for _ in range(5):
        begin = time.perf_counter()
        model.recommend(np.arange(1000), 10)
        seconds.append(time.perf_counter() - begin)
    rate = 1e-6 * 1000 * items / min(seconds)
    runs = [round(s, 4) for s in seconds]
    say("recommendation.top_10", rate, "million pairs/s", ">= 5", rate >= 5, pairs=1000 * items, runs=runs)
    before = peak_mib()
    model.recommend(np.arange(users), 10)
    grown = peak_mib() - before
    whole = users * items * 4 / 2**20  # all scores at once
    say(
        "recommendation.memory", grown, "MiB more", "< 50", grown < 50, pairs=users * items, all_scores_mib=round(whole)
    )


def embeddings() -> None:
    """All 300 products with MiniLM and 2,000 behaviour sequences with the first three layers of SmolLM2, as lesson 04 reads them."""
    from adlib import language, market, ranking

    shop = market.Market(seed=0, n_users=2000)
    log = ranking.Interactions.of(shop.events(0), items=shop.products.product_id)
    stock, kinds = shop.products, shop.products["category"].to_numpy()
    texts = stock[["title", "category", "colour", "material", "features"]].agg(". ".join, axis=1).str.replace("|", ", ")
    histories = [", ".join(kinds[s[-12:]]) for s in log.sequences]
    small, (large, tokenizer) = language.load_minilm(), language.load_smollm2()
    large.config.num_hidden_layers = 3
    begin, work = time.perf_counter(), time.process_time()
    X = language.embed(list(texts), model=small[0], tokenizer=small[1])
    Y = language.embed(histories, model=large.model, tokenizer=tokenizer, max_tokens=64)
    seconds = time.perf_counter() - begin
    import torch

    work = round(time.process_time() - work, 1)  # core-seconds: what the machine's other work does not touch
    more = {
        "core_s": work,
        "products": len(X),
        "users": len(Y),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    say("recommendation.embeddings", seconds, "s", "<= 20", seconds <= 20, **more)


if __name__ == "__main__":
    for task in (top_ten, embeddings):  # each in a process of its own, so that peak memory is its own
        process = multiprocessing.get_context("spawn").Process(target=task)
        process.start()
        process.join()
