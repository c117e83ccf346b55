"""Rows of similar length side by side: the same numbers as all rows in one read, and fewer columns read."""

import itertools

import numpy as np
import pytest
from transformers import LlamaConfig

from agents import lengths
from agents.backbone import Backbone
from agents.lengths import N_GROUPS, attention_by_length, column_groups, rows_in, sort_into_groups
from tests.equivalence.test_cache import EVERYTHING, TOLERANCE, at_random, make_policy, scripted, worst
from tests.models import tiny


@pytest.fixture
def columns_read(monkeypatch):
    """How many columns of rows each decoding attention read: all of them, and those of the groups."""
    counts = []
    real = lengths._attend

    def counted(module, query, key, value, attention_mask, **kwargs):
        groups = lengths._groups.get()
        counts.append((len(key) * key.shape[2], sum(len(key[rows]) * n for rows, n in groups)))
        return real(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(lengths.AttentionInterface._global_mapping, lengths.NAME, counted)
    return counts


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "gpt_neox"])
def test_by_length_is_as_all_at_once(family, columns_read):
    assert worst(make_policy(tiny(family)), EVERYTHING + at_random(20, seed=2)) < TOLERANCE
    everything, in_groups = np.array(columns_read).sum(axis=0)
    assert in_groups < 0.6 * everything


def test_rows_of_one_length_are_read_at_once(columns_read):
    assert worst(make_policy(), scripted(6, lengths=(5, 5, 5, 5))) < TOLERANCE
    assert not columns_read


def test_negative_control_too_few_columns(monkeypatch):
    """A group that reads a column less than its longest row has is found out."""
    real = column_groups
    shorter = lambda *args: tuple(group._replace(n_columns=max(1, group.n_columns - 1)) for group in real(*args))  # noqa: E731
    monkeypatch.setattr("agents.cache.column_groups", shorter)
    assert worst(make_policy(), EVERYTHING) > 100 * TOLERANCE


def test_negative_control_rows_that_are_not_moved(monkeypatch):
    monkeypatch.setattr("agents.cache.ColumnLayer.move", lambda *args: None)
    assert worst(make_policy(), EVERYTHING) > 100 * TOLERANCE


def test_the_config_is_left_as_it_was():
    config = LlamaConfig(attn_implementation="sdpa")
    with pytest.raises(RuntimeError), rows_in(((slice(0, 1), 3),)), attention_by_length(config):
        assert config._attn_implementation == lengths.NAME
        raise RuntimeError
    assert config._attn_implementation == "sdpa"
    with attention_by_length(config):  # outside a step
        assert config._attn_implementation == "sdpa"


def test_a_prefill_in_between_is_not_grouped(monkeypatch):
    """Reading new rows within a step has queries of many tokens: it is done before the groups are set."""
    seen = []
    prefill = Backbone.prefill

    def watched(self, *args):
        seen.append(lengths._groups.get())
        return prefill(self, *args)

    monkeypatch.setattr(Backbone, "prefill", watched)
    worst(make_policy(), EVERYTHING)
    assert seen and not any(seen)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 7, 8, 64])
def test_groups_are_by_length_and_few_rows_move(n_rows):
    rng = np.random.default_rng(n_rows)
    own = rng.integers(1, 100, n_rows)
    places = sort_into_groups(np.arange(n_rows), own)
    size = -(-n_rows // N_GROUPS)
    for _ in range(50):
        assert sorted(places) == list(range(n_rows))
        in_order = own[np.argsort(places)]
        parts = [in_order[start : start + size] for start in range(0, n_rows, size)]
        assert all(a.min() >= b.max() for a, b in itertools.pairwise(parts))
        assert np.array_equal(sort_into_groups(places, own + 1), places)  # nothing ended: nobody moves
        own += 1
        own[rng.integers(n_rows)] = 1
        moved = sort_into_groups(places, own)
        assert (moved != places).sum() <= N_GROUPS
        places = moved


def test_columns_of_groups_by_hand():
    places, own = np.array([3, 2, 1, 0]), np.array([2, 4, 4, 20])
    assert column_groups(places, own, 20) == tuple((slice(i, i + 1), n) for i, n in enumerate([20, 4, 4, 2]))
    assert column_groups(places, np.array([20, 19, 19, 20]), 20) == ()
