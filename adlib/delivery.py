"""The decision loop of an ad server: score, cap, pace, choose, log. Its state lives in one SQLite file and survives a kill.

Every decision is one transaction, so counters and log cannot disagree; a repeated request gets the recorded answer and is not counted
again. Taught in notebooks/08_ad_serving.ipynb, section 6.
"""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from adlib import pacing, serving

DAY = 86_400  # seconds
VERSION = 8
SCHEMA = """
CREATE TABLE IF NOT EXISTS decision (request TEXT PRIMARY KEY, time REAL NOT NULL, user TEXT NOT NULL, ad INTEGER NOT NULL,
    reason TEXT NOT NULL, p REAL, cost INTEGER NOT NULL, click INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS showing (user TEXT, ad INTEGER, n INTEGER NOT NULL, clicks INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (user, ad)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS profile (user TEXT PRIMARY KEY, shown INTEGER NOT NULL, clicks INTEGER NOT NULL, last REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spending (day INTEGER PRIMARY KEY, micro INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS clock (id INTEGER PRIMARY KEY CHECK (id = 1), last REAL NOT NULL);
"""


@dataclass(frozen=True)
class Visit:
    """What a predict function sees: the visitor's `context` as given, ads (k,), earlier showings and clicks of each (k,), and totals."""

    user: str
    time: float
    context: dict
    ads: np.ndarray
    shown: np.ndarray
    clicked: np.ndarray
    total_shown: int
    total_clicks: int


@dataclass(frozen=True)
class Decision:
    """The ad shown (-1: none), why ("served", "capped", "paced", "budget" or "worthless"), its click probability and cost in yuan."""

    request: str
    ad: int
    reason: str
    p: float
    cost: float
    repeated: bool = False


class DecisionLoop:
    """Decides request by request which ad a visitor sees, within a frequency cap and a day's budget.

    Parameters
    ----------
    path : the SQLite file; made if missing, continued if there.
    predict : function from a `Visit` to click probabilities (k,); any model of yours.
    budget : yuan a day (UTC). cost : yuan an impression. click_value : yuan a click is worth. cap : showings of one ad to one person.
    traffic : (24,) usual traffic by hour; spending follows it. None: as fast as it comes.
    sync : True waits for the disk at each commit, which also survives a power cut; False survives a killed process.
    tolerance : seconds that clocks may disagree.

    Raises
    ------
    ValueError : a budget of zero, negative prices, a cap below 1, a file that is no decision log; while running, an empty candidate
    set, scores that are not finite probabilities, a clock that goes backwards, a click on what was never shown.
    """

    def __init__(
        self,
        path,
        predict: Callable[[Visit], np.ndarray],
        *,
        budget: float,
        cost: float = 0.01,
        click_value: float = 1.0,
        cap: int = 3,
        traffic: Sequence[float] | None = None,
        sync: bool = False,
        tolerance: float = 1.0,
    ):
        if cost < 0 or click_value < 0:
            raise ValueError(f"negative prices: cost {cost} and click_value {click_value} must be 0 yuan or more")
        serving.under_cap([0], cap)
        self.predict, self.budget, self.cap, self.tolerance = predict, pacing.check_budget(budget), cap, tolerance
        self.click_value, self.cost, self._micro = click_value, cost, round(cost * 1e6)
        self.plan = None if traffic is None else pacing.spending_plan(traffic)
        self._db = sqlite3.connect(Path(path), isolation_level=None, timeout=30)
        try:
            if self._db.execute("PRAGMA user_version").fetchone()[0] not in (0, VERSION):
                raise sqlite3.DatabaseError("written by another program")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA synchronous = {'FULL' if sync else 'NORMAL'}")
            self._db.executescript(SCHEMA)
            self._db.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(f"{Path(path).name} is no decision log ({error}): name another file or move it") from None

    def decide(self, request: str, user: str, time: float, ads, context: dict | None = None) -> Decision:
        """Choose, log and count one impression; `time` in seconds since 1970 (UTC), `ads` whole numbers (k,), `request` a unique id."""
        ads = np.asarray(ads)
        with self._transaction() as db:
            old = db.execute("SELECT ad, reason, p, cost FROM decision WHERE request = ?", (request,)).fetchone()
            if old:
                return Decision(request, old[0], old[1], old[2], old[3] / 1e6, repeated=True)
            self._check_clock(db, time)
            visit = self._visit(db, user, time, ads, context or {})
            p = np.asarray(self.predict(visit), float)
            if p.shape != ads.shape:
                raise ValueError(
                    f"predict returned shape {p.shape} for {len(ads)} candidates: give one probability each"
                )
            allowed = serving.under_cap(visit.shown, self.cap)
            row, reason = self._choose(db, time, p, allowed)
            decision = Decision(
                request,
                int(ads[row]) if row >= 0 else -1,
                reason,
                float(p[row]) if row >= 0 else 0.0,
                self.cost if row >= 0 else 0.0,
            )
            self._log(db, decision, user, time)
        return decision

    def _choose(self, db, time: float, p: np.ndarray, allowed: np.ndarray) -> tuple[int, str]:
        # scores are checked before the budget is, so that a broken model is noticed at any hour
        row = serving.best_ad(serving.expected_value(p, margin=self.click_value, cost=self.cost), allowed)
        after = self._spent(db, time) + self._micro
        if after > self.budget * 1e6 + 0.5:
            return -1, "budget"
        if self.plan is not None:
            ahead = pacing.allowance(self.plan, self.budget, time % DAY / 3600)
            if after > ahead * 1e6 + 0.5:
                return -1, "paced"
        if row >= 0:
            return row, "served"
        return -1, "worthless" if allowed.any() else "capped"

    def click(self, request: str, time: float) -> None:
        """Record that the ad of a decision was clicked; a second report of the same click changes nothing."""
        with self._transaction() as db:
            row = db.execute("SELECT user, ad, click FROM decision WHERE request = ?", (request,)).fetchone()
            if row is None or row[1] < 0:
                raise ValueError(f"a click on request {request!r}, which showed no ad: check the ids")
            if row[2]:
                return  # reported before, perhaps before a restart: its time is no news to the clock
            self._check_clock(db, time)
            db.execute("UPDATE decision SET click = 1 WHERE request = ?", (request,))
            db.execute("UPDATE showing SET clicks = clicks + 1 WHERE user = ? AND ad = ?", row[:2])
            db.execute("UPDATE profile SET clicks = clicks + 1, last = ? WHERE user = ?", (time, row[0]))

    def spent(self, time: float) -> float:
        """Yuan spent on the day (UTC) of `time`."""
        return self._spent(self._db, time) / 1e6

    def log(self) -> pd.DataFrame:
        """All decisions: request, time (seconds), user, ad, reason, p, cost (yuan), click."""
        frame = pd.read_sql_query("SELECT * FROM decision ORDER BY time, request", self._db)
        return frame.assign(cost=frame["cost"] / 1e6)

    def audit(self) -> dict[str, int]:
        """Recount the log and compare: how many counters of showings, of profiles and of spending disagree with it (0 is right)."""
        ask = lambda counted, kept: self._db.execute(  # noqa: E731
            f"SELECT COUNT(*) FROM (SELECT * FROM ({counted} EXCEPT {kept}) UNION ALL SELECT * FROM ({kept} EXCEPT {counted}))"
        ).fetchone()[0]
        served = "FROM decision WHERE ad >= 0 GROUP BY"
        return {
            "showings": ask(f"SELECT user, ad, COUNT(*), SUM(click) {served} user, ad", "SELECT user, ad, n, clicks FROM showing"),
            "profiles": ask(f"SELECT user, COUNT(*), SUM(click) {served} user", "SELECT user, shown, clicks FROM profile"),
            "spending": ask(f"SELECT CAST(time / {DAY} AS INTEGER), SUM(cost) {served} 1", "SELECT day, micro FROM spending"),
        }  # fmt: skip

    def close(self) -> None:
        """Close the file; everything decided is in it already."""
        self._db.close()

    # -- the state ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self):
        """All or nothing, one process at a time: two servers on one file share one budget."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _check_clock(self, db, time: float) -> None:
        if not np.isfinite(time):
            raise ValueError(f"the time of a request must be a finite number of seconds, not {time}")
        last = db.execute("SELECT last FROM clock").fetchone()
        if last and time < last[0] - self.tolerance:
            raise ValueError(
                f"the clock went backwards by {last[0] - time:.1f} s: budget and caps would count twice; set the clock right"
            )
        if last is None or time > last[0]:
            db.execute("INSERT INTO clock VALUES (1, ?) ON CONFLICT DO UPDATE SET last = excluded.last", (time,))

    def _visit(self, db, user: str, time: float, ads: np.ndarray, context: dict) -> Visit:
        rows = db.execute("SELECT ad, n, clicks FROM showing WHERE user = ?", (user,)).fetchall()
        seen = {ad: (n, clicks) for ad, n, clicks in rows}
        counts = np.array([seen.get(ad, (0, 0)) for ad in ads.tolist()], int).reshape(-1, 2)
        total = db.execute("SELECT shown, clicks FROM profile WHERE user = ?", (user,)).fetchone() or (0, 0)
        return Visit(user, time, context, ads, counts[:, 0], counts[:, 1], *total)

    def _spent(self, db, time: float) -> int:
        row = db.execute("SELECT micro FROM spending WHERE day = ?", (int(time // DAY),)).fetchone()
        return row[0] if row else 0

    def _log(self, db, d: Decision, user: str, time: float) -> None:
        micro = self._micro if d.ad >= 0 else 0
        db.execute(
            "INSERT INTO decision VALUES (?, ?, ?, ?, ?, ?, ?, 0)", (d.request, time, user, d.ad, d.reason, d.p, micro)
        )
        if d.ad < 0:
            return
        db.execute("INSERT INTO showing VALUES (?, ?, 1, 0) ON CONFLICT DO UPDATE SET n = n + 1", (user, d.ad))
        more = "ON CONFLICT DO UPDATE SET shown = shown + 1, last = excluded.last"
        db.execute(f"INSERT INTO profile VALUES (?, 1, 0, ?) {more}", (user, time))
        day = "ON CONFLICT DO UPDATE SET micro = micro + excluded.micro"
        db.execute(f"INSERT INTO spending VALUES (?, ?) {day}", (int(time // DAY), micro))
