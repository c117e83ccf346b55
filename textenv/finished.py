"""Episodes that have ended and wait for their score, and those of their group that must be scored with them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from textenv.completion import Preds, Turn
from textenv.episode import EndReason
from textenv.lane_hooks import EpisodeHost, PromptHost
from textenv.prompts import Prompt

Place = tuple[int, int]  # the step, counted from the first of all, and the lane in which an episode ended


class FinishedEpisode(NamedTuple):
    """An episode that waits for its score (`score_at="rollout_end"`)."""

    place: Place
    prompt: Prompt
    preds: Preds
    info: dict[str, Any]

    @property
    def group(self) -> int:
        """The group of samples of one prompt that it belongs to."""
        return self.preds.group


def split_groups(
    episodes: list[FinishedEpisode], open_groups: set[int], size: int
) -> tuple[list[FinishedEpisode], list[FinishedEpisode]]:
    """Return the episodes of whole groups, each group together, and those that wait for the rest of theirs.

    Groups stand in the order in which their last members ended, members in the order in which they did. An episode
    whose group lost a member (its rollout was broken off) is in neither.

    Args:
        episodes: In the order in which they ended.
        open_groups: The groups of which members run or are still to be dealt.
        size: How many members a group has.
    """
    counts = Counter(episode.group for episode in episodes)
    last = {episode.group: place for place, episode in enumerate(episodes)}
    whole = [one for one in episodes if one.group not in open_groups and counts[one.group] == size]
    return sorted(whole, key=lambda one: last[one.group]), [one for one in episodes if one.group in open_groups]


def prompt_state(prompt: Prompt) -> int | dict[str, Any]:
    """Return what a checkpoint keeps of a prompt: its number in the env, or the row that was given to `reset`."""
    return prompt.number if prompt.number >= 0 else prompt.row


def load_prompt(env: PromptHost, saved: int | dict[str, Any]) -> Prompt:
    """Return the prompt of which `prompt_state` was saved."""
    return env.prompts[saved] if isinstance(saved, int) else env.read_prompt(saved)


def finished_state(episode: FinishedEpisode) -> dict[str, Any]:
    """Return an episode without its score as what goes into JSON."""
    return {
        "place": list(episode.place),
        "prompt": prompt_state(episode.prompt),
        "preds": episode.preds.state_dict(),
        "end_reason": str(episode.info["end_reason"]),
        "episode": dict(episode.info["episode"]),
    }


def load_finished(env: EpisodeHost, state: Mapping[str, Any]) -> FinishedEpisode:
    """Return the episode that `finished_state` wrote down."""
    saved = dict(state["preds"])
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
    step, lane = state["place"]
    info = final_info(prompt, preds, EndReason(state["end_reason"]), {}, dict(state["episode"]), scored=False)
    return FinishedEpisode((step, lane), prompt, preds, info)


def final_info(
    prompt: Prompt, preds: Preds, reason: EndReason, parts: dict[str, float], episode: dict[str, Any], scored: bool
) -> dict[str, Any]:
    """Return the info of an episode that has ended; the reason is the episode's, which may not be its last turn's."""
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
