"""Learning rates scaled by factors: optimizer steps, SB3's schedule, saved files and checkpoints."""

import pytest
import torch
from stable_baselines3.common.utils import update_learning_rate
from torch import nn

from agents import SeparateCritic, load_checkpoint, save_checkpoint
from agents.checkpoints.manifest import CheckpointError
from agents.models.critic import ValueHead
from agents.policies.optimizers import learning_rate_scales, scaled_optimizer, usual_head_scale
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


@pytest.mark.parametrize(("width", "factor"), [(1, 1.0), (128, 1.0), (256, 0.5), (576, 128 / 576)])
def test_the_usual_factor_of_a_head_by_hand(width, factor):
    assert usual_head_scale(ValueHead(width)) == factor
    assert usual_head_scale(nn.Linear(width, 1)) == 1.0  # a critic of one's own


def test_a_wide_policy_has_a_slower_head_unless_told_otherwise():
    def groups(**kwargs):
        policy = make_policy(tiny(n_embd=256, n_head=2, n_layer=1), **kwargs)
        return [group["lr_scale"] for group in policy.optimizer.param_groups]

    assert groups() == [1.0, 0.5]
    assert groups(critic_lr_scale=10.0) == [1.0, 5.0]
    assert groups(head_lr_scale=1.0) == [1.0]


def noise_of_values(width, head_lr_scale=None):
    """Train a head as PPO does at the rate of adapters; return the variance of its errors over that of the returns.

    Nothing in the features says what a text will score, so that 1 is the best there is, and all above is noise. As in
    language models, the features have few independent directions, in which the steps of all weights add up.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(8, width, generator=generator)
    head, ratios = ValueHead(width), []
    scales = learning_rate_scales(head.parameters(), head, 1.0, head_lr_scale)
    optimizer = scaled_optimizer(torch.optim.AdamW, scales, lr=1e-3, weight_decay=0.0)
    for _ in range(8):
        features = torch.randn(32, 8, generator=generator) @ directions / 8**0.5  # one state for each of 32 texts
        returns = torch.randn(32, generator=generator)
        ratios.append((returns - head(features)).var().item() / returns.var().item())
        for _ in range(2):
            for part in torch.randperm(32, generator=generator).chunk(4):
                optimizer.zero_grad()
                (head(features[part]) - returns[part]).square().mean().backward()
                optimizer.step()
    assert ratios[0] == pytest.approx(1.0)  # the head starts at zero
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("width", [128, 576, 4096])
def test_values_of_a_wide_head_are_hardly_noisy(width):
    assert noise_of_values(width) < 1.1


@pytest.mark.parametrize("width", [576, 4096])
def test_values_of_a_wide_head_at_the_policys_rate_are_noise(width):
    """The negative control."""
    assert noise_of_values(width, head_lr_scale=1.0) > 1.15


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
