"""The prefix cache and its slow twin, a full forward: every model family, and rows that change at random (A7 to A9)."""

import copy
import itertools

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents.models import prefix_cache as cache
from agents.models.backbone import Backbone
from agents.models.observations import unpack_observations
from tests.helpers.models import CACHED, N_TOKENS, NON_LINEAR, CheckRatio, collect, make_policy, make_ppo, observe, tiny

TOLERANCE = 1e-5  # on log-probabilities and values, float32

Row = tuple[list[int], list[int]]


def tokens(rng, n):
    return rng.integers(N_TOKENS, size=n).tolist()


def grown(rows: list[Row], rng) -> list[Row]:
    """Add a token to every row; an idle row stays idle."""
    return [(prompt, [*since, *tokens(rng, 1)]) if prompt else ([], []) for prompt, since in rows]


def scripted(*changes: dict[int, int] | int, lengths=(1, 3, 9, 5), seed=0) -> list[torch.Tensor]:
    """Return observations per step: an int adds that many tokens to each row, {row: length} new prompts (0: idle)."""
    rng = np.random.default_rng(seed)
    rows = [(tokens(rng, n), []) for n in lengths]
    steps = [observe(rows)]
    for change in changes:
        if isinstance(change, int):
            for _ in range(change):
                rows = grown(rows, rng)
                steps.append(observe(rows))
        else:
            rows = grown(rows, rng)
            for row, length in change.items():
                rows[row] = (tokens(rng, length), [])
            steps.append(observe(rows))
    return steps


def at_random(n_steps: int, seed: int) -> list[torch.Tensor]:
    """Return observations of rows that grow, end, idle and begin at random."""
    rng = np.random.default_rng(seed)
    changes: list[dict[int, int] | int] = []
    for _ in range(n_steps):
        new = {row: int(rng.integers(1, 20)) for row in range(4) if rng.random() < 0.15}
        new |= {row: 0 for row in range(4) if rng.random() < 0.03}
        changes.append(new)
    return scripted(*changes, seed=seed)


EVERYTHING = scripted(6, {1: 2}, 2, {0: 7, 3: 1}, 3, {2: 25}, 2, {2: 0}, 2, {2: 4}, 2, {0: 3, 1: 3, 2: 5, 3: 1}, 3)

SCRIPTS = {
    "ragged prompts": scripted(8),
    "single lanes reset": scripted(3, {0: 4}, 1, {2: 1}, {1: 6}, 2),
    "all lanes reset at once": scripted(3, {0: 2, 1: 4, 2: 1, 3: 8}, 4),
    "a prompt longer than the window": scripted(2, {1: 30}, 3, {0: 40}, 3),
    "the longest row ends": scripted(3, {0: 3}, 3, lengths=(50, 2, 4, 1)),
    "an idle lane": scripted(2, {1: 0}, 3, {1: 4}, 3, lengths=(3, 5, 0, 2)),
    "one row": scripted(3, {0: 5}, 3, lengths=(3,)),
    "one token each": scripted(3, {0: 1, 1: 1}, 3, lengths=(1, 1)),
    "a long run": scripted(*[20, {0: 2}, {1: 3}, 10, {2: 1}, {3: 3}, 12, {0: 9, 2: 1}, 10]),
}


def full_forward(policy, observations):
    """Return log-probabilities (B, V) and values (B,) of a full forward, padded on the right and unmasked."""
    ids, lengths = unpack_observations(observations)
    lengths = lengths.clamp(min=1)
    with torch.no_grad():
        hidden, logits = policy.lm.backbone(ids[:, : int(lengths.max())], torch.arange(len(ids)), lengths - 1)
        return logits.log_softmax(-1), policy.lm.critic(hidden)


def decode(policy, observations):
    """Return log-probabilities (B, V) and values (B,) by the rollout's cache."""
    with torch.no_grad():
        hidden, logits = policy.lm.rollout_cache.read(*unpack_observations(observations))
        return logits.log_softmax(-1), policy.lm.critic(hidden)


def worst(policy, steps) -> float:
    """Return the largest difference between the cache and a full forward, which a wrong cache must show (A7)."""
    largest = 0.0
    for observations in steps:
        for decoded, expected in zip(decode(policy, observations), full_forward(policy, observations)):
            assert not decoded.isnan().any()
            largest = max(largest, float((decoded - expected).abs().max()))
    return largest


@pytest.fixture
def reads(monkeypatch):
    """Count the rows that each call of `prefill` reads anew; steps without such rows are not listed."""
    counts: list[int] = []
    prefill = Backbone.prefill

    def counted(self, ids, *args):
        counts.append(len(ids))
        return prefill(self, ids, *args)

    monkeypatch.setattr(Backbone, "prefill", counted)
    return counts


# A7: decoding equals a full forward


@pytest.mark.parametrize("family", CACHED)
def test_a7_cached_equals_full_forward(family):
    policy = make_policy(tiny(family))
    assert policy.lm.use_cache
    assert policy.lm.backbone.head_is_linear is (family not in NON_LINEAR)
    assert worst(policy, EVERYTHING) < TOLERANCE


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_a7_script(family, script):
    assert worst(make_policy(tiny(family)), SCRIPTS[script]) < TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_a7_attention(family, attention):
    policy = make_policy(tiny(family, attn_implementation=attention))
    assert policy.lm.backbone.model.config._attn_implementation == attention
    assert worst(policy, EVERYTHING) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_a7_at_random(family, monkeypatch):
    """Over many steps, the buffers grow in place, and columns on the left are dropped."""
    monkeypatch.setattr(cache, "GROWTH", 2)
    monkeypatch.setattr(cache, "COMPACT_FROM", 3)
    assert worst(make_policy(tiny(family)), at_random(40, seed=1)) < TOLERANCE


def test_a7_columns_stay_few_over_a_long_run():
    """If rows end in turn, the cache is never empty, and must drop columns that no row needs any more."""
    changes = [{step % 4: 3} if step % 5 == 0 else {} for step in range(120)]
    policy = make_policy(tiny("llama"))
    assert worst(policy, scripted(*changes, lengths=(2, 2, 2, 2))) < TOLERANCE
    assert policy.lm.rollout_cache.columns < 40


def test_a7_only_new_rows_are_read_anew(reads, monkeypatch):
    """Rows that grow by a token cost no prefill."""
    policy = make_policy()
    reads.clear()
    worst(policy, scripted(4, {1: 2}, 3))
    assert reads == [3]  # not the prompt of one token, nor the later row, which is read in the others' forward
    monkeypatch.setattr(cache, "NEW_TOKENS", 0)
    policy.lm.drop_caches()  # the prompts, too
    worst(policy, scripted(4, {1: 2}, 3))
    assert reads == [3, 3, 1]


def test_a7_repeated_shorter_and_other_observations(reads):
    policy = make_policy()
    steps = scripted(5)
    again = [steps[0], steps[0], steps[3], steps[2], steps[2], steps[5], steps[4][:2], steps[5][:2], steps[5]]
    assert worst(policy, again) < TOLERANCE


def test_a7_same_length_another_token_inside():
    """A row is recognised by its tokens, not by its length."""
    first, second = scripted(1)
    changed = second.clone()
    changed[2, 4] = (changed[2, 4] + 1) % N_TOKENS
    assert worst(make_policy(), [first, changed]) < TOLERANCE


def test_a7_padding_that_sees_nothing_gives_no_nan():
    """A fully masked left padding is read by the model, and must not reach a real token."""
    for attention in ("eager", "sdpa"):
        for family in ("gpt2", "llama", "mistral", "opt"):
            policy = make_policy(tiny(family, attn_implementation=attention))
            rows = observe([([1], [2]), ([3] * 30, [4, 5])])
            for decoded in decode(policy, rows):
                assert decoded.isfinite().all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a7_no_cache_is_the_same(family):
    """cache=False, the slow twin, samples the same tokens with the same numbers."""
    fast, slow = make_policy(tiny(family)), make_policy(tiny(family), cache=False)
    for observations in EVERYTHING:
        with torch.no_grad():
            torch.testing.assert_close(fast(observations), slow(observations), atol=TOLERANCE, rtol=0)
    assert slow.lm.rollout_cache.ids is None and fast.lm.rollout_cache.ids is not None


def test_a7_with_gradients_it_is_not_used():
    """A user's loop may take several differentiable steps before one backward."""
    policy = make_policy()
    log_probs = [policy(observations)[2].sum() for observations in scripted(3)]
    sum(log_probs).backward()
    assert policy.lm.rollout_cache.ids is None


# A cache made wrong on purpose fails the check


def test_a7_negative_control_positions(monkeypatch):
    policy = make_policy(tiny("gpt2"))
    forward = Backbone.forward

    def shifted(self, ids, rows, cols, attention_mask=None, position_ids=None, cache=None):
        position_ids = position_ids if position_ids is None else position_ids + 1
        return forward(self, ids, rows, cols, attention_mask, position_ids, cache)

    monkeypatch.setattr(Backbone, "forward", shifted)
    assert worst(policy, SCRIPTS["ragged prompts"]) > 0.1


def test_a1_negative_control_a_lane_that_is_not_read_anew(monkeypatch):
    """A cache that trusts the length: a new prompt as long as the old row would be keeps the old keys (A1)."""

    def trusting(self, ids, lengths):
        if self.lengths is None:
            return torch.full_like(lengths, -1)
        return torch.where(lengths <= self.lengths + 1, 1, -1)

    model = make_ppo(tiny("llama"))
    assert largest_ratio(model) < TOLERANCE
    monkeypatch.setattr(cache.PrefixCache, "growth", trusting)
    assert largest_ratio(make_ppo(tiny("llama"))) > 0.1


def largest_ratio(model) -> float:
    check = CheckRatio()
    collect(model, check)
    return check.largest[0]


# A8: new weights


class CheckSteps(BaseCallback):
    """A callback that compares every step of the policy with a full forward of the current weights."""

    def __init__(self):
        super().__init__()
        self.differences = []
        self.decoded = 0

    def _on_step(self) -> bool:
        observations, actions = self.locals["obs_tensor"], torch.as_tensor(self.locals["actions"])
        log_probs, values = full_forward(self.model.policy, observations)
        expected = log_probs.gather(1, actions[:, None])[:, 0]
        self.differences.append(float((expected - self.locals["log_probs"]).abs().max()))
        self.differences.append(float((values - self.locals["values"][:, 0]).abs().max()))
        return True


def learn_and_check(**kwargs) -> float:
    """Train with episodes of 7 tokens and rollouts of 4 steps, so that episodes straddle updates."""
    model = make_ppo(tiny("llama"), n_steps=4, max_new_tokens=7, learning_rate=0.3, **kwargs)
    before = copy.deepcopy(model.policy.state_dict())
    check = CheckSteps()
    model.learn(4 * 4 * 6, callback=check)
    moved = max(float((model.policy.state_dict()[name] - weight).abs().max()) for name, weight in before.items())
    assert moved > 0.01 and len(check.differences) == 2 * 24
    return max(check.differences)


def test_a8_training_drops_the_cache():
    assert learn_and_check() < TOLERANCE


def test_a8_negative_control(monkeypatch):
    """A cache that keeps the old weights' keys and values fails the same check."""
    monkeypatch.setattr("agents.policies.actor_critic.LMActorCritic.drop_caches", lambda self: None)
    monkeypatch.setattr("agents.models.interface.version_of", lambda weights: 0)
    # Otherwise the value of a rollout's last observation advances the cache, and the next rollout reads all rows anew.
    monkeypatch.setattr(cache.PrefixCache, "has_rows_of", lambda self, ids, lengths: False)
    assert learn_and_check() > 1e-3


def step_on(policy, loss):
    policy.optimizer.zero_grad()
    loss.backward()
    policy.optimizer.step()


def evaluate_then_step(policy, observations):
    values, log_probs, _ = policy.evaluate_actions(observations, torch.ones(len(observations)))
    step_on(policy, values.sum() + log_probs.sum())


def step_after_a_read(policy, observations):
    values, log_probs, _ = policy.evaluate_actions(observations, torch.ones(len(observations)))
    decode(policy, observations)
    step_on(policy, log_probs.sum())


def distribution_then_step(policy, observations):
    step_on(policy, policy.get_distribution(observations).entropy().sum())


def load_weights(policy, observations):
    policy.load_state_dict({name: weight * 1.1 for name, weight in policy.state_dict().items()})


def move(policy, observations):
    policy.to(torch.float64).to(torch.float32)
    assert policy.lm.rollout_cache.ids is None


@pytest.mark.parametrize(
    "change",
    [evaluate_then_step, step_after_a_read, distribution_then_step, load_weights, move],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("fused", [False, True])
def test_a8_whatever_changes_the_weights(change, fused):
    """A user's loop may not call `set_training_mode`; a fused step does not raise the weights' versions in torch."""
    policy = make_policy(optimizer_class=torch.optim.SGD, optimizer_kwargs={"fused": fused})
    policy.optimizer.param_groups[0]["lr"] = 0.1
    steps = scripted(3)
    assert worst(policy, steps[:2]) < TOLERANCE
    old = full_forward(policy, steps[2])[0]
    change(policy, steps[1])
    if change is not move:
        assert float((full_forward(policy, steps[2])[0] - old).abs().max()) > 1e-2
    assert worst(policy, steps[2:]) < TOLERANCE


# A9: other calls in between


class PredictBetween(BaseCallback):
    """A callback that calls `predict` in every step, on other rows and on the rollout's rows."""

    def __init__(self, n_rows):
        super().__init__()
        self.n_rows = n_rows

    def _on_step(self) -> bool:
        rng = np.random.default_rng(self.num_timesteps)
        others = observe(
            [(tokens(rng, 3), tokens(rng, 2)) for _ in range(self.n_rows)], self.locals["new_obs"].shape[1]
        )
        self.model.predict(others.numpy())
        self.model.predict(self.locals["new_obs"])
        self.model.predict(self.locals["new_obs"][0], deterministic=True)
        return True


@pytest.mark.parametrize("n_rows", [4, 1, 6])
def test_a9_predict_in_between_changes_nothing(n_rows):
    """Predictions in between leave the rollout equal bit for bit (E12)."""
    alone = collect(make_ppo())
    disturbed = collect(make_ppo(), PredictBetween(n_rows))
    for name in ("actions", "log_probs", "values", "advantages"):
        np.testing.assert_array_equal(getattr(disturbed, name), getattr(alone, name))


def test_a9_predict_is_right_in_between():
    policy = make_policy()
    steps = scripted(3, {0: 2}, 2)
    others = scripted(8, lengths=(2, 2, 6, 1), seed=3)
    for observations, other in zip(steps, others):
        with torch.no_grad():
            policy(observations)
        expected = full_forward(policy, other)[0].argmax(1)
        np.testing.assert_array_equal(policy.predict(other.numpy(), deterministic=True)[0], expected)


def test_a9_values_in_between():
    """Values of terminal observations leave the rollout's rows alone; values of the last ones decode from them."""
    policy = make_policy()
    steps = scripted(4)
    for before, after in itertools.pairwise(steps):
        decode(policy, before)
        with torch.no_grad():
            for rows in (after[1:3], scripted(1, seed=4)[0], after):
                expected = full_forward(policy, rows)[1]
                torch.testing.assert_close(policy.predict_values(rows)[:, 0], expected, atol=TOLERANCE, rtol=0)
