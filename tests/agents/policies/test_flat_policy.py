"""`FlatLMPolicy`: the policy of `LMPolicy` with its weights in one vector, as TRPO needs it (A1, A8, E7, E8, E9)."""

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import QRDQN, TRPO, RecurrentPPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import kl_divergence
from transformers import AutoModelForCausalLM

from agents import (
    FlatLMPolicy,
    KLPenalty,
    LMPolicy,
    SequenceRolloutBuffer,
    SharedCritic,
    export,
    load_checkpoint,
    save_checkpoint,
)
from agents.build import make_agent
from agents.models.sampling import TokenDistribution, score_tokens
from agents.models.sequences import SequenceBatch
from tests.helpers.models import (
    LENGTH,
    N_TOKENS,
    CheckRatio,
    collect,
    make_policy,
    make_ppo,
    observe,
    randomise_critic,
    tiny,
)
from tests.helpers.training import run_state, same_weights, tiny_agent, tiny_config, tiny_env, weights
from textenv.episodes.rules import SEPARATOR

FLAT = "gpt2", "llama", "gpt_neox", "bloom", "gemma2"
ROWS = [([1, 2, 3], [4, 5]), ([7], []), ([3] * 10, [1])]
EAGER = {"attn_implementation": "eager"}


class HalfFrozen:
    """A spec of a GPT-2 whose first layer and embeddings, tied to its head, are frozen."""

    def build(self):
        model = AutoModelForCausalLM.from_config(tiny())
        for weight in (model.transformer.wte.weight, *model.transformer.h[0].parameters()):
            weight.requires_grad_(False)
        return model


def make_flat(lm=None, seed=0, **kwargs):
    """Return the flat counterpart of `make_policy`, with the same weights for the same seed."""
    torch.manual_seed(seed)
    space = spaces.Box(SEPARATOR, N_TOKENS - 1, (LENGTH,), np.int64)
    policy = FlatLMPolicy(space, spaces.Discrete(N_TOKENS), lambda _: 1e-3, lm=lm or tiny(), **kwargs)
    policy.set_training_mode(False)
    randomise_critic(policy)
    return policy


def make_trpo(lm=None, n_steps=6, **kwargs):
    """Return TRPO on a tiny model, built by `make_agent`."""
    env = tiny_env(max_new_tokens=6, reward=lambda prompt, preds, done: float(preds[-1] % 3 == 1))
    model = make_agent(env, lm or tiny(), 4, TRPO, n_steps=n_steps, seed=0, device="cpu", **kwargs)
    randomise_critic(model.policy)
    return model


def parts(policy):
    """Return a copy of the language model's weights by their names in transformers, each once."""
    with policy.lm.backbone.whole_model() as model:
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("family", FLAT)
def test_it_is_the_same_policy_with_the_same_gradients(family):
    plain, flat = make_policy(tiny(family)), make_flat(tiny(family), critic=SharedCritic())
    assert [name for name, _ in flat.named_parameters() if "value" in name] == []
    gradients, results = [], []
    for policy in (plain, flat):
        results.append(policy.evaluate_actions(observe(ROWS), torch.tensor([1, 2, 3])))
        values, log_probs, entropies = results[-1]
        (log_probs.sum() + 0.3 * entropies.sum() + values.pow(2).sum()).backward()
        gradients.append(torch.cat([weight.grad.ravel() for weight in policy.parameters()]))
    for of_plain, of_flat in zip(*results):
        torch.testing.assert_close(of_plain, of_flat, rtol=1e-5, atol=1e-5)
    assert len(gradients[0]) == len(gradients[1]) and gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4 * float(gradients[0].abs().max()))
    of_plain, of_flat = (policy.get_distribution(observe(ROWS)).log_probabilities for policy in (plain, flat))
    torch.testing.assert_close(of_plain, of_flat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_the_second_derivative_is_the_fisher_matrix(family):
    """The Hessian of KL(now, old) at old is the Fisher matrix, the sum of p grad(log p) grad(log p)'."""
    model = make_trpo(tiny(family))
    batch = SequenceBatch.from_observations(observe(ROWS[:2]))
    flat = model.policy.lm.backbone.flat
    with torch.no_grad():
        old = copy.copy(model.policy.get_distribution(batch))
    now = model.policy.get_distribution(batch)
    divergence = kl_divergence(now, old).mean()
    (gradient,) = torch.autograd.grad(divergence, flat, create_graph=True)
    assert divergence.abs() < 1e-6 and gradient.abs().max() < 1e-4
    vector = torch.randn(len(flat), generator=torch.Generator().manual_seed(0))
    product = model.hessian_vector_product([flat], gradient, vector) - model.cg_damping * vector
    expected = torch.zeros_like(flat)
    log_probabilities = now.log_probabilities
    for row in log_probabilities:
        for log_p in row:
            (slope,) = torch.autograd.grad(log_p, flat, retain_graph=True)
            expected += log_p.exp().detach() * slope * (slope @ vector) / len(log_probabilities)
    torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_lean_score_has_no_second_derivative_and_says_so():
    logits = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="Expected to differentiate `score_tokens` once"):
        torch.autograd.grad(score_tokens(logits, torch.tensor([0, 1]))[0].sum(), logits, create_graph=True)
    (gradient,) = torch.autograd.grad(
        TokenDistribution(logits).log_prob(torch.tensor([0, 1])).sum(), logits, create_graph=True
    )
    gradient.pow(2).sum().backward()
    assert logits.grad.abs().max() > 0


# TRPO


def trained(model):
    """Make one update; return the weights of the language model and the critic."""
    collect(model)
    torch.manual_seed(0)  # TRPO's conjugate gradient solver starts from torch's global generator
    model.train()
    assert model.logger.name_to_value["train/is_line_search_success"] == 1
    return {**parts(model.policy), "critic": model.policy.lm.critic.linear.weight.detach().clone()}


def test_an_update_ends_where_the_slow_ways_end():
    """Sequences or one sample per token, one vector or separate parameters: `train` ends with the same weights."""
    kwargs = {"normalize_advantage": True, "cg_max_steps": 5, "n_critic_updates": 3, "learning_rate": 1e-2}
    kwargs["policy_kwargs"] = {"critic": SharedCritic(), "optimizer_class": torch.optim.SGD}
    lm = tiny(**EAGER)
    models = [
        make_ppo(lm, n_steps=6, algorithm=TRPO, batch_size=24, **kwargs, policy_class=cls, rollout_buffer_class=buffer)
        for cls, buffer in (
            (FlatLMPolicy, SequenceRolloutBuffer),
            (FlatLMPolicy, RolloutBuffer),
            (LMPolicy, RolloutBuffer),
        )
    ]
    before = parts(models[0].policy)
    fast, *slow = map(trained, models)
    assert max((fast[name] - before[name]).abs().max() for name in before) > 1e-3
    for other in slow:
        assert fast.keys() == other.keys()
        for name in fast:
            torch.testing.assert_close(fast[name], other[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["gpt_neox", "bloom"])
def test_weights_with_value_in_their_name_are_trained(family):
    """TRPO takes parameters with "value" in their name for the critic's, as `query_key_value`; one vector avoids it."""
    moved = {}
    for cls in (LMPolicy, FlatLMPolicy):
        detached = {"critic": SharedCritic(detach=True)}  # or the value loss would train the weights that TRPO skips
        lm = tiny(family, **EAGER)
        model = make_ppo(
            lm, algorithm=TRPO, n_steps=6, batch_size=24, cg_max_steps=5, policy_class=cls, policy_kwargs=detached
        )
        before, after = parts(model.policy), trained(model)
        moved[cls] = {name for name in before if not torch.equal(before[name], after[name])}
    names = {name for name in before if "query_key_value.weight" in name}
    assert len(names) == 2 and not names & moved[LMPolicy] and names <= moved[FlatLMPolicy]


def test_a1_rollouts_decode_with_the_new_weights():
    """TRPO replaces the parameter's `data`; cached decoding uses the new tensor in each rollout (A1, A8)."""
    model, check = make_trpo(n_steps=4), CheckRatio()
    model.learn(4 * 4 * 4, callback=check)
    assert len(check.largest) == 4 and max(check.largest) < 1e-4
    policy, observations = model.policy, observe(ROWS)
    policy.set_training_mode(False)
    for write in (lambda flat: flat.data.mul_(0.5), lambda flat: setattr(flat, "data", flat.data * 0.5)):
        write(policy.lm.backbone.flat)
        policy.lm.drop_caches()
        with torch.no_grad():
            _, values, log_probs = policy.forward(observations, deterministic=True)
            full = policy.lm.act(observations, deterministic=True)
        plain = make_policy(seed=1)
        with policy.lm.backbone.whole_model() as whole:
            plain.lm.backbone.model.load_state_dict(whole.state_dict())
        plain.lm.critic.load_state_dict(policy.lm.critic.state_dict())
        with torch.no_grad():
            expected = plain.lm.act(observations, deterministic=True)
        for cached, uncached, of_plain in zip((values[:, 0], log_probs), full[1:], expected[1:]):
            torch.testing.assert_close(cached, of_plain, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(uncached, of_plain, rtol=1e-5, atol=1e-5)


def test_e7_frozen_weights_stay_and_tied_ones_stay_tied():
    model = make_trpo(HalfFrozen(), sub_sampling_factor=2)
    before = weights(model)
    callback = KLPenalty(0.1)
    model.learn(48, callback=callback)
    after = weights(model)
    assert torch.equal(callback.reference.backbone.flat, before["lm.backbone.model.transformer.flat"])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-1] for name in changed} == {"flat", "weight", "bias"}
    assert len(changed) == 3 and all(weight.requires_grad for weight in model.policy.parameters())
    lm = model.policy.double().float().lm.backbone.model
    assert lm.lm_head.weight is lm.transformer.wte.weight


def test_c2_a_policy_that_is_its_reference_pays_nothing():
    model = make_trpo()
    callback = KLPenalty(1.0)
    collect(model, callback)
    values = model.logger.name_to_value
    assert "kl/token" in values and abs(values["kl/token"]) < 1e-6
    callback.reference.backbone.flat.data.zero_()
    assert model.policy.lm.backbone.flat.abs().max() > 0


def test_it_saves_and_loads(tmp_path):
    model = make_trpo()
    model.learn(24)
    model.save(tmp_path / "model")
    again = TRPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert same_weights(weights(model), weights(again))
    observations = observe(ROWS)
    before, after = (each.policy.get_distribution(observations).log_probabilities for each in (model, again))
    assert torch.equal(before, after)


def test_e8_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    def make():
        return tiny_agent(algorithm=TRPO, cg_max_steps=3, n_critic_updates=2)

    whole = make()  # not side by side with the next: TRPO draws from torch's global generator
    whole.learn(48)
    expected = run_state(whole)
    first = make()
    first.learn(32)
    save_checkpoint(first, tmp_path / "run")
    second = make()
    load_checkpoint(second, tmp_path / "run")
    second.learn(16, reset_num_timesteps=False)
    assert run_state(second) == expected


@pytest.mark.parametrize("lm", [tiny_config(), HalfFrozen()], ids=["trainable", "frozen"])
def test_e9_the_exported_folder_loads_alone(tmp_path, lm):
    model = make_trpo(lm)
    model.learn(24)
    export(model, None, tmp_path / "lm")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected = model.policy.get_distribution(observe([([1, 2, 3, 4], [])])).log_probabilities
        logits = alone(ids).logits[:, -1, :N_TOKENS]
    torch.testing.assert_close(logits.log_softmax(dim=-1), expected, rtol=1e-5, atol=1e-5)
    model.learn(24)  # the policy still trains after the export


def test_gradient_checkpointing_is_refused():
    model = make_trpo(tiny())
    model.policy.lm.backbone.model._set_gradient_checkpointing(enable=True)
    with pytest.raises(ValueError, match="Expected a model without gradient checkpointing"):
        model.policy.get_distribution(observe(ROWS))


class Unfit:
    """A spec of a GPT-2 with all weights frozen, or with some of another dtype."""

    def __init__(self, frozen):
        self.frozen = frozen

    def build(self):
        model = AutoModelForCausalLM.from_config(tiny()).requires_grad_(not self.frozen)
        model.transformer.wpe.to(torch.float64)
        model.transformer.wpe.register_forward_hook(lambda module, inputs, output: output.float())
        return model


@pytest.mark.parametrize("frozen", [True, False])
def test_weights_of_several_types_or_none_are_refused(frozen):
    with pytest.raises(ValueError, match="Expected trainable weights of one type on one device"):
        make_flat(Unfit(frozen))


# make_agent


def test_make_agent_with_trpo():
    model = make_agent(tiny_env(), tiny_config(), n_envs=16, algorithm=TRPO, device="cpu")
    assert type(model) is TRPO and type(model.policy) is FlatLMPolicy and model.policy.lm.critic.detach
    assert (model.gamma, model.gae_lambda, model.n_steps, model.batch_size) == (1.0, 0.95, 4, 32)
    assert (model.learning_rate, model.normalize_advantage) == (1e-3, False)


class MyPPO(PPO):
    pass


def test_make_agent_follows_a_subclass():
    model = make_agent(tiny_env(), tiny_config(), n_envs=8, algorithm=MyPPO, device="cpu")
    assert type(model) is MyPPO and type(model.policy) is LMPolicy and model.n_epochs == 4


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [(RecurrentPPO, "recurrent state has nothing to add"), (DQN, "off-policy"), (QRDQN, "off-policy"), (dict, "known")],
)
def test_make_agent_refuses_other_algorithms(algorithm, reason):
    with pytest.raises(
        ValueError, match=f"Expected `algorithm` to be one of PPO, A2C, TRPO, MaskablePPO, got .*{reason}"
    ):
        make_agent(tiny_env(), tiny_config(), algorithm=algorithm)


def test_recurrent_ppo_is_refused_by_the_policy_too():
    with pytest.raises(TypeError, match="Expected an algorithm without recurrent state"):
        RecurrentPPO(LMPolicy, tiny_env(), policy_kwargs={"lm": tiny_config()}, device="cpu")
