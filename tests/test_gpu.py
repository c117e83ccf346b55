"""The same on a CUDA device as on the CPU; skipped, with the reason, where there is none."""

import numpy as np
import pytest
import torch

from agents import KLPenalty, generate, load_checkpoint, save_checkpoint
from tests.models import CheckRatio
from tests.training import TOKENIZER, tiny_agent

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
