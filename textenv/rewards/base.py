"""The one contract of a reward that scores many rows in a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from textenv.completion import Preds
from textenv.prompts import Prompt
from textenv.rewarding import Reward, RewardFunction, Score, ScoreAt, check_length, check_rewards, score_each

Reads = Literal["completion", "whole"]


class BatchReward(ABC):
    """A reward that is called once for many rows: `TextEnv(prompts, tokenizer, reward=MyReward())`.

    Subclass it and write `score`. Write its parameters as the fields of a dataclass, so that it can be pickled. It can
    also be called as a function, `reward(prompt, preds, done)`, for one row.

    Attributes:
        score_at: What `TextEnv` uses where its own `score_at` is not given. "step": every token has a reward. "done"
            and "rollout_end": the reward is about finished texts, and only they are ever given to `score` (other rows
            earn 0); "rollout_end" is for what is heavy, and so is best asked once a rollout.
        may_drop: Whether `score` may return `textenv.rewards.DROPPED`: `agents.make_agent` then attaches the step that
            leaves episodes out.

    Example:
        >>> from textenv import CharTokenizer, TextEnv
        >>> class Shouting(BatchReward):
        ...     def score(self, prompts, preds, dones):
        ...         return [float(one.text.isupper()) for one in preds]
        >>> env = TextEnv(["B"], CharTokenizer("AB"), reward=Shouting(), max_new_tokens=1)
        >>> env.score_at, env.reset(seed=0)[1], env.step(1)[1]
        ('done', {}, 1.0)
    """

    score_at: ScoreAt = "done"
    may_drop: bool = False

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Sequence[Score]:
        """Return the rewards of the rows, in their order: finite numbers, or dicts of named ones, which are summed.

        `textenv.rewards.DROPPED` for a finished row says that it has none, and is to be left out of training.
        """

    def __call__(self, prompt: Prompt, preds: Preds, done: bool) -> Score:
        """Return the reward of one row."""
        [reward] = score_rows(self, [prompt], [preds], [done])
        return reward.score


# A function, a `BatchReward`, its name, or a mapping of its name and options.
RewardLike = RewardFunction | str | Mapping[str, Any]


class RowReward(BatchReward):
    """A reward of finished texts that has nothing to gain from a batch; subclass it and write `score_row`."""

    @abstractmethod
    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the reward of a finished row."""

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Sequence[Any]:
        """Return the rewards of the rows."""
        return score_each(
            lambda prompt, one, done: self.score_row(prompt, one), prompts, preds, dones, type(self).__name__
        )


def score_rows(
    reward: RewardFunction, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]
) -> list[Reward]:
    """Return the checked rewards of rows, whichever kind of reward it is.

    A `BatchReward` about finished texts is called for those alone, and not at all where there are none.

    Raises:
        RewardError: If a reward is no finite number; the message names its row.
    """
    return check_rewards(ask_rows(reward, prompts, preds, dones), prompts, preds)


def ask_rows(
    reward: RewardFunction, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]
) -> list[Score]:
    """Return what a reward says of rows, as `score_rows` does, one a row, but not looked at."""
    if not isinstance(reward, BatchReward):
        return score_each(reward, prompts, preds, dones)
    chosen = [row for row, done in enumerate(dones) if done or reward.score_at == "step"]
    scores: list[Score] = [0.0 for _ in dones]
    if chosen:
        values = reward.score(*([column[row] for row in chosen] for column in (prompts, preds, dones)))  # type: ignore[arg-type]
        check_length(values, len(chosen))
        for row, value in zip(chosen, values, strict=True):
            scores[row] = value
    return scores


def read_text(reads: Reads, prompt: Prompt, preds: Preds) -> str:
    """Return the text that is judged: what the policy wrote, or prompt and completion as one."""
    return preds.text if reads == "completion" else str(prompt) + preds.text


def read_references(prompt: Prompt) -> list[str]:
    """Return the prompt's reference texts, or raise ValueError where it has none."""
    if not prompt.references:
        raise ValueError(
            "Expected a prompt with reference texts, got one without: name their column, "
            "TextEnv(references_column='references')."
        )
    return prompt.references


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError where an option is none of its choices."""
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {list(choices)}, got {value!r}.")
