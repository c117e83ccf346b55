"""Rows that exactly fill a model's positions: decoded from the cache as by a full forward (A7), and trained (A1)."""

import numpy as np
import pytest
from transformers import BloomConfig, FalconConfig, GPT2Config, GPTNeoConfig, MptConfig

from agents.models import prefix_cache as cache
from tests.equivalence.test_cache import TOLERANCE, tokens, worst
from tests.helpers.models import COMMON, LAYERS, CheckRatio, make_policy, make_ppo, observe

N_POSITIONS = 24
SHARP = {**COMMON, "initializer_range": 0.3}

# A mask or bias of the first two is a table that is indexed by column. That of the others is computed anew, or absent.
CONFIGS = {
    "gpt_neo": GPTNeoConfig(
        **SHARP,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=5,
        max_position_embeddings=N_POSITIONS,
    ),
    "mpt": MptConfig(**SHARP, d_model=16, n_heads=2, n_layers=2, max_seq_len=N_POSITIONS),
    "bloom": BloomConfig(**SHARP, hidden_size=16, n_layer=2, n_head=2),
    "falcon": FalconConfig(
        **SHARP, **LAYERS, alibi=True, max_position_embeddings=N_POSITIONS, attn_implementation="eager"
    ),
    "gpt2": GPT2Config(**SHARP, n_embd=16, n_layer=2, n_head=2, n_positions=N_POSITIONS),
}


def full_rows(n_steps, seed):
    """Return observations of four rows that grow until they fill all positions, and sometimes end before."""
    rng = np.random.default_rng(seed)
    rows = [(tokens(rng, n), []) for n in (3, 9, 1, 20)]
    steps = []
    for _ in range(n_steps):
        steps.append(observe(rows, N_POSITIONS + 1))
        for lane, (prompt, since) in enumerate(rows):
            ends = len(prompt) + len(since) == N_POSITIONS or rng.random() < 0.04
            new = (tokens(rng, int(rng.integers(1, N_POSITIONS))), [])
            rows[lane] = new if ends else (prompt, [*since, *tokens(rng, 1)])
    return steps


@pytest.mark.parametrize("family", CONFIGS)
def test_a7_rows_that_fill_all_positions_decode_as_a_full_forward(family):
    """Lanes end at different steps, so that the shared columns would outnumber the positions."""
    policy = make_policy(CONFIGS[family], length=N_POSITIONS + 1)
    assert policy.lm.use_cache
    assert worst(policy, full_rows(90, seed=0)) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt_neo", "mpt"])
def test_columns_never_outnumber_the_positions(family, monkeypatch):
    """Unused columns alone never make the cache drop any here: only the limit does."""
    monkeypatch.setattr(cache, "COMPACT_FROM", 1000)
    policy = make_policy(CONFIGS[family], length=N_POSITIONS + 1)
    assert policy.lm.backbone.longest == N_POSITIONS
    for observations in full_rows(90, seed=1):
        worst(policy, [observations])
        assert policy.lm.rollout_cache.columns <= N_POSITIONS


@pytest.mark.parametrize("family", ["gpt_neo", "mpt"])
def test_a1_rollouts_of_full_rows_have_ratio_1(family):
    """Prompts of 1 to 9 tokens, and 15 more: the longest row fills the 24 positions."""
    check = CheckRatio()
    make_ppo(CONFIGS[family], max_new_tokens=15, n_steps=40).learn(3 * 160, callback=check)
    assert len(check.largest) == 3 and max(check.largest) < TOLERANCE
