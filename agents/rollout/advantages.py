"""Advantages without a critic, of episodes alone or within their group, by name or by a function of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from ..distributed.collectives import moments
from ..distributed.world import world
from .estimation import gae
from .transitions import Transitions

Advantage = Literal["gae", "grpo", "grpo_mean", "rloo", "reinforce++", "reinforce++_baseline"]
GROUPED = ("grpo", "grpo_mean", "rloo", "reinforce++_baseline")  # they compare the samples of a prompt
NORMALISED = ("reinforce++", "reinforce++_baseline")  # their definition includes the division by the batch's deviation

READ = ("actions", "task_rewards", "penalties", "values", "log_probs")  # of `Transitions`, in the order of `Trajectory`
SMALL = 1e-4  # keeps differences that are rounding or noise from becoming advantages of about 1


class Trajectory(NamedTuple):
    """An episode that has ended, as an advantage function sees it. Its arrays, (n,) for n tokens, cannot be written.

    Example:
        >>> def above_all(episodes):
        ...     mean = sum(episode.score for episode in episodes) / len(episodes)
        ...     return [episode.score - mean for episode in episodes]
        >>> options = dict(advantage=above_all)  # make_agent(env, "gpt2", rollout_buffer_kwargs=options)
    """

    group: int  # the number of its group of samples; without groups, each episode has its own
    actions: np.ndarray  # the tokens that the policy wrote
    rewards: np.ndarray  # the rewards of tokens, without penalties
    penalties: np.ndarray  # in reward, to be subtracted
    values: np.ndarray  # the critic's, in units of reward; 0 without a critic
    log_probs: np.ndarray  # in nats, by the policy

    @property
    def score(self) -> float:
        """The sum of its rewards, without penalties."""
        return float(self.rewards.sum(dtype=np.float64))


# Returns a number for each episode, or an array (n,) with a number for each of its tokens.
AdvantageFunction: TypeAlias = Callable[[Sequence[Trajectory]], Sequence[float | np.ndarray] | np.ndarray]


def check_advantage(
    advantage: Advantage | AdvantageFunction,
    normalize_advantage: bool,
    critic_lambda: float | None,
    lambda_alpha: float | None,
) -> None:
    """Raise a ValueError for arguments of `SequenceRolloutBuffer` that it does not know, or that do not combine."""
    names = get_args(Advantage)
    if not callable(advantage) and advantage not in names:
        raise ValueError(f"Expected `advantage` to be one of {list(names)} or a function, got {advantage!r}.")
    if advantage in GROUPED and advantage not in NORMALISED and normalize_advantage:
        raise ValueError(
            f"Expected normalize_advantage=False with advantage={advantage!r}, got True: over the whole rollout it "
            "would undo the comparison within groups. With 'reinforce++_baseline' it is part of the definition."
        )
    if critic_lambda is not None and not 0 <= critic_lambda <= 1:
        raise ValueError(f"Expected `critic_lambda` from 0 to 1, or None for gae_lambda, got {critic_lambda}.")
    if lambda_alpha is not None and not lambda_alpha > 0:
        raise ValueError(f"Expected `lambda_alpha` to be positive, or None for gae_lambda, got {lambda_alpha}.")
    if critic_lambda is not None and advantage != "gae" and not callable(advantage):
        raise ValueError(
            f"Expected critic_lambda=None with advantage={advantage!r}, got {critic_lambda}: it needs no critic. "
            "Leave it out, or use advantage='gae'."
        )
    if lambda_alpha is not None and advantage != "gae":
        raise ValueError(
            f"Expected lambda_alpha=None with advantage={advantage!r}, got {lambda_alpha}: only 'gae' has a lambda. "
            "Leave it out, or use advantage='gae'."
        )


def episode_advantages(
    episodes: Sequence[Transitions], groups: np.ndarray | None, advantage: Advantage | AdvantageFunction, gamma: float
) -> list[np.ndarray]:
    """Return the advantages of whole episodes before any normalisation, (n,) float32 for an episode of n tokens.

    - "grpo", "grpo_mean", "rloo", "reinforce++_baseline": those of `group_advantages` and `penalty_advantages`.
    - "reinforce++": the rewards minus penalties from a token to the end of its episode, discounted by gamma (Hu et al.,
      2025, arXiv 2501.03262; with one reward, at the end, that is its score minus the penalties still to come).
    - a function: what it returns. A number for an episode is that of all its tokens, and the penalties are charged
      afterwards: each token loses those from it to the end, less the mean of the group where there are groups. An
      array is taken as it is, so that the function subtracts the penalties itself.

    Args:
        episodes: The transitions of each episode.
        groups: The number of each episode's group, (E,); None without groups.
        advantage: A name other than "gae", or a function.
        gamma: Discount factor.

    Raises:
        ValueError: If a function returns anything else, or numbers that are not finite.
    """
    if advantage == "reinforce++":
        return [_to_come(part.task_rewards - part.penalties, gamma) for part in episodes]
    penalties = [part.penalties for part in episodes]
    if callable(advantage):
        numbers = np.arange(len(episodes)) if groups is None else groups  # (E,)
        given = _called(advantage, episodes, numbers)
        if groups is None:
            charged = [-_to_come(part, 1.0) for part in penalties]
        else:
            charged = penalty_advantages(penalties, numbers, "grpo_mean")
        return [
            (own + charge if own.ndim == 0 else own).astype(np.float32)
            for own, charge in zip(given, charged, strict=True)
        ]
    assert groups is not None, "checked before"
    scores = np.array([part.task_rewards.sum(dtype=np.float64) for part in episodes])  # (E,)
    compared = group_advantages(scores, groups, advantage)  # (E,)
    charged = penalty_advantages(penalties, groups, advantage)
    return [(score + charge).astype(np.float32) for score, charge in zip(compared, charged, strict=True)]


def _to_come(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """Return the sum of rewards from each token to the end, discounted, (n,) float32; the sum is in float64."""
    exact = rewards.astype(np.float64)
    return gae(exact, np.zeros_like(exact), gamma, 1.0).astype(np.float32)


def _called(function: AdvantageFunction, episodes: Sequence[Transitions], groups: np.ndarray) -> list[np.ndarray]:
    """Return what a function returns for episodes: () or (n,) float64 for each."""
    trajectories = []
    for part, group in zip(episodes, groups, strict=True):
        arrays = [getattr(part, name).view() for name in READ]
        for array in arrays:
            array.flags.writeable = False  # they are the buffer's, which trains on them
        trajectories.append(Trajectory(int(group), *arrays))
    answer = function(trajectories)
    wanted = [part.actions.shape for part in episodes]
    try:
        given = [np.asarray(numbers, dtype=np.float64) for numbers in answer]
    except (TypeError, ValueError) as error:
        raise _unfit(wanted, f"{type(answer).__name__} ({error})") from error
    shapes = [own.shape for own in given]
    if len(given) != len(wanted) or any(shape not in ((), fit) for shape, fit in zip(shapes, wanted, strict=True)):
        raise _unfit(wanted, f"{len(given)} of shapes {shapes[:8]}")
    for own, episode in zip(given, trajectories, strict=True):
        fits = np.abs(own) <= np.finfo(np.float32).max  # False of NaN, too
        if not fits.all():
            raise ValueError(
                f"Expected `advantage` to return finite numbers, got {own[~fits].flat[0]} for an episode "
                f"of {len(episode.actions)} tokens and the score {episode.score:.4g}: check for divisions by 0, as of "
                "the deviation of a group of equal scores."
            )
    return given


def _unfit(wanted: Sequence[tuple[int, ...]], got: str) -> ValueError:
    return ValueError(
        f"Expected `advantage` to return a number, or an array with one for each token, for each of {len(wanted)} "
        f"episodes, in their order, of the shapes {list(wanted[:8])}, got {got}: return a list of that length."
    )


def group_advantages(returns: np.ndarray, groups: np.ndarray, advantage: Advantage) -> np.ndarray:
    """Return the advantage of each episode over the other episodes of its prompt.

    With the return r of an episode, and the mean and deviation over the n episodes of its group:

    - "grpo": (r - mean) / (deviation + 1e-4), where the deviation divides by n - 1 (Shao et al., 2024, DeepSeekMath,
      section 4.1.2);
    - "grpo_mean": r - mean, so that hard and easy prompts count alike (Liu et al., 2025, Dr. GRPO, section 3.2);
    - "rloo": r - the mean of the other episodes (Ahmadian et al., 2024, section 3.3), which is n / (n - 1) times
      "grpo_mean";
    - "reinforce++_baseline": r - mean, which the buffer then normalises over the tokens of the whole rollout (Hu et
      al., 2025, REINFORCE++, "REINFORCE++ w/ Baseline").

    In a group of one episode, or of equal returns, all advantages are exactly 0.

    Args:
        returns: The sum of rewards of each episode, without penalties, (E,).
        groups: The number of each episode's group, (E,), in any order.
        advantage: One of the four above.

    Returns:
        (E,) float32.

    Example:
        >>> group_advantages(np.array([1.0, 0.0, 0.0, 5.0]), np.array([7, 7, 7, 8]), "rloo").tolist()
        [1.0, -0.5, -0.5, 0.0]
    """
    advantages = np.zeros(len(returns))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)  # (n,)
        if len(members) == 1:
            continue
        shifted = returns[members].astype(np.float64) - returns[members[0]]  # makes equal returns exactly 0
        centred = shifted - shifted.mean()
        if advantage == "grpo":
            centred /= centred.std(ddof=1) + SMALL
        elif advantage == "rloo":
            centred *= len(members) / (len(members) - 1)
        advantages[members] = centred
    return advantages.astype(np.float32)


def penalty_advantages(penalties: Sequence[np.ndarray], groups: np.ndarray, advantage: Advantage) -> list[np.ndarray]:
    """Return what the penalties of an episode's tokens add to its advantages, one array for each episode.

    Let s be the sum of an episode's penalties from its token t to its end, 0 if it ends before t, and the mean that of
    s at the same t over the E episodes of the group. The advantage of token t then gets:

    - with "grpo", "grpo_mean" and "reinforce++_baseline": mean - s;
    - with "rloo": the mean over the other episodes - s, which is E / (E - 1) times that.

    A token has no influence on penalties of earlier tokens, which are left out, or of other episodes, which are a
    baseline. So the expected gradient is that of the penalties of whole texts, and their weight beside the scores is
    set by the coefficient. It is not divided by a deviation, which would give penalties of any size the same weight.
    Penalties that are equal in all episodes of a group, such as those of equal texts, add exactly 0; so do those of an
    episode without others.

    Args:
        penalties: The penalties of each episode's tokens, (n,) for an episode of n tokens.
        groups: As in `group_advantages`.
        advantage: As in `group_advantages`.

    Returns:
        (n,) for each episode, float64.

    Example:
        >>> penalties = [np.array([0.1, 0.3]), np.array([0.2])]  # s is 0.4 and 0.2 at the first token
        >>> [added.round(2).tolist() for added in penalty_advantages(penalties, np.array([0, 0]), "grpo_mean")]
        [[-0.1, -0.15], [0.1]]
    """
    advantages = [np.zeros(len(own)) for own in penalties]
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group).tolist()  # (E,)
        to_come = np.zeros((len(members), max(len(penalties[i]) for i in members)))  # (E, T)
        for row, i in enumerate(members):
            to_come[row, : len(penalties[i])] = penalties[i].astype(np.float64)[::-1].cumsum()[::-1]
        shifted = to_come - to_come[0]  # makes equal penalties exactly 0
        below = shifted.mean(axis=0) - shifted
        if advantage == "rloo" and len(members) > 1:
            below *= len(members) / (len(members) - 1)
        for row, i in enumerate(members):
            advantages[i] = below[row, : len(penalties[i])]
    return advantages


def mean_and_deviation(advantages: np.ndarray) -> tuple[float | np.float32, float | np.float32]:
    """Return the mean and the deviation by which to normalise advantages, (N,), over those of all processes.

    They are 0 and 1 if there are fewer than two advantages. As in SB3 `ppo.PPO.train`, the deviation divides by N - 1
    and has 1e-8 added.
    """
    if world() is None:
        n, mean, deviation = len(advantages), 0.0, 1.0
        if n > 1:  # in float32, as in SB3
            mean, deviation = advantages.mean(), advantages.std(ddof=1) + np.float32(1e-8)
        return mean, deviation
    n, mean, variance = moments("advantages", advantages)
    return (np.float32(mean), np.float32(math.sqrt(variance * n / (n - 1)) + 1e-8)) if n > 1 else (0.0, 1.0)
