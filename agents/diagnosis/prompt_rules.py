"""The rules of prompts that do not reach the model as they should: plain, cut, or drowned by one of them."""

from __future__ import annotations

import numpy as np

from .findings import Diagnosis
from .run_files import RunRecord

PLAIN = 0.5  # the share of prompts without the template that is no exception
CUT = 0.2  # the share of prompts that are cut above which it matters
DRAWN = 0.5  # the share of the episodes of one prompt that is too large
SIGNAL = 0.8  # the share of the rewards' spread of one prompt that is too large
MIN_EPISODES = 8  # the fewest episodes of a rollout for which shares of prompts say anything


def prompt_findings(record: RunRecord) -> list[Diagnosis]:
    """Return the findings of the rules of this file."""
    return [*plain(record), *cut(record), *one_prompt(record)]


def plain(record: RunRecord) -> list[Diagnosis]:
    """Name prompts without the chat template that the tokenizer has."""
    share = record.series("prompt/plain")
    if len(share) == 0 or share.mean() <= PLAIN:
        return []
    return [Diagnosis.of("template-missing", 0.81, f"{share.mean():.0%} of the prompts lack its marks")]


def cut(record: RunRecord) -> list[Diagnosis]:
    """Name prompts that are cut."""
    share = record.series("prompt/cut")
    if len(share) == 0 or share.mean() <= CUT:
        return []
    limit = record.setting("env", "args", "max_prompt_tokens", default="the task's own limit")
    side = record.setting("env", "args", "truncation_side", default="the task's own")
    seen = f"{share.mean():.0%} of the episodes have a prompt that was cut, to {limit} tokens, on the side {side}"
    return [Diagnosis.of("prompts-cut", 0.98 if share.mean() > 0.5 else 0.83, seen)]


def one_prompt(record: RunRecord) -> list[Diagnosis]:
    """Name a prompt that most episodes have, or from which most of the spread of the rewards comes."""
    drawn, signal = record.series("prompt/largest_share"), record.series("prompt/signal_share")
    count = record.series("episode/count")
    if len(drawn) < 2 or np.median(count) < MIN_EPISODES:
        return []
    # With samples of a prompt side by side, a rollout of few groups has few prompts by design.
    usual = record.setting("env", "args", "samples_per_prompt", default=1) / float(np.median(count))
    if np.median(drawn) > DRAWN and usual < DRAWN / 2:
        return [
            Diagnosis.of("one-prompt", 0.82, f"one prompt has {np.median(drawn):.0%} of the median rollout's episodes")
        ]
    if len(signal) and np.median(signal) > SIGNAL and np.median(drawn) < SIGNAL / 2:
        seen = f"one prompt has {np.median(signal):.0%} of the spread of the median rollout's rewards"
        return [Diagnosis.of("one-prompt", 0.82, f"{seen}, and at most {np.median(drawn):.0%} of its episodes")]
    return []
