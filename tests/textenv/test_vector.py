"""`TextVectorEnv`: equality with single rows, one reward call per step, and refills within the step."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit, TransformReward

from textenv import EndReason, TextEnv, TextVectorEnv

EOS = 0
PROMPTS = ["a", "bc", "def", "ghij", "k"]


def by_length(prompt, preds, done):
    return float(len(prompt) + len(preds))


class Batches(TextEnv):
    """An env that appends the batches of its reward to `seen`, a list that the test provides."""

    seen = None

    def get_rewards(self, prompts, preds, dones):
        self.seen.append([(text.lane, str(prompt), done) for prompt, text, done in zip(prompts, preds, dones)])
        return [float(len(text)) for text in preds]


# The interface


def test_gym_make_vec(char_tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = gym.make_vec(
            "textenv/Text-v0",
            num_envs=3,
            prompts=["a"],
            tokenizer=char_tokenizer,
            reward=lambda prompt, preds, done: 2.0,
            max_new_tokens=2,
        )
    assert isinstance(envs, TextVectorEnv) and envs.num_envs == 3
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    observations, infos = envs.reset(seed=0)
    assert observations in envs.observation_space and infos == {}
    assert envs.step(envs.action_space.sample())[1].tolist() == [2.0, 2.0, 2.0]


def test_what_gym_make_returns_is_unwrapped(char_tokenizer, make_env):
    kwargs = dict(prompts=["a"], tokenizer=char_tokenizer, reward=lambda prompt, preds, done: 0.0, max_new_tokens=2)
    env = gym.make("textenv/Text-v0", **kwargs)
    assert TextVectorEnv(env, 2).env is env.unwrapped


def test_other_wrappers_are_refused_by_name(char_tokenizer, make_env):
    with pytest.raises(TypeError, match="inside TransformReward, which the array core would bypass"):
        TextVectorEnv(TransformReward(make_env(), lambda reward: 2 * reward), 2)
    kwargs = dict(prompts=["a"], tokenizer=char_tokenizer, reward=lambda prompt, preds, done: 0.0, max_new_tokens=2)
    with pytest.raises(TypeError, match="inside TimeLimit"):
        TextVectorEnv(gym.make("textenv/Text-v0", max_episode_steps=5, **kwargs), 2)
    with pytest.raises(TypeError, match="inside TimeLimit"):
        TextVectorEnv(TimeLimit(gym.make("textenv/Text-v0", **kwargs), 5), 2)


def test_another_env_is_refused():
    with pytest.raises(TypeError, match="Expected a TextEnv, got CartPoleEnv"):
        TextVectorEnv(gym.make("CartPole-v1").unwrapped, 2)


@pytest.mark.parametrize("method", ["step", "reset"])
def test_an_overridden_step_or_reset_is_refused_with_the_way_out(make_env, method):
    cls = type("Custom", (TextEnv,), {method: lambda self, *args, **kwargs: None, "get_reward": lambda *args: 0.0})
    with pytest.raises(TypeError, match=rf"Custom overrides `{method}`.*`get_reward`.*`preds.state`.*`respond`"):
        TextVectorEnv(make_env(cls=cls), 2)


def test_no_lanes_are_refused(make_env):
    with pytest.raises(ValueError, match="Expected 1 to 65,536 lanes, got 0"):
        TextVectorEnv(make_env(), 0)


# A step, by hand


def test_a_finished_row_is_refilled_in_the_same_step(make_env):
    envs = TextVectorEnv(make_env(["a", "b", "c"], order="sequential", max_new_tokens=2), 2)
    observations, _ = envs.reset(seed=0)
    assert observations.tolist() == [[1, -2, -1, -1], [2, -2, -1, -1]]
    observations, _, terminated, truncated, infos = envs.step(np.array([5, EOS]))
    assert observations.tolist() == [[1, -2, 5, -1], [3, -2, -1, -1]]
    assert terminated.tolist() == [False, True] and truncated.tolist() == [False, False]
    assert infos["final_obs"][0] is None and infos["final_obs"][1].tolist() == [2, -2, EOS, -1]
    assert infos["_final_info"].tolist() == [False, True]
    final = {key: infos["final_info"][key][1] for key in ("text", "prompt", "end_reason")}
    assert final == {"text": "", "prompt": "b", "end_reason": EndReason.EOS}
    assert infos["final_info"]["episode"]["l"].tolist() == [0, 1]
    observations, _, terminated, _, infos = envs.step(np.array([6, 7]))
    assert observations.tolist() == [[1, -2, -1, -1], [3, -2, 7, -1]]  # after "c" the order begins anew
    assert terminated.tolist() == [True, False] and infos["final_info"]["text"][0] == "ef"


def test_no_info_while_nothing_ends(make_env):
    envs = TextVectorEnv(make_env(), 2)
    envs.reset(seed=0)
    assert envs.step(np.array([1, 2]))[4] == {}


def test_truncation_is_told_by_lane(make_env):
    envs = TextVectorEnv(make_env(["a"], max_new_tokens=2, length_limit="truncate"), 3)
    envs.reset(seed=0)
    envs.step(np.array([1, EOS, 1]))
    _, _, terminated, truncated, _ = envs.step(np.array([EOS, 1, 1]))
    assert terminated.tolist() == [True, False, False] and truncated.tolist() == [False, False, True]


def test_returned_arrays_may_be_written_to(make_env):
    """SB3 changes the rewards in place, and keeps observations for a step."""
    careful, careless = (TextVectorEnv(make_env(PROMPTS, reward=by_length, max_new_tokens=3), 3) for _ in range(2))
    expected, _ = careful.reset(seed=1)
    observations, _ = careless.reset(seed=1)
    for actions in ([1, EOS, 2], [3, 4, 5], [6, 7, EOS], [8, 9, 9]):
        assert np.array_equal(observations, expected)
        observations[:] = 7
        careless.idle[:] = True
        observations, rewards, terminated, truncated, infos = careless.step(np.array(actions))
        expected, expected_rewards, *_ = careful.step(np.array(actions))
        assert np.array_equal(rewards, expected_rewards)
        for array in (
            rewards,
            terminated,
            truncated,
            *(row for row in infos.get("final_obs", []) if row is not None),
        ):
            array[:] = 1
    assert infos["final_info"]["episode"]["r"].any()


# One reward call a step


def test_one_reward_call_a_step_with_all_rows_in_lane_order(make_env):
    env = make_env(["a", "b", "c", "d"], cls=Batches, order="sequential", max_new_tokens=9)
    env.seen = []
    envs = TextVectorEnv(env, 3)
    envs.reset(seed=0)
    rewards = [envs.step(np.array(actions))[1].tolist() for actions in ([1, 1, EOS], [EOS, 1, 1])]
    assert env.seen == [
        [(0, "a", False), (1, "b", False), (2, "c", True)],
        [(0, "a", True), (1, "b", False), (2, "d", False)],
    ]
    assert rewards == [[1.0, 1.0, 1.0], [2.0, 2.0, 1.0]]


def test_score_at_done_calls_for_the_finished_rows_only(make_env):
    env = make_env(["a", "b", "c"], cls=Batches, order="sequential", max_new_tokens=9, score_at="done")
    env.seen = []
    envs = TextVectorEnv(env, 3)
    envs.reset(seed=0)
    envs.step(np.array([1, 1, 1]))
    assert env.seen == []
    assert envs.step(np.array([EOS, 1, EOS]))[1].tolist() == [2.0, 0.0, 2.0]
    assert env.seen == [[(0, "a", True), (2, "c", True)]]


# The order of prompts, and rows given to `reset`


def test_the_cursor_advances_in_lane_order(make_env):
    envs = TextVectorEnv(make_env(PROMPTS, order="sequential"), 3)
    envs.reset(seed=0)
    assert envs.lanes.prompts == ["a", "bc", "def"]
    envs.step(np.array([EOS, 1, EOS]))
    assert envs.lanes.prompts == ["ghij", "bc", "k"]


def test_the_same_seed_gives_a_lane_and_a_single_env_the_same_order(make_env):
    env, envs = make_env(PROMPTS), TextVectorEnv(make_env(PROMPTS), 1)
    for seed in range(5):
        assert np.array_equal(env.reset(seed=seed)[0], envs.reset(seed=seed)[0][0])


def test_given_rows_run_once_each_then_lanes_are_idle(make_env):
    env = make_env(["zzz"], cls=Batches)
    env.seen = []
    envs = TextVectorEnv(env, 2)
    observations, _ = envs.reset(options={"prompts": ["a", "b", "c"]})
    assert observations[:, 0].tolist() == [1, 2] and not envs.idle.any()
    observations, *_ = envs.step(np.array([EOS, 5]))
    assert observations[0].tolist() == [3, -2] + 6 * [-1]
    observations, _, _, _, infos = envs.step(np.array([1, EOS]))
    assert envs.idle.tolist() == [False, True] and observations[1].tolist() == [-2] + 7 * [-1]
    assert infos["final_info"]["prompt"][1] == "b"
    env.seen.clear()
    observations, rewards, terminated, truncated, infos = envs.step(np.array([EOS, EOS]))
    assert rewards[1] == 0 and not terminated[1] and not truncated[1] and observations[1, 0] == -2
    assert env.seen == [[(0, "c", True)]]
    assert envs.idle.all() and not envs.step(np.array([1, 1]))[2].any()
    assert envs.reset()[0][:, 0].tolist() == [26, 26] and not envs.idle.any()


def test_given_rows_leave_the_order_where_it_was(make_env):
    envs = TextVectorEnv(make_env(PROMPTS, order="sequential"), 2)
    envs.reset(seed=0)
    envs.reset(options={"prompts": ["x"]})
    envs.reset()
    assert envs.lanes.prompts == ["def", "ghij"]


def test_a_reset_drops_given_rows_that_are_left(make_env):
    envs = TextVectorEnv(make_env(PROMPTS, order="sequential"), 2)
    envs.reset(options={"prompts": ["x", "y", "z"]})
    envs.reset()
    envs.step(np.array([EOS, EOS]))
    assert envs.lanes.prompts == ["def", "ghij"]


def test_fewer_rows_than_lanes(make_env):
    envs = TextVectorEnv(make_env(), 3)
    envs.reset(options={"prompts": ["a"]})
    assert envs.idle.tolist() == [False, True, True]


def test_render(make_env, capsys):
    envs = TextVectorEnv(make_env(["ab"], render_mode="ansi"), 2)
    envs.reset(seed=0)
    envs.step(np.array([3, 4]))
    assert envs.render() == ("ab |c", "ab |d")
    envs.render_mode = "human"
    assert envs.render() is None and capsys.readouterr().out == "ab |c\nab |d\n"
