"""The market: seeded, exact where it must be, and true to its own truth."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adlib import catalogue, copywriting, market, tables, traffic


@pytest.fixture(scope="module")
def shop():
    return market.Market(seed=3, n_users=800, n_products=60)


def test_same_seed_same_rows_and_another_seed_other_rows(shop):
    again = market.Market(seed=3, n_users=800, n_products=60)
    pd.testing.assert_frame_equal(shop.serve(n=3000, seed=1), again.serve(n=3000, seed=1))
    for name, frame in shop.tables(2000, seed=1).items():
        pd.testing.assert_frame_equal(frame, again.tables(2000, seed=1)[name])
    assert not shop.serve(n=3000, seed=1).equals(shop.serve(n=3000, seed=2))


@pytest.mark.parametrize("n_users", [1, 400])
def test_every_table_passes_its_schema(n_users):
    made = market.Market(seed=1, n_users=n_users, n_products=30).tables(3000)
    for name, frame in made.items():
        tables.validate(name, frame)
    tables.check_references(made)


def test_observed_rates_agree_with_the_truth_in_every_decile():
    """|observed − true| within 3 standard errors in each decile, and on average over seeds clearly closer."""
    z = []
    for seed in range(3):
        shop = market.Market(seed=seed, n_users=1500, n_products=100)
        log = shop.serve(n=300_000, seed=seed)
        frame = pd.DataFrame({"p": shop.click_probability(log), "y": log.click})
        cell = frame.groupby(pd.qcut(frame.p, 10, labels=False)).agg(p=("p", "mean"), y=("y", "mean"), n=("y", "size"))
        z.append((cell.y - cell.p) / np.sqrt(cell.p * (1 - cell.p) / cell.n))
    z = pd.concat(z)
    assert z.abs().max() < 3.5  # 30 deciles: the largest of 30 normal draws exceeds 3 in 8 % of the runs
    assert (z.abs() < 3).mean() > 0.95 and z.abs().mean() < 1.1


def test_the_base_rate_is_what_was_asked_for():
    for rate in (0.004, 0.015, 0.05):
        assert market.Market(seed=0, n_users=800, base_rate=rate).policy_value() == pytest.approx(rate, rel=0.05)


def test_conversion_rate_of_clicks(shop):
    log = shop.serve(n=400_000, seed=5)
    rate = shop.conversion_probability(log)[log.click == 1].mean()
    assert rate == pytest.approx(market.TRUTH["rates"]["conversion"], rel=0.15)
    assert log.conversion[log.click == 0].sum() == 0 and (log.revenue[log.conversion == 0] == 0).all()


def test_propensities_are_exact_and_sum_to_one(shop):
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    log = shop.serve(lambda c: np.tile(weights, (len(c), 1)), n=40_000, seed=2)
    assert set(log.propensity.round(9)) == set(weights)
    share = log.propensity.value_counts(normalize=True)
    assert np.allclose(share.sort_index(), weights, atol=0.015)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda c: np.full((len(c), 4), 0.2), "sum to one"),
        (lambda c: np.tile([1.5, -0.5, 0.0, 0.0], (len(c), 1)), "not negative"),
        (lambda c: np.full((len(c), 4), np.nan), "finite"),
        (lambda c: np.ones(len(c)), "shape"),
    ],
)
def test_a_wrong_policy_is_refused(shop, policy, message):
    with pytest.raises(ValueError, match=message):
        shop.serve(policy, n=100)


def test_the_oracle_beats_every_policy(shop):
    def first(c):
        return np.tile([1.0, 0.0, 0.0, 0.0], (len(c), 1))

    uniform, one, best = shop.policy_value(n=20_000), shop.policy_value(first, n=20_000), shop.oracle_value(n=20_000)
    assert best > 1.2 * uniform and best > one
    rates = [shop.serve(n=20_000, seed=s).click.mean() for s in range(10)]  # short logs, so that fatigue costs little
    assert np.mean(rates) == pytest.approx(uniform, rel=0.06)


def test_showings_by_hand():
    user, ad = np.array([0, 1, 0, 0, 1, 0]), np.array([2, 2, 2, 1, 2, 2])
    seen = np.zeros((2, 3), np.uint8)
    assert traffic.showings(user, ad, 3, seen).tolist() == [0, 0, 1, 0, 1, 2]
    assert seen.tolist() == [[0, 1, 3], [0, 0, 2]]
    assert traffic.showings(user[:2], ad[:2], 3, seen).tolist() == [3, 2]
    full = np.full((1, 1), 255, np.uint8)
    traffic.showings(np.zeros(5, int), np.zeros(5, int), 1, full)
    assert full[0, 0] == 255  # the counter saturates instead of starting again


def test_chunks_do_not_change_the_number_of_showings(shop, monkeypatch):
    monkeypatch.setattr(traffic, "CHUNK", 1000)
    log = shop.serve(n=5000, seed=1)
    assert log.impression_id.is_unique and log.timestamp.is_monotonic_increasing and len(log) == 5000


def test_position_bias_drift_and_fatigue_do_what_they_say():
    plain = market.Market(seed=1, n_users=500, n_products=50, position_bias=False)
    log = plain.serve(n=1000, seed=0)
    assert np.allclose(plain.click_probability(log), plain.click_probability(log.assign(position=1)))
    biased = market.Market(seed=1, n_users=500, n_products=50)
    at = [biased.click_probability(log.assign(position=k)).mean() for k in (1, 3, 5)]
    assert at[0] > at[1] > at[2]
    repeated = pd.concat([log.iloc[:1]] * 8, ignore_index=True)
    assert (np.diff(biased.click_probability(repeated)) < 0).all()
    drifting = market.Market(seed=1, n_users=500, n_products=50, drift=1.0)
    late = log.assign(timestamp=log.timestamp.max() + pd.Timedelta(days=28) * 0 + (log.timestamp - log.timestamp))
    early = log.assign(timestamp=log.timestamp.min())
    moved = np.abs(np.log(drifting.click_probability(late) / drifting.click_probability(early))).mean()
    still = np.abs(np.log(biased.click_probability(late) / biased.click_probability(early))).mean()
    assert moved > still + 0.2


def test_false_claims_win_clicks_and_lose_buyers():
    shop = market.Market(seed=2, n_users=500, n_products=60)
    coats = shop.products[~shop.products.features.str.contains("organic|recycled|vegan")]
    honest = pd.DataFrame({"product_id": coats.product_id, "headline": "A lovely piece for the season ahead"})
    lying = honest.assign(headline="A lovely handmade piece for the season")  # same length, one claim nobody can keep
    a, b = shop.with_creatives(honest), shop.with_creatives(lying)
    log = a.serve(n=4000, seed=0)
    other = log.assign(creative_id=log.creative_id)
    assert (b.click_probability(other) > a.click_probability(log)).all()
    assert (b.conversion_probability(other) < a.conversion_probability(log)).all()
    assert (b.satisfaction(other) < a.satisfaction(log)).mean() > 0.9


def test_read_copy_by_hand():
    coat = {
        "brand": "Okaro",
        "category": "coat",
        "colour": "navy",
        "material": "wool",
        "features": "hood|belt",
        "price": 500,
    }
    read = market.read_copy("Made to last: a navy wool coat by Okaro with hood. Eco-friendly.", coat)
    assert read.coverage == pytest.approx(5 / 6)
    assert read.appeals["quality"] == pytest.approx(0.6) and read.appeals["price"] == 0
    assert read.appeals["sustainability"] == pytest.approx(0.6)
    assert any("eco" in claim for claim in read.false_claims) and read.words == 12
    everything = market.read_copy(
        "New, loved, fresh, popular, sale, save, value, hurry, tonight, durable, premium, planet", coat
    )
    assert sum(everything.appeals.values()) == pytest.approx(1.2, abs=1e-5)
    assert market.read_copy("", coat).coverage == 0


def test_every_planted_phrase_makes_its_own_appeal():
    product = market.Market(seed=0, n_users=5, n_products=20).products.iloc[0].to_dict()
    rng = np.random.default_rng(0)
    for appeal in market.APPEALS:
        for tone in catalogue.TONES:
            for _ in range(12):
                read = market.read_copy(catalogue.appeal_sentence(product, appeal, tone, rng), product)
                assert max(read.appeals, key=read.appeals.get) == appeal


def test_training_pairs_name_everything_they_are_given():
    shop = market.Market(seed=0, n_users=50)
    held_out = ["Okaro", "Talwyn"]
    seen = sorted(set(shop.products.brand) - set(held_out))
    pairs = market.training_pairs(shop, 120, seed=1, brands=seen)
    assert not set(pairs.brand) & set(held_out)
    assert all(copywriting.coverage(r["copy"], r) == 1 for r in pairs.to_dict("records"))
    assert all(not copywriting.unsupported_claims(r["copy"], r) for r in pairs.to_dict("records"))
    assert all(not copywriting.policy_violations(c) for c in pairs["copy"])
    with pytest.raises(ValueError, match="No product is of the brands"):
        market.training_pairs(shop, 5, brands=["Nobody"])


def test_training_pairs_speak_to_each_audience_and_to_everybody():
    shop = market.Market(seed=0, n_users=50)
    pairs = market.training_pairs(shop, 400, seed=1)
    turns = pairs.audience.value_counts()
    assert turns.pop(catalogue.EVERYBODY) == 50 and turns.pop("green shoppers") == 100 and set(turns) == {50}
    told = pairs[pairs.persona >= 0].to_dict("records")
    assert all(r["appeal"] == catalogue.best_appeal(r, r["persona"]) for r in told)
    assert pairs[pairs.persona < 0].appeal.nunique() >= 5  # nobody in particular: any appeal that the product keeps
    claimed = pairs[pairs.appeal == "sustainability"]
    assert len(claimed) and claimed.features.map(catalogue.is_green).all()
    for row in pairs.to_dict("records"):
        assert max(market.read_copy(row["copy"], row).appeals.items(), key=lambda item: item[1])[0] == row["appeal"]


def test_no_sentence_of_an_unseen_brand_stands_in_the_training_copy():
    shop = market.Market(seed=0, n_users=50)
    new = ["Okaro", "Talwyn"]
    known = market.training_pairs(shop, 400, seed=0, brands=sorted(set(shop.products.brand) - set(new)))
    assert copywriting.verbatim_share(market.training_pairs(shop, 80, seed=1, brands=new)["copy"], known["copy"]) < 0.02


def test_randomised_test_assigns_people_once_and_logs_the_split(shop):
    ads = shop.creatives
    log = shop.run_test(ads[ads.appeal == "price"], ads[ads.appeal == "quality"], n=20_000, seed=1)
    assert log.groupby("user_id").arm.nunique().max() == 1
    assert set(log.arm) == {"control", "treatment"} and np.allclose(log.propensity, 0.5)
    shares = log.groupby("arm").product_id.agg(set)
    assert shares["control"] == shares["treatment"]  # both arms advertise the same products


def test_same_ads_in_both_arms_have_no_true_effect(shop):
    lifts = []
    for seed in range(5):
        log = shop.run_test(shop.creatives, shop.creatives, n=60_000, seed=seed)
        rate = log.groupby("arm").click.mean()
        lifts.append(rate["treatment"] / rate["control"] - 1)
    assert abs(np.mean(lifts)) < 0.08


def test_planted_sample_ratio_mismatch_loses_treated_people(shop):
    people = shop.run_test(shop.creatives, shop.creatives, n=60_000, srm=0.3).groupby("arm").user_id.nunique()
    assert people["treatment"] < 0.9 * people["control"]


def test_ads_for_an_audience_are_shown_to_it_alone(shop):
    audience = market.PERSONAS[0].audience
    ads = pd.DataFrame({"product_id": shop.products.product_id, "headline": "New in", "audience": audience})
    log = shop.run_test(shop.creatives, ads, n=5000)
    row = dict(zip(shop.users.user_id, shop.persona, strict=True))
    assert {row[u] for u in log.user_id} == {0}
    with pytest.raises(ValueError, match="Unknown audience"):
        shop.run_test(shop.creatives, ads.assign(audience="nobody"), n=100)
    with pytest.raises(ValueError, match="nothing to compare"):
        half = shop.products.product_id.iloc[:10]
        shop.run_test(shop.creatives[shop.creatives.product_id.isin(half)], ads[~ads.product_id.isin(half)], n=100)


def test_robots_click_and_are_quick(shop):
    log = shop.serve(n=20_000, seed=0, bots=0.05)
    robots = log[log.user_id.isin(shop.robots)]
    assert len(robots) >= 0.05 * len(log) and robots.click.mean() > 0.2
    assert robots.groupby("user_id").timestamp.diff().median() < pd.Timedelta(seconds=5)


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0, 0.2), seed=st.integers(0, 1000))
def test_soil_changes_only_what_it_reports(share, seed):
    clean = market.Market(seed=1, n_users=60, n_products=20).tables(600)
    dirty, truth = market.soil(clean, share, seed)
    for name in ("events", "impressions"):
        planted = truth[truth.table == name]
        assert planted.row.between(0, len(dirty[name]) - 1).all()
        rest = dirty[name].drop(index=planted.row.unique())
        same = rest.merge(clean[name].assign(known=True), how="left", on=list(clean[name].columns))
        assert same.known.notna().all()
    assert dirty["users"] is clean["users"]


def test_learner_errors():
    with pytest.raises(ValueError, match="at least one shopper"):
        market.Market(n_users=0)
    with pytest.raises(ValueError, match="base_rate must lie"):
        market.Market(base_rate=0.9)
    shop = market.Market(n_users=20, n_products=10)
    with pytest.raises(ValueError, match="products the market does not have"):
        shop.with_creatives(pd.DataFrame({"product_id": ["p9999"], "headline": ["x"]}))
    with pytest.raises(ValueError, match="score the log with the market that served it"):
        shop.click_probability(shop.serve(n=10).assign(user_id="stranger"))
    with pytest.raises(ValueError, match="share is a part"):
        market.soil(shop.tables(100), 0.9)
    with pytest.raises(ValueError, match="needs at least"):
        market.Market(n_users=20, n_products=1, creatives_per_product=2).serve(n=10)
    with pytest.raises(ValueError, match="No picture"):
        market.picture({"image": "umbrella/1", "colour": "red"})


def test_pictures_of_all_categories(shop, monkeypatch):
    for name in ("drawn", None):
        if name:
            monkeypatch.setattr(catalogue.assets, "available", lambda _: False)
        for product in shop.products.groupby("category").head(1).to_dict("records"):
            image, label = market.picture(product)
            assert image.size == (112, 112) and np.asarray(image).std() > 5
            assert name is None or label == name


SAMPLE = Path(__file__).parents[1] / "data" / "sample"


def write_sample(folder: Path) -> list[Path]:
    """The small tables of data/sample: 300 shoppers, 40 products, 6,000 impressions. `python tests/test_market.py` rewrites them."""
    shop = market.Market(seed=0, n_users=300, n_products=40)
    made = shop.tables(6000, seed=0) | {"events": shop.events(0, per_user=15), "reviews": shop.reviews(0, n=300)}
    return tables.write(made, folder)


def test_the_sample_tables_are_what_the_market_writes(tmp_path):
    written = write_sample(tmp_path)
    assert {p.name for p in written} == {p.name for p in SAMPLE.iterdir()}
    for path in written:
        assert path.read_bytes() == (SAMPLE / path.name).read_bytes(), f"{path.name}: run python tests/test_market.py"
    assert sum(p.stat().st_size for p in written) < 3_000_000


if __name__ == "__main__":
    write_sample(SAMPLE)
