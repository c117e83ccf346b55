"""`KLPenalty`: the rewards that it changes, the reference that never changes, and logs (C1, C2, C5, C10)."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer

from agents import KLPenalty, LateScores, LMPolicy, LoRA, Pretrained, SequenceRolloutBuffer, TextVecEnv
from agents.callbacks.episode_metrics import EpisodeMetrics
from agents.policies.actor_critic import LMActorCritic
from tests.helpers.training import Recorder, Trained, same_weights, tiny_agent, tiny_config, tiny_env, weights

COEF = 0.3


def token_log_prob(lm, observation, action):
    """Return the log-probability of one token by a plain forward of the language model, without padding or cache."""
    ids = torch.as_tensor(observation[observation >= 0])[None]
    with torch.no_grad():
        logits = lm.backbone.model(input_ids=ids).logits[0, -1]
    return float(torch.log_softmax(logits / lm.sampling.temperature, -1)[action])


def reference_log_probs(reference, recorder):
    """Return the reference's log-probability of every transition, (T, B)."""
    return np.array(
        [
            [token_log_prob(reference, row, action) for row, action in zip(*step)]
            for step in zip(recorder.observations, recorder.actions)
        ]
    )


def test_c1_the_rewards_of_an_episode_are_its_score_minus_the_penalty_of_its_tokens():
    """Over episodes that straddle rollouts, with a temperature (C1)."""
    model = tiny_agent(n_steps=6, policy_kwargs={"temperature": 0.7})
    penalty, recorder = KLPenalty(COEF), Recorder()
    model.learn(4 * 6 * 4, callback=[penalty, recorder])
    rewards, log_probs = recorder.stacked("rewards"), recorder.stacked("log_probs")
    k1 = log_probs - reference_log_probs(penalty.reference, recorder)
    episodes = list(recorder.episodes())
    assert len(episodes) >= 20 and np.abs(k1[12:]).mean() > 0.01
    for info, transitions in episodes:
        score = info["episode"]["r"]
        total = sum(rewards[transition] for transition in transitions)
        assert total == pytest.approx(score - COEF * sum(k1[transition] for transition in transitions), abs=1e-5)
        task = [
            rewards[transition] + COEF * k1[transition] for transition in transitions
        ]  # the rewards without the penalty
        assert task == pytest.approx([0.0] * (len(transitions) - 1) + [score], abs=1e-5)


def test_c1_of_an_episode_that_ends_with_eos_the_score_is_on_the_eos():
    model = tiny_agent(tiny_env(max_new_tokens=8), n_steps=8, n_envs=8)
    recorder = Recorder()
    model.learn(64 * 4, callback=[KLPenalty(0.0), recorder])
    rewards = recorder.stacked("rewards")
    ended = [transitions for info, transitions in recorder.episodes() if str(info["end_reason"]) == "eos"]
    assert ended
    for transitions in ended:
        assert recorder.actions[transitions[-1][0]][transitions[-1][1]] == 0
        assert rewards[transitions[-1]] > 0 and not any(rewards[transition] for transition in transitions[:-1])


@pytest.mark.parametrize("train", ["all", LoRA()], ids=["all", "lora"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_c2_no_penalty_where_policy_and_reference_are_the_same(estimator, train):
    """Exactly 0 at every token; for LoRA, the policy is compared with its own adapters off (C2)."""
    model = tiny_agent(n_steps=6, policy_kwargs={"train": train})
    recorder = Recorder()
    model.learn(24, callback=[KLPenalty(1e6, estimator=estimator), recorder])  # one rollout, before any update
    task = np.zeros_like(recorder.rewards[0])
    for info, transitions in recorder.episodes():
        task[transitions[-1]] = info["episode"]["r"]
    assert np.array_equal(recorder.rewards[0], task)


def test_c2_a_coefficient_of_zero_changes_nothing():
    trained = []
    for callback in ([], [KLPenalty(0.0)]):
        model = tiny_agent(n_steps=6)
        model.learn(72, callback=callback)
        trained.append(weights(model))
    assert same_weights(*trained)


def test_the_penalty_changes_training():
    trained = []
    for coef in (0.0, 0.5):
        model = tiny_agent(n_steps=6)
        model.learn(72, callback=KLPenalty(coef))
        trained.append(weights(model))
    assert not same_weights(*trained)


def test_c5_the_reference_is_the_start_and_never_changes():
    """The reference has no gradients and shares no memory with the policy (C5)."""
    model = tiny_agent()
    start = {name: tensor.clone() for name, tensor in model.policy.lm.state_dict().items() if "critic" not in name}
    penalty = KLPenalty(COEF)
    model.learn(64, callback=penalty)
    now = penalty.reference.state_dict()
    assert same_weights(start, now)
    trained = weights(model)
    assert not same_weights(start, {name: trained[f"lm.{name}"] for name in start})
    assert all(not weight.requires_grad and weight.grad is None for weight in penalty.reference.parameters())
    pointers = {weight.data_ptr() for weight in penalty.reference.parameters()}
    assert pointers.isdisjoint(weight.data_ptr() for weight in model.policy.parameters())
    optimized = {id(weight) for group in model.policy.optimizer.param_groups for weight in group["params"]}
    assert optimized.isdisjoint(id(weight) for weight in penalty.reference.parameters())


def test_c5_the_reference_builds_no_graph(monkeypatch):
    model, penalty = tiny_agent(), KLPenalty(COEF)
    seen, original = [], LMActorCritic.log_probs

    def spy(self, batch, actions):
        result = original(self, batch, actions)
        seen.append((torch.is_grad_enabled(), result.grad_fn, len(batch)))
        return result

    monkeypatch.setattr(LMActorCritic, "log_probs", spy)
    with torch.enable_grad():
        model.learn(48, callback=penalty)
    # One call per rollout, with all transitions; none in the first rollout, when policy and reference are the same.
    assert seen == [(False, None, 16)] * 2


def test_c5_the_reference_stays_over_several_learns():
    model, penalty = tiny_agent(), KLPenalty(COEF)
    model.learn(16, callback=penalty)
    reference = penalty.reference
    model.learn(16, callback=penalty, reset_num_timesteps=False)
    assert penalty.reference is reference
    assert model.rollout_buffer.before_returns == [penalty]


def test_c5_what_sb3_saves_has_no_reference():
    """With and without a penalty, the zip has the same members and almost as many bytes (C5)."""
    files = []
    for callback in ([], [KLPenalty(COEF)]):
        model = tiny_agent()
        model.learn(32, callback=callback)
        stream = io.BytesIO()
        model.save(stream)
        files.append(zipfile.ZipFile(stream))
    plain, penalised = files
    assert plain.namelist() == penalised.namelist()
    for name in plain.namelist():
        assert abs(len(penalised.read(name)) - len(plain.read(name))) < 300, name
    assert b"KLPenalty" in penalised.read("data")  # its name, and no more
    assert b"agents.steps.kl_penalty" not in penalised.read("data")


def test_c5_the_policy_and_its_arguments_pickle_without_the_reference():
    model = tiny_agent()
    before = len(pickle.dumps(model.policy_kwargs))
    model.learn(32, callback=KLPenalty(COEF))
    assert len(pickle.dumps(model.policy_kwargs)) == before


def test_c10_the_task_reward_in_the_logs_is_untouched():
    """Logs and infos have the task reward; the penalty has keys of its own (C1, C10)."""
    model, recorder = tiny_agent(), Recorder()
    penalty = KLPenalty(100.0, estimator="k3")  # never negative
    model.learn(64, callback=[penalty, EpisodeMetrics(), recorder], log_interval=None)
    infos = [info for info, _ in recorder.episodes()]
    assert all(info["episode"]["r"] == pytest.approx(sum(info["reward_parts"].values())) for info in infos)
    assert all(info["episode"]["r"] >= 0 for info in infos)
    logged = model.logger.name_to_value
    last = [info for step in recorder.infos[-4:] for info in step if info]
    assert logged["reward/task"] == pytest.approx(np.mean([info["episode"]["r"] for info in last]))
    assert recorder.rewards[-1].sum() < -10 < 0 < logged["reward/task"]


@pytest.mark.parametrize("advantage", ["grpo", "grpo_mean", "rloo"])
def test_d8_of_equal_texts_no_penalty_is_left(advantage):
    """At a low temperature all samples of a prompt are the same text, far from what the reference would write."""
    env = tiny_env(samples_per_prompt=4, stop_ids=())
    options = {"policy_kwargs": {"temperature": 1e-3}, "rollout_buffer_kwargs": {"advantage": advantage}}
    model, trained = tiny_agent(env, n_envs=8, **options), Trained()
    penalty = KLPenalty(COEF, reference=tiny_config(initializer_range=1.0))
    model.learn(32, callback=[penalty, trained], log_interval=None)
    assert model.logger.name_to_value["kl/token"] > 10
    assert len(trained.rollouts[0]) == 32 and {row[1] for row in trained.rollouts[0]} == {0.0}


def test_logged_divergence_is_that_of_the_rollout():
    model, recorder, penalty = tiny_agent(), Recorder(), KLPenalty(COEF)
    model.learn(64, callback=[penalty, recorder], log_interval=None)
    reference = reference_log_probs(penalty.reference, recorder)
    k1 = recorder.stacked("log_probs") - reference
    logged = model.logger.name_to_value
    assert logged["kl/reference_nll"] == pytest.approx(-reference[12:].mean(), abs=1e-5)
    ended = [transitions for _, transitions in recorder.episodes() if transitions[-1][0] >= 12]
    assert logged["kl/token"] == pytest.approx(k1[12:].mean(), abs=1e-5)
    assert logged["kl/coef"] == COEF
    # "kl/sequence" counts the episodes that ended in the last rollout.
    per_episode = [sum(k1[transition] for transition in transitions if transition[0] >= 12) for transitions in ended]
    assert logged["kl/sequence"] == pytest.approx(np.mean(per_episode), abs=1e-5)


def test_a_loaded_model_without_its_penalty_raises_with_the_cure(tmp_path):
    model = tiny_agent()
    model.learn(32, callback=KLPenalty(COEF))
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", env=TextVecEnv(tiny_env(), 4))
    with pytest.raises(RuntimeError, match=r"\['KLPenalty'\] before returns.*callbacks.*learn\(\) again"):
        loaded.learn(16)
    loaded.rollout_buffer.expected_steps.clear()  # the way out that the message names
    loaded.learn(16)


def test_a_new_penalty_on_a_trained_model_needs_its_reference(tmp_path):
    """A model that was loaded from a file, or trained without a penalty, no longer has its initial weights (C5)."""
    model, without = tiny_agent(), tiny_agent()
    model.learn(32, callback=KLPenalty(COEF))
    model.save(tmp_path / "model.zip")
    without.learn(32)
    for trained in (without, PPO.load(tmp_path / "model.zip", env=TextVecEnv(tiny_env(), 4))):
        with pytest.raises(ValueError, match=r"its start is gone: pass KLPenalty\(coef, reference=policy.lm\)"):
            trained.learn(16, callback=KLPenalty(COEF), reset_num_timesteps=False)


def test_c5_a_new_penalty_in_a_later_learn_goes_on_with_the_same_start():
    model, first, second = tiny_agent(), KLPenalty(COEF), KLPenalty(2 * COEF)
    model.learn(32, callback=first)
    model.learn(16, callback=second, reset_num_timesteps=False)
    assert same_weights(first.reference.state_dict(), second.reference.state_dict())
    assert model.rollout_buffer.before_returns == [second]


def test_a_loaded_model_goes_on_with_a_reference(tmp_path):
    model, penalty = tiny_agent(), KLPenalty(COEF)
    start = tiny_agent().policy.lm
    assert same_weights(start.state_dict(), model.policy.lm.state_dict())
    model.learn(32, callback=penalty)
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", env=TextVecEnv(tiny_env(), 4))
    again = KLPenalty(COEF, reference=start)
    loaded.learn(16, callback=again, reset_num_timesteps=False)
    assert same_weights(again.reference.state_dict(), penalty.reference.state_dict())
    assert again.reference is not start and all(weight.requires_grad for weight in start.parameters())


def test_a2c_gets_the_penalty_too():
    """Invariant C1 holds for A2C as well."""
    model, penalty, recorder = tiny_agent(algorithm=A2C, n_steps=5), KLPenalty(COEF), Recorder()
    model.learn(4 * 5 * 6, callback=[penalty, recorder])
    rewards = recorder.stacked("rewards")
    k1 = recorder.stacked("log_probs") - reference_log_probs(penalty.reference, recorder)
    assert np.abs(k1).max() > 1e-3
    for info, transitions in recorder.episodes():
        expected = info["episode"]["r"] - COEF * sum(k1[transition] for transition in transitions)
        assert sum(rewards[transition] for transition in transitions) == pytest.approx(expected, abs=1e-5)


def test_the_stock_buffer_is_refused():
    model = PPO(LMPolicy, tiny_env(), n_steps=8, batch_size=8, policy_kwargs={"lm": tiny_config()}, device="cpu")
    assert type(model.rollout_buffer) is RolloutBuffer
    with pytest.raises(TypeError, match="Expected rollout_buffer_class=SequenceRolloutBuffer, got RolloutBuffer"):
        model.learn(8, callback=KLPenalty(COEF))


def test_a_negative_coefficient_is_refused():
    with pytest.raises(ValueError, match="Expected `coef` to be 0 or more, got -1"):
        KLPenalty(-1)


@pytest.mark.parametrize("score_at", ["step", "done", "rollout_end"])
def test_c10_rewards_of_the_buffer_and_of_the_info_agree(score_at):
    """The sum of an episode's rewards in the buffer is `info["episode"]["r"]` (C10)."""

    def every_step(prompt, preds, done):
        return {"token": preds[-1] / 7, "end": 10.0 * done}

    model = tiny_agent(tiny_env(every_step, score_at=score_at), n_steps=6)
    recorder = Recorder()
    model.learn(96, callback=[KLPenalty(0.0), recorder])
    rewards, n_episodes = recorder.stacked("rewards"), 0
    for info, transitions in recorder.episodes():
        n_episodes += 1
        assert sum(rewards[transition] for transition in transitions) == pytest.approx(info["episode"]["r"], abs=1e-5)
        assert sum(info["reward_parts"].values()) == pytest.approx(info["episode"]["r"], abs=1e-9)
        tokens = [recorder.actions[step][lane] for step, lane in transitions]
        scored = tokens if score_at == "step" else tokens[-1:]
        assert info["episode"]["r"] == pytest.approx(sum(scored) / 7 + 10.0, abs=1e-9)
        assert info["episode"]["l"] == len(transitions)
    assert n_episodes >= 16


def test_late_scores_run_before_the_penalty_whatever_the_order_of_callbacks():
    env = tiny_env(score_at="rollout_end")
    model = PPO(
        LMPolicy,
        TextVecEnv(env, 4),
        rollout_buffer_class=SequenceRolloutBuffer,
        policy_kwargs={"lm": tiny_config()},
        n_steps=4,
        batch_size=16,
        device="cpu",
        seed=0,
    )
    penalty, late = KLPenalty(COEF), LateScores()
    model.learn(16, callback=[penalty, late])
    assert model.rollout_buffer.before_returns == [late, penalty]
    assert model.rollout_buffer.expected_steps[0] in ("LateScores", "KLPenalty")


def test_a_spec_as_language_model_works_with_the_penalty(tmp_path):
    """For `Pretrained` folders of models with tied and with untied embeddings."""
    for tied in (True, False):
        folder = tmp_path / f"tied_{tied}"
        lm = tiny_agent(lm=tiny_config(tie_word_embeddings=tied)).policy.lm.backbone.model
        lm.save_pretrained(folder)
        model, penalty = tiny_agent(lm=Pretrained(str(folder))), KLPenalty(COEF)
        model.learn(16, callback=penalty)
        tensors, _ = penalty.state_dict()
        assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
