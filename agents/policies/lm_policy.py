"""The Stable-Baselines3 policy that is a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor
from transformers import PreTrainedModel

from ..distributed.collectives import broadcast_weights, from_main
from ..distributed.gradients import SharedGradient
from ..distributed.sharding import Sharded, Shards
from ..distributed.world import world
from ..models.backbone import Backbone
from ..models.critic import CriticSpec, SharedCritic
from ..models.interface import BackendSpec
from ..models.pretrained import LMLike, as_spec, backbone_class, build_backbone
from ..models.sampling import Sampling, TokenDistribution
from ..models.sequences import SequenceBatch
from ..models.trainable import LoRA, Trainable
from .actor_critic import LMActorCritic, Step
from .optimizers import learning_rate_scales, scaled_optimizer, usual_arguments
from .pretrained_critic import PretrainedCritic, begin_critic, build_critic
from .surrogates import SurrogateFunction, SurrogateLoss, check_loss
from .tensor_notes import ALLOWED, READ_BY, TERMINAL, read_observations
from .wrappers import calling_algorithm, check_observations, check_wrappers, is_rollouts_end, keep_spec

# Maps observations (B, L) to actions (B,) and their log-probabilities (B,).
NextTokens: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


class ForeignBackendError(TypeError):
    """The error of code that needs a model of transformers when the policy has another language model."""


class LMPolicy(ActorCriticPolicy):
    """A language model, causal or encoder-decoder, as the policy of the unmodified PPO or A2C of Stable-Baselines3.

    The observation is the prompt and the tokens so far, (L,) (see `textenv.TextEnv`); the action is the next token. In
    a rollout the policy decodes with cached keys and values; in the update it reads each sequence of a
    `SequenceRolloutBuffer` once. With the stock `RolloutBuffer` each token is a sequence of its own: correct, but slow.

    Sampling draws from generators of the policy, seeded from torch's when it is built, so that evaluation and sample
    tables do not change training. Dropout and other noise are off throughout, since the probabilities of the rollout
    and of the update must be the same. Only parameters with `requires_grad` are optimised.

    Pass the arguments below by `policy_kwargs`. `model.save` pickles them, and `PPO.load` builds the policy from them:
    a name is then looked up again; `Pretrained(name)`, a config and a live model, of which the config is kept, are not.

    Args:
        observation_space: The env's.
        action_space: The env's; its size V is that of the tokenizer's vocabulary.
        lr_schedule: Maps the remaining progress, 1 to 0, to the learning rate.
        lm: The language model: a name or path, a transformers config (fresh weights), a live model (trained itself, not
            a copy), a spec such as `Pretrained(name)`, or the `BackendSpec` of a model that is not transformers'. The
            encoder of an encoder-decoder (T5, BART) reads the prompt, once per episode, and the decoder all later
            tokens, replies of a multi-turn environment included.
        critic: The spec of the critic: `SharedCritic`, `SeparateCritic`, `RewardModelCritic` or `PretrainedCritic`.
        temperature: Divides the logits, in the rollout and in the update; for this and the next five see `Sampling`.
        top_k: Sample from the `top_k` most probable tokens.
        top_p: Sample from the most probable tokens whose probabilities sum up to this.
        min_p: Sample from tokens of at least this share of the largest probability.
        repetition_penalty: Lower the logits of tokens that are already in the row.
        top_p_lag: Choose the tokens of `top_p` by a copy of the policy, renewed every `top_p_lag` updates (NLPO).
        autocast: "bfloat16" runs the model in 16 bits; weights stay float32.
        cache: Decode with cached keys and values; False reads the whole prefix for every token.
        value_norm: "popart" or "norm": the critic predicts returns in units of their running deviation (see
            `ValueNorm`); needs a `SequenceRolloutBuffer`. For sequences of the buffer, `evaluate_actions` and
            `predict_values` then return values in these units, like the minibatches; all others are in units of reward.
        critic_lr_scale: Multiplies the learning rate of the critic: its value head, and its trunk where it has one.
        head_lr_scale: Multiplies the learning rate of the value head, besides `critic_lr_scale`; None is 1 up to 128
            features, and 128 / H for more features H (see `usual_head_scale`).
        train: The part of the language model that is trained, besides the value head: "all", "head", `LastLayers(n)` or
            `LoRA(...)`. The rest is frozen.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, about a third more time.
        surrogate: The weights of the policy gradient in place of PPO's clipped ratios: `ClipHigher()`, `DualClip()`,
            `CISPO()`, `GSPO()`, `SoftGate()` or a function (see `Surrogate`), for PPO and MaskablePPO.
        shard: `Sharded()` spreads weights, gradients and optimizer over the processes of a job that has several.
        optimizer_class: AdamW by default; SB3's A2C passes RMSprop unless it has `use_rms_prop=False`.
        optimizer_kwargs: Its arguments except the learning rate; by default no weight decay and AdamW's fused kernel.
        use_sde: Must be False: it is for continuous actions.
        net_arch: Not used: rl_zoo3's search for hyper-parameters passes it to every policy.
        activation_fn: Not used, like `net_arch`.

    Raises:
        ValueError: If the model does not fit the env's vocabulary or length, has trainable weights of 16 bits, or
            cannot be trained exactly, as a probe shows of models that are not causal (see docs/models.md); if `train`
            or `gradient_checkpointing` is given with a `BackendSpec`; or if the loss lacks `surrogate`'s gradient.

    Example:
        >>> from agents import LMPolicy
        >>> from stable_baselines3 import PPO
        >>> from textenv import CharTokenizer, TextEnv
        >>> from transformers import GPT2Config
        >>> env = TextEnv(["a"], CharTokenizer(), reward=lambda prompt, preds, done: 0.0, max_new_tokens=4)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40)
        >>> model = PPO(LMPolicy, env, n_steps=8, batch_size=8, policy_kwargs=dict(lm=config), device="cpu")
        >>> observation, _ = env.reset(seed=0)
        >>> int(model.predict(observation)[0]) < 33
        True
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        lm: LMLike,
        critic: CriticSpec = SharedCritic(),  # noqa: B008  (frozen)
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        top_p_lag: int | None = None,
        autocast: str | None = None,
        cache: bool = True,
        value_norm: str | None = None,
        critic_lr_scale: float = 1.0,
        head_lr_scale: float | None = None,
        train: Trainable = "all",
        gradient_checkpointing: bool = False,
        surrogate: SurrogateFunction | None = None,
        shard: Sharded | None = None,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        use_sde: bool = False,
        net_arch: Any = None,
        activation_fn: Any = None,
    ) -> None:
        self.lm_kwargs: dict[str, Any] = {
            "lm": as_spec(lm),
            "critic": critic,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "top_p_lag": top_p_lag,
            "autocast": autocast,
            "cache": cache,
            "value_norm": value_norm,
            "train": train,
            "gradient_checkpointing": gradient_checkpointing,
            "surrogate": surrogate,
            "shard": shard,
        }
        self.lr_scales: dict[str, Any] = {"critic_lr_scale": critic_lr_scale, "head_lr_scale": head_lr_scale}
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            use_sde=use_sde,
            optimizer_class=optimizer_class,
            optimizer_kwargs=usual_arguments(optimizer_class) if optimizer_kwargs is None else optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        """Build language model, critic and optimizer in place of SB3's networks."""
        algorithm = calling_algorithm()
        if algorithm is not None:
            check_wrappers(algorithm.env)
            keep_spec(algorithm, self.lm_kwargs["lm"])
            check_loss(algorithm, self.lm_kwargs["surrogate"])
        kwargs = dict(self.lm_kwargs)
        self.surrogate = SurrogateLoss(kwargs.pop("surrogate"))
        assert isinstance(self.action_space, spaces.Discrete) and self.observation_space.shape is not None
        lm, train, checkpointing = (kwargs.pop(name) for name in ("lm", "train", "gradient_checkpointing"))
        if isinstance(lm, BackendSpec) and (train != "all" or checkpointing):
            raise ValueError(
                f"Expected neither `train` nor `gradient_checkpointing` with {type(lm).__name__}, which decides "
                f"itself which weights are trained, got {train!r:.80} and {checkpointing}."
            )
        n_positions = self.observation_space.shape[0] - 1  # the separator is no token
        here, shard, spec = world(), kwargs.pop("shard"), kwargs.pop("critic")
        shard = None if here is None else shard or Sharded.asked_for()
        # Adapters begin in the type of the base, and a pretrained critic compares the states of a probe.
        as_stored = shard is not None and not isinstance(train, LoRA) and not isinstance(spec, PretrainedCritic)
        backbone = build_backbone(
            lm, train, int(self.action_space.n), n_positions, checkpointing, self._backbone_class, as_stored
        )
        critic = build_critic(spec, backbone, n_positions)
        sampling = Sampling(**{field.name: kwargs.pop(field.name) for field in fields(Sampling)})
        self.lm = LMActorCritic(backbone, critic, sampling, **kwargs)
        begin_critic(spec, self.lm, algorithm)
        # SB3 `base_class.set_random_seed` has seeded torch's generator: the same seed gives the same run.
        seed = int(torch.randint(2**31, ()))
        self.shared = None if here is None else SharedGradient(self.lm)
        if here is not None:  # all processes start from the same weights, and each samples from its own seed
            broadcast_weights(self.lm)
            seed = from_main("a seed", seed) + 2 * here.rank  # 2: each process has two generators
            if shard is not None:  # before the optimizer is built, which then keeps the state of the shards alone
                self.lm.shards = Shards(self.lm, shard, as_stored)
        # The terminal observations of a step, (K, L), and their values, (K, 1).
        self._terminal_values: tuple[np.ndarray, Tensor] | None = None
        self._next_tokens: NextTokens | None = None  # see `take_tokens_from`
        self.generator = torch.Generator().manual_seed(seed)
        self.predict_generator = torch.Generator().manual_seed(seed + 1)
        scales = learning_rate_scales(self.parameters(), critic, **self.lr_scales)
        self.optimizer = scaled_optimizer(self.optimizer_class, scales, lr_schedule(1), **self.optimizer_kwargs)
        actor_critic = self.lm
        # A fused step does not raise `Tensor._version`, by which caches notice other writes to the weights.
        self.optimizer.register_step_post_hook(lambda *_: actor_critic.drop_caches())

    @property
    def backbone(self) -> Backbone:
        """The language model that `lm` trains, as transformers' model inside a `Backbone`.

        Raises:
            ForeignBackendError: If the model is another `LanguageModel`, which only `lm.backbone` returns.
        """
        if not isinstance(self.lm.backbone, Backbone):
            raise ForeignBackendError(
                f"Expected a model of transformers, got {type(self.lm.backbone).__name__}: use `policy.lm.backbone`, "
                "which has the members of `LanguageModel`."
            )
        return self.lm.backbone

    def _backbone_class(self, model: PreTrainedModel) -> type[Backbone]:
        return backbone_class(model)

    @property
    def lstm_actor(self) -> NoReturn:
        """Refuse RecurrentPPO: sb3-contrib `RecurrentPPO._setup_model` reads this first."""
        raise TypeError(
            f"Expected an algorithm without recurrent state for {type(self).__name__}, got RecurrentPPO: a language "
            "model sees the whole text in each observation and has nothing to carry between steps. Use PPO."
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """Return the arguments from which SB3 `policies.BaseModel.load` builds the policy again."""
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
            **self.lm_kwargs,
            **self.lr_scales,
        }

    @property
    def device(self) -> torch.device:
        """The device of the forwards; shards of the weights may wait on the host."""
        return super().device if self.lm.shards is None else self.lm.shards.device

    def set_training_mode(self, mode: bool) -> None:
        """Switch to training or evaluation; before training, cached keys and values are dropped (invariant A8).

        SB3 calls it with True at the start of each `train`, and with False at the start of each `collect_rollouts` and
        `predict`. Sharded weights are gathered for evaluation, so that all processes must call it.

        Raises:
            ValueError: If the observations of a rollout that begins are not those of a `TextEnv`.
        """
        algorithm = None if mode else calling_algorithm()
        if algorithm is not None:
            check_observations(algorithm.env, algorithm._last_obs)
            self.surrogate.record(algorithm)
        self.lm.settle_values()  # a rollout that was broken off has left values deferred
        if mode and not self.training:
            self.lm.begin_update()
        if mode:
            self.lm.drop_caches()
            self._terminal_values = None
        self.train(mode)
        if self.lm.shards is not None:
            self.lm.shards.bring(not mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights; raise RuntimeError if they are sharded."""
        self._check_whole()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights and drop all cached keys and values; raise RuntimeError if the weights are sharded."""
        self._check_whole()
        self.lm.drop_caches()
        self._terminal_values = None
        return super().load_state_dict(*args, **kwargs)

    def _check_whole(self) -> None:
        if self.lm.shards is not None:
            cure = "use save_checkpoint and load_checkpoint in place of save and load, and export for the model."
            raise RuntimeError(f"Expected weights that are whole in each process, got sharded ones: {cure}")

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return actions (B,), values (B, 1) and log-probabilities (B,) of observations (B, L).

        Values and log-probabilities carry notes for the buffer (see `tensor_notes`). While a `SequenceRolloutBuffer`
        collects, the values of a critic with a trunk of its own are zeros, since the buffer computes them later from
        whole sequences. If another engine writes the rollout, the values of any critic are zeros, and the
        log-probabilities are the engine's.
        """
        return self._step(obs, deterministic)

    def _step(self, obs: Tensor, deterministic: bool, allowed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if self._next_tokens is None:
            step = self.lm.act(obs, deterministic, self.generator, self.lm.rollout_cache, allowed)
        else:
            actions, log_probs = self._next_tokens(obs)
            step = Step(actions, torch.zeros_like(log_probs), log_probs, None)
        if step.allowed is not None:
            ALLOWED.write(step.log_probs, step.allowed)
        values = step.values[:, None]  # (B, 1)
        READ_BY.write(values, self.lm)
        return step.actions, values, step.log_probs

    def take_tokens_from(self, next_tokens: NextTokens) -> None:
        """Have `forward` return another engine's tokens, and zeros as values, until `sample_itself` is called."""
        self._next_tokens = next_tokens

    def sample_itself(self) -> None:
        """Have `forward` sample from the policy again."""
        self._next_tokens = None

    @property
    def samples_itself(self) -> bool:
        """Whether `forward` samples from the policy: not while another engine writes a rollout."""
        return self._next_tokens is None

    @contextmanager
    def rollout_set_aside(self) -> Iterator[None]:
        """Have `forward` sample from the policy inside, with empty caches; restore the running rollout afterwards."""
        lm = self.lm
        rollout = (lm.rollout_cache, lm.predict_cache, self._terminal_values, self._next_tokens)
        lm.rollout_cache, lm.predict_cache = lm.backbone.new_cache(), lm.backbone.new_cache()
        self._next_tokens = None
        try:
            yield
        finally:
            lm.rollout_cache, lm.predict_cache, self._terminal_values, self._next_tokens = rollout

    def _predict(self, observation: Tensor, deterministic: bool = False) -> Tensor:  # type: ignore[override]
        """Return actions (B,) for `predict`, by a cache and a generator that rollouts do not use."""
        return self._choose(observation, deterministic)

    def _choose(self, obs: Tensor, deterministic: bool, allowed: Tensor | None = None) -> Tensor:
        cache = self.lm.predict_cache
        return self.lm.act(obs, deterministic, self.predict_generator, cache, allowed, with_values=False).actions

    def predict_values(self, obs: Tensor | SequenceBatch) -> Tensor:  # type: ignore[override]
        """Return the values of observations (B, L), (B, 1), or of all transitions of sequences, (N, 1).

        SB3 `on_policy_algorithm.collect_rollouts` asks for the values of terminal observations one by one. The first
        call values all terminal observations of the step in one forward, and the others read its result. An episode
        that has just begun when a rollout ends gets 0 unread, since SB3 multiplies its value by 0.
        """
        if isinstance(obs, SequenceBatch):
            return self.lm.sequence_values(obs)[:, None]
        terminal = TERMINAL.read(obs)
        if terminal is None or torch.is_grad_enabled():
            return self.lm.values(obs, only_begun=terminal is None and is_rollouts_end())[:, None]
        if self._terminal_values is None or self._terminal_values[0] is not terminal.siblings:
            values = self.lm.values(torch.as_tensor(terminal.siblings, device=self.device))[:, None]
            self._terminal_values = (terminal.siblings, values)
        return self._terminal_values[1][terminal.index : terminal.index + 1]

    def evaluate_actions(self, obs: Tensor | SequenceBatch, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Return values (N, 1), log-probabilities (N,) and entropies (N,) of actions (N,) under the current weights.

        With a `surrogate`, the log-probabilities of the buffer's minibatches have the gradient that its loss needs, and
        with a `KLPenalty` in the loss also that of its term.
        """
        if torch.is_grad_enabled():  # an update follows, perhaps in a loop that does not call `set_training_mode`
            self.lm.drop_caches()
        if self.lm.value_norm is not None and not isinstance(obs, SequenceBatch):
            raise ValueError(
                "Expected rollout_buffer_class=SequenceRolloutBuffer with `value_norm`: the minibatches of the stock "
                "buffer hold returns in units of reward."
            )
        batch, actions = SequenceBatch.of(obs), actions.long().flatten()  # (N,) or (N, 1) to (N,)
        if batch.stand_in is not None:
            values, log_probs, entropy = batch.stand_in
            return values[:, None], log_probs, entropy
        # In several processes, minibatches of the buffer have a `share`.
        evaluate = self.shared.evaluate if self.shared is not None and batch.share is not None else self.lm.evaluate
        values, log_probs, entropy, *_ = results = evaluate(batch, actions)
        log_probs = self.surrogate.log_probs(batch, log_probs)
        return values[:, None], log_probs if batch.term is None else batch.term.added_to(results, log_probs), entropy

    def get_distribution(self, obs: Tensor | SequenceBatch) -> TokenDistribution:  # type: ignore[override]
        """Return the distribution over the next token."""
        return self.lm.distribution(SequenceBatch.of(obs))

    def obs_to_tensor(self, observation: np.ndarray | dict[str, np.ndarray]) -> tuple[Tensor, bool]:
        """Return observations as a tensor, (B, L), and whether they were given as a batch.

        Raises:
            ValueError: If they are not token ids.
        """
        return read_observations(observation, self.device)
