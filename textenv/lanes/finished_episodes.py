"""Finished episodes that wait for their score, and for the other members of their group."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from textenv.episodes.completion import Preds, Turn
from textenv.episodes.rules import EndReason
from textenv.lanes.hooks import EpisodeHost, PromptHost
from textenv.prompts.prompts import Prompt

Place = tuple[int, int]  # the end of an episode: the step, counted over all steps of the lanes, and the lane


class FinishedEpisode(NamedTuple):
    """A finished episode that waits for its score (`score_at="rollout_end"`).

    Attributes:
        place: The step and the lane in which the episode ended.
        prompt: The prompt.
        preds: The completion.
        info: The info of the episode's last step, into which the score is written once it is known.
    """

    place: Place
    prompt: Prompt
    preds: Preds
    info: dict[str, Any]

    @property
    def group(self) -> int:
        """The number of the episode's group of samples."""
        return self.preds.group


def split_groups(
    episodes: list[FinishedEpisode], open_groups: set[int], size: int
) -> tuple[list[FinishedEpisode], list[FinishedEpisode]]:
    """Split episodes into those of complete groups, and those that wait for other members of their group.

    An episode whose group has lost a member (its rollout was interrupted) is in neither list.

    Args:
        episodes: Finished episodes, in the order in which they ended.
        open_groups: The groups with members that are running or not yet begun.
        size: The number of members of a group.

    Returns:
        The episodes of complete groups, group by group, in the order in which the last members of the groups ended;
        and the waiting episodes.
    """
    counts = Counter(episode.group for episode in episodes)
    last_index = {episode.group: index for index, episode in enumerate(episodes)}
    complete = [episode for episode in episodes if episode.group not in open_groups and counts[episode.group] == size]
    # The sort is stable: within a group episodes stay in the order in which they ended.
    complete.sort(key=lambda episode: last_index[episode.group])
    return complete, [episode for episode in episodes if episode.group in open_groups]


def prompt_state(prompt: Prompt) -> int | dict[str, Any]:
    """Return a prompt as a checkpoint keeps it: its number in the env, or its row if `reset` was called with it."""
    return prompt.number if prompt.number >= 0 else prompt.row


def load_prompt(env: PromptHost, saved: int | dict[str, Any]) -> Prompt:
    """Return the prompt that `prompt_state` saved."""
    return env.prompts[saved] if isinstance(saved, int) else env.read_prompt(saved)


def finished_state(episode: FinishedEpisode) -> dict[str, Any]:
    """Return an episode that waits for its score, ready for JSON."""
    return {
        "place": list(episode.place),
        "prompt": prompt_state(episode.prompt),
        "preds": episode.preds.state_dict(),
        "end_reason": str(episode.info["end_reason"]),
        "episode": dict(episode.info["episode"]),
    }


def load_finished(env: EpisodeHost, state: Mapping[str, Any]) -> FinishedEpisode:
    """Return the episode that `finished_state` saved."""
    saved = dict(state["preds"])  # a copy, from which `pop` takes entries below
    preds = Preds(
        env.tokenizer,
        saved.pop("ids"),
        closed=[Turn(*turn) for turn in saved.pop("closed")],
        end_reason=EndReason(saved.pop("end_reason")),
        state=copy.deepcopy(saved.pop("state")),
        stop_strings=env.rules.stop_strings,
        **saved,
    )
    prompt = load_prompt(env, state["prompt"])
    step, lane = state["place"]  # a list in JSON
    info = final_info(prompt, preds, EndReason(state["end_reason"]), {}, dict(state["episode"]), scored=False)
    return FinishedEpisode((step, lane), prompt, preds, info)


def final_info(
    prompt: Prompt, preds: Preds, reason: EndReason, parts: dict[str, float], episode: dict[str, Any], scored: bool
) -> dict[str, Any]:
    """Return the info of the last step of an episode; `TextEnv` documents the keys.

    Args:
        prompt: The prompt.
        preds: The completion.
        reason: The reason why the episode ended, which may differ from that of its last turn.
        parts: The sum of each named part of the rewards.
        episode: "r", the sum of the rewards, "l", the number of tokens, and maybe "t", the time in seconds.
        scored: Whether the score is known.
    """
    return {
        "text": preds.text,
        "prompt": prompt,
        "group": preds.group,
        "end_reason": reason,
        "reward_parts": parts,
        "scored": scored,
        "dropped": False,
        "episode": episode,
    }
