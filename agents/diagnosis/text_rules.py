"""The rules of texts that get worse: never ended, empty, or, while the reward rises, bought at the cost of the text."""

from __future__ import annotations

import numpy as np

from .findings import Diagnosis
from .run_files import RunRecord
from .trends import MIN_ROWS, RewardTrend, reward_trend, second_half, trend

NEVER = 0.95  # the share of texts that are cut in all rollouts where the policy never ends one
BLANK = 0.5  # the share of blank texts that is too many
LONGER, CUT_AT_FIRST, CUT_AT_LAST = 1.25, 0.6, 0.85  # growth of the length, and shares of cut texts
REPEATED, MORE_REPEATED = 0.3, 0.2  # the share of repeated word pairs at last, and its rise
FEW_TEXTS, MANY_TEXTS = 0.12, 0.5  # different texts as a share of all, at last and at first
UNLIKE = 1.0  # nats by which texts become less likely under the reference: a perplexity of 2.7 times as much
JUDGE_FALL = 0.1  # the fall of the judge, in units of its standard deviation over prompts or its size, that counts


def text_findings(record: RunRecord) -> list[Diagnosis]:
    """Return the findings of the rules of this file."""
    reward = reward_trend(record)
    found = [*never_stops(record), *empty(record)]
    if reward.rose:  # a reward is hacked only where it rises
        for rule in (judge_gap, longer, repetition, one_text, unlike_start):
            found += rule(record, reward)
    return found


def can_stop(record: RunRecord) -> bool:
    """Return whether the configuration lets a text end before its limit."""
    return bool(record.setting("env", "args", "stop_ids") != [] or record.setting("env", "args", "stop_strings"))


def never_stops(record: RunRecord) -> list[Diagnosis]:
    """Name a policy that ends no text, from the first rollout to the last."""
    cut = record.series("episode/end_length")
    if len(cut) < MIN_ROWS or not can_stop(record) or np.quantile(cut, 0.1) < NEVER:
        return []
    seen = f"{cut[0]:.0%} of the texts were cut by length in the first rollout, {cut[-1]:.0%} in the last"
    ids = record.setting("env", "args", "stop_ids")
    return [Diagnosis.of("never-stops", 0.7, seen if ids is None else f"{seen}, with stop_ids {ids}")]


def empty(record: RunRecord) -> list[Diagnosis]:
    """Name texts of which most are blank in the second half of a run."""
    blank = record.series("text/blank")
    if len(blank) < MIN_ROWS or second_half(blank).mean() <= BLANK:
        return []
    seen = f"{blank[0]:.0%} of the texts were empty or white space in the first rollout, {blank[-1]:.0%} in the last"
    # Where nearly all are empty, rewards are equal for that reason.
    return [
        Diagnosis.of(
            "empty-texts", 0.94 if second_half(blank).mean() > NEVER else 0.86, f"{seen}; {reward_trend(record)}"
        )
    ]


def judge_gap(record: RunRecord, reward: RewardTrend) -> list[Diagnosis]:
    """Name a judge that falls while the trained reward rises in the same evaluations."""
    judge, trained = record.evaluated("judge"), record.evaluated("reward")
    if len(judge) < 2 or len(trained) < 2:
        return []
    last = float(np.median(judge[-2:])) if len(judge) > 2 else float(judge[-1])
    fall, rise = float(judge[0]) - last, float(trained[-1] - trained[0])
    size = max(abs(float(judge[0])), abs(last), 1e-9)
    if rise <= 0 or fall <= JUDGE_FALL * size:
        return []
    seen = (
        f"the evaluations' reward went from {trained[0]:.3g} to {trained[-1]:.3g}, their judge from {judge[0]:.3g} to "
    )
    return [Diagnosis.of("judge-gap", 0.9, f"{seen}{last:.3g}")]


def longer(record: RunRecord, reward: RewardTrend) -> list[Diagnosis]:
    """Name texts that grow to the limit with the reward."""
    length, cut = trend(record.series("episode/length")), trend(record.series("episode/end_length"))
    if not (length.last > LONGER * length.first and cut.first < CUT_AT_FIRST and cut.last > CUT_AT_LAST):
        return []
    grown = f"texts grew from {length.first:.3g} to {length.last:.3g} tokens, and those cut by the limit from"
    return [Diagnosis.of("longer-texts", 0.8, f"{reward}; {grown} {cut.first:.0%} to {cut.last:.0%}")]


def repetition(record: RunRecord, reward: RewardTrend) -> list[Diagnosis]:
    """Name texts that repeat themselves more and more."""
    repeated = trend(record.series("text/repetition"))
    if not (repeated.last > REPEATED and repeated.change > MORE_REPEATED):
        return []
    seen = f"{reward}; the share of repeated word pairs from {repeated.first:.0%} to {repeated.last:.0%}"
    return [Diagnosis.of("repetition", 0.84, seen)]


def one_text(record: RunRecord, reward: RewardTrend) -> list[Diagnosis]:
    """Name a policy that writes the same few texts for all prompts."""
    distinct = trend(record.series("text/distinct"))
    if not (distinct.last < FEW_TEXTS and distinct.first > MANY_TEXTS):
        return []
    seen = f"{reward}; different texts, as a share of a rollout's, from {distinct.first:.0%} to {distinct.last:.0%}"
    return [Diagnosis.of("one-text", 0.75, seen)]


def unlike_start(record: RunRecord, reward: RewardTrend) -> list[Diagnosis]:
    """Name texts that the reference finds far less likely than those of the start."""
    nll = trend(record.series("kl/reference_nll"))
    if not nll.change > UNLIKE:
        return []
    perplexities = f"their perplexity under the reference from {np.exp(nll.first):.3g} to {np.exp(nll.last):.3g}"
    return [Diagnosis.of("unlike-start", 0.72, f"{reward}; {perplexities}")]
