"""Learning from clicks: pairs from a log, a Bradley-Terry reward, the best of n, and direct preference optimisation (DPO).

Taught in notebooks/06_creative_text.ipynb, sections 9 to 11.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import peft
import torch
from scipy.special import gammaln
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adlib import compute
from adlib.language import log_likelihoods, rate_share, token_pairs
from adlib.tuning import upper_lora

# -- clicks become pairs -------------------------------------------------------------------------------------------------------


def click_pairs(log: pd.DataFrame, cell: Sequence[str], *, ad: str = "creative_id", seed: int = 0) -> pd.DataFrame:
    """Pairs of ads of which one was clicked and another, shown in the same cell to somebody else, was not.

    A cell is what the two have in common (product and audience, say), so that neither explains which one won. Every click gives one pair; its
    loser is drawn among the cell's impressions without a click. That is only fair if chance decided which ad of a cell was shown.

    Parameters
    ----------
    log : impressions with the columns `cell`, `ad` and click (0 or 1). seed : decides the losers.

    Returns
    -------
    DataFrame: winner, loser (values of `ad`), one row a pair; a click whose cell has no other ad without a click gives none.

    Raises
    ------
    ValueError : for missing columns, or if no pair can be made.

    Taught in notebooks/06_creative_text.ipynb, section 9.
    """
    if missing := [c for c in (*cell, ad, "click") if c not in log]:
        raise ValueError(f"Pairs need the column(s) {', '.join(missing)}; the log has {', '.join(log.columns)}.")
    rng, codes = np.random.default_rng(seed), log.groupby(list(cell), sort=False).ngroup().to_numpy()
    ads, clicked = log[ad].to_numpy(), log["click"].to_numpy() == 1
    order = np.argsort(codes[~clicked], kind="stable")
    idle, cells = ads[~clicked][order], codes[~clicked][order]
    first, last = (np.searchsorted(cells, codes[clicked], side) for side in ("left", "right"))
    known = last > first
    drawn = first[known] + (rng.random(known.sum()) * (last - first)[known]).astype(int)
    pairs = pd.DataFrame({"winner": ads[clicked][known], "loser": idle[drawn]})
    pairs = pairs[pairs.winner != pairs.loser].reset_index(drop=True)
    if pairs.empty:
        raise ValueError("The log gives no pair: it needs clicks, and cells in which two ads were shown.")
    return pairs


class BradleyTerry(BaseEstimator):
    r"""Reward r(x) = w·φ(x) from pairs, so that P(a beats b) = σ(r(a) - r(b)).

    .. math:: \min_w \sum_i \log(1 + e^{-w^\top(\phi(a_i) - \phi(b_i))}) + \frac{1}{2 C} \lVert w \rVert^2

    The absolute level of a reward means nothing: only differences are learnt.

    Parameters
    ----------
    C : how little the weights are held back.

    Attributes
    ----------
    coef_ : (d,) weights w.

    References
    ----------
    Bradley, Terry (1952), Biometrika 39; as a reward of texts: Stiennon et al. (2020), arXiv 2009.01325. Taught in
    notebooks/06_creative_text.ipynb, section 9.
    """

    def __init__(self, C: float = 1.0):
        self.C = C

    def fit(self, winners: np.ndarray, losers: np.ndarray) -> "BradleyTerry":
        """Learn from features of winners and losers, (n, d) each; ValueError if their shapes differ or they are empty."""
        winners, losers = np.asarray(winners, float), np.asarray(losers, float)
        if winners.shape != losers.shape or winners.ndim != 2 or not len(winners):
            raise ValueError(
                f"Winners and losers are arrays of one shape (n, d), not {winners.shape} and {losers.shape}."
            )
        # each pair stands once in each order: the two classes that scikit-learn wants, at half the weight
        difference, beats = np.vstack([winners - losers, losers - winners]), np.repeat([1, 0], len(winners))
        model = LogisticRegression(C=self.C / 2, fit_intercept=False, max_iter=500)
        self.coef_ = model.fit(difference, beats).coef_[0]
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Rewards (n,) of features (n, d), in logits."""
        check_is_fitted(self)
        return np.asarray(X, float) @ self.coef_

    def score(self, winners: np.ndarray, losers: np.ndarray) -> float:
        """Share of pairs in which the winner has the higher reward; a tie counts half."""
        gap = self.predict(winners) - self.predict(losers)
        return float(np.mean((gap > 0) + 0.5 * (gap == 0)))


def by_audience(vectors: np.ndarray, audience: Sequence[str], audiences: Sequence[str]) -> np.ndarray:
    """Features φ of texts for audiences: the vector itself, then once more in the block of its audience, zeros in the others.

    With them one linear reward learns what all like and what each audience likes: (n, d) vectors give (n, d·(1 + len(audiences))).
    Raises ValueError for an audience that is not among `audiences`.
    """
    if unknown := sorted(set(audience) - set(audiences)):
        raise ValueError(f"Unknown audience {unknown[0]!r}; known are {', '.join(audiences)}.")
    one = np.array([[a == b for b in audiences] for a in audience], float)
    return np.hstack([vectors, *(vectors * one[:, [k]] for k in range(len(audiences)))])


# -- the best of n -------------------------------------------------------------------------------------------------------------


def best_of_n(reward: np.ndarray, value: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    r"""Expected value of the text that has the highest reward among n drawn from a pool, for each n, exactly and for each brief.

    With the N texts of a pool in ascending order of reward, the i-th is the best of n if all others come from below it:

    .. math:: E_n = \sum_{i=n}^{N} \binom{i-1}{n-1} \Big/ \binom{N}{n} \; v_{(i)}

    Parameters
    ----------
    reward : (briefs, N), decides the choice. value : (briefs, N), what the choice is worth, in any unit. sizes : values of n, 1 to N.

    Returns
    -------
    (briefs, len(sizes)).

    Raises
    ------
    ValueError : if shapes differ or an n is not between 1 and N.

    Taught in notebooks/06_creative_text.ipynb, section 10.
    """
    reward, value = np.asarray(reward, float), np.asarray(value, float)
    if reward.shape != value.shape or reward.ndim != 2:
        raise ValueError(f"reward and value are arrays of one shape (briefs, N), not {reward.shape} and {value.shape}.")
    n_pool = reward.shape[1]
    if not all(1 <= n <= n_pool for n in sizes):
        raise ValueError(f"n must lie between 1 and {n_pool}, the size of the pools, not {list(sizes)}.")
    ranked = np.take_along_axis(value, np.argsort(reward, axis=1, kind="stable"), 1)
    i, columns = np.arange(1, n_pool + 1), []
    for n in sizes:
        choose = lambda a, b: gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)  # noqa: E731
        share = np.where(i >= n, np.exp(choose(np.maximum(i - 1, n - 1), n - 1) - choose(n_pool, n)), 0.0)
        columns.append(ranked @ share)
    return np.stack(columns, axis=1)


# -- direct preference optimisation --------------------------------------------------------------------------------------------


@torch.inference_mode()
def log_probability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    batch_size: int = 32,
) -> np.ndarray:
    """log p(text | prompt) under a model, in nats, (n,); the difference between two models estimates how far they are apart (KL).

    Raises ValueError for empty or unequal lists; MemoryError with the batch size to try. Taught in notebooks/06_creative_text.ipynb, section 11.
    """
    pairs = token_pairs(tokenizer, prompts, texts)
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i].prompt), pairs[i].prompt))  # equal prompts together
    found = np.empty(len(pairs))
    with compute.memory_guard(batch_size):
        for batch in np.split(order, range(batch_size, len(order), batch_size)):
            found[batch] = log_likelihoods(model, [pairs[i] for i in batch], tokenizer.pad_token_id).cpu().numpy()
    return found


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    r"""DPO's loss of each pair from log probabilities (n,) under the model and under the fixed reference.

    .. math:: -\log \sigma\Big(\beta \Big[\log\frac{\pi(c)}{\pi_0(c)} - \log\frac{\pi(r)}{\pi_0(r)}\Big]\Big)

    Rafailov et al. (2023), arXiv 2305.18290. Taught in notebooks/06_creative_text.ipynb, section 11.
    """
    return -F.logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))


def prefer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    beta: float = 0.1,
    anchor: float = 1.0,
    steps: int = 24,
    batch_size: int = 4,
    learning_rate: float = 2e-3,
    rank: int = 8,
    top_layers: float = 0.4,
    watch: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    every: int = 8,
    keep: str = "",
    seed: int = 0,
    progress: bool = True,
) -> tuple[PreTrainedModel, pd.DataFrame]:
    r"""Move a writer towards the chosen texts and away from the rejected ones: DPO with a likelihood anchor.

    .. math:: L = L_{DPO} - \alpha \frac{\log \pi(c)}{|c|}

    DPO only asks that the chosen text gains on the rejected one; both may become unlikely, and what the model then writes nobody has
    compared. The anchor, the plain loss of fine-tuning on the chosen text, keeps it likely (Pang et al. 2024, arXiv 2404.19733).

    Parameters
    ----------
    model : the writer, without an adapter; it stays as it is. prompts, chosen, rejected : n texts each.
    beta : how fast the reward for leaving the reference fades. anchor : α, 0 for plain DPO. steps : of AdamW. batch_size : prompts a step, each with its
    pairs (8 at most), which are read together. learning_rate : the highest, after a warm-up and before a linear decay. rank, top_layers : of the new low-rank adapter.
    watch : measures a writer on data that are not trained on: `model` at the start, then a merged copy each `every` steps.
    keep : the measure of `watch` whose highest value decides which state is returned (early stopping); else the last.

    Returns
    -------
    (writer with the adapter merged, history): step, loss, margin (β times the gain of chosen over rejected, nats), chosen (mean gain of
    log π(c) over the reference, nats; below 0 the chosen texts themselves became less likely), and what `watch` measured.

    Raises
    ------
    ValueError : for unequal or empty lists and impossible settings. MemoryError with the batch size to try.

    Taught in notebooks/06_creative_text.ipynb, section 11.
    """
    if steps < 1 or batch_size < 1 or beta <= 0 or anchor < 0 or (keep and watch is None):
        raise ValueError(
            "prefer needs steps and batch_size ≥ 1, beta > 0, anchor ≥ 0, and watch where keep names a measure."
        )
    texts = _Texts(model, tokenizer, prompts, chosen, rejected)
    tuned = _adapted(model, rank, top_layers, seed)
    history, states = [], {}
    with tqdm(total=steps, desc="learning preferences", disable=not progress) as bar, compute.memory_guard(batch_size):
        for row in _loop(tuned, texts, beta, anchor, steps, batch_size, learning_rate, seed):
            if watch is not None and (row["step"] % every == 0 or row["step"] == steps):
                row |= watch(_merged(tuned) if row["step"] else model)
                states[row["step"]] = copy.deepcopy(peft.get_peft_model_state_dict(tuned, save_embedding_layers=False))
            history.append(row)
            bar.update(row["step"] > 0)
    frame = pd.DataFrame(history)
    if keep:
        peft.set_peft_model_state_dict(tuned, states[int(frame.loc[frame[keep].idxmax(), "step"])])
    return _merged(tuned), frame


PAIRS = 8  # of one prompt that go into a step together


class _Texts:
    """The different texts of preference pairs, and their log probabilities under the reference; equal ones are read once."""

    def __init__(self, model, tokenizer, prompts, chosen, rejected) -> None:
        for texts in (chosen, rejected):
            token_pairs(tokenizer, prompts, texts)  # says what is wrong, and where
        good, bad = (list(zip(prompts, texts, strict=True)) for texts in (chosen, rejected))
        place = {text: k for k, text in enumerate(dict.fromkeys(good + bad))}
        asked, written = map(list, zip(*place, strict=True))
        self.tokens, self.pad = token_pairs(tokenizer, asked, written), tokenizer.pad_token_id
        self.pairs = torch.tensor([[place[c], place[r]] for c, r in zip(good, bad, strict=True)])
        self.words = torch.tensor([len(pair.target) for pair in self.tokens], device=model.device)
        self.reference = torch.tensor(log_probability(model, tokenizer, asked, written)).float().to(model.device)
        rows = pd.Series(range(len(prompts))).groupby(list(prompts), sort=False)
        self.parts = [part for _, of in rows for part in np.split(of.to_numpy(), range(PAIRS, len(of), PAIRS))]

    def batches(self, size: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Pairs of so many prompts each, all pairs once, in random order; a prompt with many pairs comes in parts."""
        order = rng.permutation(len(self.parts))
        return [
            np.concatenate([self.parts[k] for k in some]) for some in np.split(order, range(size, len(order), size))
        ]

    def gains(self, model, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log π/π_0 of chosen and of rejected, and log π a token of chosen, for some pairs."""
        used, at = self.pairs[rows].unique(return_inverse=True)
        sums = log_likelihoods(model, [self.tokens[i] for i in used], self.pad)
        gain = (sums - self.reference[used])[at]
        return gain[:, 0], gain[:, 1], (sums / self.words[used])[at[:, 0]]


def _loop(tuned, texts, beta, anchor, steps, batch_size, learning_rate, seed):
    """Train; yields a row before the first step and after each."""
    rng, queue = np.random.default_rng(seed), []
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_share(step, steps))
    yield {"step": 0, "loss": math.log(2), "margin": 0.0, "chosen": 0.0}
    for step in range(1, steps + 1):
        queue = queue or texts.batches(batch_size, rng)
        tuned.train()
        chosen, rejected, likely = texts.gains(tuned, queue.pop())
        zero = torch.zeros_like(chosen)
        preference = dpo_loss(chosen, rejected, zero, zero, beta).mean()
        (preference - anchor * likely.mean()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        margin = beta * (chosen - rejected).mean().item()
        yield {"step": step, "loss": preference.item(), "margin": margin, "chosen": chosen.mean().item()}


def _adapted(model: PreTrainedModel, rank: int, top_layers: float, seed: int) -> peft.PeftModel:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still asks transformers under an old name
        torch.manual_seed(seed)
        return peft.get_peft_model(copy.deepcopy(model), upper_lora(model, rank, top_layers))


def _merged(tuned: peft.PeftModel) -> PreTrainedModel:
    """A copy with the adapter merged into the weights, which writes faster."""
    return copy.deepcopy(tuned).merge_and_unload().eval()
