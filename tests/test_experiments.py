"""Experiments, plans and uplift: closed forms, published bounds, many simulated tests, lesson 11's own versions, every error by its message."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from adlib import evaluation
from adlib import experiments as ex
from adlib import preregistration as pre
from adlib.uplift import TLearner, qini


def users_of(rng, n=1500, lift=0.0):
    """One row a user: clicks, impressions, clicks before; people differ in rate and in how often they come."""
    visits, rate = rng.geometric(0.04, n), 0.03 * rng.gamma(1.5, 1 / 1.5, n)
    arm = rng.random(n) < 0.5
    return pd.DataFrame(
        {
            "user_id": np.arange(n),
            "arm": np.where(arm, "treatment", "control"),
            "click": rng.binomial(visits, np.minimum(rate * (1 + lift * arm), 1)),
            "shown": visits,
            "before": rng.binomial(2 * visits, np.minimum(rate, 1)),
        }
    )


# -- CUPED and many A/A runs ------------------------------------------------------------------------------------------------


def test_cuped_by_hand():
    frame = users_of(np.random.default_rng(0))
    logs, e, x = {}, {}, {}
    for name, rows in frame.groupby("arm"):
        logs[name] = math.log(rows.click.mean())
        e[name], x[name] = rows.click / rows.click.mean() - 1, rows.before - rows.before.mean()
    both_e, both_x = pd.concat(e.values()), pd.concat(x.values())
    theta = (both_e * both_x).sum() / (both_x**2).sum()
    means = frame.groupby("arm").before.mean()
    centre = logs["treatment"] - logs["control"] - theta * (means["treatment"] - means["control"])
    error = math.sqrt(sum((e[a] - theta * x[a]).var() / len(e[a]) for a in e))
    lift = ex.cuped_lift(frame, "click", "before")
    assert math.log1p(lift.estimate) == pytest.approx(centre, abs=1e-12)
    assert math.log1p(lift.high) == pytest.approx(centre + 1.959963984540054 * error, abs=1e-12)


def test_cuped_is_narrower_finds_the_same_and_noise_does_no_harm():
    rng, ratios, noise = np.random.default_rng(1), [], []
    for _ in range(60):
        frame = users_of(rng, lift=0.3).assign(noise=lambda f: rng.normal(size=len(f)))
        plain = evaluation.user_level_lift(frame, "click")
        lifts = ex.cuped_lift(frame, "click", "before"), ex.cuped_lift(frame, "click", ["noise"])
        for kept, lift in zip((ratios, noise), lifts, strict=True):
            kept.append(
                (math.log1p(lift.high) - math.log1p(lift.low)) / (math.log1p(plain.high) - math.log1p(plain.low))
            )
    assert np.mean(ratios) < 0.9 and np.mean(noise) == pytest.approx(1, abs=0.01)


def test_many_runs_equal_one_run_at_a_time():
    frame = users_of(np.random.default_rng(2), n=203)
    by_user = frame[["click", "shown", "before"]].to_numpy()
    found = ex.rerandomise(by_user, runs=20, seed=5)
    bits = np.unpackbits(np.random.default_rng(5).integers(0, 256, (20, 26), dtype=np.uint8), axis=1)[:, :203]
    for run, treated in enumerate(bits.astype(bool)):
        dealt = frame.assign(arm=np.where(treated, "treatment", "control"))
        sums = dealt.groupby("arm")[["click", "shown"]].sum()
        one = evaluation.two_proportion(*sums.loc["control"], *sums.loc["treatment"])
        assert found.impression[run] == pytest.approx(one.p_value, abs=1e-9)
        by_user_p = evaluation.user_level_lift(dealt, "click", per="shown").p_value
        assert found.user[run] == pytest.approx(by_user_p, abs=1e-9)
        cuped_p = ex.cuped_lift(dealt, "click", "before", per="shown").p_value
        assert found.cuped[run] == pytest.approx(cuped_p, abs=1e-9)


def test_error_rates_over_ten_thousand_runs():
    frame = users_of(np.random.default_rng(3), n=4000)
    wrong = (ex.rerandomise(frame[["click", "shown", "before"]].to_numpy()) < 0.05).mean()
    assert 0.045 <= wrong.user <= 0.055 and 0.045 <= wrong.cuped <= 0.055
    assert wrong.impression > 0.065  # people differ, so their impressions are no separate witnesses


# -- looking early ------------------------------------------------------------------------------------------------------------


def test_bounds_are_the_published_ones():
    fifths = np.arange(1, 6) / 5
    assert ex.spending_bounds(fifths) == pytest.approx([4.8769, 3.3569, 2.6803, 2.2898, 2.0310], abs=2e-4)
    assert ex.spending_bounds(fifths, kind="pocock") == pytest.approx(
        [2.4380, 2.4268, 2.4101, 2.3966, 2.3859], abs=2e-4
    )
    assert ex.spending_bounds([1.0], 0.1) == pytest.approx([1.6448536], abs=1e-6)


def paths(looks, runs=10_000, seed=0):
    """(runs, looks) estimates after equal shares of information, no effect, and their variances."""
    step = np.random.default_rng(seed).normal(size=(runs, looks)).cumsum(axis=1)
    n = np.arange(1, looks + 1)
    return step / n, np.broadcast_to(1 / n, step.shape)


@pytest.mark.parametrize("kind", ["obrien-fleming", "pocock"])
def test_group_sequential_keeps_alpha_and_peeking_does_not(kind):
    estimate, variance = paths(14)
    z = np.abs(estimate) / np.sqrt(variance)
    assert 0.045 <= (z > ex.spending_bounds(np.arange(1, 15) / 14, kind=kind)).any(axis=1).mean() <= 0.055
    assert (z > 1.96).any(axis=1).mean() > 0.18


@pytest.mark.parametrize("tau", [0.05, 0.3, 1.0])
def test_the_sequence_holds_at_all_looks_together(tau):
    estimate, variance = paths(300, runs=2000)
    low, high, p = ex.confidence_sequence(estimate, variance, tau)
    left = ((low > 0) | (high < 0)).any(axis=1)
    assert left.mean() <= 0.05
    assert np.array_equal(left, p[:, -1] < 0.05)
    assert (np.diff(p, axis=1) <= 0).all()


def test_looks_are_the_lifts_so_far():
    rng = np.random.default_rng(4)
    frame = pd.DataFrame(
        {"user_id": rng.integers(0, 300, 6000), "timestamp": pd.date_range("2026-03-02", periods=6000, freq="min")}
    )
    frame["arm"] = np.where(frame.user_id % 2, "treatment", "control")
    frame["click"] = (rng.random(6000) < 0.1).astype(int)
    found = ex.look_at(frame, "click", 4)
    whole = evaluation.user_level_lift(frame, "click")
    assert math.expm1(found.estimate.iloc[-1]) == pytest.approx(whole.estimate, abs=1e-12)
    assert 2 * stats.norm.sf(abs(found.z.iloc[-1])) == pytest.approx(whole.p_value, abs=1e-9)
    back = pd.concat([frame.iloc[:3000], frame.iloc[2990:]])
    with pytest.raises(ValueError, match="the clock goes backwards at row 3000"):
        ex.look_at(back, "click", 4)
    with pytest.raises(ValueError, match="looks must be between 1"):
        ex.look_at(frame, "click", 0)


# -- Bayes and shrinkage --------------------------------------------------------------------------------------------------------


def test_beta_binomial_against_exact_sums():
    c, t = (4, 30), (9, 28)  # clicks, impressions
    (a, b), (u, v) = ((x + 1, n - x + 1) for x, n in (c, t))
    i = np.arange(u)  # P(p_t > p_c) for whole numbers, Miller (2015)
    from scipy.special import betaln

    exact = np.exp(betaln(a + i, b + v) - np.log(v + i) - betaln(1 + i, v) - betaln(a, b)).sum()
    post = ex.beta_binomial(*c, *t)
    assert post.better == pytest.approx(exact, abs=5e-6)
    assert post.loss_control - post.loss_treatment == pytest.approx(u / (u + v) - a / (a + b), abs=1e-5)
    rng = np.random.default_rng(0)
    ratio = rng.beta(u, v, 400_000) / rng.beta(a, b, 400_000) - 1
    assert (post.low, post.high) == pytest.approx(tuple(np.quantile(ratio, [0.025, 0.975])), rel=0.03)


def test_beta_binomial_mirrors_and_takes_zero_clicks():
    one, other = ex.beta_binomial(3, 500, 9, 400), ex.beta_binomial(9, 400, 3, 500)
    assert one.better == pytest.approx(1 - other.better, abs=1e-6)
    assert one.loss_treatment == pytest.approx(other.loss_control, abs=1e-12)
    assert ex.beta_binomial(0, 100, 0, 100).better == pytest.approx(0.5, abs=1e-6)


def test_shrinking_by_hand_and_its_ends():
    value, error = np.array([0.1, 0.3, -0.2, 0.5]), np.full(4, 0.1)
    found = ex.shrink(value, error)
    tau2 = value.var(ddof=1) - 0.01  # equal errors: Paule and Mandel's tau has a closed form
    assert found.spread**2 == pytest.approx(tau2, rel=1e-4)
    assert found.estimate == pytest.approx(value.mean() + tau2 / (tau2 + 0.01) * (value - value.mean()), abs=1e-5)
    assert ex.shrink([0.1, 0.1, 0.1], [0.2, 0.1, 0.3]).estimate == pytest.approx([0.1] * 3)


def test_best_of_twenty_loses_its_curse():
    rng, raw, kept, true = np.random.default_rng(0), [], [], []
    for _ in range(400):
        theta = rng.normal(math.log(0.015), 0.12, 20)
        clicks = rng.binomial(20_000, np.exp(theta))
        estimate, error = np.log(clicks / 20_000), np.sqrt(1 / clicks - 1 / 20_000)
        shrunk = ex.shrink(estimate, error)
        best = int(shrunk.estimate.argmax())
        raw.append(estimate[best] - estimate.mean())
        kept.append(shrunk.estimate[best] - shrunk.mean)
        true.append(theta[best] - theta.mean())
    assert np.mean(raw) / np.mean(true) - 1 > 0.12
    assert abs(np.mean(kept) / np.mean(true) - 1) <= 0.05


# -- plans ----------------------------------------------------------------------------------------------------------------------

PLAN = {
    "shares": {"control": 0.5, "treatment": 0.5},
    "alpha": 0.05,
    "metrics": [
        {"name": "clicks", "metric": "click", "role": "primary"},
        {"name": "saves", "metric": "save", "role": "secondary"},
        {"name": "shares", "metric": "share", "role": "secondary"},
        {"name": "orders", "metric": "order", "role": "guardrail", "margin": 0.5},
    ],
}
BEFORE = datetime(2026, 3, 1, tzinfo=UTC)


def rows_of(rng, n_users=2000, lift=0.5):
    user = np.repeat(np.arange(n_users), 8)
    rate = 0.1 * (1 + lift * (user % 2))
    frame = pd.DataFrame({"user_id": user, "arm": np.where(user % 2, "treatment", "control")})
    frame["timestamp"] = pd.date_range("2026-03-02", periods=len(user), freq="min", tz="UTC")
    return frame.assign(**{c: (rng.random(len(user)) < rate).astype(int) for c in ("click", "save", "share", "order")})


def test_a_plan_is_written_once_and_cannot_be_changed(tmp_path):
    path = tmp_path / "plan.json"
    record = pre.register(path, PLAN, BEFORE)
    assert record["registered"] == "2026-03-01T00:00:00+00:00" and pre.read_plan(path) == record
    assert pre.register(path, PLAN) == record  # the same plan again: the first time stays
    with pytest.raises(ValueError, match="says otherwise on alpha: a plan is not changed afterwards"):
        pre.register(path, PLAN | {"alpha": 0.2})
    path.chmod(0o644)
    path.write_text(path.read_text().replace('"alpha": 0.05', '"alpha": 0.2'))
    with pytest.raises(ValueError, match="was changed after it was registered"):
        pre.read_plan(path)


def test_a_test_is_read_by_its_plan(tmp_path):
    pre.register(tmp_path / "plan.json", PLAN, BEFORE)
    rows = rows_of(np.random.default_rng(0))
    table = pre.read_test(tmp_path / "plan.json", rows)
    assert table.loc["clicks", "p_value"] == evaluation.user_level_lift(rows, "click").p_value
    p = table.loc[["saves", "shares"], "p_value"]
    assert table.loc[p.idxmin(), "p_adjusted"] == pytest.approx(2 * p.min())  # Holm, two tests
    assert table.loc["clicks", "verdict"] == "better" and table.loc["orders", "verdict"] == "safe"
    worse = rows.assign(order=rows.order * (rows.arm == "control") | (rows.order & (rows.user_id % 3 == 0)))
    assert pre.read_test(tmp_path / "plan.json", worse).loc["orders", "verdict"] == "a loss is not excluded"


def test_the_sample_ratio_stops_everything(tmp_path):
    pre.register(tmp_path / "plan.json", PLAN, BEFORE)
    rows = rows_of(np.random.default_rng(0))
    lost = rows[(rows.arm == "control") | (rows.user_id % 5 > 0)]
    with pytest.raises(pre.SampleRatioAlarm, match=r"sample-ratio alarm .*find the fault and test again"):
        pre.read_test(tmp_path / "plan.json", lost)
    pre.register(tmp_path / "late.json", PLAN)  # now: later than the rows
    with pytest.raises(ValueError, match=r"the plan was registered .*, after the first row of 2026-03-02"):
        pre.read_test(tmp_path / "late.json", rows)
    assert len(pre.read_test(tmp_path / "late.json", rows, after_the_fact=True)) == 4


# -- uplift ---------------------------------------------------------------------------------------------------------------------


def people(rng, n=6000, effect=0.5):
    X = rng.normal(size=(n, 3))
    treated = rng.integers(0, 2, n)
    p = 1 / (1 + np.exp(-(-1 + 0.3 * X[:, 1] + effect * treated * X[:, 0])))
    return X, (rng.random(n) < p).astype(int), treated


def test_qini_by_hand():
    found = qini([4, 3, 2, 1], [1, 0, 0, 1], [1, 0, 1, 0], draws=20)
    assert found.share == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert found.gain == pytest.approx(np.array([0, 1, 1, 1, 0]) / 2)
    assert found.area == pytest.approx(0.375)


def test_uplift_finds_whom_the_ad_changes_and_nobody_when_it_changes_nobody():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        model = TLearner().fit(*people(rng))
        X, y, treated = people(rng)
        assert np.corrcoef(model.predict(X), X[:, 0])[0, 1] > 0.8
        assert qini(model.predict(X), y, treated, draws=200).low > 0
        assert qini(model.predict(X), y, rng.permutation(treated), draws=200).low < 0


def test_qini_of_a_random_order_has_no_area_on_average():
    rng = np.random.default_rng(0)
    _, y, treated = people(rng, n=1500)
    areas = [qini(rng.random(len(y)), y, treated, draws=2, seed=s).area for s in range(200)]
    assert abs(np.mean(areas)) < 3.5 * np.std(areas) / math.sqrt(200)


# -- lesson 11's own versions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_hand():
    """What the cells of lesson 11 with the tag by-hand define."""
    path = Path(__file__).parents[1] / "notebooks" / "11_evaluation.ipynb"
    names = {"np": np, "pd": pd, "math": math, "stats": stats}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "by-hand" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
    return names


def test_the_lessons_cuped_and_delta_method_are_the_packages(by_hand):
    frame = users_of(np.random.default_rng(7), lift=0.2)
    lift = ex.cuped_lift(frame, "click", "before")
    log_ratio, variance, _ = by_hand["cuped"](frame.click, frame.before, (frame.arm == "treatment"))
    assert log_ratio == pytest.approx(math.log1p(lift.estimate), abs=1e-12)
    width = math.log1p(lift.high) - math.log1p(lift.low)
    assert 2 * 1.959963984540054 * math.sqrt(variance) == pytest.approx(width, abs=1e-12)


@given(st.integers(3, 60), st.integers(0, 10_000))
def test_the_lessons_estimators_and_interval_are_the_packages(by_hand, n, seed):
    from adlib import off_policy

    rng = np.random.default_rng(seed)
    w, r, q, m = rng.gamma(1, 1, n), rng.integers(0, 2, n) * 1.0, rng.random(n), rng.random(n)
    r[0] = 1.0
    log = off_policy.Log(r, np.full(n, 0.01), np.minimum(w / 100, 1), q, m)
    w = log.weight
    for name, value in by_hand["estimators"](w, r, q, m, tau=1.0, lam=2.0).items():
        parameter = {"switch": 1.0, "shrinkage": 2.0}.get(name)
        assert value == pytest.approx(off_policy.estimate_policy_value(log, name, parameter), abs=1e-12)
    low, high = by_hand["gamma_interval"]((w * r).sum(), (w**2 * r).sum(), (w**2).sum() / w.sum(), n)
    found = off_policy.estimate_interval(log, "ips", minimum_size=0)
    assert (low, high) == pytest.approx((found.low, found.high), abs=1e-9)


# -- every error by its message -------------------------------------------------------------------------------------------------


def little(**columns):
    frame = {"user_id": list("abcd"), "arm": ["control"] * 2 + ["treatment"] * 2, "click": [1, 2, 3, 1], "before": [1, 2, 4, 3]}  # fmt: skip
    return pd.DataFrame(frame | columns)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (little(user_id=list("abca")), r"1 users are in both arms \(first: a\)"),
        (little(user_id=list("abcc")), "the treatment arm has one user|4 rows for 3 users"),
        (little(arm=["control"] * 3 + ["treatment"]), "the treatment arm has one user"),
        (little(click=list("abcd")), "metric 'click' is not numeric"),
        (little(before=list("abcd")), "metric 'before' is not numeric"),
        (little(before=[1, 1, 1, 1]), "never varies"),
        (little(click=[0, 0, 1, 2]), "a sum of 'click' that is not above zero in the control arm|zero clicks"),
        (pd.concat([little(), little()]), "8 rows for 4 users: CUPED needs one row a user"),
        (little(arm=["control"] * 4), "one arm only"),
        (little(before=[1, None, 2, 3]), "column 'before' has 1 missing values"),
    ],
)
def test_cuped_errors(frame, message):
    with pytest.raises(ValueError, match=message):
        ex.cuped_lift(frame, "click", "before")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ex.rerandomise(np.ones((50, 2))), "by_user needs three columns"),
        (lambda: ex.rerandomise(np.zeros((50, 3))), "at least 30 users with a sum above 0"),
        (lambda: ex.spending_bounds([0.5, 0.4, 1]), "information must grow from look to look"),
        (lambda: ex.spending_bounds([0.5, 1.2]), "information must grow"),
        (lambda: ex.spending_bounds([0, 1]), "information must grow"),
        (lambda: ex.spending_bounds([1], kind="magic"), "kind must be obrien-fleming or pocock"),
        (lambda: ex.spending_bounds([1], alpha=1), "alpha must lie between 0 and 1"),
        (lambda: ex.confidence_sequence([0.1], [0.0], 1), "every variance must be above 0"),
        (lambda: ex.confidence_sequence([0.1], [0.1], 0), "tau and every variance"),
        (lambda: ex.confidence_sequence([0.1, 0.1], [0.1, 0.2], 1), "in order of time"),
        (lambda: ex.beta_binomial(5, 4, 1, 4), "control: 5 clicks in 4 impressions is impossible"),
        (
            lambda: ex.beta_binomial(0, 4, 0, 0),
            "treatment: 0 clicks in 0 impressions is impossible, or nothing was shown",
        ),
        (lambda: ex.beta_binomial(1, 4, 1, 4, prior=(0, 1)), "prior must be above 0"),
        (lambda: ex.shrink([1, 2], [1, 1]), "at least three estimates"),
        (lambda: ex.shrink([1, 2, 3], [1, 1, 0]), "standard errors numbers above 0"),
        (lambda: pre.register("x", PLAN | {"shares": {"a": 1}}), "a plan needs shares"),
        (lambda: pre.register("x", PLAN | {"metrics": []}), "exactly one of them primary"),
        (
            lambda: pre.register("x", PLAN | {"metrics": [PLAN["metrics"][0], {"role": "guardrail"}]}),
            "a margin above 0",
        ),
        (lambda: qini([1, 2], [1], [1, 0]), "one number a person"),
        (lambda: qini([1, math.nan], [1, 0], [1, 0]), "none of them missing"),
        (lambda: qini([1, 2, 3], [1, 0, 1], [1, 0, 0]), "at least two people"),
        (lambda: TLearner().fit([[1]] * 4, [0, 0, 0, 1], [0, 0, 1, 1]), "the control arm has 2 people"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
