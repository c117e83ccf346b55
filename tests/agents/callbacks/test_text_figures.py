"""The figures of a rollout's texts and prompts, worked out by hand."""

import numpy as np
import pytest

from agents.callbacks.text_figures import TextFigures, repeated_pairs, signal_share, text_figures
from tests.agents.diagnosis.bank.model import TEMPLATE, tokenizer
from tests.helpers.training import tiny_env
from textenv import Prompt, TextEnv


def info(prompt, text, reward):
    return {"prompt": prompt, "text": text, "episode": {"r": reward, "l": 1}}


def figures_of(env, infos):
    return text_figures([TextFigures(env).read(row) for row in infos])


def test_the_figures_by_hand():
    cut, whole = Prompt("ab", n_cut=2), Prompt("cd")
    infos = [info(cut, "a a a", 3.0), info(whole, " ", 1.0), info(whole, "b", 1.0), info(whole, "b", 3.0)]
    assert figures_of(tiny_env(), infos) == pytest.approx(
        {
            "episode/count": 4,
            "episode/reward_std": 1.0,
            "text/blank": 0.25,
            "text/repetition": 0.125,  # of "a a a" the second pair, of the others none
            "text/distinct": 0.75,
            "prompt/cut": 0.25,
            "prompt/largest_share": 0.75,
            "prompt/signal_share": 0.75,
        }
    )


@pytest.mark.parametrize(
    ("text", "share"), [("", 0.0), ("a", 0.0), ("a b a b", 1 / 3), ("很好很好", 1 / 3), ("aaaa", 2 / 3)]
)
def test_pairs_of_words_or_of_characters(text, share):
    assert repeated_pairs(text) == pytest.approx(share)


def test_equal_rewards_have_no_share():
    assert signal_share(["a", "b"], np.array([1.0, 1.0])) == 0.0


def test_the_tokens_that_were_cut_are_counted():
    env = tiny_env(prompts=["abcd", "a"], max_prompt_tokens=3, truncation_side="left")
    assert [prompt.n_cut for prompt in env.prompts] == [1, 0]


def test_plain_prompts_are_counted_where_the_tokenizer_has_a_template():
    chat = [{"role": "user", "content": "the film"}]
    env = TextEnv(["the film", chat], tokenizer(TEMPLATE), reward=lambda *_: 0.0, max_new_tokens=2)
    infos = [info(prompt, "x", 0.0) for prompt in (env.prompts[0], *env.prompts)]
    assert figures_of(env, infos)["prompt/plain"] == pytest.approx(2 / 3)
