"""Sequences that share their prompts: their values, log-probabilities and gradients are those of whole ones (F3)."""

import copy

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO
from stable_baselines3.common.distributions import kl_divergence
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents import FlatLMPolicy, KLPenalty, LoRA, SeparateCritic
from agents.models import prompt_layout
from agents.models.prompt_layout import lay_out
from agents.models.sequences import SequenceBatch, number_prompts, pad_sequences
from agents.models.shared_prompts import BehindPrompts
from agents.models.token_sets import AllowedTokens, TokenSets
from agents.policies.reference import divergences, log_probs
from tests.helpers.models import FAMILIES, N_POSITIONS, N_TOKENS, collect, few, make_policy, make_ppo, tiny
from tests.helpers.training import tiny_agent, tiny_env, weights
from textenv import CharTokenizer, TextEnv

PROMPTS = (9, 4, 12, 1)  # tokens; each has three completions, but for the second, which has one
SHARING = [name for name in FAMILIES if name != "mamba"]


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Share prompts in tiny batches, too, where it saves no time."""
    monkeypatch.setattr(prompt_layout, "MIN_SAVED", 0)
    monkeypatch.setattr(prompt_layout, "MIN_SHARE", 0.0)


def batch_of(seed=0, micro_batch_tokens=None, prompts=PROMPTS, most=8, allowed=False):
    """Return completions of 0 to `most` - 1 tokens of each prompt, with all their transitions, in random order."""
    rng = np.random.default_rng(seed)
    sequences, n_prompt = [], []
    for i, n in enumerate(prompts):
        prompt = rng.integers(N_TOKENS, size=n)
        for _ in range(1 if i == 1 else 3):
            sequences.append(np.concatenate([prompt, rng.integers(N_TOKENS, size=rng.integers(most))]))
            n_prompt.append(n)
    order = rng.permutation(len(sequences))
    sequences, n_prompt = [sequences[i] for i in order], np.array(n_prompt)[order]
    tokens, lengths = pad_sequences(sequences, "cpu")
    positions = [(row, col) for row, n in enumerate(n_prompt) for col in range(n - 1, lengths[row])]
    rows, cols = np.array([positions[i] for i in rng.permutation(len(positions))]).T
    numbers = number_prompts(sequences, n_prompt)
    sets = None
    if allowed:
        sets = TokenSets(N_TOKENS)
        masks = rng.random((len(rows), N_TOKENS)) < 0.7
        actions = masks.argmax(axis=1)
        sets = AllowedTokens(sets, sets.add(masks))
    else:
        actions = rng.integers(N_TOKENS, size=len(rows))
    batch = SequenceBatch(tokens, lengths, rows, cols, micro_batch_tokens, sets, n_prompt, numbers)
    return batch, torch.as_tensor(actions)


def scores(policy, batch, actions, is_shared):
    """Return values, log-probabilities, entropies and the gradient of a loss of all three."""
    policy.lm.may_share_prompts = is_shared
    assert any(chunk.shared is not None for chunk in policy.lm.chunks(batch)) == is_shared
    policy.train(True)
    policy.zero_grad()
    results = policy.evaluate_actions(batch, actions)
    values, log_probabilities, entropies = results
    factors = torch.linspace(-1, 1, len(actions))
    ((log_probabilities * factors).mean() + (values * factors).mean() - 0.1 * entropies.mean()).backward()
    gradients = [weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None]
    return *(result.detach() for result in results), torch.cat(gradients)


def differences(policy, batch, actions):
    """Return how much the four results differ, relative to their sizes (Euclidean norms)."""
    pairs = zip(*(scores(policy, batch, actions, is_shared) for is_shared in (True, False)), strict=True)
    return [float((one - other).norm() / other.norm()) for one, other in pairs]


def test_layout_by_hand():
    """Prompts 1 2 3 and 7; the first has completions 4 5 and none, the second 8 and 9 9 9."""
    sequences = [np.array(tokens) for tokens in ([1, 2, 3, 4, 5], [1, 2, 3], [7, 8], [7, 9, 9, 9])]
    n_prompt = np.array([3, 3, 1, 1])
    numbers = number_prompts(sequences, n_prompt)
    assert numbers.tolist() == [0, 0, 1, 1]
    ids, lengths = pad_sequences(sequences, "cpu")
    rows, cols = np.array([3, 0, 1, 0, 2]), np.array([3, 2, 2, 4, 0])
    shared = lay_out(ids, prompt_layout.Prompts(numbers, n_prompt, lengths), rows, cols, columns=100)
    assert shared.prompts.tolist() == [[1, 2, 3], [7, 8, 0]]  # padded by whatever the first sequence has there
    (completions,) = shared.completions
    assert completions.ids.tolist()[0] == [9, 9, 9]  # the longest first
    assert [row[:n] for row, n in zip(completions.ids.tolist()[1:], (2, 1))] == [[4, 5], [8]]
    assert completions.positions.tolist() == [[1, 2, 3], [3, 4, 4], [1, 1, 1]]
    assert completions.mask.tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 1, 1, 1, 1]]
    # Columns of the prompts, counted row by row: 0 to 2 are 1 2 3, and 3 is 7.
    source = completions.source.reshape(3, 3).tolist()
    assert source[1] == [0, 1, 2] and source[0][2] == source[2][2] == 3
    flat = torch.cat([shared.prompts.flatten(), completions.ids.flatten()])
    chosen = torch.cat([shared.chosen[0], 6 + shared.chosen[1]])[shared.order]
    assert flat[chosen].tolist() == [9, 3, 3, 5, 7] and shared.n_read == 6 + 9


@pytest.mark.parametrize("family", few(SHARING, 8))
def test_f3_results_are_those_of_whole_sequences(family):
    policy = make_policy(tiny(family, initializer_range=0.1))  # at larger ones, some families magnify rounding
    assert policy.lm.backbone.shares_prompts
    assert max(differences(policy, *batch_of())) < 1e-6


def test_f3_the_keys_of_prompts_must_lead_gradients_back(monkeypatch):
    """The negative control: with detached keys and values, numbers agree and gradients do not."""
    policy = make_policy()
    expanded = BehindPrompts._expanded
    monkeypatch.setattr(BehindPrompts, "_expanded", lambda self, states: expanded(self, states).detach())
    *results, gradient = differences(policy, *batch_of())
    assert max(results) < 1e-6 and gradient > 1e-3
    # The probe of a new model sees it as well, also at the small weights that transformers begins with.
    assert not make_policy(tiny(initializer_range=0.02)).lm.backbone.shares_prompts


def test_a_wrong_prompt_is_seen():
    """Another negative control: sequences that are said to have equal prompts, but have not."""
    policy = make_policy()
    batch, actions = batch_of()
    batch.tokens[batch.prompts == batch.prompts[0], 0] = torch.arange(3) % 2
    assert max(differences(policy, batch, actions)[:3]) > 1e-3


OPTIONS = {
    "adapters": {"train": LoRA(r=2)},
    "last_layers": {"train": "head"},
    "value_norm": {"value_norm": "popart"},
    "temperature": {"temperature": 0.7, "repetition_penalty": 1.3},
    "separate_critic": {"critic": SeparateCritic(tiny("llama"))},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_with_other_options(name):
    assert max(differences(make_policy(**OPTIONS[name]), *batch_of())) < 1e-6


def test_with_masks_and_supports():
    assert max(differences(make_policy(top_k=5), *batch_of(allowed=True))) < 1e-6


def test_with_autocast_up_to_its_rounding():
    assert max(differences(make_policy(autocast="bfloat16"), *batch_of())) < 0.1


@pytest.mark.parametrize("bound", [1, 20, 45, 70])
def test_micro_batches_count_the_tokens_that_are_read(bound):
    policy = make_policy()
    batch, actions = batch_of(micro_batch_tokens=bound)
    chunks = list(policy.lm.chunks(batch))
    assert sorted(np.concatenate([chunk.transitions for chunk in chunks])) == list(range(len(batch)))
    assert all(len(chunk.ids) == 1 or chunk.n_read <= bound for chunk in chunks)
    for chunk in chunks if bound > 1 else ():
        assert chunk.shared is None or chunk.n_read <= chunk.ids.numel()
    if any(chunk.shared is not None for chunk in chunks):
        assert max(differences(policy, batch, actions)) < 1e-6
    policy.lm.may_share_prompts = False
    assert sum(chunk.n_read for chunk in chunks) <= sum(chunk.n_read for chunk in policy.lm.chunks(batch))


def test_after_an_out_of_memory_error_the_parts_are_halved():
    policy = make_policy()
    batch, actions = batch_of()
    expected = scores(policy, batch, actions, is_shared=False)
    rows = []

    def small(module, inputs, output):
        rows.append(output.shape[0] * output.shape[1])
        if rows[-1] > 30:
            raise torch.OutOfMemoryError("no memory")

    policy.lm.backbone.model.transformer.h[1].mlp.register_forward_hook(small)
    with pytest.warns(UserWarning, match="Out of memory with "):
        got = scores(policy, batch, actions, is_shared=True)
    assert max(rows) > 30
    for one, other in zip(got, expected):
        assert float((one - other).abs().max() / other.abs().max()) < 1e-6


def test_columns_stay_within_the_positions_of_the_model():
    """Some models look masks up by column: a long prompt and another's long completion are not read side by side."""
    policy = make_policy()
    rng = np.random.default_rng(0)
    long, short = rng.integers(N_TOKENS, size=110), rng.integers(N_TOKENS, size=100)
    sequences = [
        np.concatenate([prompt, rng.integers(N_TOKENS, size=n)])
        for prompt, n in ((long, 5), (long, 8), (short, 26), (short, 20))
    ]
    n_prompt = np.array([110, 110, 100, 100])
    tokens, lengths = pad_sequences(sequences, "cpu")
    rows, cols = np.array([(row, col) for row in range(4) for col in range(n_prompt[row] - 1, lengths[row])]).T
    batch = SequenceBatch(tokens, lengths, rows, cols, None, None, n_prompt, number_prompts(sequences, n_prompt))
    (chunk,) = policy.lm.chunks(batch)
    columns = [part.source.numel() // len(part.ids) + part.ids.shape[1] for part in chunk.shared.completions]
    assert len(columns) > 1 and max(columns) <= N_POSITIONS
    assert max(differences(policy, batch, torch.as_tensor(rng.integers(N_TOKENS, size=len(rows))))) < 1e-6


def test_references_read_the_same_way():
    policy, other = make_policy(tiny("llama")), make_policy(tiny("llama"), seed=3)
    batch, actions = batch_of()
    results = []
    for is_shared in (True, False):
        policy.lm.may_share_prompts = other.lm.may_share_prompts = is_shared
        exact = divergences(other.lm, policy.lm, batch)
        with torch.no_grad():
            results.append((exact, log_probs(other.lm, policy.lm, batch, actions), policy.lm.sequence_values(batch)))
    for one, another in zip(*results, strict=True):
        torch.testing.assert_close(one, another, atol=1e-5, rtol=1e-5)
    other.lm.may_share_prompts = False  # one of the two reads whole sequences: both do
    policy.lm.may_share_prompts = True
    torch.testing.assert_close(divergences(other.lm, policy.lm, batch), results[0][0], atol=1e-5, rtol=1e-5)


def test_second_derivatives_of_trpo():
    torch.manual_seed(0)
    made = make_policy()
    policy = FlatLMPolicy(made.observation_space, made.action_space, lambda _: 1e-3, lm=tiny())
    batch, _ = batch_of()
    results = []
    for policy.lm.may_share_prompts in (True, False):
        assert any(chunk.shared is not None for chunk in policy.lm.chunks(batch)) == policy.lm.may_share_prompts
        log_probabilities = policy.get_distribution(batch).log_probabilities
        loss = (log_probabilities[:, 3] * log_probabilities[:, 5]).mean()
        flat = policy.lm.backbone.flat
        with sdpa_kernel(SDPBackend.MATH):
            (first,) = torch.autograd.grad(loss, flat, create_graph=True)
            (second,) = torch.autograd.grad((first * torch.linspace(-1, 1, len(first))).sum(), flat)
        results.append((log_probabilities.detach(), first.detach(), second))
    for one, other in zip(*results):
        assert float((one - other).abs().max() / other.abs().max()) < 2e-6


def trpo_of_groups(is_shared):
    """Return TRPO after a rollout of two groups of 4, and a function from a vector to its product with the Hessian."""
    env = tiny_env(prompts=["a longer prompt", "another prompt"], samples_per_prompt=4, stop_ids=())
    model = tiny_agent(env, n_envs=8, algorithm=TRPO, lm=tiny())
    model.policy.lm.may_share_prompts = is_shared
    collect(model)
    batch = next(model.rollout_buffer.get(None)).observations
    assert any(chunk.shared is not None for chunk in model.policy.lm.chunks(batch)) == is_shared
    with torch.no_grad():
        old = copy.copy(model.policy.get_distribution(batch))
    new = model.policy.get_distribution(batch)
    objective = new.log_probabilities[:, 3].mean()
    weights, gradient, of_divergence, _ = model._compute_actor_grad(kl_divergence(new, old).mean(), objective)
    return model, gradient, lambda vector: model.hessian_vector_product(weights, of_divergence, vector)


def test_the_products_and_the_step_of_trpo():
    """In TRPO's own numbers: products with the Hessian of the divergence, and the step that is made of them."""
    (shared, gradient, product), (whole, expected, products) = trpo_of_groups(True), trpo_of_groups(False)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5
    for vector in (expected, torch.linspace(-1, 1, len(expected))):
        off = product(vector) - products(vector)
        assert float(off.norm() / products(vector).norm()) < 1e-5
    before = whole.policy.lm.backbone.flat.detach().clone()
    steps = []
    for model in (shared, whole):
        model.train()
        steps.append(model.policy.lm.backbone.flat.detach() - before)
    assert steps[1].norm() > 0.01
    assert float((steps[0] - steps[1]).norm() / steps[1].norm()) < 1e-2  # ten conjugate gradients magnify rounding


def test_trpo_needs_the_second_derivatives_of_the_prompts_keys(monkeypatch):
    """The negative control: with keys whose gradients have none, products differ, though gradients agree."""
    _, whole, products = trpo_of_groups(False)
    expanded = BehindPrompts._expanded

    def without(self, states):
        states.register_hook(lambda gradient: gradient.detach()) if states.requires_grad else None
        return expanded(self, states)

    monkeypatch.setattr(BehindPrompts, "_expanded", without)
    _, gradient, product = trpo_of_groups(True)
    assert float((gradient - whole).norm() / whole.norm()) < 1e-5
    expected = products(gradient)
    assert float((product(gradient) - expected).norm() / expected.norm()) > 1e-3


def columns_of(policy):
    return policy.lm.train(True).shared_columns


def test_who_reads_whole_sequences():
    """Recurrent models, shards, and models not by us."""
    assert columns_of(make_policy()) == N_POSITIONS
    with pytest.warns(UserWarning, match="keeps a state"):
        assert columns_of(make_policy(tiny("mamba"))) is None
    sharded = make_policy()
    sharded.lm.shards = object()
    assert columns_of(sharded) is None
    other = make_policy()
    other.lm.backbone = torch.nn.Identity()  # stands for a `LanguageModel` that is no `Backbone`
    assert columns_of(other) is None
    critic = make_policy(critic=SeparateCritic(tiny("mamba")))
    assert columns_of(critic) is None


def test_without_equal_prompts_nothing_changes():
    policy = make_policy()
    batch, actions = batch_of()
    batch.prompts = np.arange(len(batch.lengths))
    chunks = list(policy.lm.chunks(batch))
    policy.lm.may_share_prompts = False
    for one, other in zip(chunks, policy.lm.chunks(batch), strict=True):
        assert one.shared is None and torch.equal(one.ids, other.ids)


def test_little_is_not_shared(monkeypatch):
    monkeypatch.setattr(prompt_layout, "MIN_SAVED", 64)
    policy = make_policy()
    batch, _ = batch_of()
    whole = sum(chunk.ids.numel() for chunk in policy.lm.chunks(batch))
    shared = sum(chunk.n_read for chunk in policy.lm.chunks(batch))
    assert shared < whole - 64
    monkeypatch.setattr(prompt_layout, "MIN_SAVED", whole - shared + 1)
    assert all(chunk.shared is None for chunk in policy.lm.chunks(batch))
    monkeypatch.setattr(prompt_layout, "MIN_SAVED", 0)
    monkeypatch.setattr(prompt_layout, "MIN_SHARE", 0.9)
    assert all(chunk.shared is None for chunk in policy.lm.chunks(batch))


class Replying(TextEnv):
    """Another speaker answers each turn of the policy."""

    def respond(self, prompt, preds):
        return " ok "


def end_of_run(kind, lm, reference, is_shared):
    """Return the weights after a run of PPO with a reference, on prompts that lanes have in common."""
    options = {"max_new_tokens": 6, "reward": lambda prompt, preds, done: float(preds[-1] < 9)}
    if kind == "several turns":
        options |= {"max_turns": 3, "max_response_tokens": 8, "stop_ids": range(10)}
    env = (TextEnv if kind == "one turn" else Replying)(["the same", "or other"], CharTokenizer(), **options)
    model = make_ppo(lm, env=env, n_envs=8, n_steps=12, batch_size=48, n_epochs=2, learning_rate=0.05)
    model.policy.lm.may_share_prompts = is_shared
    model.learn(3 * 96, callback=KLPenalty(0.1, reference=reference))
    batch = collect(model).view().batch
    assert len(np.unique(batch.prompts)) < len(batch.lengths)
    assert any(chunk.shared is not None for chunk in model.policy.lm.chunks(batch)) == is_shared
    return weights(model)


def assert_close(first, second):
    """Check that two runs end in the same weights, up to the rounding that training magnifies."""
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["one turn", "several turns"])
def test_whole_training_runs_end_in_the_same_weights(kind):
    """Replies are part of the completions."""
    reference = tiny(initializer_range=0.4)
    assert_close(*(end_of_run(kind, None, reference, is_shared) for is_shared in (True, False)))


def test_groups_of_samples_share():
    """The minibatches of GRPO: reads fewer tokens than the sequences have."""
    env = tiny_env(prompts=["a longer prompt", "another prompt"], samples_per_prompt=4, stop_ids=())
    model = tiny_agent(env, n_envs=8)
    batch = collect(model).view().batch
    assert sum(chunk.n_read for chunk in model.policy.lm.chunks(batch)) < batch.lengths.sum()
