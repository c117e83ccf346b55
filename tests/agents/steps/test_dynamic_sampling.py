"""Dynamic sampling: groups of equal scores are not trained, the others wait for a batch by the same policy (D11)."""

import itertools
import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback

from agents import DropEpisodes, EngineRollouts, KLPenalty, LateScores, RewardShaping, SampleGroups
from agents.callbacks.checkpoints import Checkpoints
from agents.checkpoints.checkpoint import load_checkpoint
from agents.configuration.config import AlgorithmConfig, TrainConfig
from agents.rollout.advantages import group_advantages
from agents.rollout.dynamic_sampling import DynamicSampling, with_signal
from agents.runs.score_steps import score_steps
from tests.helpers.engines import InProcess
from tests.helpers.training import (
    Recorder,
    Trained,
    run_state,
    same_weights,
    tiny_agent,
    tiny_config,
    tiny_env,
    weights,
)
from textenv import AllowedMask
from textenv.rewards import DROPPED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning"),
    pytest.mark.filterwarnings("ignore:No group of . samples had different scores"),
]
LANES, STEPS = 7, 5


def odd(prompt, preds, done):
    """Reward texts whose ids have a sum that 3 divides: of two such texts the scores are often equal."""
    return float(done and sum(preds.ids) % 3 == 0)


def some_dropped(prompt, preds, done):
    return DROPPED if done and sum(preds.ids) % 5 == 1 else odd(prompt, preds, done)


def build(reward=odd, n=2, score_at="done", algorithm=PPO, advantage="grpo_mean", seed=0, **kwargs):
    env_kwargs = {"mask": AllowedMask(tuple(range(33)))} if algorithm is MaskablePPO else {}
    rows = [{"prompt": "abcdef"[:i], "max_new_tokens": i + 1} for i in range(1, 6)]
    env = tiny_env(reward, rows, 7, samples_per_prompt=n, score_at=score_at, **env_kwargs)
    settings = {"batch_size": LANES * STEPS} if algorithm is MaskablePPO else {}
    pull = {"ent_coef": 0.1, "vf_coef": 0.5} if algorithm is not TRPO else {}
    return tiny_agent(
        env, LANES, algorithm, n_steps=STEPS, rollout_buffer_kwargs={"advantage": advantage}, seed=seed,
        **{**settings, **pull, **kwargs},
    )  # fmt: skip


class Figures(BaseCallback):
    """Keeps the weights before each rollout, and its figures of groups."""

    def _on_training_start(self):
        self.weights, self.rows = [], []

    def _on_rollout_start(self):
        self.weights.append(weights(self.model))

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        logged = self.logger.name_to_value
        self.rows.append({name[7:]: value for name, value in logged.items() if name.startswith("groups/")})


def by_hand(recorder, n, min_groups, max_rollouts, n_rollouts):
    """Return what each rollout trains, as (log-probability, advantage) pairs, and its figures: from the infos alone."""
    log_probs, members = recorder.stacked("log_probs"), defaultdict(list)
    for info, transitions in recorder.episodes():
        members[info["group"]].append((info, transitions))
    became_whole = defaultdict(list)
    for group in members.values():
        if len(group) == n:
            became_whole[max(places[-1][0] for _, places in group) // STEPS].append(group)
    waiting, n_waited, trained, figures = [], 0, [], []
    for i in range(n_rollouts):
        kept = [[(info, places) for info, places in group if not info["dropped"]] for group in became_whole[i]]
        fresh = [group for group in kept if len({info["episode"]["r"] for info, _ in group}) > 1]
        lost = [group for group, left in zip(became_whole[i], kept) if left not in fresh]
        waiting, n_waited = waiting + fresh, n_waited + 1
        is_full = len(waiting) >= min_groups or n_waited == max_rollouts
        pairs = []
        for group in waiting if is_full else []:
            each = group_advantages(
                np.array([info["episode"]["r"] for info, _ in group]), np.zeros(len(group)), "grpo_mean"
            )
            pairs += [(float(log_probs[place]), float(a)) for a, (_, places) in zip(each, group) for place in places]
        trained.append(sorted(pairs))
        tokens = sum(len(places) for group in lost for _, places in group)
        row = {"dropped": len(lost), "extra_tokens": tokens, "trained": len(waiting) if is_full else 0}
        if kept:
            row["signal"] = len(fresh) / len(kept)
        figures.append(row)
        if is_full:
            waiting, n_waited = [], 0
    return trained, figures


@pytest.mark.parametrize("score_at", ["done", "rollout_end"])
@pytest.mark.parametrize(("reward", "n"), [(odd, 2), (odd, 3), (some_dropped, 3)])
@pytest.mark.parametrize(("min_groups", "max_rollouts"), [(4, 9), (30, 3), (1, 1)])
def test_d11_trained_are_the_groups_with_a_signal_of_all_rollouts_since_the_last_update(
    reward, n, score_at, min_groups, max_rollouts
):
    model, recorder, trained, figures = build(reward, n, score_at), Recorder(), Trained(), Figures()
    step = SampleGroups(min_groups, max_rollouts)
    drop = [DropEpisodes()] if score_at == "done" else [LateScores()]
    model.learn(12 * LANES * STEPS, callback=[step, *drop, recorder, trained, figures])
    pairs, rows = by_hand(recorder, n, min_groups, max_rollouts, 12)
    updates = [i for i, expected in enumerate(pairs) if expected]
    assert len(updates) > 2 and sum(row["dropped"] for row in rows) > 4
    assert figures.rows == rows
    for i, (got, expected) in enumerate(zip(trained.rollouts, pairs)):
        if expected:
            np.testing.assert_allclose(sorted(row[:2] for row in got), expected, atol=1e-6)
        else:
            assert not any(row[1] for row in got)
        if i + 1 < 12:  # an update without a batch changes nothing, although entropy, values and momentum pull
            assert same_weights(figures.weights[i], figures.weights[i + 1]) == (not expected)
    assert model.num_timesteps == 12 * LANES * STEPS


@pytest.mark.parametrize("algorithm", [PPO, A2C, MaskablePPO])
def test_d11_what_waited_was_sampled_by_the_policy_that_is_updated(algorithm):
    """The ratio of the first step is 1, for tokens of all rollouts of the batch: of texts that fill the rollouts."""
    mask = {"mask": AllowedMask(tuple(range(33)))} if algorithm is MaskablePPO else {}
    env = tiny_env(odd, max_new_tokens=4, samples_per_prompt=2, stop_ids=(), **mask)
    settings = {} if algorithm is A2C else {"batch_size": 32}
    model = tiny_agent(env, 8, algorithm, rollout_buffer_kwargs={"advantage": "grpo"}, **settings)
    seen, figures = [], Figures()

    class Ratios(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            buffer = self.model.rollout_buffer
            if len(buffer.trained):
                (samples,) = buffer.get()
                with torch.no_grad():
                    now = self.model.policy.evaluate_actions(samples.observations, samples.actions)[1]
                seen.append((len(now), float((now - samples.old_log_prob).abs().max())))

    model.learn(9 * 32, callback=[SampleGroups(100, 3), Ratios(), figures])
    assert len(seen) == 3 and max(apart for _, apart in seen) < 1e-5
    assert max(n for n, _ in seen) > 32, "of several rollouts"
    assert not same_weights(figures.weights[0], figures.weights[3])


def test_where_every_group_has_a_signal_it_is_the_run_without():
    """The same bits, with a batch that each rollout fills; the control is a batch that takes several."""

    def run(*steps):
        scores, figures = itertools.count(), Figures()
        model = build(lambda prompt, preds, done: float(next(scores)) if done else 0.0, advantage="grpo")
        model.learn(5 * LANES * STEPS, callback=[*steps, KLPenalty(0.1), figures])
        assert {row.get("signal", 1.0) for row in figures.rows} == {1.0}
        return weights(model)

    usual = run()
    assert same_weights(usual, run(SampleGroups())) and same_weights(usual, run(SampleGroups(1, 1)))
    assert not same_weights(usual, run(SampleGroups(9)))


@pytest.mark.parametrize("score_at", ["done", "rollout_end"])
def test_e8_resumed_in_the_middle_of_waiting(score_at, tmp_path):
    """Bit for bit, with the groups that wait and the number of rollouts towards the bound."""

    def steps():
        return [SampleGroups(100, 4), RewardShaping(scale=True, overlong_tokens=2), KLPenalty(0.1)]

    model = build(score_at=score_at)
    model.learn(10 * LANES * STEPS, callback=[*steps(), Checkpoints(tmp_path, every=1, keep=20)])
    resumed = build(score_at=score_at, seed=5)
    load_checkpoint(resumed, tmp_path / f"step_{6 * LANES * STEPS:012d}")  # two of four rollouts wait
    waiting = resumed.rollout_buffer.waiting_episodes
    assert len({place[0] // STEPS for place in waiting}) > 1 and len(waiting) > 4
    resumed.learn(4 * LANES * STEPS, callback=steps(), reset_num_timesteps=False)
    assert run_state(resumed) == run_state(model)
    # The control: without the number of rollouts, the update would come two rollouts later.
    other = build(score_at=score_at, seed=5)
    load_checkpoint(other, tmp_path / f"step_{6 * LANES * STEPS:012d}")
    other.rollout_buffer.before_returns[0].dynamic.n_rollouts = 0
    other.learn(4 * LANES * STEPS, callback=steps(), reset_num_timesteps=False)
    assert run_state(other)["tensors"] != run_state(model)["tensors"]


def test_an_engines_log_probabilities_wait_with_their_groups():
    model = build(lm=tiny_config())
    model.learn(2 * LANES * STEPS, callback=[SampleGroups(100, 9), EngineRollouts(InProcess(heat=0.5))])
    waiting = model.rollout_buffer.waiting_episodes
    assert waiting and not any(episode.part.is_by_policy for episode in waiting.values())


def test_a_bound_without_any_signal_is_warned_of_and_waiting_is_not():
    def constant(prompt, preds, done):
        return 1.0 if done else 0.0

    model = build(constant)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(2 * LANES * STEPS, callback=SampleGroups(4, 3))
    before = weights(model)
    with pytest.warns(UserWarning, match=r"No group of 2 samples had different scores in max_rollouts=3 rollouts"):
        model.learn(LANES * STEPS, callback=SampleGroups(4, 3), reset_num_timesteps=False)
    assert same_weights(before, weights(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(LANES * STEPS, callback=SampleGroups(4, 3), reset_num_timesteps=False)


def test_groups_with_a_signal_by_hand():
    scores, groups = np.array([1.0, 5.0, 1.0, 0.1 + 0.2, 0.3, 2.0]), np.array([4, 0, 4, 7, 7, 0])
    assert with_signal(scores, groups) == {0, 7}
    assert with_signal(np.zeros(0), np.zeros(0)) == set()


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="Expected `min_groups` to be at least 1 or None, got 0"):
        SampleGroups(0)
    with pytest.raises(ValueError, match="Expected `max_rollouts` to be at least 1, got 0"):
        DynamicSampling(2, 0)
    with pytest.raises(ValueError, match=r"Expected an advantage within groups with min_groups.*got 'gae'"):
        SampleGroups(2).attach(build(advantage="gae"))
    with pytest.raises(ValueError, match="MaskablePPO or A2C with min_groups, got TRPO"):
        SampleGroups(2).attach(build(algorithm=TRPO))


def test_the_configuration_has_it():
    assert score_steps(TrainConfig()) == []
    (step,) = score_steps(TrainConfig(algorithm=AlgorithmConfig(min_groups=3, max_rollouts=2)))
    assert isinstance(step, SampleGroups) and (step.dynamic.min_groups, step.dynamic.max_rollouts) == (3, 2)
