"""The KL penalty: the divergence from a reference model, subtracted from rewards or added to the loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from sb3_contrib import TRPO
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from ..distributed.collectives import gather, moments
from ..distributed.sharding import placed
from ..models.interface import version_of
from ..models.pretrained import LMLike, Pretrained
from ..models.sequences import SequenceBatch
from ..policies.actor_critic import LMActorCritic
from ..policies.kl_loss import KLLoss
from ..policies.lm_policy import LMPolicy
from ..policies.reference import (
    build_reference,
    check_tokens,
    copy_of,
    divergences,
    fingerprint,
    log_probs,
    own_tensors,
    reader,
    start_of,
)
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.transitions import RolloutView
from .step import RolloutStep, sequence_buffer

Estimator: TypeAlias = Literal["k1", "k2", "k3", "exact"]
Place: TypeAlias = Literal["reward", "loss"]
# Why an estimator of the divergence does not serve as a loss: the gradient of its mean is not the mean of its gradient.
NOT_IN_LOSS = {
    "k1": "its gradient is 0 in expectation, whatever the reference",
    "k3": "its gradient is that of the divergence of the reference from the policy, KL(ref, pi)",
}
MAX_ERROR = 0.2  # the largest relative error that counts (Ziegler et al., 2019, section 2.2)


@dataclass(frozen=True)
class AdaptiveCoef:
    """A coefficient that moves the divergence of an episode towards a target (Ziegler et al., 2019, section 2.2).

    After a rollout in which n episodes ended, the coefficient is multiplied by
    1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon, where `kl` is the sum of the rollout's divergences over n.

    Args:
        init: The first coefficient, in reward per nat.
        target: The divergence to aim at, in nats per episode.
        horizon: The number of episodes over which the largest error changes the coefficient by about a fifth.

    Raises:
        ValueError: If an argument is not positive.

    Example:
        >>> from agents import AdaptiveCoef, KLPenalty
        >>> callback = KLPenalty(AdaptiveCoef(init=0.1, target=6.0, horizon=10_000))
        >>> round(AdaptiveCoef(0.1, 6.0, 100).next(0.1, kl=12.0, n_episodes=50), 3)
        0.11
    """

    init: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"Expected `{name}` to be positive, got {value}.")

    def next(self, coef: float, kl: float, n_episodes: int) -> float:
        """Return the coefficient after a rollout with a divergence of `kl` nats per episode."""
        error = float(np.clip(kl / self.target - 1, -MAX_ERROR, MAX_ERROR))
        return coef * max(1 + error * n_episodes / self.horizon, 0.0)


class KLPenalty(RolloutStep):
    """Subtracts `coef` times the divergence from a reference from the reward of every token, or adds it to the loss.

    With r = log pi(a) - log pi_ref(a) of a token a, under the policy's temperature, the divergence is estimated as
    (Schulman, 2020, "Approximating KL Divergence"):

    - "k1": r. Its mean over the policy's samples is the divergence; r of a single token may be negative (Ziegler et
      al., 2019, equation 2).
    - "k2": r^2 / 2. Never negative, and its mean is close to the divergence while that is small.
    - "k3": exp(-r) - 1 + r. Never negative, with the same mean as k1 and less variance.
    - "exact": the sum over the vocabulary of pi (log pi - log pi_ref), which does not depend on the token.

    As a reward, only k1 has the gradient of the divergence in expectation. The gradient of k3 lacks that of the reverse
    divergence, which nearly cancels it close to the reference. The exact divergence does not penalise the choice of a
    token, but only the texts that follow it. Both suit logs, and bounds on single tokens.

    With where="loss" rewards stay as they are, and the loss of each token gets `coef` times a divergence. Its gradient
    is that of the sum of KL(pi, pi_ref) at the tokens of a text, the text being fixed: it leaves out that a token leads
    to others (Tang & Munos, 2025, arXiv 2506.09477). Two estimators have that gradient: "exact", and "k2" times the
    ratio of new to old probability, which does without the reference in the update. "k1" and "k3" are refused: the
    gradient of k1 is 0 in expectation, that of k3 the gradient of KL(pi_ref, pi) (Liu et al., 2025, arXiv 2510.01555).
    The term is aggregated and weighted as the policy loss is, and is in no figure of SB3's own; `train/kl_loss` (nats a
    token) is its mean over the last update, before `coef`. See `docs/losses.md`.

    The reference is the policy at the start of its first training: with a `LoRA` the policy without its adapters, else
    a frozen copy that shares the weights that the policy keeps frozen. The divergence is computed at the end of a
    rollout, in one forward of the reference per sequence, from the log-probabilities with which the tokens were
    sampled; "exact" in the loss reads the reference again in each epoch. Until the first update it is exactly 0. The
    task reward in the logs does not include the penalty. Logged are `kl/token` (nats), `kl/sequence` (nats, of
    sequences that ended), `kl/penalty` (reward per token) and `kl/coef`.

    With the advantages "grpo", "grpo_mean" and "rloo" a penalty of rewards is no part of the scores that a group
    compares. The advantage of each token loses `coef` times the divergence from that token to the end of the
    text, less the group's mean (see `penalty_advantages`); the group's deviation does not divide it. GRPO as published
    has k3 in the loss instead, token by token (Shao et al., 2024, equations 3 and 4), and RLOO subtracts the divergence
    from the score before the comparison (Ahmadian et al., 2024): with "rloo" and k1 the expected gradient is the same
    as there. With "grpo", where scores are divided by the deviation of their group, `coef` is in deviations per nat.

    Alone, with a teacher as the reference, it is on-policy distillation: `KLPenalty(1.0, reference="teacher")`, with
    `gamma=0.0`, `vf_coef=0.0` and the reward "zero" (docs/losses.md).

    It needs a `SequenceRolloutBuffer`. A checkpoint keeps the coefficient and the reference; of one that was given by
    name it keeps a fingerprint, and resuming loads the name again. A file written by `model.save` keeps neither, and
    training a loaded model raises unless `reference` is given or the policy has adapters.

    Args:
        coef: The penalty, in reward (or loss) per nat, or an `AdaptiveCoef`. 0.01 to 0.1 is usual.
        reference: Another reference than the policy's start: a name or path, a config or a spec as for the policy (with
            the same tokenizer), a live model, which is frozen, or another policy's `lm`, which is copied.
        estimator: "k1", "k2", "k3" or "exact".
        clip: The largest absolute divergence of one token, in nats; None for no bound.
        where: "reward" or "loss".

    Raises:
        ValueError: If an argument is out of range, or an estimator has another gradient in the loss. When attached, if
            the model is already trained and its start is not known, if a checkpoint has another reference than the one
            given, if a reference given by name has another token for one of the policy's ids, or if the term does not
            fit the algorithm or sharded weights.

    Example:
        >>> from agents import KLPenalty
        >>> callback = KLPenalty(0.02)  # model.learn(100_000, callback=callback)
    """

    key = "KLPenalty"

    def __init__(
        self,
        coef: float | AdaptiveCoef,
        reference: LMActorCritic | LMLike | None = None,
        estimator: Estimator = "k1",
        clip: float | None = None,
        where: Place = "reward",
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.controller = coef if isinstance(coef, AdaptiveCoef) else None
        self.coef = coef.init if isinstance(coef, AdaptiveCoef) else coef
        if self.coef < 0:
            raise ValueError(f"Expected `coef` to be 0 or more, got {coef}.")
        if estimator not in get_args(Estimator):
            raise ValueError(f"Expected `estimator` to be one of {list(get_args(Estimator))}, got {estimator!r}.")
        if clip is not None and not clip > 0:
            raise ValueError(f"Expected `clip` to be positive or None, got {clip}.")
        if where not in get_args(Place):
            raise ValueError(f"Expected `where` to be one of {list(get_args(Place))}, got {where!r}.")
        if where == "loss" and estimator in NOT_IN_LOSS:
            raise ValueError(
                f"Expected estimator='exact' or 'k2' with where='loss', got {estimator!r}: {NOT_IN_LOSS[estimator]}."
            )
        if where == "loss" and clip is not None:
            raise ValueError(f"Expected clip=None with where='loss', got {clip}: a clipped divergence has no gradient.")
        self.estimator, self.clip, self.where = estimator, clip, where
        is_spec = reference is not None and not isinstance(reference, LMActorCritic)
        self.spec = cast("LMLike", reference) if is_spec else None
        self.reference = copy_of(reference) if isinstance(reference, LMActorCritic) else None
        self._fingerprint: str | None = None
        self.loss: KLLoss | None = None  # set when attached, with where="loss"
        self._start: int | None = None  # the version of the policy's weights at which they equal the reference's

    def prepare(self, model: BaseAlgorithm) -> None:
        """Build the reference, or make it from the policy as it is now, unless there is a reference already."""
        self.algorithm = model
        self.policy = cast("LMPolicy", model.policy).lm
        env = model.get_env()
        if self.spec is not None and env is not None:
            check_tokens(self.spec, env.get_attr("tokenizer", 0)[0])
        if self.reference is None and self.spec is not None:
            assert model.observation_space.shape is not None
            self.reference = build_reference(self.spec, self.policy, model.observation_space.shape[0] - 1)
        # The step of an earlier call of `learn` has the reference of the policy's start.
        for step in sequence_buffer(model).before_returns:
            if isinstance(step, KLPenalty) and self.reference is None:
                self.reference, self._start = step.reference, step._start
        if self.reference is None:
            self.reference = start_of(self.policy)
            is_start = model._n_updates == 0 or self.reference is self.policy
            if not is_start and self.key not in sequence_buffer(model).saved_steps:
                self.reference = None
                raise ValueError(
                    "Expected the reference of a model that is already trained, since its start is gone: pass "
                    "KLPenalty(coef, reference=policy.lm) with a policy that holds it, or resume from a checkpoint."
                )
            self._start = version_of(self.policy.parameters()) if model._n_updates == 0 else None
        self.reference.sampling = self.policy.sampling
        self.loss = self._loss(model) if self.where == "loss" else None

    def _loss(self, model: BaseAlgorithm) -> KLLoss:
        if isinstance(model, TRPO):
            raise ValueError(
                "Expected where='reward' of KLPenalty with TRPO, got 'loss': its line search compares the loss alone."
            )
        if self.estimator == "k2":
            return KLLoss(None)
        if self.policy.shards is not None:
            raise ValueError(
                "Expected estimator='k2' of KLPenalty in the loss with sharded weights, got 'exact', which would "
                "gather the reference for each part of each minibatch."
            )
        assert self.reference is not None, "set before"
        return KLLoss(partial(reader, self.reference, self.policy))

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Add the penalty to `buffer.penalties`, or prepare its term of the loss."""
        view = buffer.view()
        kl = self._divergence(buffer, view)  # (N,), in nats
        if self.loss is not None:
            self.loss.coef, buffer.kl_loss = self.coef, self.loss
        else:
            kl = self._clipped(kl)
            buffer.penalties[view.steps, view.lanes] += self.coef * kl
        self._log(kl, view.steps, view.lanes, buffer)
        if self.controller is not None:
            own = float(kl.sum()), sum(segment.is_finished for segment in buffer.segments)
            # The sums over all processes give all of them the same coefficient.
            total, n_episodes = map(sum, zip(*gather("the divergence", own), strict=True))
            if n_episodes > 0:
                self.coef = self.controller.next(self.coef, total / n_episodes, int(n_episodes))

    def penalties(self, batch: SequenceBatch, actions: Tensor, sampled: np.ndarray) -> np.ndarray:
        """Return what a rollout's rewards would lose at N transitions, (N,), with the present coefficient.

        With where="loss" that is 0. Nothing is logged, and the coefficient stays as it is.

        Args:
            batch: The sequences, with N transitions.
            actions: The tokens taken, (N,).
            sampled: The log-probabilities with which the policy sampled them, (N,), in nats.
        """
        assert self.reference is not None, "set when attached"
        if self.where == "loss":
            return np.zeros(len(batch), dtype=np.float32)
        if self.estimator == "exact":
            return self.coef * self._clipped(divergences(self.reference, self.policy, batch).cpu().numpy())
        reference = log_probs(self.reference, self.policy, batch, actions).cpu().numpy()  # (N,)
        return self.coef * self._clipped(estimate(torch.as_tensor(sampled - reference), self.estimator).numpy())

    def _clipped(self, kl: np.ndarray) -> np.ndarray:
        return kl if self.clip is None else kl.clip(-self.clip, self.clip)

    def _divergence(self, buffer: SequenceRolloutBuffer, view: RolloutView) -> np.ndarray:
        assert self.reference is not None, "set when attached"
        if self.algorithm._n_updates == 0 and self._start == version_of(self.policy.parameters()):
            # Two forwards of equal weights would differ by rounding, a few 1e-7 nats.
            buffer.reference_log_probs[view.steps, view.lanes] = buffer.log_probs[view.steps, view.lanes]
            return np.zeros(len(view.steps), dtype=np.float32)
        if self.estimator == "exact":
            return divergences(self.reference, self.policy, view.batch).cpu().numpy()
        reference = log_probs(self.reference, self.policy, view.batch, view.actions).cpu().numpy()  # (N,)
        buffer.reference_log_probs[view.steps, view.lanes] = reference
        policy = buffer.log_probs[view.steps, view.lanes]  # (N,), by the weights that sampled
        return estimate(torch.as_tensor(policy - reference), self.estimator).numpy()

    def _log(self, kl: np.ndarray, steps: np.ndarray, lanes: np.ndarray, buffer: SequenceRolloutBuffer) -> None:
        by_step = np.zeros_like(buffer.rewards)  # (T, B)
        by_step[steps, lanes] = kl
        per_segment = [by_step[s.start : s.end, s.lane].sum() for s in buffer.segments if s.is_finished]
        logger = self.algorithm.logger
        logger.record("kl/token", float(kl.mean()))
        n_ended, mean_of_ended, _ = moments("the divergence of episodes", np.array(per_segment))  # of all processes
        if n_ended:
            logger.record("kl/sequence", mean_of_ended)
        logger.record("kl/coef", self.coef)
        if self.estimator != "exact":  # which reads whole distributions, not the sampled tokens
            logger.record("kl/reference_nll", -float(buffer.reference_log_probs[steps, lanes].mean()))
        if self.loss is None:
            logger.record("kl/penalty", float(self.coef * kl.mean()))
        elif (mean := self.loss.mean()) is not None:
            logger.record("train/kl_loss", mean)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the weights of the reference that the policy does not hold, and the coefficient.

        Of a reference that was given by name there is a fingerprint in place of the weights, which may be those of a
        teacher many times the policy's size. Where weights are sharded, each process knows a part alone.
        """
        assert self.reference is not None, "set when attached"
        is_named = isinstance(self.spec, (str, PathLike, Pretrained)) and self.policy.shards is None
        if not is_named:
            return own_tensors(self.reference, self.policy), {"coef": self.coef}
        return {}, {"coef": self.coef, "fingerprint": self._hash()}

    def load_state_dict(self, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Restore the reference and the coefficient.

        Raises:
            ValueError: If the saved reference has other weights than this one.
        """
        assert self.reference is not None, "set when attached"
        self.coef = meta["coef"]
        if "fingerprint" in meta:
            if self.policy.shards is None and self._hash() != meta["fingerprint"]:
                raise ValueError(
                    "Expected the `reference` that was saved, got another: its weights differ. Pass the same name, "
                    "with the same files."
                )
            return
        own = own_tensors(self.reference, self.policy)
        unlike = sorted(own.keys() ^ tensors.keys())
        unlike += sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
        if unlike:
            raise ValueError(
                f"Expected the `reference` that was saved, got another: {unlike[:5]} differ. Pass the same."
            )
        for name, weight in own.items():
            weight.data.copy_(placed(tensors[name], weight))

    def _hash(self) -> str:
        """Return the fingerprint of the reference, which is computed once, since a reference never changes."""
        assert self.reference is not None, "set when attached"
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.reference)
        return self._fingerprint


def estimate(log_ratio: Tensor, estimator: Estimator) -> Tensor:
    """Return the estimated divergence of each token, (N,), in nats.

    Args:
        log_ratio: log pi(a) - log pi_ref(a) of each token, (N,), in nats.
        estimator: "k1", "k2" or "k3"; see `KLPenalty`.
    """
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio if estimator == "k3" else log_ratio
