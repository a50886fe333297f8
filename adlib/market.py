"""A fashion shop with a planted truth: shoppers, products, ads and clicks whose real probabilities are known.

Every number planted here stands with its source in ``market.toml``. Taught in notebooks/00_start_here.ipynb and scored against in every lesson.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import pandas as pd

from adlib import catalogue, tables, traffic, trouble
from adlib.catalogue import APPEALS, CATEGORIES, PERSONAS, TRUTH, CopyReading, by_persona, picture, read_copy
from adlib.traffic import CONTEXT, DAY, START, Context, Policy, sigmoid
from adlib.trouble import soil

__all__ = [
    "APPEALS",
    "CATEGORIES",
    "PERSONAS",
    "TRUTH",
    "Context",
    "CopyReading",
    "Market",
    "load",
    "picture",
    "read_copy",
    "soil",
    "training_pairs",
]

EFFECT, CATALOGUE = (SimpleNamespace(**TRUTH[k]) for k in ("effects", "catalogue"))


@dataclass
class Market:
    """A shop of seeded, simulated shoppers, products and ads, with its truth.

    Parameters
    ----------
    seed : decides shoppers, products and ads.
    n_users, n_products, creatives_per_product : sizes.
    base_rate : click rate of the uniform policy; the intercept is solved for it.
    position_bias : whether lower slots get fewer clicks.
    drift : 0 (none) to 1 (appeals have swapped their effects after four weeks).

    Attributes
    ----------
    users, products, creatives : DataFrames of the schemas in ``adlib.tables``.
    persona : (n_users,) int, the hidden persona of each shopper, index into ``PERSONAS``.
    taste : (n_users, 10) float, hidden taste for each category, in logits; quality : (n_products,) hidden quality, standard normal.

    Raises
    ------
    ValueError : for a size below one or a rate outside (0, 0.5).
    """

    seed: int = 0
    n_users: int = 4000
    n_products: int = 300
    creatives_per_product: int = 4
    base_rate: float = TRUTH["rates"]["click"]
    position_bias: bool = True
    drift: float = 0.0
    creatives: pd.DataFrame = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if min(self.n_users, self.n_products, self.creatives_per_product) < 1:
            raise ValueError("A market needs at least one shopper, one product and one ad per product.")
        if not 0 < self.base_rate < 0.5 or not 0 <= self.drift <= 1:
            raise ValueError("base_rate must lie between 0 and 0.5 and drift between 0 and 1.")
        self._make_users(np.random.default_rng([self.seed, 1]))
        self._make_products(np.random.default_rng([self.seed, 2]))
        self._sets: dict[tuple[int, int], np.ndarray] = {}
        own = self.creatives is None
        if own:
            rng = np.random.default_rng([self.seed, 3])
            self.creatives = catalogue.human_creatives(self.products, self.creatives_per_product, rng)
        self._read_creatives()
        if own:
            self._intercept, self._conversion_intercept = 0.0, 0.0
            self._calibrate()

    def _make_users(self, rng: np.random.Generator) -> None:
        n = self.n_users
        self.persona = rng.choice(len(PERSONAS), n, p=by_persona("share"))
        k = self.persona
        self.taste = by_persona("taste")[k] * EFFECT.taste + rng.normal(0, EFFECT.personal_taste, (n, len(CATEGORIES)))
        self._style = by_persona("appeal")[k, :4] + rng.normal(0, 0.5, (n, 4))
        self.sensitivity = by_persona("price_sensitivity")[k] + rng.normal(0, 0.3, n)
        self.activity = by_persona("activity")[k] * rng.gamma(4, 1 / 4, n)
        self.mobile = np.clip(by_persona("mobile")[k] + rng.normal(0, 0.08, n), 0.02, 0.98)
        pick = lambda table: (rng.random((n, 1)) > np.cumsum(table, 1)[k][:, :-1]).sum(1)  # noqa: E731
        self.hour_peak = (by_persona("hour_peak")[k] + rng.normal(0, EFFECT.personal_hours, n)) % 24
        habit = np.exp(rng.normal(0, EFFECT.personal_funnel, (n, 3)))
        self.funnel = np.clip(by_persona("funnel")[k] * habit, 0, 0.9)  # favourite and cart per view, purchase per cart
        female = rng.random(n) < by_persona("female")[k]
        signup = START - (rng.exponential(300, n).astype(int) + 91) * np.timedelta64(DAY, "us")
        self.users = pd.DataFrame(
            {
                "user_id": [f"u{i:05d}" for i in range(n)],
                "age_band": np.array(CATALOGUE.age_bands)[pick(by_persona("age"))],
                "gender": np.where(rng.random(n) < 0.03, "unknown", np.where(female, "female", "male")),
                "region": rng.choice(CATALOGUE.regions, n, p=CATALOGUE.region_share),
                "spend_level": np.array(CATALOGUE.spend_levels)[pick(by_persona("spend"))],
                "signup_date": pd.DatetimeIndex(signup).tz_localize("UTC"),
            }
        )

    def _make_products(self, rng: np.random.Generator) -> None:
        n = self.n_products
        self.category = rng.permutation(np.arange(n) % len(CATEGORIES))
        self.quality = rng.normal(0, 1, n)
        self._look = rng.normal(0, 1, (n, 4)) / 2
        log_price = rng.normal(0, 0.35, n) + 0.1 * self.quality
        price = np.array([CATEGORIES[c].price for c in self.category]) * np.exp(log_price)
        self._price_z = (log_price - log_price.mean()) / max(log_price.std(), 1e-9)
        self.products = catalogue.stock(self.category, price, rng)

    def _read_creatives(self) -> None:
        ads = self.creatives.reset_index(drop=True)
        row = dict(zip(self.products.product_id, range(self.n_products), strict=True))
        unknown = sorted(set(ads.product_id) - set(row))
        if unknown:
            raise ValueError(f"These ads are for products the market does not have: {', '.join(unknown[:5])}.")
        records = self.products.to_dict("records")
        self.creatives, self.product_of = ads, ads.product_id.map(row).to_numpy()
        body = ads.body.fillna("") if "body" in ads else pd.Series("", index=ads.index)
        texts = [f"{h} {b}".strip() for h, b in zip(ads.headline.fillna(""), body, strict=True)]
        read = [read_copy(t, records[p]) for t, p in zip(texts, self.product_of, strict=True)]
        self._false = np.array([len(r.false_claims) > 0 for r in read], float)
        appeals = np.array([list(r.appeals.values()) for r in read])
        coverage, words = np.array([r.coverage for r in read]), np.array([r.words for r in read])
        copy = EFFECT.coverage * np.outer(by_persona("reading"), coverage) + EFFECT.false_claim * self._false
        copy += EFFECT.length * ((words[None] - by_persona("words")[:, None]) / 5) ** 2
        weights = by_persona("appeal")
        # (personas, creatives): what the text does to each persona at the start, and the change until the end under full drift
        self._copy = (copy + weights @ appeals.T).astype(np.float32)
        self._drifted = (EFFECT.drift * self.drift * (weights[:, ::-1] - weights) @ appeals.T).astype(np.float32)

    def _calibrate(self) -> None:
        context = traffic.contexts(
            self, 40_000, 40_000, 0, np.random.default_rng([self.seed, 4]), self.candidate_sets()
        )
        ad = context.candidates[:, 0]
        logit = self.click_logit(context, ad, np.zeros(len(ad)))
        self._intercept = traffic.solve_intercept(logit, self.base_rate)
        click = sigmoid(logit + self._intercept)
        self._conversion_intercept = traffic.solve_intercept(
            self.conversion_logit(context.user, ad), TRUTH["rates"]["conversion"], click
        )

    def with_creatives(self, creatives: pd.DataFrame) -> "Market":
        """The same shop, shoppers and base rate with other ads (columns product_id, headline and, if you like, body)."""
        other = replace(self, creatives=catalogue.complete(creatives))
        other._intercept, other._conversion_intercept = self._intercept, self._conversion_intercept
        return other

    @cached_property
    def affinity(self) -> np.ndarray:
        """(n_users, n_products) float32: taste, style and price fit of every shopper and product, in logits."""
        style = EFFECT.style * self._style @ self._look.T
        price = -EFFECT.price_fit * np.outer(self.sensitivity, self._price_z)
        return (self.taste[:, self.category] + style + price).astype(np.float32)

    @cached_property
    def crowd(self) -> np.ndarray:
        """(24, 65536) shoppers by hour of the day; see ``traffic.crowd``."""
        return traffic.crowd(self.activity, self.hour_peak)

    def click_logit(self, c: Context, ad: np.ndarray, shown: np.ndarray) -> np.ndarray:
        """(n,) logit of the true click probability of ads `ad` (n,) shown `shown` (n,) times before to the visitors of a context."""
        k = self.persona[c.user]
        logit = self.affinity[c.user, self.product_of[ad]] + self._copy[k, ad]
        if self.drift:
            days = (c.timestamp - START.astype(np.int64)) / (DAY * CONTEXT.days)
            logit += self._drifted[k, ad] * np.clip(days, 0, 1).astype(np.float32)
        place = np.add.outer(EFFECT.position if self.position_bias else [0.0] * 5, CONTEXT.device_effect).astype(
            np.float32
        )
        logit += place[c.position - 1, c.device] + np.asarray(CONTEXT.channel_effect, np.float32)[c.channel]
        weekend = np.where(traffic.weekday_of(c.timestamp) >= 5, np.float32(EFFECT.weekend), np.float32(0))
        fatigue = (EFFECT.fatigue * np.log2(1 + np.arange(256))).astype(np.float32)
        return logit + weekend + fatigue[np.minimum(shown, 255).astype(np.int16)] + np.float32(self._intercept)

    def conversion_logit(self, user: np.ndarray, ad: np.ndarray) -> np.ndarray:
        """(n,) logit of the true probability of a purchase after a click."""
        product = self.product_of[ad]
        logit = 0.5 * self.affinity[user, product] + EFFECT.quality_conversion * self.quality[product]
        return logit + EFFECT.false_claim_conversion * self._false[ad] + self._conversion_intercept

    def click_probability(self, impressions: pd.DataFrame) -> np.ndarray:
        """(n,) true click probability of a person for logged impressions, given all that is logged and the earlier showings in this log."""
        c, ad = self._recover(impressions)
        shown = traffic.showings(c.user, ad, len(self.creatives)) if len(c) else np.zeros(0)
        return sigmoid(self.click_logit(c, ad, shown))

    def conversion_probability(self, impressions: pd.DataFrame) -> np.ndarray:
        """(n,) true probability of a purchase, given a click."""
        c, ad = self._recover(impressions)
        return sigmoid(self.conversion_logit(c.user, ad))

    def satisfaction(self, impressions: pd.DataFrame) -> np.ndarray:
        """(n,) expected rating in stars (1–5) after a purchase: product quality counts, a false claim of the ad costs."""
        _, ad = self._recover(impressions)
        return np.clip(
            4.1 + 0.4 * self.quality[self.product_of[ad]] + EFFECT.false_claim_rating * self._false[ad], 1, 5
        )

    def _recover(self, impressions: pd.DataFrame) -> tuple[Context, np.ndarray]:
        """Contexts and ad indices of logged rows."""
        index = lambda ids, values: pd.Index(ids).get_indexer(pd.Index(values))  # noqa: E731
        user, ad = (
            index(self.users.user_id, impressions.user_id),
            index(self.creatives.creative_id, impressions.creative_id),
        )
        if (user < 0).any() or (ad < 0).any():
            raise ValueError(
                "Some rows hold shoppers or ads that this market does not have; score the log with the market that served it."
            )
        time = pd.DatetimeIndex(impressions.timestamp).as_unit("us").asi8
        device = index(CONTEXT.devices, impressions.device)
        channel = index(CONTEXT.channels, impressions.channel)
        none, position = np.zeros((len(user), 0), int), impressions.position.to_numpy()
        return Context(user, none, none, time, traffic.hour_of(time), position, device, channel), ad

    def candidate_sets(self, k: int = 4, n: int = 4096) -> np.ndarray:
        """(n, k) sets of different ads that compete for a slot; each decision of the log draws one of these sets."""
        m = len(self.creatives)
        if m < k:
            raise ValueError(f"This market has {m} ads; a choice among {k} needs at least {k}.")
        if (k, n) not in self._sets:
            order = np.random.default_rng([self.seed, 5]).random((n, m), np.float32)
            self._sets[k, n] = np.argpartition(order, k - 1, axis=1)[:, :k].astype(np.int32)
        return self._sets[k, n]

    def stream(self, policy: Policy | None = None, n: int = 100_000, seed: int = 0, *, candidates=None) -> Iterator:
        """Serve n decisions and yield the log in chunks (DataFrames), so that memory stays bounded; see ``serve``."""
        yield from traffic.stream(self, policy, n, seed, candidates)

    def serve(
        self, policy: Policy | None = None, n: int = 100_000, seed: int = 0, *, candidates=None, bots: float = 0.0
    ) -> pd.DataFrame:
        """Let a policy choose among candidate ads for n visitors and log what happens.

        Parameters
        ----------
        policy : function from Context to probabilities, shape (n, k), each row summing to one; None chooses uniformly.
        n : decisions.
        seed : same seed, same rows.
        candidates : (sets, k) indices into ``creatives``; default ``candidate_sets()``.
        bots : share of the rows replaced by click robots (accounts in ``robots``), for lesson 01.

        Returns
        -------
        impressions table in order of time, with the exact propensity of the ad chosen.

        Raises
        ------
        ValueError : if the policy's probabilities are negative, not finite or do not sum to one.
        """
        log = pd.concat(self.stream(policy, n, seed, candidates=candidates), ignore_index=True)
        return trouble.add_robots(log, self.robots, bots, np.random.default_rng([self.seed, seed, 7])) if bots else log

    def run_test(
        self,
        control: pd.DataFrame,
        treatment: pd.DataFrame,
        n: int = 100_000,
        seed: int = 0,
        split: float = 0.5,
        srm: float = 0.0,
    ) -> pd.DataFrame:
        """Randomised test between two sets of ads: every shopper is assigned once, then sees only ads of that arm.

        Parameters
        ----------
        control, treatment : creatives tables. A column ``audience`` (public name of a persona) restricts an ad to that audience; then only
            shoppers whose audience has ads in both arms take part. An audience is known without error here, which a shop cannot hope for.
        n : impressions planned. split : share of shoppers in treatment.
        srm : planted sample-ratio mismatch: share of the treatment's mobile shoppers whose page fails to load and who are never logged.

        Returns
        -------
        impressions with the columns arm ("control" or "treatment"), product_id and satisfaction (expected stars after a purchase).

        Raises
        ------
        ValueError : if the arms share no product (and audience).
        """
        arms = [a.assign(arm=name) for a, name in ((control, "control"), (treatment, "treatment"))]
        both = pd.concat(arms, ignore_index=True).drop(columns="creative_id", errors="ignore")
        shop = self.with_creatives(both)
        return traffic.run_test(self, shop, n, seed, split, srm)

    def policy_value(self, policy: Policy | None = None, n: int = 100_000, seed: int = 0, *, candidates=None) -> float:
        """True click rate of a policy over n visitors and first showings: mean of Σ_a π(a|x) p(x, a), no click is drawn."""
        return float(self._values(n, seed, candidates, policy).mean())

    def oracle_value(self, n: int = 100_000, seed: int = 0, *, candidates=None) -> float:
        """Click rate of the policy that knows the truth: mean over visitors of max_a p(x, a)."""
        return float(self._values(n, seed, candidates, None, best=True).mean())

    def _values(self, n: int, seed: int, candidates, policy: Policy | None, best: bool = False) -> np.ndarray:
        sets = self.candidate_sets() if candidates is None else np.asarray(candidates, np.int32)
        c = traffic.contexts(self, n, n, 0, np.random.default_rng([self.seed, seed, 8]), sets)
        p = np.stack([sigmoid(self.click_logit(c, ad, np.zeros(n))) for ad in c.candidates.T], 1)
        if best:
            return p.max(1)
        return (p * traffic.probabilities(policy, c, np.zeros((self.n_users, len(self.creatives)), np.uint8))).sum(1)

    @property
    def robots(self) -> np.ndarray:
        """Accounts that are click robots wherever bots are switched on."""
        n = max(1, round(TRUTH["rates"]["bot_users"] * self.n_users))
        return np.random.default_rng([self.seed, 9]).choice(self.users.user_id.to_numpy(), n, replace=False)

    def events(self, seed: int = 0, per_user: float = 45.0) -> pd.DataFrame:
        """Ninety days of browsing before the campaign: views, favourites, carts and purchases of every shopper."""
        return traffic.browse(self, seed, per_user)

    def reviews(self, seed: int = 0, n: int = 2000) -> pd.DataFrame:
        """Reviews of the shop's buyers; see ``catalogue.reviews``."""
        return catalogue.reviews(self, n, seed)

    def tables(self, n: int = 100_000, seed: int = 0, *, bots: float = 0.0) -> dict[str, pd.DataFrame]:
        """All six tables; n impressions under the uniform policy."""
        made = {
            "users": self.users,
            "products": self.products,
            "creatives": self.creatives,
            "events": self.events(seed),
        }
        return made | {"reviews": self.reviews(seed), "impressions": self.serve(None, n, seed, bots=bots)}


def load(
    data: str = "market", seed: int = 0, n: int = 100_000, **options
) -> tuple[dict[str, pd.DataFrame], Market | None]:
    """The tables of a lesson: ``data="market"`` simulates them, any other value is a folder with a shop's own.

    Returns
    -------
    (tables, market); market is None for an own shop, whose truth nobody knows.

    Raises
    ------
    adlib.tables.TableError : for a folder that does not hold valid tables.
    """
    if data != "market":
        return tables.read_tables(data), None
    shop = Market(seed=seed, **options)
    return shop.tables(n, seed), shop


def training_pairs(market: Market, n: int, seed: int = 0, brands: list[str] | None = None) -> pd.DataFrame:
    """Human copy of this market's products to learn from; see ``catalogue.training_pairs``."""
    return catalogue.training_pairs(market.products, n, seed, brands)
