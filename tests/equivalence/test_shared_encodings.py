"""Encoder-decoders that encode an equal prompt once: numbers and gradients are those of whole sequences (F3)."""

import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from agents import SeparateCritic
from agents.models.interface import LengthError
from agents.models.seq2seq import Seq2SeqBackbone
from agents.models.sequences import SequenceBatch, number_prompts
from agents.models.shared_encodings import BesidePrompts
from agents.policies.reference import divergences, log_probs
from tests.equivalence.test_shared_update import (
    OPTIONS,
    PROMPTS,
    always,  # noqa: F401  (a fixture for all tests)
    assert_close,
    batch_of,
    columns_of,
    differences,
    end_of_run,
    scores,
)
from tests.helpers.models import N_POSITIONS, N_TOKENS, collect, make_policy, tiny
from tests.helpers.seq2seq import FAMILIES, tiny_seq2seq
from tests.helpers.training import tiny_agent, tiny_env


def make(family="t5", **kwargs):
    """Return a policy; at larger weights some families magnify rounding."""
    size = {"initializer_factor": 0.5} if family.startswith("t5") else {"init_std": 0.1}
    return make_policy(tiny_seq2seq(family, **size), **kwargs)


@pytest.fixture
def encoded(monkeypatch):
    """Return the list of the numbers of rows that the encoder has read, one for each forward."""
    rows = []
    encode = Seq2SeqBackbone._encode
    monkeypatch.setattr(
        Seq2SeqBackbone, "_encode", lambda self, ids, mask: rows.append(len(ids)) or encode(self, ids, mask)
    )
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_f3_results_are_those_of_whole_sequences(family):
    policy = make(family)
    assert policy.lm.backbone.shares_prompts
    assert max(differences(policy, *batch_of())) < 1e-6
    assert max(differences(policy, *batch_of(seed=1, prompts=(1, 30, 2), most=20))) < 1e-6


def test_each_prompt_is_encoded_once(encoded):
    """Four prompts: of three completions each, but for the second, which has one, and is read whole."""
    policy = make()
    batch, actions = batch_of()
    encoded.clear()  # the rows of the probe
    scores(policy, batch, actions, is_shared=False)
    assert sum(encoded) == len(batch.lengths) == 10
    encoded.clear()
    scores(policy, batch, actions, is_shared=True)
    assert sum(encoded) == len(PROMPTS)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_f3_the_encodings_of_prompts_must_lead_gradients_back(family, monkeypatch):
    """The negative control: with detached keys and values of prompts, numbers agree and gradients do not."""
    policy = make(family)
    expanded = BesidePrompts._expanded
    monkeypatch.setattr(BesidePrompts, "_expanded", lambda self, states: expanded(self, states).detach())
    *results, gradient = differences(policy, *batch_of())
    assert max(results) < 1e-6 and gradient > 1e-3
    assert not make(family).lm.backbone.shares_prompts, "the probe of a new model sees it as well"


def test_f3_the_encoder_s_output_must_lead_gradients_back(monkeypatch):
    """Another negative control: the encoder learns from no completion, and from the prompts' ends neither."""
    policy = make()
    encode = Seq2SeqBackbone._encode
    batch, actions = batch_of()
    expected = scores(policy, batch, actions, is_shared=False)
    monkeypatch.setattr(Seq2SeqBackbone, "_encode", lambda self, ids, mask: encode(self, ids, mask).detach())
    got = scores(policy, batch, actions, is_shared=True)
    for one, other in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(got[3]) < len(expected[3]), "weights of the encoder have no gradient"


def test_a_wrong_prompt_is_seen():
    policy = make("bart")
    batch, actions = batch_of()
    batch.tokens[batch.prompts == batch.prompts[0], 0] = torch.arange(3) % 2
    assert max(differences(policy, batch, actions)[:3]) > 1e-3


def test_tokens_behind_a_prompt_are_no_part_of_it():
    """The prompts are padded with tokens of completions, which the encoder must not attend to."""
    policy = make("bart")
    batch, actions = batch_of()
    before = scores(policy, batch, actions, is_shared=True)
    padded = torch.arange(batch.tokens.shape[1]) >= torch.as_tensor(batch.lengths)[:, None]
    batch.tokens = batch.tokens.masked_fill(padded, 7)
    after = scores(policy, batch, actions, is_shared=True)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("name", OPTIONS)
def test_with_other_options(name, family):
    """A separate critic, which is causal, shares prompts in its own way beside the encoder-decoder."""
    assert max(differences(make(family, **OPTIONS[name]), *batch_of())) < 1e-6


def test_with_masks_and_supports():
    assert max(differences(make(top_k=5), *batch_of(allowed=True))) < 1e-6


def test_with_autocast_up_to_its_rounding():
    assert max(differences(make("bart", autocast="bfloat16"), *batch_of())) < 0.1


@pytest.mark.parametrize("bound", [1, 20, 45, 70])
def test_micro_batches_count_the_tokens_that_are_read(bound):
    policy = make()
    batch, actions = batch_of(micro_batch_tokens=bound)
    chunks = list(policy.lm.chunks(batch))
    assert sorted(np.concatenate([chunk.transitions for chunk in chunks])) == list(range(len(batch)))
    assert all(len(chunk.ids) == 1 or chunk.n_read <= bound for chunk in chunks)
    if any(chunk.shared is not None for chunk in chunks):
        assert max(differences(policy, batch, actions)) < 1e-6
    else:
        assert bound == 1


def test_references_read_the_same_way(encoded):
    policy, other = make("bart"), make("t5", seed=3)
    batch, actions = batch_of()
    results = []
    encoded.clear()  # the rows of the probes
    for is_shared in (True, False):
        policy.lm.may_share_prompts = other.lm.may_share_prompts = is_shared
        exact = divergences(other.lm, policy.lm, batch)
        with torch.no_grad():
            results.append((exact, log_probs(other.lm, policy.lm, batch, actions), policy.lm.sequence_values(batch)))
        assert sum(encoded) == 4 * (4 if is_shared else 10)  # two models for the divergence, then one pass of each
        encoded.clear()
    for one, another in zip(*results, strict=True):
        torch.testing.assert_close(one, another, atol=1e-5, rtol=1e-5)


def pairs_of(n_prompt, n_new):
    """Return two prompts with two completions each, whose transitions are at all tokens from the prompts' ends on."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(N_TOKENS, size=(2, n_prompt))
    sequences = [np.concatenate([prompts[i // 2], rng.integers(N_TOKENS, size=n_new)]) for i in range(4)]
    rows, cols = np.array([(row, col) for row in range(4) for col in range(n_prompt - 1, n_prompt + n_new)]).T
    counts = np.full(4, n_prompt)
    numbers = number_prompts(sequences, counts)
    tokens = torch.as_tensor(np.stack(sequences))
    batch = SequenceBatch(tokens, counts + n_new, rows, cols, n_prompt=counts, prompts=numbers)
    return batch, torch.as_tensor(rng.integers(N_TOKENS, size=len(rows)))


def test_encoder_and_decoder_have_positions_each():
    """A prompt and a completion that together are longer than either half can read, in one forward."""
    policy = make("bart", length=2 * N_POSITIONS)
    batch, actions = pairs_of(N_POSITIONS, N_POSITIONS - 1)
    (chunk,) = policy.lm.chunks(batch)
    assert len(chunk.shared.completions) == 1 and chunk.n_read == 2 * N_POSITIONS + 4 * (N_POSITIONS - 1)
    assert max(differences(policy, batch, actions)) < 2e-6
    policy.lm.may_share_prompts = True
    for n_prompt, n_new, half in ((N_POSITIONS + 1, 3, "encoder"), (3, N_POSITIONS, "decoder")):
        batch, actions = pairs_of(n_prompt, n_new)
        assert next(policy.lm.chunks(batch)).shared is not None
        with pytest.raises(LengthError, match=f"the {half}'s {N_POSITIONS} positions"):
            policy.evaluate_actions(batch, actions)


def test_a_transition_inside_a_prompt_is_refused():
    policy = make()
    batch, actions = pairs_of(5, 3)
    batch.cols[2] = 2
    with pytest.raises(ValueError, match="Expected columns from a prompt's last token on, got one 2 before it"):
        policy.evaluate_actions(batch, actions)


def test_who_reads_whole_sequences():
    """Layers under activation checkpointing, shards, models without an exact cache, and critics that cannot share."""
    assert columns_of(make()) == sys.maxsize
    checkpointed = make(gradient_checkpointing=True)
    assert columns_of(checkpointed) is None
    assert checkpointed.lm.train(False).shared_columns == sys.maxsize
    sharded = make()
    sharded.lm.shards = object()
    assert columns_of(sharded) is None
    assert columns_of(make(critic=SeparateCritic(tiny("llama")))) == N_POSITIONS
    assert columns_of(make(critic=SeparateCritic(tiny("mamba")))) is None


def test_a_decoder_that_cannot_take_keys_reads_whole_sequences(monkeypatch):
    monkeypatch.setattr("agents.models.seq2seq.rows_at", lambda decoder, position_ids: nullcontext())
    with pytest.warns(UserWarning, match="does not decode exactly from cached keys and values"):
        policy = make("bart")
    assert columns_of(policy) is None


@pytest.mark.parametrize("kind", ["one turn", "several turns"])
def test_whole_training_runs_end_in_the_same_weights(kind):
    """Replies are read by the decoder, as parts of the completions."""
    reference = tiny_seq2seq(initializer_factor=1.3)
    assert_close(*(end_of_run(kind, tiny_seq2seq(), reference, is_shared) for is_shared in (True, False)))


def test_groups_of_samples_share(encoded):
    """Each of the two prompts is encoded once in the rollout, and the minibatches read fewer tokens than there are."""
    env = tiny_env(prompts=["a longer prompt", "another prompt"], samples_per_prompt=4, stop_ids=())
    model = tiny_agent(env, 8, lm=tiny_seq2seq())
    encoded.clear()  # the rows of the probe
    batch = collect(model).view().batch
    cache = model.policy.lm.rollout_cache
    assert (cache.prefill_tokens, cache.shared_tokens) == (15 + 14, 3 * (15 + 14)) and sum(encoded) == 2
    assert sum(chunk.n_read for chunk in model.policy.lm.chunks(batch)) < batch.lengths.sum()
