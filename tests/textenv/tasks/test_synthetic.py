"""RL4LMs' synthetic tasks: rewards by hand, environments, and learning."""

import json

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.utils import LinearSchedule

from agents import evaluate, make_agent, word_tokenizer
from tests.docs.test_examples import run
from tests.helpers.models import tiny
from tests.helpers.rewards import scores
from textenv import CharTokenizer, TextEnv, check_text_env
from textenv.rewards import BatchReward
from textenv.tasks.dates import Dates
from textenv.tasks.increasing_numbers import Increasing, IncreasingNumbers

TOKENIZER = CharTokenizer("0123456789 -")
NUMBERS = word_tokenizer([str(number) for number in range(10)] + ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("text", "min_tokens", "reward"),
    [
        ("", 20, 0.0),
        ("no number at all", 20, 0.0),
        ("1 2 3", 20, 3 / 10),  # at least ten words are counted
        ("1 2 3 4 5 6 7 8 9 10", 20, 1.0),
        ("1 2 3 4 5 6 7 8 9 10 and so on", 20, 10 / 13),
        ("3 2 1", 20, 1 / 10),  # the run begins at the first number
        ("1 2 1 3 4 5", 2, 2 / 6),  # numbers after the end of the run do not count
        ("2 2", 2, 1 / 2),  # equal is not larger
        ("a 1 b 2 c", 2, 2 / 5),  # words in between do not end the run
        ("9 10 11", 6, 1.0),  # compared as numbers, not as texts
        ("-2 -1.5 1e1", 2, 1.0),
        ("7, 8", 2, 1 / 2),  # "7," is no number
        ("1 inf", 2, 1.0),
        ("1 nan 2", 2, 1 / 3),  # nan is neither larger nor smaller
        ("nan 1", 2, 1 / 2),
        ("  1\n2\t3 ", 2, 1.0),
        ("1 2", 5, 2 / 2.5),  # half of an odd number
    ],
)
def test_increasing_numbers_by_hand(text, min_tokens, reward):
    assert Increasing(min_tokens).score_row(None, type("Text", (), {"text": text})) == pytest.approx(reward)


def test_the_reward_is_of_finished_texts_and_checked():
    assert scores(Increasing(), ["1 2", "b"]) == [0.2, 0.0]
    assert Increasing().score_at == "done"
    with pytest.raises(ValueError, match="`min_tokens` to be positive, got 0"):
        Increasing(0)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("2014-03-07", 1.0),
        ("due on 2014-03-07 at noon, or 2015-01-01", 1.0),
        ("120140-2014-03-078", 1.0),  # anywhere in the text
        ("9999-99-99", 1.0),  # invalid dates count
        ("2014-3-7", 0.0),
        ("2014/03/07", 0.0),
        ("14-03-07", 0.0),
        ("2014 -03-07", 0.0),
        ("", 0.0),
    ],
)
def test_dates_by_hand(text, reward):
    assert scores(Dates(TOKENIZER).reward, [text]) == [reward]


@pytest.mark.parametrize(
    ("name", "cls", "n_tokens", "text"),
    [("IncreasingNumbers", IncreasingNumbers, 20, "1 2 3 4 5 6 7 8 9 10"), ("Dates", Dates, 30, "on 2014-03-07")],
)
def test_the_environments_have_ids_and_need_a_tokenizer_alone(name, cls, n_tokens, text):
    tokenizer = CharTokenizer("0123456789 -on")
    env = gym.make(f"textenv/{name}-v0", tokenizer=tokenizer).unwrapped
    assert type(env) is cls and env.rules.max_new_tokens == n_tokens
    assert [prompt.ids.tolist() for prompt in env.prompts] == [[tokenizer.eos_token_id]]
    check_text_env(env)
    env.reset(seed=0)
    steps = [env.step(token) for token in [*tokenizer.encode(text), tokenizer.eos_token_id][:n_tokens]]
    assert steps[-1][2] and steps[-1][4]["episode"]["r"] == pytest.approx(1.0)
    assert all(reward == 0 for _, reward, *_ in steps[:-1])
    envs = gym.make_vec(f"textenv/{name}-v0", num_envs=2, tokenizer=tokenizer)
    assert envs.reset(seed=0)[0].shape == (2, 1 + 1 + n_tokens)


@pytest.mark.parametrize("cls", [IncreasingNumbers, Dates])
def test_a_tokenizer_without_an_end_token_needs_prompts(cls):
    tokenizer = CharTokenizer("12 ")
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match=r"tokenizer with an end token.*pass `prompts`"):
        cls(tokenizer)
    assert [str(prompt) for prompt in cls(tokenizer, ["1", "2"]).prompts] == ["1", "2"]


class Shuffled(BatchReward):
    """A control: the rewards of a rollout are shuffled over its texts."""

    score_at = "rollout_end"

    def __init__(self, reward):
        self.reward, self.rng = reward, np.random.default_rng(0)

    def score(self, prompts, preds, dones):
        return list(self.rng.permutation(np.array(self.reward.score(prompts, preds, dones), dtype=float)))


@pytest.mark.slow
@pytest.mark.parametrize("is_control", [False, True])
def test_increasing_numbers_are_learned_and_not_from_shuffled_rewards(is_control):
    env = IncreasingNumbers(NUMBERS, max_new_tokens=6, min_tokens=8)
    trained_on = TextEnv([[0]], NUMBERS, reward=Shuffled(env.reward), max_new_tokens=6) if is_control else env
    config = tiny(vocab_size=len(NUMBERS), n_layer=1, n_embd=32, initializer_range=0.1)
    options = dict(batch_size=384, learning_rate=LinearSchedule(5e-3, 0.0, 1.0), target_kl=0.1, seed=0, device="cpu")
    model = make_agent(trained_on, config, n_envs=128, **options)
    before = evaluate(model, [[0]], NUMBERS, n=200, env=env).figures["reward"].value
    model.learn(30 * model.n_steps * model.n_envs)
    after = evaluate(model, [[0]], NUMBERS, n=200, env=env).figures["reward"].value
    assert before < 0.35
    assert after < 0.45 if is_control else after > 0.85


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    printed = run("examples/synthetic.py", "--smoke", "--out", tmp_path, "--task", "dates", "--control")
    assert "| random weights |" in printed and "| most possible | 1.000 |" in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0 <= figures["before"] <= 1 and figures["tokens"] >= 2048
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "evaluation.json").read_text())["n"] == 200
