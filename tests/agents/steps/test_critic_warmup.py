"""`CriticWarmup`: at first only the critic learns, and the policy's weights keep every bit; then both learn."""

import pytest
import torch
from stable_baselines3 import A2C, PPO

from agents import CriticWarmup, SeparateCritic, load_checkpoint, save_checkpoint
from tests.helpers.training import run_state, same_weights, tiny_agent, tiny_config, weights

ROLLOUT = 16


def split(model):
    """Return the weights of the policy and those of the critic."""
    parts = {"policy": {}, "critic": {}}
    for name, weight in weights(model).items():
        parts["critic" if "critic" in name else "policy"][name] = weight
    return parts["policy"], parts["critic"]


def moments(model):
    """Return the optimizer's state of the policy's weights."""
    state = model.policy.optimizer.state
    return [tensor.clone() for weight in model.policy.lm.backbone.parameters() for tensor in state[weight].values()]


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("critic", [None, SeparateCritic(tiny_config())], ids=["shared", "separate"])
def test_e7_the_policy_is_bit_identical_in_the_warm_up_and_the_critic_learns(critic, algorithm):
    model = tiny_agent(algorithm=algorithm, ent_coef=0.1, policy_kwargs={} if critic is None else {"critic": critic})
    policy, critic_before = split(model)
    model.learn(2 * ROLLOUT, callback=CriticWarmup(2))
    policy_after, critic_after = split(model)
    assert same_weights(policy, policy_after) and not same_weights(critic_before, critic_after)
    assert moments(model) == []
    model.learn(ROLLOUT, reset_num_timesteps=False)
    assert not same_weights(policy, split(model)[0]) and len(moments(model)) > 0


def test_moments_of_an_earlier_update_stand_still_too():
    """In a warm-up after training, Adam's momentum does not move the policy's weights."""
    model = tiny_agent()
    model.learn(ROLLOUT)
    policy, before = split(model)[0], moments(model)
    assert len(before) > 0
    model.learn(ROLLOUT, callback=CriticWarmup(1), reset_num_timesteps=False)
    assert same_weights(policy, split(model)[0])
    assert all(torch.equal(now, then) for now, then in zip(moments(model), before, strict=True))


def test_the_updates_of_the_critic_are_those_of_an_ordinary_run():
    """Where critic and policy share nothing, the critic learns in a warm-up as it does without one."""

    def critic(*callbacks):
        model = tiny_agent(policy_kwargs={"critic": SeparateCritic(tiny_config())}, max_grad_norm=1e9)
        model.learn(ROLLOUT, callback=list(callbacks))
        return split(model)[1]

    assert same_weights(critic(), critic(CriticWarmup(1)))


def test_without_it_the_policy_moves():
    model = tiny_agent()
    policy, _ = split(model)
    model.learn(ROLLOUT, callback=CriticWarmup(0))
    assert not same_weights(policy, split(model)[0])


def test_the_count_goes_on_in_another_call_of_learn():
    model = tiny_agent()
    policy, _ = split(model)
    for _ in range(2):
        model.learn(ROLLOUT, callback=CriticWarmup(2), reset_num_timesteps=False)
        assert same_weights(policy, split(model)[0])
    model.learn(ROLLOUT, callback=CriticWarmup(2), reset_num_timesteps=False)
    assert not same_weights(policy, split(model)[0])


@pytest.mark.parametrize("n_before", [1, 3])
def test_e8_a_warm_up_survives_a_checkpoint(tmp_path, n_before):
    straight = tiny_agent()
    straight.learn(n_before * ROLLOUT, callback=CriticWarmup(2))
    save_checkpoint(straight, tmp_path / "here")
    straight.learn(2 * ROLLOUT, reset_num_timesteps=False)
    resumed = tiny_agent()
    load_checkpoint(resumed, tmp_path / "here")
    resumed.learn(2 * ROLLOUT, callback=CriticWarmup(2), reset_num_timesteps=False)
    assert run_state(resumed) == run_state(straight)


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="Expected `n_rollouts` to be 0 or more, got -1"):
        CriticWarmup(-1)
