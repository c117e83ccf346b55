"""Encoder-decoders: one distribution for cached, whole, padded, sampled and trained sequences (A1 to A11, B1, B3)."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from agents import KLPenalty
from agents.models.observations import prompt_lengths, unpack_observations
from agents.models.seq2seq import Seq2SeqBackbone, Seq2SeqCache
from agents.models.sequences import SequenceBatch
from tests.equivalence.test_cache import EVERYTHING, SCRIPTS, TOLERANCE, at_random, scripted
from tests.helpers.models import N_TOKENS, CheckRatio, collect, log_ratios, make_policy, make_ppo, observe
from tests.helpers.seq2seq import CACHED, FAMILIES, expected_logits, tiny_seq2seq
from textenv import CharTokenizer, TextEnv

ROWS = observe([([5, 6, 7, 8, 9, 4], [1, 2]), ([3], []), ([2, 2, 8], [7, 7, 7, 7, 1])])


def full_forward(policy, observations):
    """Return log-probabilities (B, V) and values (B,) of a full forward."""
    with torch.no_grad():
        hidden, logits = policy.lm._read_last(policy.lm.backbone, policy.lm._unpack(observations), None)
        return logits.log_softmax(-1), policy.lm.critic(hidden)


def decode(policy, observations):
    with torch.no_grad():
        hidden, logits = policy.lm.rollout_cache.read(*policy.lm._unpack(observations))
        return logits.log_softmax(-1), policy.lm.critic(hidden)


def is_busy(observations):
    return (observations >= 0).any(dim=1)


def worst(policy, steps) -> float:
    largest = 0.0
    for observations in steps:
        busy = is_busy(observations)
        for decoded, expected in zip(decode(policy, observations), full_forward(policy, observations)):
            assert not decoded.isnan().any()
            largest = max(largest, float((decoded - expected)[busy].abs().max()))
    return largest


# A2: the model's own logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a2_log_probabilities_are_those_of_the_model(family):
    temperature = 0.7
    policy = make_policy(tiny_seq2seq(family), temperature=temperature)
    expected = expected_logits(policy.lm.backbone.model, ROWS)
    got = policy.get_distribution(ROWS).log_probabilities
    torch.testing.assert_close(got, (expected / temperature).log_softmax(-1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", CACHED)
def test_a2_decoded_too(family):
    policy = make_policy(tiny_seq2seq(family))
    expected = expected_logits(policy.lm.backbone.model, ROWS).log_softmax(-1)
    torch.testing.assert_close(decode(policy, ROWS)[0], expected, atol=TOLERANCE, rtol=0)


# A7: the cache


@pytest.mark.parametrize(
    ("family", "attention"), [*((family, "sdpa") for family in CACHED), ("t5", "eager"), ("bart", "eager")]
)
def test_a7_cached_equals_full_forward(family, attention):
    policy = make_policy(tiny_seq2seq(family, attn_implementation=attention))
    assert policy.lm.use_cache and isinstance(policy.lm.rollout_cache, Seq2SeqCache)
    assert worst(policy, EVERYTHING) < TOLERANCE


@pytest.mark.parametrize("script", SCRIPTS)
def test_a7_script(script):
    """BART is the harder case, as its positions are absolute."""
    assert worst(make_policy(tiny_seq2seq("bart")), SCRIPTS[script]) < TOLERANCE


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a7_at_random(family, monkeypatch):
    monkeypatch.setattr("agents.models.prefix_cache.GROWTH", 2)
    monkeypatch.setattr("agents.models.prefix_cache.COMPACT_FROM", 3)
    assert worst(make_policy(tiny_seq2seq(family)), at_random(25, seed=1)) < TOLERANCE


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a7_same_tokens_with_another_boundary_or_prompt(family):
    """A row counts as unchanged only if its prompt is the same, and ends at the same token."""
    first = observe([([1, 2, 3, 4], [5]), ([6, 7], [8])])
    moved = observe([([1, 2, 3], [4, 5, 9]), ([6, 7], [8, 3])])
    other = observe([([1, 2, 3, 5], [5, 9]), ([6, 7], [8, 3])])
    for second in (moved, other):
        assert worst(make_policy(tiny_seq2seq(family)), [first, second, first, first]) < TOLERANCE


def test_a7_each_prompt_is_encoded_once(monkeypatch):
    encoded: list[int] = []
    encode = Seq2SeqBackbone._encode

    def counted(self, ids, mask):
        encoded.append(len(ids))
        return encode(self, ids, mask)

    policy = make_policy(tiny_seq2seq("t5"))
    monkeypatch.setattr(Seq2SeqBackbone, "_encode", counted)
    for observations in scripted(4, {1: 2}, 3):
        decode(policy, observations)
    assert encoded == [4, 1]


def test_a7_negative_control_positions(monkeypatch):
    """Without the hook, BART's rows get the positions of shared columns. T5, with relative positions, needs none."""
    differences = []
    for family in ("bart", "t5"):
        policy = make_policy(tiny_seq2seq(family))
        monkeypatch.setattr("agents.models.seq2seq.rows_at", lambda decoder, position_ids: nullcontext())
        differences.append(worst(policy, SCRIPTS["single lanes reset"]))
        monkeypatch.undo()
    assert differences[0] > 0.1 and differences[1] < TOLERANCE


def test_a7_a_decoder_that_counts_columns_runs_without_a_cache(monkeypatch):
    monkeypatch.setattr("agents.models.seq2seq.rows_at", lambda decoder, position_ids: nullcontext())
    with pytest.warns(UserWarning, match="does not decode exactly from cached keys and values"):
        policy = make_policy(tiny_seq2seq("bart"))
    assert not policy.lm.use_cache


# A1, C2: rollout and update


@pytest.mark.parametrize(("family", "temperature"), [("t5", 0.7), ("t5 untied", 1.0), ("bart", 1.3), ("marian", 1.0)])
def test_a1_ratio_is_one_and_c2_kl_zero(family, temperature):
    model = make_ppo(tiny_seq2seq(family), policy_kwargs={"temperature": temperature}, n_steps=15)
    check = CheckRatio()
    collect(model, check, KLPenalty(0.5))
    assert check.largest[0] < TOLERANCE
    assert abs(model.logger.name_to_value["kl/token"]) < TOLERANCE


class Talks(TextEnv):
    """An env with a second speaker, whose tokens are read by the decoder."""

    def get_reward(self, prompt, preds, done):
        return float(len(preds)) if done else 0.0

    def respond(self, prompt, preds):
        return "so"


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a1_replies_of_the_environment(family):
    env = Talks(
        ["a", "bcdef"], CharTokenizer(), max_new_tokens=8, max_turns=3, max_response_tokens=4, stop_ids=range(12)
    )
    model = make_ppo(tiny_seq2seq(family), env=env, n_steps=16)
    buffer = collect(model)
    assert np.abs(log_ratios(model, buffer)).max() < TOLERANCE
    assert any(len(s.tokens) - s.n_prompt > s.end - s.start for s in buffer.segments), "a reply was inserted"


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a8_episodes_straddle_updates(family):
    model = make_ppo(tiny_seq2seq(family), n_steps=4, max_new_tokens=7, learning_rate=0.1)
    before = copy.deepcopy(model.policy.state_dict())
    check = CheckRatio()
    model.learn(4 * 4 * 5, callback=check)
    moved = max(float((model.policy.state_dict()[name] - weight).abs().max()) for name, weight in before.items())
    assert moved > 0.01 and len(check.largest) == 5 and max(check.largest) < TOLERANCE


def test_a8_new_weights_are_noticed():
    policy = make_policy(tiny_seq2seq("bart"))
    steps = scripted(3)
    worst(policy, steps[:2])
    with torch.no_grad():
        for weight in policy.lm.backbone.model.get_encoder().parameters():
            weight.mul_(1.3)
    assert worst(policy, steps[2:]) < TOLERANCE


def test_after_a_step_that_was_broken_off_rows_are_read_anew(monkeypatch):
    """After Ctrl-C, some layers may have their newest column, and others not."""
    policy, steps = make_policy(tiny_seq2seq("t5")), scripted(6)
    for observations in steps[:3]:
        decode(policy, observations)
    layer = policy.lm.backbone.model.decoder.block[1]

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layer, "forward", interrupt)
        decode(policy, steps[3])
    assert worst(policy, steps[3:]) < TOLERANCE


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a9_predict_in_between(family):
    policy = make_policy(tiny_seq2seq(family))
    others = scripted(8, lengths=(2, 2, 6, 1), seed=3)
    for observations, other in zip(scripted(3, {0: 2}, 2), others):
        assert worst(policy, [observations]) < TOLERANCE
        expected = full_forward(policy, other)[0].argmax(1)
        np.testing.assert_array_equal(policy.predict(other.numpy(), deterministic=True)[0], expected)
        with torch.no_grad():
            expected_values = full_forward(policy, other[1:])[1]
            torch.testing.assert_close(policy.predict_values(other[1:])[:, 0], expected_values, atol=TOLERANCE, rtol=0)


# A11, B1, B3: whole sequences


def ragged(policy, seed=0) -> tuple[SequenceBatch, torch.Tensor]:
    """Return sequences with all their transitions; token 0 is end, padding and an ordinary token. (4, T), (N,)"""
    rng = np.random.default_rng(seed)
    n_prompt, n_since = np.array([1, 9, 4, 2]), np.array([6, 1, 3, 12])
    lengths = n_prompt + n_since
    tokens = torch.as_tensor(rng.integers(N_TOKENS, size=(4, lengths.max())))
    tokens[1, 3] = tokens[2, 5] = 0
    rows = np.repeat(np.arange(4), n_since + 1)
    cols = np.concatenate([np.arange(p - 1, p + s) for p, s in zip(n_prompt, n_since)])
    actions = torch.as_tensor(rng.integers(N_TOKENS, size=len(rows)))
    return SequenceBatch(tokens, lengths, rows, cols, n_prompt=n_prompt), actions


def scores_and_gradient(policy, batch, actions):
    policy.zero_grad()
    values, log_probs, entropy = policy.evaluate_actions(batch, actions)
    (log_probs.sum() + (values**2).sum() + entropy.sum()).backward()
    gradient = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in policy.parameters()])
    return values.detach(), log_probs.detach(), entropy.detach(), gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_b1_alone_or_padded(family):
    policy = make_policy(tiny_seq2seq(family))
    batch, actions = ragged(policy)
    together = scores_and_gradient(policy, batch, actions)
    singles = []
    for row, n in enumerate(batch.lengths):
        here = batch.rows == row
        single = SequenceBatch(batch.tokens[[row], :n], np.array([n]), batch.rows[here] * 0, batch.cols[here],
            n_prompt=batch.n_prompt[[row]])  # fmt: skip
        singles.append(scores_and_gradient(policy, single, actions[torch.as_tensor(here)]))
    for whole, pieces in zip(together[:3], zip(*singles)):
        torch.testing.assert_close(whole, torch.cat(pieces), atol=TOLERANCE, rtol=0)
    gradient = sum(single[3] for single in singles)
    assert float((gradient - together[3]).abs().max()) < TOLERANCE * float(gradient.abs().max())


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_b1_padding_of_any_content_changes_nothing(family):
    policy = make_policy(tiny_seq2seq(family))
    batch, actions = ragged(policy)
    padded = torch.arange(batch.tokens.shape[1]) >= torch.as_tensor(batch.lengths)[:, None]
    poisoned = copy.copy(batch)
    poisoned.tokens = batch.tokens.masked_fill(padded, 7)
    for clean, other in zip(
        scores_and_gradient(policy, batch, actions), scores_and_gradient(policy, poisoned, actions)
    ):
        torch.testing.assert_close(clean, other, atol=1e-6 * max(1.0, float(clean.abs().max())), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_b3_each_transition_has_the_models_own_logits(family):
    """Every transition has the model's own logits for its prefix, also if it holds ids of padding or end."""
    policy = make_policy(tiny_seq2seq(family))
    batch, actions = ragged(policy)
    with torch.no_grad():
        log_probs = policy.evaluate_actions(batch, actions)[1]
    rows = []
    for row, col in zip(batch.rows, batch.cols):
        n, tokens = batch.n_prompt[row], batch.tokens[row].tolist()
        rows.append((tokens[:n], tokens[n : col + 1]))
    expected = expected_logits(policy.lm.backbone.model, observe(rows)).log_softmax(-1)
    torch.testing.assert_close(log_probs, expected.gather(1, actions[:, None])[:, 0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a11_a_token_changes_nothing_before_it_and_a_prompt_everything(family):
    policy = make_policy(tiny_seq2seq(family))
    batch, actions = ragged(policy)
    with torch.no_grad():
        values, log_probs, _ = policy.evaluate_actions(batch, actions)
        for position, first_changed in ((batch.n_prompt[3] + 5, 5), (1, -1)):
            changed = copy.copy(batch)
            changed.tokens = batch.tokens.clone()
            changed.tokens[3, position] = (changed.tokens[3, position] + 1) % N_TOKENS
            new_values, new_log_probs, _ = policy.evaluate_actions(changed, actions)
            here = torch.as_tensor((batch.rows == 3) & (batch.cols >= batch.n_prompt[3] + first_changed))
            torch.testing.assert_close(new_log_probs[~here], log_probs[~here], atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(new_values[~here], values[~here], atol=TOLERANCE, rtol=0)
            assert ((new_log_probs - log_probs).abs()[here] > 1e-4).all()


def test_a6_training_mode_changes_nothing():
    options = {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5}
    layers = {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}
    for config in (tiny_seq2seq("t5", dropout_rate=0.5), tiny_seq2seq("bart", **options, **layers)):
        policy = make_policy(config)
        before = policy.get_distribution(ROWS).log_probabilities
        policy.set_training_mode(True)
        assert policy.lm.backbone.training
        for _ in range(3):
            torch.testing.assert_close(policy.get_distribution(ROWS).log_probabilities, before, atol=0, rtol=0)


def test_prompt_lengths_by_hand():
    assert prompt_lengths(ROWS).tolist() == [6, 1, 3]
    ids, lengths = unpack_observations(ROWS)
    assert lengths.tolist() == [8, 1, 8] and ids[1, 0] == 3
