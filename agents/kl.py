"""A penalty on leaving a reference model, in the reward."""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from .actor_critic import LMActorCritic
from .buffers import SequenceRolloutBuffer, step_name
from .policies import LMPolicy
from .rollout_steps import RolloutStep, sequence_buffer


class KLPenalty(RolloutStep):
    """Subtracts `coef * (log pi(a) - log pi_ref(a))` from the reward of every token that the policy wrote.

    The reference is a frozen copy of the policy as it is when training first starts; its mean over the policy's own
    samples is the Kullback-Leibler divergence from it (the estimator k1; Ziegler et al., 2019, equation 2). It is
    computed at the end of a rollout, in one forward a sequence, under the policy's temperature. The task reward in
    the logs stays as it is; the penalty is logged under `kl/`.

    It needs a `SequenceRolloutBuffer`. A checkpoint keeps the reference; a file written by `model.save` does not,
    and training a loaded model raises unless it is given.

    Args:
        coef: The penalty, in reward per nat. 0.01 to 0.1 is usual.
        reference: The reference where it is not the start: another policy's `lm`.

    Raises:
        ValueError: If `coef` is negative, or the model is already trained and its start is not known.

    Example:
        >>> from agents import KLPenalty
        >>> callback = KLPenalty(0.02)  # model.learn(100_000, callback=callback)
    """

    def __init__(self, coef: float, reference: LMActorCritic | None = None, verbose: int = 0) -> None:
        super().__init__(verbose)
        if coef < 0:
            raise ValueError(f"Expected `coef` to be 0 or more, got {coef}.")
        self.coef = coef
        self.reference = None if reference is None else _frozen(reference)

    def prepare(self, model: BaseAlgorithm) -> None:
        """Copy the policy, unless there is a reference already."""
        self.algorithm = model
        for step in sequence_buffer(model).before_returns:  # an earlier call of learn() has the start
            if isinstance(step, KLPenalty) and self.reference is None:
                self.reference = step.reference
        if self.reference is None:
            if model._n_updates > 0 and step_name(self) not in sequence_buffer(model).saved_steps:
                raise ValueError(
                    "Expected the reference of a model that is already trained, since its start is gone: pass "
                    "KLPenalty(coef, reference=policy.lm) with a policy that holds it, or resume from a checkpoint."
                )
            self.reference = _frozen(cast("LMPolicy", model.policy).lm)

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Subtract the penalty from `buffer.rewards`."""
        assert self.reference is not None, "set when attached"
        view = buffer.view()
        with torch.no_grad():
            reference = self.reference.log_probs(view.batch, view.actions).cpu().numpy()  # (N,)
        log_ratio = buffer.log_probs[view.steps, view.lanes] - reference  # k1
        buffer.rewards[view.steps, view.lanes] -= self.coef * log_ratio
        self._log(log_ratio, view.steps, view.lanes, buffer)

    def _log(self, log_ratio: np.ndarray, steps: np.ndarray, lanes: np.ndarray, buffer: SequenceRolloutBuffer) -> None:
        sums = np.zeros_like(buffer.rewards)
        sums[steps, lanes] = log_ratio
        per_segment = [sums[s.start : s.end, s.lane].sum() for s in buffer.segments if s.is_finished]
        logger = self.algorithm.logger
        logger.record("kl/token", float(log_ratio.mean()))
        if per_segment:
            logger.record("kl/sequence", float(np.mean(per_segment)))
        logger.record("kl/penalty", float(self.coef * log_ratio.mean()))
        logger.record("kl/coef", self.coef)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the reference's weights and the coefficient."""
        assert self.reference is not None, "set when attached"
        return self._weights(self.reference), {"coef": self.coef}

    def load_state_dict(self, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Take back the reference and the coefficient."""
        assert self.reference is not None, "set when attached"
        for name, weight in self._weights(self.reference).items():
            weight.data.copy_(tensors[name])
        self.coef = meta["coef"]

    @staticmethod
    def _weights(reference: LMActorCritic) -> dict[str, Any]:
        """Return each weight and buffer once: tied ones, of which `state_dict` has two, under their first name."""
        return {**dict(reference.named_parameters()), **dict(reference.named_buffers())}


def _frozen(lm: LMActorCritic) -> LMActorCritic:
    lm.drop_caches()
    return copy.deepcopy(lm, {id(lm.critic): nn.Identity()}).requires_grad_(False).eval()  # it values nothing
