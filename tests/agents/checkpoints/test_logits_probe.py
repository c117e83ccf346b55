"""The logits in a checkpoint, by which loading notices a model that computes something else."""

import json
import warnings

import pytest
import safetensors.torch
import torch

from agents import load_checkpoint, save_checkpoint
from agents.checkpoints.logits_probe import N_TOKENS, probe_logits
from agents.checkpoints.manifest import _digest
from tests.helpers.models import CACHED, make_policy, tiny
from tests.helpers.seq2seq import tiny_seq2seq
from tests.helpers.training import tiny_agent


def loaded(model, folder):
    """Load a checkpoint, and return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_checkpoint(model, folder)
    return [str(warning.message) for warning in caught]


def saved(folder, **kwargs):
    model = tiny_agent(**kwargs)
    model.learn(32)
    return save_checkpoint(model, folder)


def seal_by_hand(folder, manifest):
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": _digest(manifest)}))


def with_versions(folder, **versions):
    """Edit a checkpoint's manifest to name other versions."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["versions"] |= versions
    seal_by_hand(folder, manifest)


def double_attention(module, inputs, output):
    return (2 * output[0], *output[1:])


def test_a_model_that_computes_otherwise_is_warned_of_with_the_versions(tmp_path):
    folder = saved(tmp_path / "saved")
    assert loaded(tiny_agent(), folder) == []
    other = tiny_agent()
    other.policy.backbone.model.transformer.h[0].attn.register_forward_hook(double_attention)
    [said] = loaded(other, folder)
    assert "other logits than when the checkpoint was written" in said and "Versions: the same" in said
    with_versions(folder, torch="1.0", transformers="2.0")
    [said] = loaded(other, folder)
    assert f"torch 1.0 -> {torch.__version__}, transformers 2.0 ->" in said and "numpy" not in said
    assert loaded(tiny_agent(), folder) == []  # other versions alone are no reason to warn


def test_it_is_small_and_costs_one_forward_of_a_few_tokens(tmp_path):
    folder = saved(tmp_path / "saved")
    kept = safetensors.torch.load_file(folder / "probe.safetensors")["logits"]
    assert kept.dtype == torch.float32 and kept.shape == (3, 33)
    backbone = make_policy().lm.backbone
    read = []
    backbone.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    probe_logits(backbone)
    assert read == [N_TOKENS]


@pytest.mark.parametrize("family", [*CACHED, "t5", "bart"])
def test_every_family_has_a_probe(family):
    policy = make_policy(tiny(family) if family in CACHED else tiny_seq2seq(family))
    first = probe_logits(policy.lm.backbone)
    policy.set_training_mode(True)
    assert torch.equal(first, probe_logits(policy.lm.backbone)) and first.std() > 0
