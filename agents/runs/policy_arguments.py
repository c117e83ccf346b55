"""The arguments of a policy that a run's configuration asks for: its trained part, its critic and its sampling."""

from __future__ import annotations

from typing import Any

from ..configuration.config import ModelConfig
from ..distributed.sharding import Sharded
from ..errors import CommandError
from ..models.critic import CriticSpec, RewardModelCritic, SeparateCritic, SharedCritic
from ..models.pretrained import Pretrained
from ..models.trainable import LastLayers, LoRA, Trainable
from ..policies.pretrained_critic import PretrainedCritic


def policy_arguments(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of `LMPolicy` for the model's part of a configuration."""
    copied = ("value_norm", "critic_lr_scale", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    train: dict[str, Trainable] = {
        "last_layers": LastLayers(model.last_layers),
        "lora": LoRA(r=model.lora_r, alpha=model.lora_alpha),
    }
    return {
        **{name: getattr(model, name) for name in (*copied, "top_p_lag", "autocast", "gradient_checkpointing")},
        "train": train.get(model.train, model.train),
        "critic": _critic(model),
    }


def shards_of(model: ModelConfig, device: str) -> Sharded | None:
    """Return the way in which a configuration spreads the weights over several processes; None for copies.

    Args:
        model: The model's part of the configuration.
        device: The device of the algorithm.
    """
    if model.shard is None:
        return None
    return Sharded(gather=model.shard != "lock_step", offload=model.shard == "offloaded", device=device)


def _critic(model: ModelConfig) -> CriticSpec:
    if model.critic in ("shared", "detached"):
        return SharedCritic(detach=model.critic == "detached")
    if model.critic_model is None:
        raise CommandError(f"Expected --model.critic_model NAME with the critic {model.critic!r}.")
    name = model.critic_model
    if model.critic == "separate":
        return SeparateCritic(Pretrained(name))
    if model.critic == "reward_model":
        return RewardModelCritic(name, normalise=model.critic_normalise)
    return PretrainedCritic(name)
