"""Learning rates scaled by factors: optimizer steps, SB3's schedule, saved files and checkpoints."""

import pytest
import torch
from stable_baselines3.common.utils import update_learning_rate
from torch import nn

from agents import SeparateCritic, load_checkpoint, save_checkpoint
from agents.checkpoints.manifest import CheckpointError
from agents.policies.optimizers import scaled_optimizer
from tests.helpers.models import make_policy, tiny
from tests.helpers.training import run_state, tiny_agent


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_steps_equal_those_of_an_optimizer_for_each_rate(cls):
    """They stay equal after SB3's `update_learning_rate` has written one rate into all groups."""
    together, apart = ([nn.Parameter(torch.ones(3)) for _ in range(3)] for _ in range(2))
    optimizer = scaled_optimizer(cls, dict(zip(together, (1.0, 10.0, 0.5))), lr=0.1)
    singles = [cls([weight], lr=0.1 * scale) for weight, scale in zip(apart, (1.0, 10.0, 0.5))]
    for rate in (0.1, 0.01, 0.02):
        update_learning_rate(optimizer, rate)
        for single, scale in zip(singles, (1.0, 10.0, 0.5)):
            update_learning_rate(single, rate * scale)
        for weights, optimizers in ((together, [optimizer]), (apart, singles)):
            for weight in weights:
                weight.grad = torch.tensor([1.0, -2.0, 0.1]) * weight.detach()
            for each in optimizers:
                each.step()
        assert [group["lr"] for group in optimizer.param_groups] == [rate] * 3
    assert all(torch.equal(one, other) for one, other in zip(together, apart))


def test_one_factor_makes_one_group():
    policy = make_policy()
    (group,) = policy.optimizer.param_groups
    assert [id(weight) for weight in group["params"]] == [id(weight) for weight in policy.parameters()]


def test_critic_and_head_have_factors_of_their_own():
    policy = make_policy(critic=SeparateCritic(tiny()), critic_lr_scale=10.0, head_lr_scale=3.0)
    groups = {group["lr_scale"]: {id(weight) for weight in group["params"]} for group in policy.optimizer.param_groups}
    critic = policy.lm.critic
    assert groups == {
        1.0: {id(weight) for weight in policy.lm.backbone.parameters()},
        10.0: {id(weight) for weight in critic.trunk.parameters()},
        30.0: {id(weight) for weight in critic.linear.parameters()},
    }


def test_a_shared_critic_is_its_head():
    policy = make_policy(critic_lr_scale=10.0)
    assert [group["lr_scale"] for group in policy.optimizer.param_groups] == [1.0, 10.0]
    assert len(policy.optimizer.param_groups[1]["params"]) == 2


def test_a_larger_factor_moves_the_head_further():
    def moved(**kwargs):
        model = tiny_agent(learning_rate=1e-4, policy_kwargs=kwargs)
        model.learn(16)
        return model.policy.lm.critic.linear.weight.abs().max().item()

    assert moved(critic_lr_scale=20.0) == pytest.approx(20 * moved(), rel=0.1)
    assert moved(head_lr_scale=20.0) == moved(critic_lr_scale=20.0)


def test_e8_a_run_with_factors_resumes_bit_for_bit(tmp_path):
    def agent(**kwargs):
        return tiny_agent(policy_kwargs={"critic": SeparateCritic(tiny()), "critic_lr_scale": 5.0, **kwargs})

    straight = agent()
    straight.learn(32)
    save_checkpoint(straight, tmp_path / "here")
    straight.learn(32, reset_num_timesteps=False)
    resumed = agent()
    load_checkpoint(resumed, tmp_path / "here")
    resumed.learn(32, reset_num_timesteps=False)
    assert run_state(resumed) == run_state(straight)
    with pytest.raises(CheckpointError, match="with other weights or options"):
        load_checkpoint(agent(critic_lr_scale=1.0), tmp_path / "here")


def test_factors_are_in_sb3s_file(tmp_path):
    model = tiny_agent(policy_kwargs={"critic_lr_scale": 5.0})
    model.learn(16)
    model.save(tmp_path / "model.zip")
    loaded = type(model).load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert [group["lr_scale"] for group in loaded.policy.optimizer.param_groups] == [1.0, 5.0]
    loaded.learn(16)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_factors_that_are_not_above_zero_are_refused(scale):
    with pytest.raises(ValueError, match="Expected factors of the learning rate above 0, got"):
        make_policy(critic_lr_scale=scale)
