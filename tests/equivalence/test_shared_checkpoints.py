"""Layers under activation checkpointing share prompts, too: they run again in the backward, with the same keys (F3)."""

import weakref
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from agents import LoRA, SeparateCritic
from agents.models.layers import transformer_layers
from agents.models.pretrained import build_model
from agents.models.shared_prompts import BehindPrompts, OfPrompts
from agents.models.trainable import checkpoint_layers
from tests.equivalence.test_shared_update import (  # noqa: F401  (`always` is a fixture)
    SHARING,
    always,
    assert_close,
    batch_of,
    columns_of,
    differences,
    scores,
)
from tests.helpers.models import N_POSITIONS, collect, few, make_policy, tiny
from tests.helpers.training import tiny_agent, tiny_env, weights

# Older versions of transformers take keys and values from all layers under activation checkpointing.
CAN_SHARE = hasattr(GradientCheckpointingLayer, "_can_checkpoint_with_cache")
can_share = pytest.mark.skipif(not CAN_SHARE, reason="this version of transformers takes keys from such layers")


@dataclass(frozen=True)
class Checkpointed:
    """A critic's model whose layers are under activation checkpointing."""

    config: PreTrainedConfig

    def build(self):
        model = build_model(self.config)
        checkpoint_layers(model)
        return model


OPTIONS = {
    "all": {},
    "adapters": {"train": LoRA(r=2)},
    "head": {"train": "head"},
    "autocast": {"autocast": "bfloat16"},
    "value_norm": {"value_norm": "popart", "temperature": 0.7},
    "separate_critic": {"critic": SeparateCritic(Checkpointed(tiny("llama")))},
}


@can_share
@pytest.mark.parametrize("bound", [None, 45])
@pytest.mark.parametrize("name", OPTIONS)
def test_f3_results_are_those_without_checkpoints_and_without_sharing(name, bound):
    batch, actions = batch_of(micro_batch_tokens=bound)
    plain = make_policy(**OPTIONS[name])
    for layer in transformer_layers(plain.lm.critic):
        layer.gradient_checkpointing = False
    checkpointed = make_policy(gradient_checkpointing=True, **OPTIONS[name])
    sides = scores(checkpointed, batch, actions, True), scores(plain, batch, actions, False)
    furthest = max(float((one - other).norm() / other.norm()) for one, other in zip(*sides, strict=True))
    assert furthest < (0.1 if name == "autocast" else 1e-6)


@can_share
@pytest.mark.parametrize("family", few(SHARING, 4))
def test_f3_every_family_shares_in_checkpoints(family):
    policy = make_policy(tiny(family, initializer_range=0.1), gradient_checkpointing=True)
    assert max(differences(policy, *batch_of())) < 1e-6
    policy.lm.may_share_prompts = True
    assert policy.lm.train(False).shared_columns is not None  # a reference and the passes before returns


@can_share
def test_each_layer_runs_again_on_the_first_keys_and_keeps_no_copies(monkeypatch):
    policy, (batch, actions) = make_policy(gradient_checkpointing=True), batch_of()
    copies, prompts = [], []
    update, update_prompts = BehindPrompts.update, OfPrompts.update

    def watch(self, *states):
        result = update(self, *states)
        copies.extend(weakref.ref(part) for part in result)
        return result

    def watch_prompts(self, *states):
        result = update_prompts(self, *states)
        prompts.append((self, self.keys))
        return result

    monkeypatch.setattr(BehindPrompts, "update", watch)
    monkeypatch.setattr(OfPrompts, "update", watch_prompts)
    values = policy.lm.train(True).evaluate_parts(batch, actions)[0]
    n_first = len(copies)
    assert n_first > 0 and all(copy() is None for copy in copies)
    values.sum().backward()
    assert len(copies) == 2 * n_first and all(copy() is None for copy in copies)
    assert len(prompts) == 2 * len({id(layer) for layer, _ in prompts})
    assert all(keys is layer.keys for layer, keys in prompts)


@can_share
def test_f3_detached_keys_are_seen(monkeypatch):
    """The negative control: numbers agree and gradients do not, which the probe of a new model sees as well."""
    policy, expanded = make_policy(gradient_checkpointing=True), BehindPrompts._expanded
    monkeypatch.setattr(BehindPrompts, "_expanded", lambda self, states: expanded(self, states).detach())
    *results, gradient = differences(policy, *batch_of())
    assert max(results) < 1e-6 and gradient > 1e-3
    assert columns_of(make_policy(tiny(initializer_range=0.02), gradient_checkpointing=True)) is None


@can_share
def test_a_cache_that_appends_when_a_layer_runs_again_is_seen(monkeypatch):
    """What transformers' own caches do: each layer's second run has the completion's keys twice."""
    policy, update = make_policy(gradient_checkpointing=True), BehindPrompts.update

    def append(self, *states):
        if (earlier := getattr(self, "earlier", None)) is None:
            self.earlier = states
        else:
            states = tuple(torch.cat(pair, dim=2) for pair in zip(earlier, states, strict=True))
        return update(self, *states)

    monkeypatch.setattr(BehindPrompts, "update", append)
    with pytest.raises((RuntimeError, torch.utils.checkpoint.CheckpointError)):
        differences(policy, *batch_of())
    assert columns_of(make_policy(tiny(), gradient_checkpointing=True)) is None


def test_checkpoints_of_later_on_read_whole_sequences():
    """They have not been examined: the functions that they call are not known."""
    policy = make_policy()
    checkpoint_layers(policy.lm.backbone.model)
    assert columns_of(policy) is None and policy.lm.train(False).shared_columns == N_POSITIONS


def test_outside_of_shared_forwards_transformers_takes_the_keys():
    """A forward of the user's own, with a cache of transformers, would append to it once more in the backward."""
    policy = make_policy(tiny("llama"), gradient_checkpointing=True)
    scores(policy, *batch_of(), is_shared=CAN_SHARE)
    model = policy.lm.train(True).backbone.model
    model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True).logits.sum().backward()


def test_groups_are_trained_the_same_with_checkpoints():
    ends = []
    for options in ({"gradient_checkpointing": True}, {}):
        env = tiny_env(prompts=["a longer prompt", "another prompt"], samples_per_prompt=4, stop_ids=())
        model = tiny_agent(env, n_envs=8, policy_kwargs=options)
        model.policy.lm.may_share_prompts = bool(options)
        model.learn(64)
        batch = collect(model).view().batch
        assert any(chunk.shared is not None for chunk in model.policy.lm.chunks(batch)) == (CAN_SHARE and bool(options))
        ends.append(weights(model))
    assert_close(*ends)
