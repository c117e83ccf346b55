"""Adapters that are merged while a rollout decodes: the same numbers, and no weight, file or update that knows (F4)."""

import copy
import io
import math

import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import nn

from agents import KLPenalty, LoRA, Pretrained
from agents.models import merged_adapters
from agents.models.merged_adapters import MergingForward, keep_apart, merging_forwards, tokens_to_merge
from agents.models.trainable import adapted_layers, adapters_off
from tests.equivalence.test_cache import EVERYTHING, TOLERANCE
from tests.equivalence.test_seq2seq import decode, full_forward, worst
from tests.helpers.models import CheckRatio, collect, disturb, few, make_policy, make_ppo, tiny, tiny_mixture
from tests.helpers.seq2seq import tiny_seq2seq
from tests.helpers.training import run_state, same_weights, tiny_agent, weights

KINDS = {
    "llama": (tiny("llama"), LoRA(r=3, alpha=6)),
    "gpt2": (tiny("gpt2"), LoRA(r=3, alpha=6)),  # its W is transposed, and has a bias
    "gemma2": (tiny("gemma2"), LoRA(r=3)),  # runs its whole forward
    "t5": (tiny_seq2seq("t5"), LoRA(r=3)),
    "bart": (tiny_seq2seq("bart"), LoRA(r=3)),
    "rslora": (tiny("llama"), LoRA(r=3, use_rslora=True)),
    "dora": (tiny("llama"), LoRA(r=3, use_dora=True)),
    "dora of gpt2": (tiny("gpt2"), LoRA(r=3, use_dora=True)),
    "a few layers": (tiny("llama"), LoRA(r=3, target_modules=["q_proj", "down_proj"])),
    "experts": (tiny_mixture(), LoRA(r=3)),  # the experts themselves stay apart
}


def adapted(name="llama", at_once=True, **kwargs):
    """Return a policy whose adapters differ from nothing, which merges them at its first read."""
    config, train = KINDS[name]
    policy = make_policy(copy.deepcopy(config), train=train, **kwargs)
    disturb(policy.lm.backbone)
    if at_once:
        policy.lm.rollout_cache._tokens_to_merge = 0
    return policy


def merged(policy):
    """Return the layers that have a merged weight now."""
    return [forward for forward in merging_forwards(policy.lm) if forward.merged is not None]


def whole_state(policy):
    """Return all weights by name, with the tensors' own addresses."""
    return {name: (weight.data_ptr(), weight.clone()) for name, weight in policy.state_dict().items()}


def is_unchanged(policy, before):
    now = policy.state_dict()
    return now.keys() == before.keys() and all(
        now[name].data_ptr() == address and torch.equal(now[name], weight) for name, (address, weight) in before.items()
    )


def differences(policy, steps):
    """Return the mean and the largest |difference| of decoded log-probabilities from whole sequences, of all tokens."""
    parts = []
    for observations in steps:
        busy = (observations >= 0).any(dim=1)
        parts.append((decode(policy, observations)[0] - full_forward(policy, observations)[0])[busy].abs().flatten())
    return float(torch.cat(parts).mean()), float(torch.cat(parts).max())


# It is right


@pytest.mark.parametrize("name", few(KINDS, 4))
def test_f4_decoding_equals_the_whole_sequence_read_with_adapters(name):
    """On average within 1e-5; the largest difference may be over it, as it is with adapters apart (up to 1.6e-5)."""
    policy = adapted(name)
    mean, largest = differences(policy, EVERYTHING)
    assert mean < TOLERANCE and largest < 5 * TOLERANCE
    assert len(merged(policy)) == len(merging_forwards(policy.lm)) > 0
    if name != "experts":
        assert len(merged(policy)) == len(adapted_layers(policy.lm))


def test_a_merged_weight_is_w_plus_alpha_over_r_b_a():
    policy = adapted("gpt2")
    decode(policy, EVERYTHING[0])
    for forward in merged(policy):
        layer = forward.layer
        a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
        expected = layer.base_layer.weight.t() + 2 * b @ a  # alpha 6, r 3; GPT-2's W is (inputs, outputs)
        assert torch.allclose(forward.merged, expected, atol=1e-6)
        assert not torch.allclose(forward.merged, layer.base_layer.weight.t(), atol=1e-2)


def test_a_negative_control():
    """Merged weights of other adapters give other numbers: decoding does read them."""
    policy = adapted()
    decode(policy, EVERYTHING[0])
    for forward in merged(policy):
        forward.merged = forward.layer.base_layer.weight.detach()
    assert worst(policy, EVERYTHING[1:3]) > 1e-2


@pytest.mark.parametrize("name", few(["llama", "gpt2", "dora", "t5"], 2))
def test_a1_ratios_and_updates_are_those_of_adapters_that_stay_apart(name):
    """Over updates that change the adapters: ratio 1 (A1), and the gradients of a run that never merges, to 1e-6."""
    trained = []
    for at_once in (True, False):
        config, train = KINDS[name]
        check = CheckRatio()
        model = make_ppo(copy.deepcopy(config), policy_kwargs={"train": train}, learning_rate=1e-2)
        disturb(model.policy.lm.backbone)
        model.policy.lm.rollout_cache._tokens_to_merge = 0 if at_once else math.inf
        model.learn(3 * 48, callback=[check, KLPenalty(0.1)])
        assert max(check.largest) < 1e-5
        trained.append(weights(model))
    for key, weight in trained[0].items():
        assert torch.allclose(weight, trained[1][key], atol=1e-6), key


# Nobody notices


def test_f4_no_weight_changes_inside_a_step():
    """Inside the forward of a step, `state_dict` and `parameters` have the weights, their names and their addresses."""
    policy = adapted()
    before, names = whole_state(policy), [name for name, _ in policy.named_parameters()]
    seen = []

    def look(*_):
        seen.append(is_unchanged(policy, before) and names == [name for name, _ in policy.named_parameters()])

    handle = policy.backbone.model.get_output_embeddings().register_forward_hook(look)
    decode(policy, EVERYTHING[0])
    handle.remove()
    assert seen == [True] and merged(policy)


class InTheMiddle(BaseCallback):
    """Calls a function at each step of a rollout."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def _on_step(self):
        self.act(self.model)
        return True


def test_f4_a_file_saved_in_the_middle_of_a_rollout_has_the_weights_of_the_start():
    model = make_ppo(tiny("llama"), policy_kwargs={"train": LoRA(r=3)})
    disturb(model.policy.lm.backbone)
    model.policy.lm.rollout_cache._tokens_to_merge = 0
    start, files = weights(model), []

    def save(model):
        assert merged(model.policy)
        files.append(io.BytesIO())
        model.save(files[-1])

    collect(model, InTheMiddle(save))
    loaded = PPO.load(files[5], device="cpu")
    assert same_weights(weights(loaded), start) and same_weights(weights(model), start)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_f4_nothing_is_left_of_a_step_that_is_broken_off(error):
    policy = adapted()
    before = whole_state(policy)
    expected = full_forward(policy, EVERYTHING[0])
    layer = policy.backbone.model.model.layers[1]

    def fail(*_):
        raise error("in the middle")

    handle = layer.register_forward_hook(fail)
    with pytest.raises(error, match="in the middle"):
        decode(policy, EVERYTHING[0])
    handle.remove()
    assert is_unchanged(policy, before) and not merged(policy)
    for one, other in zip(expected, full_forward(policy, EVERYTHING[0]), strict=True):
        assert torch.equal(one, other)
    assert worst(policy, EVERYTHING[:4]) < TOLERANCE


def test_the_copies_are_freed_before_an_update():
    model = make_ppo(tiny("llama"), policy_kwargs={"train": LoRA(r=3)})
    model.policy.lm.rollout_cache._tokens_to_merge = 0
    collect(model)
    assert merged(model.policy)
    model.policy.set_training_mode(True)
    assert not merged(model.policy)


def test_e12_what_is_generated_in_between_changes_no_bit():
    """Evaluations read as much as it takes to merge; the rollout around them merges when it would have."""

    def read(model):
        with model.policy.rollout_set_aside():
            for observations in EVERYTHING[:20]:
                decode(model.policy, observations)
            n_merged.append(len(merged(model.policy)))

    runs, n_merged = [], []
    for callbacks in ([], [InTheMiddle(read)]):
        model = tiny_agent(policy_kwargs={"train": LoRA(r=4)})
        model.learn(96, callback=callbacks)
        runs.append(run_state(model)["tensors"])
    assert runs[0] == runs[1] and max(n_merged) > 0


# When weights change


def raise_version(weight):
    weight.add_(0.1)


def take_another_tensor(weight):
    weight.data = weight.data + 0.1


@pytest.mark.parametrize("change", [raise_version, take_another_tensor])
@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_whatever_changes_a_weight_is_merged_anew(change, part):
    policy = adapted()
    decode(policy, EVERYTHING[0])
    with torch.no_grad():
        change(merging_forwards(policy.lm)[-1].layer.get_submodule(part).weight)
    assert worst(policy, [EVERYTHING[0].flip(0)]) < TOLERANCE


def test_a_fused_step_of_the_optimizer_is_merged_anew():
    policy = adapted(optimizer_class=torch.optim.AdamW)
    decode(policy, EVERYTHING[0])
    for weight in policy.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    policy.optimizer.param_groups[0]["lr"] = 0.1
    policy.optimizer.step()
    assert not merged(policy) and worst(policy, EVERYTHING[:3]) < TOLERANCE


# When it pays, and where it stays apart


def test_the_number_of_tokens_from_which_a_merge_pays_by_hand():
    """Layers of 16 to 16 and 16 to 8: merges of 256 + 128, adapters of 32 + 24 a token."""
    sizes = [(16, 16), (16, 8)]
    policy = adapted()
    forwards = merging_forwards(policy.lm)[: len(sizes)]
    for forward, (inputs, outputs) in zip(forwards, sizes, strict=True):
        forward.layer.in_features, forward.layer.out_features = inputs, outputs
    assert tokens_to_merge(forwards) == pytest.approx(2 * 384 / 56)
    assert tokens_to_merge([]) == math.inf


def test_few_tokens_are_read_with_adapters_apart():
    """Rows of 1 + 3 + 9 + 5 tokens count 18 in the first read, and 4 in each one after it."""
    policy = adapted(at_once=False)
    cache = policy.lm.rollout_cache
    assert cache._tokens_to_merge == tokens_to_merge(merging_forwards(policy.lm)) < math.inf
    cache._tokens_to_merge = 23
    counts = []
    for observations in EVERYTHING[:4]:
        decode(policy, observations)
        counts.append((cache._n_read, bool(merged(policy))))
    assert counts == [(18, False), (22, False), (26, True), (30, True)]
    cache.drop()
    assert cache._n_read == 0 and not merged(policy)


def test_copies_that_take_much_of_the_memory_are_not_made(monkeypatch):
    forwards = merging_forwards(adapted().lm)
    n_bytes = sum(4 * forward.size[0] * forward.size[1] for forward in forwards)
    monkeypatch.setattr(merged_adapters, "_memory", lambda device: 8 * n_bytes)
    assert tokens_to_merge(forwards) < math.inf
    monkeypatch.setattr(merged_adapters, "_memory", lambda device: 8 * n_bytes - 1)
    assert tokens_to_merge(forwards) == math.inf


def test_weights_of_16_bits_and_autocast_stay_apart(tmp_path):
    make_policy(tiny("llama")).backbone.model.save_pretrained(tmp_path)
    half = make_policy(Pretrained(str(tmp_path), dtype=torch.bfloat16), train=LoRA(r=3))
    cast = adapted(autocast="bfloat16")
    for policy in (half, cast):
        policy.lm.rollout_cache._tokens_to_merge = 0
        policy(EVERYTHING[0])  # by way of `act`, which begins autocast
        with torch.no_grad():
            policy(EVERYTHING[0])
        assert merging_forwards(policy.lm) and not merged(policy)


def hooked(policy):
    merging_forwards(policy.lm)[0].layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)


def with_own_forward(policy):
    base = merging_forwards(policy.lm)[0].layer.base_layer
    base.forward = lambda states: nn.functional.linear(states, base.weight) + 1


def parametrized(policy):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(merging_forwards(policy.lm)[0].layer.base_layer, "weight", Double())


@pytest.mark.parametrize("change", [hooked, with_own_forward, parametrized])
def test_a_layer_that_does_more_than_its_weight_says_stays_apart(change):
    policy = adapted()
    change(policy)
    assert worst(policy, EVERYTHING[:6]) < 5 * TOLERANCE  # a doubled weight rounds more, by how much depends on the CPU
    assert len(merged(policy)) == len(merging_forwards(policy.lm)) - 1


def test_adapters_that_are_off_stay_off():
    policy = adapted()
    with adapters_off(policy.backbone.model):
        assert worst(policy, EVERYTHING[:3]) < TOLERANCE and not merged(policy)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["in place", "around the model"])
def test_a_compiled_model_stays_apart(place):
    policy = adapted()
    policy.lm.rollout_cache.drop()
    if place == "in place":
        policy.backbone.model.model.compile(backend="eager")
    else:
        policy.backbone.model.model = torch.compile(policy.backbone.model.model, backend="eager")
    assert worst(policy, EVERYTHING[:3]) < TOLERANCE and not merged(policy)


def test_a_sharded_model_stays_apart():
    """`Shards` calls `keep_apart` (see tests/agents/distributed/test_sharded.py for its numbers)."""
    policy = adapted()
    expected = full_forward(policy, EVERYTHING[0])[0]
    keep_apart(policy.lm)
    assert not merging_forwards(policy.lm)
    assert torch.equal(full_forward(policy, EVERYTHING[0])[0], expected)


def test_a_copy_merges_its_own_weights():
    policy = adapted()
    decode(policy, EVERYTHING[0])
    copied = copy.deepcopy(policy.lm)
    layers = set(copied.modules())
    assert all(forward.layer in layers for forward in merging_forwards(copied))
    assert all(isinstance(forward, MergingForward) for forward in copied.rollout_cache._forwards)
    assert copied.rollout_cache._forwards == merging_forwards(copied)
