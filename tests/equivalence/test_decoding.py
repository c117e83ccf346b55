"""Decoding in groups of similar length, with new rows in the same forward: equal to a full forward, at less work."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from agents.models import prefix_cache as cache
from agents.models import step_layout as decoding
from agents.models.backbone import Backbone
from agents.models.step_layout import (
    N_GROUPS,
    Group,
    StepLayout,
    attention_by_row,
    column_groups,
    laid_out,
    sort_into_groups,
)
from tests.equivalence.test_cache import EVERYTHING, TOLERANCE, at_random, decode, make_policy, scripted, worst
from tests.helpers.models import few, tiny


@pytest.fixture
def layouts(monkeypatch):
    """Record the layout of each decoding attention, and the number of its columns."""
    seen = []
    real = decoding._attend

    def watched(module, query, key, value, attention_mask, **kwargs):
        seen.append((decoding.current_layout(), key.shape[2]))
        return real(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(decoding.AttentionInterface._global_mapping, decoding.NAME, watched)
    return seen


@pytest.fixture
def moving(monkeypatch):
    """Set two groups for the four rows of a script, and let rows change groups whenever that saves a column."""
    monkeypatch.setattr(decoding, "N_GROUPS", 2)
    monkeypatch.setattr(decoding, "DISORDER", 1.0)


FAMILIES_BESIDE = ["gpt2", "llama", "qwen2", "gpt_neox", "opt"]


@pytest.mark.parametrize("family", few([*FAMILIES_BESIDE, "gemma3", "mistral"], 3))
def test_decoding_by_length_equals_all_rows_at_once(family, layouts, moving):
    policy = make_policy(tiny(family))
    layouts.clear()
    assert worst(policy, EVERYTHING + at_random(20, seed=2)) < TOLERANCE
    everything = sum(layout.n_rows * n for layout, n in layouts)
    read = sum(min(rows.stop, layout.n_rows) * n - rows.start * n for layout, _ in layouts for rows, n in layout.groups)
    assert 0 < read < 0.7 * everything


@pytest.mark.parametrize("family", few(FAMILIES_BESIDE, 2))
def test_new_rows_are_read_beside_the_others(family, layouts, monkeypatch, moving):
    """New rows in the others' forward or in their own, in scripts and at random, equal a full forward."""
    policy = make_policy(tiny(family))
    assert policy.lm.backbone.takes_new_rows
    for limit in (20, 0):
        monkeypatch.setattr(cache, "NEW_TOKENS", limit)
        layouts.clear()
        assert worst(policy, EVERYTHING + at_random(20, seed=3)) < TOLERANCE
        assert any(layout.new_rows for layout, _ in layouts) is (limit > 0)


@pytest.mark.parametrize("n_rows", [1, 3, 5, 6, 7, 9])
def test_new_rows_beside_groups_that_are_not_full(n_rows, layouts):
    """The last group ends where the rows do, not in the tokens of new rows behind them."""
    steps = scripted(2, {0: 5}, 1, {n_rows - 1: 3, n_rows // 2: 6}, 2, lengths=(7, 2, 9, 4, 1, 8, 3, 5, 6)[:n_rows])
    policy = make_policy()
    layouts.clear()
    assert worst(policy, steps) < TOLERANCE
    assert any(layout.new_rows for layout, _ in layouts) is (n_rows > 1)  # a single row has no others


@pytest.mark.parametrize("family", ["mistral", "gemma3", "bloom"])
def test_models_that_do_not_attend_to_all_read_new_rows_apart(family):
    assert not make_policy(tiny(family)).lm.backbone.takes_new_rows
    assert not make_policy(tiny("llama", attn_implementation="eager")).lm.backbone.takes_new_rows


def test_a_step_with_a_new_row_costs_one_forward(monkeypatch):
    policy, calls = make_policy(), []
    model = policy.lm.backbone.model.base_model
    steps = scripted(2, {0: 5, 2: 3}, 1, lengths=(4, 4, 4, 4))
    decode(policy, steps[0])
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: calls.append(inputs["input_ids"].shape) or forward(**inputs))
    for observations in steps[1:]:
        decode(policy, observations)
    assert calls == [(4, 1), (4, 1), (4 + 4 + 2, 1), (4, 1)]  # new rows' earlier tokens at the end


def test_the_same_rows_again_cost_no_prefill(monkeypatch):
    policy, reads, prefill = make_policy(), [], Backbone.prefill
    monkeypatch.setattr(
        Backbone, "prefill", lambda self, ids, *args: reads.append(len(ids)) or prefill(self, ids, *args)
    )
    steps = scripted(3, {1: 9}, 2)
    reads.clear()
    assert worst(policy, [step for step in steps for _ in range(3)]) < TOLERANCE
    assert reads == [3]
    reads.clear()
    monkeypatch.setattr("agents.models.prefix_cache.NEW_TOKENS", 0)  # otherwise they join a row that stayed as it is
    other = torch.where(steps[-1] == steps[-1].max(), 1, steps[-1])  # of the same length, with another token
    assert worst(policy, [steps[-1], other, steps[-1]]) < TOLERANCE
    assert reads


def test_rows_of_one_length_are_read_at_once(layouts):
    policy = make_policy()
    layouts.clear()
    assert worst(policy, scripted(6, lengths=(5, 5, 5, 5))) < TOLERANCE
    assert layouts and all(layout.groups == ((slice(0, 4), n),) for layout, n in layouts)


def test_negative_control_too_few_columns(monkeypatch):
    """The check fails if groups read one column less than their longest row has."""
    real = column_groups
    shorter = lambda *args: tuple(group._replace(n_columns=max(1, group.n_columns - 1)) for group in real(*args))  # noqa: E731
    policy = make_policy()  # before the fault, which the probe would notice
    monkeypatch.setattr("agents.models.prefix_cache.column_groups", shorter)
    assert worst(policy, EVERYTHING) > 100 * TOLERANCE


def test_negative_control_rows_that_are_not_moved(monkeypatch, moving):
    monkeypatch.setattr("agents.models.prefix_cache.ColumnLayer.move", lambda *args: None)
    assert worst(make_policy(), EVERYTHING) > 100 * TOLERANCE


def test_negative_control_a_new_row_in_the_wrong_columns(monkeypatch):
    policy = make_policy()
    elsewhere = lambda slots, tokens: decoding.NewRow([(slot + 1) % 4 for slot in slots], tokens)  # noqa: E731
    monkeypatch.setattr("agents.models.prefix_cache.NewRow", elsewhere)
    assert worst(policy, EVERYTHING) > 100 * TOLERANCE


def test_the_config_is_left_as_it_was():
    config = LlamaConfig(attn_implementation="sdpa")
    layout = StepLayout(1, (Group(slice(0, 1), 3),))
    with pytest.raises(RuntimeError), laid_out(layout), attention_by_row(config):
        assert config._attn_implementation == decoding.NAME
        raise RuntimeError
    assert config._attn_implementation == "sdpa"
    with attention_by_row(config):  # outside a step
        assert config._attn_implementation == "sdpa"


def n_read(slots, own):
    return sum(n for _, n in decoding._groups(slots, own))


@pytest.mark.parametrize("disorder", [1.0, 1.2])
@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 7, 8, 64])
def test_few_columns_are_read_and_few_rows_move(n_rows, disorder, monkeypatch):
    monkeypatch.setattr(decoding, "DISORDER", disorder)
    rng = np.random.default_rng(n_rows)
    own = rng.integers(1, 100, n_rows)
    slots, n_moves = sort_into_groups(np.arange(n_rows), own), 0
    for _ in range(100):
        assert sorted(slots) == list(range(n_rows))
        assert n_read(slots, own) <= disorder * n_read(np.argsort(np.argsort(-own)), own)
        own += 1
        own[rng.integers(n_rows)] = 1
        moved = sort_into_groups(slots, own)
        n_moves += (moved != slots).sum()
        slots = moved
    assert n_moves <= 100 * N_GROUPS


def test_columns_of_groups_by_hand():
    slots, own = np.array([3, 2, 1, 0]), np.array([2, 4, 4, 20])
    assert column_groups(slots, own, 20) == tuple((slice(i, i + 1), n) for i, n in enumerate([20, 4, 4, 2]))
    assert column_groups(slots, np.array([20, 19, 19, 20]), 20) == ((slice(0, 4), 20),)


def test_rows_stay_while_their_order_is_good_enough():
    own = np.array([20, 19, 18, 17])
    assert list(sort_into_groups(np.array([1, 0, 2, 3]), own)) == [1, 0, 2, 3]  # any order will do
    own, mixed = np.repeat([20, 2], 4), np.array([0, 2, 4, 6, 1, 3, 5, 7])
    assert sorted(sort_into_groups(mixed, own)[:4]) == [0, 1, 2, 3]
    assert list(sort_into_groups(mixed, np.repeat([20, 18], 4))) == list(mixed)


def test_after_a_step_that_was_broken_off_rows_are_read_anew(monkeypatch):
    """After Ctrl-C, some layers may have their newest column, and others not."""
    policy, steps = make_policy(), scripted(6)
    for observations in steps[:3]:
        decode(policy, observations)
    layer = policy.lm.backbone.model.base_model.h[1]

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layer, "forward", interrupt)
        decode(policy, steps[3])
    assert worst(policy, steps[3:]) < TOLERANCE
