"""Groups of samples: how prompts are given to groups, advantages within a group, and episodes that wait for theirs."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import KLPenalty, LateScores, SampleGroups, SequenceRolloutBuffer
from agents.callbacks.checkpoints import Checkpoints
from agents.callbacks.episode_metrics import EpisodeMetrics
from agents.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from agents.checkpoints.manifest import CheckpointError
from agents.rollout.advantages import group_advantages, penalty_advantages
from tests.helpers.training import TOKENIZER, Recorder, Trained, run_state, tiny_agent, tiny_config, tiny_env
from textenv import TextEnv
from textenv.lanes.lanes import Lanes

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")
EOS = 0


# Advantages by hand


def test_advantages_by_hand():
    returns, groups = np.array([1.0, 10.0, 0.0, 10.0, 5.0, 10.0]), np.array([0, 4, 0, 4, 0, 4])
    mean = group_advantages(returns, groups, "grpo_mean")
    np.testing.assert_allclose(mean, [-1, 0, -2, 0, 3, 0])
    # RLOO subtracts the mean of the other members: for the return 1 it is 2.5, for 0 it is 3, for 5 it is 0.5.
    np.testing.assert_allclose(group_advantages(returns, groups, "rloo"), [-1.5, 0, -3, 0, 4.5, 0])
    deviation = np.sqrt((1 + 4 + 9) / 2)
    np.testing.assert_allclose(group_advantages(returns, groups, "grpo"), mean / deviation, rtol=1e-4)


@pytest.mark.parametrize("advantage", ["grpo", "grpo_mean", "rloo"])
def test_equal_returns_and_lone_episodes_have_exactly_no_advantage(advantage):
    returns, groups = np.array([0.1, 0.1, 0.1, 7.0, 1e9, 1e9]), np.array([0, 0, 0, 1, 2, 2])
    assert group_advantages(returns, groups, advantage).tolist() == [0.0] * 6
    assert group_advantages(np.zeros(0), np.zeros(0), advantage).shape == (0,)


def test_noise_is_not_blown_up():
    small = group_advantages(np.array([1.0, 1.0 + 1e-7]), np.zeros(2), "grpo")
    assert np.isfinite(small).all() and np.abs(small).max() < 1e-3


def test_d8_penalties_are_charged_to_the_tokens_before_them_by_hand():
    """From token t on, the first two texts still pay 0.6, 0.5, 0.3 and 0.2, 0.1; the third has a group of its own."""
    parts, groups = [np.array([0.1, 0.2, 0.3]), np.array([0.1, 0.1]), np.array([5.0, 5.0])], np.array([0, 0, 1])
    for advantage, scale in (("grpo", 1), ("grpo_mean", 1), ("rloo", 2)):
        first, second, alone = penalty_advantages(parts, groups, advantage)
        np.testing.assert_allclose(first, scale * np.array([-0.2, -0.2, -0.15]), atol=1e-12)
        np.testing.assert_allclose(second, scale * np.array([0.2, 0.2]), atol=1e-12)
        assert alone.tolist() == [0.0, 0.0]
        equal = penalty_advantages([np.array([0.1, 0.7])] * 3, np.zeros(3), advantage)
        assert np.concatenate(equal).tolist() == [0.0] * 6


@pytest.mark.parametrize("advantage", ["grpo", "grpo_mean", "rloo"])
def test_d8_of_equal_scores_the_penalty_alone_is_left_in_the_size_of_its_coefficient(advantage):
    """All scores are 1, where the deviation of a group would be that of its divergences: about 1 after its division."""
    sizes = {}
    for coef in (0.0, 0.001, 0.1):
        env = tiny_env(lambda prompt, preds, done: float(done), max_new_tokens=6, samples_per_prompt=4, stop_ids=())
        model = ranked_agent(advantage, env=env, n_envs=8, n_steps=6, lm=tiny_config(initializer_range=0.3))
        trained = Trained()
        model.learn(48, callback=[KLPenalty(coef, reference=tiny_config(initializer_range=0.5)), trained])
        sizes[coef] = np.array([row[1] for row in trained.rollouts[0]])
    assert not sizes[0.0].any()
    assert 1e-4 < sizes[0.001].std() < 0.01
    np.testing.assert_allclose(sizes[0.1], 100 * sizes[0.001], rtol=1e-4, atol=1e-7)


# Prompts of groups


def deal_by_hand(prompts, n, n_lanes, ends):
    """Return the finished (prompt, group) pairs by a plain queue, from which each lane takes its next prompt."""
    coming = [(prompt, number) for number, prompt in enumerate(prompts * 20) for _ in range(n)]
    lanes = [coming.pop(0) for _ in range(n_lanes)]
    finished = []
    for step in ends:
        for lane in sorted(step):
            finished.append(lanes[lane])
            lanes[lane] = coming.pop(0)
    return finished


@pytest.mark.parametrize(("n", "n_lanes"), [(3, 5), (4, 2), (2, 4), (1, 3)])
def test_groups_are_dealt_as_by_hand(make_env, n, n_lanes):
    prompts, random = ["a", "b", "c"], np.random.default_rng(0)
    env = make_env(prompts, samples_per_prompt=n, order="sequential", max_new_tokens=50)
    lanes = Lanes(env, n_lanes)
    lanes.reset(seed=0)
    ends = [set(np.flatnonzero(random.random(n_lanes) < 0.3).tolist()) for _ in range(40)]
    finished = []
    for step in ends:
        result = lanes.step(np.array([EOS if lane in step else 1 for lane in range(n_lanes)]))
        finished += [(str(info["prompt"]), info["group"]) for info in result.infos if info]
    assert finished == deal_by_hand(prompts, n, n_lanes, ends) and len(finished) > 15


def test_one_row_has_the_same_prompt_in_consecutive_episodes(make_env):
    env = make_env(["a", "b", "c"], samples_per_prompt=3, max_new_tokens=1)
    seen = []
    for episode in range(9):
        env.reset(seed=0 if episode == 0 else None)
        info = env.step(1)[4]
        seen.append((str(info["prompt"]), info["group"]))
    assert [group for _, group in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sorted(prompt for prompt, _ in seen) == list("aaabbbccc") and len(set(seen)) == 3
    env.reset(seed=0)
    assert env.step(1)[4]["group"] == 0  # a reset with a seed begins again


def test_rows_given_to_reset_run_once_each_as_groups_of_one(make_env):
    lanes = Lanes(make_env(samples_per_prompt=4, max_new_tokens=1), 2)
    lanes.reset(seed=0, prompts=["x", "y", "z"])
    infos = [info for _ in range(3) for info in lanes.step(np.array([1, 1])).infos if info]
    assert [str(info["prompt"]) for info in infos] == ["x", "y", "z"]
    assert len({info["group"] for info in infos}) == 3 and lanes.idle.all()


def test_samples_per_prompt_is_checked(make_env):
    with pytest.raises(ValueError, match="Expected `samples_per_prompt` to be at least 1, got 0"):
        make_env(samples_per_prompt=0)


def test_saved_groups_go_on_the_same(make_env):
    """Half-finished groups and episodes that wait for their score survive JSON."""

    def make():
        def reward(prompt, preds, done):
            return {"n": float(len(preds)), "seen": float(preds.state["seen"])}

        lanes = Lanes(make_env(["a", "bc", "d"], reward=reward, samples_per_prompt=3, score_at="rollout_end",
                               max_new_tokens=6), 4)  # fmt: skip
        lanes.begin_rollout(defer_scores=True)
        return lanes

    def run(lanes, random):
        seen = []
        for _ in range(6):
            for _ in range(4):
                for episode in lanes.state.episodes:
                    episode.state["seen"] = episode.state.get("seen", 0) + 1
                actions = np.where(random.random(4) < 0.3, EOS, random.integers(1, 9, size=4))
                seen += [(info["group"], info["text"]) for info in lanes.step(actions).infos if info]
            seen += [(ended_at, info["group"], info["text"], score) for ended_at, info, score in lanes.score_unscored()]
        return seen

    lanes = make()
    lanes.reset(seed=0)
    run(lanes, np.random.default_rng(3))
    arrays, meta = lanes.state_dict()
    assert meta["waiting"] and 0 < meta["dealt"]["left"] < 3
    text = json.dumps(meta)
    expected = run(lanes, np.random.default_rng(1))
    fresh = make()
    fresh.load_state_dict(arrays, json.loads(text))
    assert run(fresh, np.random.default_rng(1)) == expected and len(expected) > 20
    other = Lanes(make_env(["a", "bc", "d"], samples_per_prompt=2, max_new_tokens=6), 4)
    with pytest.raises(ValueError, match="Expected samples_per_prompt=3, as the saved run has, got 2"):
        other.load_state_dict(arrays, meta)


# Scores of whole groups, and training on them


class Ranked(TextEnv):
    """Scores a text by its rank in its group, and keeps the rows of each call in `calls`."""

    calls: list = []

    def get_rewards(self, prompts, preds, dones):
        self.calls.append([(str(prompt), text.group, text.text) for prompt, text in zip(prompts, preds)])
        groups = defaultdict(list)
        for text in preds:
            groups[text.group].append(sum(text.ids))
        return [float(sum(sum(text.ids) > other for other in groups[text.group])) for text in preds]


def ranked(n=3, **kwargs):
    cls = type("Ranked", (Ranked,), {"calls": []})
    rows = [{"prompt": "abcdef"[:i], "max_new_tokens": i + 1} for i in range(1, 6)]
    return cls(rows, TOKENIZER, max_new_tokens=7, samples_per_prompt=n, score_at="rollout_end", **kwargs)


def ranked_agent(advantage="grpo_mean", n=3, n_envs=7, n_steps=5, env=None, **kwargs):
    kwargs.setdefault("rollout_buffer_kwargs", {"advantage": advantage, "normalize_advantage": False})
    return tiny_agent(env or ranked(n), n_envs=n_envs, n_steps=n_steps, **kwargs)


def test_members_are_scored_in_one_call_and_stand_together():
    env, recorder = ranked(), Recorder()
    ranked_agent(env=env).learn(35 * 6, callback=recorder)
    assert len(env.calls) == 6
    scored = [row for call in env.calls for row in call]
    for call in env.calls:
        groups = [group for _, group, _ in call]
        assert len(groups) % 3 == 0
        assert all(len(set(groups[i : i + 3])) == 1 for i in range(0, len(groups), 3))
        assert len(set(groups)) == len(groups) // 3
    ended = [info for step in recorder.infos for info in step if info]
    counts = defaultdict(int)
    for info in ended:
        counts[info["group"]] += 1
    whole = {group for group, count in counts.items() if count == 3}
    assert {group for _, group, _ in scored} == whole and len(whole) > 8
    assert sorted(scored) == sorted((str(i["prompt"]), i["group"], i["text"]) for i in ended if i["group"] in whole)
    assert all(info["scored"] == (info["group"] in whole) for info in ended)
    late = [i for i in range(6) for info in recorder.infos[5 * i] + recorder.infos[5 * i + 1] if info]
    assert late  # the control: lanes ended at different steps


def whole_groups(recorder, n, n_steps=5):
    """Return, by rollout, the groups whose last member ended in it, with (info, transitions) of each member."""
    members = defaultdict(list)
    for info, transitions in recorder.episodes():
        members[info["group"]].append((info, transitions))
    rollouts = defaultdict(list)
    for group in members.values():
        if len(group) == n:
            last = max(transitions[-1][0] for _, transitions in group)
            rollouts[last // n_steps].append(group)
    return rollouts


@pytest.mark.parametrize("advantage", ["grpo", "grpo_mean", "rloo"])
def test_every_token_gets_its_episodes_advantage_once_its_group_is_whole(advantage):
    model, recorder, trained = ranked_agent(advantage), Recorder(), Trained()
    model.learn(35 * 7, callback=[KLPenalty(0.5), recorder, trained])
    log_probs, penalties = recorder.stacked("log_probs"), recorder.stacked("penalties")
    assert np.abs(penalties[5:]).mean() > 0.01
    rollouts = whole_groups(recorder, 3)
    straddling = 0
    for i in range(7):
        expected = []
        for group in rollouts[i]:
            straddling += len({transitions[-1][0] // 5 for _, transitions in group}) > 1
            each = group_advantages(np.array([info["episode"]["r"] for info, _ in group]), np.zeros(3), advantage)
            charged = [[penalties[transition] for transition in transitions] for _, transitions in group]
            for a, (_, transitions), charges in zip(each, group, charged):
                for t, transition in enumerate(transitions):
                    mean = sum(sum(other[t:]) for other in charged) / 3
                    scale = 3 / 2 if advantage == "rloo" else 1
                    expected.append((log_probs[transition], a + scale * (mean - sum(charges[t:]))))
        got = sorted(row[:2] for row in trained.rollouts[i])
        np.testing.assert_allclose(got, sorted((float(p), float(a)) for p, a in expected), atol=1e-4)
    assert straddling > 3 and any(len(rows) for rows in rollouts.values())


def test_scores_that_come_late_reach_all_tokens_with_a_critic_too():
    """With gamma = lambda = 1, every token's return is its episode's score, however late the group was complete."""
    model = ranked_agent("gae", rollout_buffer_kwargs={"normalize_advantage": False}, gae_lambda=1.0)
    assert model.rollout_buffer.complete_episodes
    recorder, trained = Recorder(), Trained()
    model.learn(35 * 6, callback=[recorder, trained])
    log_probs = recorder.stacked("log_probs")
    for i, groups in whole_groups(recorder, 3).items():
        expected = [
            (float(log_probs[p]), info["episode"]["r"]) for g in groups for info, transitions in g for p in transitions
        ]
        got = [(log_prob, value) for log_prob, _, value, _ in trained.rollouts[i]]
        np.testing.assert_allclose(sorted(got), sorted(expected), atol=1e-4)


def test_logs_count_an_episode_when_its_score_has_come():
    model, recorder = ranked_agent(), Recorder()
    logged = []

    class Note(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            logged.append(self.logger.name_to_value["reward/task"])

    env = model.get_env().env
    model.learn(35 * 5, callback=[EpisodeMetrics(), Note(), recorder])
    for mean, call in zip(logged, env.calls):
        ids = {(group, text) for _, group, text in call}
        infos = [info for step in recorder.infos for info in step if info and (info["group"], info["text"]) in ids]
        assert mean == pytest.approx(np.mean([info["episode"]["r"] for info in infos]))
    scored = [info for step in recorder.infos for info in step if info and info["scored"]]
    assert len(model.ep_info_buffer) == len(scored) < 100
    assert sum(info["r"] for info in model.ep_info_buffer) == pytest.approx(sum(i["episode"]["r"] for i in scored))


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_e8_resumed_with_groups_that_wait(advantage, tmp_path):
    """Bit for bit, from a checkpoint in which finished episodes wait for their group, with and without scores."""

    def build(**kwargs):
        return ranked_agent(advantage, rollout_buffer_kwargs={"advantage": advantage}, **kwargs)

    model, whole = build(), Recorder()
    model.learn(35 * 6, callback=[KLPenalty(0.1), whole, Checkpoints(tmp_path, every=3)])
    expected = run_state(model)
    assert model.rollout_buffer.waiting_episodes and model.get_env().lanes.waiting
    resumed, rest = build(seed=5), Recorder()
    load_checkpoint(resumed, tmp_path / f"step_{35 * 3:012d}")
    assert resumed.rollout_buffer.waiting_episodes and resumed.get_env().lanes.waiting
    resumed.learn(35 * 3, callback=[KLPenalty(0.1), rest], reset_num_timesteps=False)
    assert run_state(resumed) == expected
    assert [e["r"] for e in resumed.ep_info_buffer] == [e["r"] for e in model.ep_info_buffer]
    assert np.array_equal(rest.stacked("rewards"), whole.stacked("rewards")[15:])


def test_a_checkpoint_of_other_groups_is_refused(tmp_path):
    save_checkpoint(_learned(ranked_agent()), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="Expected samples_per_prompt=3"):
        load_checkpoint(ranked_agent(n=2), tmp_path / "saved")


def _learned(model):
    model.learn(35)
    return model


# After a reset or an interrupt


class Stop(BaseCallback):
    def __init__(self, n_steps):
        super().__init__()
        self.n_steps = n_steps

    def _on_step(self):
        return self.n_calls < self.n_steps


@pytest.mark.parametrize(("score_at", "reset"), [("done", False), ("rollout_end", False), ("rollout_end", True)])
def test_a_broken_off_rollout_or_a_reset_leaves_no_half_group(score_at, reset):
    env = ranked()
    env.score_at = score_at
    model = ranked_agent(env=env, n_envs=12, n_steps=6)
    model.learn(1000, callback=Stop(15))  # in the third rollout
    recorder, trained = Recorder(), Trained()
    model.learn(72 * 7, callback=[recorder, trained], reset_num_timesteps=reset)
    log_probs = recorder.stacked("log_probs")
    rollouts = whole_groups(recorder, 3, n_steps=6)
    for i, rows in enumerate(trained.rollouts):
        expected = [float(log_probs[p]) for group in rollouts[i] for _, transitions in group for p in transitions]
        if reset or i > 2:  # earlier rollouts train only episodes that the recorder saw from their start
            assert sorted(row[0] for row in rows) == pytest.approx(sorted(expected))
        assert {row[0] for row in rows} <= set(log_probs.flatten().tolist())
    buffer, lanes = model.rollout_buffer, model.get_env().lanes
    alive = lanes.open_groups()
    assert {episode.group for episode in buffer.waiting_episodes.values()} <= alive
    assert {episode.group for episode in lanes.waiting} <= alive and not lanes.unscored


# Refusals


def test_settings_without_their_groups_are_refused():
    with pytest.raises(ValueError, match=r"Expected `advantage` to be one of \['gae', 'grpo', .* got 'ppo'"):
        tiny_agent(rollout_buffer_kwargs={"advantage": "ppo"})
    with pytest.raises(ValueError, match="Expected normalize_advantage=False with advantage='grpo'"):
        tiny_agent(rollout_buffer_kwargs={"advantage": "grpo", "normalize_advantage": True})
    with pytest.raises(ValueError, match="Expected samples_per_prompt of 2 or more in the env, got 1"):
        tiny_agent(rollout_buffer_kwargs={"advantage": "rloo"})
    env = tiny_env(samples_per_prompt=2, length_limit="truncate")
    with pytest.raises(ValueError, match="Expected length_limit='terminate' with advantage='rloo', got 'truncate'"):
        tiny_agent(env, rollout_buffer_kwargs={"advantage": "rloo"})
    with pytest.raises(ValueError, match=r"complete_episodes=True\), got False"):
        tiny_agent(tiny_env(samples_per_prompt=2), rollout_buffer_kwargs={"complete_episodes": False})


@pytest.mark.parametrize("score_at", ["done", "rollout_end"])
def test_a_missing_step_is_asked_for(score_at):
    model = tiny_agent(tiny_env(samples_per_prompt=2, score_at=score_at), rollout_buffer_kwargs={"advantage": "grpo"})
    buffer = model.rollout_buffer
    buffer.before_returns = []
    buffer.expected_steps.clear()
    with pytest.raises(RuntimeError, match="Expected the step SampleGroups with"):
        model.learn(16, callback=LateScores() if score_at == "rollout_end" else None)
    model.learn(16, callback=SampleGroups() if score_at == "done" else [LateScores(), SampleGroups()])


def test_the_order_of_callbacks_does_not_matter():
    model = ranked_agent()
    model.learn(35, callback=[KLPenalty(0.1), LateScores(), SampleGroups()])
    names = [type(step).__name__ for step in model.rollout_buffer.before_returns]
    assert names == ["SampleGroups", "LateScores", "KLPenalty"]


def test_a_group_needs_no_critic():
    """With vf_coef=0 no gradient reaches the critic, whose weights stay zero."""
    model = ranked_agent("rloo", vf_coef=0.0)
    model.learn(35 * 3)
    assert not model.policy.lm.critic.linear.weight.any()
    assert isinstance(model.rollout_buffer, SequenceRolloutBuffer) and not model.rollout_buffer.normalize_advantage
    assert torch.isfinite(torch.cat([weight.flatten() for weight in model.policy.parameters()])).all()
