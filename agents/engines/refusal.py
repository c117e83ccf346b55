"""The reasons why an engine cannot write the rollouts of a model."""

from __future__ import annotations

from typing import cast

from stable_baselines3.common.base_class import BaseAlgorithm

from ..policies.flat import FlatLMPolicy
from ..policies.lm_policy import LMPolicy
from ..steps.step import text_vec_env


def refusal(model: BaseAlgorithm) -> str | None:
    """Return the reason why an engine cannot write the rollouts of a model; None where it can."""
    policy, env = cast("LMPolicy", model.policy), text_vec_env(model.get_env()).env
    sampling = policy.lm.sampling
    if sampling.has_support or sampling.repetition_penalty != 1:
        return (
            f"Expected a temperature alone with EngineRollouts, got {sampling}: an engine does not answer which tokens "
            "it has left out or penalised, so the policy could not score under the same distribution."
        )
    if env.masks:
        return (
            "Expected an env without `mask` with EngineRollouts, got one with: the engine writes many tokens ahead, "
            "and what a mask allows depends on each of them."
        )
    if policy.backbone.is_encoder_decoder:
        return (
            "Expected a causal language model with EngineRollouts, got an encoder-decoder: a request is one row of "
            "tokens, and does not say which of them the encoder reads."
        )
    if isinstance(policy, FlatLMPolicy):
        return (
            "Expected PPO or A2C with EngineRollouts, got TRPO: it bounds its steps by a divergence over states, which "
            "would be those of the engine, unweighted."
        )
    if policy.lm.shards is not None:
        return (
            "Expected whole weights in each process with EngineRollouts, got sharded ones: an engine is sent weights "
            "by the processes that hold all of them. Leave `shard` out."
        )
    if vars(model).get("normalize_advantage"):
        return (
            "Expected normalize_advantage=False of the algorithm with EngineRollouts, got True, which subtracts a mean "
            "after the weights and is biased: pass rollout_buffer_kwargs=dict(normalize_advantage=True)."
        )
    return None
