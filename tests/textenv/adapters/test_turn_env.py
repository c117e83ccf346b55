"""`TurnEnv`, games of turns as token environments: observations, rewards, limits and refusals."""

import random
import warnings
from functools import partial

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from tests.helpers.games import EOS, TOKENIZER, Guess, guess_env, noise_env, write
from tests.helpers.games import begin as begin_game
from tests.helpers.training import Recorder, tiny_agent, tiny_config
from tests.textenv.prompts.test_chat import CHATML, END, template_ids, tokenizer_with
from textenv import EndReason, TextEnv, check_text_env
from textenv.adapters import GameError, TurnEnv

NUMBERS = [random.Random(seed).randint(1, 9) for seed in range(50)]
FOUR = NUMBERS.index(4)  # the seed of a game whose number is 4
begin = partial(begin_game, seed=FOUR)


# Turns, replies, rewards


def test_an_episode_by_hand():
    env = begin(guess_env())
    steps = write(env, "2/9/4/")
    encode = TOKENIZER.encode
    opening, up, down = encode("guess "), encode(" up "), encode(" down ")
    assert env.observation_space.shape == (len(opening) + 1 + 24,)
    rows = [[*encode("2"), EOS, *up], [*encode("9"), EOS, *down], [*encode("4"), EOS]]
    seen = [*opening, -2, *rows[0], *rows[1], *rows[2]]
    assert steps[-1][0].tolist() == seen + [-1] * (len(steps[-1][0]) - len(seen))
    assert steps[1][0][len(opening) + 1 :].tolist()[: len(rows[0])] == rows[0]
    assert [step[1] for step in steps] == [0.0, 0.125, 0.0, 0.125, 0.0, 1.0]  # a turn's reward falls on its last token
    assert [step[2:4] for step in steps] == [(False, False)] * 5 + [(True, False)]
    info = steps[-1][4]
    assert info["end_reason"] is EndReason.ENV and info["text"] == "2\n9\n4"
    assert info["episode"] == {"r": 1.25, "l": 6}


@pytest.mark.parametrize(
    ("text", "turns"),
    [("12/3/", ["12", "3"]), ("12.3.", ["12", "3"]), ("123456", ["123", "456"]), ("//", ["", ""]), ("..", ["", ""])],
)
def test_a_turn_ends_by_eos_stop_string_or_its_limit(text, turns):
    env = begin(guess_env(partial(Guess, max_turns=2), stop=["."]))
    steps = write(env, text)
    assert steps[-1][3] and steps[-1][4]["text"].split("\n") == turns


def test_the_games_limit_truncates_unless_the_game_ends_too():
    steps = write(begin(guess_env(partial(Guess, max_turns=2))), "1/2/")
    assert steps[-1][1:4] == (0.125, False, True) and steps[-1][4]["end_reason"] is EndReason.LENGTH
    steps = write(begin(guess_env(partial(Guess, max_turns=2))), "1/4/")  # terminated and truncated in one step
    assert steps[-1][1:4] == (1.0, True, False) and steps[-1][4]["end_reason"] is EndReason.ENV


@pytest.mark.parametrize(("room", "n_turns"), [(3, 1), (8, 1), (9, 2), (14, 2), (15, 3)])
def test_room_for_a_whole_turn_is_reserved_else_the_episode_is_truncated(room, n_turns):
    """A turn "1/" and its reply " up " take 6 tokens; after a reply, 3 tokens must be left for the next turn."""
    env = begin(guess_env(max_new_tokens=room))
    steps = []
    while not steps or not any(steps[-1][2:4]):
        steps += write(env, "1/")
    assert len(steps) == 2 * n_turns and steps[-1][1:4] == (0.125, False, True)
    assert steps[-1][4]["end_reason"] is EndReason.LENGTH
    assert [step[1] for step in steps] == [0.0, 0.125] * n_turns


def test_a_win_with_the_very_last_token_counts():
    env = begin(guess_env(max_new_tokens=9))
    assert write(env, "1/004")[-1][1:4] == (0.125, False, True)  # "004" takes all tokens that are left, and is not "4"
    env = begin(guess_env(turn_tokens=1, max_new_tokens=6))
    assert write(env, "14")[-1][1:4] == (1.0, True, False)


def test_one_turn_may_take_all_tokens():
    env = begin(guess_env(turn_tokens=3, max_new_tokens=3))
    assert write(env, "4/")[-1][1:4] == (1.0, True, False)


def test_a_game_gets_turns_without_white_space_around_them():
    """Word tokenizers and SentencePiece write a space in front of every word."""
    assert write(begin(guess_env()), " 4/")[-1][1:4] == (1.0, True, False)


def test_outcome_has_the_games_info():
    seen = []

    class Look(TurnEnv):
        def get_reward(self, prompt, preds, done):
            if done:
                seen.append(self.outcome(prompt, preds).info)
            return super().get_reward(prompt, preds, done)

    write(begin(Look(Guess, TOKENIZER, n_games=2)), "1/4/")
    assert seen == [{"n_turns": 2}]


# The chat template's continuation


class Say:
    def reset(self, *, seed):
        return "hello there", {}

    def step(self, text):
        return "go on", 0.5, False, False, {}


def chat_env():
    return TurnEnv(Say, tokenizer_with(CHATML), chat=True, turn_tokens=8, max_new_tokens=400, n_games=1, stop_ids=[END])


def test_replies_are_the_chat_templates_continuation():
    env = chat_env()
    tokenizer = env.tokenizer
    env.reset()
    words = [*tokenizer.encode("a b"), END], tokenizer.encode("abcdefgh")  # the second turn ends at its limit
    for token in (*words[0], *words[1]):
        observation = env.step(token)[0]
    messages = [{"role": "user", "content": "hello there"}]
    for text in ("a b", "abcdefgh"):
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "go on"}]
    assert observation[observation >= 0].tolist() == template_ids(tokenizer, messages)


def test_history_is_never_encoded_again():
    """Observations only grow, also with texts that encode to other tokens."""
    env = chat_env()
    rng = np.random.default_rng(0)
    for _ in range(6):
        observation, _ = env.reset()
        ends = False
        while not ends:
            before = observation[observation != -1]
            observation, _, *ended, _ = env.step(rng.choice([END, *range(4, 40)]))
            ends = any(ended)
            assert np.array_equal(observation[: len(before)], before)


# Training


def test_advantages_are_of_the_policys_own_tokens():
    """There is one transition per token of the policy; its return is the sum of the episode's later rewards."""
    env = noise_env(max_new_tokens=20)
    lm = tiny_config(vocab_size=len(TOKENIZER), n_positions=64)
    model = tiny_agent(env, lm=lm, n_envs=4, n_steps=40, gae_lambda=1.0, learning_rate=0.0)
    recorder = Recorder()
    model.learn(4 * 40, callback=recorder)
    buffer = model.rollout_buffer
    n_episodes = 0
    for info, positions in recorder.episodes():
        rewards = [recorder.rewards[0][position] for position in positions]
        assert len(positions) == info["episode"]["l"] and sum(rewards) == pytest.approx(info["episode"]["r"], abs=1e-5)
        if info["end_reason"] is EndReason.ENV:  # nothing is bootstrapped at a terminal end
            n_episodes += 1
            returns = [buffer.returns[position] for position in positions]
            assert returns == pytest.approx(np.cumsum(rewards[::-1])[::-1].tolist(), abs=1e-5)
    assert n_episodes > 5


# Conformance


@pytest.mark.parametrize("make", [guess_env, noise_env, partial(guess_env, stop=["."]), chat_env])
def test_check_envs(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_text_env(make())
        gymnasium_check_env(make(), skip_render_check=True)
        sb3_check_env(make(), warn=True)


# Refusals


class Wrong(Guess):
    result = None

    def step(self, text):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (ValueError("lost"), r"seed \d+ raised ValueError\('lost'\) at '1', after \[\]"),
        (("up", 0.0, False), "`step` of Wrong to return text, reward, terminated, truncated and info"),
        ((3, 0.0, False, False, {}), "`step` of Wrong to return text"),
    ],
)
def test_a_wrong_step_is_named(monkeypatch, result, message):
    monkeypatch.setattr(Wrong, "result", result)
    with pytest.raises(GameError, match=message):
        write(begin(guess_env(Wrong)), "1/")


def test_a_wrong_reset_is_named():
    class Bare(Guess):
        def reset(self, *, seed):
            return "text alone"

    class Broken(Guess):
        def reset(self, *, seed):
            raise ValueError("lost")

    with pytest.raises(GameError, match="`reset` of Bare to return a text and an info"):
        guess_env(Bare)
    with pytest.raises(GameError, match="seed 0 raised at its start: ValueError"):
        guess_env(Broken)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"game": Guess()}, "`game` to make games, one for each lane, got one game"),
        ({"game": 3}, "`game` to be a class"),
        ({"n_games": 0}, "`n_games` to be at least 1"),
        ({"turn_tokens": 0}, r"`turn_tokens` in \[1, max_new_tokens=24\]"),
        ({"turn_tokens": 25}, r"`turn_tokens` in \[1, max_new_tokens=24\]"),
    ],
)
def test_what_cannot_work_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        guess_env(**kwargs)


@pytest.mark.parametrize("row", ["text", {"prompt": "text"}, {"seed": -1}, {"seed": "1"}, [1, 2]])
def test_a_row_is_a_seed(row):
    with pytest.raises(ValueError, match=r"Expected a row \{'seed': n\} with n >= 0"):
        guess_env().reset(options={"prompts": [row]})


def test_turn_tokens_needs_respond():
    for kwargs in ({}, {"max_turns": 3, "max_response_tokens": 2}):
        with pytest.raises(ValueError, match="`turn_tokens` where `respond` is defined"):
            TextEnv(["a"], TOKENIZER, reward=lambda *row: 0.0, turn_tokens=2, **kwargs)
