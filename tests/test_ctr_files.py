"""Click models on disk, from streams and from several processes; columns of every kind; each error by its words."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from test_ctr import planted

from adlib import click_files, ctr, parallel, streaming
from adlib.encoding import KNOWN, MISSING, UNSEEN, Encoder


def rich(n=6000, seed=0):
    """Rows with a category, a number, a text and a vector that matter, and their clicks."""
    rng = np.random.default_rng(seed)
    words, v = rng.integers(3, size=n), rng.normal(size=(n, 3))
    number = rng.normal(size=n)
    logit = -1.5 + np.array([1.5, 0, -1.5])[words] + v[:, 0] + np.abs(number)
    texts = np.array(["big sale today", "new silk dress", "the plain one"], dtype=object)[words]
    columns = {"ad": rng.integers(5, size=n).astype(str), "number": number, "title": texts, "vector": list(v)}
    return pd.DataFrame(columns), (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)


@pytest.fixture(scope="module")
def fitted():
    X, y = rich()
    return ctr.CTRModel(batch_size=128, epochs=3, text=("title",), text_dim=2, bins=8).fit(X, y)


# -- columns --------------------------------------------------------------------------------------------------------------


def test_texts_vectors_and_bins_are_learnt_from(fitted):
    X, y = rich(seed=1)
    auc = roc_auc_score(y, fitted.predict_proba(X)[:, 1])
    blind = X.assign(title="", vector=[np.zeros(3)] * len(X), number=0.0)
    assert auc > 0.8 and roc_auc_score(y, fitted.predict_proba(blind)[:, 1]) < 0.55
    assert fitted.encoder_.vectors_ == {"vector": 3} and fitted.encoder_.text_ == ["title"]


def test_missing_texts_and_vectors_are_flagged_or_zero():
    X, _ = rich(200)
    X.loc[3, "title"], X.at[4, "vector"] = None, None
    encoder = Encoder(text=("title",), text_dim=2).fit(X)
    numbers = encoder.transform(X)[1]
    m = 1 + 3 + 2
    assert numbers.shape == (200, m + encoder.flagged_.sum()) and np.isfinite(numbers).all()
    assert (numbers[3, 4:6] == 0).all() and (numbers[4, 1:4] == 0).all() and numbers[[3, 4], m:].any(axis=1).all()


def test_bins_are_cut_at_quantiles_and_a_missing_number_has_its_slot():
    X = pd.DataFrame({"x": [*np.arange(8.0), np.nan]})
    slots, _ = Encoder(bins=4).fit(X).transform(X)
    assert slots[:, 0].tolist() == [KNOWN, KNOWN, *[KNOWN + 1] * 2, *[KNOWN + 2] * 2, *[KNOWN + 3] * 2, MISSING]


@given(st.lists(st.sampled_from(["a", "b", "c", None, "later"]), min_size=1, max_size=30), st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_hashing_is_stable_and_stays_inside_its_buckets(values, buckets):
    encoder = Encoder(buckets=buckets).fit(pd.DataFrame({"c": ["a", "b", None]}))
    slots = encoder.transform(pd.DataFrame({"c": pd.Series(values, dtype=object)}))[0][:, 0]
    assert encoder.offsets_.tolist() == [0, KNOWN + buckets]
    again = (
        Encoder(buckets=buckets).fit(pd.DataFrame({"c": ["z", "a"]})).transform(pd.DataFrame({"c": values}))[0][:, 0]
    )
    for value, slot, other in zip(values, slots, again, strict=True):
        assert slot == other and (slot == MISSING if value is None else KNOWN <= slot < KNOWN + buckets)


def test_learning_columns_part_by_part_equals_learning_them_at_once():
    X, _ = rich(3000)
    whole, parts = (
        Encoder(min_count=3).fit(X),
        Encoder(min_count=3).fit_batches(X[i : i + 700] for i in range(0, 3000, 700)),
    )
    for a, b in zip(whole.transform(X), parts.transform(X), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda X: X.assign(vector=[[1.0, 2.0]] * len(X)),
            "'vector' must hold vectors of length 3; it holds lengths 2",
        ),
        (lambda X: X.assign(vector=[[1.0, np.inf, 0.0]] * len(X)), "'vector' holds an infinite number .*row 0"),
        (lambda X: X.drop(columns="title"), "missing: title"),
    ],
)
def test_bad_columns_are_explained(fitted, change, words):
    with pytest.raises(ValueError, match=words):
        fitted.predict_proba(change(rich(10)[0]))


def test_a_text_column_that_is_not_there_or_holds_no_word():
    X, y = rich(100)
    with pytest.raises(ValueError, match=r"text=\['name'\] is not a column of the table"):
        ctr.CTRModel(text=("name",)).fit(X, y)
    with pytest.raises(ValueError, match="'title' is to be read as text and holds no word"):
        ctr.CTRModel(text=("title",)).fit(X.assign(title="..."), y)


# -- leaks, early stopping, streams ---------------------------------------------------------------------------------------


def test_a_column_that_knows_the_click_is_named_and_honest_ones_are_not():
    X, y, p = planted(20_000)
    rng = np.random.default_rng(0)
    spoilt = X.assign(
        bought=np.where(y == 1, rng.random(len(y)) < 0.1, False),  # only clicks convert
        seconds=np.where(y == 1, rng.exponential(20, len(y)) + 1, rng.normal(0, 0.1, len(y))),
        total=y * 3.0,
    )
    assert set(ctr.leaking_columns(spoilt, y)) == {"bought", "seconds", "total"}
    assert not ctr.leaking_columns(X.assign(truth=p), y)  # a strong honest signal
    with pytest.warns(UserWarning, match="Column 'bought' seems to know the click .*'True' is always clicked"):
        ctr.CTRModel("lr").fit(spoilt[["who", "bought"]], y)


def test_early_stopping_keeps_the_best_epoch():
    X, y, _ = planted(4000)
    V, held, _ = planted(4000, seed=1)
    options = {"batch_size": 64, "optimizer": "adam", "schedule": "constant", "dim": 16, "learning_rate": 0.02}
    X, V = (
        T.assign(row=np.random.default_rng(i).integers(3000, size=len(T)).astype(str)) for i, T in enumerate((X, V))
    )
    long = ctr.CTRModel(epochs=8, **options).fit(X, y, validation=(V, held))
    short = ctr.CTRModel(epochs=8, patience=1, **options).fit(X, y, validation=(V, held))
    assert len(long.validation_curve_) == 8 > len(short.validation_curve_) == np.argmin(long.validation_curve_) + 2
    losses = [ctr.log_losses(held, m.predict_proba(V)[:, 1]).mean() for m in (short, long)]
    assert losses[0] < losses[1] - 0.01 and losses[0] == pytest.approx(min(short.validation_curve_), rel=0.02)


def test_penalty_and_feature_dropout_shrink_what_rare_values_say():
    X, y, _ = planted(3000)
    X = X.assign(row=np.arange(len(X)).astype(str))
    plain, decayed, dropped = (
        ctr.CTRModel(batch_size=64, epochs=4, **more).fit(X, y) for more in ({}, {"l2": 1.0}, {"feature_dropout": 0.3})
    )
    assert decayed.weights_.norm() < 0.8 * plain.weights_.norm()
    unseen = dropped.encoder_.offsets_[:-1] + UNSEEN
    assert plain.weights_[unseen].abs().sum() == 0 < dropped.weights_[unseen].abs().sum()


def test_a_stream_is_learnt_part_by_part():
    X, y, _ = planted(24_000)
    model = ctr.CTRModel(batch_size=64, buckets=64)
    V, _, p = planted(10_000, seed=1)
    base, oracle = (ctr.log_losses(p, q).mean() for q in (p.mean(), p))
    gaps = []
    for i in range(0, len(X), 4000):
        model.partial_fit(X[i : i + 4000], y[i : i + 4000])
        gaps.append(ctr.gap_to_oracle(ctr.log_losses(p, model.predict_proba(V)[:, 1]).mean(), base, oracle))
    assert gaps[-1] < 0.35 < gaps[0]
    model.partial_fit(X[:10], np.zeros(10))  # a part without a click is fine once the model runs
    with pytest.raises(ValueError, match="needs rows with and without a click"):
        ctr.CTRModel().partial_fit(X[:10], np.zeros(10))


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["lr", "fm", "dnn", "deepfm", "dcnv2"])
def test_a_saved_model_predicts_the_same(architecture, tmp_path):
    X, y = rich(1500)
    model = ctr.CTRModel(architecture, text=("title",), bins=5, min_count=2).fit(X, y)
    again = ctr.CTRModel.load(model.save(tmp_path / "model"))
    strange = X[:50].assign(ad="never seen", number=np.nan)
    for rows in (X, strange):
        assert np.array_equal(model.predict_proba(rows), again.predict_proba(rows))
    assert again.get_params() == {**model.get_params(), "text": ["title"], "hidden": [64, 32]}
    again.partial_fit(X, y)


def test_a_damaged_or_foreign_model_is_refused(fitted, tmp_path):
    other, y = rich(300)
    ctr.CTRModel(dim=2).fit(other.drop(columns="title"), y).save(tmp_path / "other")
    folder = fitted.save(tmp_path / "model")
    weights, facts = folder / click_files.WEIGHTS, folder / click_files.FACTS
    whole, text = weights.read_bytes(), facts.read_text(encoding="utf-8")

    def refused(words):
        with pytest.raises(ValueError, match=words):
            ctr.CTRModel.load(folder)

    weights.write_bytes(whole[: len(whole) // 2])
    refused("model.safetensors is damaged or cut off")
    weights.write_bytes((tmp_path / "other" / click_files.WEIGHTS).read_bytes())
    refused("are not of one model: .*table")
    weights.write_bytes(whole)
    facts.write_text(text[:500], encoding="utf-8")
    refused("model.json is damaged")
    facts.write_text(json.dumps({"format": "adlib click model 0"}), encoding="utf-8")
    refused("is of the format 'adlib click model 0'")
    facts.unlink()
    refused("holds no click model: model.json missing")


# -- larger than memory, several processes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    X, y, _ = planted(40_000)
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    X.assign(click=y).to_parquet(path, index=False, row_group_size=10_000)
    return path


def quality(model):
    V, clicked, _ = planted(20_000, seed=1)
    return ctr.log_losses(clicked, model.predict_proba(V)[:, 1]).mean()


def test_a_parquet_file_teaches_as_much_as_the_table_in_memory(log):
    X, y, _ = planted(40_000)
    model = ctr.CTRModel(batch_size=256, epochs=2)
    streamed = streaming.fit_parquet(ctr.CTRModel(batch_size=256, epochs=2), log, part=7_000)
    assert quality(streamed) == pytest.approx(quality(model.fit(X, y)), rel=0.01)
    assert streamed.base_rate_ == pytest.approx(y.mean()) and streamed.encoder_.n_features_in_ == 4
    exact = ctr.CTRModel(batch_size=256, epochs=2, bf16=False)
    whole = streaming.fit_parquet(clone(exact), log, part=100_000)  # one part: the same rows in the same order
    assert np.allclose(whole.decision_function(X), exact.fit(X, y).decision_function(X), atol=1e-4)


def test_parts_hold_every_row_once_in_order(log):
    import pyarrow.dataset as ds

    sizes = [len(y) for _, y in streaming.parts(ds.dataset(log), ["who"], "click", 9_000)]
    assert sizes == [9_000] * 4 + [4_000]
    found = pd.concat([X for X, _ in streaming.parts(ds.dataset(log), ["number"], "click", 9_000)])["number"]
    assert np.array_equal(found.to_numpy(), planted(40_000)[0]["number"].to_numpy())


def test_bad_files_are_explained(log, tmp_path):
    with pytest.raises(ValueError, match="has no column bought; it has who, ad"):
        streaming.fit_parquet(ctr.CTRModel(), log, target="bought")
    pd.DataFrame({"a": ["x", "y"], "click": [0, 0]}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="has 0 clicks in 2 rows"):
        streaming.fit_parquet(ctr.CTRModel(), tmp_path / "none.parquet")
    with pytest.raises(SystemExit, match=r"adlib\.streaming: .*has no column bought"):
        streaming.main([str(log), "--save", str(tmp_path / "m"), "--target", "bought"])
    with pytest.raises(SystemExit):
        streaming.main([str(log), "--save", str(tmp_path / "m"), "-p", "colour=3"])


def test_a_batch_is_shared_out_and_one_process_keeps_it_all():
    batch = torch.arange(10)
    assert parallel.size() == 1 and parallel.rank() == 0 and torch.equal(parallel.share(batch), batch)


@pytest.mark.timeout(240)
def test_two_processes_make_the_model_of_one(log, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    arguments = [str(log), "-p", "batch_size=256", "-p", "epochs=2", "-p", "bf16=False"]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "adlib.streaming",
    ]
    done = subprocess.run(
        [*launch, *arguments, "--save", str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    streaming.main([*arguments, "--save", str(tmp_path / "one")])
    one, two = (ctr.CTRModel.load(tmp_path / name) for name in ("one", "two"))
    X, _, _ = planted(5_000, seed=2)
    assert np.abs(one.decision_function(X) - two.decision_function(X)).max() < 0.01
    assert quality(two) == pytest.approx(quality(one), rel=1e-3)


def drifting(n=20_001, seed=0):
    """A log in order of time: first channel A with few clicks, then B with many."""
    rng = np.random.default_rng(seed)
    late = np.arange(n) >= n // 2
    frame = pd.DataFrame({"channel": np.where(late, "B", "A"), "x": rng.normal(size=n)})
    return frame, (rng.random(n) < np.where(late, 0.10, 0.02)).astype(int)


def test_the_bias_is_settled_on_all_parts_of_a_file(tmp_path):
    X, y = drifting()
    X.assign(click=y).to_parquet(tmp_path / "log.parquet")
    model = streaming.fit_parquet(ctr.CTRModel(batch_size=256), tmp_path / "log.parquet", part=10_000)
    p = model.predict_proba(X)[:, 1]  # the third and last part is one row
    assert p.mean() == pytest.approx(y.mean(), rel=0.03)


def test_a_leak_is_named_in_streams_too(tmp_path):
    X, y = drifting(4000)
    spoilt = X.assign(oracle=np.where(y == 1, "yes", "no"))
    spoilt.assign(click=y).to_parquet(tmp_path / "log.parquet")
    with pytest.warns(UserWarning, match="Column 'oracle' seems to know the click"):
        streaming.fit_parquet(ctr.CTRModel("lr"), tmp_path / "log.parquet")
    with pytest.warns(UserWarning, match="Column 'oracle' seems to know the click"):
        ctr.CTRModel("lr").partial_fit(spoilt, y)


def test_a_whole_number_is_one_value_however_it_is_written():
    rng = np.random.default_rng(0)
    hour, y = rng.integers(1, 6, 4000), rng.integers(0, 2, 4000)
    encoder = ctr.Encoder().fit(pd.DataFrame({"hour": pd.Categorical(hour)}))
    ways = [
        pd.Categorical([1, 5]),
        pd.Categorical([1.0, 5.0]),
        pd.Categorical(["1", "5"]),
        pd.Categorical([1, 5, None])[:2],
    ]
    slots = [encoder.transform(pd.DataFrame({"hour": way}))[0].ravel().tolist() for way in ways]
    assert slots[0] == slots[1] == slots[2] == slots[3] and min(slots[0]) >= 2
    flag = ctr.Encoder().fit(pd.DataFrame({"weekend": y == 1}))
    bools, numbers = (flag.transform(pd.DataFrame({"weekend": v}))[0] for v in (y == 1, pd.Categorical(y)))
    assert np.array_equal(bools, numbers)
    mixed = ctr.Encoder().fit(pd.DataFrame({"c": [1, "1", "x"]}, dtype=object))
    assert len(mixed.values_["c"]) == 2


def test_the_penalty_leaves_the_bias_alone_and_reaches_the_numbers():
    X, y = drifting(8000)
    plain, strong = (ctr.CTRModel(l2=l2, batch_size=256, hidden=(8,)).fit(X, y) for l2 in (0.0, 10.0))
    assert strong.predict_proba(X)[:, 1].mean() == pytest.approx(y.mean(), rel=0.02)
    assert strong.network_.bias.item() == pytest.approx(np.log(y.mean() / (1 - y.mean())), abs=0.2)
    assert strong.network_.weights.abs().sum() <= plain.network_.weights.abs().sum()


def test_files_of_two_models_of_one_shape_are_not_taken_for_one(tmp_path):
    X, y = drifting(4000)
    for name, clicks in (("a", y), ("b", 1 - y)):
        ctr.CTRModel("lr").fit(X, clicks).save(tmp_path / name)
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match="not of one model: the hash of the weights differs"):
        ctr.CTRModel.load(tmp_path / "a")
    facts = json.loads((tmp_path / "a" / "model.json").read_text())
    del facts["encoder"]
    (tmp_path / "a" / "model.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="is damaged \\(encoder missing\\)"):
        ctr.CTRModel.load(tmp_path / "a")


def test_a_model_fitted_on_an_array_can_be_saved_and_predicts(tmp_path):
    rng = np.random.default_rng(0)
    Z, y = rng.normal(size=(500, 3)), rng.integers(0, 2, 500)
    model = ctr.CTRModel(seed=np.int64(3)).fit(Z, y)
    assert np.allclose(ctr.CTRModel.load(model.save(tmp_path)).predict_proba(Z), model.predict_proba(Z))
    assert model.predict_proba(Z[:0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs=0: give at least 1"),
        ({"batch_size": 0}, "batch_size=0: give at least 1"),
        ({"hidden": ()}, r"hidden=\(\): give at least 1"),
        ({"dim": 0}, "dim=0: give at least 1"),
        ({"patience": 2}, "patience=2 needs rows to watch"),
        ({"device": "abacus"}, "Unknown device 'abacus'"),
    ],
)
def test_impossible_settings_are_explained(options, words):
    with pytest.raises(ValueError, match=words):
        ctr.CTRModel(**options).fit(*drifting(200))


def test_odd_columns_are_explained():
    X, y = drifting(200)
    with pytest.raises(ValueError, match="more than one column named x"):
        ctr.CTRModel().fit(pd.concat([X, X[["x"]]], axis=1), y)
    with pytest.raises(ValueError, match="Column 'odd' holds lists or dicts"):
        ctr.CTRModel().fit(X.assign(odd=[{"a": 1}] * len(X)), y)
