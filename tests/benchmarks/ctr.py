"""Click models against the libraries in use: ``python tests/benchmarks/ctr.py [speed] [quality] [literature] [purchases] [growth] [processes]``.

Prints one JSON object a line. The log is simulated (click_log.py), so the oracle is known. Speed: the same DeepFM (16 dims, 256-128, batches
of 4,096) on one core, the sides in turn, best of three. Needs ``pip install -c constraints.txt -r tests/benchmarks/requirements.txt``.
"""

import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import click_log
import click_networks
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from adlib import assets, ctr, plots, streaming

FOLDER = Path(__file__).parent
SIZES = [int(size) for size in click_log.SIZES]
SAME = {"dim": 16, "hidden": (256, 128), "batch_size": 4096}  # what every side trains
TUNED = {"dim": 16, "hidden": (256, 128), "bins": 32, "dense_learning_rate": 0.005}  # chosen on the validation part
PREDICT = (1024, 4096, 16_384)  # each side may predict in batches of its best size


def say(name: str, value: float, unit: str, target: str, holds: bool, **more) -> None:
    facts = {"name": name, "value": round(float(value), 4), "unit": unit, "target": target, "holds": bool(holds)}
    print(json.dumps(facts | more), flush=True)


def seconds(task, *arguments) -> float:
    begin = time.perf_counter()
    task(*arguments)
    return time.perf_counter() - begin


# -- the sides: (training part, test part) to (train(), predict(batch size)); data is in memory as each side wants it -------------


def ours(part: click_log.Part, held: click_log.Part, bf16: bool):
    model = ctr.CTRModel(
        **SAME, bf16=bf16, learning_rate=0.05, dense_learning_rate=0.02
    )  # chosen on the validation part
    model._start(ctr.Encoder().fit(part.frame()), float(part.y.mean()))
    rows, test = (tuple(map(torch.from_numpy, model.encoder_.transform(p.frame()))) for p in (part, held))
    train = lambda: model._train(lambda epoch: [(*rows, torch.from_numpy(part.y))], len(part.y), None)  # noqa: E731
    return train, lambda size: torch.sigmoid(model._logits(*test, rows=size)).numpy()


def columns(part: click_log.Part) -> dict[str, np.ndarray]:
    numbers = {f"x{j}": part.numbers[:, j] for j in range(click_log.NUMBERS)}
    return {f"c{j}": part.ids[:, j] for j in range(click_log.FIELDS)} | numbers


def deepctr(part: click_log.Part, held: click_log.Part):
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import DeepFM

    fields = [SparseFeat(f"c{j}", size, embedding_dim=16) for j, size in enumerate(SIZES)]
    fields += [DenseFeat(f"x{j}", 1) for j in range(click_log.NUMBERS)]
    model = DeepFM(fields, fields, dnn_hidden_units=SAME["hidden"], device="cpu", seed=0)
    model.compile("adam", "binary_crossentropy")
    X, test = columns(part), columns(held)
    train = lambda: model.fit(X, part.y, batch_size=SAME["batch_size"], epochs=1, verbose=0)  # noqa: E731
    return train, lambda size: model.predict(test, size).ravel()


def rechub(part: click_log.Part, held: click_log.Part):
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.ranking import DeepFM
    from torch_rechub.trainers import CTRTrainer
    from torch_rechub.utils.data import DataGenerator

    sparse = [SparseFeature(f"c{j}", size, embed_dim=16) for j, size in enumerate(SIZES)]
    dense = [DenseFeature(f"x{j}") for j in range(click_log.NUMBERS)]
    layers = {"dims": list(SAME["hidden"]), "dropout": 0, "activation": "relu"}
    model = DeepFM(deep_features=sparse + dense, fm_features=sparse, mlp_params=layers)
    loader, trainer = (
        DataGenerator(columns(part), part.y).generate_dataloader(
            x_val=columns(held), y_val=held.y, x_test=columns(held), y_test=held.y, batch_size=SAME["batch_size"]
        )[0],
        CTRTrainer(model, optimizer_params={"lr": 1e-3}, n_epoch=1, device="cpu", model_path=tempfile.mkdtemp()),
    )

    def predict(size):
        test = DataGenerator(columns(held), held.y).generate_dataloader(
            x_val=columns(held), y_val=held.y, x_test=columns(held), y_test=held.y, batch_size=size
        )[2]
        return np.array(trainer.predict(model, test))

    return lambda: trainer.train_one_epoch(loader), predict


def speed(rows: int = 1_000_000) -> None:
    """One epoch and one pass of prediction: the sides in turn, best of three."""
    torch.set_num_threads(1)
    log = click_log.ClickLog(0)
    part, held = log.part(rows, 1), log.part(200_000, 3)
    sides = {
        "bf16": lambda *a: ours(*a, True),
        "fp32": lambda *a: ours(*a, False),
        "DeepCTR": deepctr,
        "rechub": rechub,
    }
    train, infer, auc = ({name: [] for name in sides} for _ in range(3))
    for _ in range(3):
        for name, build in sides.items():
            learn, predict = build(part, held)
            train[name].append(rows / seconds(learn))
            infer[name].append(max(len(held.y) / seconds(predict, size) for size in PREDICT))
            auc[name].append(roc_auc_score(held.y, predict(4096)))
    best, fast = ({k: max(v) for k, v in found.items()} for found in (train, infer))
    shown = {k: round(v) for k, v in best.items()}
    for mine, other, target in [("bf16", "DeepCTR", 4), ("fp32", "DeepCTR", 2.5), ("bf16", "rechub", 4)]:
        ratio = best[mine] / best[other]
        pairs = [round(a / b, 2) for a, b in zip(train[mine], train[other], strict=True)]
        say(
            f"ctr.train.{mine}_vs_{other}",
            ratio,
            "times",
            f">= {target}",
            ratio >= target,
            rows_per_s=shown,
            runs=pairs,
        )
    for mine in ("bf16", "fp32"):
        margin = np.mean(auc[mine]) - max(np.mean(auc["DeepCTR"]), np.mean(auc["rechub"]))
        aucs = {k: round(float(np.mean(v)), 4) for k, v in auc.items()}
        say(f"ctr.auc.{mine}", margin, "AUC above the better library", ">= 0", margin >= 0, auc=aucs)
    for other in ("DeepCTR", "rechub"):
        ratio = fast["bf16"] / fast[other]
        numbers = {k: round(v) for k, v in fast.items()}
        say(f"ctr.predict.bf16_vs_{other}", ratio, "times", ">= 3", ratio >= 3, rows_per_s=numbers)


# -- quality ---------------------------------------------------------------------------------------------------------------


def quality(rows: int = 1_000_000) -> None:
    """Gap to the oracle on the test part, beside logistic regression and LightGBM tuned on the validation part."""
    log = click_log.ClickLog(0)
    part, chosen, held = log.part(rows, 1), log.part(200_000, 2), log.part(200_000, 3)
    base, truth = (ctr.log_losses(held.truth, p).mean() for p in (part.y.mean(), held.truth))
    X, V, T = part.frame(), chosen.frame(), held.frame()
    found = {}

    def judge(name, p, target="none", limit=np.inf, **more):
        gap = ctr.gap_to_oracle(ctr.log_losses(held.truth, p).mean(), base, truth)
        found[name] = {"gap": gap, "auc": roc_auc_score(held.y, p), "ratio": float(p.mean() / held.y.mean())}
        others = {"auc": round(found[name]["auc"], 4), "mean_prediction_by_mean_click": round(found[name]["ratio"], 3)}
        say(f"ctr.gap.{name}", gap, "of base rate to oracle", target, gap <= limit, **others, **more)

    judge("oracle", held.truth)
    judge("logistic_regression", logistic(X, part.y, V, chosen.y).predict_proba(T)[:, 1])
    judge("lightgbm", *lightgbm(X, part.y, V, chosen.y, T))
    for epochs, rate, limit in [(1, 0.05, 0.095), (2, 0.03, 0.085)]:
        model, curve = ctr.CTRModel(**TUNED, epochs=epochs, learning_rate=rate), []
        model.fit(X, part.y, validation=(V, chosen.y))
        curve = [round(value, 5) for value in model.validation_curve_]
        judge(f"deepfm_{epochs}", model.predict_proba(T)[:, 1], f"<= {limit}", limit, validation_log_loss=curve)
        ratio = found[f"deepfm_{epochs}"]["ratio"]
        say(
            f"ctr.calibration.deepfm_{epochs}",
            ratio,
            "mean prediction by mean click",
            ".97 to 1.03",
            0.97 <= ratio <= 1.03,
        )
    crossed = ctr.CTRModel("dcnv2", **TUNED, learning_rate=0.05).fit(X, part.y)
    judge("dcnv2_1", crossed.predict_proba(T)[:, 1])
    gains = [np.diff(epoch_by_epoch(X, part.y, T, held.y, seed))[0] for seed in range(3)]
    each = {"seeds": [round(float(g), 5) for g in gains]}
    say(
        "ctr.second_epoch",
        min(gains),
        "AUC gained from the first to the second epoch of one run, worst seed",
        ">= 0",
        min(gains) >= 0,
        **each,
    )
    for other in ("logistic_regression", "lightgbm"):
        ahead = found[other]["gap"] - found["deepfm_1"]["gap"]
        say(f"ctr.ahead_of.{other}", ahead, "of the gap, after one epoch", "> 0", ahead > 0)


def epoch_by_epoch(X: pd.DataFrame, y, T: pd.DataFrame, held, seed: int) -> list[float]:
    """AUC on the test part after each of the two epochs of one training."""
    model, aucs = ctr.CTRModel(**TUNED, epochs=2, learning_rate=0.03, seed=seed), []
    train = model._epoch

    def epoch(*arguments):
        some = train(*arguments)
        aucs.append(roc_auc_score(held, model.predict_proba(T)[:, 1]))
        return some

    model._epoch = epoch
    model.fit(X, y)
    return aucs


def logistic(X: pd.DataFrame, y, V: pd.DataFrame, chosen) -> ctr.CTRModel:
    """Logistic regression: the best of eight settings on the validation part."""
    best = None
    for bins, rate, epochs in itertools.product((16, 64), (0.1, 0.3), (1, 3)):
        model = ctr.CTRModel("lr", bins=bins, learning_rate=rate, epochs=epochs).fit(X, y)
        loss = ctr.log_losses(chosen, model.predict_proba(V)[:, 1]).mean()
        best = min(best or (np.inf, None), (loss, model), key=lambda pair: pair[0])
    return best[1]


def literature(rows: int = 1_000_000) -> None:
    """What other architectures and tricks change: gap on the validation part after one epoch, and the time they take."""
    torch.set_num_threads(1)
    log = click_log.ClickLog(0)
    part, chosen = log.part(rows, 1), log.part(200_000, 2)
    base, truth = (ctr.log_losses(chosen.truth, p).mean() for p in (part.y.mean(), chosen.truth))
    first = None
    for name, (kind, options, columns) in click_networks.OPTIONS.items():
        X, V = (columns(f) if columns else f for f in (part.frame(), chosen.frame()))
        model, begin = kind(**TUNED | {"learning_rate": 0.05} | options), time.process_time()
        p = model.fit(X, part.y).predict_proba(V)[:, 1]
        took = time.process_time() - begin
        gap = ctr.gap_to_oracle(ctr.log_losses(chosen.truth, p).mean(), base, truth)
        first = first or (gap, took)
        facts = {"auc": round(roc_auc_score(chosen.y, p), 4), "gap_against_deepfm": round(gap - first[0], 4)}
        say(
            f"ctr.option.{name}",
            gap,
            "of base rate to oracle",
            "none",
            True,
            **facts,
            times_deepfm=round(took / first[1], 2),
        )


def lightgbm(X: pd.DataFrame, y, V: pd.DataFrame, chosen, T: pd.DataFrame):
    """Boosted trees: early stopping and the best of four settings on the validation part; ids as click rates and counts."""
    import lightgbm as lgb

    tables = [_with_rates(X, y, frame) for frame in (X, V, T)]
    best = None
    for leaves, rate in itertools.product((31, 127), (0.1, 0.05)):
        model = lgb.LGBMClassifier(
            n_estimators=1500, learning_rate=rate, num_leaves=leaves, min_child_samples=200, n_jobs=1, verbose=-1
        )
        model.fit(tables[0], y, eval_set=[(tables[1], chosen)], callbacks=[lgb.early_stopping(30, verbose=False)])
        loss = ctr.log_losses(chosen, model.predict_proba(tables[1])[:, 1]).mean()
        best = min(best or (np.inf, None), (loss, model), key=lambda pair: pair[0])
    return (best[1].predict_proba(tables[2])[:, 1],)


def _with_rates(X: pd.DataFrame, y, frame: pd.DataFrame, folds: int = 5) -> pd.DataFrame:
    """Numbers as they are; of each id how often it was seen and its smoothed click rate, for training rows from the other folds."""
    base, fold = y.mean(), np.random.default_rng(0).integers(folds, size=len(y))
    out = {name: frame[name] for name in frame if name.startswith("x")}
    for name in (name for name in frame if name.startswith("c")):
        codes, at, n = X[name].cat.codes.to_numpy(), frame[name].cat.codes.to_numpy(), len(X[name].cat.categories)
        clicked, rows = np.bincount(codes, y, n), np.bincount(codes, minlength=n)
        own, seen = clicked[at], rows[at]
        if frame is X:
            pair = fold * n + codes
            own = own - np.bincount(pair, y, folds * n)[pair]
            seen = seen - np.bincount(pair, minlength=folds * n)[pair]
        out[name] = (own + 50 * base) / (seen + 50)
        out[f"{name} seen"] = rows[at]
    return pd.DataFrame(out)


# -- real purchases --------------------------------------------------------------------------------------------------------


def purchases() -> None:
    """Online Shoppers: learn to September (settings chosen on September), calibrate on October, judge November and December."""
    import lightgbm as lgb
    from sklearn.compose import make_column_selector, make_column_transformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    sessions = assets.read("online_shoppers").drop_duplicates(ignore_index=True)
    month, y = sessions["month"], sessions["purchase"].to_numpy()
    names = ["operating_system", "browser", "region", "traffic_type", "visitor_type", "weekend"]
    amounts = sessions.columns.drop([*names, "month", "purchase", "page_value"])
    X = sessions[names].astype(str).astype("category").join(np.log1p(sessions[amounts]))
    table = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), names),
        (StandardScaler(), make_column_selector(dtype_include="number")),
    )
    trees = {"learning_rate": 0.03, "min_child_samples": 50, "n_jobs": 1, "verbose": -1}
    sides = {
        "logistic_regression": [make_pipeline(table, LogisticRegression(C=c, max_iter=1000)) for c in (0.03, 0.3, 3.0)],
        "lightgbm": [
            lgb.LGBMClassifier(num_leaves=leaves, n_estimators=n, **trees) for leaves in (7, 15) for n in (100, 300)
        ],
        "ctr_model": [
            ctr.CTRModel(kind, bins=16, batch_size=128, epochs=n, learning_rate=0.1, feature_dropout=drop)
            for kind in ("lr", "deepfm")
            for n in (2, 5)
            for drop in (0.0, 0.2)
        ],
    }
    spring, autumn, winter = (
        month.isin(["Feb", "Mar", "May", "June", "Jul", "Aug"]),
        month == "Sep",
        month.isin(["Nov", "Dec"]),
    )
    chosen, found = {}, {}
    for name, models in sides.items():
        losses = [
            ctr.log_losses(y[autumn], m.fit(X[spring], y[spring]).predict_proba(X[autumn])[:, 1]).mean() for m in models
        ]
        chosen[name] = models[int(np.argmin(losses))].fit(X[spring | autumn], y[spring | autumn])
        october, p = (chosen[name].predict_proba(X[rows])[:, 1] for rows in (month == "Oct", winter))
        logit = [np.log(q / (1 - q))[:, None] for q in (np.clip(v, 1e-6, 1 - 1e-6) for v in (october, p))]
        found[name] = LogisticRegression(C=1e6).fit(logit[0], y[month == "Oct"]).predict_proba(logit[1])[:, 1]  # Platt
    rate = y[month == "Oct"].mean()
    for name, p in found.items():
        d = ctr.log_loss_interval(y[winter], p, baseline=rate)
        facts = {"auc": round(roc_auc_score(y[winter], p), 4), "low": round(-d.high, 5), "high": round(-d.low, 5)}
        say(f"ctr.purchases.{name}", -d.estimate, "nats saved against October's rate", "low > 0", d.high < 0, **facts)
        if name != "ctr_model":
            d = ctr.log_loss_interval(y[winter], found["ctr_model"], baseline=p)
            said = {"low": round(-d.high, 5), "high": round(-d.low, 5)}
            say(f"ctr.purchases.ctr_model_over_{name}", -d.estimate, "nats", "none", True, **said)


# -- cost as work grows ----------------------------------------------------------------------------------------------------


def write_log(path: Path, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    log, writer = click_log.ClickLog(0), None
    for chunk in range(0, rows, 250_000):
        part = log.part(min(250_000, rows - chunk), 100 + chunk)
        ids = {f"c{j}": part.ids[:, j].astype(str) for j in range(click_log.FIELDS)}
        numbers = {f"x{j}": part.numbers[:, j] for j in range(click_log.NUMBERS)}
        table = pa.table(ids | numbers | {"click": part.y.astype(np.int8)})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def stream(path: str, answer) -> None:
    """Train on a file in a process of its own; answers seconds and peak memory in GiB."""
    torch.set_num_threads(1)
    took = seconds(lambda: streaming.fit_parquet(ctr.CTRModel(**SAME, buckets=16_384), path, part=131_072))
    unit = 1024**3 if sys.platform == "darwin" else 1024**2
    answer.put((took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit))


def growth(sizes=(100_000, 1_000_000, 10_000_000)) -> None:
    """Rows a second (two passes: columns, weights) and peak memory from Parquet, and the picture growth.png."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in sizes:
            path, answer = Path(folder) / f"{rows}.parquet", multiprocessing.get_context("spawn").Queue()
            write_log(path, rows)
            process = multiprocessing.get_context("spawn").Process(target=stream, args=(str(path), answer))
            process.start()
            found.append(answer.get())
            process.join()
            took, peak = found[-1]
            say(
                "ctr.stream",
                rows / took,
                "rows/s",
                "none",
                True,
                rows=rows,
                seconds=round(took, 1),
                peak_GiB=round(peak, 2),
            )
    (_, _), (middle, flat), (last, peak) = found
    say(
        "ctr.stream.time",
        last / middle / (sizes[2] / sizes[1]),
        "of linear, 10 M by 1 M",
        "<= 1.15",
        last / middle <= 1.15 * sizes[2] / sizes[1],
    )
    say("ctr.stream.memory", peak / flat, "peak at 10 M by peak at 1 M", "<= 1.25", peak <= 1.25 * flat)
    draw(sizes, found, FOLDER / "growth.png")


def draw(sizes, found, path: Path) -> None:
    import matplotlib.pyplot as plt

    plots.style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.loglog(sizes, [took for took, _ in found], marker="o")
    (middle, flat), (last, peak) = found[-2:]
    left.set(
        xlabel="rows in the Parquet file",
        ylabel="seconds (one core)",
        title=f"ten times the rows: {last / middle:.1f} times as long",
    )
    right.semilogx(sizes, [peak for _, peak in found], marker="o")
    right.set(
        xlabel="rows in the Parquet file",
        ylabel="peak memory, GiB",
        title=f"and {peak / flat:.2f} times the memory",
        ylim=(0, None),
    )
    fig.savefig(path, dpi=100)


def processes(rows: int = 1_000_000) -> None:
    """The same training by one process and by two, a thread each: wall time and how far apart the models are."""
    with tempfile.TemporaryDirectory() as folder:
        path, held = Path(folder) / "log.parquet", click_log.ClickLog(0).part(50_000, 3).frame()
        held = held.astype({name: str for name in held if name.startswith("c")})
        write_log(path, rows)
        options = [
            str(path),
            "-p",
            "dim=16",
            "-p",
            "hidden=(256,128)",
            "-p",
            "batch_size=4096",
            "-p",
            "bf16=False",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        wall = {1: [], 2: []}
        for _ in range(3):
            for n in wall:
                launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
                command = [*launch, "-m", "adlib.streaming", *options, "--save", f"{folder}/model{n}"]
                wall[n].append(
                    seconds(lambda c=command: subprocess.run(c, env=environment, check=True, capture_output=True))
                )
        one, two = (ctr.CTRModel.load(f"{folder}/model{n}").decision_function(held) for n in wall)
    gain, apart = min(wall[1]) / min(wall[2]), float(np.abs(one - two).mean())
    say(
        "ctr.two_processes",
        gain,
        "times faster than one",
        "> 1",
        gain > 1,
        seconds={k: round(min(v), 1) for k, v in wall.items()},
    )
    say(
        "ctr.two_processes.same",
        apart,
        "mean distance of logits",
        "<= 0.02",
        apart <= 0.02,
        largest=round(float(np.abs(one - two).max()), 4),
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # of the other libraries
    parts = {part.__name__: part for part in (speed, quality, literature, purchases, growth, processes)}
    for name in sys.argv[1:] or parts:
        parts[name]()
