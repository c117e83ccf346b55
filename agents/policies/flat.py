"""The policy for TRPO: a language model whose trainable weights are one parameter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache, PreTrainedModel

from ..distributed.world import world
from ..models.backbone import Backbone
from ..models.critic import CriticSpec, SharedCritic
from ..models.interface import BackendSpec
from ..models.prompt_layout import SharedPrompts
from ..models.sampling import TokenDistribution
from ..models.sequences import SequenceBatch
from .lm_policy import LMPolicy


class FlatBackbone(Backbone):
    """A `Backbone` whose trainable weights are views of one vector; frozen ones are buffers.

    The vector is the only parameter. Before each forward, its views are put where the modules look for their weights,
    so that a write to the vector, or another tensor as its `data`, takes effect at once. Tied weights are in it once.

    Args:
        model: The model; its weights become views of the vector.
        vocab_size: As in `Backbone`.
        n_positions: As in `Backbone`.

    Raises:
        ValueError: If the model has no trainable weights, or has them on several devices or in several types.
    """

    _is_flat = False  # not yet while `Backbone.__init__` checks the model
    _in_graph = False  # whether the views now in place have a graph, which leads gradients to the vector

    def __init__(self, model: PreTrainedModel, vocab_size: int, n_positions: int) -> None:
        super().__init__(model, vocab_size, n_positions)
        holders = _holders(model)
        trainable = [weight for weight in holders if weight.requires_grad]
        if len({(weight.device, weight.dtype) for weight in trainable}) != 1:
            raise ValueError(
                f"Expected trainable weights of one type on one device, got {len(trainable)} weights in "
                f"{ {(str(weight.device), weight.dtype) for weight in trainable} }: TRPO needs them as one vector."
            )
        self._trainable = [holders[weight] for weight in trainable]
        self._frozen = [holders[weight] for weight in holders if not weight.requires_grad]
        self._shapes = [weight.shape for weight in trainable]
        for weight in holders:
            for module, name in holders[weight]:
                del module._parameters[name]
                if not weight.requires_grad:
                    module.register_buffer(name, weight)
        # In the trunk, where transformers `modeling_utils.PreTrainedModel.device` and `dtype` look for a parameter.
        flat = nn.Parameter(torch.cat([weight.detach().ravel() for weight in trainable]))  # (number of weights,)
        model.base_model.register_parameter("flat", flat)
        self._is_flat = True
        self._place(self._views(self.flat.detach()))

    @property
    def flat(self) -> nn.Parameter:
        """All trainable weights in one vector, (number of weights,)."""
        return self.model.base_model.get_parameter("flat")

    def read(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        with self.weights():
            return super().read(*args, **kwargs)

    def read_shared(self, shared: SharedPrompts) -> tuple[Tensor, Tensor | None]:
        with self.weights():
            return super().read_shared(shared)

    def logits(self, hidden: Tensor) -> Tensor:
        with self.weights():
            return super().logits(hidden)

    def prefill(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Cache:
        with self.weights():
            return super().prefill(ids, attention_mask, position_ids)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Give the modules views of the vector as their weights inside, with a graph if gradients are on.

        The outermost context splits the vector once for all forwards inside, so that the backward joins the gradients
        of the views once.

        Raises:
            ValueError: If the model uses gradient checkpointing, whose second forward runs in the backward pass,
                outside this context, and would find no graph to the vector.
        """
        if self._in_graph or not self._is_flat:
            yield
            return
        self._in_graph = torch.is_grad_enabled() and self.flat.requires_grad
        if self._in_graph and any(vars(module).get("gradient_checkpointing") for module in self.model.modules()):
            self._in_graph = False
            raise ValueError(
                "Expected a model without gradient checkpointing, whose second forward would miss the vector: call "
                "gradient_checkpointing_disable() on it, and lower memory with sub_sampling_factor."
            )
        try:
            if self._in_graph:
                self._place(self._views(self.flat))
            # Another tensor has become the vector's `data`. The address shows it: the views keep the old memory alive,
            # so that its address is not reused.
            elif self.flat.data_ptr() != self._placed:
                self._place(self._views(self.flat.detach()))
            yield
        finally:
            if self._in_graph:
                self._in_graph = False
                self._place(self._views(self.flat.detach()))

    @contextmanager
    def whole_model(self) -> Iterator[PreTrainedModel]:
        flat = self.model.base_model._parameters.pop("flat")
        assert flat is not None, "set at construction"
        self._place([nn.Parameter(view.clone()) for view in self._views(flat.detach())])
        try:
            yield self.model
        finally:
            self.model.base_model.register_parameter("flat", flat)
            self._place(self._views(flat.detach()))

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([shape.numel() for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def _place(self, weights: list[Tensor]) -> None:
        for holders, weight in zip(self._trainable, weights, strict=True):
            for module, name in holders:
                module._parameters.pop(name, None)
                setattr(module, name, weight)
        self._placed = weights[0].data_ptr()

    def _apply(self, fn: Any, recurse: bool = True) -> FlatBackbone:
        """Move or cast the weights; tied frozen ones stay tied."""
        super()._apply(fn, recurse)
        # torch `nn.Module._apply` replaces each buffer by itself, so that a tied one would become several.
        for (first, name), *others in self._frozen:
            for module, other in others:
                module.register_buffer(other, first.get_buffer(name))
        return self


def _holders(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Return the modules that hold each parameter, with its name there; a tied parameter has several."""
    holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                holders.setdefault(weight, []).append((module, name))
    return holders


class FlatLMPolicy(LMPolicy):
    """A causal language model as the policy of sb3-contrib's TRPO, unmodified.

    It computes as `LMPolicy` does, with two changes for Trust Region Policy Optimization (Schulman et al., 2015):

    * All trainable weights of the language model are one parameter. sb3-contrib `TRPO._compute_actor_grad` runs a
      backward pass for each parameter, and skips every parameter with "value" in its name, such as `query_key_value` of
      GPT-NeoX and BLOOM, which the value loss alone would then train. The critic's parameters stay apart: TRPO trains
      them by `optimizer` at `learning_rate`.
    * `get_distribution` attends with PyTorch's plain kernel, since the fused kernels have no second derivative.

    The critic is detached by default, since TRPO discards the gradient of the value loss by the policy's weights.

    TRPO reads the whole rollout at once and holds its log-probabilities, (N, V); `sub_sampling_factor` lowers N.
    `LMPolicy` and this class do not load each other's files; `export` writes the same folder from both.

    Args:
        observation_space: The env's.
        action_space: The env's.
        lr_schedule: Maps the remaining progress, 1 to 0, to the learning rate of the critic.
        critic: The spec of the value head.
        **kwargs: The other arguments of `LMPolicy`.

    Raises:
        ValueError: As for `LMPolicy`; also for an encoder-decoder, a `BackendSpec`, gradient checkpointing, `top_p_lag`
            and several processes.

    Example:
        >>> from agents import FlatLMPolicy
        >>> from sb3_contrib import TRPO
        >>> from textenv import CharTokenizer, TextEnv
        >>> from transformers import GPT2Config
        >>> env = TextEnv(["a"], CharTokenizer(), reward=lambda prompt, preds, done: 0.0, max_new_tokens=4)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40)
        >>> model = TRPO(FlatLMPolicy, env, n_steps=8, batch_size=8, policy_kwargs=dict(lm=config), device="cpu")
        >>> [name.split(".")[-1] for name, _ in model.policy.named_parameters()]
        ['flat', 'weight', 'bias']
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        critic: CriticSpec = SharedCritic(detach=True),  # noqa: B008  (frozen)
        **kwargs: Any,
    ) -> None:
        if kwargs.get("gradient_checkpointing"):
            raise ValueError(
                f"Expected gradient_checkpointing=False for {type(self).__name__}, got True, whose second forward "
                "would miss the vector that TRPO needs: lower memory with sub_sampling_factor."
            )
        if isinstance(kwargs.get("lm"), BackendSpec):
            raise ValueError(
                f"Expected a model of transformers for {type(self).__name__}, got {type(kwargs['lm']).__name__}: TRPO "
                "differentiates twice, which another backend may not support. Use PPO."
            )
        if kwargs.get("top_p_lag") is not None:
            raise ValueError(
                f"Expected top_p_lag=None for {type(self).__name__}, got {kwargs['top_p_lag']}: TRPO differentiates "
                "all parameters of a policy, and those of the lagged copy (NLPO) have no gradient. Use PPO."
            )
        if world() is not None:
            raise ValueError(
                f"Expected one process for {type(self).__name__}, got several: TRPO's conjugate gradients and line "
                "search bypass the averaging of gradients, so that each process would take its own step. Use PPO."
            )
        super().__init__(observation_space, action_space, lr_schedule, critic=critic, **kwargs)

    def _backbone_class(self, model: PreTrainedModel) -> type[Backbone]:
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"Expected a causal language model for {type(self).__name__}, got an encoder-decoder: TRPO's second "
                "derivatives are not supported there. Use PPO."
            )
        return FlatBackbone

    def get_distribution(self, obs: Tensor | SequenceBatch) -> TokenDistribution:  # type: ignore[override]
        """Return the distribution over the next token, (N, V), which can be differentiated twice."""
        backbone = cast("FlatBackbone", self.backbone)
        with sdpa_kernel(SDPBackend.MATH), backbone.weights():  # one split of the vector for all forwards
            return super().get_distribution(obs)
