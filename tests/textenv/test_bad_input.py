"""Refusals of bad input: what was expected, what was given and the cure; a reward's error names lane and prompt."""

import contextlib
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from textenv import CharTokenizer, RewardError, TextEnv, TextVectorEnv

EOS = 0


def no_reward(prompt, preds, done):
    return 0.0


# Prompts


def test_no_prompts(make_env):
    with pytest.raises(ValueError, match="Expected at least one prompt, got none"):
        make_env([])


def test_an_empty_prompt(make_env):
    with pytest.raises(ValueError, match="Expected prompt 1 to have at least one token, got ''"):
        make_env(["a", ""])


def test_an_empty_list_of_token_ids(make_env):
    with pytest.raises(ValueError, match=r"Expected prompt 0 to have at least one token, got \[\]"):
        make_env([[]])


def test_a_single_prompt_instead_of_a_list(make_env):
    with pytest.raises(ValueError, match=r"'The film was', which is no file. A single prompt goes into a list"):
        make_env("The film was")


def test_a_single_row_instead_of_a_list(make_env):
    with pytest.raises(ValueError, match=r"Expected `prompts` to be a list of prompts, got one mapping: {'prompt'"):
        make_env({"prompt": "a"})


@pytest.mark.parametrize("prompt", [3, None, 1.5, b"a", [1.0], ["a"], {1, 2}])
def test_a_prompt_that_is_neither_text_nor_ids(make_env, prompt):
    with pytest.raises(ValueError, match="Expected prompt 0 to be a text, a list of token ids or of messages, got"):
        make_env([prompt])


def test_a_row_without_the_column(make_env):
    with pytest.raises(
        ValueError, match=r"Expected prompt 1 to have the column 'prompt', got the columns \['text', 'label'\]"
    ):
        make_env([{"prompt": "a"}, {"text": "a", "label": 1}])


def test_a_row_without_the_references(make_env):
    with pytest.raises(ValueError, match=r"Expected prompt 0 to have the column 'answers', got the columns \['prompt'"):
        make_env([{"prompt": "a"}], references_column="answers")


def test_a_prompt_longer_than_allowed(make_env):
    with pytest.raises(
        ValueError, match=r"prompt 1 to have at most max_prompt_tokens=2 tokens, got 3: 'abc'. Raise the limit, or cut"
    ):
        make_env(["ab", "abc"], max_prompt_tokens=2)


@pytest.mark.parametrize("token", [-1, 33, 10**9])
def test_a_token_id_out_of_range(make_env, token):
    with pytest.raises(ValueError, match=rf"Expected the token ids of prompt 0 in \[0, 33\), got {token}"):
        make_env([[1, token]])


def test_characters_that_the_tokenizer_lacks(make_env):
    with pytest.raises(ValueError, match=r"Expected characters of .*, got \['é'\] in 'café'"):
        make_env(["café"])


@pytest.mark.parametrize("rows", [[], (), "ab", {"prompt": "a"}])
def test_rows_for_reset_that_are_no_list_of_some(make_env, rows):
    with pytest.raises(ValueError, match="Expected the prompts given to `reset` to be a list of one or more, got"):
        make_env().reset(options={"prompts": rows})


def test_a_row_for_reset_with_more_tokens_than_the_env_has_room_for(make_env):
    env = make_env(max_new_tokens=4)
    with pytest.raises(ValueError, match="max_new_tokens of prompt 'x' to be at most the env's, 4, got 5"):
        env.reset(options={"prompts": [{"prompt": "x", "max_new_tokens": 5}]})


def test_a_row_with_a_limit_above_the_envs(make_env):
    with pytest.raises(ValueError, match="max_new_tokens of prompt 'x' to be at most the env's, 4, got 5"):
        make_env([{"prompt": "x", "max_new_tokens": 5}], max_new_tokens=4)


# Options


@pytest.mark.parametrize("n", [0, -3])
def test_max_new_tokens_below_one(make_env, n):
    with pytest.raises(ValueError, match=f"Expected `max_new_tokens` to be at least 1, got {n}"):
        make_env(max_new_tokens=n)


@pytest.mark.parametrize("n", [0, -3])
def test_max_prompt_tokens_below_one(make_env, n):
    with pytest.raises(ValueError, match=f"Expected `max_prompt_tokens` to be at least 1, got {n}"):
        make_env(max_prompt_tokens=n, truncation_side="left")


@pytest.mark.parametrize("name", ["truncation_side", "length_limit", "score_at", "order", "render_mode"])
def test_an_unknown_choice(make_env, name):
    with pytest.raises(ValueError, match=rf"Expected `{name}` to be one of \[.*\], got 'other'"):
        make_env(**{name: "other"})


def test_stop_ids_outside_the_vocabulary(make_env):
    with pytest.raises(ValueError, match=r"Expected `stop_ids` in \[0, 33\), got 33"):
        make_env(stop_ids=[0, 33])


@pytest.mark.parametrize("end", [33, -1])
def test_an_end_token_outside_the_vocabulary_is_refused_as_stop_ids_are(make_env, end):
    tokenizer = CharTokenizer()  # 33 tokens
    tokenizer.eos_token_id = end
    with pytest.raises(ValueError, match=rf"end token in \[0, 33\), its number of tokens, got {end}, .* give stop_ids"):
        make_env(tokenizer=tokenizer)
    assert make_env(tokenizer=tokenizer, stop_ids=[]).rules.stop_ids == ()
    assert make_env(tokenizer=tokenizer, stop_ids=[32]).rules.stop_ids == (32,)


def test_an_empty_stop_string(make_env):
    with pytest.raises(ValueError, match="Expected `stop_strings` without an empty one"):
        make_env(stop_strings=["x", ""])


class Zero(TextEnv):
    def get_reward(self, prompt, preds, done):
        return 0.0


def test_no_reward_or_two(make_env):
    with pytest.raises(ValueError, match=r"Expected exactly one reward: .*; got neither"):
        make_env(reward=None)
    with pytest.raises(ValueError, match=r"Expected exactly one reward: .*; got both"):
        make_env(cls=Zero, reward=no_reward)


# Steps


def test_step_before_reset(make_env):
    with pytest.raises(RuntimeError, match="Expected `reset` before the first `step`"):
        make_env().step(1)
    with pytest.raises(RuntimeError, match="Expected `reset` before the first `step`"):
        TextVectorEnv(make_env(), 2).step(np.array([1, 1]))


def test_step_before_reset_through_gym_make(char_tokenizer):
    kwargs = dict(prompts=["a"], tokenizer=char_tokenizer, reward=no_reward, max_new_tokens=2)
    with pytest.raises(gym.error.ResetNeeded):
        gym.make("textenv/Text-v0", **kwargs).step(1)


def test_step_after_the_end(make_env):
    env = make_env()
    env.reset()
    env.step(EOS)
    with pytest.raises(RuntimeError, match="and after the end of an episode"):
        env.step(1)
    env.reset()
    env.step(1)


@pytest.mark.parametrize("action", [-1, 33])
def test_an_action_outside_the_space(make_env, action):
    env = make_env()
    env.reset()
    with pytest.raises(ValueError, match=rf"Expected token ids in \[0, 33\), got {action} in lane 0"):
        env.step(action)
    env.step(1)  # the refused action has written nothing


def test_an_action_outside_the_space_names_its_lane(make_env):
    envs = TextVectorEnv(make_env(), 3)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"got 40 in lane 2"):
        envs.step(np.array([1, 1, 40]))


@pytest.mark.parametrize("action", [1.0, np.float32(1), "a", None, True, [1, 2]])
def test_an_action_that_is_no_token_id(make_env, action):
    env = make_env()
    env.reset()
    with pytest.raises(ValueError, match=r"Expected one integer token id a lane, shape \(1,\), got"):
        env.step(action)


@pytest.mark.parametrize("actions", [[1, 2], [[1, 2, 3]], [1.0, 2.0, 3.0], 1])
def test_actions_of_another_shape_or_kind(make_env, actions):
    envs = TextVectorEnv(make_env(), 3)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"Expected one integer token id a lane, shape \(3,\), got"):
        envs.step(np.array(actions))


# Rewards: lane 1 of three gets the bad reward


@pytest.fixture
def step_with(make_env):
    """Step three lanes with a reward that returns `value` for the prompt "bad"."""

    def step(value=None, **kwargs):
        if "cls" not in kwargs:
            kwargs["reward"] = lambda prompt, preds, done: value if prompt == "bad" else 0.0
        envs = TextVectorEnv(make_env(["a", "bad", "c"], order="sequential", **kwargs), 3)
        envs.reset(seed=0)
        return envs.step(np.array([24, 25, 26]))

    return step


WHERE = r"\(lane 1, prompt 'bad', text 'y'\)"


@pytest.mark.parametrize(
    "value",
    [
        *(math.nan, math.inf, -math.inf, None, "1.0", np.str_("x"), b"1", [1.0], np.ones(2), 1j, 10**400, object()),
        *(np.complex64(1), np.array(1 + 0j), torch.tensor(1j), torch.tensor(1 + 0j), torch.tensor(1.0, device="meta")),
        torch.tensor(math.nan),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_reward_that_is_no_finite_number(step_with, value):
    with pytest.raises(RewardError, match=rf"(?s)Expected a reward to be a finite number, got .*{WHERE}"):
        step_with(value)


@pytest.mark.parametrize("value", [[1.0], (1.0,), np.array([[1.0, 2.0]]), {"style": [1.0]}])
def test_a_list_of_one_reward_is_refused_with_the_cure(step_with, value):
    with pytest.raises(RewardError, match=rf"(?s)got .*: return the number itself, not a list of one {WHERE}"):
        step_with(value)
    for other in ([1.0, 2.0], "1", {}):
        with pytest.raises(RewardError) if other else contextlib.nullcontext() as caught:
            step_with(other)
        assert other == {} or "return the number" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, None, "x"])
def test_a_part_that_is_no_finite_number(step_with, value):
    with pytest.raises(RewardError, match=rf"Expected the reward part 'style' to be a finite number, got .*{WHERE}"):
        step_with({"length": 1.0, "style": value})


@pytest.mark.parametrize("value", [1e39, -1e39, 1e16, 10**300, np.float64(1e39), {"a": 9e14, "b": 9e14}])
def test_a_reward_that_float32_cannot_square(step_with, value):
    with pytest.raises(RewardError, match=rf"at most 1e\+15 in size, whose square float32 can hold, got .*{WHERE}"):
        step_with(value)


@pytest.mark.parametrize("value", [1e39, {"a": 1e308, "b": 1e308}, 1j, torch.tensor(1.0, device="meta"), SystemExit(0)])
def test_on_failure_decides_over_them_by_row(value):
    """The other row of the call keeps its reward. Ctrl-C is not taken for a failing reward."""

    def reward(prompt, preds, done):
        if prompt != "bad":
            return 1.0
        if isinstance(value, BaseException):
            raise value
        return value

    envs = [
        TextVectorEnv(
            TextEnv(
                ["a", "bad"], CharTokenizer(), reward=reward, on_failure=choice, order="sequential", max_new_tokens=1
            ),
            2,
        )
        for choice in (-2.0, "raise")
    ]
    for vector_env in envs:
        vector_env.reset(seed=0)
    with pytest.warns(UserWarning, match="such rows earn -2"):
        assert envs[0].step(np.array([1, 1]))[1].tolist() == [1.0, -2.0]
    with pytest.raises(RewardError, match="lane 1, prompt 'bad'"):
        envs[1].step(np.array([1, 1]))
    value = KeyboardInterrupt()
    for vector_env in envs:
        vector_env.reset(seed=0)
        with pytest.raises(KeyboardInterrupt):
            vector_env.step(np.array([1, 1]))


@pytest.mark.parametrize("value", [1, True, np.float32(1), np.int64(1), np.array(1.0), {"a": 0.25, "b": 0.75}])
def test_what_counts_as_a_number(step_with, value):
    assert step_with(value)[1].tolist() == [0.0, 1.0, 0.0]


def test_a_tensor_counts_as_a_number(step_with):
    assert step_with(torch.tensor(1.0))[1].tolist() == [0.0, 1.0, 0.0]


def test_a_reward_that_raises(step_with):
    class Broken(TextEnv):
        def get_reward(self, prompt, preds, done):
            return {"a": 0.0, "c": 0.0}[str(prompt)]

    with pytest.raises(RewardError, match=rf"`get_reward` raised KeyError: 'bad' {WHERE}") as caught:
        step_with(cls=Broken)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_function_that_raises(make_env):
    def reward(prompt, preds, done):
        raise ZeroDivisionError("by nought")

    env = make_env(["ab"], reward=reward)
    env.reset()
    with pytest.raises(
        RewardError, match=r"raised ZeroDivisionError: by nought \(lane 0, prompt 'ab', text 'x'\)"
    ) as caught:
        env.step(24)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def batched(values):
    """Make a class whose `get_rewards` returns `values`, or raises it if it is an error."""

    class Batched(TextEnv):
        def get_rewards(self, prompts, preds, dones):
            if isinstance(values, Exception):
                raise values
            return values

    return Batched


def test_a_batched_reward_that_raises(step_with):
    with pytest.raises(
        RewardError,
        match=r"`get_rewards` raised OSError: gone, on 3 rows, the first of them lane 0, prompt 'a', text 'x'",
    ) as caught:
        step_with(cls=batched(OSError("gone")))
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("values", [[0.0, 0.0], np.zeros(4), [], {"a": 1.0}, "abc", 1.0, np.array(1.0), None])
def test_batched_rewards_of_the_wrong_length(step_with, values):
    with pytest.raises(RewardError, match=r"Expected `get_rewards` to return (a sequence of )?3 rewards"):
        step_with(cls=batched(values))


@pytest.mark.parametrize("values", [[0.0, math.nan, 0.0], [0.0, None, 0.0], np.array([0.0, np.inf, 0.0])])
def test_c7_a_bad_one_among_batched_rewards_is_named(step_with, values):
    with pytest.raises(RewardError, match=rf"Expected a reward to be a finite number, got .*{WHERE}"):
        step_with(cls=batched(values))


def test_a_late_score_that_is_bad_is_named_too(make_env):
    env = make_env(
        ["a", "bad"], reward=lambda prompt, preds, done: math.nan, score_at="rollout_end", order="sequential"
    )
    lanes = TextVectorEnv(env, 2).lanes
    lanes.begin_rollout(defer_scores=True)
    lanes.reset(seed=0)
    lanes.step(np.array([24, EOS]))
    with pytest.raises(RewardError, match=r"got nan \(lane 1, prompt 'bad', text ''\)"):
        lanes.score_unscored()


class ShortTokenizer(CharTokenizer):
    """Its length lacks one of its tokens."""

    def __len__(self):
        return super().__len__() - 1


def test_a_text_whose_tokens_are_outside_the_vocabulary(make_env):
    with pytest.raises(ValueError, match=r"Expected the token ids of prompt 0 in \[0, 32\), got 32"):
        make_env(["a'"], tokenizer=ShortTokenizer())


def test_a_step_after_one_that_raised(make_env):
    """A step after a failed one is refused, as the lanes may be half written."""
    env = make_env(reward=lambda prompt, preds, done: 1 / 0)
    env.reset(seed=0)
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        env.step(1)
    with pytest.raises(RuntimeError, match="or a step that raised"):
        env.step(1)
    env.reset(seed=0)
