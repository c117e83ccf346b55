"""Advantages by hand: two lambdas, a lambda by length, REINFORCE++ and functions of one's own."""

import re

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.utils import explained_variance

from agents import KLPenalty, SampleGroups, SequenceRolloutBuffer, TextVecEnv, make_agent
from agents.configuration.config import Named
from agents.errors import CommandError
from agents.rollout.advantages import episode_advantages
from agents.rollout.estimation import Estimation
from agents.rollout.transitions import Transitions
from agents.runs.advantage_names import make_advantage
from tests.helpers.advantage_jobs import above_the_group
from tests.helpers.command import ROOT
from tests.helpers.models import collect, count_a, make_ppo
from tests.helpers.training import Trained, tiny_agent, tiny_config, tiny_env
from textenv import CharTokenizer, TextEnv
from textenv.checks.trust import Trust

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")


def part_of(rewards, values=None, penalties=None):
    """Return the transitions of an episode with given numbers."""
    rewards = np.array(rewards, dtype=np.float32)
    zeros, whole = np.zeros_like(rewards), np.zeros(len(rewards), dtype=np.int32)
    values, penalties = (zeros if given is None else np.array(given, dtype=np.float32) for given in (values, penalties))
    return Transitions(whole, whole, rewards, penalties, values, zeros, zeros.copy(), zeros.copy(), whole, zeros, zeros)


def straddling(**options):
    """Return PPO whose rollouts of 4 steps cut most of its episodes of 1 to 11 tokens."""
    rows = [{"prompt": "abcdefgh"[: n % 5 + 1], "max_new_tokens": n} for n in (11, 3, 2, 9, 1, 4, 10, 3)]
    env = TextEnv(rows, CharTokenizer(), reward=count_a, max_new_tokens=11, stop_ids=[])
    return make_ppo(env=env, n_steps=4, n_envs=6, gamma=0.9, gae_lambda=0.8, learning_rate=0.05,
                    rollout_buffer_kwargs=options)  # fmt: skip


# Two lambdas


def test_each_lambda_has_its_estimate_by_hand():
    """With rewards 0, 1 and values 1/2, 1/4: the errors are -1/4 and 3/4."""
    part = part_of([0.0, 1.0], [0.5, 0.25])
    Estimation(1.0, 0.5, 1.0).carry(part)
    assert part.advantages.tolist() == [-0.25 + 0.5 * 0.75, 0.75]
    assert part.returns.tolist() == [1.0, 1.0], "with a lambda of 1 what the episode still earns"
    Estimation(1.0, 0.5, 0.0).carry(part)
    assert part.returns.tolist() == [0.25, 1.0], "with a lambda of 0 the next value"
    # An advantage of 1, a value of 2 and a return of 4 follow: the errors are -1/4 and 11/4.
    Estimation(1.0, 0.5, 1.0).carry(part, 1.0, 2.0, 4.0)
    assert part.advantages.tolist() == [-0.25 + 0.5 * 3.25, 2.75 + 0.5 * 1.0]
    assert part.returns.tolist() == [5.0, 5.0]


def test_d1_equal_lambdas_are_sb3s_estimate_bit_for_bit(monkeypatch):
    given, compute = [], SequenceRolloutBuffer.compute_returns_and_advantage

    def keep(self, last_values, dones):
        given.append((last_values, dones))
        compute(self, last_values, dones)

    monkeypatch.setattr(SequenceRolloutBuffer, "compute_returns_and_advantage", keep)
    for critic_lambda in (None, 0.8):
        model = straddling(critic_lambda=critic_lambda)
        buffer = collect(model)
        stock = RolloutBuffer(4, model.observation_space, model.action_space, "cpu", 0.8, 0.9, 6)
        for name in ("rewards", "values", "episode_starts"):
            setattr(stock, name, getattr(buffer, name))
        stock.compute_returns_and_advantage(*given.pop())
        for name in ("advantages", "returns"):
            np.testing.assert_array_equal(getattr(buffer, name), getattr(stock, name))
        assert any(not segment.is_finished for segment in buffer.segments)


def test_the_returns_are_by_the_critics_lambda_and_the_advantages_as_without_it():
    """Each by a buffer that has that lambda alone; so is what SB3 logs, over segments that rollouts cut as well."""
    both = collect(make_ppo(gamma=0.9, gae_lambda=0.5, rollout_buffer_kwargs={"critic_lambda": 1.0}))
    policy, critic = (collect(make_ppo(gamma=0.9, gae_lambda=number)) for number in (0.5, 1.0))
    np.testing.assert_array_equal(both.advantages, policy.advantages)
    np.testing.assert_array_equal(both.returns, critic.returns)
    assert np.abs(critic.returns - policy.returns).max() > 0.1
    assert both.gae_lambda == 0.5, "as the algorithm has it"


def test_sb3_logs_the_explained_variance_of_the_critics_targets():
    model = tiny_agent(rollout_buffer_kwargs={"critic_lambda": 1.0}, gae_lambda=0.0)
    model.learn(3 * 16, log_interval=None)
    buffer = model.rollout_buffer
    logged = model.logger.name_to_value["train/explained_variance"]
    assert logged == pytest.approx(explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
    finished = [segment for segment in buffer.segments if segment.is_finished]
    for segment in finished:
        here = (slice(segment.start, segment.end), segment.lane)
        np.testing.assert_allclose(buffer.returns[here], buffer.rewards[here].sum(), atol=1e-5)


def test_value_norm_is_of_the_critics_targets():
    options = {"policy_kwargs": {"value_norm": "norm"}, "gae_lambda": 0.0}
    model = tiny_agent(rollout_buffer_kwargs={"critic_lambda": 1.0}, **options)
    buffer = collect(model)
    norm = model.policy.lm.value_norm
    assert float(norm.mean) == pytest.approx(np.concatenate([part.returns for part in buffer.trained]).mean(), abs=1e-6)


# A lambda by length


def test_a_lambda_by_length_by_hand():
    """1 - 1 / (0.5 n): 0 for 1 and 2 tokens, 1/2 for 4, 3/4 for 8."""
    estimation = Estimation(1.0, 0.95, 1.0, 0.5)
    assert [estimation.policy_lambda(n) for n in (1, 2, 4, 8)] == [0.0, 0.0, 0.5, 0.75]
    assert Estimation(1.0, 0.95, 1.0).policy_lambda(8) == 0.95
    part = part_of([0.0, 0.0, 0.0, 1.0])
    estimation.carry(part)
    estimation.adapt(part)
    assert part.advantages.tolist() == [0.125, 0.25, 0.5, 1.0]
    assert part.returns.tolist() == [1.0] * 4


def test_a_lambda_by_length_waits_for_the_end_of_episodes():
    model = straddling(lambda_alpha=0.5)
    assert model.rollout_buffer.complete_episodes
    trained = Trained()
    model.learn(6 * 24, callback=trained)
    assert len({len(rows) for rows in trained.rollouts}) > 1


# REINFORCE++


def test_reinforce_plus_plus_by_hand():
    """The score minus the penalties to come (Hu et al., 2025), and discounted rewards of tokens."""
    parts = [part_of([0.0, 0.0, 3.0], penalties=[0.1, 0.2, 0.4]), part_of([1.0, 2.0])]
    first, second = episode_advantages(parts, None, "reinforce++", 1.0)
    np.testing.assert_allclose(first, [3 - 0.7, 3 - 0.6, 3 - 0.4], atol=1e-6)
    np.testing.assert_allclose(second, [3.0, 2.0])
    np.testing.assert_allclose(episode_advantages(parts, None, "reinforce++", 0.5)[1], [2.0, 2.0])


def test_its_baseline_form_is_grpo_mean_before_the_batch_is_normalised():
    parts = [part_of([0.0, 4.0], penalties=[0.5, 0.0]), part_of([1.0]), part_of([7.0])]
    groups = np.array([3, 3, 5])
    for ours, theirs in zip(
        *(episode_advantages(parts, groups, f"{n}", 1.0) for n in ("reinforce++_baseline", "grpo_mean"))
    ):
        np.testing.assert_array_equal(ours, theirs)
    first, second, alone = episode_advantages(parts, groups, "reinforce++_baseline", 1.0)
    np.testing.assert_allclose(first, [1.5 - 0.25, 1.5])
    np.testing.assert_allclose(second, [-1.5 + 0.25])
    assert alone.tolist() == [0.0]


@pytest.mark.parametrize(("advantage", "n"), [("reinforce++", 1), ("reinforce++_baseline", 2)])
def test_they_are_normalised_over_the_tokens_of_the_rollout(advantage, n):
    model = tiny_agent(tiny_env(samples_per_prompt=n), 8, vf_coef=0.0, rollout_buffer_kwargs={"advantage": advantage})
    buffer = model.rollout_buffer
    assert buffer.normalize_advantage and buffer.complete_episodes
    trained = Trained()
    model.learn(32, callback=trained)
    used = np.array([row[1] for row in trained.rollouts[0]])
    assert used.mean() == pytest.approx(0, abs=1e-6) and used.std(ddof=1) == pytest.approx(1, abs=1e-5)
    before = np.concatenate([part.advantages for part in buffer.trained])
    assert before.std() < 0.5, "the control: not before"


# A function of one's own


def test_a_function_that_compares_groups_is_grpo_mean():
    """With the KL penalty, which is charged after either."""
    rollouts = []
    for advantage in (above_the_group, "grpo_mean"):
        model = tiny_agent(
            tiny_env(samples_per_prompt=2), 8, vf_coef=0.0, rollout_buffer_kwargs={"advantage": advantage}
        )
        trained = Trained()
        model.learn(64, callback=[KLPenalty(0.5, reference=tiny_config(initializer_range=0.5)), trained])
        rollouts.append(np.array([row for rows in trained.rollouts for row in rows]))
    np.testing.assert_allclose(rollouts[0], rollouts[1], atol=1e-6)
    assert np.abs(rollouts[0][:, 1]).max() > 0.01


def test_a_function_gets_episodes_and_its_numbers_are_used():
    seen = []

    def by_token(episodes):
        seen.extend(episodes)
        return [np.arange(len(episode.actions)) + episode.group for episode in episodes]

    model = tiny_agent(rollout_buffer_kwargs={"advantage": by_token})
    buffer = collect(model, KLPenalty(0.5, reference=tiny_config(initializer_range=0.5)))
    for number, (episode, part) in enumerate(zip(seen, buffer.trained, strict=True)):
        assert episode.group == number and part.advantages.tolist() == [number + t for t in range(len(part.actions))]
        np.testing.assert_array_equal(episode.penalties, part.penalties)
        assert episode.score == pytest.approx(float(part.task_rewards.sum()))
    assert any(episode.penalties.any() for episode in seen), "the function would have to subtract them"


def test_numbers_of_episodes_are_charged_what_is_still_to_come():
    charged = episode_advantages([part_of([0.0, 1.0], penalties=[0.25, 0.5])], None, lambda episodes: [2.0], 1.0)
    np.testing.assert_allclose(charged[0], [2 - 0.75, 2 - 0.5])


def test_the_function_of_the_page_trains():
    (block,) = re.findall(r"```python\n(import numpy as np\n.*?)```", (ROOT / "docs/losses.md").read_text(), re.DOTALL)
    names = {}
    exec(block.partition("model =")[0], names)
    parts = [part_of([0.0, 2.0]), part_of([1.0]), part_of([0.0])]
    used = episode_advantages(parts, np.array([0, 0, 1]), names["best_of_group"], 1.0)
    np.testing.assert_allclose(np.concatenate(used), [1.0, 1.0, -0.1, 1.0], rtol=1e-6)
    env = tiny_env(samples_per_prompt=2)
    tiny_agent(env, 8, vf_coef=0.0, rollout_buffer_kwargs={"advantage": names["best_of_group"]}).learn(32)


def test_a_model_with_a_function_is_saved_and_loaded(tmp_path):
    model = tiny_agent(rollout_buffer_kwargs={"advantage": above_the_group})
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=TextVecEnv(tiny_env(), 4), device="cpu")
    assert loaded.rollout_buffer.advantage(()) == [] and loaded.rollout_buffer.complete_episodes
    loaded.learn(16)


def test_what_a_function_gets_cannot_be_written():
    """The arrays are the buffer's own, which trains on them."""

    def spoil(episodes):
        episodes[0].rewards[:] = 0
        return [0.0] * len(episodes)

    with pytest.raises(ValueError, match="read-only"):
        episode_advantages([part_of([1.0])], None, spoil, 1.0)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (
            lambda _: [0.0],
            r"Expected `advantage` .* each of 2 episodes.*\[\(2,\), \(1,\)\], got 1 of shapes .*: return a",
        ),
        (
            lambda _: [np.zeros(7)] * 2,
            r"of the shapes \[\(2,\), \(1,\)\], got 2 of shapes \[\(7,\), \(7,\)\]: return a list",
        ),
        (lambda _: [np.zeros((2, 1)), 0.0], r"got 2 of shapes \[\(2, 1\), \(\)\]"),
        (lambda _: None, r"got NoneType \('NoneType' object is not iterable\): return a list"),
        (lambda _: 1.0, r"got float \('float' object is not iterable\): return a list"),
        (lambda _: [None, "b"], r"got list \(.*\): return a list"),
        (lambda _: [0.0, np.nan], "finite numbers, got nan for an episode of 1 tokens and the score 1: check for div"),
        (lambda _: [np.array([0.0, np.inf]), 0.0], "finite numbers, got inf for an episode of 2 tokens"),
        (lambda _: [0.0, -1e39], r"finite numbers, got -1e\+39 for"),  # which float32 does not hold
    ],
)
def test_answers_that_do_not_fit_are_refused(answer, error):
    with pytest.raises(ValueError, match=error):
        episode_advantages([part_of([0.0, 1.0]), part_of([1.0])], None, answer, 1.0)


# Refusals


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"advantage": "reinforce"},
            r"`advantage` to be one of \['gae', .*'reinforce\+\+_baseline'\] or a function, got",
        ),
        ({"critic_lambda": 1.5}, "Expected `critic_lambda` from 0 to 1, or None for gae_lambda, got 1.5"),
        ({"lambda_alpha": 0.0}, "Expected `lambda_alpha` to be positive, or None for gae_lambda, got 0.0"),
        ({"advantage": "reinforce++", "critic_lambda": 1.0}, "critic_lambda=None with advantage='reinforce.*no critic"),
        ({"advantage": above_the_group, "lambda_alpha": 0.1}, "lambda_alpha=None with .*only 'gae' has a lambda"),
        ({"advantage": "rloo", "normalize_advantage": True}, "normalize_advantage=False with advantage='rloo', got"),
        ({"advantage": "reinforce++_baseline"}, "samples_per_prompt of 2 or more in the env, got 1"),
    ],
)
def test_settings_that_do_not_combine_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        tiny_agent(rollout_buffer_kwargs=options)


@pytest.mark.parametrize("advantage", ["reinforce++", above_the_group])
def test_truncated_episodes_need_a_critic(advantage):
    env = tiny_env(length_limit="truncate")
    with pytest.raises(ValueError, match=r"length_limit='terminate' with advantage=.*, got 'truncate', which adds"):
        make_agent(env, tiny_config(), 4, device="cpu", rollout_buffer_kwargs={"advantage": advantage})


@pytest.mark.parametrize("advantage", ["reinforce++", above_the_group])
def test_an_env_that_truncates_is_refused_also_when_it_comes_later(advantage):
    """By `set_env`; a critic's advantages have the value of truncated episodes, and may have both lambdas."""
    model = tiny_agent(rollout_buffer_kwargs={"advantage": advantage}).learn(16)
    before = model.get_env()
    model.set_env(TextVecEnv(tiny_env(length_limit="truncate"), 4))
    with pytest.raises(ValueError, match=r"length_limit='terminate' with advantage=.*, got 'truncate', which adds"):
        model.learn(16)
    model.set_env(before)
    model.learn(16)
    critic = tiny_agent(rollout_buffer_kwargs={"critic_lambda": 1.0, "lambda_alpha": 0.5}).learn(16)
    critic.set_env(TextVecEnv(tiny_env(length_limit="truncate"), 4))
    critic.learn(16)


def test_a_function_of_ones_own_in_dynamic_sampling_and_reinforce_plus_plus_without():
    """A function sees the groups that are trained: none with equal scores."""
    seen = []

    def keep(episodes):
        seen.append({(episode.group, episode.score) for episode in episodes})
        return above_the_group(episodes)

    def odd(prompt, preds, done):
        return float(done and prompt in ("ab", "cde") and sum(preds.ids) % 2)

    env = tiny_env(odd, samples_per_prompt=2, stop_ids=())
    model = tiny_agent(env, 8, vf_coef=0.0, rollout_buffer_kwargs={"advantage": keep})
    model.learn(8 * 32, callback=SampleGroups(min_groups=3))
    assert seen and all(len(scores) == 2 * len({group for group, _ in scores}) >= 6 for scores in seen)
    with pytest.raises(ValueError, match=r"Expected an advantage within groups with min_groups, .*got 'reinforce\+\+'"):
        SampleGroups(3).attach(tiny_agent(env, 8, rollout_buffer_kwargs={"advantage": "reinforce++"}))


# In a configuration


class Above:
    """The score of each episode above a constant."""

    def __init__(self, constant=0.5):
        self.constant = constant

    def __call__(self, episodes):
        return [episode.score - self.constant for episode in episodes]


def test_a_configuration_names_an_advantage_or_a_class():
    trust = Trust(modules=("tests",))
    assert make_advantage("reinforce++_baseline", Trust()) == "reinforce++_baseline"
    path = f"{__name__}:Above"
    own = make_advantage(Named(path, {"constant": 0.25}), trust)
    assert episode_advantages([part_of([1.0, 0.0])], None, own, 1.0)[0].tolist() == [0.75, 0.75]
    with pytest.raises(
        CommandError, match=r"among gae, grpo, .*reinforce\+\+_baseline or module:Class, got 'reinforce'"
    ):
        make_advantage("reinforce", Trust())
    with pytest.raises(CommandError, match="add --allow tests to the command"):
        make_advantage(path, Trust())
