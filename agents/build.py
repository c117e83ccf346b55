"""From an environment and a language model to an algorithm, with the settings that suit text."""

from __future__ import annotations

from typing import Any, TypeVar

import gymnasium as gym
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from .backbone import LMLike
from .buffers import SequenceRolloutBuffer
from .doctor import check as examine
from .policies import LMPolicy
from .rollout_steps import LateScores
from .vec_env import TextVecEnv

Algorithm = TypeVar("Algorithm", bound=OnPolicyAlgorithm)
SEQUENCES_A_MINIBATCH = 8


def make_agent(
    env: gym.Env[Any, Any],
    lm: LMLike,
    n_envs: int = 64,
    algorithm: type[Algorithm] = PPO,  # type: ignore[assignment]
    policy_kwargs: dict[str, Any] | None = None,
    rollout_buffer_kwargs: dict[str, Any] | None = None,
    check: bool = False,
    **algorithm_kwargs: Any,
) -> Algorithm:
    """Build an unmodified Stable-Baselines3 algorithm that trains `lm` on `env`.

    It is `algorithm(LMPolicy, TextVecEnv(env, n_envs), rollout_buffer_class=SequenceRolloutBuffer, ...)` with these
    settings, each of which a keyword argument overrides (SB3's PPO default in brackets):

    ===================== ====================== ==============================================================
    setting               here                   why
    ===================== ====================== ==============================================================
    gamma                 1.0 (0.99)             a score at the end counts fully for every token
    gae_lambda            0.95 (0.95)            as SB3; 1.0 for A2C there
    learning_rate         1e-5 (3e-4)            a pretrained model forgets at more
    n_steps               max_new_tokens (2048)  a lane completes an episode in a rollout
    batch_size            1/8 of a rollout (64)  transitions; whole sequences, 8 or more in each minibatch
    n_epochs              4 (10)                 the policy must stay near the one that sampled
    normalize_advantage   False (True)           the buffer normalises over the whole rollout instead
    vf_coef               0.1 (0.5)              the value loss shares the trunk with the policy
    max_grad_norm         1.0 (0.5)              usual for language models
    use_rms_prop (A2C)    False (True)           so that the policy's AdamW stays
    ===================== ====================== ==============================================================

    Args:
        env: A `TextEnv`, a subclass, or what `gym.make` made of one.
        lm: The language model: a name or path, a config, or a spec such as `Pretrained(name)`.
        n_envs: How many episodes run side by side.
        algorithm: The class: PPO or A2C.
        policy_kwargs: Other arguments of `LMPolicy`.
        rollout_buffer_kwargs: Other arguments of `SequenceRolloutBuffer`; `normalize_advantage=True` unless given.
        check: Whether to have the doctor examine the model (see `agents.doctor.check`): it warns of what may go badly
            and changes nothing.
        **algorithm_kwargs: Arguments of the algorithm: `seed`, `ent_coef`, `tensorboard_log`, `device`, ...

    Returns:
        The algorithm, ready for `learn`. With `score_at="rollout_end"` the `LateScores` step is attached.

    Raises:
        DoctorError: With `check=True`, where training would be wrong; it names what failed, why and the cure.

    Example:
        >>> from agents import make_agent
        >>> from textenv import CharTokenizer, TextEnv
        >>> from transformers import GPT2Config
        >>> env = TextEnv(["a"], CharTokenizer(), reward=lambda prompt, preds, done: 0.0, max_new_tokens=4)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40)
        >>> make_agent(env, config, n_envs=8, device="cpu").n_steps
        4
    """
    vec_env = TextVecEnv(env, n_envs)
    settings: dict[str, Any] = {
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "learning_rate": 1e-5,
        "n_steps": vec_env.env.rules.max_new_tokens,
        "vf_coef": 0.1,
        "max_grad_norm": 1.0,
        "normalize_advantage": False,
    }
    if issubclass(algorithm, A2C):
        settings["use_rms_prop"] = False
    else:
        n_steps = algorithm_kwargs.get("n_steps", settings["n_steps"])
        settings.update(n_epochs=4, batch_size=_batch_size(n_steps, n_envs))
    model = algorithm(
        LMPolicy,
        vec_env,
        rollout_buffer_class=SequenceRolloutBuffer,
        rollout_buffer_kwargs={"normalize_advantage": True, **(rollout_buffer_kwargs or {})},
        policy_kwargs={"lm": lm, **(policy_kwargs or {})},
        **{**settings, **algorithm_kwargs},
    )
    if vec_env.env.score_at == "rollout_end":
        LateScores().attach(model)
    if check:
        report = examine(model)
        report.raise_if_failed()
        report.warn()
    return model


def _batch_size(n_steps: int, n_envs: int) -> int:
    """Return an eighth of the rollout, or the smallest larger share that leaves enough sequences in a minibatch."""
    size = n_steps * n_envs
    for n_minibatches in (8, 4, 2):
        if size % n_minibatches == 0 and n_envs >= SEQUENCES_A_MINIBATCH * n_minibatches:
            return size // n_minibatches
    return size
