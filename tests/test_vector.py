"""N rows: the same as N single rows, one reward call a step, refilled in the step that ends an episode."""

import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit, TransformReward

from textenv import EndReason, TextEnv, TextVectorEnv
from textenv.lanes import Lanes

EOS = 0
PROMPTS = ["a", "bc", "def", "ghij", "k"]


class Recorder:
    """A reward function that keeps its calls; what it returns depends on all that it gets."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompt, preds, done):
        self.calls.append((preds.lane, str(prompt), preds.ids.tolist(), done))
        preds.state["seen"] = preds.state.get("seen", 0) + 1
        return {"tokens": len(prompt) * sum(preds.ids), "state": 100.0 * preds.state["seen"], "end": 1000.0 * done}


class Batches(TextEnv):
    """Keeps the batches that its reward got. (The env keeps no state; a list that a test gives it may.)"""

    seen = None

    def get_rewards(self, prompts, preds, dones):
        self.seen.append([(one.lane, str(prompt), done) for prompt, one, done in zip(prompts, preds, dones)])
        return [float(len(one)) for one in preds]


def same_info(a, b):
    a, b = dict(a), dict(b)
    a["episode"], b["episode"] = ({key: one["episode"][key] for key in "rl"} for one in (a, b))
    return a == b


def random_actions(env, n_lanes, random):
    """Letters, and the end token often enough that episodes end in both ways."""
    actions = random.integers(1, len(env.tokenizer), size=n_lanes)
    actions[random.random(n_lanes) < 0.25] = EOS
    return actions


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
    with pytest.raises(ValueError, match="Expected at least one lane, got 0"):
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
    """SB3 adds to the rewards it is given and keeps observations for a step."""
    careful, careless = (TextVectorEnv(make_env(PROMPTS, reward=Recorder(), max_new_tokens=3), 3) for _ in range(2))
    expected, _ = careful.reset(seed=1)
    observations, _ = careless.reset(seed=1)
    for actions in ([1, EOS, 2], [3, 4, 5], [6, 7, EOS], [8, 9, 9]):
        assert np.array_equal(observations, expected)
        observations[:] = 7
        careless.idle[:] = True
        observations, rewards, terminated, truncated, infos = careless.step(np.array(actions))
        expected, expected_rewards, *_ = careful.step(np.array(actions))
        assert np.array_equal(rewards, expected_rewards)
        for array in (rewards, terminated, truncated, *(one for one in infos.get("final_obs", []) if one is not None)):
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


def test_late_scores_are_one_call_and_bring_the_infos_up_to_date(make_env):
    env = make_env(["a", "b", "c"], cls=Batches, order="sequential", max_new_tokens=9, score_at="rollout_end")
    env.seen = []
    lanes = Lanes(env, 3)
    lanes.defer_scores = True
    lanes.reset(seed=0)
    early = lanes.step(np.array([1, EOS, 1]))
    late = lanes.step(np.array([EOS, 1, EOS]))
    assert env.seen == [] and not early.rewards.any() and not late.rewards.any()
    assert late.infos[0]["episode"]["r"] == 0.0
    assert lanes.score_unscored() == [(1, 1.0), (0, 2.0), (2, 2.0)]
    assert env.seen == [[(1, "b", True), (0, "a", True), (2, "c", True)]]
    assert [info["episode"]["r"] for info in (early.infos[1], late.infos[0], late.infos[2])] == [1.0, 2.0, 2.0]
    assert lanes.score_unscored() == []


def test_a_reset_drops_what_waits_for_a_score(make_env):
    lanes = Lanes(make_env(score_at="rollout_end"), 1)
    lanes.defer_scores = True
    lanes.reset(seed=0)
    lanes.step(np.array([EOS]))
    lanes.reset()
    assert lanes.score_unscored() == []


def test_late_scores_fill_in_the_parts(make_env):
    lanes = Lanes(make_env(["a"], reward=Recorder(), score_at="rollout_end"), 1)
    lanes.defer_scores = True
    lanes.reset(seed=0)
    info = lanes.step(np.array([EOS])).infos[0]
    assert info["reward_parts"] == {}
    lanes.score_unscored()
    assert info["reward_parts"] == {"tokens": 0.0, "state": 100.0, "end": 1000.0}
    assert info["episode"]["r"] == 1100.0


# N rows are N single rows


@pytest.mark.parametrize("score_at", ["step", "done"])
@pytest.mark.parametrize("length_limit", ["terminate", "truncate"])
def test_n_rows_are_n_single_rows(make_env, score_at, length_limit):
    env = make_env(
        PROMPTS, reward=Recorder(), max_new_tokens=5, score_at=score_at, length_limit=length_limit, stop_strings=["e"]
    )
    lanes, random = Lanes(env, 4), np.random.default_rng(0)
    lanes.reset(seed=0)
    singles = [make_env(PROMPTS, reward=Recorder(), max_new_tokens=5, score_at=score_at, length_limit=length_limit,
                        stop_strings=["e"]) for _ in range(4)]  # fmt: skip
    for single, prompt in zip(singles, lanes.prompts):
        single.reset(options={"prompts": [prompt.row]})
    reasons = set()
    for _ in range(60):
        actions = random_actions(env, 4, random)
        result = lanes.step(actions)
        for lane, single in enumerate(singles):
            observation, reward, terminated, truncated, info = single.step(actions[lane])
            assert np.array_equal(observation, result.final_observations.get(lane, result.observations[lane]))
            assert (reward, terminated, truncated) == (
                result.rewards[lane], result.terminated[lane], result.truncated[lane]
            )  # fmt: skip
            if terminated or truncated:
                assert same_info(info, result.infos[lane])
                reasons.add(info["end_reason"])
                observation, _ = single.reset(options={"prompts": [lanes.prompts[lane].row]})
                assert np.array_equal(observation, result.observations[lane])
    assert reasons == {EndReason.EOS, EndReason.LENGTH, EndReason.STOP}


def test_c10_the_rewards_of_the_steps_add_up(make_env):
    lanes, random = Lanes(make_env(PROMPTS, reward=Recorder()), 3), np.random.default_rng(0)
    lanes.reset(seed=0)
    sums, n_ended = np.zeros(3), 0
    for _ in range(40):
        result = lanes.step(random_actions(lanes.env, 3, random))
        sums += result.rewards
        for lane in result.final_observations:
            assert result.infos[lane]["episode"]["r"] == sums[lane] == sum(result.infos[lane]["reward_parts"].values())
            sums[lane], n_ended = 0.0, n_ended + 1
    assert n_ended > 10


# The prompts' order, and rows that a reset is given


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
    reward = Recorder()
    envs = TextVectorEnv(make_env(["zzz"], reward=reward), 2)
    observations, _ = envs.reset(options={"prompts": ["a", "b", "c"]})
    assert observations[:, 0].tolist() == [1, 2] and not envs.idle.any()
    observations, *_ = envs.step(np.array([EOS, 5]))
    assert observations[0].tolist() == [3, -2] + 6 * [-1]
    observations, _, _, _, infos = envs.step(np.array([1, EOS]))
    assert envs.idle.tolist() == [False, True] and observations[1].tolist() == [-2] + 7 * [-1]
    assert infos["final_info"]["prompt"][1] == "b"
    reward.calls.clear()
    observations, rewards, terminated, truncated, infos = envs.step(np.array([EOS, EOS]))
    assert rewards[1] == 0 and not terminated[1] and not truncated[1] and observations[1, 0] == -2
    assert reward.calls == [(0, "c", [1, EOS], True)]
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


# Saving running episodes


class Chatty(TextEnv):
    def get_reward(self, prompt, preds, done):
        preds.state["seen"] = preds.state.get("seen", 0) + 1
        return {"tokens": float(sum(preds.ids)), "state": float(preds.state["seen"]), "turns": float(len(preds.turns))}

    def respond(self, prompt, preds):
        preds.state.setdefault("log", []).append(preds.text)
        return None if len(preds.turns) == 3 else "ok"


def run(lanes, n_steps, random):
    return [lanes.step(random_actions(lanes.env, lanes.n_lanes, random)) for _ in range(n_steps)]


def assert_same_results(first, second):
    n_ended = 0
    for a, b in zip(first, second, strict=True):
        for name in ("observations", "rewards", "terminated", "truncated"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
        for one, other in zip(a.infos, b.infos, strict=True):
            assert bool(one) == bool(other)
            if one:
                n_ended += 1
                assert same_info(one, other)
    assert n_ended > 5


@pytest.mark.parametrize("rows", [None, ["x", {"prompt": "y", "label": 1}, "z", [5]] * 4], ids=["own", "given"])
def test_saved_episodes_go_on_the_same(make_env, rows):
    def make():
        return Lanes(make_env(PROMPTS, cls=Chatty, max_new_tokens=8, max_turns=4, max_response_tokens=2), 3)

    lanes = make()
    lanes.reset(seed=0, prompts=rows)
    run(lanes, 7, np.random.default_rng(0))
    arrays, meta = lanes.state_dict()
    assert any(meta["closed"]) and any(meta["states"]) and lanes.generated.any()  # in the middle of something
    text, saved = json.dumps(meta), {name: array.copy() for name, array in arrays.items()}
    expected = run(lanes, 30, np.random.default_rng(1))
    # What was saved is a copy, and says the same after a trip through JSON.
    assert json.dumps(meta) == text and all(np.array_equal(arrays[name], saved[name]) for name in arrays)
    for state in (meta, json.loads(text)):
        fresh = make()
        observations = fresh.load_state_dict(arrays, state)
        assert np.array_equal(observations, saved["tokens"])
        assert_same_results(run(fresh, 30, np.random.default_rng(1)), expected)
    assert json.dumps(meta) == text and all(np.array_equal(arrays[name], saved[name]) for name in arrays)


def test_given_rows_are_saved_under_any_column(make_env):
    lanes = Lanes(make_env([{"q": "a"}], prompt_column="q"), 1)
    lanes.reset(seed=0, prompts=["b"])
    lanes.load_state_dict(*lanes.state_dict())
    assert lanes.prompts == ["b"]


def test_saving_wants_a_reset_and_every_score(make_env):
    lanes = Lanes(make_env(score_at="rollout_end"), 1)
    with pytest.raises(RuntimeError, match="saved after `reset` and between rollouts"):
        lanes.state_dict()
    lanes.defer_scores = True
    lanes.reset(seed=0)
    lanes.step(np.array([EOS]))
    with pytest.raises(RuntimeError, match="with every episode scored"):
        lanes.state_dict()
    lanes.score_unscored()
    lanes.state_dict()


def test_what_was_saved_elsewhere_is_refused(make_env):
    lanes = Lanes(make_env(PROMPTS), 2)
    lanes.reset(seed=0)
    saved = lanes.state_dict()
    with pytest.raises(ValueError, match=r"shape \(3, 9\) \(lanes, width\), got \(2, 9\)"):
        Lanes(make_env(PROMPTS), 3).load_state_dict(*saved)
    with pytest.raises(ValueError, match="Expected the 5 prompts of the saved run, got 4"):
        Lanes(make_env(PROMPTS[:4]), 2).load_state_dict(*saved)
