"""Cases: a page from YAML and a folder, lifts against closed forms and the notebook's own, every error by its words."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from adlib import case_pages, cases, headlines, market
from adlib.evaluation import VERDICTS, Lift, user_level_lift, verdict
from adlib.preregistration import SampleRatioAlarm
from adlib.tables import TableError

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "12_case_studies.ipynb"


def notebook_code():
    made = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in made if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def written():
    """The names that the lesson writes out: the example's YAML and the scaling of traffic."""
    names = {"math": math, "z": 1.959963984540054}
    exec("from statistics import NormalDist", names)
    for start in ("EXAMPLE = ", "def traffic_needed("):
        exec(next(source for source in notebook_code() if source.startswith(start)), names)
    return names


@pytest.fixture(scope="module")
def shop_test():
    """A randomised test of the market: templates against the copywriters' ads, 120,000 impressions."""
    shop = market.Market(seed=3, n_users=6000, n_products=40)
    template = shop.products[["product_id"]].assign(headline="Shop now.", body=shop.products.title)
    return shop.run_test(template, shop.creatives.drop(columns="creative_id"), n=120_000, seed=1)


@pytest.fixture
def folder(tmp_path, written, shop_test):
    """A reader's folder as the lesson describes it: ten lines of YAML, one table."""
    (tmp_path / "case.yaml").write_text(written["EXAMPLE"], encoding="utf-8")
    shop_test.to_csv(tmp_path / "impressions.csv", index=False)
    return tmp_path


# -- an own case ----------------------------------------------------------------------------------------------------------


def test_ten_lines_and_a_folder_give_the_page(folder, written, shop_test):
    assert written["EXAMPLE"].count("\n") == 10
    case, rows = cases.read_own(folder / "case.yaml")
    table = cases.judge(case, cases.measure(case, rows))
    lift = user_level_lift(shop_test, "click")
    first = table.iloc[0]
    assert (first.found, first.low, first.high) == pytest.approx((lift.estimate, lift.low, lift.high))
    assert first.verdict == verdict(0.2, lift.low, lift.high)
    page = case_pages.page(case, table)
    at = [page.index(f"<h5>{heading}</h5>") for heading in case_pages.HEADINGS]
    assert at == sorted(at) and len(at) == 7
    assert "the supplier" in page and "one afternoon" in page and "<script" not in page


def test_the_lesson_prints_the_lines_that_it_runs(written):
    text = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    shown = next("".join(c["source"]) for c in text if "```yaml" in "".join(c["source"]))
    shown = shown.split("```yaml\n")[1].split("```")[0]
    assert shown.replace("scope: world", "scope: method") == written["EXAMPLE"]


def test_every_case_of_the_course_has_the_same_page():
    for name in cases.names():
        case = cases.built_in(name)
        assert all([case.background, case.plan, case.done, case.advantages]) and set(case.drawbacks) == set(
            cases.DRAWBACKS
        )
        found = {c.what: cases.Found(Lift(0.1, 0.02, 0.2, 0.01), 1000) for c in case.claims if c.metric}
        blank = {c.what: "left out here" for c in case.claims if not c.metric}
        table = cases.judge(dataclasses.replace(case, not_tested=blank), found)
        page = case_pages.page(case, table)
        assert [h for h in case_pages.HEADINGS if f"<h5>{h}</h5>" in page] == list(case_pages.HEADINGS)
        assert len(table) == len(case.claims) and "Not stated" not in page


def test_the_page_escapes_what_comes_from_a_reader():
    case = cases.Case("<b>x</b>", (cases.Claim("<i>clicks</i>", 0.2, "click"),), background="<script>alert(1)</script>")
    found = {"<i>clicks</i>": cases.Found(Lift(0.3, 0.25, 0.4, 0.001), 100)}
    page = case_pages.page(case, cases.judge(case, found), note="<u>")
    assert not any(tag in page for tag in ("<script", "<b>", "<i>", "<u>"))


# -- the numbers ----------------------------------------------------------------------------------------------------------


def test_sample_ratio_comes_before_any_lift(shop_test):
    case = cases.Case("test", (cases.Claim("clicks", 0.2, "click"),))
    users = shop_test.user_id.unique()
    broken = shop_test[~((shop_test.arm == "treatment") & shop_test.user_id.isin(users[:1500]))]
    with pytest.raises(SampleRatioAlarm, match=r"test: sample-ratio alarm \(p = .*find the fault, test again"):
        cases.measure(case, broken)
    uneven = dataclasses.replace(case, shares=broken.groupby("arm").user_id.nunique().to_dict())
    assert cases.measure(uneven, broken)["clicks"].lift == user_level_lift(broken, "click")


@given(st.floats(0.01, 2), st.floats(-0.5, 2), st.floats(0.01, 1), st.integers(100, 10**6))
def test_traffic_needed_is_the_notebooks(written, claim, estimate, error, n):
    log = math.log1p(estimate)
    lift = Lift(estimate, math.expm1(log - 1.959963984540054 * error), math.expm1(log + 1.959963984540054 * error), 0.5)
    ours = cases.traffic_needed(claim, lift, n)
    assert ours == pytest.approx(written["traffic_needed"](claim, lift, n), rel=1e-6)
    assert ours == pytest.approx(n * (2.8015852 * error / math.log1p(claim)) ** 2, rel=1e-6)


def test_paired_lift_covers_and_is_exact_in_a_small_case():
    lift = cases.paired_lift([2, 4, 6, 4], [1, 3, 2, 2])
    t, c = np.array([2, 4, 6, 4]) / 4, np.array([1, 3, 2, 2]) / 2
    half = 1.959963984540054 * math.sqrt(np.var(t - c, ddof=1) / 4)
    assert lift.estimate == pytest.approx(1.0)
    assert (lift.low, lift.high) == pytest.approx((2 * math.exp(-half) - 1, 2 * math.exp(half) - 1))
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        level = rng.gamma(4, 5, 300)
        found = cases.paired_lift(rng.poisson(1.1 * level), rng.poisson(level))
        inside += found.low <= 0.1 <= found.high
    assert 930 <= inside <= 970


def test_implied_lift_returns_the_p_value_it_came_from():
    lift = cases.implied_lift(0.067, 0.0296)
    assert lift.estimate == pytest.approx(0.067) and lift.p_value == pytest.approx(0.0296)
    assert 0 < lift.low < 0.067 < lift.high and verdict(0.067, lift.low, lift.high) == "directionally supported"
    assert cases.implied_lift(0.067, 0.05).low == pytest.approx(0, abs=1e-9)


def test_cost_by_hand():
    cost = case_pages.cost_per_thousand(
        36, 2000, watts=100, yuan_per_kwh=1, yuan_per_hour=2, reading_seconds=18, wage=50, unit="texts"
    )
    assert cost.seconds == 18 and cost.joules == pytest.approx(1800)
    assert cost.reading == pytest.approx(250) and cost.yuan == pytest.approx(0.0005 + 0.01 + 250)
    assert str(cost) == "per thousand texts: 18 s, 1,800 J, 250 yuan, 250 of them for the person who reads"


@given(st.lists(st.tuples(st.floats(0.01, 2), st.floats(-0.9, 3), st.floats(0, 3)), min_size=1, max_size=5))
def test_judge_says_what_the_rule_says(found):
    claims = tuple(cases.Claim(f"c{i}", claim) for i, (claim, *_) in enumerate(found))
    lifts = {f"c{i}": cases.Found(Lift(low + w / 2, low, low + w, 0.1), 10) for i, (_, low, w) in enumerate(found)}
    table = cases.judge(cases.Case("x", claims), lifts)
    assert table.verdict.tolist() == [verdict(c, low, low + w) for c, low, w in found]
    loss = [low + w < 0 for _, low, w in found]
    assert table.reason.tolist() == [
        cases.LOSS if bad else VERDICTS[v] for v, bad in zip(table.verdict, loss, strict=True)
    ]
    assert [v.endswith(", a loss") for v in case_pages.as_text(table)["verdict"]] == loss
    assert not table.traffic_needed.isna().any()


def test_a_loss_is_called_a_loss():
    case = cases.Case("x", (cases.Claim("a", 0.2), cases.Claim("b", 0.2)))
    found = {"a": cases.Found(Lift(-0.05, -0.08, -0.02, 0.001), 50), "b": cases.Found(Lift(-0.05, -0.1, 0.0, 0.05), 50)}
    table = cases.judge(case, found)
    assert (
        table.verdict.tolist() == ["refuted", "refuted"]
        and case_pages.as_text(table)["verdict"].iloc[0] == "refuted, a loss"
    )
    page = case_pages.page(case, table)
    assert page.count("the whole interval lies below zero: a loss") == 1 and page.count("refuted, a loss") == 1


def test_traffic_is_counted_an_arm_or_in_pairs():
    case, lift = cases.Case("x", (cases.Claim("a", 0.2), cases.Claim("b", 0.2))), Lift(0.1, -0.1, 0.3, 0.4)
    table = cases.judge(case, {"a": cases.Found(lift, 1000), "b": cases.Found(lift, 1000, "tests")})
    a, b = case_pages.as_text(table)["traffic needed"]
    assert a.endswith(" impressions an arm") and b.endswith(" tests") and a.split()[0] == b.split()[0]


def test_only_sound_tests_of_one_thing_are_kept(capsys):
    """Of seven tests that vary pictures, the lesson keeps the one that varies nothing else, in a week and with shares that are sound."""
    rows = [
        (f"t{test}", "h", "l", "e", pic, n, 10, 201401 + 50)
        for test in range(7)
        for pic, n in (("p", 1000), ("q", 1010))
    ]
    archive = pd.DataFrame(
        rows, columns=["test_id", "headline", "lede", "excerpt", "picture", "impressions", "clicks", "week"]
    )
    for place, (column, value) in {
        3: ("headline", "other"),
        5: ("lede", None),
        7: ("excerpt", "other"),
        9: ("impressions", 1300),
        11: ("week", headlines.TROUBLE[0]),
        12: ("picture", "q"),
    }.items():
        archive.loc[place, column] = value
    archive.loc[10, "week"] = headlines.TROUBLE[0]
    names = {"archive": archive, "headlines": headlines, "chi2": chi2}
    source = next(source for source in notebook_code() if source.startswith("archive = "))
    exec(source[source.index("def variants") :], names)
    kept = names["variants"]("picture", ["headline", "lede", "excerpt"])
    assert kept.test_id.tolist() == ["t0", "t0"] and kept.impressions.tolist() == [1000, 1010]
    said = capsys.readouterr().out
    assert "in 3 of 7 tests" in said and "1 of weeks in" in said and "1 more by sample ratio; kept: 1" in said


def test_what_was_not_tested_is_said_and_not_drawn():
    case = cases.Case("x", (cases.Claim("a", 0.2), cases.Claim("b", 0.2)), not_tested={"b": "no pictures here"})
    table = cases.judge(case, {"a": cases.Found(Lift(0.1, -0.1, 0.3, 0.4), 50, "tests")})
    assert table.verdict.tolist() == ["underpowered", "not tested"]
    text = case_pages.as_text(table)
    assert text["found"].tolist() == ["+10.0%", ""] and text["claim"].tolist() == ["a +20%", "b +20%"]
    assert text["speaks about"].tolist() == ["the world", "nothing"]
    assert "no pictures here" in case_pages.page(case, table)
    (ax,) = case_pages.forest(table).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["x: a (real people)"]
    assert ax.get_xlabel().startswith("relative lift")


# -- every error by its message --------------------------------------------------------------------------------------------

GOOD = "name: x\nclaims:\n  - {what: clicks, metric: click, claim: 0.2}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "backgruond: y\n", r"case.yaml: unknown key 'backgruond'; did you mean 'background'\? Known are name"),
        ("name: x\n", "case.yaml: claims missing"),
        ("claims: [{what: a, claim: 0.1}]\n", "case.yaml: name missing"),
        ("name: x\nclaims: []\n", "case.yaml: claims missing"),
        ("name: x\nclaims: clicks\n", "claims must be a list"),
        ("name: x\nclaims: [clicks]\n", "case.yaml, claim 1: expected 'key: value' lines, found str"),
        ("name: x\nclaims: [{what: a, metric: click}]\n", "case.yaml, claim 1: claim missing"),
        ("name: x\nclaims: [{what: a, claim: 20 %}]\n", r"claim must be a number between 0 and 5 .* got '20 %'"),
        ("name: x\nclaims: [{what: a, claim: 20}]\n", "claim must be a number between 0 and 5"),
        ("name: x\nclaims: [{what: a, claim: 0.2, metrik: click}]\n", "unknown key 'metrik'; did you mean 'metric'"),
        ("name: x\nclaims: [{what: a, claim: 0.2, scope: all}]\n", "scope 'all' is unknown; choose world or method"),
        (GOOD + "scope: everything\n", "scope 'everything' is unknown; choose world or method"),
        (GOOD + "drawbacks: {money: a lot}\n", "drawbacks 'money' is unknown; choose privacy or cost or feedback"),
        (GOOD + "plan: [\n", "case.yaml, line 5: this is not YAML"),
        ("- a\n- b\n", "expected 'key: value' lines, found list"),
    ],
)
def test_errors_of_the_yaml(tmp_path, text, message):
    path = tmp_path / "case.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        cases.read_case(path)


def test_a_file_or_a_table_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file case.yaml"):
        cases.read_own(tmp_path / "case.yaml")
    (tmp_path / "case.yaml").write_text(GOOD, encoding="utf-8")
    with pytest.raises(TableError, match="holds no table impressions"):
        cases.read_own(tmp_path / "case.yaml")
    with pytest.raises(ValueError, match="there is no case 'platform_c'; the course has platform_a, platform_b"):
        cases.built_in("platform_c")


def small(**columns):
    users = [f"u{i}" for i in range(40)]
    frame = {"user_id": users, "arm": ["control", "treatment"] * 20, "click": [1, 0, 0, 1] * 10}
    return pd.DataFrame(frame | columns)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (small().drop(columns="arm"), "x: impressions need a column arm that says control or treatment"),
        (small().drop(columns="click"), "x: unknown metric 'click'; impressions have user_id, arm"),
        (small(arm="control"), r"x: one arm only \(control\)"),
        (small(arm=["a", "b"] * 20), "arms differ"),
        (small(arm=["control", None] * 20), "column 'arm' has 20 missing values"),
        (small(click=[1, 0] * 20), "zero clicks in the treatment arm"),
        (
            small(user_id=[f"u{i}" for i in range(20)] * 2).assign(arm=["control"] * 20 + ["treatment"] * 20),
            "20 users are in both arms",
        ),
        (small(click=list("yn") * 20), "metric 'click' is not numeric"),
    ],
)
def test_errors_of_the_rows(rows, message):
    case = cases.Case("x", (cases.Claim("clicks", 0.2, "click"),))
    with pytest.raises(ValueError, match=message):
        cases.measure(case, rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cases.judge(cases.Case("x", (cases.Claim("a", 0.2),)), {}),
            "x: 'a' was not measured; measure it, or say why",
        ),
        (lambda: cases.paired_lift([1], [1]), "the same two or more units"),
        (lambda: cases.paired_lift([1, 2], [1, 2, 3]), "the same two or more units"),
        (lambda: cases.paired_lift([0, 0], [1, 2]), "a mean above zero in both arms"),
        (lambda: cases.paired_lift([1, 2], [1, 2]), "without variation there is no interval"),
        (lambda: cases.implied_lift(0.067, 0), "a p-value between 0 and 1"),
        (lambda: cases.implied_lift(0, 0.03), "a lift above -1 that is not 0"),
        (lambda: cases.traffic_needed(0, Lift(0, -0.1, 0.1, 1), 10), "a claim above 0"),
        (lambda: case_pages.cost_per_thousand(1, 0), "ads above 0 and nothing negative"),
        (lambda: case_pages.cost_per_thousand(-1, 5), "ads above 0 and nothing negative"),
        (lambda: case_pages.forest(pd.DataFrame({"found": [math.nan]})), "nothing to draw"),
    ],
)
def test_errors_of_the_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_four_columns_are_enough(folder, shop_test):
    (folder / "case.yaml").write_text(GOOD, encoding="utf-8")
    shop_test[["timestamp", "user_id", "click", "arm"]].to_csv(folder / "impressions.csv", index=False)
    case, rows = cases.read_own(folder / "case.yaml")
    table = cases.judge(case, cases.measure(case, rows))
    assert table.speaks_about.tolist() == [cases.SCOPES["world"]]
    page = case_pages.page(case, table)
    assert page.count("Not stated.") == 3 and page.count("not stated.") == 3  # what nobody wrote is said to be missing


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"claim": 20}, r"claim must lie between 0 and 5 \(0.20 is \+20 %\), got 20"),
        ({"treatment_share": 1.0}, "treatment_share must lie between 0 and 1, got 1.0"),
        ({"test_size": 5000}, "test_size is 5000: below 100,000 impressions an arm may have no order"),
    ],
)
def test_errors_of_the_lessons_parameters(values, message):
    cell = next(source for source in notebook_code() if source.startswith("if not 0 < claim"))
    good = {"claim": 0.2, "treatment_share": 0.5, "test_size": 600_000}
    exec(cell, dict(good))
    with pytest.raises(ValueError, match=message):
        exec(cell, good | values)
