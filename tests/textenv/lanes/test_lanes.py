"""`Lanes`, the array core: equality with single rows, late scores, and saved running episodes."""

import json

import numpy as np
import pytest

from textenv import EndReason, TextEnv
from textenv.lanes.lanes import Lanes

EOS = 0
PROMPTS = ["a", "bc", "def", "ghij", "k"]


def depends_on_all(prompt, preds, done):
    preds.state["seen"] = preds.state.get("seen", 0) + 1
    return {"tokens": len(prompt) * sum(preds.ids), "state": 100.0 * preds.state["seen"], "end": 1000.0 * done}


class Batches(TextEnv):
    """An env that appends the batches of its reward to `seen`, a list that the test provides."""

    seen = None

    def get_rewards(self, prompts, preds, dones):
        self.seen.append([(text.lane, str(prompt), done) for prompt, text, done in zip(prompts, preds, dones)])
        return [float(len(text)) for text in preds]


def same_info(a, b):
    a, b = dict(a), dict(b)
    del a["group"], b["group"]  # all lanes share one count, and each single row has its own
    a["episode"], b["episode"] = ({key: info["episode"][key] for key in "rl"} for info in (a, b))
    return a == b


def random_actions(env, n_lanes, random):
    """Letters, and the end token often enough that episodes end in both ways."""
    actions = random.integers(1, len(env.tokenizer), size=n_lanes)
    actions[random.random(n_lanes) < 0.25] = EOS
    return actions


# N rows are N single rows


@pytest.mark.parametrize("score_at", ["step", "done"])
@pytest.mark.parametrize("length_limit", ["terminate", "truncate"])
def test_n_rows_are_n_single_rows(make_env, score_at, length_limit):
    rules = {"score_at": score_at, "length_limit": length_limit, "stop_strings": ["e"], "max_new_tokens": 5}
    env, *singles = [make_env(PROMPTS, reward=depends_on_all, **rules) for _ in range(5)]
    lanes, random = Lanes(env, 4), np.random.default_rng(0)
    lanes.reset(seed=0)
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
    lanes, random = Lanes(make_env(PROMPTS, reward=depends_on_all), 3), np.random.default_rng(0)
    lanes.reset(seed=0)
    sums, n_ended = np.zeros(3), 0
    for _ in range(40):
        result = lanes.step(random_actions(lanes.env, 3, random))
        sums += result.rewards
        for lane in result.final_observations:
            assert result.infos[lane]["episode"]["r"] == sums[lane] == sum(result.infos[lane]["reward_parts"].values())
            sums[lane], n_ended = 0.0, n_ended + 1
    assert n_ended > 10


# Scores that come late


def test_late_scores_are_one_call_and_complete_the_infos(make_env):
    env = make_env(["a", "b", "c"], cls=Batches, order="sequential", max_new_tokens=9, score_at="rollout_end")
    env.seen = []
    lanes = Lanes(env, 3)
    lanes.begin_rollout(defer_scores=True)
    lanes.reset(seed=0)
    early = lanes.step(np.array([1, EOS, 1]))
    late = lanes.step(np.array([EOS, 1, EOS]))
    assert env.seen == [] and not early.rewards.any() and not late.rewards.any()
    assert late.infos[0]["episode"]["r"] == 0.0
    scores = [(position, value) for position, _, value in lanes.score_unscored()]
    assert scores == [((0, 1), 1.0), ((1, 0), 2.0), ((1, 2), 2.0)]
    assert env.seen == [[(1, "b", True), (0, "a", True), (2, "c", True)]]
    assert [info["episode"]["r"] for info in (early.infos[1], late.infos[0], late.infos[2])] == [1.0, 2.0, 2.0]
    assert lanes.score_unscored() == []


def test_a_reset_drops_unscored_episodes(make_env):
    lanes = Lanes(make_env(score_at="rollout_end"), 1)
    lanes.begin_rollout(defer_scores=True)
    lanes.reset(seed=0)
    lanes.step(np.array([EOS]))
    lanes.reset()
    assert lanes.score_unscored() == []


def test_late_scores_fill_in_the_parts(make_env):
    lanes = Lanes(make_env(["a"], reward=depends_on_all, score_at="rollout_end"), 1)
    lanes.begin_rollout(defer_scores=True)
    lanes.reset(seed=0)
    info = lanes.step(np.array([EOS])).infos[0]
    assert info["reward_parts"] == {}
    lanes.score_unscored()
    assert info["reward_parts"] == {"tokens": 0.0, "state": 100.0, "end": 1000.0}
    assert info["episode"]["r"] == 1100.0


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
        for first_info, second_info in zip(a.infos, b.infos, strict=True):
            assert bool(first_info) == bool(second_info)
            if first_info:
                n_ended += 1
                assert same_info(first_info, second_info)
    assert n_ended > 5


@pytest.mark.parametrize("rows", [None, ["x", {"prompt": "y", "label": 1}, "z", [5]] * 4], ids=["own", "given"])
def test_saved_episodes_continue_equally(make_env, rows):
    def make():
        return Lanes(make_env(PROMPTS, cls=Chatty, max_new_tokens=8, max_turns=4, max_response_tokens=2), 3)

    lanes = make()
    lanes.reset(seed=0, prompts=rows)
    run(lanes, 7, np.random.default_rng(0))
    arrays, meta = lanes.state_dict()
    assert any(meta["closed"]) and any(meta["states"]) and lanes.state.generated.any()  # in the middle of episodes
    text, saved = json.dumps(meta), {name: array.copy() for name, array in arrays.items()}
    expected = run(lanes, 30, np.random.default_rng(1))
    # The saved state is a copy, and equal after a trip through JSON.
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


def test_saving_needs_a_reset_and_every_score(make_env):
    lanes = Lanes(make_env(score_at="rollout_end"), 1)
    with pytest.raises(RuntimeError, match="saved after `reset` and between rollouts"):
        lanes.state_dict()
    lanes.begin_rollout(defer_scores=True)
    lanes.reset(seed=0)
    lanes.step(np.array([EOS]))
    with pytest.raises(RuntimeError, match="with every episode scored"):
        lanes.state_dict()
    lanes.score_unscored()
    lanes.state_dict()


def test_a_state_of_other_lanes_or_prompts_is_refused(make_env):
    lanes = Lanes(make_env(PROMPTS), 2)
    lanes.reset(seed=0)
    saved = lanes.state_dict()
    with pytest.raises(ValueError, match=r"shape \(3, 9\) \(lanes, width\), got \(2, 9\)"):
        Lanes(make_env(PROMPTS), 3).load_state_dict(*saved)
    with pytest.raises(ValueError, match="Expected the 5 prompts of the saved run, got 4"):
        Lanes(make_env(PROMPTS[:4]), 2).load_state_dict(*saved)
