"""`SequenceRolloutBuffer`: episodes that span rollouts, steps before returns, and turns of another speaker."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from agents import KLPenalty, LMPolicy, RolloutStep, SeparateCritic, SequenceRolloutBuffer
from agents.rollout import buffer as buffers
from agents.rollout.transitions import RolloutView
from agents.steps.step import Order
from tests.helpers.models import CheckRatio, collect, count_a, log_ratios, make_ppo, no_reward, tiny
from textenv import CharTokenizer, TextEnv

GAMMA, LAMBDA = 0.9, 0.8


class Step:
    """One sampled token: the tokens read before it, the action, value, log-probability and reward."""

    def __init__(self, read, action, value, log_prob, reward):
        self.read, self.action, self.value, self.log_prob, self.reward = read, action, value, log_prob, reward


class Diary(BaseCallback):
    """Keeps, for each rollout, the finished episodes as they were sampled, and the transitions that are trained."""

    def __init__(self):
        super().__init__()
        self.open = defaultdict(list)
        self.finished: list[list[Step]] = []  # of this rollout
        self.rollouts: list[tuple[list[list[Step]], list[tuple]]] = []

    def _on_rollout_start(self) -> None:
        self.finished = []
        for lane, start in enumerate(self.model._last_episode_starts):
            if start:  # a reset abandons unfinished episodes
                self.open[lane] = []

    def _on_step(self) -> bool:
        names = ("obs_tensor", "actions", "values", "log_probs", "rewards", "dones")
        rows = zip(*(np.asarray(self.locals[name]) for name in names))
        for lane, (observation, action, value, log_prob, reward, done) in enumerate(rows):
            read = tuple(observation[observation >= 0].tolist())
            self.open[lane].append(Step(read, int(action), float(value[0]), float(log_prob), float(reward)))
            if done:
                self.finished.append(self.open.pop(lane))
        return True

    def _on_rollout_end(self) -> None:
        trained = []
        for samples in self.model.rollout_buffer.get():
            batch = samples.observations
            read = [tuple(batch.tokens[row, : col + 1].tolist()) for row, col in zip(batch.rows, batch.cols)]
            tensors = (samples.actions, samples.old_values, samples.old_log_prob, samples.advantages, samples.returns)
            trained += list(zip(read, *(tensor.tolist() for tensor in tensors)))
        self.rollouts.append((self.finished, trained))


def whole_advantages(episode: list[Step]) -> list[float]:
    """Return the generalized advantages of a whole episode, computed term by term."""
    values = [step.value for step in episode] + [0.0]
    deltas = [step.reward + GAMMA * values[t + 1] - values[t] for t, step in enumerate(episode)]
    return [sum((GAMMA * LAMBDA) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def straddling(**kwargs):
    """Return PPO with rollouts of 4 steps and episodes of 1 to 11 tokens; updates clearly change the weights."""
    limits = [11, 3, 2, 9, 1, 4, 10, 3]
    rows = [{"prompt": "abcdefgh"[: n % 5 + 1], "max_new_tokens": n} for n in limits]
    env = TextEnv(rows, CharTokenizer(), reward=count_a, max_new_tokens=11, stop_ids=[])
    options = {"complete_episodes": True, **kwargs.pop("rollout_buffer_kwargs", {})}
    return make_ppo(env=env, n_steps=4, n_envs=6, gamma=GAMMA, gae_lambda=LAMBDA, learning_rate=0.05,
                    rollout_buffer_kwargs=options, **kwargs)  # fmt: skip


def check_trained(finished: list[list[Step]], trained: list[tuple]) -> None:
    """Check that exactly the finished episodes are trained, with values as sampled and advantages over the whole."""
    expected = []
    for episode in finished:
        for step, advantage in zip(episode, whole_advantages(episode)):
            expected.append((step.read, step.action, step.value, step.log_prob, advantage, advantage + step.value))
    assert [row[:2] for row in sorted(trained)] == [row[:2] for row in sorted(expected)]
    for got, wanted in zip(sorted(trained), sorted(expected)):
        np.testing.assert_allclose(got[2:], wanted[2:], atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*fewer than 4 in each")
def test_d1_complete_episodes_over_several_rollouts():
    """Advantages equal the brute force over the whole episode, though its parts were sampled under other weights."""
    model, diary = straddling(), Diary()
    model.learn(12 * 24, callback=diary)
    assert len(diary.rollouts) == 12
    for finished, trained in diary.rollouts:
        check_trained(finished, trained)
    lengths = [len(episode) for finished, _ in diary.rollouts for episode in finished]
    assert max(lengths) == 11  # these need three or four rollouts
    n_sampled = 12 * 24
    n_waiting = sum(len(part.actions) for part in model.rollout_buffer.waiting.values())
    assert sum(lengths) + n_waiting == n_sampled and n_waiting > 0


def test_unfinished_segments_wait_with_old_log_probabilities():
    """The ratio of tokens that waited is not 1, since the weights have changed."""
    model, diary = straddling(), Diary()
    with pytest.warns(UserWarning, match="fewer than 4 in each"):
        model.learn(6 * 24, callback=diary)
    buffer = collect_on(model)
    with torch.no_grad():
        (samples,) = buffer.get()
        now = model.policy.evaluate_actions(samples.observations, samples.actions)[1]
    ratios = (now - samples.old_log_prob).abs()
    assert float(ratios.max()) > 1e-3 and float((ratios < 1e-5).float().mean()) > 0.2
    assert np.abs(log_ratios(model, buffer)).max() < 1e-5  # this rollout's own tokens


def collect_on(model):
    """Collect another rollout from where the last one ended, without training; return the buffer."""
    _, callback = model._setup_learn(24, None, reset_num_timesteps=False)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer


@pytest.mark.filterwarnings("ignore:.*fewer than 4 in each")
def test_episodes_that_a_reset_abandons_are_dropped():
    """A second `learn` resets the env, so waiting segments belong to episodes that will never end."""
    model, diary = straddling(), Diary()
    model.learn(3 * 24, callback=diary)
    assert model.rollout_buffer.waiting
    model.learn(5 * 24, callback=diary)
    assert len(diary.rollouts) == 8
    for finished, trained in diary.rollouts:
        check_trained(finished, trained)


class Stop(BaseCallback):
    """Breaks off `learn` after `n_steps` steps, as an interrupt does."""

    def __init__(self, n_steps):
        super().__init__()
        self.n_steps = n_steps

    def _on_step(self) -> bool:
        return self.n_calls < self.n_steps


@pytest.mark.filterwarnings("ignore:.*fewer than 4 in each")
@pytest.mark.parametrize("n_steps", [9, 10, 11, 12, 32])
def test_a_broken_off_rollout_joins_nothing(n_steps):
    """Segments that wait for lost tokens are not joined with later ones; SB3's `_last_obs` may be out of date."""
    model = straddling()
    model.learn(100 * 24, callback=Stop(n_steps))
    position = model.rollout_buffer.pos
    assert position == (n_steps - 1) % 4 and model.rollout_buffer.waiting
    buffer = collect_on(model)
    assert np.abs(log_ratios(model, buffer)).max() < 1e-5
    (samples,) = buffer.get()
    batch = samples.observations
    assert (batch.cols < batch.lengths[batch.rows]).all()
    if position > 0:
        assert set(samples.old_log_prob.tolist()) <= set(
            buffer.log_probs.flatten().tolist()
        )  # only this rollout's tokens


def test_without_complete_episodes_all_is_trained_at_once():
    model, diary = straddling(rollout_buffer_kwargs={"complete_episodes": False}), Diary()
    model.learn(3 * 24, callback=diary)
    assert [len(trained) for _, trained in diary.rollouts] == [24, 24, 24]
    assert not model.rollout_buffer.waiting


def test_a_rollout_without_a_finished_episode_says_what_to_do():
    env = TextEnv(["ab"], CharTokenizer(), reward=no_reward, max_new_tokens=9, stop_ids=[])
    model = make_ppo(env=env, n_steps=4, rollout_buffer_kwargs={"complete_episodes": True})
    with pytest.raises(ValueError, match=r"got 0: raise batch_size, or n_steps or n_envs \(with complete_episodes"):
        model.learn(16)


# Steps before returns


class Add(RolloutStep):
    """Adds a number to every reward, and notes its name and the rewards' sum before."""

    key = "Add"

    def __init__(self, calls, value=1.0):
        super().__init__()
        self.calls = calls
        self.value = value

    def __call__(self, buffer):
        self.calls.append((type(self).__name__, float(buffer.rewards.sum())))
        buffer.rewards += self.value


class Another(Add):
    key = "Another"


class Foremost(Add):
    key = "Foremost"
    order = Order.SCORES


def test_steps_run_in_order_before_returns():
    order = []
    model = make_ppo(reward=no_reward, gamma=1.0, gae_lambda=1.0)
    buffer = collect(model, Add(order, 1.0), Another(order, 2.0), Foremost(order, 10.0))
    assert order == [("Foremost", 0.0), ("Add", 480.0), ("Another", 528.0)]
    assert (buffer.rewards == 13).all()
    for segment in buffer.segments:
        if segment.is_finished:
            here = slice(segment.start, segment.end), segment.lane
            to_come = 13 * np.arange(segment.end - segment.start, 0, -1)
            np.testing.assert_allclose(buffer.returns[here], to_come, rtol=1e-5)


def test_a_step_attached_again_takes_the_place_of_its_like():
    order = []
    model = make_ppo(reward=no_reward)
    model.learn(48, callback=[Add(order), Another(order)])
    model.learn(48, callback=Add(order, 5.0))  # `Another` stays attached
    assert [name for name, _ in order] == ["Add", "Another", "Another", "Add"]
    assert [step.value for step in model.rollout_buffer.before_returns] == [1.0, 5.0]


def test_a_loaded_model_wants_its_steps_back(tmp_path):
    model = make_ppo(reward=no_reward)
    model.learn(48, callback=[Add([]), Another([])])
    model.save(tmp_path / "agent.zip")
    env = model.get_env()
    loaded = PPO.load(tmp_path / "agent.zip", env=env, device="cpu")
    assert loaded.rollout_buffer.before_returns == []
    with pytest.raises(RuntimeError, match=r"Expected the steps \['Another'\] before returns: .*expected_steps\.clear"):
        loaded.learn(48, callback=Add([]))
    loaded.learn(48, callback=Another([]))
    assert len(loaded.rollout_buffer.before_returns) == 2
    without = PPO.load(tmp_path / "agent.zip", env=env, device="cpu")
    without.rollout_buffer.expected_steps.clear()
    without.learn(48)


def test_a_step_without_a_key_is_refused():
    with pytest.raises(TypeError, match="Expected a class constant `key` in Nameless, got none: set key"):

        class Nameless(RolloutStep):
            def __call__(self, buffer):
                pass

    assert (
        type("Renamed", (Another,), {}).key == "Another"
    )  # a subclass inherits the key, and so resumes from checkpoints of its base


def test_a_step_needs_the_sequence_buffer():
    env = TextEnv(["ab"], CharTokenizer(), reward=no_reward, max_new_tokens=4)
    model = PPO(LMPolicy, env, n_steps=8, batch_size=8, policy_kwargs={"lm": tiny()}, device="cpu")
    with pytest.raises(TypeError, match="Expected rollout_buffer_class=SequenceRolloutBuffer, got RolloutBuffer"):
        model.learn(8, callback=Add([]))


def test_the_sequence_buffer_under_a_lone_env():
    """SB3 wraps the env in a DummyVecEnv."""
    torch.manual_seed(0)
    env = TextEnv(["ab", "c"], CharTokenizer(), reward=count_a, max_new_tokens=4)
    model = PPO(LMPolicy, env, n_steps=24, batch_size=24, rollout_buffer_class=SequenceRolloutBuffer,
                policy_kwargs={"lm": tiny()}, device="cpu", seed=0)  # fmt: skip
    check = CheckRatio()
    model.learn(48, callback=check)
    assert len(check.largest) == 2 and max(check.largest) < 1e-5


# D5: turns of another speaker


class Dialogue(TextEnv):
    """After each turn of the policy another speaker says "xyz"; the policy earns a point per token."""

    def get_reward(self, prompt, preds, done):
        return 1.0 + (10.0 if done else 0.0)

    def respond(self, prompt, preds):
        return "xyz"


def dialogue(**kwargs):
    env = Dialogue(["ab", "c"], CharTokenizer("abcdefghxyz"), max_new_tokens=8, max_turns=3, max_response_tokens=3,
                   stop_ids=[0, 1, 2])  # fmt: skip
    return make_ppo(env=env, n_steps=20, n_envs=4, **kwargs)


REPLY = (9, 10, 11)  # x, y, z


def test_d5_inserted_tokens_are_read_and_never_trained():
    model, diary = dialogue(gamma=GAMMA, gae_lambda=LAMBDA), Diary()
    buffer = collect(model, diary)
    ((finished, trained),) = diary.rollouts
    assert len(trained) == 80  # the policy's tokens alone
    sampled = [step for episode in finished + list(diary.open.values()) for step in episode]
    assert sorted((s.read, s.action) for s in sampled) == sorted(row[:2] for row in trained)
    assert np.abs(log_ratios(model, buffer)).max() < 1e-5
    behind_a_reply = [read for read, *_ in trained if read[-3:] == REPLY]
    assert len(behind_a_reply) > 5
    jumps = [np.diff(buffer.cols[s.start : s.end, s.lane]).tolist() for s in buffer.segments]
    assert {1, 4} == {jump for segment in jumps for jump in segment}


def test_d5_inserted_tokens_cost_no_decay():
    """Advantages decay over the policy's tokens only, and a turn's last reward belongs to the token that ended it."""
    diary = Diary()
    collect(dialogue(gamma=GAMMA, gae_lambda=LAMBDA, rollout_buffer_kwargs={"complete_episodes": True}), diary)
    ((finished, trained),) = diary.rollouts
    assert len(finished) > 3
    for episode in finished:
        assert [step.reward for step in episode] == [1.0] * (len(episode) - 1) + [11.0]
    check_trained(finished, trained)


def test_d5_cached_decoding_goes_on_behind_a_reply():
    """A dialogue is the same with and without the cache."""
    fast, slow = (collect(dialogue(policy_kwargs={"cache": cache})) for cache in (True, False))
    np.testing.assert_array_equal(fast.actions, slow.actions)
    np.testing.assert_allclose(fast.log_probs, slow.log_probs, atol=1e-5)
    np.testing.assert_allclose(fast.values, slow.values, atol=1e-5)


# The rollout as whole sequences, for the steps before returns


class Viewer(RolloutStep):
    """Keeps the views that it gets."""

    key = "Viewer"

    def __init__(self):
        super().__init__()
        self.views = []

    def __call__(self, buffer):
        self.views.append(buffer.view())


@pytest.mark.filterwarnings("ignore:.*fewer than 4 in each")
def test_all_steps_of_a_rollout_get_one_view(monkeypatch):
    """A critic of its own, the penalty and another step: one view a rollout, which is gone in the update."""
    built = []
    monkeypatch.setattr(buffers, "RolloutView", lambda *parts: built.append(parts) or RolloutView(*parts))
    viewer = Viewer()
    model = make_ppo(policy_kwargs={"critic": SeparateCritic(tiny(n_layer=1))}, n_epochs=2, learning_rate=0.1)
    held = []
    model.policy.optimizer.register_step_pre_hook(lambda *_: held.append(model.rollout_buffer._view))
    model.learn(3 * 48, callback=[KLPenalty(0.1), viewer])
    assert len(built) == len(viewer.views) == 3
    assert len({id(view) for view in viewer.views}) == 3
    assert held == [None] * 6
    last, buffer = viewer.views[-1], model.rollout_buffer
    again = buffer.view()
    assert again is not last and again is buffer.view()
    assert torch.equal(again.batch.tokens, last.batch.tokens) and torch.equal(again.actions, last.actions)
