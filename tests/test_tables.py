"""The six tables: schemas, reading, errors by message, cleaning, writing, data cards."""

import gzip
import pickle
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings

from adlib import schemas, tables
from adlib.tables import CLEANING_RULES, SCHEMAS, TableError

START = pd.Timestamp("2025-03-01", tz="UTC")


def shop(n=400, seed=0):
    """A small clean shop: users, products, creatives, events, reviews, impressions."""
    rng = np.random.default_rng(seed)
    when = START + pd.to_timedelta(np.sort(rng.integers(0, 30 * 86_400, n)), unit="s")
    user, product = [np.char.add(letter, rng.integers(0, 20, n).astype(str)) for letter in "up"]
    event = rng.choice(["view", "favourite", "purchase"], n)
    raw = {
        "users": pd.DataFrame({"user_id": [f"u{i}" for i in range(20)], "signup_date": "2025-01-05", "region": "华东"}),
        "products": pd.DataFrame({"product_id": [f"p{i}" for i in range(20)], "title": "Wool coat", "price": 399.0}),
        "creatives": pd.DataFrame(
            {"creative_id": [f"c{i}" for i in range(20)], "headline": "轻便保暖", "product_id": "p1"}
        ),
        "events": pd.DataFrame(
            {
                "user_id": user,
                "product_id": product,
                "event": event,
                "timestamp": when,
                "amount": np.where(event == "purchase", rng.lognormal(5, 0.5, n).round(2), np.nan),
            }
        ),
        "reviews": pd.DataFrame(
            {"user_id": user[:20], "product_id": "p2", "rating": 4, "text": '又轻又暖, "great"\n好'}
        ),
        "impressions": pd.DataFrame(
            {
                "impression_id": [f"i{i}" for i in range(n)],
                "timestamp": when,
                "user_id": user,
                "creative_id": np.char.replace(product, "p", "c"),
                "position": rng.integers(1, 4, n),
                "propensity": 0.05,
                "click": rng.integers(0, 2, n),
            }
        ),
    }
    return {name: tables.validate(name, frame) for name, frame in raw.items()}


def put(folder, name, text, encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return folder


letters = st.characters(codec="utf-8", exclude_characters="\0")
EVENTS = "user_id,event,timestamp\nu1,view,2025-03-01T10:00:00Z\n"


def message(excinfo):
    error = excinfo.value
    assert "\n" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # crosses a process boundary unchanged
    return str(error)


# --- schemas and validation -------------------------------------------------------------------------------------------


def test_import_is_light():
    code = "import sys, adlib.tables; print([m for m in ('torch', 'matplotlib', 'sklearn', 'scipy', 'yaml') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_validated_tables_pass_their_pandera_models():
    for name, frame in shop().items():
        SCHEMAS[name].validate(frame)


def test_every_column_is_described():
    for model in SCHEMAS.values():
        assert model.__doc__ and all(column.description for column in model.to_schema().columns.values())


def test_types_are_parsed_and_further_columns_kept():
    frame = pd.DataFrame(
        {
            "user_id": [17.0, np.nan, 18.0],
            "timestamp": ["2025-03-01", "2025-03-01T10:00:00+08:00", "2025-03-01 10:00:00.25"],
            "text": ["好", "b", "c"],
            "rating": ["1", "", "4.5"],
            "mood": [1, 2, 3],
        }
    )
    got = tables.validate("reviews", frame)
    assert got["user_id"].tolist()[::2] == ["17", "18"] and got["user_id"].isna()[1]
    assert got["timestamp"].tolist() == [
        START,
        START + pd.Timedelta("2h"),
        START + pd.Timedelta("10h") + pd.Timedelta("250ms"),
    ]
    assert str(got["timestamp"].dtype) == "datetime64[us, UTC]"
    assert got["rating"].isna().tolist() == [False, True, False] and got["mood"].tolist() == [1, 2, 3]
    assert frame["user_id"].dtype == "float64", "the argument is not changed"


def test_flags_may_be_booleans_in_words():
    frame = pd.DataFrame({"timestamp": ["2025-03-01"] * 2, "user_id": ["a", "b"], "click": ["True", "false"]})
    assert tables.validate("impressions", frame)["click"].tolist() == [1, 0]


IMPRESSION = {"timestamp": "2025-03-01", "user_id": "u1", "click": 0}
EVENT = {"user_id": "u1", "event": "view", "timestamp": "2025-03-01"}


@pytest.mark.parametrize(
    ("table", "row", "column", "says"),
    [
        ("events", EVENT | {"amount": "1,299.00"}, "amount", "not a number"),
        ("events", EVENT | {"amount": "¥12.5"}, "amount", "no currency sign"),
        ("events", EVENT | {"amount": "inf"}, "amount", "not a number"),
        ("events", EVENT | {"amount": -4}, "amount", "must be at least 0"),
        ("events", EVENT | {"event": "ansehen"}, "event", "must be one of view, favourite, cart, purchase"),
        ("events", EVENT | {"event": "ansehen"}, "event", "`events: {values: {event: {your_word: view}}}`"),
        ("events", EVENT | {"user_id": None}, "user_id", "must not be empty"),
        ("events", EVENT | {"timestamp": "31.12.2024"}, "timestamp", "not a time"),
        ("events", EVENT | {"timestamp": "now"}, "timestamp", "not a time"),
        ("events", EVENT | {"timestamp": 1735689600}, "timestamp", "turn seconds into times"),
        ("reviews", {"text": "fine", "rating": 6}, "rating", "must be at most 5"),
        ("impressions", IMPRESSION | {"click": 2}, "click", "must be one of 0, 1"),
        ("impressions", IMPRESSION | {"click": 0.5}, "click", "not a whole number"),
        ("impressions", IMPRESSION | {"click": None}, "click", "must not be empty"),
        ("impressions", IMPRESSION | {"position": 0}, "position", "must be at least 1"),
        ("impressions", IMPRESSION | {"propensity": 0}, "propensity", "must be above 0"),
        ("impressions", IMPRESSION | {"propensity": 1.2}, "propensity", "must be at most 1"),
        ("impressions", IMPRESSION | {"cost": -1}, "cost", "must be at least 0"),
    ],
)
def test_a_bad_cell_is_named(table, row, column, says):
    good = {"events": EVENT, "reviews": {"text": "x"}, "impressions": IMPRESSION}[table]
    frame = pd.DataFrame([good | {column: good.get(column, 1)}, row], dtype=object)
    with pytest.raises(TableError) as excinfo:
        tables.validate(table, frame, source="my file")
    error = excinfo.value
    assert says in message(excinfo) and message(excinfo).startswith(f'my file, column "{column}":')
    assert (error.table, error.source, error.column, error.rows) == (table, "my file", column, [3])
    assert error.rule and error.advice and error.advice in str(error)


def test_the_first_five_bad_rows_and_their_number_are_named():
    frame = pd.DataFrame({"user_id": "u", "event": "view", "timestamp": "2025-03-01", "amount": [1.0] + [-2.0] * 7})
    with pytest.raises(TableError, match=r"Rows 3, 4, 5, 6, 7 \(7 in all; the header is row 1\): '-2.0'\. ") as excinfo:
        tables.validate("events", frame)
    assert excinfo.value.rows == [3, 4, 5, 6, 7] and "table events" in message(excinfo)


def test_repeated_keys_are_refused():
    with pytest.raises(TableError, match=r"user_id.*must differ from row to row.*Row 3"):
        tables.validate("users", pd.DataFrame({"user_id": ["a", "a"]}))


def test_a_missing_column_is_named_with_the_nearest():
    with pytest.raises(TableError, match=r'needed, but missing\. Did you mean "UserID"\?') as excinfo:
        tables.validate("users", pd.DataFrame({"UserID": ["a"]}))
    assert "columns.yaml: `users: {columns: {your_name: user_id}}`" in message(excinfo)


def test_two_columns_of_one_name_are_refused():
    with pytest.raises(TableError, match="two columns have this name"):
        tables.validate("users", pd.DataFrame([["a", "b"]], columns=["user_id", "user_id"]))


def test_an_unknown_table_is_named_with_the_nearest():
    with pytest.raises(TableError, match=r'no table "event"\. Did you mean "events"\? The tables are users, products'):
        tables.validate("event", pd.DataFrame())


def test_an_id_that_points_nowhere_is_refused():
    made = shop()
    made["events"].loc[3, "product_id"] = "p999"
    with pytest.raises(
        TableError, match=r"points to a row that is not in products.*Row 5.*'p999'.*leave that table out"
    ):
        tables.check_references(made)
    tables.check_references({"events": made["events"]})  # nothing to point to: nothing to refuse


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_encodings_and_separators(tmp_path, encoding, mark):
    text = f'product_id{mark}title{mark}price\n007{mark}"羊毛, 大衣; ¥"{mark}12.5\n'
    made = tables.read_tables(put(tmp_path, "products.csv", text, encoding))["products"]
    assert made.iloc[0].tolist() == ["007", "羊毛, 大衣; ¥", 12.5]


def test_gz_and_upper_case_names(tmp_path):
    (tmp_path / "Events.CSV.gz").write_bytes(gzip.compress(EVENTS.encode()))
    assert tables.read_tables(tmp_path)["events"]["user_id"].tolist() == ["u1"]


def test_only(tmp_path):
    put(put(tmp_path, "events.csv", EVENTS), "users.csv", "user_id\nu1\n")
    assert list(tables.read_tables(tmp_path, only=["events"])) == ["events"]
    assert list(tables.read_tables(tmp_path, only="events")) == ["events"]
    with pytest.raises(TableError, match=r"holds no table reviews\. It holds events.csv, users.csv"):
        tables.read_tables(tmp_path, only=["reviews"])
    with pytest.raises(TableError, match='Did you mean "reviews"'):
        tables.read_tables(tmp_path, only=["review"])


def test_columns_yaml(tmp_path):
    put(tmp_path, "klicks.csv", "Kunde;Aktion;Zeit;Betrag\n007;ansehen;2025-03-01;\n8;no;2025-03-02;5.5\n")
    put(
        tmp_path,
        "columns.yaml",
        "events:\n  file: klicks.csv\n  columns: {Kunde: user_id, Aktion: event, Zeit: timestamp, Betrag: amount}\n"
        "  values: {event: {ansehen: view, no: purchase}}\n",
    )
    made = tables.read_tables(tmp_path)["events"]
    assert made["user_id"].tolist() == ["007", "8"] and made["event"].tolist() == ["view", "purchase"]
    assert made["amount"].tolist()[1] == 5.5


def test_columns_yaml_maps_numbers_too(tmp_path):
    for form in ("csv", "parquet"):
        frame = pd.DataFrame({"timestamp": ["2025-03-01"] * 3, "user_id": ["a", "b", "c"], "click": [1, 2, 2]})
        folder = tmp_path / form
        tables.write({"impressions": frame}, folder, form)
        put(folder, "columns.yaml", "impressions: {values: {click: {2: 0}}}")
        assert tables.read_tables(folder)["impressions"]["click"].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("events: [", "columns.yaml: not valid YAML"),
        ("- events", 'the entry "" has not the expected form'),
        ("events: {columns: user_id}", 'the entry "events" has not the expected form'),
        ("event: {}", 'there is no table "event". Did you mean "events"?'),
        ("events: {colums: {}}", '"colums" is not known under events. Did you mean "columns"?'),
        ("events: {columns: {user_id: userid}}", '"userid" is not known under events. Did you mean "user_id"?'),
        ("events: {values: {evnt: {a: view}}}", '"evnt" is not known under events. Did you mean "event"?'),
        ("events: {values: {event: view}}", '"event" is not known under events'),
        ("events: {columns: {user: user_id}}", 'column "user": columns.yaml names this column, but the file has none.'),
        ("events: {columns: {event: user_id}}", "two columns have this name"),
        (
            "events: {file: klicks.csv}",
            'names the file "klicks.csv", which is not there. It holds columns.yaml, events.csv',
        ),
    ],
)
def test_columns_yaml_errors(tmp_path, text, says):
    put(put(tmp_path, "events.csv", EVENTS), "columns.yaml", text)
    with pytest.raises(TableError) as excinfo:
        tables.read_tables(tmp_path)
    assert says in message(excinfo) and excinfo.value.advice


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("events.csv", "", "events.csv: is empty."),
        ("events.csv", b"\xef\xbb\xbf\n\n", "events.csv: is empty."),
        ("events.csv", "user_id,event,timestamp\n", "is empty: it has a header but no rows"),
        ("events.csv", "user_id,event\nu1,view\n", 'events.csv, column "timestamp": needed, but missing.'),
        ("events.csv", EVENTS + "u2,view\n", "events.csv: cannot be read: CSV parse error: Expected 3 columns, got 2"),
        (
            "events.csv",
            EVENTS.encode() + b"M\xfcller,view,2025-03-01\n",
            "broken encoding: row 3 (the header is row 1)",
        ),
        ("events.csv", EVENTS.encode() + b"\xff\xff\xff,view,2025-03-01\n", "neither UTF-8 nor GB18030"),
        ("events.csv", EVENTS.encode("utf-16"), "broken encoding"),
        ("events.csv", EVENTS.encode("utf-16-le"), "broken encoding: zero bytes"),
        (
            "events.csv",
            EVENTS + "u2,view,tomorrow\n",
            'events.csv, column "timestamp": not a time. Row 3 (the header is row 1)',
        ),
        ("events.csv.gz", b"no gzip", "events.csv.gz: cannot be read"),
        ("events.csv.gz", gzip.compress(EVENTS.encode(), mtime=0)[:-9], "events.csv.gz: cannot be read"),
        ("events.parquet", b"PAR1 is not enough", "events.parquet: cannot be read"),
        ("notes.txt", "hello", "holds none of the tables. It holds notes.txt. Name files users, products"),
    ],
)
def test_unusable_files(tmp_path, name, content, says):
    with pytest.raises(TableError) as excinfo:
        tables.read_tables(put(tmp_path, name, content))
    assert says in message(excinfo) and excinfo.value.advice


def test_unusable_folders(tmp_path):
    with pytest.raises(TableError, match=r"shop: there is no such folder\. Check the path"):
        tables.read_tables(tmp_path / "shop")
    with pytest.raises(TableError, match=r"holds none of the tables. It is empty"):
        tables.read_tables(tmp_path)
    put(put(tmp_path, "events.csv", EVENTS), "events.parquet", "")
    with pytest.raises(TableError, match=r"more than one file for events: events\.csv, events\.parquet\. Keep one"):
        tables.read_tables(tmp_path)


def test_references_are_checked_across_files(tmp_path):
    put(put(tmp_path, "events.csv", EVENTS), "users.csv", "user_id\nu2\n")
    with pytest.raises(TableError, match=r'events.csv, column "user_id": points to a row that is not in users'):
        tables.read_tables(tmp_path)
    assert len(tables.read_tables(tmp_path, check=False)["events"]) == 1


def test_without_check_unreadable_columns_stay_as_they_came(tmp_path):
    put(tmp_path, "events.csv", "user_id,event,timestamp,amount\nu1,view,2025-03-01,¥5\nu2,view,2025-03-01,6\n")
    made = tables.read_tables(tmp_path, check=False)["events"]
    assert made["amount"].tolist() == ["¥5", "6"] and str(made["timestamp"].dtype) == "datetime64[us, UTC]"


@given(
    st.binary(max_size=60),
    st.integers(0, len(EVENTS)),
    st.sampled_from(["events.csv", "events.csv.gz", "events.parquet"]),
)
@settings(max_examples=80, deadline=None)
def test_a_spoilt_file_is_read_or_refused_in_words(tmp_path_factory, junk, place, name):
    folder = tmp_path_factory.mktemp("shop")
    put(folder, name, EVENTS.encode()[:place] + junk + EVENTS.encode()[place:])
    for check in (True, False):
        try:
            assert len(tables.read_tables(folder, check=check)["events"])
        except TableError as error:
            assert error.advice and "events" in str(error)


@given(
    st.text(letters, max_size=40)
    | st.sampled_from(["1", "events:", "events: {file: [a]}", "events: {values: {event: {view: }}}"])
)
@settings(max_examples=60, deadline=None)
def test_a_spoilt_columns_yaml_is_read_or_refused_in_words(tmp_path_factory, text):
    folder = put(put(tmp_path_factory.mktemp("shop"), "events.csv", EVENTS), "columns.yaml", text)
    try:
        tables.read_tables(folder)
    except TableError as error:
        assert error.advice


# --- writing ----------------------------------------------------------------------------------------------------------

ids = st.text(letters, min_size=1, max_size=8).map(str.strip).filter(lambda s: s and s not in schemas.NO_VALUE)
texts = st.text(letters, min_size=1, max_size=20)
times = st.datetimes(pd.Timestamp("1996-01-01"), pd.Timestamp("2100-01-01")).map(lambda t: pd.Timestamp(t, tz="UTC"))
amounts = st.none() | st.floats(0, 1e12)


@st.composite
def written(draw):
    review = st.tuples(st.none() | ids, st.none() | st.floats(1, 5), texts, st.none() | times)
    event = st.tuples(ids, st.none() | ids, st.sampled_from(["view", "favourite", "cart", "purchase"]), times, amounts)
    reviews = draw(st.lists(review, min_size=1, max_size=5))
    events = draw(st.lists(event, min_size=1, max_size=5))
    return {
        "reviews": pd.DataFrame(reviews, columns=["user_id", "rating", "text", "timestamp"]),
        "events": pd.DataFrame(events, columns=["user_id", "product_id", "event", "timestamp", "amount"]),
    }


@given(written(), st.sampled_from(["csv", "csv.gz", "parquet"]))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, raw, form):
    made = {name: tables.validate(name, frame) for name, frame in raw.items()}
    folder = tmp_path_factory.mktemp("shop")
    paths = tables.write(made, folder, form)
    assert [path.name for path in paths] == [f"reviews.{form}", f"events.{form}"]
    for name, frame in tables.read_tables(folder).items():
        pd.testing.assert_frame_equal(frame, made[name])


@pytest.mark.parametrize("form", ["csv", "csv.gz", "parquet"])
def test_the_whole_shop_is_read_back_and_written_alike(tmp_path, form):
    made = shop()
    first, second = tables.write(made, tmp_path / "a", form), tables.write(made, tmp_path / "b", form)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    again = tables.read_tables(tmp_path / "a")
    assert list(again) == list(SCHEMAS)
    for name, frame in again.items():
        pd.testing.assert_frame_equal(frame, made[name])


def test_dates_are_written_short(tmp_path):
    tables.write(shop(), tmp_path)
    assert "u0,2025-01-05,华东" in (tmp_path / "users.csv").read_text(encoding="utf-8")
    assert (tmp_path / "events.csv").read_text().splitlines()[1].count("Z") == 1


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    tables.write(shop(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("os.replace", lambda part, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tables.write(shop(seed=1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_write_refuses_unknown_names_and_formats(tmp_path):
    with pytest.raises(TableError, match='Did you mean "users"'):
        tables.write({"user": pd.DataFrame()}, tmp_path)
    with pytest.raises(ValueError, match='not "xlsx"'):
        tables.write({}, tmp_path, "xlsx")


# --- cleaning ---------------------------------------------------------------------------------------------------------


def reasons(cleaned, table):
    return cleaned.set_aside[table]["reason"].to_dict()


def test_a_clean_shop_stays_whole():
    made = shop()
    cleaned = tables.clean(made)
    assert cleaned.report["rows"].sum() == 0 and set(cleaned.report["rule"]) == set(CLEANING_RULES)
    for name, frame in cleaned.tables.items():
        pd.testing.assert_frame_equal(frame, made[name])


def test_every_rule_sets_aside_what_it_describes():
    made = shop()
    log = made["events"].astype({"timestamp": object, "amount": object})
    when = log["timestamp"].tolist()
    log.loc[10, "user_id"] = None
    log.loc[11, "timestamp"] = "soon"
    log.loc[12, "timestamp"] = pd.Timestamp("1970-01-01", tz="UTC")
    log.loc[13, "timestamp"] = pd.Timestamp("2024-12-31", tz="UTC")  # before the shopper signed up
    log.loc[14, "timestamp"] = pd.Timestamp("2035-01-01", tz="UTC")
    log.loc[15, "amount"] = -5
    log.loc[16, "amount"] = "¥5"
    log.loc[17, "event"] = "stare"
    log.loc[18, "amount"] = 5e7
    log.loc[19, "product_id"] = "p999"
    log.loc[400] = log.loc[20]
    robot = log.iloc[30:60].assign(user_id="u0", timestamp=[when[50] + pd.Timedelta(seconds=2 * i) for i in range(30)])
    robot["amount"], robot["event"] = None, "view"
    log = pd.concat([log[log["user_id"] != "u0"], robot.set_axis(range(500, 530))])
    cleaned = tables.clean(made | {"events": log})
    expected = {10: "missing_value", 400: "duplicate_row", 18: "outlier", 19: "unknown_id"}
    expected |= dict.fromkeys([11, 12, 13, 14], "impossible_time") | dict.fromkeys([15, 16, 17], "impossible_value")
    expected |= dict.fromkeys(range(500, 530), "bot")
    assert reasons(cleaned, "events") == {label: rule for label, rule in expected.items() if label in log.index}
    assert set(reasons(cleaned, "impressions").values()) == {"bot"}, "all rows of the account go, in both logs"
    tables.check_references({n: tables.validate(n, f) for n, f in cleaned.tables.items()})
    report = cleaned.report.set_index(["rule", "table", "column"])
    assert report.loc[("impossible_value", "events", "amount"), "rows"] == 2
    assert report.loc[("impossible_value", "events", "amount"), "share"] == 2 / len(log)


def test_two_tables_are_enough():
    made = {name: frame for name, frame in shop().items() if name in ("events", "impressions")}
    made["impressions"].loc[5, "propensity"] = 1.5
    cleaned = tables.clean(made)
    assert reasons(cleaned, "impressions") == {5: "impossible_value"} and len(cleaned.tables["impressions"]) == 399


def test_rows_that_point_to_rows_set_aside_go_too():
    made = shop()
    made["products"].loc[1, "price"] = -1
    cleaned = tables.clean(made)
    assert reasons(cleaned, "creatives") == dict.fromkeys(range(20), "unknown_id")
    assert "product_id set aside in products" in set(cleaned.report["column"])


def test_rules_can_be_chosen_and_switched_off():
    made = shop()
    made["events"].loc[3, "amount"] = -1
    assert tables.clean(made, rules=["duplicate_row"]).report["rows"].sum() == 0
    off = tables.clean(made, rules=[])
    assert len(off.report) == 0 and len(off.tables["events"]) == 400 and len(off.set_aside["events"]) == 0
    with pytest.raises(ValueError, match=r'no cleaning rule "bots".* Did you mean "bot"'):
        tables.clean(made, rules=["bots"])


def test_many_wrong_dates_do_not_move_the_end_of_the_log():
    made = {"events": shop()["events"]}
    made["events"].loc[:6, "timestamp"] = pd.Timestamp("2026-07-01", tz="UTC")  # 1.75 % of the rows
    assert len(tables.clean(made).set_aside["events"]) == 7


def test_a_page_of_simultaneous_impressions_is_no_robot():
    frame = pd.DataFrame({"timestamp": ["2025-03-01"] * 30, "user_id": "a", "click": 0, "position": range(1, 31)})
    assert len(tables.clean({"impressions": frame}).tables["impressions"]) == 30


def test_one_price_is_no_outlier():
    frame = shop()["events"].assign(amount=9.9)
    frame.loc[0, "amount"] = 10.5
    assert len(tables.clean({"events": frame}).tables["events"]) == 400


def test_a_column_that_means_something_else_is_no_dirt():
    made = {"events": shop()["events"].assign(event="ansehen")}
    with pytest.raises(TableError, match='column "event": breaks the rule impossible_value in over half of the rows'):
        tables.clean(made)
    made = {"users": pd.DataFrame({"user_id": ["u0.0"]}), "events": shop()["events"]}
    with pytest.raises(TableError, match='column "user_id": breaks the rule unknown_id in over half'):
        tables.clean(made)
    with pytest.raises(TableError, match="needed, but missing"):
        tables.clean({"events": made["events"].drop(columns="user_id")})


dirty_cells = {
    "user_id": st.sampled_from(["a", "b", "", None, "zz", 3]),
    "product_id": st.sampled_from(["p", None, "ghost"]),
    "event": st.sampled_from(["view", "purchase", "stare", None]),
    "timestamp": st.sampled_from(["2025-03-01", "2025-03-02T10:00:00Z", "1970-01-01", "2999-01-01", "soon", None]),
    "amount": st.sampled_from([None, 5, 1e9, -3, "¥5", float("inf")]),
}
dirty_events = st.lists(st.fixed_dictionaries(dirty_cells), max_size=18)


@given(dirty_events, st.booleans(), st.lists(st.sampled_from(list(CLEANING_RULES)), unique=True))
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost_and_what_is_kept_is_valid(rows, with_users, rules):
    events = pd.DataFrame(rows, columns=list(dirty_cells), dtype=object)
    made = {"events": events}
    if with_users:
        users = pd.DataFrame(
            {"user_id": ["a", "b", "b", None], "signup_date": ["2025-03-02", None, "2025-01-01", None]}
        )
        made["users"] = users
    for chosen in (None, rules):
        cleaned = tables.clean(made, rules=chosen)
        for name, frame in made.items():
            kept, aside = cleaned.tables[name], cleaned.set_aside[name]
            assert sorted([*kept.index, *aside.index]) == list(frame.index)
            pd.testing.assert_frame_equal(aside.drop(columns="reason"), frame.loc[aside.index])
            assert set(aside["reason"]) <= set(CLEANING_RULES if chosen is None else chosen)
            counted = cleaned.report.loc[cleaned.report["table"] == name, "rows"].sum()
            assert counted == len(aside)
    whole = tables.clean(made).tables
    tables.check_references({name: tables.validate(name, frame) for name, frame in whole.items()})


def test_write_set_aside(tmp_path):
    made = shop()
    made["events"].loc[3, "amount"] = -1
    paths = tables.write_set_aside(tables.clean(made), tmp_path / "aside")
    assert [path.name for path in paths] == ["set_aside_events.csv", "cleaning_report.csv"]
    assert pd.read_csv(paths[0])["reason"].tolist() == ["impossible_value"]
    assert pd.read_csv(paths[1])["rows"].sum() == 1


# --- cards and the two-table example ----------------------------------------------------------------------------------


def test_data_cards_are_up_to_date(tmp_path):
    readme = Path(__file__).parents[1] / "data" / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert f"<!-- tables -->\n{tables.data_cards()}\n<!-- /tables -->" in text, (
        "run adlib.tables.write_cards('data/README.md')"
    )
    copy = tmp_path / "README.md"
    copy.write_text("before\n<!-- tables --><!-- /tables -->\nafter", encoding="utf-8")
    tables.write_cards(copy)
    assert (
        copy.read_text(encoding="utf-8") == f"before\n<!-- tables -->\n{tables.data_cards()}\n<!-- /tables -->\nafter"
    )
    with pytest.raises(ValueError, match="has no lines <!-- tables -->"):
        tables.write_cards(put(tmp_path, "plain.md", "nothing") / "plain.md")


def test_cards_carry_units():
    cards = tables.data_cards()
    assert "price in yuan" in cards and "paid, in yuan" in cards and "when (UTC)" in cards


def test_article_table():
    made = shop()
    table = tables.article_table(made)
    assert list(table) == ["user_id", "v1", "v2", "v3", "y"] and table["user_id"].is_unique
    one = table.iloc[4]
    events = made["events"][made["events"]["user_id"] == one["user_id"]]["event"]
    assert [(events == kind).sum() for kind in ("view", "purchase", "favourite")] == [one["v1"], one["v2"], one["v3"]]
    assert set(table["y"]) <= {0, 1}
    with pytest.raises(TableError, match="needs the table impressions"):
        tables.article_table({"events": made["events"]})
