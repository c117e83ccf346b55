"""Updates that run out of memory: repeated in halves, with an equal result, and refused at a single sequence."""

import warnings

import pytest
import torch
from stable_baselines3 import A2C
from torch.nn import functional

from tests.agents.models.test_sequences import batch_of
from tests.helpers.models import make_policy
from tests.helpers.training import tiny_agent, tiny_env, weights

N_ENVS = 16


class Small:
    """A forward hook that runs out of memory when its layer, in an update, has more rows than a limit.

    Args:
        policy: The policy that has the layer.
        limit: The largest number of rows that fits.
        where: The pass that raises, "forward" or "backward".
    """

    def __init__(self, limit, where, policy=None):
        self.limit, self.where, self.policy, self.raised = limit, where, policy, 0

    def __call__(self, module, inputs, output):
        if not self.policy.training:
            return
        if self.where == "forward":
            self.check(output)
        elif output.requires_grad:
            output.register_hook(self.check)

    def check(self, tensor):
        if len(tensor) > self.limit:
            self.raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def trained(memory=None, n_updates=1, **kwargs):
    model = tiny_agent(tiny_env(stop_ids=[]), n_envs=N_ENVS, n_epochs=1, **kwargs)
    if memory is not None:
        memory.policy = model.policy
        model.policy.backbone.model.transformer.h[1].mlp.register_forward_hook(memory)
    model.learn(n_updates * N_ENVS * 4)
    return model


def largest_difference(first, second):
    return max(float((weight - weights(second)[name]).abs().max()) for name, weight in weights(first).items())


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("forward", {}),
        ("backward", {"rollout_buffer_kwargs": {"micro_batch_tokens": 100}}),
        pytest.param("backward", {}, marks=pytest.mark.slow),
        pytest.param("forward", {"rollout_buffer_kwargs": {"micro_batch_tokens": 100}}, marks=pytest.mark.slow),
    ],
)
def test_an_update_is_repeated_in_halves_and_equals_the_whole(where, options):
    # With SGD, since AdamW divides by tiny gradients and so magnifies rounding errors.
    sgd = {"policy_kwargs": {"optimizer_class": torch.optim.SGD}, **options}
    whole = trained(n_updates=3, **sgd)
    memory = Small(5, where)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = trained(memory, n_updates=3, **sgd)
    messages = [str(warning.message) for warning in caught if "Out of memory" in str(warning.message)]
    assert largest_difference(whole, trained(n_updates=1, **sgd)) > 1e-4  # the updates do something
    assert largest_difference(whole, parts) < 1e-6
    assert 1 <= memory.raised == len(messages) <= 2  # halved until it fits, and never as large again
    assert f"To begin with it, set micro_batch_tokens={parts.policy.lm.most_tokens}" in messages[-1]
    assert "Tried to allocate 2.00 GiB" in messages[-1] and "more" not in messages[-1]
    assert torch.equal(whole.policy.generator.get_state(), parts.policy.generator.get_state())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_sequence_that_does_not_fit_is_said_with_numbers_and_three_knobs(where):
    with pytest.raises(torch.OutOfMemoryError) as error, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Out of memory")
        trained(Small(0, where))
    message = str(error.value)
    n_weights = sum(weight.numel() for weight in tiny_agent().policy.parameters())
    assert "one sequence of 7 tokens" in message and f"{n_weights:,} trained weights" in message
    for knob in ("gradient_checkpointing=True", "LoRA", "max_new_tokens", "Tried to allocate"):
        assert knob in message


def test_a2c_repeats_its_update_as_well():
    kwargs = {"algorithm": A2C, "policy_kwargs": {"optimizer_class": torch.optim.SGD}}
    models = [tiny_agent(tiny_env(stop_ids=[]), n_envs=N_ENVS, **kwargs) for _ in range(2)]
    memory = Small(7, "backward", models[1].policy)
    models[1].policy.backbone.model.transformer.h[1].mlp.register_forward_hook(memory)
    for model in models:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Out of memory")
            model.learn(N_ENVS * 4)
    assert memory.raised >= 1
    assert largest_difference(*models) < 1e-6


def gradients(policy, evaluate, micro_batch_tokens=None):
    batch, actions = batch_of([40, 3, 3, 50, 7, 12], micro_batch_tokens=micro_batch_tokens)
    policy.zero_grad()
    torch.manual_seed(3)
    values, log_probs, entropy = evaluate(batch, actions)
    ((log_probs * torch.linspace(-1, 1, len(actions))).mean() + (values**2).mean() - 0.1 * entropy.mean()).backward()
    return [None if weight.grad is None else weight.grad.clone() for weight in policy.parameters()]


def test_without_an_error_nothing_is_changed():
    """The gradient is that of the plain forward, bit for bit; weights that the loss does not use have none."""
    policy = make_policy(train="head")
    pairs = zip(gradients(policy, policy.lm.evaluate), gradients(policy, policy.lm.evaluate_parts), strict=True)
    assert all(one is other is None or torch.equal(one, other) for one, other in pairs)
    batch, actions = batch_of([4, 6])
    policy.zero_grad()
    policy.lm.evaluate(batch, actions)[1].sum().backward()
    assert policy.lm.critic.linear.weight.grad is None


def test_a_part_that_is_read_again_draws_the_same_random_numbers():
    """For a user's model with dropout, forward and backward must drop the same units."""

    def drop(module, inputs, output):
        return functional.dropout(output, 0.5)

    policy = make_policy()
    policy.lm.backbone.model.transformer.ln_f.register_forward_hook(drop)  # the probe at construction would refuse it
    bounded = gradients(policy, policy.lm.evaluate, 60)
    after = torch.rand(())
    plain = gradients(policy, policy.lm.evaluate_parts, 60)
    assert after == torch.rand(())
    for one, other in zip(bounded, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_second_derivative_is_refused():
    policy = make_policy()
    batch, actions = batch_of([4, 6])
    log_probs = policy.lm.evaluate(batch, actions)[1]
    [first] = torch.autograd.grad((log_probs**2).sum(), [policy.backbone.model.lm_head.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
