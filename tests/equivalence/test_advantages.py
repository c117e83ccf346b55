"""Advantages in random settings against a plain calculation, term by term, from what was sampled.

Gamma, lambda, another lambda for the critic, a lambda by length, REINFORCE++, a function of one's own, terminated and
truncated episodes, turns of another speaker, episodes that span rollouts, late scores, groups, a KL penalty, and a
penalty for cut texts.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import KLPenalty, RewardShaping, make_agent
from agents.rollout import advantages as advantages_module
from agents.rollout import estimation
from tests.helpers.models import randomise_critic
from tests.helpers.training import tiny_config
from textenv import CharTokenizer, TextEnv
from textenv.episodes.rules import EndReason

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning"),
    pytest.mark.filterwarnings("ignore:No group of . samples is whole:UserWarning"),
]
LETTERS = CharTokenizer("abcd")
V, ROLLOUTS, A_TEST = len(LETTERS), 4, 10
ESTIMATES = {"k1": lambda r: r, "k2": lambda r: r * r / 2, "k3": lambda r: np.exp(-r) - 1 + r}


def score(prompt, preds, done):
    return float(np.sin(7.0 * len(str(prompt)) + preds.ids @ np.arange(1, 1 + len(preds))))


def score_at_end(prompt, preds, done):
    return score(prompt, preds, done) if done else 0.0


def own(episodes):
    """Return a number for a text of an even number of tokens, and one for each token of the others."""
    return [
        episode.score - len(episode.actions) / 2
        if len(episode.actions) % 2 == 0
        else episode.rewards - episode.penalties / 2 + episode.log_probs - episode.values
        for episode in episodes
    ]


class Dialogue(TextEnv):
    """Another speaker says "ab" after each turn, which token 0 or 3 ends."""

    def get_reward(self, prompt, preds, done):
        return (score if self.score_at == "step" else score_at_end)(prompt, preds, done)

    def respond(self, prompt, preds):
        return None if preds.ids[-1] == 3 else "ab"


class Setting(NamedTuple):
    """A random setting."""

    gamma: float
    gae_lambda: float
    n_steps: int
    n_envs: int
    score_at: str
    length_limit: str
    is_dialogue: bool
    n: int  # samples per prompt
    advantage: str
    complete: bool
    normalize: bool
    coef: float
    estimator: str
    cut: float  # the penalty for a text that ends at its limit
    critic_lambda: float | None
    alpha: float | None  # of a lambda by length

    @classmethod
    def of(cls, seed):
        rng = np.random.default_rng(seed)
        n, complete = int(rng.choice([1, 1, 2, 3])), bool(rng.random() < 0.5)
        alone, grouped = ["gae", "reinforce++", "own"], ["grpo", "grpo_mean", "rloo", "reinforce++_baseline"]
        advantage = str(rng.choice(["gae", *alone, *grouped] if n > 1 else ["gae", "gae", "gae", *alone]))
        alpha = float(rng.choice([0.2, 1.0])) if advantage == "gae" and rng.random() < 0.3 else None
        has_critic = advantage in ("gae", "own") and rng.random() < 0.6
        critic_lambda = float(rng.choice([1.0, 0.7])) if has_critic else None
        complete = complete or advantage != "gae" or alpha is not None
        longest = 6
        return cls(
            gamma=float(rng.choice([1.0, 0.9, 0.5])),
            gae_lambda=float(rng.choice([1.0, 0.95, 0.0])),
            n_steps=int(rng.integers(longest if complete and n == 1 else 2, 9)),
            n_envs=int(rng.integers(3, 8)),
            score_at=str(rng.choice(["step", "done", "rollout_end"])),
            length_limit="truncate" if advantage == "gae" and rng.random() < 0.6 else "terminate",
            is_dialogue=bool(rng.random() < 0.5),
            n=n,
            advantage=advantage,
            complete=complete or n > 1,
            normalize=advantage.startswith("reinforce") or (advantage in alone and bool(rng.random() < 0.5)),
            coef=float(rng.choice([0.0, 0.3, 2.0])),
            estimator=str(rng.choice(list(ESTIMATES))),
            cut=float(rng.choice([0.0, 0.5])),
            critic_lambda=critic_lambda,
            alpha=alpha,
        )


class Step:
    """A sampled token, with all that its advantage depends on."""

    def __init__(self, rollout, read, action, value, log_prob, reward):
        self.rollout, self.read, self.action, self.value = rollout, read, action, value
        self.log_prob, self.reward, self.penalty = log_prob, reward, 0.0


class Diary(BaseCallback):
    """Keeps each lane's episodes as they were sampled, and what each rollout trains."""

    def __init__(self, setting, penalty):
        super().__init__()
        self.setting, self.penalty = setting, penalty
        self.episodes = []  # (steps, info, lane): ended ones
        self.open = defaultdict(list)  # by lane
        self.ends = []  # by rollout: the value of each lane's row after the last step
        self.trained = []  # by rollout: (read, action, log-probability, advantage, return)

    def _on_step(self):
        names = ("obs_tensor", "actions", "values", "log_probs", "rewards", "dones", "infos")
        for lane, (row, action, value, log_prob, reward, done, info) in enumerate(zip(*map(self.locals.get, names))):
            read = tuple(row[row >= 0].tolist())
            step = Step(len(self.trained), read, int(action), float(value), float(log_prob), float(reward))
            self.open[lane].append(step)
            if done:
                # What SB3 adds to the reward of a truncated episode.
                end = info["terminal_observation"]
                step.reward += self.setting.gamma * self.value(end) * bool(info["TimeLimit.truncated"])
                self.episodes.append((self.open.pop(lane), info, lane))
        return True

    def _on_rollout_end(self):
        self.ends.append([self.value(row) for row in self.model._last_obs])
        samples = list(self.model.rollout_buffer.get())
        assert len(samples) == 1
        batch = samples[0].observations
        if len(self.model.rollout_buffer.trained) == 0:
            assert self.setting.n > 1 and not samples[0].advantages.any()
            self.trained.append([])
            return
        read = [tuple(batch.tokens[row, : col + 1].tolist()) for row, col in zip(batch.rows, batch.cols)]
        tensors = (samples[0].actions, samples[0].old_log_prob, samples[0].advantages, samples[0].returns)
        self.trained.append(in_order(zip(read, *(tensor.tolist() for tensor in tensors))))

    @torch.no_grad()
    def value(self, row):
        """Return the value of a row by a plain forward."""
        lm, ids = self.model.policy.lm, torch.as_tensor(np.asarray(row)[np.asarray(row) >= 0])[None]
        return float(lm.critic(lm.backbone.model.base_model(input_ids=ids).last_hidden_state[0, -1:]))

    @torch.no_grad()
    def charge(self):
        """Give each step its penalty, by plain forwards of the reference."""
        lm, rows = self.penalty.reference.backbone.model, {}
        for step in [step for episode in [*(e for e, *_ in self.episodes), *self.open.values()] for step in episode]:
            if step.read not in rows:
                logits = lm(input_ids=torch.tensor([step.read])).logits[0, -1, :V]
                rows[step.read] = torch.log_softmax(logits, -1).tolist()
            ratio = step.log_prob - rows[step.read][step.action]
            step.penalty = self.setting.coef * ESTIMATES[self.setting.estimator](ratio)


def gae(steps, setting, after, gae_lambda=None):
    """Return the advantages of steps: sums of (gamma lambda)^k delta. `after` is the value that follows the last."""
    values = [step.value for step in steps] + [after]
    deltas = [step.reward - step.penalty + setting.gamma * values[t + 1] - values[t] for t, step in enumerate(steps)]
    decay = setting.gamma * (setting.gae_lambda if gae_lambda is None else gae_lambda)
    return [sum(decay**k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def used_by_policy(group, setting):
    """Return the advantages of each episode's steps in a group, before they are normalised."""
    if setting.advantage == "gae":
        lambdas = [setting.gae_lambda for _ in group]
        if setting.alpha is not None:
            lambdas = [max(0.0, 1 - 1 / (setting.alpha * len(steps))) for steps in group]
        return [gae(steps, setting, 0.0, number) for steps, number in zip(group, lambdas)]
    if setting.advantage == "reinforce++":
        pay = [[step.reward - step.penalty for step in steps] for steps in group]
        return [[sum(setting.gamma**k * r for k, r in enumerate(own[t:])) for t in range(len(own))] for own in pay]
    return owned(group, setting) if setting.advantage == "own" else compared(group, setting)


def owned(group, setting):
    """Return the advantages of each episode's steps by the function `own`."""
    result = []
    for steps in group:
        if len(steps) % 2:
            result.append([step.reward - step.penalty / 2 + step.log_prob - step.value for step in steps])
            continue
        score, advantages = sum(step.reward for step in steps) - len(steps) / 2, []
        for t in range(len(steps)):
            to_come = [sum(step.penalty for step in other[t:]) for other in group]
            mean = sum(to_come) / len(group) if setting.n > 1 else 0.0
            advantages.append(score - sum(step.penalty for step in steps[t:]) + mean)
        result.append(advantages)
    return result


def compared(group, setting):
    """Return the advantages of each episode's steps in a group: its score against the others', then the penalties."""
    scores, n = [sum(step.reward for step in steps) for steps in group], len(group)
    result = []
    for i, steps in enumerate(group):
        above = scores[i] - sum(scores) / n
        if setting.advantage == "rloo":
            above = scores[i] - sum(scores[:i] + scores[i + 1 :]) / (n - 1)
        if setting.advantage == "grpo":
            above /= np.sqrt(sum((s - sum(scores) / n) ** 2 for s in scores) / (n - 1)) + 1e-4
        advantages = []
        for t in range(len(steps)):
            to_come = [sum(step.penalty for step in other[t:]) for other in group]
            mean = sum(to_come) / n
            if setting.advantage == "rloo":
                mean = sum(to_come[:i] + to_come[i + 1 :]) / (n - 1)
            advantages.append(above - (to_come[i] - mean))
        result.append(advantages)
    return result


def expected(diary, rollout):
    """Return what a rollout trains, as `Diary.trained` has it."""
    setting, rows = diary.setting, []
    if not setting.complete:
        ended = [(steps, lane) for steps, _, lane in diary.episodes]
        for steps, lane in [*ended, *((steps, lane) for lane, steps in diary.open.items())]:
            part = [step for step in steps if step.rollout == rollout]
            is_over = steps is not diary.open.get(lane) and steps[-1].rollout == rollout
            after = 0.0 if is_over else diary.ends[rollout][lane]
            both = gae(part, setting, after), gae(part, setting, after, setting.critic_lambda)
            rows += [(step, a, target + step.value) for step, a, target in zip(part, *both)]
    groups = defaultdict(list)
    for number, (steps, info, _) in enumerate(diary.episodes):
        groups[info["group"] if setting.n > 1 else number].append(steps)
    for group in groups.values():
        last = max(steps[-1].rollout for steps in group)
        if setting.complete and len(group) == setting.n and last == rollout:
            targets = [gae(steps, setting, 0.0, setting.critic_lambda) for steps in group]
            for steps, target, advantages in zip(group, targets, used_by_policy(group, setting)):
                rows += [(step, a, t + step.value) for step, t, a in zip(steps, target, advantages)]
    used = np.array([a for _, a, _ in rows])
    if setting.normalize and len(used) > 1:
        used = (used - used.mean()) / (used.std(ddof=1) + 1e-8)
    return in_order((s.read, s.action, s.log_prob, a, target) for (s, _, target), a in zip(rows, used.tolist()))


def in_order(rows):
    """Return rows in an order in which rounding has no part: under a lambda of 0, advantages tie and returns do not."""
    return sorted(rows, key=lambda row: (*row[:2], *(round(number, 3) for number in row[2:])))


def agent_of(setting, seed):
    rows = [{"prompt": "abcd"[: 1 + i % 4], "max_new_tokens": 2 + i % 5} for i in range(9)]
    cls = Dialogue if setting.is_dialogue else TextEnv
    reward = {} if setting.is_dialogue else {"reward": score if setting.score_at == "step" else score_at_end}
    turns = {"max_turns": 3, "max_response_tokens": 2} if setting.is_dialogue else {}
    turns["stop_ids"] = (0, 3) if setting.is_dialogue else (0,)
    env = cls(rows, LETTERS, max_new_tokens=6, length_limit=setting.length_limit, score_at=setting.score_at,
              samples_per_prompt=setting.n, **turns, **reward)  # fmt: skip
    options = {"advantage": own if setting.advantage == "own" else setting.advantage}
    options |= {"normalize_advantage": setting.normalize and not setting.advantage.startswith("reinforce")}
    options |= {"critic_lambda": setting.critic_lambda, "lambda_alpha": setting.alpha}
    model = make_agent(
        env, tiny_config(vocab_size=V, n_layer=1, n_embd=8, initializer_range=0.4), n_envs=setting.n_envs,
        n_steps=setting.n_steps, batch_size=setting.n_steps * setting.n_envs, n_epochs=1, learning_rate=1e-2,
        gamma=setting.gamma, gae_lambda=setting.gae_lambda, seed=seed, device="cpu",
        rollout_buffer_kwargs={**options, "complete_episodes": setting.complete},
    )  # fmt: skip
    randomise_critic(model.policy)
    return model


def check(seed):
    """Train a random setting, and check each rollout; return the number of transitions that were compared."""
    setting = Setting.of(seed)
    model = agent_of(setting, seed)
    penalty = KLPenalty(setting.coef, tiny_config(vocab_size=V, n_layer=1, n_embd=8, initializer_range=0.4),
                        setting.estimator)  # fmt: skip
    diary = Diary(setting, penalty)
    shaping = [RewardShaping(missing_eos_penalty=setting.cut)]
    model.learn(ROLLOUTS * setting.n_steps * setting.n_envs, callback=[penalty, *shaping, diary])
    diary.charge()
    # Scores of a group that are equal but for the rounding of float32, 3e-8, are divided by `advantages.SMALL`, 1e-4.
    tolerance = 1e-3 if setting.advantage == "grpo" else 1e-4
    for steps, info, _ in diary.episodes:
        steps[-1].reward += info["episode"]["r"] * (setting.score_at == "rollout_end")
        steps[-1].reward -= setting.cut * (info["end_reason"] is EndReason.LENGTH)
    for rollout, got in enumerate(diary.trained):
        wanted = expected(diary, rollout)
        assert [row[:2] for row in got] == [row[:2] for row in wanted], (setting, rollout)
        ours, plain = ([row[2:] for row in rows] for rows in (got, wanted))
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=tolerance, err_msg=f"{setting} {rollout}")
    return sum(map(len, diary.trained))


@pytest.mark.parametrize("first", range(0, 120, A_TEST))
def test_d1_advantages_are_those_of_the_plain_calculation(first):
    counts = [check(seed) for seed in range(first, first + A_TEST)]
    assert min(counts) > 0 and sum(counts) > 300


def test_the_settings_have_everything():
    settings = [Setting.of(seed) for seed in range(120)]
    for name in Setting._fields:
        assert len({getattr(setting, name) for setting in settings}) > 1, name
    assert sum(setting.advantage != "gae" and setting.coef > 0 for setting in settings) > 15
    assert sum(setting.is_dialogue and setting.length_limit == "truncate" for setting in settings) > 10
    assert sum(setting.critic_lambda is not None and setting.complete for setting in settings) > 10
    assert {setting.n > 1 for setting in settings if setting.alpha is not None} == {True, False}


def test_control_penalties_that_nobody_charges_show(monkeypatch):
    seed = next(seed for seed in range(120) if Setting.of(seed).advantage == "rloo" and Setting.of(seed).coef > 0)
    monkeypatch.setattr(
        advantages_module, "penalty_advantages", lambda penalties, *_: [np.zeros(len(part)) for part in penalties]
    )
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(seed)


def test_control_targets_that_are_carried_by_the_policys_lambda_show(monkeypatch):
    """The seed's episodes span several rollouts, and the two lambdas differ."""
    seed = next(seed for seed in range(120) if is_carried(Setting.of(seed)))
    carry = estimation.Estimation.carry
    monkeypatch.setattr(
        estimation.Estimation, "carry", lambda self, *args: carry(self._replace(critic_lambda=self.gae_lambda), *args)
    )
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(seed)


def is_carried(setting):
    return setting.complete and setting.n > 1 and setting.critic_lambda not in (None, setting.gae_lambda)
