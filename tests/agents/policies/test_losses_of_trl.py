"""Surrogates and aggregations beside TRL's losses of the same numbers: gradients that TRL 1.16.0 computed."""

from collections import defaultdict
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agents import CISPO, GSPO, ClipHigher, DualClip, SoftGate
from agents.policies.surrogates import SurrogateLoss
from agents.rollout.aggregation import token_factors

# Four texts of at most 4 tokens: log-probabilities before and after an update, and the advantage of each text.
LOG_PROBS = [[-0.5, -1.25, -2.0, -0.125], [-1.5, -0.75], [-0.25, -3.0, -1.0], [-1.125, -0.625]]
LOG_RATIOS = [[0.22, -0.25, 0.125, 0.5], [-0.125, 0.75], [0.0625, -0.5, 1.5], [-0.3, 0.1]]
ADVANTAGES = [0.75, -1.5, 1.0, -0.5]
LENGTH = 4

# Arguments of TRL's GRPOConfig, our surrogate and aggregation, and the gradient by each log-probability that
# `GRPOTrainer._compute_loss` of TRL 1.16.0 gave with torch 2.13.0 in float64. Where TRL is installed,
# `pytest -m library tests/agents/policies/test_losses_of_trl.py` computes them anew.
CASES = {
    "PPO's clip, over texts": (
        {"loss_type": "grpo"},
        None,
        "sequence",
        [0.0, -0.0365063, -0.0531163, 0.0, 0.1654682, 0.3969375, -0.0887079, -0.0505442, 0.0, 0.0, 0.0690732],
    ),
    "PPO's clip, over tokens": (
        {"loss_type": "bnpo"},
        None,
        "token",
        [0.0, -0.0531001, -0.0772601, 0.0, 0.1203405, 0.2886818, -0.0967722, -0.0551392, 0.0, 0.0, 0.050235],
    ),
    "Dr. GRPO": (
        {"loss_type": "dr_grpo"},
        None,
        "constant",
        [0.0, -0.0365063, -0.0531163, 0.0, 0.0827341, 0.1984688, -0.0665309, -0.0379082, 0.0, 0.0, 0.0345366],
    ),
    "DAPO": (
        {"loss_type": "dapo", "epsilon_high": 0.28},
        ClipHigher(0.2, 0.28),
        "token",
        [-0.0849598, -0.0531001, -0.0772601, 0.0, 0.1203405, 0.2886818, -0.0967722, -0.0551392, 0.0, 0.0, 0.050235],
    ),
    "dual clip": (
        {"loss_type": "grpo", "delta": 1.5},
        DualClip(0.2, 0.2, 1.5),
        "sequence",
        [0.0, -0.0365063, -0.0531163, 0.0, 0.1654682, 0.0, -0.0887079, -0.0505442, 0.0, 0.0, 0.0690732],
    ),
    "CISPO": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        CISPO(high=0.3),
        "token",
        [
            -0.0849598,
            -0.0531001,
            -0.0772601,
            -0.0886364,
            0.1203405,
            0.1772727,
            -0.0967722,
            -0.0551392,
            -0.1181818,
            0.0336736,
            0.050235,
        ],
    ),
    "SAPO": (
        {"loss_type": "sapo"},
        SoftGate(),
        "sequence",
        [
            -0.0575345,
            -0.0360633,
            -0.0528816,
            -0.0696909,
            0.1648401,
            0.2865627,
            -0.0886157,
            -0.0486373,
            -0.0432445,
            0.0454543,
            0.068863,
        ],
    ),
    "GSPO": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.2},
        GSPO(0.05, 0.2),
        "sequence",
        [-0.0543929, -0.0543929, -0.0543929, -0.0543929, 0.2562821, 0.2562821, 0.0, 0.0, 0.0, 0.0, 0.0],
    ),
}


def trl_gradient(loss_type, importance_sampling_level="token", epsilon=0.2, epsilon_high=None, delta=None):
    """Return the gradient of TRL's loss by each log-probability, (N,), with the numbers above in place of a model's."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    new = torch.zeros(4, LENGTH, dtype=torch.float64)
    old, mask = new.clone(), torch.zeros(4, LENGTH, dtype=torch.long)
    for row, (log_probs, log_ratios) in enumerate(zip(LOG_PROBS, LOG_RATIOS)):
        n = len(log_probs)
        new[row, :n] = torch.tensor(log_probs, dtype=torch.float64)
        old[row, :n] = new[row, :n] - torch.tensor(log_ratios, dtype=torch.float64)
        mask[row, :n] = 1
    new.requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (new, torch.zeros_like(new), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(delta=delta, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        **{"loss_type": loss_type, "importance_sampling_level": importance_sampling_level, "beta": 0.0},
        **{"epsilon_low": epsilon, "epsilon_high": epsilon if epsilon_high is None else epsilon_high},
        **{"aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None},
        **{"use_vllm": False, "vllm_importance_sampling_correction": False, "_entropy_bonus_enabled": False},
        **{"current_gradient_accumulation_steps": 1, "max_completion_length": LENGTH},
    )
    ids = torch.zeros(4, LENGTH, dtype=torch.long)
    inputs = {
        **{"prompt_ids": ids[:, :1], "prompt_mask": torch.ones(4, 1), "completion_ids": ids, "completion_mask": mask},
        **{"advantages": torch.tensor(ADVANTAGES, dtype=torch.float64), "old_per_token_logps": old},
        "num_items_in_batch": mask.sum(),
    }
    GRPOTrainer._compute_loss(trainer, None, inputs).backward()
    return new.grad[mask.bool()]


def our_gradient(surrogate, aggregation):
    """Return the gradient of PPO's loss, as SB3 `ppo.PPO.train` writes it, by each log-probability, (N,)."""
    counts = np.array([len(text) for text in LOG_PROBS])
    length = LENGTH if aggregation == "constant" else None
    (factors,) = token_factors(aggregation, length, counts, [(np.arange(4), None)])
    new = torch.tensor(list(chain(*LOG_PROBS)), dtype=torch.float64, requires_grad=True)
    old = new.detach() - torch.tensor(list(chain(*LOG_RATIOS)), dtype=torch.float64)
    advantages = torch.as_tensor(np.repeat(ADVANTAGES, counts) * factors)
    rows = np.repeat(np.arange(4), counts)
    batch = SimpleNamespace(rows=rows, lengths=counts, old_log_probs=old, advantages=advantages)
    ratio = torch.exp(SurrogateLoss(surrogate).log_probs(batch, new) - old)
    clip_range = 0.2 if surrogate is None else 1e9
    policy_loss_1, policy_loss_2 = advantages * ratio, advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    (-torch.min(policy_loss_1, policy_loss_2).mean()).backward()
    return new.grad


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_trl(name):
    _, surrogate, aggregation, golden = CASES[name]
    assert our_gradient(surrogate, aggregation).tolist() == pytest.approx(golden, abs=1e-6)


@pytest.mark.library
@pytest.mark.parametrize("name", CASES)
def test_trl_still_computes_the_same(name):
    pytest.importorskip("trl", reason="needs TRL, with which this library shares no dependency")
    assert trl_gradient(**CASES[name][0]).tolist() == pytest.approx(CASES[name][3], abs=1e-7)
