"""Choosing while learning: bandits over many runs at once, their regret, and a text model as the prior of a bandit.

Feedback comes in batches, as it does in a shop: a policy chooses, sees a batch of impressions, and learns from their clicks. Runs (or
tests) are rows of arrays, so that fifty of them cost hardly more than one. Taught in notebooks/08_ad_serving.ipynb, sections 2 to 4.
"""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, special
from tqdm.auto import tqdm


class Uniform:
    r"""Beta posteriors of the click rates of K ads in R runs; chooses at random. The other policies change the choice only.

    With a prior worth s impressions at a rate m, n impressions and x clicks leave

    .. math:: \theta \sim Beta(s m + x,\; s (1 - m) + n - x), \qquad E[\theta] = \frac{s m + x}{s + n}

    Parameters
    ----------
    prior_mean : float or (R, K), click rate expected before the first impression, in (0, 1).
    strength : impressions that the prior is worth, above 0.

    Raises
    ------
    ValueError : a prior outside its range. Taught in notebooks/08_ad_serving.ipynb, section 2.
    """

    def __init__(self, prior_mean=0.02, strength: float = 50.0):
        inside = np.asarray(prior_mean, float)
        if not (0 < strength < np.inf and ((inside > 0) & (inside < 1) | np.isnan(inside)).all()):
            raise ValueError("a prior needs a mean between 0 and 1 and a strength above 0 impressions")
        self.prior_mean, self.strength = inside, strength

    def start(self, available: np.ndarray, horizon: int) -> None:
        """Forget everything; `available` (R, K) says which ads exist, `horizon` how many impressions will come."""
        self.available, self.horizon = available, horizon
        self.shown, self.clicks = np.zeros(available.shape), np.zeros(available.shape)
        self.prior = np.where(available, np.broadcast_to(self.prior_mean, available.shape), 0.5)

    @property
    def mean(self) -> np.ndarray:
        """(R, K) posterior mean click rates."""
        return (self.strength * self.prior + self.clicks) / (self.strength + self.shown)

    def scores(self, rng: np.random.Generator) -> np.ndarray:
        """(R, K) numbers, the largest of which is shown next."""
        return rng.random(self.prior.shape)

    def choose(self, rng: np.random.Generator) -> np.ndarray:
        """(R,) the ad of the next batch; ties are broken at random."""
        score = self.scores(rng)
        score = score + 1e-12 * rng.random(score.shape)
        return np.where(self.available, score, -np.inf).argmax(1)

    def update(self, arm: np.ndarray, shown: int, clicks: np.ndarray) -> None:
        """Learn from a batch: `shown` impressions of ad `arm` (R,) and their clicks (R,)."""
        rows = np.arange(len(arm))
        self.shown[rows, arm] += shown
        self.clicks[rows, arm] += clicks


class EpsilonGreedy(Uniform):
    """Show the best so far, and a random ad in a share `epsilon` of the batches. Taught in section 2."""

    def __init__(self, epsilon: float = 0.1, prior_mean=0.02, strength: float = 50.0):
        super().__init__(prior_mean, strength)
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon is a share of the batches, between 0 and 1, not {epsilon}")
        self.epsilon = epsilon

    def scores(self, rng: np.random.Generator) -> np.ndarray:
        """Posterior means, or noise where the coin says so."""
        explore = rng.random((len(self.prior), 1)) < self.epsilon
        return np.where(explore, rng.random(self.prior.shape), self.mean)


class Thompson(Uniform):
    """Draw a rate from each posterior and show the ad with the largest (Thompson 1933; Chapelle and Li 2011). Taught in section 2."""

    def scores(self, rng: np.random.Generator) -> np.ndarray:
        """One draw an ad."""
        a, total = self.strength * self.prior + self.clicks, self.strength + self.shown
        return rng.beta(a, total - a)


class UCB(Uniform):
    r"""Show the ad whose rate may be highest: posterior mean plus `alpha` posterior standard deviations.

    .. math:: m + \alpha \sqrt{\frac{m (1 - m)}{s + n + 1}}, \qquad m = E[\theta]

    With the prior means of a text model and an estimated strength this is LOLA (Ye et al. 2024, arXiv 2406.02611). The square root is the
    standard deviation of the Beta posterior, so rates of one per cent need no bound made for rates up to one. Taught in section 4.
    """

    def __init__(self, alpha: float = 1.0, prior_mean=0.02, strength: float = 50.0):
        super().__init__(prior_mean, strength)
        if not 0 <= alpha < np.inf:
            raise ValueError(f"alpha counts standard deviations, 0 or more, not {alpha}")
        self.alpha = alpha

    def scores(self, rng: np.random.Generator) -> np.ndarray:
        """Upper ends."""
        m = self.mean
        return m + self.alpha * np.sqrt(m * (1 - m) / (self.strength + self.shown + 1))


class ABTest(Uniform):
    """Share the first part `explore` of the traffic equally, then show the winner only: a classical A/B test. Taught in section 4."""

    def __init__(self, explore: float = 0.3, prior_mean=0.02, strength: float = 50.0):
        super().__init__(prior_mean, strength)
        if not 0 < explore <= 1:
            raise ValueError(f"explore is the share of traffic that is tested on, above 0 and at most 1, not {explore}")
        self.explore = explore

    def scores(self, rng: np.random.Generator) -> np.ndarray:
        """The least shown while testing, then the posterior means."""
        testing = self.shown.sum(1, keepdims=True) < self.explore * self.horizon
        return np.where(testing, -self.shown, self.mean)


@dataclass(frozen=True)
class Runs:
    """What R runs gave: impressions (T,) at which they were read, regret (R, T) in clicks, clicks (R, T), and shown (R, K)."""

    impressions: np.ndarray
    regret: np.ndarray
    clicks: np.ndarray
    shown: np.ndarray


def simulate(policy: Uniform, rates: np.ndarray, horizon: int, *, batch: int = 20, seed: int = 0) -> Runs:
    r"""Play a policy against known click rates; regret is the expected clicks lost against each run's best ad.

    .. math:: R_T = \sum_{t \le T} \left( \max_a p_a - p_{a_t} \right)

    Parameters
    ----------
    rates : (R, K) true click rates of each run, NaN where a run has fewer ads.
    horizon, batch : impressions of a run, and of each choice. seed : of choices and clicks.

    Raises
    ------
    ValueError : no ad to choose from, a rate outside [0, 1], a horizon shorter than a batch.
    """
    rates = _table(rates, "rates", 1.0)
    best = np.nanmax(rates, 1)
    draw = lambda rng, rows, arm: rng.binomial(batch, rates[rows, arm])  # noqa: E731
    return _play(policy, ~np.isnan(rates), draw, lambda rows, arm: best - rates[rows, arm], horizon, batch, seed)


def replay_tests(policy: Uniform, clicks, impressions, horizon: int, *, batch: int = 20, seed: int = 0) -> Runs:
    """Play a policy on the logs of R randomised tests: each impression it asks for is drawn from that ad's log *without* putting it back.

    So the first n impressions of an ad are n real visitors in random order, and the policy's clicks estimate without bias what it would have
    won then. Drawing with replacement would take the noise of the observed rates for truth and flatter whoever adapts to it.

    Parameters
    ----------
    clicks, impressions : (R, K) logged counts, NaN where a test has fewer ads.
    horizon : impressions of each test, at most those of its smallest ad, so that any choice can be followed.

    Returns
    -------
    Runs; its regret is measured against the ad with the highest observed rate.

    Raises
    ------
    ValueError : zero impressions in an arm, more clicks than impressions, a horizon above the smallest ad's impressions.
    """
    impressions, clicks = _table(impressions, "impressions", np.inf), _table(clicks, "clicks", np.inf)
    if (impressions == 0).any():
        raise ValueError(
            "zero impressions in an arm: what was never shown cannot be replayed; drop the arm or the test"
        )
    if (clicks > impressions).any() or (np.isnan(clicks) != np.isnan(impressions)).any():
        raise ValueError("clicks and impressions do not fit: every ad needs both, with clicks <= impressions")
    if horizon > (smallest := int(np.nanmin(impressions))):
        raise ValueError(f"the horizon of {horizon} exceeds the {smallest} impressions of the smallest arm")
    rates, available = clicks / impressions, ~np.isnan(impressions)
    good, bad = (np.where(available, t, 0).astype(np.int64) for t in (clicks, impressions - clicks))
    best = np.nanmax(rates, 1)

    def draw(rng, rows, arm):
        """Clicks of a batch of impressions, drawn without replacement from those that the arm had in the real test."""
        won = rng.hypergeometric(good[rows, arm], bad[rows, arm], batch)
        good[rows, arm] -= won
        bad[rows, arm] -= batch - won
        return won

    return _play(policy, available, draw, lambda rows, arm: best - rates[rows, arm], horizon, batch, seed)


def _table(values, name: str, limit: float) -> np.ndarray:
    table = np.asarray(values, float)
    if table.ndim != 2 or table.shape[1] == 0 or np.isnan(table).all(1).any():
        raise ValueError(f"{name} must have one row a run with at least one ad; an empty candidate set has no best ad")
    if ((table < 0) | (table > limit)).any():
        raise ValueError(f"{name} must lie between 0 and {limit:g}, got {np.nanmin(table):g} to {np.nanmax(table):g}")
    return table


def _play(policy, available, draw, gap, horizon: int, batch: int, seed: int) -> Runs:
    if not 1 <= batch <= horizon:
        raise ValueError(f"a batch of {batch} does not fit into a horizon of {horizon} impressions")
    rng, rows, steps = np.random.default_rng(seed), np.arange(len(available)), horizon // batch
    policy.start(available, horizon)
    clicks, regret = np.empty((2, len(rows), steps))
    for t in range(steps):
        arm = policy.choose(rng)
        won = draw(rng, rows, arm)
        policy.update(arm, batch, won)
        clicks[:, t], regret[:, t] = won, batch * gap(rows, arm)
    return Runs(batch * np.arange(1, steps + 1), regret.cumsum(1), clicks.cumsum(1), policy.shown)


def prior_strength(clicks, impressions, mean) -> float:
    r"""Impressions that a predicted click rate is worth, by empirical Bayes: the s of the beta-binomial likelihood.

    .. math:: \hat s = \arg\max_s \sum_i \ln \frac{B(s m_i + x_i,\; s (1 - m_i) + n_i - x_i)}{B(s m_i,\; s (1 - m_i))}

    Parameters
    ----------
    clicks, impressions : (n,) counts of ads that the model of the rates has *not* learnt from. mean : (n,) its predictions, in (0, 1).

    Returns
    -------
    s between 1 and 10^6. A large s says that the predictions are as exact as the data can tell.

    Raises
    ------
    ValueError : zero impressions in an arm, or a prediction outside (0, 1). Robbins (1956). Taught in section 4.
    """
    x, n, m = (np.asarray(v, float) for v in (clicks, impressions, mean))
    if not (n > 0).all():
        raise ValueError("zero impressions in an arm: it says nothing about the strength of a prior; drop it")
    if not ((m > 0) & (m < 1)).all():
        raise ValueError("predicted click rates must lie strictly between 0 and 1")

    def loss(log_s: float) -> float:
        """Negative log likelihood of the clicks, up to a constant, under a prior worth s impressions."""
        a, b = np.exp(log_s) * m, np.exp(log_s) * (1 - m)
        return -(special.betaln(a + x, b + n - x) - special.betaln(a, b)).sum()

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(0, np.log(1e6)), method="bounded").x))


class LinUCB:
    r"""One ridge regression of clicks an ad, and a bonus for what it does not know yet.

    .. math:: A_a = \lambda I + \sum x x^\top, \quad \theta_a = A_a^{-1} \sum r x, \quad
              score_a(x) = \theta_a^\top x + \alpha \sqrt{x^\top A_a^{-1} x}

    Parameters
    ----------
    alpha : weight of the bonus, in clicks: about the standard deviation of a click, sqrt(p (1 - p)), times 1 to 2.
    ridge : lambda. epsilon : share of the visitors who get a random ad instead (with alpha = 0 this is epsilon-greedy).

    Li, Chu, Langford, Schapire (2010), arXiv 1003.0146. Taught in notebooks/08_ad_serving.ipynb, section 3.
    """

    def __init__(self, alpha: float = 0.15, ridge: float = 1.0, epsilon: float = 0.0):
        if not (0 <= alpha < np.inf and 0 < ridge < np.inf and 0 <= epsilon <= 1):
            raise ValueError("LinUCB needs alpha >= 0, ridge > 0 and epsilon between 0 and 1")
        self.alpha, self.ridge, self.epsilon = alpha, ridge, epsilon

    def start(self, runs: int, arms: int, d: int) -> None:
        """Forget everything."""
        self.A = np.broadcast_to(self.ridge * np.eye(d), (runs, arms, d, d)).copy()
        self.b = np.zeros((runs, arms, d))

    def choose(self, x: np.ndarray, outer: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(R, n) ads for the visitors x: (R, n, d) with their products x xᵀ: (R, n, d²)."""
        inverse = np.linalg.inv(self.A)
        theta = np.einsum("rkde,rke->rdk", inverse, self.b)
        score = x @ theta.astype(x.dtype)
        if self.alpha:  # xᵀ A⁻¹ x is a dot product of the d² products with A⁻¹: one large matrix product for all ads
            flat = inverse.reshape(*inverse.shape[:2], -1).swapaxes(1, 2).astype(x.dtype)
            score += self.alpha * np.sqrt(np.maximum(outer @ flat, 0))
        explore = rng.random(x.shape[:2]) < self.epsilon
        random = rng.integers(0, score.shape[2], x.shape[:2])
        first = score.max(2) == score.min(2)  # nothing is known yet
        return np.where(explore | first, random, score.argmax(2))

    def update(self, x: np.ndarray, outer: np.ndarray, arm: np.ndarray, click: np.ndarray) -> None:
        """Learn from visitors x: (R, n, d), their ads (R, n) and clicks (R, n)."""
        chosen = (arm[:, None] == np.arange(self.b.shape[1])[:, None]).astype(x.dtype)  # (R, K, n)
        self.A += (chosen @ outer).reshape(self.A.shape)
        self.b += (chosen * click[:, None]) @ x


def simulate_visitors(policy: LinUCB, rates, x, *, runs: int, horizon: int, batch: int = 50, seed: int = 0) -> Runs:
    """Play a contextual policy on visitors drawn from a pool; regret is measured against the best ad *for each visitor*.

    Parameters
    ----------
    rates : (N, K) true click probabilities of the pool's visitors. x : (N, d) what the policy sees of them.

    Raises
    ------
    ValueError : an empty candidate set, rates outside [0, 1], a context that is not finite. Taught in section 3.
    """
    rates, x = _table(rates, "rates", 1.0), np.asarray(x, float)
    if len(x) != len(rates) or not np.isfinite(x).all():
        raise ValueError("every visitor needs a context of finite numbers, one row each")
    if not 1 <= batch <= horizon:
        raise ValueError(f"a batch of {batch} does not fit into a horizon of {horizon} impressions")
    rng, best, steps = np.random.default_rng(seed), rates.max(1), horizon // batch
    policy.start(runs, rates.shape[1], x.shape[1])
    x = x.astype(np.float32)
    outer = (x[:, :, None] * x[:, None]).reshape(len(x), -1)
    clicks, regret, shown = np.empty((runs, steps)), np.empty((runs, steps)), np.zeros((runs, rates.shape[1]))
    for t in tqdm(range(steps), desc="visitors", delay=2, leave=False):
        who = rng.integers(0, len(x), (runs, batch))
        arm = policy.choose(x[who], outer[who], rng)
        click = rng.random(who.shape) < rates[who, arm]
        policy.update(x[who], outer[who], arm, click)
        clicks[:, t], regret[:, t] = click.sum(1), (best[who] - rates[who, arm]).sum(1)
        np.add.at(shown, (np.arange(runs)[:, None], arm), 1)
    return Runs(batch * np.arange(1, steps + 1), regret.cumsum(1), clicks.cumsum(1), shown)
