"""Optimizers with a learning rate factor for each weight, and their state in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.sharding import placed
from ..models.critic import TrunkCritic, ValueHead

HEAD_WIDTH = 128  # the most features of a value head that learns at the policy's rate; measured, see docs/losses.md


def scaled_optimizer(
    optimizer_class: type[torch.optim.Optimizer], scales: Mapping[nn.Parameter, float], lr: float, **kwargs: Any
) -> torch.optim.Optimizer:
    """Build an optimizer whose steps multiply the learning rate by a factor for each weight.

    SB3 `utils.update_learning_rate` writes the scheduled rate into all groups before each update. Therefore a group's
    `lr` is multiplied by its factor, `lr_scale`, before a step and restored after it. Weights with the same factor
    share a group, in their order in `scales`. State and groups are saved and loaded as for any optimizer.

    Args:
        optimizer_class: An optimizer of torch.
        scales: The factor of each weight, above 0.
        lr: The learning rate until the first update.
        **kwargs: Other arguments of the class.

    Raises:
        ValueError: If a factor is not above 0.

    Example:
        >>> import torch
        >>> from agents.policies.optimizers import scaled_optimizer
        >>> slow, fast = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(()))
        >>> optimizer = scaled_optimizer(torch.optim.SGD, {slow: 1.0, fast: 10.0}, lr=0.5)
        >>> (slow + fast).backward()
        >>> optimizer.step()
        >>> slow.item(), fast.item(), [group["lr"] for group in optimizer.param_groups]
        (-0.5, -5.0, [0.5, 0.5])
    """
    groups: dict[float, list[nn.Parameter]] = {}  # by factor; torch keeps settings per group, not per weight
    for weight, scale in scales.items():
        if not scale > 0:
            raise ValueError(f"Expected factors of the learning rate above 0, got {scale}.")
        groups.setdefault(float(scale), []).append(weight)
    param_groups = [{"params": weights, "lr_scale": scale} for scale, weights in groups.items()]
    optimizer = optimizer_class(param_groups, lr=lr, **kwargs)  # type: ignore[call-arg]
    rates: list[Any] = []  # the groups' unscaled rates, while a step runs

    def scale_rates(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        rates[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group["lr_scale"]

    def restore_rates(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    optimizer.register_step_pre_hook(scale_rates)
    optimizer.register_step_post_hook(restore_rates)
    return optimizer


def usual_arguments(optimizer_class: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """Return the arguments of an optimizer that gets none: for AdamW no weight decay, and the fused kernel."""
    # One kernel in place of a dozen passes over the weights saves a tenth of a small model's update.
    return {"weight_decay": 0.0, "fused": True} if optimizer_class is torch.optim.AdamW else {}


def usual_head_scale(critic: nn.Module) -> float:
    """Return the factor of a value head's learning rate: 1 up to 128 features, and 128 / H for more features H.

    A step of Adam moves each weight by about the learning rate, and a value, the sum of H weighted features, by up to H
    times that. At the rate of adapters, 1e-3, the head of 576 features would move values by more than returns differ.
    With the factor the largest step is the same at all widths, as in Yang et al., 2022 (arXiv 2203.03466, table 3).
    """
    return min(1.0, HEAD_WIDTH / critic.linear.in_features) if isinstance(critic, ValueHead) else 1.0


def learning_rate_scales(
    weights: Iterable[nn.Parameter], critic: nn.Module, critic_lr_scale: float, head_lr_scale: float | None
) -> dict[nn.Parameter, float]:
    """Return the factor of the learning rate of each weight that is trained.

    Args:
        weights: The weights of the policy.
        critic: The critic among them: a value head, or a trunk with one.
        critic_lr_scale: The factor of all weights of the critic.
        head_lr_scale: A further factor of the weights of its value head; None is `usual_head_scale`.
    """
    head_scale = usual_head_scale(critic) if head_lr_scale is None else head_lr_scale
    scales = {weight: 1.0 for weight in weights if weight.requires_grad}
    in_trunk = set(critic.trunk.parameters()) if isinstance(critic, TrunkCritic) else set()
    for weight in scales.keys() & set(critic.parameters()):
        scales[weight] = critic_lr_scale if weight in in_trunk else critic_lr_scale * head_scale
    return scales


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return an optimizer's state: tensors, named as "0.exp_avg" by the weight's index, and groups, which fit JSON.

    Raises:
        TypeError: If the state holds something that is neither a number nor a tensor.
    """
    state = optimizer.state_dict()
    tensors = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if value is not None and not isinstance(value, (Tensor, int, float)):
                raise TypeError(f"Expected an optimizer that keeps tensors and numbers, got {name}={value!r:.80}.")
            if value is not None:
                tensors[f"{index}.{name}"] = torch.as_tensor(value)
    return tensors, state["param_groups"]


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[Any]) -> None:
    """Give an optimizer of the same weights the state that `optimizer_state` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        weight = weights[int(index)]
        # A tensor of the weight's shape is sharded like the weight; a scalar, such as the count of steps, is not.
        state.setdefault(int(index), {})[name] = placed(tensor, weight) if tensor.shape == weight.shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})
