"""Prompts that several rows begin: read once, with the result of reading each row's own (F1 in the rollout)."""

import numpy as np
import pytest
import torch

from agents import generate
from agents.models import prefix_cache as cache
from agents.models.backbone import Backbone
from agents.models.kept_states import KeptStates
from agents.models.observations import prompt_lengths, unpack_observations
from agents.models.seq2seq import Seq2SeqBackbone
from tests.helpers.models import CACHED, N_TOKENS, collect, few, log_ratios, make_policy, make_ppo, observe, tiny
from tests.helpers.seq2seq import tiny_seq2seq
from textenv import CharTokenizer, TextEnv

TOLERANCE = 1e-6
A, B, C, LONG = ([(7 * i + k) % N_TOKENS for k in range(n)] for i, n in enumerate((5, 9, 3, 40)))


def scripted(*changes, start, seed=0):
    """Return observations per step: an int adds that many tokens to each row, {row: prompt} begins new episodes."""
    rng = np.random.default_rng(seed)
    rows = [(prompt, []) for prompt in start]
    steps = [observe(rows)]
    for change in changes:
        for _ in range(change if isinstance(change, int) else 1):
            rows = [(prompt, [*since, int(rng.integers(N_TOKENS))]) for prompt, since in rows]
            if not isinstance(change, int):
                rows = [(change[row], []) if row in change else pair for row, pair in enumerate(rows)]
            steps.append(observe(rows))
    return steps


def at_random(seed, n_steps=60):
    """Return observations of rows that begin one of four prompts at random."""
    rng = np.random.default_rng(seed)
    pool = [A, B, C, A[:4] + B]
    changes = [{r: pool[rng.integers(4)] for r in range(6) if rng.random() < 0.2} for _ in range(n_steps)]
    return scripted(*changes, start=[A, A, B, B, C, C], seed=seed)


SCRIPTS = {
    "groups begin at once": scripted(4, start=[A, A, A, B, B, B]),
    "one after the other": scripted(3, {1: A}, 2, {0: A, 3: B}, 3, start=[A, B, C, C]),
    "all begin again": scripted(2, dict.fromkeys(range(4), A), 2, {0: B, 1: B, 2: A, 3: A}, 2, start=[A, A, B, B]),
    "a prompt longer than the window": scripted(2, {0: LONG, 2: LONG}, 3, {1: LONG}, 2, start=[A, B, A, C]),
    "the longest row ends": scripted(3, {0: A}, 20, {1: A}, 3, {2: LONG}, 2, start=[LONG, A, B, C]),
    "several join a step": scripted(2, {0: B, 1: B, 3: A, 4: A}, 3, start=[A, A, B, C, C, C]),
    "one row": scripted(3, {0: A}, 2, {0: B}, 1, {0: A}, 2, start=[A]),
    "at random": at_random(1),
}


@pytest.fixture
def unshared(monkeypatch):
    """Return a function after which rows are read each by itself, as the slow twin."""
    return lambda: monkeypatch.setattr(cache.PrefixCache, "is_sharing", False)


def decode(policy, steps):
    """Return the hidden states and logits of all steps, from the rollout's cache."""
    results = []
    for observations in steps:
        row = unpack_observations(observations)
        if policy.lm.backbone.is_encoder_decoder:
            row = (*row, prompt_lengths(observations))
        with torch.no_grad():
            results.append([part.clone() for part in policy.lm.rollout_cache.read(*row)])
    return results


def difference(first, second):
    return max(float((a - b).abs().max()) for one, other in zip(first, second) for a, b in zip(one, other))


def figures(policy):
    return policy.lm.rollout_cache.prefill_tokens, policy.lm.rollout_cache.shared_tokens


def compare(config, steps, unshared):
    """Return the largest difference between shared and unshared decoding, and the figures of both."""
    policy, plain = make_policy(config), make_policy(config)
    shared = decode(policy, steps)
    unshared()
    return difference(shared, decode(plain, steps)), figures(policy), figures(plain)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("config", [tiny(), tiny("mistral"), tiny_seq2seq("bart")], ids=["gpt2", "mistral", "bart"])
def test_f1_a_script(config, script, unshared):
    off, (read, shared), (read_alone, none) = compare(config, SCRIPTS[script], unshared)
    assert off < 10 * TOLERANCE  # of logits of up to 20
    assert none == 0 and read + shared == read_alone and shared > 0


@pytest.mark.parametrize("family", few([f for f in CACHED if f not in ("gpt2", "mistral")], 3))
def test_f1_a_family(family, unshared):
    assert compare(tiny(family), SCRIPTS["at random"], unshared)[0] < 10 * TOLERANCE


@pytest.mark.parametrize("new_tokens", [0, 3, 256])
def test_f1_columns_that_move(new_tokens, unshared, monkeypatch):
    """Buffers grow and shrink all the time; new rows join the step or do not."""
    monkeypatch.setattr(cache, "GROWTH", 2)
    monkeypatch.setattr(cache, "COMPACT_FROM", 3)
    monkeypatch.setattr(cache, "NEW_TOKENS", new_tokens)
    assert compare(tiny("llama"), at_random(2), unshared)[0] < 10 * TOLERANCE


def test_the_tokens_by_hand(monkeypatch):
    """A row's last token is read in the step, so that a prompt of 5 has 4 to share."""
    monkeypatch.setattr(cache, "KEPT_SHARE", 1)
    policy = make_policy()
    decode(policy, SCRIPTS["groups begin at once"][:1])
    assert figures(policy) == (4 + 8, 2 * 4 + 2 * 8)
    policy.lm.drop_caches()
    decode(policy, SCRIPTS["groups begin at once"][:1])
    assert figures(policy) == (2 * (4 + 8), 2 * (2 * 4 + 2 * 8))
    policy = make_policy()
    decode(policy, scripted(2, {1: A}, 2, {0: B, 2: B}, {3: C}, start=[A, B, C, C]))
    assert figures(policy) == (4 + 8 + 2, 2 + 4 + 8 + 8 + 2)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_f1_an_encoder_decoder_encodes_the_prompts_of_rows_that_go_on_once(family, unshared, monkeypatch):
    """After an update, rows that are in the middle of different texts begin with equal prompts."""
    encoded = []
    encode = Seq2SeqBackbone._encode
    monkeypatch.setattr(
        Seq2SeqBackbone, "_encode", lambda self, ids, mask: encoded.append(len(ids)) or encode(self, ids, mask)
    )
    rows = [(A, [1]), (B, [2, 3]), (A, [4, 5, 6]), (B, [2, 3]), (A, []), (C, [7])]
    steps = [observe(rows), observe([(prompt, [*since, 8]) for prompt, since in rows]), observe([(A, []), (C, [])] * 3)]
    policy, plain = make_policy(tiny_seq2seq(family)), make_policy(tiny_seq2seq(family))
    encoded.clear()
    shared = decode(policy, steps)
    assert encoded == [3]  # in the first step; the last one finds the prompts of rows that went on
    # Of A and one token, B and two, three tokens behind A, C and one; in the last step, A and C three times.
    assert figures(policy) == (6 + 11 + 3 + 4, (5 + 11 + 5) + 3 * (5 + 3))
    unshared()
    assert difference(shared, decode(plain, steps)) < 10 * TOLERANCE


def test_different_prompts_share_nothing():
    policy = make_policy()
    decode(policy, scripted(2, {1: A[:4]}, start=[A, B, C, LONG]))
    assert figures(policy) == (4 + 8 + 2 + 39 + 3, 0)


# What is kept


def test_the_oldest_goes_first():
    kept = KeptStates()
    for key, n in ((b"a", 3), (b"b", 3), (b"c", 3)):
        kept.add(key, n, [], most_tokens=9)
    kept.take(b"a")
    kept.add(b"d", 4, [], most_tokens=9)
    assert [key in kept for key in (b"a", b"b", b"c", b"d")] == [True, False, False, True] and kept.n_tokens == 7
    kept.add(b"e", 100, [], most_tokens=9)
    assert b"e" in kept and kept.n_tokens == 100


@pytest.mark.parametrize("config", [tiny(), tiny_seq2seq()], ids=["gpt2", "t5"])
def test_the_bound_of_memory_is_kept(config, unshared, monkeypatch):
    monkeypatch.setattr(cache, "KEPT_SHARE", 10)
    policy, plain, steps = make_policy(config), make_policy(config), at_random(3)
    shared = []
    for observations in steps:
        shared += decode(policy, [observations])
        kept, own = policy.lm.rollout_cache.kept, policy.lm.rollout_cache
        assert len(kept._kept) == 1 or kept.n_tokens <= 6 * own._width() / 10
        sizes = [part.numel() for _, states in kept._kept.values() for layer in states for part in layer]
        assert sum(sizes) == kept.n_tokens * 2 * 2 * 16  # two layers of keys and values of width 16, no padding
    read, n_shared = figures(policy)
    unshared()
    assert difference(shared, decode(plain, steps)) < 10 * TOLERANCE
    assert n_shared > 0 and read > 4 + 8 + 2 + 12  # each prompt once


def change_in_place(policy):
    with torch.no_grad():
        policy.lm.backbone.model.get_input_embeddings().weight.mul_(1.5)


def change_by_a_fused_step(policy):
    policy.zero_grad()
    policy.get_distribution(SCRIPTS["one row"][0]).entropy().sum().backward()
    policy.optimizer.step()


def replace(policy):
    weight = policy.lm.backbone.model.transformer.wpe.weight
    policy.lm.backbone.model.transformer.wpe.weight = torch.nn.Parameter(weight.detach() * 1.5)


@pytest.mark.parametrize("change", [change_in_place, change_by_a_fused_step, replace], ids=lambda f: f.__name__)
def test_a8_new_weights_read_prompts_anew(change, unshared):
    """All rows begin anew, so that no row shows that the weights are others."""
    policy = make_policy(optimizer_class=torch.optim.SGD, optimizer_kwargs={"fused": True})
    policy.optimizer.param_groups[0]["lr"] = 0.1
    step = scripted(start=[A, A, B, B])
    before = decode(policy, step)
    decode(policy, scripted(start=[B, B, A, A]))
    change(policy)
    after = decode(policy, step)
    unshared()
    policy.lm.drop_caches()
    assert difference(after, decode(policy, step)) < 10 * TOLERANCE
    assert difference(after, before) > 0.01


def test_a8_an_update_drops_them():
    model = make_ppo(prompts=["abcdef"], max_new_tokens=4)
    collect(model)
    assert model.policy.lm.rollout_cache.kept.n_tokens > 0
    model.train()
    assert model.policy.lm.rollout_cache.kept.n_tokens == 0


def test_a_negative_control(unshared, monkeypatch):
    """Kept keys of another prompt fail the check."""
    monkeypatch.setattr(KeptStates, "take", lambda self, key: [(2 * k, v) for k, v in self._kept[key].states])
    assert compare(tiny(), SCRIPTS["one after the other"], unshared)[0] > 0.1


# Rollouts and generation


def grouped(n_steps=12, prompts=("abcdefgh", "ijkl"), config=None, stop_ids=range(8)):
    env = TextEnv(prompts, CharTokenizer(), reward=lambda prompt, preds, done: float(done), max_new_tokens=6,
                  samples_per_prompt=4, stop_ids=stop_ids)  # fmt: skip
    return make_ppo(config, env=env, n_envs=8, n_steps=n_steps)


@pytest.mark.parametrize("config", [tiny("llama"), tiny_seq2seq()], ids=["llama", "t5"])
def test_a1_a_rollout_of_groups(config, unshared):
    """The same tokens and numbers as unshared, and the ratio is 1."""
    model = grouped(config=config)
    buffer = collect(model)
    assert np.abs(log_ratios(model, buffer)).max() < 1e-5
    read, shared = figures(model.policy)
    assert shared > 3 * read
    unshared()
    plain = grouped(config=config)
    expected = collect(plain)
    assert figures(plain.policy)[1] == 0
    for name in ("actions", "values", "log_probs", "advantages"):
        np.testing.assert_allclose(getattr(buffer, name), getattr(expected, name), atol=1e-5, rtol=0)


def test_a_rollout_of_groups_reads_each_prompt_once():
    model = grouped(stop_ids=[], n_steps=6)
    collect(model)
    assert figures(model.policy) == (7 + 3, 3 * (7 + 3))


@pytest.mark.parametrize("n_envs", [1, 3, 64])
def test_generate_reads_a_prompt_once(n_envs, monkeypatch):
    model = make_ppo()
    read = []
    prefill = Backbone.prefill
    monkeypatch.setattr(cache, "NEW_TOKENS", 0)
    monkeypatch.setattr(Backbone, "prefill", lambda self, ids, *a: read.append(ids.numel()) or prefill(self, ids, *a))
    texts = generate(model, ["abcdefgh", "xyz"], CharTokenizer(), n=4, n_envs=n_envs, max_new_tokens=5, stop_ids=[])
    assert len(texts) == 8 and sum(read) in (7 + 2, 2 * 7)  # two prompts, or two rows of one batch with padding
    assert model.policy.lm.predict_cache.kept.n_tokens == 0
