"""`RewardShaping`: each part by hand, in the documented order, before the KL penalty, and not in the logs (C6, C9)."""

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecNormalize

from agents import KLPenalty, LMPolicy, RewardShaping, SequenceRolloutBuffer, TextVecEnv
from agents.callbacks.checkpoints import Checkpoints
from agents.callbacks.episode_metrics import EpisodeMetrics
from agents.checkpoints.checkpoint import load_checkpoint
from tests.helpers.training import TOKENIZER, Recorder, run_state, tiny_agent, tiny_config, tiny_env
from textenv import EndReason, TextEnv

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")


def letters(prompt, preds, done):
    return float(sum(preds.ids)) if done else 0.0


class Talk(TextEnv):
    def get_reward(self, prompt, preds, done):
        return 0.0

    def respond(self, prompt, preds):
        return "xy"


def env_of(score_at="done", reward=letters, **kwargs):
    return tiny_env(reward, score_at=score_at, max_new_tokens=5, stop_ids=range(0, 33, 4), **kwargs)


def shaped_rewards(*callbacks, env=None, n_rollouts=3, **kwargs):
    """Train; return, for each rollout, the (info, rewards in the buffer) of the episodes that ended in it."""
    recorder = Recorder()
    model = tiny_agent(env or env_of(), n_steps=8, **kwargs)
    model.learn(32 * n_rollouts, callback=[*callbacks, recorder])
    rewards = recorder.stacked("rewards")
    rollouts = [[] for _ in range(n_rollouts)]
    for info, transitions in recorder.episodes():
        rollouts[transitions[-1][0] // 8].append((info, [float(rewards[transition]) for transition in transitions]))
    return rollouts


@pytest.mark.parametrize("score_at", ["done", "rollout_end"])
def test_c6_the_documented_order_by_hand(score_at):
    """Clip, scale by all scores so far, whiten over the rollout, then subtract the penalty where cut (C6, C9)."""
    shaping = RewardShaping(clip=50.0, scale=True, whiten=True, missing_eos_penalty=2.0)
    rollouts = shaped_rewards(shaping, env=env_of(score_at))
    seen, reasons = [], set()
    for episodes in rollouts:
        scores = np.clip([info["episode"]["r"] for info, _ in episodes], -50, 50)
        seen += scores.tolist()
        scores = scores / np.std(seen)
        scores = (scores - scores.mean()) / scores.std()
        for (info, rewards), score in zip(episodes, scores):
            cut = info["end_reason"] is EndReason.LENGTH
            reasons.add(info["end_reason"])
            assert rewards[-1] == pytest.approx(score - 2.0 * cut, abs=1e-5)
            assert not any(rewards[:-1])
    assert max(seen) == 50.0 and reasons == {EndReason.EOS, EndReason.LENGTH}
    assert shaping.count == len(seen) and shaping.mean == pytest.approx(np.mean(seen))


def test_the_scale_keeps_the_mean_and_follows_the_scores():
    shaping = RewardShaping(scale=True)
    seen = []
    for episodes in shaped_rewards(shaping):
        seen += [info["episode"]["r"] for info, _ in episodes]
        for info, rewards in episodes:
            assert rewards[-1] == pytest.approx(info["episode"]["r"] / np.std(seen), rel=1e-5)


@pytest.mark.parametrize("callbacks_in_order", [True, False])
def test_c6_the_score_is_clipped_before_the_penalty_is_added(callbacks_in_order):
    """The penalty is not clipped, in any order of callbacks."""
    shaping, penalty = RewardShaping(clip=10.0), KLPenalty(100.0)
    order = [shaping, penalty] if callbacks_in_order else [penalty, shaping]
    model, recorder = tiny_agent(env_of(), n_steps=8), Recorder()
    model.learn(32 * 3, callback=[*order, recorder])
    assert [type(step).__name__ for step in model.rollout_buffer.before_returns] == ["RewardShaping", "KLPenalty"]
    rewards, penalised = recorder.stacked("rewards"), 0
    for _, transitions in recorder.episodes():
        others = [abs(rewards[transition]) for transition in transitions[:-1]]
        penalised += any(reward > 10.0 for reward in others)
    assert penalised > 3


def test_c6_the_same_with_the_penalty_taken_out():
    """In the first rollout the policy is the reference, so the penalty is 0 and the clipped score is left."""
    for info, rewards in shaped_rewards(KLPenalty(1.0), RewardShaping(clip=10.0), n_rollouts=1)[0]:
        assert sum(rewards) == pytest.approx(min(info["episode"]["r"], 10.0), abs=1e-4)


@pytest.mark.parametrize("value", [0.1, -1e6, 1e12])
def test_c6_a_constant_batch_gives_no_nan(value):
    env = env_of(reward=lambda prompt, preds, done: value)
    for episodes in shaped_rewards(RewardShaping(scale=True), env=env, n_rollouts=2):
        assert all(rewards[-1] == np.float32(value) for _, rewards in episodes)
    for episodes in shaped_rewards(RewardShaping(scale=True, whiten=True), env=env, n_rollouts=2):
        assert all(rewards[-1] == 0.0 for _, rewards in episodes)
    for episodes in shaped_rewards(RewardShaping(clip=0.5), env=env, n_rollouts=2):
        assert all(rewards[-1] == np.float32(np.clip(value, -0.5, 0.5)) for _, rewards in episodes)


@pytest.mark.parametrize("score_at", ["step", "done"])
def test_c9_the_penalty_is_for_those_cut_off_alone_and_once(score_at):
    """Over episodes of all lengths, some of which straddle rollouts; rewards of earlier tokens are unchanged (C9)."""

    def each(prompt, preds, done):
        return 1.0

    plain = 1.0 if score_at == "step" else 0.0
    n_cut, n_ended = 0, 0
    for episodes in shaped_rewards(RewardShaping(missing_eos_penalty=0.75), env=env_of(score_at, each), n_rollouts=5):
        for info, rewards in episodes:
            cut = info["end_reason"] is EndReason.LENGTH
            assert rewards == [plain] * (len(rewards) - 1) + [1.0 - 0.75 * cut]
            n_cut, n_ended = n_cut + cut, n_ended + (not cut)
    assert n_cut > 3 and n_ended > 3


def test_c12_the_overlong_penalty_by_hand():
    """Of a limit of 7 and 3 tokens below it: 4 tokens cost nothing, 5, 6 and 7 a third each of 0.6 more (C12)."""
    by_length = {1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.2, 6: 0.4, 7: 0.6}
    rows = [{"prompt": "ab"}, {"prompt": "c", "max_new_tokens": 3}]
    env = tiny_env(lambda prompt, preds, done: 1.0, rows, max_new_tokens=7, stop_ids=range(0, 33, 7), score_at="done")
    lengths = set()
    for episodes in shaped_rewards(RewardShaping(overlong_tokens=3, overlong_penalty=0.6), env=env, n_rollouts=8):
        for info, rewards in episodes:
            lengths.add((str(info["prompt"]), len(rewards)))
            # Below its own limit of 3 tokens the other prompt's texts have 1 and 2, of which 3 - 3 = 0 cost nothing.
            length = len(rewards) + (4 if str(info["prompt"]) == "c" else 0)
            assert rewards[:-1] == [0.0] * (len(rewards) - 1)
            assert rewards[-1] == pytest.approx(1.0 - by_length[length], abs=1e-6)
    assert {("ab", 4), ("ab", 5), ("ab", 6), ("ab", 7), ("c", 1), ("c", 3)} <= lengths


def test_c12_it_is_dapos_formula_and_logged_beside_the_penalty_for_cut_texts():
    """Equation 13 with L_max = 5, L_cache = 2, whose punishment is 0, then (3 - length) / 2, down to -1."""
    model, recorder = tiny_agent(env_of(), n_steps=8), Recorder()
    shaping = RewardShaping(missing_eos_penalty=0.25, overlong_tokens=2)
    model.learn(32, callback=[shaping, recorder], log_interval=None)
    punished = []
    for info, transitions in recorder.episodes():
        length, is_cut = info["episode"]["l"], info["end_reason"] is EndReason.LENGTH
        punished.append(0.0 if length <= 3 else (3 - length) / 2)
        reward = recorder.stacked("rewards")[transitions[-1]]
        assert reward == pytest.approx(info["episode"]["r"] + punished[-1] - 0.25 * is_cut, abs=1e-5)
    assert model.logger.name_to_value["shaping/overlong"] == pytest.approx(-np.mean(punished)) and min(punished) == -1


@pytest.mark.slow
def test_c9_one_penalty_in_several_turns_and_none_where_the_env_ends():
    env = Talk(["ab"], TOKENIZER, max_new_tokens=6, max_turns=3, max_response_tokens=2, stop_ids=range(0, 33, 3))
    reasons = set()
    lm = tiny_config(n_positions=64)
    for episodes in shaped_rewards(RewardShaping(missing_eos_penalty=1.0), env=env, n_rollouts=5, lm=lm):
        for info, rewards in episodes:
            reasons.add(info["end_reason"])
            assert rewards == [0.0] * (len(rewards) - 1) + [-float(info["end_reason"] is EndReason.LENGTH)]
    assert {EndReason.LENGTH, EndReason.ENV} <= reasons


def test_the_value_of_a_truncated_episode_is_not_shaped():
    """SB3 adds the critic's value to the last reward of a truncated episode; at the start it is 0."""
    env = env_of(length_limit="truncate")
    for info, rewards in shaped_rewards(RewardShaping(clip=1.0), env=env, n_rollouts=1)[0]:
        assert rewards[-1] == min(info["episode"]["r"], 1.0)


def test_c10_the_task_reward_in_the_logs_is_untouched():
    model, recorder = tiny_agent(env_of(), n_steps=8), Recorder()
    shaping = RewardShaping(clip=1.0, missing_eos_penalty=100.0)
    model.learn(32, callback=[EpisodeMetrics(), shaping, recorder], log_interval=None)
    infos = [info for info, _ in recorder.episodes()]
    assert all(info["episode"]["r"] == np.floor(info["episode"]["r"]) for info in infos)  # sums of token ids
    logged = model.logger.name_to_value
    assert logged["reward/task"] == pytest.approx(np.mean([info["episode"]["r"] for info in infos])) and len(infos) > 5
    cut = np.mean([info["end_reason"] is EndReason.LENGTH for info in infos])
    assert logged["shaping/cut"] == pytest.approx(cut)
    shaped = np.mean(np.clip([info["episode"]["r"] for info in infos], -1, 1))
    assert logged["shaping/score"] == pytest.approx(shaped - 100.0 * cut)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 3])
def test_e8_the_running_figures_are_resumed(groups, tmp_path):
    """Bit for bit, also while scores wait for their group."""

    def build(seed):
        env = env_of("rollout_end", samples_per_prompt=groups)
        buffer = {"advantage": "grpo"} if groups > 1 else {}
        return tiny_agent(env, n_steps=8, n_envs=7, seed=seed, rollout_buffer_kwargs=buffer)

    def callbacks():
        return [RewardShaping(clip=60.0, scale=True, missing_eos_penalty=1.0), KLPenalty(0.1)]

    model = build(0)
    model.learn(56 * 4, callback=[*callbacks(), Checkpoints(tmp_path, every=2)])
    resumed = build(3)
    load_checkpoint(resumed, tmp_path / f"step_{56 * 2:012d}")
    resumed.learn(56 * 2, callback=callbacks(), reset_num_timesteps=False)
    assert run_state(resumed) == run_state(model)
    (first,), (second,) = (
        [step for step in agent.rollout_buffer.before_returns if isinstance(step, RewardShaping)]
        for agent in (model, resumed)
    )
    assert first.state_dict() == second.state_dict() and first.count > 20


def test_bad_settings_and_wrappers_are_refused():
    with pytest.raises(ValueError, match="Expected `clip` to be positive or None, got 0"):
        RewardShaping(clip=0)
    with pytest.raises(ValueError, match="Expected `missing_eos_penalty` to be 0 or more, got -1"):
        RewardShaping(missing_eos_penalty=-1)
    with pytest.raises(ValueError, match="Expected `overlong_tokens` to be at least 1 or None, got 0"):
        RewardShaping(overlong_tokens=0)
    with pytest.raises(ValueError, match="Expected `overlong_penalty` to be 0 or more, got -1"):
        RewardShaping(overlong_tokens=1, overlong_penalty=-1)
    with pytest.raises(ValueError, match="Expected `overlong_tokens` of at most max_new_tokens=5, got 6"):
        RewardShaping(overlong_tokens=6).attach(tiny_agent(env_of()))
    with pytest.raises(ValueError, match="Expected an env without `turn_tokens` with `overlong_tokens`"):
        talk = tiny_env(max_new_tokens=12, turn_tokens=4, cls=Talk)
        RewardShaping(overlong_tokens=1).attach(tiny_agent(talk))
    with pytest.raises(ValueError, match="Expected an env with score_at='done' or 'rollout_end', got 'step'"):
        RewardShaping(whiten=True).attach(tiny_agent(env_of("step")))
    settings = {"policy_kwargs": {"lm": tiny_config()}, "rollout_buffer_class": SequenceRolloutBuffer, "device": "cpu"}
    model = PPO(LMPolicy, VecNormalize(TextVecEnv(env_of(), 2), norm_obs=False), n_steps=4, batch_size=8, **settings)
    with pytest.raises(ValueError, match="Expected VecNormalize with norm_reward=False"):
        RewardShaping(clip=1.0).attach(model)
