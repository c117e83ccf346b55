"""Normalised values: their statistics, the value head that follows them, and their use by an unmodified PPO."""

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.utils import explained_variance

from agents import SeparateCritic, load_checkpoint, save_checkpoint
from agents.policies.value_norm import DECAY, Scale, ValueNorm
from tests.helpers.models import collect, count_a, make_policy, make_ppo, observe, tiny
from tests.helpers.training import run_state, same_weights, tiny_agent, weights

ROWS = [([1, 2, 3], []), ([4], [5, 6]), ([7, 8, 9, 10, 11], [12])]
KINDS = ["norm", "popart"]


def hundredfold(prompt, preds, done):
    return 100 * count_a(prompt, preds, done) + 500.0 * done


def normed_ppo(kind="popart", **kwargs):
    return make_ppo(
        reward=hundredfold, **{**kwargs, "policy_kwargs": {"value_norm": kind, **kwargs.get("policy_kwargs", {})}}
    )


def test_statistics_are_averages_with_decaying_weights():
    """By hand: three rollouts weigh DECAY^2 : DECAY : 1, and the initial statistics nothing."""
    norm = ValueNorm("norm")
    assert norm.scale() == Scale(0.0, 1.0)
    rollouts = [torch.randn(7, generator=torch.Generator().manual_seed(i)) * 30 + 200 * i for i in range(3)]
    for returns in rollouts:
        norm.update(returns)
    shares = np.array([DECAY**2, DECAY, 1.0]) / (DECAY**2 + DECAY + 1)
    mean = sum(share * float(returns.mean()) for share, returns in zip(shares, rollouts))
    square = sum(share * float(returns.double().square().mean()) for share, returns in zip(shares, rollouts))
    assert norm.scale().mean == pytest.approx(mean, rel=1e-5)
    assert norm.scale().deviation == pytest.approx(np.sqrt(square - mean**2), rel=1e-5)


def test_the_first_rollout_counts_alone():
    norm = ValueNorm("norm")
    norm.update(torch.tensor([1e4 - 1, 1e4 + 1]))
    assert norm.scale() == Scale(1e4, 1.0)


def test_equal_returns_give_finite_values():
    """A deviation of 0 divides nothing (D6)."""
    norm = ValueNorm("norm")
    norm.update(torch.full((5,), 3.0))
    assert norm.scale().of(np.full(2, 3.0)).tolist() == [0.0, 0.0]
    assert norm.denormalize(torch.zeros(1)).tolist() == [3.0]


def test_popart_keeps_values_as_statistics_move():
    """Proposition 1 of van Hasselt et al. (2016) holds for "popart", and not for "norm"."""
    for kind in KINDS:
        policy = make_policy(value_norm=kind)
        norm, layer = policy.lm.value_norm, policy.lm.critic.linear
        with torch.no_grad():
            outputs = [policy.lm.values(observe(ROWS))]
            for returns in (torch.tensor([5.0, 300.0]), torch.tensor([-40.0, -44.0]), torch.tensor([0.01, 0.02])):
                norm.update(returns, layer)
                outputs.append(policy.lm.values(observe(ROWS)))
        kept = [torch.allclose(later, outputs[0], rtol=1e-4, atol=1e-4) for later in outputs[1:]]
        assert kept == [kind == "popart"] * 3


def test_without_it_nothing_is_rescaled():
    policy = make_policy()
    assert policy.lm.value_norm is None and not any("norm.mean" in name for name in policy.state_dict())
    samples = next(iter((buffer := collect(make_ppo())).get()))
    assert sorted(samples.returns.tolist()) == sorted(buffer.returns.flatten().tolist())
    assert sorted(samples.old_values.tolist()) == sorted(buffer.values.flatten().tolist())


@pytest.mark.parametrize("critic", [None, SeparateCritic(tiny())], ids=["shared", "separate"])
@pytest.mark.parametrize("kind", KINDS)
def test_minibatches_are_in_the_critics_units_and_the_buffer_in_those_of_reward(kind, critic):
    """Old values are the critic's outputs before the update, around which SB3 clips values."""
    model = normed_ppo(kind, policy_kwargs={} if critic is None else {"critic": critic})
    for _ in range(3):
        model.policy.set_training_mode(False)
        buffer = collect(model)
        scale = model.policy.lm.value_norm.scale()
        samples = next(iter(buffer.get()))
        with torch.no_grad():
            outputs = model.policy.evaluate_actions(samples.observations, samples.actions)[0].flatten()
            torch.testing.assert_close(samples.old_values, outputs, atol=1e-3, rtol=1e-3)
            of_sequences = model.policy.predict_values(samples.observations).flatten()
            assert torch.equal(of_sequences, outputs)
        expected = np.sort((buffer.returns.flatten() - scale.mean) / scale.deviation)
        np.testing.assert_allclose(np.sort(samples.returns), expected, atol=1e-5)
    assert scale.mean > 100 and scale.deviation > 10
    np.testing.assert_allclose(buffer.returns, buffer.advantages + buffer.values, rtol=1e-5)  # D1, in units of reward


def test_statistics_are_of_the_episodes_that_are_trained():
    """Returns of segments that wait for the end of their episode are not counted yet."""
    model = normed_ppo(n_steps=4, max_new_tokens=6, rollout_buffer_kwargs={"complete_episodes": True})
    scales = []
    for _ in range(2):
        model.policy.set_training_mode(False)
        buffer = collect(model)
        scales.append(model.policy.lm.value_norm.scale())
        trained = [part.returns for part in buffer.trained]
    assert scales[0] == Scale() and sum(map(len, trained)) > 0  # no episode ends in the first four steps
    assert scales[1].mean == pytest.approx(float(np.concatenate(trained).mean()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_loss_does_not_depend_on_the_rewards_scale(kind):
    """With rewards times 1000 the critic's gradient is the same."""

    def gradient(factor):
        model = make_ppo(reward=lambda *args: factor * count_a(*args), policy_kwargs={"value_norm": kind})
        torch.nn.init.zeros_(model.policy.lm.critic.linear.weight)
        samples = next(iter(collect(model).get()))
        outputs = model.policy.evaluate_actions(samples.observations, samples.actions)[0].flatten()
        (samples.returns - outputs).square().mean().backward()
        return model.policy.lm.critic.linear.weight.grad

    torch.testing.assert_close(gradient(1000.0), gradient(1.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_value_clipping_of_sb3_is_around_what_the_critic_put_out(kind):
    """A tiny `clip_range_vf` lets the first optimizer step of an update through, and no gradient after it."""

    def after(clip, n_epochs):
        kwargs = {"optimizer_class": torch.optim.SGD, "critic": SeparateCritic(tiny()), "value_norm": kind}
        model = tiny_agent(clip_range_vf=clip, n_epochs=n_epochs, vf_coef=1.0, max_grad_norm=1e9, policy_kwargs=kwargs)
        model.learn(16)
        return {name: weight for name, weight in weights(model).items() if "critic" in name}

    one_step = after(None, 1)
    assert not all((weight == 0).all() for name, weight in one_step.items() if "linear" in name)
    assert same_weights(after(1e-9, 6), one_step)
    assert not same_weights(after(None, 6), one_step)
    assert not same_weights(after(10.0, 6), one_step)


def test_explained_variance_is_of_reward_units():
    """SB3 computes it from the buffer's values and returns, which are in units of reward."""
    model = normed_ppo(learning_rate=1e-2)
    model.learn(96)
    buffer = model.rollout_buffer
    expected = explained_variance(buffer.values.flatten(), buffer.returns.flatten())
    assert model.logger.name_to_value["train/explained_variance"] == pytest.approx(float(expected))
    assert buffer.returns.mean() > 100


@pytest.mark.parametrize("kind", KINDS)
def test_e8_statistics_survive_a_checkpoint(tmp_path, kind):
    def agent():
        return tiny_agent(policy_kwargs={"value_norm": kind})

    straight = agent()
    straight.learn(48)
    save_checkpoint(straight, tmp_path / "here")
    straight.learn(32, reset_num_timesteps=False)
    resumed = agent()
    load_checkpoint(resumed, tmp_path / "here")
    assert resumed.policy.lm.value_norm.scale() != Scale()
    resumed.learn(32, reset_num_timesteps=False)
    assert run_state(resumed)["tensors"] == run_state(straight)["tensors"]


def test_statistics_are_in_sb3s_file(tmp_path):
    model = normed_ppo()
    model.learn(48)
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    assert loaded.policy.lm.value_norm.scale() == model.policy.lm.value_norm.scale() != Scale()
    assert same_weights(weights(loaded), weights(model))


def test_the_stock_buffer_is_refused():
    model = normed_ppo(rollout_buffer_class=RolloutBuffer)
    with pytest.raises(ValueError, match="Expected rollout_buffer_class=SequenceRolloutBuffer with `value_norm`"):
        model.learn(48)


def test_unknown_kinds_and_critics_are_refused():
    with pytest.raises(ValueError, match=r"None or one of \['norm', 'popart'\], got 'pop'"):
        make_policy(value_norm="pop")

    class Custom:
        def build(self, hidden_size):
            return torch.nn.Linear(hidden_size, 1)

    with pytest.raises(ValueError, match="Expected a critic that ends in a ValueHead for `value_norm`"):
        make_policy(value_norm="norm", critic=Custom())
