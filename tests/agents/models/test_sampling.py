"""`TokenDistribution`: tokens are scored under exactly the distribution that they are sampled from (A2, A12)."""

import math

import numpy as np
import pytest
import torch

from agents.models import sampling
from agents.models.observations import unpack_observations
from agents.models.sampling import TokenDistribution, score_tokens
from agents.models.sequences import SequenceBatch
from tests.helpers.models import N_ROWS, N_TOKENS, collect, make_policy, make_ppo, observe, tiny

BELOW_ONE = 1 - 2**-24  # the largest that torch.rand returns in float32

PROBABILITIES = torch.tensor([0.5, 0.2, 0.0, 0.2, 0.0625, 0.0375])


def distribution(probabilities, n=1) -> TokenDistribution:
    return TokenDistribution(torch.as_tensor(probabilities).log().expand(n, -1))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def draw(monkeypatch):
    """Sample with given uniform numbers instead of random ones, one a row."""

    def sample(dist, uniform):
        rows = torch.as_tensor(uniform, dtype=torch.float32)[:, None]
        monkeypatch.setattr(torch, "rand", lambda *shape, generator: rows.reshape(shape))
        actions = dist.sample()
        monkeypatch.undo()
        return actions.tolist()

    return sample


# The inverse of the cumulative distribution


def test_frequencies_by_enumeration(draw):
    """An even grid of uniform numbers draws each token at its probability, to 1/10,000."""
    n = 10_000
    actions = draw(distribution(PROBABILITIES, n), (np.arange(n) + 0.5) / n)
    counts = np.bincount(actions, minlength=6)
    np.testing.assert_allclose(counts / n, PROBABILITIES, atol=1 / n)
    assert counts[2] == 0


def test_frequencies_of_random_draws():
    """Pearson's statistic of 20,000 draws; with 4 degrees of freedom one in 10,000 seeds exceeds 24."""
    n = 20_000
    actions = distribution(PROBABILITIES, n).sample(seeded(0))
    counts = torch.bincount(actions, minlength=6)
    possible = PROBABILITIES > 0
    expected = PROBABILITIES[possible] * n
    assert float(((counts[possible] - expected) ** 2 / expected).sum()) < 24
    assert counts.sum() == n and counts[~possible].sum() == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_temperature(draw, temperature):
    logits = torch.tensor([1.0, 0.0, -1.0])
    weights = [math.exp(logit / temperature) for logit in logits.tolist()]
    n = 1_000
    counts = np.bincount(draw(TokenDistribution(logits.expand(n, -1) / temperature), (np.arange(n) + 0.5) / n))
    np.testing.assert_allclose(counts / n, np.array(weights) / sum(weights), atol=1 / n)


@pytest.mark.parametrize(
    ("probabilities", "uniform", "token"),
    [
        ([0.0, 0.5, 0.5], 0.0, 1),
        ([0.5, 0.0, 0.5], 0.0, 0),
        ([0.25, 0.0, 0.25, 0.5], 0.25, 2),  # on a border: not the token without probability
        ([0.5, 0.5, 0.0], 0.5, 1),
        ([0.5, 0.5, 0.0], BELOW_ONE, 1),
        ([0.5, 0.5, 0.0, 0.0], 1.0, 1),
        ([0.0, 0.0, 1.0], 0.0, 2),
        ([0.0, 0.0, 1.0], BELOW_ONE, 2),
        ([1.0, 0.0, 0.0], 0.0, 0),
        ([1.0, 0.0, 0.0], BELOW_ONE, 0),
        ([1.0], BELOW_ONE, 0),
    ],
)
def test_a_token_without_probability_is_never_drawn(draw, probabilities, uniform, token):
    assert draw(distribution(probabilities), [uniform]) == [token]


def test_a_large_vocabulary(draw):
    """The float32 sum of 151,936 probabilities is not exactly 1: no draw is outside, and quarters get their share."""
    n, vocab_size = 40, 151_936
    dist = TokenDistribution(torch.randn(1, vocab_size, generator=seeded(0)).expand(n, -1))
    actions = torch.tensor(draw(dist, [0.0, BELOW_ONE, *(np.arange(n - 2) + 0.5) / (n - 2)]))
    assert actions[0] == 0 and 0.9999 * vocab_size < actions[1] < vocab_size
    quarters = torch.bincount(actions[2:] * 4 // vocab_size, minlength=4) / (n - 2)
    expected = dist.log_probabilities[0].exp().reshape(4, -1).sum(1)
    torch.testing.assert_close(quarters, expected, atol=1 / (n - 2), rtol=0)


def test_the_generator_decides():
    dist = distribution(PROBABILITIES, 50)
    state = torch.get_rng_state()
    first, again, other = (dist.sample(seeded(seed)).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


# Scores


def test_entropy_by_hand():
    rows = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1e4, -1e4], [0.0, math.log(3.0), -1e4, -1e4]])
    by_hand = [math.log(4), math.log(2), 0.25 * math.log(4) + 0.75 * math.log(4 / 3)]
    torch.testing.assert_close(TokenDistribution(rows).entropy(), torch.tensor(by_hand))


def test_log_prob_by_hand():
    dist = TokenDistribution(torch.tensor([[0.0, math.log(3.0)]] * 2))
    torch.testing.assert_close(dist.log_prob(torch.tensor([0, 1])), torch.tensor([0.25, 0.75]).log())
    half = TokenDistribution(torch.tensor([[0.0, math.log(3.0)]]) / 0.5)
    torch.testing.assert_close(half.log_prob(torch.tensor([1])), torch.tensor([0.9]).log())


def test_actions_of_any_dtype_and_shape():
    dist = distribution(PROBABILITIES, 2)
    for actions in (torch.tensor([1, 3]), torch.tensor([1.0, 3.0]), torch.tensor([[1], [3]])):
        torch.testing.assert_close(dist.log_prob(actions), torch.tensor([0.2, 0.2]).log())


def test_deterministic_is_the_most_probable():
    dist = TokenDistribution(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]))
    assert dist.mode().tolist() == [1, 0]
    assert dist.get_actions(deterministic=True).tolist() == [1, 0]
    assert torch.equal(dist.get_actions(False, seeded(3)), dist.sample(seeded(3)))


def test_the_torch_distribution_agrees():
    dist = TokenDistribution(torch.randn(5, 7, generator=seeded(0)) / 0.7)
    actions = dist.sample(seeded(0))
    torch.testing.assert_close(dist.distribution.log_prob(actions), dist.log_prob(actions))
    torch.testing.assert_close(dist.distribution.entropy(), dist.entropy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a12_softmax_in_float32_from_16_bits(dtype):
    logits = (torch.randn(64, 1000, generator=seeded(0)) * 30).to(dtype)
    dist = TokenDistribution(logits.float() / 0.7)
    actions = dist.sample(seeded(1))
    assert dist.log_probabilities.dtype == torch.float32
    assert dist.log_prob(actions).isfinite().all() and dist.entropy().isfinite().all()
    exact = (logits.double() / 0.7).log_softmax(-1).float()
    torch.testing.assert_close(dist.log_probabilities, exact, atol=1e-4, rtol=0)
    assert (
        float(((logits / 0.7).log_softmax(-1) - exact).abs().max()) > 0.01
    )  # the control: a softmax in 16 bits is off


# One distribution in rollout, update and reference


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_a2_rollout_update_and_reference_score_alike(temperature):
    """All log-probabilities are log_softmax(logits / T)[a] of the model's own forward."""
    model = make_ppo(policy_kwargs={"temperature": temperature})
    buffer = collect(model)
    lm = model.policy.lm
    view = buffer.view()
    logits = lm.backbone.model(input_ids=view.batch.tokens).logits[view.batch.rows, view.batch.cols, :N_TOKENS]
    expected = (logits / temperature).log_softmax(-1).gather(1, view.actions[:, None])[:, 0].detach()
    stored = torch.as_tensor(buffer.log_probs[view.steps, view.lanes])
    updated = model.policy.evaluate_actions(view.batch, view.actions)[1].detach()
    reference = lm.log_probs(view.batch, view.actions).detach()
    for scored in (stored, updated, reference, model.policy.get_distribution(view.batch).log_prob(view.actions)):
        torch.testing.assert_close(scored.detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_padded_rows_are_never_sampled_and_never_scored(family):
    """Embedding rows beyond the tokenizer's vocabulary, here with the largest logits, have no probability."""
    policy = make_policy(tiny(family))
    head = policy.lm.backbone.model.get_output_embeddings()
    observations = observe([([1, 2], [3])] * 500)
    with torch.no_grad():
        last = policy.lm.backbone.model.base_model(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state[0, -1]
        head.weight[N_TOKENS:] = last * 10
        logits = policy.lm.backbone.model(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1]
        assert logits.shape == (N_ROWS,) and logits.argmax() >= N_TOKENS
        actions, _, log_probs = policy(observations)
        greedy = policy(observations[:1], deterministic=True)[0]
        _, scored, entropy = policy.evaluate_actions(observations, actions)
    expected = logits[:N_TOKENS].log_softmax(-1)
    assert int(actions.max()) < N_TOKENS
    assert int(greedy) == int(expected.argmax())
    torch.testing.assert_close(log_probs, expected[actions], atol=1e-5, rtol=0)
    torch.testing.assert_close(scored, expected[actions], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum().expand(500), atol=1e-5, rtol=0)
    assert policy.get_distribution(observations[:1]).log_probabilities.shape == (1, N_TOKENS)


def test_policy_samples_what_it_scores():
    """Frequencies of 5,000 samples match the policy's probabilities."""
    policy = make_policy()
    observations = observe([([1, 2], [3])] * 5_000)
    with torch.no_grad():
        actions, _, _ = policy(observations)
        expected = policy.get_distribution(observations[:1]).log_probabilities[0].exp()
    frequencies = torch.bincount(actions, minlength=N_TOKENS) / 5_000
    bound = 4 * (expected * (1 - expected) / 5_000).sqrt() + 1e-3
    assert ((frequencies - expected).abs() < bound).all()


def test_e12_sampling_leaves_the_global_generators_alone():
    policy = make_policy()
    observations = observe([([1, 2], [3]), ([4], [])])
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with torch.no_grad():
        policy(observations)
    policy.predict(observations.numpy())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state


def test_prediction_and_rollout_draw_from_generators_of_their_own():
    """A `predict` in between does not change the draws of a rollout."""
    observations = observe([([1, 2], [3])] * 20)
    alone, disturbed = make_policy(), make_policy()
    disturbed.predict(observations.numpy())
    with torch.no_grad():
        assert torch.equal(alone(observations)[0], disturbed(observations)[0])
    assert not torch.equal(make_policy(seed=1)(observations)[0], make_policy(seed=2)(observations)[0])


def test_a_batch_is_scored_in_its_own_order():
    """Sequences are read sorted by length; the results are not."""
    policy = make_policy()
    rows = observe([([1], []), ([2, 3, 4, 5], [6]), ([7, 8], [9] * 30), ([3], [4])])
    actions = torch.tensor([4, 3, 2, 1])
    ids, lengths = unpack_observations(rows)
    order = [2, 0, 3, 1]
    batch = SequenceBatch(ids, lengths.numpy(), np.array(order), lengths.numpy()[order] - 1)
    with torch.no_grad():
        singles = [SequenceBatch.from_observations(rows[[i]]) for i in order]
        alone = torch.cat([policy.lm.log_probs(single, actions[[i]]) for single, i in zip(singles, order)])
        for scored in (policy.lm.log_probs(batch, actions[order]), policy.evaluate_actions(batch, actions[order])[1]):
            torch.testing.assert_close(scored, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_with_a_lean_backward_are_those_of_the_distribution(temperature):
    """`score_tokens` has the values of the distribution's methods, and the gradients of any mixture of the two."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 11, generator=generator)
    actions = torch.randint(11, (6,), generator=generator)
    weights = torch.randn(2, 6, generator=generator)
    results = []
    for fast in (True, False):
        leaf = logits.clone().requires_grad_()
        distribution = TokenDistribution(leaf / temperature)
        slow = distribution.log_prob(actions), distribution.entropy()
        scores = score_tokens(leaf / temperature, actions) if fast else slow
        (weights[0] * scores[0] + weights[1] * scores[1]).sum().backward()
        results.append((*scores, leaf.grad))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_probabilities_beside_log_probabilities_are_held_in_blocks(monkeypatch, masked):
    """The same scores and gradient, bit for bit, with no more than `BLOCK` probabilities at once, or one row."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 11, generator=generator)
    actions = torch.full((7,), 4)
    allowed = (torch.rand(7, 11, generator=generator) < 0.7).index_fill(1, torch.tensor([4]), True) if masked else None
    results, sizes, probabilities = [], [], sampling._probabilities
    monkeypatch.setattr(sampling, "_probabilities", lambda *block: sizes.append(len(block[0])) or probabilities(*block))
    for block in (7 * 11, 3 * 11 + 5, 1):
        monkeypatch.setattr(sampling, "BLOCK", block)
        leaf = logits.clone().requires_grad_()
        log_probs, entropies = score_tokens(leaf, actions, allowed)
        (log_probs - 0.1 * entropies).sum().backward()
        results.append((log_probs, entropies, leaf.grad))
    assert sizes == 2 * [7] + 2 * [3, 3, 1] + 2 * 7 * [1]
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0]))
