"""The rules of updates that go wrong: steps, entropy, divergence, reference and critic."""

from __future__ import annotations

import numpy as np

from .findings import Diagnosis
from .run_files import RunRecord
from .trends import EQUAL_REWARDS, MIN_ROWS, reward_trend, second_half, trend

COLLAPSED = 0.1  # the share of the first entropy below which it has collapsed, as in TrainingWarnings
NEGATIVE, IN_A_ROW = -5e-3, 5  # nats per token, and rollouts: a divergence nearer to 0, or for less long, is noise
STALE, STALE_16_BITS = 0.01, 0.05  # nats per token between reference and policy before any update, beyond rounding
RUNAWAY, BONUS = 1.0, 0.1  # nats per token of divergence that are far, and an entropy bonus that leads there
MISMATCH, MISMATCH_16_BITS = 1e-2, 0.5  # nats: log-ratios above rounding
CLIPPED = 0.33  # the share of clipped tokens that is large
EARLY_KL, SHATTERED = 0.1, 1.0  # nats per token of an early update, of which 0.01 is usual: too large, and hopeless
LATER_EPOCHS = 10  # passes over a rollout that are many
STILL = 1e-5  # nats per token of an update below which weights hardly move
USELESS, UNMOVED = 0.03, 1e-4  # explained variances of a critic that says nothing, and of one that never learns
CRITIC_ROWS = 30  # rollouts before which a critic is not expected to help
DOMINATES = 10.0  # vf_coef times the value loss; the policy's loss is of normalised advantages, about 1
VF_COEF = 0.1  # `make_agent`'s default


def update_findings(record: RunRecord) -> list[Diagnosis]:
    """Return the findings of the rules of this file."""
    found = []
    for rule in (
        not_finite,
        mismatch,
        stale_reference,
        negative,
        steps,
        rate_low,
        collapse,
        runaway,
        dominates,
        useless,
    ):
        found += rule(record)
    return found


def not_finite(record: RunRecord) -> list[Diagnosis]:
    """Name updates that were skipped for a NaN or an infinity, and runs that ended with it."""
    if "NumericsError" in record.error:
        return [Diagnosis.of("not-finite", 0.96, f"the run ended with {record.error[:200]}")]
    skipped = record.series("train/skipped_updates")
    if len(skipped) and (skipped > 0).mean() >= 0.1:
        return [
            Diagnosis.of("not-finite", 0.9, f"{skipped.sum():.0f} updates in {len(skipped)} iterations were skipped")
        ]
    return []


def mismatch(record: RunRecord) -> list[Diagnosis]:
    """Name log-ratios away from 0 before the first step of an update."""
    ratios = record.series("rollout/log_ratio")
    limit = MISMATCH if record.setting("model", "autocast") is None else MISMATCH_16_BITS
    if len(ratios) == 0 or np.median(ratios) <= limit:
        return []
    seen = f"before the first step of an update some token's log-ratio is {np.median(ratios):.3g} in the median rollout"
    return [Diagnosis.of("rollout-update-mismatch", 0.94, seen)]


def stale_reference(record: RunRecord) -> list[Diagnosis]:
    """Name a reference that differs from the policy before the first update."""
    kl = record.series("kl/token")
    limit = STALE if record.setting("model", "autocast") is None else STALE_16_BITS
    if len(kl) == 0 or kl[0] <= limit:
        return []
    named = record.setting("kl", "reference", default="the start")
    seen = f"before any update the divergence from {named} is {kl[0]:.3g} nats a token"
    return [Diagnosis.of("stale-reference", 0.91, seen)]


def negative(record: RunRecord) -> list[Diagnosis]:
    """Name a divergence that is below 0 for several rollouts in a row."""
    kl = record.series("kl/token")
    longest = run = 0
    for value in kl:
        run = run + 1 if value < NEGATIVE else 0
        longest = max(longest, run)
    if longest < IN_A_ROW:
        return []
    return [Diagnosis.of("kl-negative", 0.92, f"for {longest} rollouts in a row, at least {kl.min():.3g} nats a token")]


def steps(record: RunRecord) -> list[Diagnosis]:
    """Name updates that leave the clip range: by too many passes over a rollout, or by too large a rate."""
    clipped, kl = record.series("train/clip_fraction"), record.series("train/approx_kl")
    if len(clipped) < 2:
        return []
    early = slice(0, max(2, len(clipped) // 4))
    is_far = np.median(clipped) > CLIPPED or clipped[early].mean() > CLIPPED or np.median(kl[early]) > EARLY_KL
    if not is_far:
        return []
    seen = (
        f"the clip bounds {clipped[early].mean():.0%} of the tokens in the first updates, {np.median(clipped):.0%} in "
    )
    seen += f"the median one, whose approx_kl is {np.median(kl):.3g} nats"
    n_epochs = record.setting("algorithm", "n_epochs", default=4)
    if n_epochs >= LATER_EPOCHS:
        return [Diagnosis.of("many-epochs", 0.78, f"{seen}, with {n_epochs} epochs")]
    rate, reward = record.setting("algorithm", "learning_rate", default="the default"), reward_trend(record)
    # Steps from which the reward rises are hardly the trouble, unless the first ones leave nothing of the texts.
    weight = 0.95 if np.median(kl[early]) > SHATTERED else 0.6 if reward.rose else 0.77
    return [Diagnosis.of("rate-high", weight, f"{seen}, at a learning rate of {rate}; {reward}")]


def rate_low(record: RunRecord) -> list[Diagnosis]:
    """Name updates that move nothing, while rewards differ and do not rise."""
    clipped, kl, reward = record.series("train/clip_fraction"), record.series("train/approx_kl"), reward_trend(record)
    if len(kl) < MIN_ROWS or np.median(np.abs(kl)) > STILL or clipped.max() > 0:
        return []
    if reward.rose or reward.spread <= EQUAL_REWARDS:
        return []
    rate = record.setting("algorithm", "learning_rate", default="the default")
    seen = f"approx_kl of the median update is {np.median(kl):.2g} nats at a learning rate of {rate}, without a clip"
    return [Diagnosis.of("rate-low", 0.68, f"{seen}; {reward}")]


def collapse(record: RunRecord) -> list[Diagnosis]:
    """Name an entropy that has collapsed without a reward that pays for it."""
    entropy, reward = trend(-record.series("train/entropy_loss")), reward_trend(record)
    if not entropy.last < COLLAPSED * entropy.first or (reward.rose and reward.last - reward.first > reward.spread):
        return []
    seen = f"it fell from {entropy.first:.3g} to {entropy.last:.3g} nats a token, and {reward}"
    return [Diagnosis.of("entropy-collapse", 0.74, seen)]


def runaway(record: RunRecord) -> list[Diagnosis]:
    """Name a divergence of nats a token without a reward that pays for it."""
    kl, reward = trend(record.series("kl/token")), reward_trend(record)
    if not kl.last > RUNAWAY or reward.rose:
        return []
    seen = f"it grew from {kl.first:.3g} to {kl.last:.3g} nats a token, and {reward}"
    entropy, bonus = trend(-record.series("train/entropy_loss")), record.setting("algorithm", "args", "ent_coef")
    if bonus is not None and bonus >= BONUS and entropy.change > 0:
        grown = f"the entropy from {entropy.first:.3g} to {entropy.last:.3g}, with an ent_coef of {bonus}"
        return [Diagnosis.of("kl-runaway", 0.79, f"{seen}; {grown}")]
    return [Diagnosis.of("kl-runaway", 0.73, seen)]


def _has_critic(record: RunRecord) -> bool:
    return record.setting("algorithm", "advantage", default="gae") == "gae"


def dominates(record: RunRecord) -> list[Diagnosis]:
    """Name a value loss that is far larger than the policy's, on layers that both train."""
    losses = record.series("train/value_loss")
    is_shared = record.setting("model", "critic", default="shared") == "shared"
    if len(losses) < 2 or not _has_critic(record) or not is_shared or record.setting("model", "value_norm"):
        return []
    share = record.setting("algorithm", "args", "vf_coef", default=VF_COEF) * float(np.median(losses))
    if share <= DOMINATES:
        return []
    seen = f"vf_coef times the value loss is {share:.3g} in the median update, and advantages have deviation 1"
    return [Diagnosis.of("critic-dominates", 0.8, seen)]


def useless(record: RunRecord) -> list[Diagnosis]:
    """Name a critic that never learns, or one that explains nothing of the returns while the reward does not rise."""
    explained, spreads = record.series("train/explained_variance"), record.series("episode/reward_std")
    if len(explained) < MIN_ROWS or not _has_critic(record):
        return []
    if len(spreads) and np.median(spreads) <= EQUAL_REWARDS:  # equal rewards have nothing to explain
        return []
    reward, last = reward_trend(record), float(np.median(second_half(explained)))
    if np.abs(explained).max() < UNMOVED:
        seen = f"the explained variance is 0 in all of {len(explained)} updates: values do not move"
        return [Diagnosis.of("critic-useless", 0.65, f"{seen}; {reward}")]
    if len(explained) < CRITIC_ROWS or last >= USELESS or reward.rose:
        return []
    seen = f"the explained variance is {last:.2g} in the median update of the second half"
    return [Diagnosis.of("critic-useless", 0.5, f"{seen}; {reward}")]
