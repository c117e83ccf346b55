"""Tiny random language models of every tested family, and the policies and algorithms built from them."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CallbackList
from transformers import (
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from agents import LMPolicy, RolloutStep, SequenceRolloutBuffer, TextVecEnv
from textenv import CharTokenizer, TextEnv
from textenv.episodes.rules import PADDING, SEPARATOR

N_TOKENS = len(CharTokenizer())  # 33
N_ROWS = 40  # embedding rows: those beyond the tokenizer's are padding
N_POSITIONS = 128
WINDOW = 4
LENGTH = 64  # columns of an observation

COMMON = {"vocab_size": N_ROWS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT = {"n_layer": 2, "n_embd": 16, "n_head": 2}
LAYERS = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
GATED = {**LAYERS, "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": N_POSITIONS}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gpt2": (GPT2Config, {**GPT, "n_positions": N_POSITIONS}),
    "llama": (LlamaConfig, GATED),
    "qwen2": (Qwen2Config, GATED),
    "gpt_neox": (GPTNeoXConfig, {**LAYERS, "intermediate_size": 32, "max_position_embeddings": N_POSITIONS}),
    "opt": (
        OPTConfig,
        {**LAYERS, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": N_POSITIONS, "init_std": 0.3},
    ),
    "bloom": (BloomConfig, GPT | {"hidden_size": 16}),
    "mistral": (MistralConfig, {**GATED, "sliding_window": WINDOW}),
    "gemma3": (
        Gemma3TextConfig,
        {
            **GATED,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    # Their logits are more than hidden states times output embeddings: gemma2 adds a soft cap, cohere a scale.
    "gemma2": (Gemma2Config, {**GATED, "head_dim": 8, "sliding_window": WINDOW, "final_logit_softcapping": 2.0}),
    "cohere": (CohereConfig, {**GATED, "logit_scale": 0.5}),
    # A state-space model: it has no keys and values to cache.
    "mamba": (MambaConfig, {"num_hidden_layers": 2, "hidden_size": 16, "state_size": 4}),
}
CACHED = [name for name in FAMILIES if name != "mamba"]
NON_LINEAR = ("gemma2", "cohere")


def few(values, n):
    """Return the values as test parameters: the first n in the default suite, the others in the slow one."""
    listed = list(values)
    return [*listed[:n], *(pytest.param(value, marks=pytest.mark.slow) for value in listed[n:])]


def seldom(values, n=1):
    """Return the values as test parameters: the first n in the slow suite, the others only with `pytest -m long`."""
    marks = {True: pytest.mark.slow, False: pytest.mark.long}
    return [pytest.param(value, marks=marks[i < n]) for i, value in enumerate(values)]


def tiny(family: str = "gpt2", **overrides: Any) -> PreTrainedConfig:
    """Return the config of a two-layer model with large weights, so that logits differ clearly."""
    cls, options = FAMILIES[family]
    return cls(**{"initializer_range": 0.3, **COMMON, **options, **overrides})


def tiny_mixture(**overrides: Any) -> PreTrainedConfig:
    """Return the config of a mixture of experts with a router in each of two layers."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralConfig(**{"initializer_range": 0.3, **COMMON, **GATED, **experts, **overrides})


def make_policy(config: Any = None, length: int = LENGTH, seed: int = 0, **kwargs: Any) -> LMPolicy:
    """Return a policy for observations (B, `length`), in evaluation mode and with a random value head."""
    torch.manual_seed(seed)
    space = spaces.Box(SEPARATOR, N_TOKENS - 1, (length,), np.int64)
    lm = tiny() if config is None else config
    policy = LMPolicy(space, spaces.Discrete(N_TOKENS), lambda _: 1e-3, lm=lm, **kwargs)
    policy.set_training_mode(False)
    randomise_critic(policy)
    return policy


def randomise_critic(policy: LMPolicy) -> None:
    """Randomise the value head: at its initial zero, all values would agree whatever they are read from."""
    torch.nn.init.normal_(policy.lm.critic.linear.weight, generator=torch.Generator().manual_seed(5))


def disturb(model: torch.nn.Module, scale: float = 0.05, seed: int = 0) -> None:
    """Change the trained weights, as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += scale * torch.randn(weight.shape, generator=generator)


def no_reward(prompt, preds, done):
    return 0.0


def count_a(prompt, preds, done):
    """Reward a token that depends on what was written: 1 for an "a", and the length at the end."""
    return float(preds[-1] == 1) + (0.1 * len(preds) if done else 0.0)


PROMPTS = ["a", "bcd", "efghijklm", "no", "pqrst", "u"]


def make_ppo(
    config: Any = None,
    prompts: Any = PROMPTS,
    n_envs: int = 4,
    max_new_tokens: int = 6,
    n_steps: int = 12,
    reward: Any = count_a,
    env: TextEnv | None = None,
    rollout_buffer_class: Any = SequenceRolloutBuffer,
    seed: int = 0,
    algorithm: Any = PPO,
    policy_kwargs: dict[str, Any] | None = None,
    policy_class: Any = LMPolicy,
    **kwargs: Any,
) -> Any:
    """Return PPO (or another algorithm) on a tiny model; by default SGD with one minibatch per rollout."""
    env = env or TextEnv(prompts, CharTokenizer(), reward=reward, max_new_tokens=max_new_tokens)
    if algorithm is PPO:
        kwargs = {"batch_size": n_steps * n_envs, "n_epochs": 1, "normalize_advantage": False, **kwargs}
    model = algorithm(
        policy_class,
        TextVecEnv(env, n_envs),
        n_steps=n_steps,
        rollout_buffer_class=rollout_buffer_class,
        policy_kwargs={
            "lm": tiny() if config is None else config,
            "optimizer_class": torch.optim.SGD,
            **(policy_kwargs or {}),
        },
        seed=seed,
        device="cpu",
        **kwargs,
    )
    randomise_critic(model.policy)
    return model


def collect(model: Any, *callbacks: Any) -> Any:
    """Collect one rollout as `OnPolicyAlgorithm.learn` of SB3 does, without training; return the buffer."""
    _, callback = model._setup_learn(model.n_steps * model.n_envs, CallbackList(list(callbacks)))
    callback.on_training_start({}, {})
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer


def log_ratios(model: Any, buffer: SequenceRolloutBuffer) -> np.ndarray:
    """Return log pi_now - log pi_sampled of every transition of the rollout, (N,)."""
    view = buffer.view()
    with torch.no_grad():
        now = model.policy.lm.log_probs(view.batch, view.actions).numpy()
    return now - buffer.log_probs[view.steps, view.lanes]


class CheckRatio(RolloutStep):
    """Keeps the largest |log ratio| of each rollout before any optimizer step; by invariant A1 it is zero."""

    key = "CheckRatio"

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[float] = []

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        self.largest.append(float(np.abs(log_ratios(self.model, buffer)).max()))


def observe(rows: list[tuple[list[int], list[int]]], length: int = LENGTH) -> torch.Tensor:
    """Return observations (B, length) of pairs of prompt tokens and tokens written since."""
    observations = np.full((len(rows), length), PADDING, dtype=np.int64)
    for observation, (prompt, since) in zip(observations, rows):
        tokens = [*prompt, SEPARATOR, *since]
        observation[: len(tokens)] = tokens
    return torch.as_tensor(observations)
