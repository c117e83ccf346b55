"""Top-k, top-p, min-p, repetition penalty and NLPO: tokens are scored among those they were sampled from (A3)."""

import math

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CallbackList

from agents import LMPolicy, TextVecEnv, load_checkpoint, save_checkpoint
from agents.models.sampling import FORBIDDEN, Sampling, TokenDistribution, score_tokens
from agents.models.token_sets import AllowedTokens, TokenSets
from tests.helpers.models import tiny
from tests.helpers.training import run_state, tiny_agent
from textenv import CharTokenizer, TextEnv

OPTIONS = [
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.5},
    {"top_k": 8, "top_p": 0.8, "min_p": 0.1, "temperature": 0.7},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "top_p": 0.5, "temperature": 1.3},
    {"top_p": 0.6, "top_p_lag": 2},
]


def logits_of(*probabilities):
    return torch.tensor([probabilities]).log()


@pytest.mark.parametrize(
    ("options", "probabilities", "kept"),
    [
        ({"top_k": 2}, (0.5, 0.2, 0.3), [0, 2]),
        ({"top_k": 9}, (0.5, 0.2, 0.3), [0, 1, 2]),
        ({"top_k": 1}, (0.4, 0.4, 0.2), [0, 1]),  # a tie
        ({"top_p": 0.5}, (0.5, 0.2, 0.3), [0]),
        ({"top_p": 0.51}, (0.5, 0.2, 0.3), [0, 2]),
        ({"top_p": 1.0}, (0.5, 0.2, 0.3), [0, 1, 2]),
        ({"top_p": 0.01}, (0.5, 0.2, 0.3), [0]),  # at least one token is kept
        ({"min_p": 0.5}, (0.5, 0.2, 0.3), [0, 2]),
        ({"min_p": 1.0}, (0.5, 0.2, 0.3), [0]),
        ({"top_k": 2, "top_p": 0.6}, (0.5, 0.2, 0.3), [0]),  # 0.5 of the 0.8 that top_k leaves is 0.625
        ({"top_p": 0.6, "temperature": 0.5}, (0.5, 0.2, 0.3), [0]),  # probabilities in proportion 0.25 : 0.04 : 0.09
    ],
)
def test_support_by_hand(options, probabilities, kept):
    sampling = Sampling(**options)
    adjusted = sampling.adjust(logits_of(*probabilities), lambda: None, torch.tensor([1]))
    assert sampling.support(adjusted)[0].nonzero().flatten().tolist() == kept


def test_support_is_within_the_mask_and_the_lagged_copy_decides():
    allowed = torch.tensor([[False, True, True]])
    assert Sampling(top_k=1).support(logits_of(0.5, 0.2, 0.3), allowed).tolist() == [[False, False, True]]
    assert Sampling().support(logits_of(0.5, 0.2, 0.3), allowed) is allowed
    lagged = logits_of(0.1, 0.8, 0.1)
    assert Sampling(top_p=0.6, top_p_lag=1).support(logits_of(0.5, 0.2, 0.3), None, lagged).tolist() == [[0, 1, 0]]


def test_repetition_penalty_by_hand():
    """Positive logits of seen tokens are divided, negative ones multiplied; padding after the row does not count."""
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    row = torch.tensor([[0, 1, 0, 2]])
    adjusted = Sampling(repetition_penalty=2.0).adjust(logits, lambda: row, torch.tensor([3]))
    assert adjusted.tolist() == [[1.0, -4.0, 2.0, -2.0]]


@pytest.mark.parametrize(
    "options",
    [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -1.0}, {"repetition_penalty": 0.0}, {"top_p_lag": 3}],
    ids=str,
)
def test_bad_values_are_refused(options):
    with pytest.raises(ValueError, match=f"Expected `{next(iter(options))}`"):
        Sampling(**options)


def test_a5_masked_scores_by_hand():
    """Masked tokens have probability 0, no entropy, no gradient; the others are normalised among themselves."""
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 2, requires_grad=True)
    allowed = torch.tensor([[True, False, True]] * 2)
    p = math.exp(1) / (math.exp(1) + math.exp(3))
    log_probs, entropies = score_tokens(logits, torch.tensor([0, 2]), allowed)
    torch.testing.assert_close(log_probs, torch.tensor([math.log(p), math.log(1 - p)]))
    torch.testing.assert_close(entropies, torch.full((2,), -p * math.log(p) - (1 - p) * math.log(1 - p)))
    (log_probs.sum() + 3 * entropies.sum()).backward()
    assert logits.grad.isfinite().all() and (logits.grad[:, 1] == 0).all() and (logits.grad[:, 0] != 0).all()
    distribution = TokenDistribution(logits.detach(), allowed)
    assert (distribution.log_probabilities.exp()[:, 1] == 0).all()
    assert (distribution.log_probabilities[:, 1] <= FORBIDDEN / 2).all()
    torch.testing.assert_close(distribution.entropy(), entropies.detach())


def test_a5_masked_tokens_are_never_drawn():
    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(2000, 50, generator=generator) < 0.1
    allowed[:, 0] |= ~allowed.any(dim=1)
    tokens = TokenDistribution(torch.randn(2000, 50, generator=generator), allowed).sample(generator)
    assert allowed[torch.arange(2000), tokens].all()


def test_gradient_of_masked_scores_is_that_of_the_plain_formula():
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(6, 9, generator=generator) < 0.6
    actions = torch.randint(9, (6,), generator=generator)
    allowed[torch.arange(6), actions] = True
    weights = torch.randn(2, 6, generator=generator)
    gradients = []
    for lean in (True, False):
        logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(2)).requires_grad_()
        if lean:
            log_probs, entropies = score_tokens(logits, actions, allowed)
        else:
            plain = logits.masked_fill(~allowed, -math.inf).log_softmax(-1)
            log_probs = plain.gather(1, actions[:, None])[:, 0]
            entropies = -torch.where(allowed, plain.exp() * plain.masked_fill(~allowed, 0.0), 0.0).sum(-1)
        (weights[0] * log_probs + weights[1] * entropies).sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a3_ratio_is_one(options):
    """After updates and over mixed lengths, the update scores tokens under the support that they were sampled from."""
    model = tiny_agent(n_steps=8, learning_rate=0.02, policy_kwargs=options)
    model.learn(3 * 8 * model.n_envs)
    model.collect_rollouts(model.env, _no_callback(model), model.rollout_buffer, model.n_steps)
    samples = next(iter(model.rollout_buffer.get()))
    with torch.no_grad():
        _, log_probs, entropies = model.policy.evaluate_actions(samples.observations, samples.actions)
    torch.testing.assert_close(log_probs, samples.old_log_prob, atol=1e-5, rtol=0)
    assert entropies.isfinite().all() and (entropies >= -1e-6).all()
    if "repetition_penalty" not in options:
        allowed = samples.observations.allowed.dense(torch.device("cpu"))
        assert allowed.sum(1).float().mean() < 0.9 * allowed.shape[1], "something is left out"
        assert allowed[torch.arange(len(allowed)), samples.actions].all()


def test_a3_without_the_stored_support_the_ratio_would_be_the_kept_mass():
    """The control: scored under the whole vocabulary, a nucleus of half the mass has a ratio of about a half."""
    model = tiny_agent(n_steps=8, policy_kwargs={"top_p": 0.5})
    model.learn(8 * model.n_envs)
    samples = next(iter(model.rollout_buffer.get()))
    samples.observations.allowed = AllowedTokens(TokenSets(model.action_space.n), np.zeros(len(samples.actions), int))
    with torch.no_grad():
        log_probs = model.policy.evaluate_actions(samples.observations, samples.actions)[1]
    assert (log_probs - samples.old_log_prob).exp().mean() < 0.75


def test_the_stock_buffer_is_refused():
    env = TextVecEnv(TextEnv(["ab"], CharTokenizer(), reward=lambda *_: 0.0, max_new_tokens=4), 4)
    model = PPO(LMPolicy, env, n_steps=4, batch_size=16, policy_kwargs={"lm": tiny("gpt2"), "top_k": 3}, device="cpu")
    with pytest.raises(ValueError, match=r"top_k, top_p, min_p.*SequenceRolloutBuffer"):
        model.learn(16)


def test_nlpo_the_copy_lags_and_is_renewed(tmp_path):
    model = tiny_agent(n_steps=8, learning_rate=0.05, policy_kwargs={"top_p": 0.6, "top_p_lag": 2})
    size, lagged = 8 * model.n_envs, model.policy.lm.lagged
    first = [weight.clone() for weight in lagged.backbone.parameters()]

    def same(first, second):
        return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    model.learn(size)
    assert same(lagged.backbone.parameters(), first)
    after_one = [weight.clone() for weight in model.policy.lm.backbone.parameters()]
    model.learn(size, reset_num_timesteps=False)
    assert same(lagged.backbone.parameters(), after_one), "the weights that sampled the second rollout"
    assert not same(lagged.backbone.parameters(), model.policy.lm.backbone.parameters())
    assert not any(weight.requires_grad for weight in lagged.parameters())
    save_checkpoint(model, tmp_path / "saved")
    other = tiny_agent(n_steps=8, learning_rate=0.05, policy_kwargs={"top_p": 0.6, "top_p_lag": 2})
    load_checkpoint(other, tmp_path / "saved")
    for run in (model, other):
        run.learn(2 * size, reset_num_timesteps=False)
    assert run_state(model) == run_state(other)


def test_waiting_segments_keep_their_support(tmp_path):
    """Episodes that straddle a checkpoint are trained under the supports that they were sampled from (E8)."""
    options = {
        "n_steps": 5,
        "policy_kwargs": {"top_k": 4},
        "rollout_buffer_kwargs": {"complete_episodes": True, "normalize_advantage": True},
    }
    model = tiny_agent(**options)
    model.learn(10 * model.n_envs)
    assert model.rollout_buffer.waiting
    save_checkpoint(model, tmp_path / "saved")
    other = tiny_agent(**options)
    load_checkpoint(other, tmp_path / "saved")
    for run in (model, other):
        run.learn(10 * run.n_envs, reset_num_timesteps=False)
    assert run_state(model) == run_state(other)
    samples = next(iter(model.rollout_buffer.get()))
    assert (samples.observations.allowed.dense(torch.device("cpu")).sum(1) <= 4).all()


def test_token_sets_are_kept_once_and_small():
    sets = TokenSets(1000)
    few = np.zeros((3, 1000), dtype=bool)
    few[:, [1, 5]] = True
    many = np.ones((2, 1000), dtype=bool)
    many[:, 0] = False
    assert sets.add(few).tolist() == [1, 1, 1] and sets.add(many).tolist() == [2, 2]
    assert [kept.nbytes for kept in sets.sets] == [125, 8, 125]
    assert (sets.dense(np.array([1, 2, 1])) == np.stack([few[0], many[0], few[0]])).all()
    other = TokenSets(1000)
    other.load_state_dict(sets.state_dict([np.arange(3, dtype=np.int32)]))
    assert (other.dense(np.arange(3)) == sets.dense(np.arange(3))).all() and other.add(many[:1]).tolist() == [2]


def test_token_sets_forget_and_are_renumbered():
    sets, rows = TokenSets(40), np.eye(40, dtype=bool)
    first, second = sets.add(rows[:6]), sets.add(rows[[3, 5, 30]])
    kept = [second, np.zeros(2, dtype=np.int32)]
    other = TokenSets(40)
    other.load_state_dict(sets.state_dict(kept))
    assert (other.dense(second) == rows[[3, 5, 30]]).all() and other.add(rows[5:6]) == first[5:6], "numbers stay"
    fewer = sets.only(kept)
    # `only` renumbers the arrays in place; 0 is the set of all tokens.
    assert [numbers.tolist() for numbers in kept] == [[1, 2, 3], [0, 0]] and len(fewer.sets) == 4
    assert (fewer.dense(second) == rows[[3, 5, 30]]).all() and fewer.dense(kept[1]).all()
    assert fewer.add(rows[[0, 5]]).tolist() == [4, 2]
    assert (sets.dense(first) == rows[:6]).all(), "what was handed out before stays as it is"


def _no_callback(model):
    callback = CallbackList([])
    callback.init_callback(model)
    callback.on_training_start({}, {})
    return callback
