"""Behaviour sequences: histories held against a loop and a case by hand, encoders against PyTorch, models against a planted truth."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from torch import nn

from adlib import ctr, sequences
from adlib.sequences import Histories, Rows, SequenceModel, histories

START = pd.Timestamp("2026-03-02", tz="UTC")


def at(hours):
    return START + pd.to_timedelta(np.asarray(hours, dtype=float), unit="h")


def small():
    """Ann has three events, Bob one that comes at the moment of his impression, Cleo none."""
    events = pd.DataFrame(
        {
            "user_id": ["ann", "bob", "ann", "ann"],
            "product_id": ["p1", "p2", "p2", "p9"],
            "event": ["view", "view", "cart", "view"],
            "timestamp": at([3, 5, 1, 2]),
        }
    )
    shown = pd.DataFrame(
        {
            "user_id": ["ann", "bob", "cleo", "ann", "bob"],
            "creative_id": ["c1", "c1", "c2", "c2", "zz"],
            "timestamp": at([4, 5, 5, 3, 6]),
        }
    )
    creatives = pd.DataFrame({"creative_id": ["c1", "c2"], "product_id": ["p1", "p2"]})
    products = pd.DataFrame({"product_id": ["p1", "p2"], "category": ["coat", "bag"]})
    return {"events": events, "impressions": shown, "creatives": creatives, "products": products}


# -- histories -------------------------------------------------------------------------------------------------------------


def test_the_histories_of_three_people_by_hand():
    past = histories(small(), length=3)
    coat, bag = past.ad[0, 0], past.ad[2, 0]
    cart, view = past.codes[0, 0, 1], past.codes[0, 2, 1]
    assert {coat, bag} == {1, 2} and {cart, view} == {1, 2}
    expected = [
        [[bag, cart], [0, view], [coat, view]],  # ann at hour 4; her second event concerns a product nobody lists
        [[0, 0]] * 3,  # bob's view at the very moment of the impression is not yet known
        [[0, 0]] * 3,
        [[0, 0], [bag, cart], [0, view]],  # ann at hour 3: what she did in that moment is left out
        [[0, 0], [0, 0], [bag, view]],
    ]
    assert past.codes.tolist() == expected
    assert past.hours.tolist() == [[3, 2, 1], [0] * 3, [0] * 3, [0, 2, 1], [0, 0, 1]]
    assert past.ad.tolist() == [[coat, 0], [coat, 0], [bag, 0], [bag, 0], [0, 0]]
    assert past.columns == ("category", "event") and past.sizes == (3, 3)
    assert past.codes.dtype == past.ad.dtype == np.int32


def test_a_short_length_keeps_the_latest_and_products_can_be_told():
    past = histories(small(), length=1, columns=("product_id",))
    assert past.codes.shape == (5, 1, 1) and past.hours[:, 0].tolist() == [1, 0, 0, 1, 1]
    assert past.codes[0, 0, 0] == past.ad[0, 0] and past.codes[4, 0, 0] == past.ad[2, 0]


def test_no_events_at_all_is_a_history_of_zeros():
    tables = small()
    past = histories(tables | {"events": tables["events"][:0]})
    assert past.codes.shape == (5, 16, 2) and not past.codes.any() and not past.hours.any()
    assert past.ad[:, 0].all() == (past.ad[:, 0] > 0).all()


people = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(people, people, st.integers(1, 4), st.integers(0, 12))
def test_histories_are_those_of_a_loop_and_never_see_the_future(happened, visits, length, cut):
    n = len(happened)
    events = pd.DataFrame(happened, columns=["user_id", "hour"]).assign(product_id=[f"p{i}" for i in range(n)])
    shown = pd.DataFrame(visits, columns=["user_id", "hour"]).assign(product_id="p0")
    events, shown = (t.assign(timestamp=at(t["hour"])) for t in (events, shown))
    past = histories({"events": events, "impressions": shown}, length, ("product_id",))
    for i, (user, hour) in enumerate(visits):
        mine = events[(events["user_id"] == user) & (events["hour"] < hour)].sort_values("hour", kind="stable")[
            -length:
        ]
        hours = [0] * (length - len(mine)) + (hour - mine["hour"]).tolist()
        assert past.hours[i].tolist() == hours
        assert (past.codes[i, :, 0] > 0).tolist() == [False] * (length - len(mine)) + [True] * len(mine)
    early = shown["hour"] <= cut  # whatever happens from the cut on, these rows must not change
    less = histories({"events": events[events["hour"] < cut], "impressions": shown}, length, ("product_id",))
    assert (less.hours[early] == past.hours[early]).all()
    assert ((less.codes > 0)[early] == (past.codes > 0)[early]).all()


def test_take_keeps_rows_together():
    tables = small()
    past = histories(tables, 2)
    rows = Rows(tables["impressions"], past).take([3, 0])
    assert rows.flat["user_id"].tolist() == ["ann", "ann"] and (rows.past.codes == past.codes[[3, 0]]).all()
    assert rows.past.hours.tolist() == past.hours[[3, 0]].tolist() and rows.past.sizes == past.sizes


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda t: t, {"length": 0}, "length=0: a history needs room"),
        (lambda t: {k: v for k, v in t.items() if k != "events"}, {}, "There is no table of events"),
        (lambda t: t | {"events": t["events"].drop(columns="user_id")}, {}, "events lacks user_id"),
        (lambda t: t | {"impressions": t["impressions"].drop(columns="timestamp")}, {}, "impressions lacks timestamp"),
        (lambda t: t | {"events": t["events"].assign(timestamp=pd.NaT)}, {}, "events lacks the time of 4 rows"),
        (lambda t: t | {"events": t["events"].drop(columns="product_id")}, {}, "events lacks product_id"),
        (lambda t: t | {"products": t["products"].drop(columns="category")}, {}, "hold the column 'category'"),
        (lambda t: {k: v for k, v in t.items() if k != "products"}, {}, "hold the column 'category'"),
        (lambda t: t, {"columns": ()}, "columns is empty"),
    ],
)
def test_bad_tables_are_explained(change, options, words):
    with pytest.raises(ValueError, match=words):
        histories(change(small()), **options)


# -- encoders --------------------------------------------------------------------------------------------------------------


def test_the_attention_is_a_transformer_layer_read_at_the_ad():
    torch.manual_seed(0)
    ours = sequences._Attention(5, 8).eval()
    layer = nn.TransformerEncoderLayer(
        8, nhead=2, dim_feedforward=16, dropout=0.0, batch_first=True, norm_first=True
    ).eval()
    layer.self_attn.load_state_dict(ours.attention.state_dict())
    for theirs, own in zip(
        (layer.linear1, layer.linear2, layer.norm1, layer.norm2), (ours.feed[0], ours.feed[2], *ours.norms), strict=True
    ):
        theirs.load_state_dict(own.state_dict())
    steps, ad, there = torch.randn(6, 4, 5), torch.randn(6, 5), torch.arange(4) >= torch.arange(6)[:, None] - 1
    tokens = ours.enter(torch.cat([steps, ad[:, None]], 1))
    absent = torch.cat([~there, torch.zeros(6, 1, dtype=bool)], 1)
    with torch.no_grad():
        assert torch.allclose(ours(steps, ad, there), layer(tokens, src_key_padding_mask=absent)[:, -1], atol=1e-5)


@pytest.mark.parametrize("kind", sequences.KINDS[1:])
def test_what_padding_holds_does_not_matter(kind):
    torch.manual_seed(0)
    network = sequences._Network(kind, 1, 0, (4, 3), 4, (8,), 0.0)
    codes, hours = torch.zeros(2, 5, 2, dtype=torch.int32), torch.zeros(2, 5)
    codes[:, 3:], hours[:, 3:] = 1, 2.0
    other = hours.clone()
    other[1, :3] = 99.0
    ad = torch.tensor([[1, 0], [1, 0]], dtype=torch.int32)
    summary = network.summary(codes, other, ad)
    assert summary.shape == (2, 4) and torch.allclose(summary[0], summary[1])
    empty = network.summary(torch.zeros_like(codes), hours, ad)
    assert torch.isfinite(empty).all() and not torch.allclose(empty, summary)


# -- models ----------------------------------------------------------------------------------------------------------------


def planted(n=16_000, length=6, seed=0):
    """Clicks that depend on whether one of the last two events concerned the ad's category; one visitor in ten is new."""
    rng = np.random.default_rng(seed)
    there = (np.arange(length) >= length - rng.integers(1, length + 1, n)[:, None]) & (rng.random((n, 1)) > 0.1)
    codes = np.stack([rng.integers(1, 6, (n, length)), rng.integers(1, 4, (n, length))], 2) * there[..., None]
    ad = np.column_stack([rng.integers(1, 6, n), np.zeros(n, int)])
    hours = np.cumsum(rng.exponential(5, (n, length)), 1)[:, ::-1] * there
    match = (codes[:, -2:, 0] == ad[:, :1]).any(1)
    p = 1 / (1 + np.exp(2.5 - 2.5 * match))
    past = Histories(
        codes.astype(np.int32), hours.astype(np.float32), ad.astype(np.int32), ("category", "event"), (6, 4)
    )
    flat = pd.DataFrame({"device": rng.choice(["mobile", "desktop"], n), "category": ad[:, 0].astype(str)})
    return Rows(flat, past), (rng.random(n) < p).astype(int), p


def gap(model, seed=1):
    rows, _, p = planted(8_000, seed=seed)
    loss, base, oracle = (ctr.log_losses(p, q).mean() for q in (model.predict_proba(rows)[:, 1], p.mean(), p))
    return ctr.gap_to_oracle(loss, base, oracle)


@pytest.fixture(scope="module")
def data():
    return planted()


@pytest.mark.parametrize("kind", sequences.KINDS)
def test_every_encoder_finds_the_planted_truth_and_flat_features_do_not(data, kind):
    rows, y, _ = data
    model = SequenceModel(kind, epochs=4, batch_size=256, seed=3).fit(rows, y)
    q = model.predict_proba(rows)
    assert q.shape == (len(y), 2) and np.allclose(q.sum(1), 1) and q[:, 1].mean() == pytest.approx(y.mean(), abs=1e-4)
    assert gap(model) > 0.95 if kind == "none" else gap(model) < 0.3


def test_shuffled_labels_teach_nothing(data):
    rows, y, _ = data
    shuffled = np.random.default_rng(0).permutation(y)
    assert gap(SequenceModel("gru", batch_size=256).fit(rows, shuffled)) > 0.9


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_generator_alone(data):
    rows, y, _ = data
    rows, y = rows.take(slice(0, 2000)), y[:2000]
    before = torch.get_rng_state()
    first, second, other = (SequenceModel("rnn", seed=s).fit(rows, y).predict_proba(rows) for s in (3, 3, 4))
    assert np.allclose(first, second, atol=1e-6) and not np.allclose(first, other, atol=1e-6)
    assert torch.equal(before, torch.get_rng_state())
    model = SequenceModel("lstm", dim=4)
    assert clone(model).get_params() == model.get_params()


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("bert", lambda r, y: (r, y), "kind='bert' is unknown; choose one of none, cnn, rnn"),
        ("gru", lambda r, y: (r, y * 0), "Every row of the target is 0"),
        ("gru", lambda r, y: (r, y * 0 + 1), "Every row of the target is 1"),
        ("gru", lambda r, y: (r, y * 2), r"must be 0 \(no click\) or 1 \(click\); it holds 0, 2"),
        ("gru", lambda r, y: (r, y[:-1]), r"shape \(49,\)"),
        ("gru", lambda r, y: (r._replace(past=r.past.take(slice(0, 9))), y), "50 rows of features and 9 histories"),
    ],
)
def test_bad_training_data_is_explained(data, kind, change, words):
    rows, y = data[0].take(slice(0, 50)), data[1][:50]
    with pytest.raises(ValueError, match=words):
        SequenceModel(kind).fit(*change(rows, y))


def test_predicting_before_fitting_or_with_other_columns_is_explained(data):
    rows, y = data[0].take(slice(0, 500)), data[1][:500]
    with pytest.raises(ValueError, match="not fitted"):
        SequenceModel().predict_proba(rows)
    fitted = SequenceModel("cnn").fit(rows, y)
    with pytest.raises(ValueError, match=r"fitted on category, event \(6, 4 codes\)"):
        fitted.predict_proba(rows._replace(past=rows.past._replace(columns=("brand", "event"))))


def test_tomorrows_log_is_told_in_the_codes_of_the_training():
    tables = small()
    past = histories(tables, 3)
    events = tables["events"]
    later = tables | {"events": events.iloc[::-1]}  # other order, so other codes if they were made anew
    again = histories(later, 3, known=past)
    assert all(map(np.array_equal, again.values, past.values)) and again.sizes == past.sizes
    told = {int(c) for c in again.codes[..., 1].ravel()} - {0}
    assert told <= set(range(1, past.sizes[1]))
    strange = histories(tables | {"events": events.assign(event="never seen before")}, 3, known=past)
    assert (strange.codes[..., 1] == 0).all()


def test_histories_with_other_codes_are_refused(data):
    rows, y, _ = data
    values = (np.array(list("abcde")), np.array(list("xyz")))
    first = rows._replace(past=rows.past._replace(values=values))
    model = SequenceModel("none", epochs=1).fit(first.take(slice(0, 2000)), y[:2000])
    other = first._replace(past=first.past._replace(values=(values[0][::-1], values[1])))
    with pytest.raises(ValueError, match="known=those it learnt from"):
        model.predict_proba(other)
