"""`SequenceRolloutBuffer`: minibatches, advantages and memory, compared with SB3's buffer where both apply."""

import itertools
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from agents import RolloutStep, SequenceRolloutBuffer
from tests.helpers.models import PROMPTS, collect, count_a, make_ppo, tiny
from textenv import CharTokenizer, TextEnv
from textenv.episodes.rules import PADDING, SEPARATOR


def epoch(buffer, batch_size=None) -> list[list[tuple]]:
    """Return an epoch's minibatches: (tokens read, action, log-probability, advantage, return) of each transition."""
    minibatches = []
    for samples in buffer.get(batch_size):
        batch = samples.observations
        read = [tuple(batch.tokens[row, : col + 1].tolist()) for row, col in zip(batch.rows, batch.cols)]
        tensors = (samples.actions, samples.old_log_prob, samples.advantages, samples.returns)
        minibatches.append(list(zip(read, *(tensor.tolist() for tensor in tensors))))
    return minibatches


class Rewards(RolloutStep):
    """Replaces the env's rewards by given ones, (T, B)."""

    key = "Rewards"

    def __init__(self, rewards):
        super().__init__()
        self.rewards = np.asarray(rewards)

    def __call__(self, buffer):
        buffer.rewards[:] = self.rewards


def random_rewards(n_steps=12, n_envs=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n_steps, n_envs)).astype(np.float32)


# E4: minibatches


@pytest.mark.filterwarnings("ignore:.*fewer than 4 in each")
@pytest.mark.parametrize("batch_size", [6, 12, 24, 48, None])
def test_e4_each_transition_once_an_epoch_in_a_new_order(batch_size):
    buffer = collect(make_ppo(n_steps=12, n_envs=4, max_new_tokens=3))
    epochs = [epoch(buffer, batch_size) for _ in range(3)]
    stored = Counter(zip(buffer.actions.flatten().tolist(), buffer.log_probs.flatten().tolist()))
    for minibatches in epochs:
        assert len(minibatches) == (1 if batch_size is None else 48 // batch_size)
        everything = [transition for minibatch in minibatches for transition in minibatch]
        assert Counter((action, log_prob) for _, action, log_prob, *_ in everything) == stored
        assert sorted(everything) == sorted(itertools.chain(*epochs[0]))
    if batch_size in (12, 24):  # other sequences together, not only the minibatches in another order
        assert len({frozenset(map(frozenset, minibatches)) for minibatches in epochs}) == 3


def test_e4_minibatches_are_whole_sequences_of_about_equal_size():
    buffer = collect(make_ppo(n_steps=24, n_envs=8))
    longest = max(segment.end - segment.start for segment in buffer.segments)
    for _ in range(5):
        minibatches = epoch(buffer, 48)
        sizes = [len(minibatch) for minibatch in minibatches]
        assert sum(sizes) == 24 * 8 and max(sizes) - min(sizes) <= 2 * longest
        for minibatch in minibatches:
            for read, action, *_ in minibatch:  # the next token of the same episode is in the same minibatch
                goes_on = [other for m in minibatches for other, *_ in m if other == (*read, action)]
                assert not goes_on or (*read, action) in [other for other, *_ in minibatch]


@pytest.mark.filterwarnings("ignore:.*fewer than 4 in each")
def test_e4_minibatches_come_in_a_new_order_too():
    """The one with the longest sequence is not always the first."""
    rows = [{"prompt": "a", "max_new_tokens": 12}] + [{"prompt": "b", "max_new_tokens": 2}] * 30
    env = TextEnv(rows, CharTokenizer(), reward=count_a, max_new_tokens=12, stop_ids=[], order="sequential")
    buffer = collect(make_ppo(env=env))
    first_minibatches = [next(iter(epoch(buffer, 12))) for _ in range(12)]
    assert 0 < sum(any(read[0] == 1 for read, *_ in minibatch) for minibatch in first_minibatches) < 12


@pytest.mark.filterwarnings("ignore:.*fewer than 4 in each")
def test_e4_orders_differ_between_seeds_not_runs():
    orders = [epoch(collect(make_ppo(seed=seed)), 12) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_a_batch_size_that_does_not_divide_is_refused():
    buffer = collect(make_ppo())
    with pytest.raises(ValueError, match=r"`batch_size` to divide n_steps \* n_envs = 48, got 20"):
        next(buffer.get(20))


def test_fewer_sequences_than_minibatches_are_refused():
    env = TextEnv(PROMPTS, CharTokenizer(), reward=count_a, max_new_tokens=12, stop_ids=[])
    buffer = collect(make_ppo(env=env))
    with pytest.raises(ValueError, match="one sequence for each of 8 minibatches, got 4: raise batch_size, or n_steps"):
        next(buffer.get(6))


def test_a_minibatch_of_few_sequences_warns():
    env = TextEnv(PROMPTS, CharTokenizer(), reward=count_a, max_new_tokens=12, stop_ids=[])
    buffer = collect(make_ppo(env=env))
    with pytest.warns(UserWarning, match="4 sequences in 2 minibatches are fewer than 4 in each"):
        next(buffer.get(24))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(buffer.get(48))


@pytest.mark.parametrize("micro_batch_tokens", [None, 30])
def test_e2_optimizer_steps_are_epochs_times_minibatches(micro_batch_tokens):
    model = make_ppo(n_epochs=3, batch_size=12, rollout_buffer_kwargs={"micro_batch_tokens": micro_batch_tokens})
    steps = []
    model.policy.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    with pytest.warns(UserWarning, match="fewer than 4 in each"):
        model.learn(2 * 48)
    assert len(steps) == 2 * 3 * 4


# One forward per sequence equals one sample per token


def trained(rollout_buffer_class, **kwargs):
    """Train three rollouts of three epochs; return the weights as one vector, and the logged figures."""
    kwargs = {"n_epochs": 3, "learning_rate": 0.03, "ent_coef": 0.01, **kwargs}
    model = make_ppo(rollout_buffer_class=rollout_buffer_class, n_steps=8, gamma=0.9, gae_lambda=0.8, **kwargs)
    start = torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()
    model.learn(3 * 32, log_interval=None)
    weights = torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
    assert float((weights - start).abs().max()) > 1e-3
    return weights, {k: v for k, v in model.logger.name_to_value.items() if k.startswith("train/")}


@pytest.mark.parametrize("options", [{}, {"clip_range_vf": 0.1}, {"rollout_buffer_kwargs": {"micro_batch_tokens": 20}}])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_ends_where_the_stock_buffer_does(family, options):
    """Sequences or single tokens in the same minibatch: the same weights to 1e-6 and the same logs (B6)."""
    stock_options = {k: v for k, v in options.items() if k != "rollout_buffer_kwargs"}
    weights, logged = trained(SequenceRolloutBuffer, config=tiny(family), **options)
    expected, expected_logged = trained(RolloutBuffer, config=tiny(family), **stock_options)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)
    assert logged.keys() == expected_logged.keys()
    for key, value in expected_logged.items():
        assert logged[key] == pytest.approx(value, abs=1e-5), key


def test_d6_normalised_over_the_rollout_as_ppo_over_one_minibatch():
    ours = {"rollout_buffer_kwargs": {"normalize_advantage": True}, "normalize_advantage": False}
    weights, _ = trained(SequenceRolloutBuffer, **ours)
    expected, _ = trained(RolloutBuffer, normalize_advantage=True)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)


# D: advantages


def brute_force(rewards, values, gamma, gae_lambda, last_value):
    """Return the advantages of one segment: sums of (gamma lambda)^k delta, equation 16 of the GAE paper."""
    following = [*values[1:], last_value]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following)]
    return [sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def last_values(model):
    with torch.no_grad():
        return model.policy.predict_values(torch.as_tensor(model._last_obs))[:, 0].numpy()


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.9, 0.8), (1.0, 0.95), (1.0, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("normalize", [False, True])
def test_d1_gae_equals_brute_force(gamma, gae_lambda, normalize):
    model = make_ppo(gamma=gamma, gae_lambda=gae_lambda, rollout_buffer_kwargs={"normalize_advantage": normalize})
    buffer = collect(model, Rewards(random_rewards()))
    last = last_values(model)
    assert {segment.is_finished for segment in buffer.segments} == {True, False}
    expected = []
    for lane, start, end, finished in [(s.lane, s.start, s.end, s.is_finished) for s in buffer.segments]:
        rewards, values = buffer.rewards[start:end, lane], buffer.values[start:end, lane]
        advantages = brute_force(rewards, values, gamma, gae_lambda, 0.0 if finished else last[lane])
        np.testing.assert_allclose(buffer.advantages[start:end, lane], advantages, atol=1e-5)
        expected += list(zip(buffer.log_probs[start:end, lane].tolist(), advantages, advantages + values))
    (minibatch,) = epoch(buffer)
    returns = {log_prob: value for _, _, log_prob, _, value in minibatch}
    used = np.array([advantage for _, _, _, advantage, _ in sorted(minibatch, key=lambda t: t[2])])
    unscaled = np.array([advantage for _, advantage, _ in sorted(expected)])
    for log_prob, _, value in expected:  # before normalisation
        assert returns[log_prob] == pytest.approx(value, abs=1e-5)
    wanted = (unscaled - unscaled.mean()) / unscaled.std(ddof=1) if normalize else unscaled
    np.testing.assert_allclose(used, wanted, atol=1e-5)


def test_d1_without_discount_it_is_what_is_still_to_come():
    buffer = collect(make_ppo(gamma=1.0, gae_lambda=1.0), Rewards(random_rewards()))
    for segment in buffer.segments:
        if segment.is_finished:
            here = (slice(segment.start, segment.end), segment.lane)
            to_come = buffer.rewards[here][::-1].cumsum()[::-1]
            np.testing.assert_allclose(buffer.advantages[here], to_come - buffer.values[here], atol=1e-5)


def test_d2_nothing_leaks_between_episodes_of_a_lane():
    plain, changed = random_rewards(), random_rewards()
    segments = collect(make_ppo()).segments
    segment = next(s for s in segments if s.is_finished and s.start > 0)  # a segment that follows another in its lane
    changed[segment.start : segment.end, segment.lane] += 100
    advantages = [collect(make_ppo(), Rewards(rewards)).advantages for rewards in (plain, changed)]
    differs = advantages[0] != advantages[1]
    assert differs[segment.start : segment.end, segment.lane].all()
    assert differs.sum() == segment.end - segment.start


@pytest.mark.parametrize("length_limit", ["terminate", "truncate"])
def test_d3_d4_truncation_bootstraps_once_and_termination_never(length_limit):
    env = TextEnv(
        ["ab", "cde", "f", "ghij"], CharTokenizer(), reward=count_a, max_new_tokens=3, stop_ids=[0],
        length_limit=length_limit, order="sequential", seed=0,
    )  # fmt: skip
    model = make_ppo(env=env, gamma=0.9, gae_lambda=0.0, n_steps=12)
    buffer = collect(model)
    kinds = set()
    for segment in buffer.segments:
        if not segment.is_finished:
            continue
        last = segment.end - 1, segment.lane
        action = buffer.actions[last]
        cut = length_limit == "truncate" and action != 0
        length = segment.end - segment.start
        earned = float(action == 1) + 0.1 * length
        observation = np.full(env.observation_space.shape, PADDING)
        tokens = [*segment.tokens, action]
        n_prompt = len(tokens) - length
        observation[: len(tokens) + 1] = [*tokens[:n_prompt], SEPARATOR, *tokens[n_prompt:]]
        with torch.no_grad():
            value = float(model.policy.predict_values(torch.as_tensor(observation)[None]))
        expected = earned + (0.9 * value if cut else 0.0) - buffer.values[last]
        assert buffer.advantages[last] == pytest.approx(expected, abs=1e-5)
        kinds.add(cut)
    assert (length_limit == "truncate") in kinds


def test_d6_without_variance_numbers_stay_finite():
    model = make_ppo(gae_lambda=0.0, rollout_buffer_kwargs={"normalize_advantage": True})
    torch.nn.init.zeros_(model.policy.lm.critic.linear.weight)
    (minibatch,) = epoch(collect(model, Rewards(np.ones((12, 4)))))
    np.testing.assert_allclose([advantage for _, _, _, advantage, _ in minibatch], 0.0, atol=1e-5)


def test_d6_one_transition_is_left_as_it_is():
    env = TextEnv(PROMPTS, CharTokenizer(), reward=count_a, max_new_tokens=1)
    space, actions = env.observation_space, env.action_space
    buffer = SequenceRolloutBuffer(1, space, actions, device="cpu", n_envs=1, normalize_advantage=True)
    one = torch.ones(1)
    buffer.add(env.reset(seed=0)[0][None], np.array([[2]]), np.array([3.0]), np.array([1.0]), one, one)
    buffer.compute_returns_and_advantage(one, np.array([True]))
    with pytest.warns(UserWarning, match="1 sequences in 1 minibatches"):
        (samples,) = buffer.get()
    assert samples.advantages.tolist() == [2.0] and samples.returns.tolist() == [3.0]


# Memory


def stored_bytes(value, seen) -> int:
    """Return the bytes of all arrays and tensors in a value, counting shared memory once."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        pointer = value.ctypes.data if isinstance(value, np.ndarray) else value.data_ptr()
        new = pointer not in seen
        seen.add(pointer)
        return value.nbytes if new else 0
    if isinstance(value, dict):
        value = list(value.values())
    return sum(stored_bytes(item, seen) for item in value) if isinstance(value, (list, tuple)) else 0


def test_memory_does_not_depend_on_the_vocabulary():
    """A few numbers per token, at a vocabulary of 151,936 and 256 columns; SB3's buffer would take 2,068 bytes."""
    n_steps, n_envs, vocab_size = 128, 16, 151_936
    space = spaces.Box(SEPARATOR, vocab_size - 1, (256,), np.int64)
    buffer = SequenceRolloutBuffer(n_steps, space, spaces.Discrete(vocab_size), device="cpu", n_envs=n_envs)
    observations = np.full((n_envs, 256), PADDING)
    for step in range(n_steps):
        start = step % 64 == 0
        if start:
            observations[:] = PADDING
            observations[:, :9] = [*[vocab_size - 1] * 8, SEPARATOR]
        ones = torch.ones(n_envs)
        buffer.add(observations.copy(), ones.numpy()[:, None], ones.numpy(), ones.numpy() * start, ones, ones)
        observations[:, 9 + step % 64] = vocab_size - 1
    n_tokens = n_steps * n_envs
    per_token = [(stored_bytes(vars(buffer), set()) - observations.nbytes) / n_tokens]
    buffer.compute_returns_and_advantage(torch.ones(n_envs), np.ones(n_envs, bool))
    for samples in buffer.get(256):
        assert len(samples.observations) == 256 and len(samples.actions) == 256
    per_token.append((stored_bytes(vars(buffer), set()) - observations.nbytes) / n_tokens)
    print(per_token)
    assert per_token[0] <= 64, per_token
    assert per_token[1] <= 68, per_token
