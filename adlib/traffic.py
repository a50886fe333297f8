"""Visitors of the market: who comes when, which ad a policy shows them, and what is logged. The methods of ``market.Market`` call it.

Taught in notebooks/00_start_here.ipynb; the randomised test in notebooks/12_case_studies.ipynb.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from adlib.catalogue import PERSONAS, TRUTH

CONTEXT = SimpleNamespace(**TRUTH["context"])
HOURS = np.asarray(CONTEXT.hours, float) / sum(CONTEXT.hours)
START = np.datetime64(CONTEXT.start, "us")
DAY = 86_400_000_000  # microseconds
CHUNK = 250_000  # decisions in memory at once


@dataclass
class Context:
    """What a policy sees before it decides for n visitors: arrays of length n, indices into ``market.users`` and ``market.creatives``.

    ``candidates`` and ``shown`` (earlier showings to this visitor, as known when the batch began) have shape (n, k); ``device`` and
    ``channel`` index the names in ``market.toml``; ``timestamp`` is in microseconds since 1970 (UTC).
    """

    user: np.ndarray
    candidates: np.ndarray
    shown: np.ndarray
    timestamp: np.ndarray
    hour: np.ndarray
    position: np.ndarray
    device: np.ndarray
    channel: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Context":
        """The visitors in these rows."""
        return Context(**{k: v[rows] for k, v in vars(self).items()})


Policy = Callable[[Context], np.ndarray]


def crowd(activity: np.ndarray, hour_peak: np.ndarray) -> np.ndarray:
    """(24, 65536) shoppers by hour, each as often as activity and daily rhythm say: one gather draws a visitor."""
    away = np.abs(np.arange(24)[:, None] - hour_peak)
    weight = activity * (0.25 + np.exp(-0.5 * (np.minimum(away, 24 - away) / 2.5) ** 2))
    edges = np.cumsum(weight, 1) / weight.sum(1, keepdims=True)
    grid = (np.arange(65536) + 0.5) / 65536
    return np.array([np.searchsorted(e, grid) for e in edges], np.int32).clip(0, len(activity) - 1)


def contexts(market, n: int, total: int, first: int, rng: np.random.Generator, sets: np.ndarray) -> Context:
    """Draw the visitors of rows first … first + n of a log of `total` rows, in order of time."""
    days = (first + np.arange(n) + rng.random(n)) / total * CONTEXT.days
    day = np.floor(days)
    clock = np.interp(days - day, np.r_[0, np.cumsum(HOURS)], np.arange(25))  # hours, by the daily traffic curve
    time = (START.astype(np.int64) + (day * DAY + clock * (DAY / 24))).astype(np.int64)
    hour = np.minimum(clock.astype(np.int8), 23)
    user = market.crowd[hour, rng.integers(0, 65536, n, dtype=np.int32)]
    position = (1 + np.searchsorted(np.cumsum(CONTEXT.position_share)[:-1], rng.random(n, np.float32))).astype(np.int8)
    u, mobile = rng.random(n, np.float32), market.mobile[user]
    device = np.where(u < mobile, 0, np.where(u < mobile + 0.85 * (1 - mobile), 1, 2)).astype(np.int8)
    channel = np.searchsorted(np.cumsum(CONTEXT.channel_share)[:-1], rng.random(n, np.float32)).astype(np.int8)
    candidates = sets[rng.integers(0, len(sets), n, dtype=np.int32)]
    return Context(user, candidates, np.zeros((n, 0), np.int16), time, hour, position, device, channel)


def stream(market, policy: Policy | None, n: int, seed: int, candidates) -> Iterator[pd.DataFrame]:
    """Serve n decisions and yield the log in chunks, so that memory stays bounded; see ``market.Market.serve``."""
    sets = market.candidate_sets() if candidates is None else np.asarray(candidates, np.int32)
    seen = np.zeros((market.n_users, len(market.creatives)), np.uint8)
    for first in range(0, n, CHUNK):
        rng = np.random.default_rng([market.seed, seed, 6, first])
        c = contexts(market, min(CHUNK, n - first), n, first, rng, sets)
        choice, propensity = _decide(policy, c, seen, rng)
        ad = c.candidates[np.arange(len(c)), choice]
        shown = showings(c.user, ad, len(market.creatives), seen)
        yield log(market, c, ad, propensity, shown, first, rng)


def log(
    market, c: Context, ad: np.ndarray, propensity, shown: np.ndarray, first: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Draw clicks and purchases from the truth and write the impressions table; ad and shown have shape (n,)."""
    click = rng.random(len(c), np.float32) < sigmoid(market.click_logit(c, ad, shown))
    conversion = np.zeros(len(c), bool)
    hit = np.flatnonzero(click)
    conversion[hit] = rng.random(len(hit)) < sigmoid(market.conversion_logit(c.user[hit], ad[hit]))
    revenue = np.zeros(len(c))
    revenue[conversion] = market.products.price.to_numpy()[market.product_of[ad[conversion]]]
    columns = {
        "impression_id": _number_ids("i", first, len(c)),
        "timestamp": utc(c.timestamp),
        "user_id": strings(market.users.user_id, c.user),
        "creative_id": strings(market.creatives.creative_id, ad),
        "position": c.position.astype(np.int64),
        "channel": strings(CONTEXT.channels, c.channel),
        "device": strings(CONTEXT.devices, c.device),
        "propensity": propensity,
        "click": click.astype(np.int64),
        "conversion": conversion.astype(np.int64),
        "revenue": revenue,
        "cost": np.asarray(CONTEXT.cost_per_impression)[c.channel],
    }
    return pd.DataFrame(columns, copy=False)


def run_test(market, shop, n: int, seed: int, split: float, srm: float) -> pd.DataFrame:
    """Randomise shoppers between the arms of ``shop.creatives.arm`` and log what they do; see ``market.Market.run_test``."""
    pick = audience_ads(shop)  # (arms, personas, products, ads of a cell)
    stocked = (pick >= 0).any(3).all(0)
    if not stocked.any():
        raise ValueError("The arms share no product (and audience), so there is nothing to compare.")
    rng = np.random.default_rng([market.seed, seed, 10])
    c = contexts(shop, n, n, 0, rng, np.zeros((1, 1), np.int32))
    assigned = rng.random(market.n_users) < split
    lost = assigned & (market.mobile > 0.5) & (rng.random(market.n_users) < srm)
    c = c.take(stocked.any(1)[market.persona[c.user]] & ~lost[c.user])
    persona, treated = market.persona[c.user], assigned[c.user]
    ad = _random_ads(pick, stocked, treated.astype(int), persona, rng)
    result = log(shop, c, ad, np.where(treated, split, 1 - split), showings(c.user, ad, len(shop.creatives)), 0, rng)
    result["arm"] = strings(["control", "treatment"], treated.astype(int))
    result["product_id"] = strings(market.products.product_id, shop.product_of[ad])
    return result.assign(satisfaction=shop.satisfaction(result))


def audience_ads(market) -> np.ndarray:
    """(2 arms, personas, products, m) indices of the ads of each cell, padded with -1; an ad without audience is for all."""
    ads, names = market.creatives, [p.audience for p in PERSONAS]
    audience = ads["audience"] if "audience" in ads else pd.Series([None] * len(ads))
    unknown = sorted(set(audience.dropna()) - set(names))
    if unknown:
        raise ValueError(f"Unknown audience {unknown[0]!r}; the market has {', '.join(names)}.")
    cells: dict[tuple[int, int, int], list[int]] = {}
    for i, (arm, who, product) in enumerate(zip(ads.arm, audience, market.product_of, strict=True)):
        for k in range(len(names)) if pd.isna(who) else [names.index(who)]:
            cells.setdefault((int(arm == "treatment"), k, int(product)), []).append(i)
    pick = np.full((2, len(names), market.n_products, max(map(len, cells.values()))), -1, np.int32)
    for key, members in cells.items():
        pick[key][: len(members)] = members
    return pick


def _random_ads(pick, stocked, arm: np.ndarray, persona: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each visitor a random product that both arms stock for the audience, then a random ad of the arm's for it: (n,)."""
    u, v = rng.random(len(arm)), rng.random(len(arm))
    ad = np.empty(len(arm), np.int32)
    for k in np.unique(persona):
        rows, products = np.flatnonzero(persona == k), np.flatnonzero(stocked[k])
        cells = pick[arm[rows], k, products[(u[rows] * len(products)).astype(int)]]
        ad[rows] = cells[np.arange(len(rows)), (v[rows] * (cells >= 0).sum(1)).astype(int)]
    return ad


def browse(market, seed: int, per_user: float) -> pd.DataFrame:
    """Events table of ninety days before the campaign: products drawn by affinity, the funnel and the hours by persona."""
    rng = np.random.default_rng([market.seed, seed, 13])
    views = rng.poisson(per_user * market.activity)
    user = np.repeat(np.arange(market.n_users), views)
    weight = np.exp(1.1 * market.affinity)
    likes = np.cumsum(weight / weight.sum(1, keepdims=True), 1)
    draws = [np.searchsorted(likes[u], rng.random(v)) for u, v in enumerate(views)]
    product = np.concatenate(draws).clip(0, market.n_products - 1)
    favourite, cart, buys = rng.random((3, len(user))) < market.funnel[user].T
    stages = {"view": np.ones(len(user), bool), "favourite": favourite, "cart": cart, "purchase": cart & buys}
    hour = (market.hour_peak[user] + rng.normal(0, 2.5, len(user))) % 24
    day = np.floor(-CONTEXT.history_days * rng.random(len(user)))
    time = START.astype(np.int64) + ((day + hour / 24) * DAY).astype(np.int64)
    parts = []
    for step, (event, rows) in enumerate(stages.items()):
        price = market.products.price.to_numpy()[product[rows]]
        columns = {
            "user_id": strings(market.users.user_id, user[rows]),
            "product_id": strings(market.products.product_id, product[rows]),
            "event": pd.Series([event] * int(rows.sum()), dtype="str"),
            "timestamp": utc(time[rows] + step * 90_000_000 + rng.integers(0, 60_000_000, rows.sum())),
            "amount": price if event == "purchase" else 0.0 * price,
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts).sort_values("timestamp", kind="stable", ignore_index=True)


def _decide(
    policy: Policy | None, c: Context, seen: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Chosen column and its exact probability for each decision."""
    n, k = c.candidates.shape
    if policy is None:
        return rng.integers(0, k, n, dtype=np.int32), np.full(n, 1 / k)
    p = probabilities(policy, c, seen)
    choice = np.minimum((np.cumsum(p, 1) < rng.random((n, 1)) * p.sum(1, keepdims=True)).sum(1), k - 1)
    return choice, p[np.arange(n), choice]


def probabilities(policy: Policy | None, c: Context, seen: np.ndarray) -> np.ndarray:
    """(n, k) probabilities of a policy over the candidates, checked; ``seen`` (users, ads) are the showings so far."""
    n, k = c.candidates.shape
    if policy is None:
        return np.full((n, k), 1 / k)
    p = np.asarray(policy(replace(c, shown=seen[c.user[:, None], c.candidates])), float)
    if p.shape != (n, k):
        raise ValueError(
            f"A policy returns one probability per candidate, shape {(n, k)}; this one returned {p.shape}."
        )
    if not (np.isfinite(p).all() and (p >= 0).all() and np.allclose(p.sum(1), 1, atol=1e-6)):
        raise ValueError("A policy's probabilities must be finite, not negative, and sum to one for every visitor.")
    return p


def showings(user: np.ndarray, ad: np.ndarray, n_ads: int, seen: np.ndarray | None = None) -> np.ndarray:
    """How often each (user, ad) was shown before, in row order, (n,); `seen` (users, ads) carries counts from chunk to chunk."""
    key = user.astype(np.int64) * n_ads + ad
    order = np.argsort(key, kind="stable")
    ranked = key[order]
    start = np.r_[True, ranked[1:] != ranked[:-1]][: len(key)]
    at = np.flatnonzero(start)
    shown = np.empty(len(key), np.int64)
    shown[order] = np.arange(len(key)) - at[np.cumsum(start) - 1]
    if seen is not None:
        flat = seen.reshape(-1)
        shown += flat[key]
        flat[ranked[at]] = np.minimum(np.diff(np.r_[at, len(key)]) + flat[ranked[at]].astype(int), 255)
    return shown


def sigmoid(x: np.ndarray) -> np.ndarray:
    """σ(x) = 1 / (1 + e^−x)."""
    return 1 / (1 + np.exp(-x))


def solve_intercept(logit: np.ndarray, rate: float, weight: np.ndarray | None = None) -> float:
    """Intercept b with (weighted) mean σ(logit + b) = rate, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.average(sigmoid(logit + middle), weights=weight) < rate else (low, middle)
    return middle


def hour_of(time: np.ndarray) -> np.ndarray:
    """Hour of the day, 0–23, of microseconds since 1970."""
    return (time // (DAY // 24) % 24).astype(np.int8)


def weekday_of(time: np.ndarray) -> np.ndarray:
    """Day of the week of microseconds since 1970, Monday is 0."""
    return (time // DAY + 3) % 7  # 1970-01-01 was a Thursday


def utc(time: np.ndarray) -> pd.DatetimeIndex:
    """Timestamps (UTC) of microseconds since 1970."""
    return pd.DatetimeIndex(np.asarray(time, np.int64).view("M8[us]")).tz_localize("UTC")


def strings(values, codes: np.ndarray) -> pd.Series:
    """Strings from codes, through Arrow: ten times faster than Python strings."""
    return pd.Series(pa.array(list(values), pa.large_string()).take(pa.array(codes)), dtype="str")


def _number_ids(prefix: str, first: int, n: int) -> pd.Series:
    digits = pc.utf8_lpad(pc.cast(pa.array(np.arange(first, first + n)), pa.large_string()), 9, "0")
    text = pa.scalar(prefix, pa.large_string())
    return pd.Series(pc.binary_join_element_wise(text, digits, pa.scalar("", pa.large_string())), dtype="str")
