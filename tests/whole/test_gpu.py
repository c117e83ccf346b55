"""Training on a CUDA device, compared with the CPU; skipped with the reason where there is none."""

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from agents import KLPenalty, Pretrained, Sharded, generate, load_checkpoint, save_checkpoint
from agents.callbacks.finite_updates import FiniteUpdates
from tests.helpers.models import CheckRatio
from tests.helpers.processes import train
from tests.helpers.training import TOKENIZER, tiny_agent, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a1_the_ratio_is_one_on_the_device():
    check = CheckRatio()
    tiny_agent(device="cuda").learn(64, callback=check)
    assert max(check.largest) < 1e-4


def test_training_on_the_device_ends_near_the_cpu():
    rewards = []
    for device in ("cpu", "cuda"):
        model = tiny_agent(device=device)
        model.learn(64, callback=KLPenalty(0.1))
        rewards.append(model.rollout_buffer.returns)
    np.testing.assert_allclose(*rewards, atol=1e-2)


def test_bfloat16_autocast_trains():
    model = tiny_agent(device="cuda", policy_kwargs={"autocast": "bfloat16"})
    model.learn(32)
    assert all(torch.isfinite(weight).all() for weight in model.policy.parameters())


def test_generate_and_checkpoint(tmp_path):
    model, other = tiny_agent(device="cuda"), tiny_agent(device="cuda", seed=1)
    model.learn(32)
    save_checkpoint(model, tmp_path / "saved")
    other.learn(32)
    load_checkpoint(other, tmp_path / "saved")
    texts = [[g.ids for g in generate(m, ["ab", "c"], TOKENIZER, n=3, max_new_tokens=4)] for m in (model, other)]
    assert texts[0] == texts[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_map_over_two_devices_trains_as_one(tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    GPT2LMHeadModel(tiny_config(tie_word_embeddings=False)).save_pretrained(tmp_path)
    device_of = {"wte": 0, "wpe": 0, "h.0": 0, "h.1": 1, "ln_f": 1}
    spread_map = {**{f"transformer.{module}": device for module, device in device_of.items()}, "lm_head": 1}
    weights = []
    for lm in (Pretrained(tmp_path, device_map={"": 0}), Pretrained(tmp_path, device_map=spread_map)):
        model = tiny_agent(lm=lm, device="cuda")
        model.learn(64, callback=FiniteUpdates())
        weights.append([weight.detach().cpu() for weight in model.policy.parameters()])
    assert all(torch.allclose(single, spread, atol=1e-4) for single, spread in zip(*weights, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_make_the_update_of_one_by_nccl():
    """Copies, shards that are gathered, in lock-step and offloaded, against one device."""
    weights, figures, _ = train(1, "updates_on_devices", None, timeout=120)[0]
    for shard in (None, Sharded(), Sharded(gather=False), Sharded(offload=True)):
        for theirs, their_figures, backend in train(2, "updates_on_devices", shard, timeout=120):
            assert backend == "nccl" and their_figures == pytest.approx(figures, rel=1e-3), shard
            assert max(np.abs(theirs[name] - weights[name]).max() for name in weights) < 1e-5, shard
