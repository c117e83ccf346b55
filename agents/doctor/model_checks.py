"""The doctor's checks that run the model: ratio, padding, cache, head, dropout, divergence and weights."""

from __future__ import annotations

import torch

from ..models.backbone import Backbone
from ..models.probe import PROBE_LOGIT, PROBE_TOLERANCE
from ..models.sampling import TokenDistribution
from ..policies.rounding import tolerance
from ..rollout.buffer import SequenceRolloutBuffer
from ..steps.kl_penalty import KLPenalty
from .exactness import differences_by_padding, largest
from .report import Finding
from .sample import Sample, Subject


@torch.no_grad()
def check_ratio(subject: Subject, sample: Sample) -> list[Finding]:
    """Compare the rollout's log-probabilities and values with the update's, before any step (invariant A1)."""
    policy, limit = subject.policy, tolerance(subject.policy.lm)
    # Not `set_training_mode(True)`, as SB3 `ppo.PPO.train` calls it: that also begins an update, and drops caches.
    policy.train(True)
    values, log_probs, _ = policy.evaluate_actions(sample.view.batch, sample.view.actions)
    policy.set_training_mode(False)
    off = largest(log_probs - sample.log_probs.to(log_probs))  # of (N,) nats
    value_off = largest(values.flatten() - sample.values.to(values)) / max(1.0, float(sample.values.abs().max()))
    measured = f"largest |log ratio| {off:.1e}, values {value_off:.1e} apart, over {len(log_probs)} tokens"
    if off <= limit and value_off <= limit:
        return [Finding("ratio", "ok", measured)]
    return [
        Finding(
            "ratio",
            "failed",
            f"{measured}; at most {limit:.0e} is rounding",
            "Rollout and update do not compute the same distribution: dropout, a cache that is not exact, or something "
            "in the model that depends on training mode or on the other rows.",
            "See the other checks for which; policy_kwargs=dict(cache=False) rules the cache out.",
        )
    ]


@torch.no_grad()
def check_padding(subject: Subject, sample: Sample) -> list[Finding]:
    """Evaluate each sequence alone and padded to the longest: both must agree (invariant B1)."""
    lm, batch, actions = subject.policy.lm, sample.view.batch, sample.view.actions
    off = max(differences_by_padding(lm, batch, actions))
    padding = batch.tokens.shape[1] - int(batch.lengths.min())
    measured = f"log-probabilities and values at most {off:.1e} apart, alone and with up to {padding} padded columns"
    if off <= tolerance(lm):
        return [Finding("padding", "ok", measured)]
    return [
        Finding(
            "padding",
            "failed",
            measured,
            "The model looks at columns to the right of a token: it is not causal, or normalises over the sequence.",
            "Use a causal language model, or switch bidirectional attention off in its config.",
        )
    ]


@torch.no_grad()
def check_cache(subject: Subject, sample: Sample) -> list[Finding]:
    """Compare logits decoded from cached keys and values with full forwards, across restarts (invariants A7, A9)."""
    lm = subject.policy.lm
    if not lm.use_cache:
        why = "switched off" if lm.rollout_cache is not None else "the model does not decode exactly from a cache"
        return [Finding("cache", "skipped", f"no cache ({why}): rollout time grows with the square of the length")]
    subject.policy.set_training_mode(False)
    cache, off = lm.backbone.new_cache(), 0.0
    for observations in sample.observations:
        rows = lm._unpack(observations)
        logits = (lm._read_last(lm.backbone, rows, kind)[1] for kind in (cache, None))  # (B, V) each
        cached, full = (TokenDistribution(part).log_probabilities for part in logits)  # finite where logits are -inf
        off = max(off, largest(cached - full))
    measured = f"log-probabilities at most {off:.1e} apart from full forwards, over {len(sample.observations)} steps"
    # Ten times the usual tolerance: the maximum is over the whole vocabulary, and improbable tokens round the most.
    if off <= 10 * tolerance(lm):
        return [Finding("cache", "ok", measured)]
    return [
        Finding(
            "cache",
            "failed",
            measured,
            "The model computes other logits from cached keys and values than from a whole text.",
            "Pass policy_kwargs=dict(cache=False): slower, and exact.",
        )
    ]


@torch.no_grad()
def check_head(subject: Subject, sample: Sample) -> list[Finding]:
    """Compare hidden states times output embeddings with the model's own logits, for small and large logits."""
    backbone = subject.policy.backbone
    if not backbone.head_is_linear:
        return [Finding("head", "ok", "logits are not linear in the hidden states: the full forward is used")]
    off = max(_head_difference(backbone, 1.0), _head_difference(backbone, PROBE_LOGIT))
    measured = f"output embeddings and the model's logits {off:.1e} apart, of the largest logit"
    if off <= PROBE_TOLERANCE:
        return [Finding("head", "ok", measured)]
    return [
        Finding(
            "head",
            "failed",
            measured,
            "The model scales, shifts or caps its logits, which was not noticed when the policy was built.",
            "Build the policy anew after the last change of the model's config or head.",
        )
    ]


def _head_difference(backbone: Backbone, largest_logit: float) -> float:
    """Return the largest difference on a probe whose largest logit is scaled to a size, relative to that size.

    A soft cap (Gemma 2) bends large logits only, and is invisible on the small ones of an untrained model.
    """
    ids, *positions = backbone.probe_inputs()  # (rows, cols), and an encoder-decoder's prompt length
    head = backbone.model.get_output_embeddings()
    now = float(backbone(ids, *positions)[1].abs().max())
    scale = largest_logit / max(now, 1e-6)  # 1e-6: the logits of a fresh model may all be 0
    hook = head.register_forward_hook(lambda module, inputs, output: output * scale)
    try:
        expected, got = backbone.plain_logits(ids, positions[-1])[-1:], backbone(ids, *positions)[1]
    finally:
        hook.remove()
    return largest(got - expected) / max(1.0, float(expected.abs().max()))


@torch.no_grad()
def check_dropout(subject: Subject, sample: Sample) -> list[Finding]:
    """Run the update's forward twice in training mode, where dropout would make them differ (invariant A6)."""
    policy = subject.policy
    policy.train(True)  # dropout is random in this mode only
    first, second = (policy.evaluate_actions(sample.view.batch, sample.view.actions)[:2] for _ in range(2))
    policy.set_training_mode(False)
    off = max(largest(a - b) for a, b in zip(first, second, strict=True))
    measured = f"two forwards in training mode {off:.1e} apart"
    if off <= tolerance(policy.lm):
        return [Finding("dropout", "ok", measured)]
    return [
        Finding(
            "dropout",
            "failed",
            measured,
            "The model draws random numbers in every mode: dropout that ignores `training`, or noise of its own.",
            "Set the probability of that noise to 0 in the model, before the policy is built.",
        )
    ]


@torch.no_grad()
def check_divergence(subject: Subject, sample: Sample) -> list[Finding]:
    """Measure the policy's divergence from its reference, which is 0 before training (invariant C2)."""
    buffer = None if subject.model is None else subject.model.rollout_buffer
    steps = buffer.before_returns if isinstance(buffer, SequenceRolloutBuffer) else []
    references = [step.reference for step in steps if isinstance(step, KLPenalty)]
    reference = references[-1] if references else None
    lm = reference if reference is not None else subject.policy.lm
    log_ratio = sample.log_probs - lm.log_probs(sample.view.batch, sample.view.actions).to(sample.log_probs)
    whose = "the KLPenalty's reference" if reference is not None else "a reference equal to it"
    measured = f"{float(log_ratio.mean()):.1e} nats a token from {whose}, at most {largest(log_ratio):.1e}"
    # SB3 `ppo.PPO.train` adds its epochs to `_n_updates`: a trained policy may be far from its reference.
    is_trained = subject.model is not None and subject.model._n_updates > 0
    if largest(log_ratio) <= tolerance(subject.policy.lm) or (reference is not None and is_trained):
        return [Finding("divergence", "ok", measured)]
    return [
        Finding(
            "divergence",
            "failed",
            measured,
            "The reference is another model than the one that the policy starts from, or scores text differently.",
            "Give KLPenalty no reference, so that it copies the policy; see the check of the ratio.",
        )
    ]


def check_weights(subject: Subject, sample: Sample) -> list[Finding]:
    """Check that some weights of the model are trained, in float32, and that the optimizer holds all of them."""
    policy = subject.policy
    trainable = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    in_model = [weight for weight in policy.lm.backbone.parameters() if weight.requires_grad]
    small = [f"{name} ({weight.dtype})" for name, weight in trainable.items() if weight.element_size() < 4]  # bytes
    held = {id(weight) for group in policy.optimizer.param_groups for weight in group["params"]}
    missing = [name for name, weight in trainable.items() if id(weight) not in held]
    total = sum(weight.numel() for weight in policy.parameters())
    measured = f"{sum(weight.numel() for weight in trainable.values()):,} of {total:,} weights are trained"
    findings = []
    if not in_model:
        cause = "Every weight of the language model is frozen: only the value head learns."
        cure = "Set requires_grad in the spec's build(), or pass policy_kwargs=dict(train=LoRA())."
        findings.append(Finding("weights", "failed", measured, cause, cure))
    if small:
        cause = f"Steps of a small learning rate round to nothing in 16 bits: {', '.join(small[:3])}."
        cure = "Load with dtype=torch.float32 and pass policy_kwargs=dict(autocast='bfloat16') for speed."
        findings.append(Finding("weights", "failed", measured, cause, cure))
    if missing:
        cause = f"{len(missing)} trainable weights are not in the optimizer: {', '.join(missing[:3])}."
        cure = "Change the model before the policy is built (a spec with build()), not after."
        findings.append(Finding("weights", "failed", measured, cause, cure))
    return findings or [Finding("weights", "ok", measured)]
