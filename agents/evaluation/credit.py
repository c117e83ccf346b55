"""Credit against truth: the value of each prefix of an episode by Monte Carlo, beside the critic's value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from textenv.env import TextEnv
from textenv.prompts.prompts import Prompt
from textenv.text.tokenizer import Tokenizer

from ..models.sequences import SequenceBatch, number_prompts
from ..policies.actor_critic import LMActorCritic
from ..policies.lm_policy import LMPolicy
from ..rollout.explained_variance import THIRDS, thirds
from .continuations import Prefixes, continue_from, replay
from .generation import Generation
from .tables import finite
from .trained_rewards import TrainedRewards


@dataclass(frozen=True)
class Credit:
    """The values of the T prefixes of an episode: of the text before each token that the policy wrote.

    Attributes:
        prompt: The prompt.
        tokens: The token behind each prefix, (T,).
        cols: The column of the last token of each prefix, (T,); the prompt begins in column 0.
        critic: The critic's value, (T,), in units of reward.
        monte_carlo: The mean return of the continuations, (T,); NaN where none counts.
        standard_error: The standard error of that mean, (T,); NaN where fewer than two continuations count.
        n: The number of continuations that count, (T,): those that were not left out of training.
    """

    prompt: Prompt
    tokens: np.ndarray
    cols: np.ndarray
    critic: np.ndarray
    monte_carlo: np.ndarray
    standard_error: np.ndarray
    n: np.ndarray

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """The ends of the 95 % interval of `monte_carlo` by Student's t, (T,) each.

        Where all continuations have the same return it has no width, which is too narrow if others are merely rare.
        """
        from scipy.stats import t  # here, since it takes as long to import as all of textenv

        half = t.ppf(0.975, np.maximum(self.n - 1, 1)) * self.standard_error
        return self.monte_carlo - half, self.monte_carlo + half

    def to_dict(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return prompt, tokens as texts, values and the ends of intervals, ready for JSON; None stands for NaN."""
        low, high = self.interval
        columns = {"critic": self.critic, "monte_carlo": self.monte_carlo, "low": low, "high": high}
        return {
            "prompt": str(self.prompt),
            "tokens": [tokenizer.decode([token]) for token in self.tokens.tolist()],
            **{name: [finite(value) for value in column.tolist()] for name, column in columns.items()},
        }


def monte_carlo_values(
    model: OnPolicyAlgorithm,
    episode: Generation,
    n: int = 32,
    *,
    env: TextEnv | None = None,
    seed: int = 0,
    n_envs: int = 64,
) -> Credit:
    """Estimate the value of each prefix of an episode by `n` continuations of it, beside the critic's value.

    The value of a prefix is the expected return of the present policy from there on (Sutton & Barto, 2018, section
    5.2; VinePPO estimates values of steps so: Kazemnejad et al., 2024, arXiv 2410.01679). The return is that of the
    rewards that the critic is trained on, discounted by the model's `gamma` a token of the policy:

    - the task's rewards, divided by the deviation of a `VecNormalize` that normalises them;
    - the score shaped by `RewardShaping`, with the deviation that it has now;
    - minus the penalties of `KLPenalty` with its present coefficient, unless it is in the loss;
    - plus `gamma` times the critic's value of the last observation where the env truncates, as in training.

    The steps of `model.rollout_buffer.before_returns` say so: attach those of the training to a model that was loaded.
    Continuations that training would leave out (`DropEpisodes`, or a reward that drops rows) do not count. Returns do
    not depend on the lambda of the critic's targets, which all aim at this value. A reward that compares the samples of
    a prompt sees each continuation as a group of its own.

    All prefixes are continued side by side. A prefix is read once, its `n` rows get copies of the keys and values, and
    of the state of the env's lane: its turns and `preds.state`. The policy's mode and generators, and the env's own
    episode, prompt order and `np_random` stay as they are; its hooks are called as in training.

    Args:
        model: The model, with its env and its critic.
        episode: An episode, as `generate` returns it for prompts of the env with the env's limits and stop ids.
        n: The number of continuations of each prefix, at least 2. The standard error falls with its root.
        env: The env that continues; by default the model's. Another one has the same tokenizer.
        seed: The seed of the sampling.
        n_envs: The largest number of continuations that are written side by side.

    Raises:
        TypeError: If the model has no `LMPolicy`.
        ValueError: If the model has no `TextVecEnv` and `env` is None, if `n` or `n_envs` is too small, if the model's
            advantages need no critic, if its weights are sharded, if it was trained with steps that are not attached,
            or a step changes rewards in a way that is not known here, if `RewardShaping` whitens scores, or if the
            episode is none of the env.

    Example:
        >>> from agents import generate, make_agent, monte_carlo_values
        >>> from textenv import CharTokenizer
        >>> from transformers import GPT2Config
        >>> tokenizer = CharTokenizer()
        >>> env = TextEnv(["a"], tokenizer, reward=lambda prompt, preds, done: 1.0, max_new_tokens=3, stop_ids=[1])
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=33, bos_token_id=0, eos_token_id=0)
        >>> model = make_agent(env, config, n_envs=8, device="cpu")
        >>> [episode] = generate(model, ["a"], tokenizer, max_new_tokens=3, stop_ids=[1])
        >>> credit = monte_carlo_values(model, episode, n=4)
        >>> len(credit.monte_carlo) == len(episode.ids), float(credit.monte_carlo[-1])
        (True, 1.0)
    """
    policy = _checked(model, n, n_envs)
    rewards = TrainedRewards.of(model, env)
    prefixes = replay(rewards.env, episode)
    generator = torch.Generator().manual_seed(seed)
    rows = np.repeat(np.arange(len(prefixes.states)), n)  # (T n,): the number of the prefix of each continuation
    returns = np.zeros(len(rows))  # NaN where a continuation does not count
    was_training = policy.training
    policy.set_training_mode(False)
    try:
        with torch.no_grad():
            for start in range(0, len(rows), n_envs):
                part = slice(start, start + n_envs)
                written = continue_from(policy, rewards.env, prefixes, rows[part].tolist(), generator)
                returns[part] = rewards.returns(written)
            critic = _critic_values(policy.lm, prefixes)
    finally:
        policy.set_training_mode(was_training)
    by_prefix = returns.reshape(-1, n)  # (T, n)
    counts = np.isfinite(by_prefix).sum(axis=1)  # (T,)
    # A sum over none is 0: what no continuation shows is NaN, without numpy's warning.
    means = np.where(counts > 0, np.nansum(by_prefix, axis=1) / np.maximum(counts, 1), np.nan)
    squares = np.nansum((by_prefix - means[:, None]) ** 2, axis=1)
    errors = np.where(counts > 1, np.sqrt(squares / np.maximum(counts - 1, 1) / np.maximum(counts, 1)), np.nan)
    return Credit(prefixes.prompt, prefixes.actions, prefixes.cols, critic, means, errors, counts)


class Agreement(NamedTuple):
    """How well the critic agrees with the Monte Carlo values of some prefixes.

    Attributes:
        part: "all", or the third of the text in which the tokens are: "first", "middle" or "last".
        n: The number of prefixes.
        correlation: Pearson's correlation of the two values. The noise of the Monte Carlo values lowers it. NaN where
            one of the two is constant.
        bias: The mean of the critic's value minus the Monte Carlo value, in units of reward.
        standard_error: The standard error of the bias by the noise of the continuations alone.
    """

    part: str
    n: int
    correlation: float
    bias: float
    standard_error: float


def critic_agreement(credits: Sequence[Credit]) -> list[Agreement]:
    """Return how well the critic agrees with the truth, over all prefixes and by the third of the text.

    The thirds are those of `value/explained_variance_first` and its like; a third without a prefix is left out, and so
    are prefixes without an interval.

    Args:
        credits: The values of some episodes.

    Example:
        >>> import numpy as np
        >>> from agents.evaluation.credit import Credit, critic_agreement
        >>> from textenv.prompts.prompts import Prompt
        >>> critic, truth = np.array([0.0, 1.0, 3.0]), np.array([0.0, 1.0, 2.0])
        >>> tokens, cols = np.array([4, 5, 6]), np.array([0, 1, 2])
        >>> credit = Credit(Prompt("a", [1]), tokens, cols, critic, truth, np.full(3, 0.1), np.full(3, 8))
        >>> [(row.part, row.n, round(row.bias, 2)) for row in critic_agreement([credit])]
        [('all', 3, 0.33), ('first', 1, 0.0), ('middle', 1, 0.0), ('last', 1, 1.0)]
    """
    place = np.concatenate([thirds(credit.cols, len(credit.prompt.ids)) for credit in credits])
    names = ("critic", "monte_carlo", "standard_error")
    columns = np.stack([np.concatenate([getattr(credit, name) for credit in credits]) for name in names])  # (3, N)
    known = np.isfinite(columns[2])
    place, columns = place[known], columns[:, known]
    parts = [("all", columns), *((name, columns[:, place == third]) for third, name in enumerate(THIRDS))]
    return [_agreement(name, *part) for name, part in parts if part.shape[1] > 0]


def _agreement(part: str, critic: np.ndarray, truth: np.ndarray, errors: np.ndarray) -> Agreement:
    is_varied = np.ptp(critic) > 0 and np.ptp(truth) > 0
    correlation = float(np.corrcoef(critic, truth)[0, 1]) if is_varied else float("nan")
    error = float(np.sqrt(np.sum(errors**2))) / len(errors)
    return Agreement(part, len(errors), correlation, float(np.mean(critic - truth)), error)


def _checked(model: OnPolicyAlgorithm, n: int, n_envs: int) -> LMPolicy:
    policy = model.policy
    if not isinstance(policy, LMPolicy):
        raise TypeError(f"Expected a model with an LMPolicy, got {type(policy).__name__}.")
    if n < 2 or n_envs < 1:
        raise ValueError(f"Expected `n` of at least 2 and `n_envs` of at least 1, got {n} and {n_envs}.")
    if policy.lm.shards is not None:
        raise ValueError("Expected weights that are whole in each process, got sharded ones: load them in one process.")
    return policy


def _critic_values(lm: LMActorCritic, prefixes: Prefixes) -> np.ndarray:
    """Return the critic's value of each prefix, (T,), in one forward over the text."""
    ids = prefixes.ids[None]  # (1, L)
    n_prompt = np.array([len(prefixes.prompt.ids)])
    rows = np.zeros(len(prefixes.cols), dtype=np.int64)
    batch = SequenceBatch(
        torch.as_tensor(ids, device=lm.backbone.device),
        np.array([ids.shape[1]]),
        rows,
        prefixes.cols,
        n_prompt=n_prompt,
        prompts=number_prompts(list(ids), n_prompt),
    )
    return lm.in_reward_units(lm.sequence_values(batch)).double().cpu().numpy()
