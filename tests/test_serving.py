"""Serving: actions, bandits, the decision loop that is really killed, pacing, prices; exact, by hand, or over seeds."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from scipy.special import expit
from statsmodels.discrete.conditional_models import ConditionalLogit as Reference

from adlib import assets, bandits, datasets, delivery, pacing, pricing, serving

YUAN = st.floats(0, 100, allow_nan=False)


@pytest.fixture(scope="module")
def by_hand():
    """What lesson 08 writes out by hand."""
    book = json.loads((ROOT / "notebooks" / "08_ad_serving.ipynb").read_text(encoding="utf-8"))
    space = {"np": np}
    for cell in book["cells"]:
        if "by-hand" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), space)
    return SimpleNamespace(**space)


# -- from a prediction to an action ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_action_by_hand_is_the_packages(by_hand, y, q, cost):
    margin = np.linspace(1, 3, len(y))
    value = serving.expected_value(y, p_conversion=q, margin=margin, cost=cost)
    assert by_hand.act_by_hand(y, margin, q, cost) == serving.best_ad(value)


def test_an_action_respects_cap_and_reserve():
    assert serving.best_ad([0.3, 0.9, 0.5], allowed=serving.under_cap([0, 3, 1], cap=3)) == 2
    assert serving.best_ad([0.3, 0.9], reserve=0.9) == -1 == serving.best_ad([0.3], allowed=[False])
    assert serving.expected_value(0.02, p_conversion=0.05, margin=100, cost=0.03) == pytest.approx(0.07)


@given(YUAN, YUAN, YUAN)
def test_no_bid_earns_more_than_the_truth(value, bid, rival):
    assert serving.auction_profit(value, bid, rival) <= serving.auction_profit(value, value, rival)


@given(st.lists(YUAN, min_size=2, max_size=6), YUAN)
def test_a_second_price_auction_charges_the_second_bid(bids, reserve):
    winner, price = serving.second_price(bids, reserve)
    if winner < 0:
        assert max(bids) < reserve and price == 0
    else:
        assert bids[winner] == max(bids) and price == max(sorted(bids)[-2], reserve)


def test_an_interval_over_runs_is_students():
    x = np.array([1.0, 2.0, 4.0, 7.0])
    low, high = stats.t.interval(0.95, 3, x.mean(), stats.sem(x))
    assert tuple(serving.mean_interval(x)) == pytest.approx((3.5, low, high))
    assert tuple(serving.mean_interval(x, x + 1)) == pytest.approx((-1, -1, -1))


# -- bandits --------------------------------------------------------------------------------------------------------------


def test_bandits_by_hand_choose_as_the_packages(by_hand):
    clicks, shown = np.array([3.0, 9.0, 0.0]), np.array([200.0, 300.0, 10.0])
    package = bandits.Thompson(0.02, 50.0)
    package.start(np.ones((4000, 3), bool), 1000)
    package.shown[:], package.clicks[:] = shown, clicks
    rng = np.random.default_rng(0)
    mine = np.bincount([by_hand.thompson_by_hand(clicks, shown, 0.02, 50.0, rng) for _ in range(4000)], minlength=3)
    theirs = np.bincount(package.choose(rng), minlength=3)
    assert stats.chi2_contingency([mine, theirs]).pvalue > 1e-4
    greedy = bandits.EpsilonGreedy(0.0, 0.02, 50.0)
    greedy.start(np.ones((1, 3), bool), 1000)
    greedy.shown[:], greedy.clicks[:] = shown, clicks
    assert greedy.choose(rng)[0] == by_hand.epsilon_greedy_by_hand(clicks, shown, 0.02, 50.0, 0.0, rng) == 1


def test_linucb_by_hand_is_the_packages(by_hand):
    rng = np.random.default_rng(1)
    policy = bandits.LinUCB(alpha=0.3, ridge=2.0)
    policy.start(1, 3, 4)
    x = rng.normal(size=(1, 60, 4))
    outer = (x[..., :, None] * x[..., None, :]).reshape(1, 60, 16)
    arm, click = rng.integers(0, 3, (1, 60)), rng.integers(0, 2, (1, 60))
    policy.update(x, outer, arm, click)
    for a in range(3):
        rows = arm[0] == a
        assert np.allclose(policy.A[0, a], 2 * np.eye(4) + x[0, rows].T @ x[0, rows])
        assert np.allclose(policy.b[0, a], click[0, rows] @ x[0, rows])
    mine = [by_hand.linucb_by_hand(row, policy.A[0], policy.b[0], 0.3) for row in x[0]]
    assert (policy.choose(x, outer, rng)[0] == mine).all()


def test_the_strength_of_a_prior_by_hand_and_planted(by_hand):
    rng = np.random.default_rng(2)
    mean = rng.uniform(0.01, 0.05, 800)
    rate = rng.beta(400 * mean, 400 * (1 - mean))
    shown = np.full(800, 2000)
    clicks = rng.binomial(shown, rate)
    found = bandits.prior_strength(clicks, shown, mean)
    assert 300 < found < 530
    few = slice(0, 12)
    grid = np.geomspace(30, 5000, 60)
    ours = bandits.prior_strength(clicks[few], shown[few], mean[few])
    best = grid[np.argmax([by_hand.log_likelihood_by_hand(s, clicks[few], shown[few], mean[few]) for s in grid])]
    assert abs(np.log(best / ours)) < 0.1
    assert bandits.prior_strength(clicks, shown, np.full(800, mean.mean())) < found / 2


@pytest.mark.parametrize("seed", range(3))
def test_learning_beats_chance_and_regret_is_counted_right(seed):
    rates = np.tile([0.02, 0.03, 0.05, 0.01], (40, 1))
    chance = bandits.simulate(bandits.Uniform(), rates, 20_000, seed=seed)
    expected = 20_000 * (0.05 - rates[0].mean())
    assert serving.mean_interval(chance.regret[:, -1]).estimate == pytest.approx(expected, rel=0.03)
    for policy in (bandits.Thompson(), bandits.UCB(1.0), bandits.EpsilonGreedy(0.1), bandits.ABTest(0.3)):
        game = bandits.simulate(policy, rates, 20_000, seed=seed)
        assert game.regret[:, -1].mean() < 0.5 * expected
        assert (game.shown.sum(1) == 20_000).all() and (np.diff(game.regret) >= 0).all()
        assert np.allclose(game.regret[:, -1], (game.shown * (0.05 - rates)).sum(1))


def test_an_ab_test_shares_its_traffic_then_commits():
    game = bandits.simulate(bandits.ABTest(0.5), np.array([[0.5, 0.1]]), 4000)
    assert game.shown.tolist() == [[3000, 1000]]


def test_a_run_with_fewer_ads_never_shows_what_it_lacks():
    rates = np.array([[0.02, 0.05, np.nan], [0.01, 0.02, 0.03]])
    for policy in (bandits.Uniform(), bandits.Thompson(), bandits.UCB(), bandits.ABTest()):
        assert bandits.simulate(policy, rates, 2000).shown[0, 2] == 0


def test_a_replay_draws_real_impressions_without_putting_them_back():
    clicks, shown = np.array([[5.0, 50.0], [7.0, np.nan]]), np.array([[1000.0, 1000.0], [1000.0, np.nan]])
    game = bandits.replay_tests(bandits.Thompson(), clicks, shown, 1000, batch=10)
    assert game.clicks[1, -1] == 7  # the whole log of its only ad, once
    many = np.tile(clicks[:1], (400, 1)), np.tile(shown[:1], (400, 1))
    rates = bandits.replay_tests(bandits.Uniform(), *many, 1000, batch=10).clicks[:, -1]
    assert serving.mean_interval(rates).estimate == pytest.approx(27.5, abs=1.2)


@pytest.mark.parametrize("seed", range(2))
def test_linucb_learns_who_likes_what(seed):
    rng = np.random.default_rng(seed)
    x = np.c_[np.ones(2000), rng.normal(size=2000)]
    rates = np.c_[expit(-3 + x[:, 1]), expit(-3 - x[:, 1])]
    play = {"runs": 20, "horizon": 10_000, "batch": 100, "seed": seed}
    chance = bandits.simulate_visitors(bandits.LinUCB(0, epsilon=1.0), rates, x, **play).regret[:, -1]
    found = bandits.simulate_visitors(bandits.LinUCB(0.2), rates, x, **play).regret[:, -1]
    assert found.mean() < 0.3 * chance.mean()


# -- the decision loop ----------------------------------------------------------------------------------------------------


def model(visit):
    return 0.05 + 0.01 * (visit.ads % 7) - 0.005 * visit.shown


def opened(path, predict=model, **options):
    return delivery.DecisionLoop(path, predict, **{"budget": 100.0, "cost": 0.01, "cap": 2} | options)


def test_a_loop_caps_counts_and_feeds_features_back(tmp_path):
    seen = []
    loop = opened(tmp_path / "log.db", lambda v: seen.append(v) or model(v))
    answers = [loop.decide(f"r{i}", "u", 1e9 + i, [5, 6]) for i in range(5)]
    assert [a.ad for a in answers] == [6, 6, 5, 5, -1] and answers[4].reason == "capped"
    loop.click("r2", 1e9 + 10)
    loop.click("r2", 1e9 + 11)
    loop.click("r2", 1e9 - 60)  # reported before: sent again after a restart, by a server whose clock has gone on
    loop.decide("r9", "u", 1e9 + 12, [5, 7])
    assert seen[-1].shown.tolist() == [2, 0] and seen[-1].clicked.tolist() == [1, 0] and seen[-1].total_clicks == 1
    assert loop.audit() == {"showings": 0, "profiles": 0, "spending": 0} and loop.log()["click"].sum() == 1


def test_a_request_sent_twice_is_answered_from_the_log(tmp_path):
    loop = opened(tmp_path / "log.db")
    first, again = (loop.decide("r", "u", 1e9, [1, 2, 3]) for _ in range(2))
    assert again.repeated and (again.ad, again.p, again.cost) == (first.ad, first.p, first.cost)
    assert loop.spent(1e9) == pytest.approx(0.01) and len(loop.log()) == 1


def test_the_budget_is_a_days_and_spending_follows_the_plan(tmp_path):
    loop = opened(tmp_path / "log.db", budget=0.05, cap=99)
    day = [loop.decide(f"a{i}", f"u{i}", 86_400 * 7 + i, [1]).reason for i in range(8)]
    assert day == ["served"] * 5 + ["budget"] * 3
    assert loop.decide("b", "u", 86_400 * 8 + 1, [1]).reason == "served"
    paced = opened(tmp_path / "paced.db", budget=0.24, cap=99, traffic=[1] * 24)
    for i in range(24 * 6):
        paced.decide(f"c{i}", f"u{i}", 86_400 * 7 + 600 * i, [1])
    spent = paced.log().groupby(lambda i: i // 6)["cost"].sum().cumsum()
    assert (spent <= 0.01 * (np.arange(24) + 1) + 1e-9).all() and spent.iloc[-1] >= 0.23
    assert opened(tmp_path / "dear.db", click_value=0.1).decide("r", "u", 1e9, [1]).reason == "worthless"


SERVE = """
import sys
from adlib import delivery
model = lambda visit: 0.05 + 0.01 * (visit.ads % 7) - 0.005 * visit.shown
loop = delivery.DecisionLoop({path!r}, model, budget=3.0, cost=0.01, cap=3)
for i in range(int(sys.argv[1])):
    loop.decide(f"r{{i}}", f"u{{i % 40}}", 1e9 + i, list(range(30)))
    sys.stdout.write(f"{{i}}\\n")
    sys.stdout.flush()
"""


def test_kill_minus_nine_loses_nothing_doubles_nothing_and_the_budget_goes_on(tmp_path):
    n, path = 400, str(tmp_path / "log.db")
    script = SERVE.format(path=path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for after in (60, 170):  # killed twice, each time the new process is sent every request again
        child = subprocess.Popen([sys.executable, "-c", script, str(n)], stdout=subprocess.PIPE, env=environment)
        for _ in range(after):
            child.stdout.readline()
        time.sleep(0.003)
        os.kill(child.pid, signal.SIGKILL)
        told = after + child.stdout.read().count(b"\n")
        assert child.wait() == -signal.SIGKILL and told < n
        loop = opened(path, budget=3.0, cap=3)
        log = loop.log()
        assert told <= len(log) <= told + 1 and log["request"].is_unique
        assert not any(loop.audit().values())
        assert loop.spent(1e9) == pytest.approx(log["cost"].sum())
        loop.close()
    subprocess.run([sys.executable, "-c", script, str(n)], check=True, env=environment, stdout=subprocess.DEVNULL)
    whole = opened(tmp_path / "whole.db", budget=3.0, cap=3)
    for i in range(n):
        whole.decide(f"r{i}", f"u{i % 40}", 1e9 + i, list(range(30)))
    after_kills = opened(path, budget=3.0, cap=3)
    pd.testing.assert_frame_equal(after_kills.log(), whole.log())
    assert after_kills.spent(1e9) == pytest.approx(3.0) and (whole.log()["reason"] == "budget").sum() == n - 300


def test_two_servers_on_one_file_share_one_budget(tmp_path):
    one, two = (opened(tmp_path / "log.db", budget=0.1, cap=99) for _ in range(2))
    served = [loop.decide(f"{k}-{i}", f"u{i}", 1e9, [1]).ad for i in range(10) for k, loop in enumerate((one, two))]
    assert sum(ad >= 0 for ad in served) == 10 and not any(one.audit().values())


def test_a_decision_that_fails_leaves_no_trace(tmp_path):
    loop = opened(tmp_path / "log.db", lambda v: np.full(len(v.ads), np.nan))
    with pytest.raises(ValueError, match="finite"):
        loop.decide("r", "u", 2e9, [1, 2])
    loop.predict = model
    assert loop.decide("r", "u", 1e9, [1, 2]).ad == 2 and len(loop.log()) == 1


@pytest.mark.parametrize(
    "do, message",
    [
        (lambda loop: loop.decide("r2", "u", 1e9 - 60, [1]), "clock went backwards by 60.0 s"),
        (lambda loop: loop.click("r1", 1e9 - 60), "clock went backwards"),
        (lambda loop: loop.decide("r2", "u", np.nan, [1]), "finite number of seconds"),
        (lambda loop: loop.decide("r2", "u", 1e9, []), "empty candidate set"),
        (lambda loop: loop.click("r7", 1e9), "showed no ad"),
    ],
)
def test_bad_requests_are_refused(tmp_path, do, message):
    loop = opened(tmp_path / "log.db")
    loop.decide("r1", "u", 1e9, [1])
    with pytest.raises(ValueError, match=message):
        do(loop)
    assert len(loop.log()) == 1 and not any(loop.audit().values())


@pytest.mark.parametrize("scores, message", [([np.inf], "finite"), ([1.5], "between 0 and 1"), ([0.1, 0.2], "shape")])
def test_bad_scores_are_refused(tmp_path, scores, message):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "log.db", lambda v: np.array(scores)).decide("r", "u", 1e9, [1])


@pytest.mark.parametrize(
    "options, message",
    [({"budget": 0}, "budget is 0"), ({"cost": -1}, "negative prices"), ({"cap": 0}, "cap"), ({"traffic": [0] * 24}, "traffic")],
)  # fmt: skip
def test_bad_settings_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "log.db", **options)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "notes.db").write_text("this is not a database, but it is long enough to look at" * 20)
    with pytest.raises(ValueError, match=r"notes\.db is no decision log"):
        opened(tmp_path / "notes.db")


# -- pacing and channels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_dual_pacing_buys_more_and_nobody_overspends(seed):
    rng = np.random.default_rng(seed)
    value = rng.gamma(2, 0.01, (10, 1500))
    price = np.exp(rng.normal(np.log(0.02), 0.7, value.shape))
    best, won = pacing.best_in_hindsight(value, price, 2.0), {}
    for rule in pacing.RULES:
        days = pacing.run_days(value, price, 2.0, rule)
        assert (days.spent <= 2 + 1e-9).all() and (days.value <= best + 1e-9).all() and (np.diff(days.gone) >= 0).all()
        won[rule] = days.value / best
    assert serving.mean_interval(won["dual"], won["throttle"]).low > 0 and won["dual"].mean() > 0.9


def test_hindsight_is_the_best_of_all_bargains():
    assert pacing.best_in_hindsight([4.0, 3, 3], [2.0, 1, 3], 3.0)[0] == 7
    assert pacing.best_in_hindsight([4.0, 3, 3], [2.0, 1, 3], 4.5)[0] == pytest.approx(8.5)


def test_the_plan_follows_the_traffic():
    plan = pacing.spending_plan([1] * 12 + [3] * 12)
    assert plan[12] == pytest.approx(0.25) and plan[24] == 1
    assert pacing.allowance(plan, 80.0, 6.0) == pytest.approx(10)


@given(st.lists(st.tuples(st.floats(10, 1e4), st.floats(10, 1e4)), min_size=1, max_size=4), st.floats(10, 1e5))
@settings(max_examples=40, deadline=None)
def test_a_budget_is_divided_where_slopes_are_equal(curves, budget):
    curves = [pacing.Response(*c) for c in curves]
    spend = pacing.allocate(curves, budget)
    assert spend.sum() == pytest.approx(budget, rel=1e-6) and (spend >= 0).all()
    slope = np.array([c.ceiling / c.scale * np.exp(-s / c.scale) for c, s in zip(curves, spend, strict=True)])
    assert (slope <= slope[spend > 0].min() * (1 + 1e-6) + 1e-12).all()


def test_the_division_equals_a_general_solver():
    curves = [pacing.Response(9000, 2200), pacing.Response(5200, 700), pacing.Response(900, 300)]
    ours = pacing.allocate(curves, 3000.0)
    loss = lambda s: -sum(float(c(x)) for c, x in zip(curves, s, strict=True))  # noqa: E731
    whole = {"type": "eq", "fun": lambda s: s.sum() - 3000}
    theirs = optimize.minimize(loss, [1000] * 3, bounds=[(0, 3000)] * 3, constraints=whole, method="SLSQP")
    assert loss(ours) <= theirs.fun + 1e-3


def test_a_response_curve_is_found_and_its_intervals_cover():
    true, inside = pacing.Response(5000, 700), 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        spend = rng.uniform(100, 2500, 40)
        fit = pacing.fit_response(spend, rng.poisson(true(spend)))
        at = np.percentile([float(d(1000)) for d in fit.draws(200, rng)], [2.5, 97.5])
        inside += at[0] <= float(true(1000)) <= at[1]
    assert inside >= 52  # .94 over 300 seeds


# -- prices ---------------------------------------------------------------------------------------------------------------


def choices(n=1500, seed=0, beta=(-0.8, 0.6)):
    rng = np.random.default_rng(seed)
    X = np.stack([rng.uniform(2, 6, (n, 3)), rng.integers(0, 2, (n, 3))], 2).astype(float)
    return X, (X @ np.array(beta) + rng.gumbel(size=(n, 3))).argmax(1)


def test_the_conditional_logit_is_statsmodels():
    X, y = choices()
    ours = pricing.ConditionalLogit().fit(X, y)
    long = np.zeros(X.shape[:2])
    long[np.arange(len(y)), y] = 1
    groups = np.repeat(np.arange(len(y)), 3)
    theirs = Reference(long.ravel(), X.reshape(-1, 2), groups=groups).fit(disp=0)
    assert np.allclose(ours.coef_, theirs.params, atol=1e-4)
    assert np.allclose(np.sqrt(np.diag(ours.covariance_)), theirs.bse, rtol=1e-3)
    assert ours.log_likelihood_ == pytest.approx(theirs.llf, abs=1e-4)
    assert np.allclose(ours.predict_proba(X).sum(1), 1)


def test_its_intervals_hold_the_planted_effects():
    hits = 0
    for seed in range(20):
        X, y = choices(400, seed)
        low_high = pricing.ConditionalLogit().fit(X, y, groups=np.arange(400) // 4).intervals()
        hits += sum(i.low <= b <= i.high for i, b in zip(low_high, (-0.8, 0.6), strict=True))
    assert 34 <= hits <= 40


def test_elasticity_and_best_price_are_right():
    X, _ = choices()
    beta = np.array([-0.8, 0.6])
    shifted = X.copy()
    shifted[:, 0, 0] *= 1.0001
    share = lambda Z: (np.exp(Z @ beta)[:, 0] / np.exp(Z @ beta).sum(1)).sum()  # noqa: E731
    assert pricing.own_elasticity(X, beta, 0, 0) == pytest.approx((share(shifted) / share(X) - 1) / 0.0001, rel=1e-3)
    grid = np.arange(1, 12, 0.01)
    profit = []
    for p in grid[::20]:
        shifted[:, 0, 0] = p
        profit.append((p - 1.5) * share(shifted))
    assert pricing.best_price(X, beta, 0, 0, 1.5, grid) == pytest.approx(grid[::20][np.argmax(profit)], abs=0.2)


@given(st.floats(1, 3), st.floats(0, 60))
@settings(max_examples=25, deadline=None)
def test_fair_prices_keep_the_bound_and_earn_the_most(ratio, cost):
    a, b, n = np.array([2.0, 2.0, 1.0]), np.array([-0.045, -0.03, -0.02]), np.array([5, 3, 2])
    earn = lambda p: (n * (p - cost) * expit(a + b * p)).sum()  # noqa: E731
    p = pricing.fair_prices(a, b, n, cost, ratio)
    assert p.max() <= ratio * p.min() * (1 + 1e-9) and (p >= cost).all()
    rng = np.random.default_rng(0)
    for _ in range(100):
        other = p * np.exp(rng.normal(0, 0.1, 3))
        if other.max() <= ratio * other.min():
            assert earn(other) <= earn(p) * (1 + 1e-6)


# -- replay and bad input -------------------------------------------------------------------------------------------------


class Fixed:
    """Always the same item."""

    def choose(self):
        return "a"

    def learn(self, action, reward):
        assert action == "a"


def uniform_log(n=4000, **columns):
    rng = np.random.default_rng(0)
    item = rng.choice(["a", "b"], n)
    click = (rng.random(n) < np.where(item == "a", 0.1, 0.3)).astype(int)
    return pd.DataFrame({"item_id": item, "click": click, "propensity": 0.5}).assign(**columns)


def test_replay_finds_a_policys_rate_or_abstains():
    log = uniform_log()
    found = serving.replay(log, Fixed())
    assert found.matches == (log["item_id"] == "a").sum() and found.rate.low < 0.1 < found.rate.high
    assert serving.replay(log.head(150), Fixed()).rate is None
    assert serving.replay(log.assign(click=0), Fixed()).rate is None


@pytest.mark.parametrize("propensity, message", [(np.nan, "missing"), (0.0, "above 0"), (1.5, "at most at 1")])
def test_bad_propensities_are_refused(propensity, message):
    log = uniform_log()
    log.loc[3, "propensity"] = propensity
    with pytest.raises(ValueError, match=message):
        serving.replay(log, Fixed())


ONE = np.array([[0.1, 0.2]])
CHOICE = np.ones((4, 2, 1)) * np.arange(2)[:, None]


@pytest.mark.parametrize(
    "do, message",
    [
        (lambda: serving.replay(uniform_log(propensity=np.linspace(0.2, 0.8, 4000)), Fixed()), "not uniform"),
        (lambda: serving.best_ad([]), "empty candidate set"),
        (lambda: serving.best_ad([0.1, np.nan]), "candidate 1 is nan"),
        (lambda: serving.expected_value(1.2), "p_click"),
        (lambda: serving.second_price([-1, 2]), "negative prices"),
        (lambda: serving.auction_profit(1, -1, 2), "negative prices"),
        (lambda: serving.mean_interval([1.0]), "at least two runs"),
        (lambda: serving.mean_interval([1.0, 2], [1.0]), "equal lengths"),
        (lambda: bandits.Thompson(0.0), "between 0 and 1"),
        (lambda: bandits.EpsilonGreedy(2), "epsilon"),
        (lambda: bandits.UCB(-1), "alpha"),
        (lambda: bandits.ABTest(0), "explore"),
        (lambda: bandits.LinUCB(-1), "alpha >= 0"),
        (lambda: bandits.simulate(bandits.Uniform(), np.empty((2, 0)), 100), "empty candidate set"),
        (lambda: bandits.simulate(bandits.Uniform(), ONE * 9, 100), "between 0 and 1"),
        (lambda: bandits.simulate(bandits.Uniform(), ONE, 5), "does not fit"),
        (lambda: bandits.replay_tests(bandits.Uniform(), ONE, ONE * 0, 100), "zero impressions in an arm"),
        (lambda: bandits.replay_tests(bandits.Uniform(), ONE * 9, ONE, 100), "clicks <= impressions"),
        (lambda: bandits.replay_tests(bandits.Uniform(), ONE, ONE * 1000, 101), "smallest arm"),
        (lambda: bandits.prior_strength([1, 2], [0, 5], [0.1, 0.1]), "zero impressions in an arm"),
        (lambda: bandits.prior_strength([1], [5], [0.0]), "strictly between"),
        (lambda: bandits.simulate_visitors(bandits.LinUCB(), ONE, [[np.nan]], runs=2, horizon=100), "finite numbers"),
        (lambda: bandits.simulate_visitors(bandits.LinUCB(), ONE, [[1.0]], runs=2, horizon=10), "does not fit"),
        (lambda: pacing.run_days(ONE, ONE, 0), "budget is 0"),
        (lambda: pacing.run_days(ONE, -ONE, 1), "negative prices"),
        (lambda: pacing.run_days(ONE, ONE, 1, "hope"), "unknown"),
        (lambda: pacing.allocate([], 1), "no channel"),
        (lambda: pacing.allocate([pacing.Response(1, 1)], 0), "budget is 0"),
        (lambda: pacing.fit_response([1, 2], [1, 2]), "four periods"),
        (lambda: pacing.fit_response([5] * 6, range(6)), "never varied"),
        (lambda: pricing.ConditionalLogit().fit(np.ones((4, 2, 1)), [0, 1, 0, 1]), "never differs"),
        (lambda: pricing.ConditionalLogit().fit(CHOICE, [0, 1, 2, 0]), "whole number"),
        (lambda: pricing.ConditionalLogit().fit(np.ones((4, 2)), [0] * 4), "attributes"),
        (lambda: pricing.best_price(CHOICE, [-1.0], 0, 0, -1, [2]), "negative prices"),
        (lambda: pricing.best_price(CHOICE, [-1.0], 0, 0, 3, [2]), "no price"),
        (lambda: pricing.fair_prices([1], [0.1], [5], 1), "fall with the price"),
        (lambda: pricing.fair_prices([1], [-0.1], [5], -1), "negative prices"),
        (lambda: pricing.fair_prices([1], [-0.1], [5], 1, 0.5), "at least 1"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(do, message):
    with pytest.raises(ValueError, match=message):
        do()


# -- real data ------------------------------------------------------------------------------------------------------------


def test_catsup_format(tmp_path):
    names = [f"{k}.{b}" for k in ("disp", "feat", "price") for b in ("heinz41", "hunts32")]
    rows = [["rownames", "id", *names, "choice"], [1, 7, 0, 1, 0, 0, 4.6, 3.4, "hunts32"]]
    (tmp_path / "Catsup.csv").write_text("\n".join(",".join(map(str, r)) for r in rows), encoding="utf-8")
    tidy = datasets.catsup(tmp_path)
    assert tidy.to_dict("list") == {
        "choice_id": ["1", "1"], "household": ["7", "7"], "brand": ["heinz41", "hunts32"], "price": [4.6, 3.4], "display": [0, 1],
        "feature": [0, 0], "chosen": [0, 1],
    }  # fmt: skip


@pytest.mark.skipif(not assets.available("catsup"), reason="needs the real ketchup data")
def test_real_catsup():
    table = assets.read("catsup")
    assert table.shape == (4 * 2798, 7) and (table.groupby("choice_id")["chosen"].sum() == 1).all()
    assert table["household"].nunique() == 300 and table["price"].between(0.1, 12).all()
