"""Learning from clicks: pairs, the Bradley-Terry reward, the best of n, DPO, and pairs of real headlines."""

import json
import math
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adlib import copywriting, headlines, preferences
from adlib.likelihood import log_likelihoods, token_losses, token_pairs

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "06_creative_text.ipynb"


def by_hand(name):
    """A function that the notebook writes out in a cell tagged ``by-hand``."""
    space = {"re": re, "np": np, "comb": math.comb, "copywriting": copywriting}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if "by-hand" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), space)
    return space[name]


# -- pairs from clicks ---------------------------------------------------------------------------------------------------------


def log_of(true_reward, n, seed):
    """A log of two cells with three ads each, whose log-odds of a click are a cell's level plus the ad's reward."""
    rng = np.random.default_rng(seed)
    ad = rng.integers(0, 6, n)
    level = np.where(ad < 3, -2.0, -3.0)
    click = rng.random(n) < 1 / (1 + np.exp(-(level + true_reward[ad])))
    return pd.DataFrame({"cell": ad // 3, "creative_id": ad, "click": click.astype(int)})


def test_pairs_stay_in_their_cell_and_join_a_click_with_none():
    log = log_of(np.zeros(6), 4000, 0)
    pairs = preferences.click_pairs(log, ["cell"])
    assert (pairs.winner // 3 == pairs.loser // 3).all() and (pairs.winner != pairs.loser).all()
    assert 0.6 < len(pairs) / log.click.sum() < 0.72  # a third of the drawn losers is the same ad
    tiny = pd.DataFrame({"cell": [1, 1], "creative_id": ["a", "b"], "click": [1, 0]})
    assert preferences.click_pairs(tiny, ["cell"]).to_dict("list") == {"winner": ["a"], "loser": ["b"]}


def test_the_reward_finds_the_planted_one_whatever_the_level_of_the_cell():
    planted, found = np.array([0.0, 0.5, 1.0, 0.0, -0.5, 0.8]), []
    one = np.eye(6)
    for seed in range(4):
        pairs = preferences.click_pairs(log_of(planted, 200_000, seed), ["cell"], seed=seed)
        w = preferences.BradleyTerry(C=1e4).fit(one[pairs.winner], one[pairs.loser]).coef_
        found.append(np.r_[w[:3] - w[0], w[3:] - w[3]])
    assert np.abs(np.mean(found, axis=0) - planted).max() < 0.08, np.mean(found, axis=0)


def test_pairs_say_what_is_wrong():
    log = pd.DataFrame({"cell": [1, 1], "creative_id": ["a", "b"], "click": [0, 0]})
    with pytest.raises(ValueError, match="gives no pair"):
        preferences.click_pairs(log, ["cell"])
    with pytest.raises(ValueError, match=r"need the column\(s\) click"):
        preferences.click_pairs(log.drop(columns="click"), ["cell"])


# -- the reward ----------------------------------------------------------------------------------------------------------------


def test_the_reward_is_the_minimum_of_its_formula_and_equals_the_notebooks():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 1, (300, 4)), rng.normal(0, 1, (300, 4))
    w = preferences.BradleyTerry(C=0.5).fit(a, b).coef_
    loss = lambda v: np.logaddexp(0, -(a - b) @ v).sum() + v @ v / (2 * 0.5)  # noqa: E731
    slope = lambda v: -(a - b).T @ (1 / (1 + np.exp((a - b) @ v))) + v / 0.5  # noqa: E731
    assert check_grad(loss, slope, w) < 1e-2 and np.abs(slope(w)).max() < 0.05
    assert w == pytest.approx(by_hand("bradley_terry")(a, b, 0.5), abs=2e-4)


def test_two_ads_by_hand():
    """One feature, three wins of four: without a penalty σ(w) = 3/4."""
    winners, losers = np.array([[1.0], [1], [1], [0]]), np.array([[0.0], [0], [0], [1]])
    model = preferences.BradleyTerry(C=1e6).fit(winners, losers)
    assert model.coef_[0] == pytest.approx(math.log(3), abs=1e-3) and model.score(winners, losers) == 0.75
    assert model.score(winners, winners) == 0.5  # ties


def test_the_reward_says_what_is_wrong():
    with pytest.raises(ValueError, match="arrays of one shape"):
        preferences.BradleyTerry().fit(np.ones((2, 3)), np.ones((2, 2)))
    with pytest.raises(ValueError, match="arrays of one shape"):
        preferences.BradleyTerry().fit(np.ones((0, 3)), np.ones((0, 3)))
    with pytest.raises(ValueError, match="Unknown audience 'c'"):
        preferences.by_audience(np.ones((1, 2)), ["c"], ["a", "b"])


def test_each_audience_has_its_own_block():
    found = preferences.by_audience(np.array([[1.0, 2], [3, 4]]), ["b", "a"], ["a", "b"])
    assert found.tolist() == [[1, 2, 0, 0, 1, 2], [3, 4, 3, 4, 0, 0]]


# -- the best of n -------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=5, max_size=7, unique=True), st.integers(1, 5), st.integers(0, 1000))
def test_the_best_of_n_is_the_mean_over_all_choices(reward, n, seed):
    value = np.random.default_rng(seed).normal(size=len(reward))
    every = [max(chosen, key=lambda i: reward[i]) for chosen in combinations(range(len(reward)), n)]
    expected = value[every].mean()
    found = preferences.best_of_n([reward], [value], [n])[0, 0]
    assert found == pytest.approx(expected) == by_hand("expected_best")(np.array(reward), value, n)


def test_the_best_of_one_is_the_mean_and_of_all_the_best():
    reward, value = [[3.0, 1, 2]], [[10.0, 20, 60]]
    assert preferences.best_of_n(reward, value, [1, 3])[0].tolist() == pytest.approx([30, 10])
    with pytest.raises(ValueError, match="between 1 and 3"):
        preferences.best_of_n(reward, value, [4])
    with pytest.raises(ValueError, match="one shape"):
        preferences.best_of_n(reward, [[1.0]], [1])


# -- DPO -----------------------------------------------------------------------------------------------------------------------

WORDS = ["<pad>", "<eos>", "write", "red", "blue", "green", "coat", "bag", "warm", "good", "new"]


@pytest.fixture(scope="module")
def writer():
    """A Llama so small that it learns in a second, and its tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=4, **sizes)).eval()
    model.name_or_path = "tiny"
    return model, tokenizer


PROMPTS = ["write coat", "write bag"] * 4
CHOSEN, REJECTED = ["warm red coat", "good blue bag"] * 4, ["new green", "new green coat"] * 4


def test_log_probabilities_are_those_of_the_model(writer):
    model, tokenizer = writer
    found = preferences.log_probability(model, tokenizer, PROMPTS[:2], CHOSEN[:2], batch_size=2)
    for prompt, text, value in zip(PROMPTS, CHOSEN, found, strict=False):
        asked, written = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, text))
        written = [*written, tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = model(torch.tensor([asked + written])).logits[0].log_softmax(-1)
        expected = sum(logits[len(asked) - 1 + i, token].item() for i, token in enumerate(written))
        assert value == pytest.approx(expected, abs=1e-3)


def test_equal_prompts_are_read_once_and_the_gradient_is_that_of_separate_reading(writer):
    model, tokenizer = writer
    pairs = [
        *token_pairs(tokenizer, ["write coat"] * 3, ["warm red coat", "new", "good green coat"]),
        *token_pairs(tokenizer, ["write warm new bag"], ["blue bag"]),
    ]
    gradients = []
    for sums in (log_likelihoods(model, pairs, 0), torch.cat([log_likelihoods(model, [p], 0) for p in pairs])):
        model.zero_grad()
        (sums * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        gradients.append([sums.detach(), *(w.grad.clone() for w in model.parameters() if w.grad is not None)])
    model.zero_grad()
    losses, row = token_losses(model, pairs, 0)
    alone = -torch.zeros(4).index_add(0, row, losses.detach())
    torch.testing.assert_close(gradients[0][0], alone, rtol=1e-4, atol=1e-4)
    for together, separate in zip(*gradients, strict=True):
        torch.testing.assert_close(together, separate, rtol=1e-3, atol=1e-4)


def test_the_loss_by_hand_and_its_fixed_points():
    terms = [torch.tensor([v]) for v in (-15.0, -35.0, -20.0, -25.0)]
    assert preferences.dpo_loss(*terms, 0.1).item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert preferences.dpo_loss(*terms, 0.1).item() == pytest.approx(by_hand("dpo")(-15, -35, -20, -25, 0.1))
    same = torch.tensor([-3.0])
    assert preferences.dpo_loss(same, same, same, same, 5.0).item() == pytest.approx(math.log(2))
    lost = [torch.tensor([v]) for v in (-60.0, -90.0, -20.0, -25.0)]  # both unlikely, yet a smaller loss: the trap
    assert preferences.dpo_loss(*lost, 0.1) < preferences.dpo_loss(*terms, 0.1)


def test_dpo_prefers_the_chosen_text_leaves_the_writer_alone_and_keeps_the_best_state(writer):
    model, tokenizer = writer
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    measured = iter([0.0, 5.0, 1.0, 2.0])
    options = {"steps": 24, "batch_size": 4, "learning_rate": 0.05, "rank": 4, "top_layers": 1.0, "progress": False}
    tuned, history = preferences.prefer(model, tokenizer, PROMPTS, CHOSEN, REJECTED, **options)
    gap = lambda m: np.subtract(  # noqa: E731
        *(preferences.log_probability(m, tokenizer, PROMPTS, t) for t in (CHOSEN, REJECTED))
    ).mean()
    assert (
        gap(tuned) > gap(model) + 2 and history.margin.iloc[-1] > 0.2 and history.loss[0] == pytest.approx(math.log(2))
    )
    assert history.chosen.iloc[-1] > 0  # the anchor
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    seen = []

    def watch(m):
        seen.append(gap(m))
        return {"kept": next(measured)}

    tuned, history = preferences.prefer(
        model, tokenizer, PROMPTS, CHOSEN, REJECTED, watch=watch, every=8, keep="kept", **options
    )
    assert history.step[history.kept.notna()].tolist() == [0, 8, 16, 24]
    assert gap(tuned) == pytest.approx(seen[1], abs=1e-3) and abs(seen[1] - seen[3]) > 0.1


def test_a_prompt_with_many_pairs_comes_in_parts(writer):
    n = 20
    texts = preferences._Texts(
        *writer, ["write coat"] * n + ["write bag"], CHOSEN[:1] * (n + 1), REJECTED[:1] * (n + 1)
    )
    batches = texts.batches(1, np.random.default_rng(0))
    assert sorted(np.concatenate(batches)) == list(range(n + 1)) and max(map(len, batches)) == 8
    assert len(texts.tokens) == 4, "equal texts are read once"


def test_the_anchor_keeps_the_chosen_text_likely(writer):
    model, tokenizer = writer
    options = {"steps": 40, "batch_size": 4, "learning_rate": 0.05, "rank": 4, "top_layers": 1.0, "progress": False}
    gains = {
        a: preferences.prefer(model, tokenizer, PROMPTS, CHOSEN, REJECTED, anchor=a, **options)[1] for a in (0.0, 3.0)
    }
    assert gains[3.0].chosen.iloc[-1] > gains[0.0].chosen.iloc[-1]


def test_dpo_says_what_is_wrong(writer):
    with pytest.raises(ValueError, match="beta > 0"):
        preferences.prefer(*writer, PROMPTS, CHOSEN, REJECTED, beta=0)
    with pytest.raises(ValueError, match="watch where keep names"):
        preferences.prefer(*writer, PROMPTS, CHOSEN, REJECTED, keep="reward")
    with pytest.raises(ValueError, match="8 prompts do not match 1 targets"):
        preferences.prefer(*writer, PROMPTS, CHOSEN[:1], REJECTED)
    with pytest.raises(ValueError, match="is empty or not a text"):
        preferences.prefer(*writer, PROMPTS, ["", *CHOSEN[1:]], REJECTED)


# -- headlines -----------------------------------------------------------------------------------------------------------------


def variants(**changes):
    """Two tests of one story and one of another."""
    table = {
        "test_id": ["a", "a", "a", "b", "b", "c", "c"],
        "headline": ["One", "Two", "Three", "One", "Four", "Five", "Six"],
        "lede": ["la", "la", "la", "lb", "lb", "lc", "lc"],
        "picture": ["p", "p", "q", "p", "p", "p", "p"],
        "impressions": [1000] * 7,
        "clicks": [10, 40, 20, 10, 10, 5, 30],
        "week": [201420] * 7,
    }
    return pd.DataFrame(table | changes)


def test_pairs_of_headlines_by_hand():
    pairs, report = headlines.headline_pairs(variants())
    assert pairs[["winner", "loser"]].to_numpy().tolist() == [
        ["Two", "One"],
        ["One", "Four"],
        ["Six", "Five"],
    ]  # Three has another picture
    assert pairs.z[0] == pytest.approx(0.03 / math.sqrt(0.025 * 0.975 * 2 / 1000)) and pairs.lift[0] == pytest.approx(3)
    assert pairs.story[0] == pairs.story[1] != pairs.story[2]  # they share the headline "One"
    assert report["significant pairs"] == 2 and report["tests"] == 3


def test_doubtful_tests_are_left_out():
    pairs, report = headlines.headline_pairs(variants(week=[201330] * 3 + [201420] * 4))
    assert report["in the doubtful window"] == 1 and set(pairs.test_id) == {"b", "c"}
    pairs, report = headlines.headline_pairs(variants(impressions=[1000] * 5 + [500, 1500]))
    assert report["shown unequally"] == 1 and set(pairs.test_id) == {"a", "b"}
    with pytest.raises(ValueError, match="no pair"):
        headlines.headline_pairs(variants(picture=list("abcdefg")))
    with pytest.raises(ValueError, match=r"column\(s\) week"):
        headlines.headline_pairs(variants().drop(columns="week"))
