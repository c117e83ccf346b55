"""The construction of an algorithm from an environment and a language model, with settings that suit text."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import gymnasium as gym
from sb3_contrib import TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from .doctor.examine import check as examine
from .models.pretrained import LMLike
from .policies.flat import FlatLMPolicy
from .policies.lm_policy import LMPolicy
from .policies.maskable import MaskableLMPolicy
from .policies.surrogates import NO_CLIP
from .recipe_parts import recipe_parts
from .rollout.advantages import GROUPED
from .rollout.buffer import SequenceRolloutBuffer
from .rollout.maskable_buffer import MaskableSequenceRolloutBuffer
from .rollout.vec_env import TextVecEnv
from .steps.data_parallel import DataParallel
from .steps.sample_groups import SampleGroups
from .steps.scores import DropEpisodes, LateScores
from .steps.without_critic import WithoutCritic

Algorithm = TypeVar("Algorithm", bound=OnPolicyAlgorithm)
SEQUENCES_A_MINIBATCH = 8  # twice the fewest that learn reliably (`minibatches.MIN_SEQUENCES`)
# All four derive from SB3's `OnPolicyAlgorithm` directly, so that a class is a subclass of one of them at most.
POLICIES: dict[type[OnPolicyAlgorithm], type[LMPolicy]] = {
    PPO: LMPolicy,
    A2C: LMPolicy,
    TRPO: FlatLMPolicy,
    MaskablePPO: MaskableLMPolicy,
}


def make_agent(
    env: gym.Env[Any, Any],
    lm: LMLike,
    n_envs: int = 64,
    algorithm: type[Algorithm] = PPO,  # type: ignore[assignment]
    policy_kwargs: dict[str, Any] | None = None,
    rollout_buffer_kwargs: dict[str, Any] | None = None,
    recipe: str | None = None,
    check: bool = False,
    **algorithm_kwargs: Any,
) -> Algorithm:
    """Build an unmodified algorithm of Stable-Baselines3 or sb3-contrib that trains `lm` on `env`.

    It is `algorithm(LMPolicy, TextVecEnv(env, n_envs), rollout_buffer_class=SequenceRolloutBuffer, ...)`, for TRPO with
    `FlatLMPolicy`, and with these settings, each of which a keyword argument overrides (SB3's PPO default in brackets):

    ===================== ====================== ==============================================================
    setting               here                   why
    ===================== ====================== ==============================================================
    gamma                 1.0 (0.99)             a score at the end counts fully for every token
    gae_lambda            0.95 (0.95)            less variance than 1.0, which SB3 has for A2C
    learning_rate         1e-5 (3e-4)            a pretrained model forgets at more
    n_steps               max_new_tokens (2048)  each lane completes an episode in a rollout
    batch_size            1/8 of a rollout (64)  transitions; whole sequences, 8 or more in each minibatch
    n_epochs              4 (10)                 the policy must stay near the one that sampled
    normalize_advantage   False (True)           the buffer normalises over the whole rollout instead
    vf_coef               0.1 (0.5)              the value loss shares the trunk with the policy; 0 without critic
    max_grad_norm         1.0 (0.5)              usual for language models
    clip_range            0.2 (0.2)              1e9 with a `surrogate`, which has its own bounds
    use_rms_prop (A2C)    False (True)           so that the policy's AdamW stays
    learning_rate (TRPO)  1e-3 (1e-3)            of the value head alone; `target_kl` bounds the policy's steps
    ===================== ====================== ==============================================================

    TRPO has no n_epochs, vf_coef and max_grad_norm. If `torchrun` or `accelerate launch` has started several processes,
    they train one agent together: see `DataParallel`.

    Args:
        env: A `TextEnv`, a subclass, or the result of `gym.make` for one.
        lm: The language model: a name, the path of a folder or of a GGUF file, a config, a live model of transformers,
            which is trained itself, or a spec such as `Pretrained(name)`.
        n_envs: The number of episodes that run side by side, in all processes together.
        algorithm: The class: PPO, A2C, sb3-contrib's TRPO or MaskablePPO, or a subclass; it decides policy and buffer.
        policy_kwargs: Other arguments of `LMPolicy`.
        rollout_buffer_kwargs: Other arguments of `SequenceRolloutBuffer`, such as `advantage`, `critic_lambda` and
            `lambda_alpha` (docs/losses.md compares them). Unless given, `normalize_advantage` is True only with the
            advantage "gae", and `complete_episodes` only with an env of `samples_per_prompt`; the `aggregation_length`
            of "constant" is the env's `max_new_tokens`.
        recipe: The name of a published algorithm: "ppo", "grpo", "dr_grpo", "rloo", "reinforce++", "dapo", "gspo",
            "cispo" or "vapo". Its settings (`agents.RECIPES`, with the keys of a configuration) become the defaults of
            `policy_kwargs` and `rollout_buffer_kwargs`. KL penalty, dynamic sampling and critic warm-up are attached as
            steps, which steps of the same class in `learn(callback=...)` replace. Recipes that compare samples need an
            env of `samples_per_prompt`.
        check: Whether to have the doctor examine the model (see `agents.doctor.check`); it warns of likely problems
            and changes nothing.
        **algorithm_kwargs: Arguments of the algorithm: `seed`, `ent_coef`, `tensorboard_log`, `device`, ...

    Returns:
        The algorithm, ready for `learn`. With `score_at="rollout_end"` the `LateScores` step is attached, with
        `samples_per_prompt` the step `SampleGroups`, and `DropEpisodes` where the env's reward may drop some.

    Raises:
        ValueError: If the algorithm is none of these or their subclasses; if MaskablePPO gets an env without masks, or
            another algorithm an env with masks; or if the recipe is unknown, or compares samples that the env lacks.
        DoctorError: With `check=True`, where training would be wrong; it names the check that failed, and the cure.

    Example:
        >>> from agents import make_agent
        >>> from textenv import CharTokenizer, TextEnv
        >>> from transformers import GPT2Config
        >>> env = TextEnv(["a"], CharTokenizer(), reward=lambda prompt, preds, done: 0.0, max_new_tokens=4)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40)
        >>> make_agent(env, config, n_envs=8, device="cpu").n_steps
        4
    """
    policy_class = _policy_class(algorithm)
    vec_env = TextVecEnv(env, n_envs)
    is_maskable = issubclass(algorithm, MaskablePPO)
    # Only MaskablePPO asks an env for its masks (sb3-contrib `ppo_mask.MaskablePPO.collect_rollouts`).
    if is_maskable and not vec_env.env.masks:
        raise ValueError("Expected an env with `mask` for MaskablePPO, got one without `mask`: use PPO.")
    if vec_env.env.masks and not is_maskable:
        raise ValueError(
            f"Expected algorithm=MaskablePPO (sb3-contrib) for an env with `mask`, got {algorithm.__name__}, which "
            "would sample what the mask forbids."
        )
    parts = recipe_parts(recipe)
    if vec_env.env.samples_per_prompt == 1 < parts.samples_per_prompt:
        raise ValueError(
            f"Expected an env of several samples per prompt with the recipe {recipe!r}, got one of 1: give the env "
            f"samples_per_prompt={parts.samples_per_prompt}."
        )
    policy_kwargs = {"lm": lm, **parts.policy, **(policy_kwargs or {})}
    buffer_kwargs = buffer_settings(vec_env, {**parts.buffer, **(rollout_buffer_kwargs or {})})
    given = {"policy_kwargs": policy_kwargs, "rollout_buffer_kwargs": buffer_kwargs, **algorithm_kwargs}
    settings = {**settings_for(algorithm, vec_env, given), **algorithm_kwargs}
    with warnings.catch_warnings():
        # SB3 `ppo.PPO.__init__` compares `batch_size`, that of all processes, with the rollout of this process.
        if vec_env.world is not None:
            warnings.filterwarnings("ignore", "You have specified a mini-batch size")
        model = algorithm(
            policy_class,
            vec_env,
            rollout_buffer_class=MaskableSequenceRolloutBuffer if is_maskable else SequenceRolloutBuffer,
            rollout_buffer_kwargs=buffer_kwargs,
            policy_kwargs=policy_kwargs,
            **settings,
        )
    attach_steps(model, vec_env)
    for step in parts.steps:
        step.attach(model)
    if check:
        report = examine(model)
        report.raise_if_failed()
        report.warn()
    return model


def usual_learning_rate(algorithm: type) -> float:
    """Return the learning rate of `make_agent` for an algorithm; TRPO uses it for the value head alone."""
    return 1e-3 if issubclass(algorithm, TRPO) else 1e-5


def settings_for(algorithm: type, vec_env: TextVecEnv, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `make_agent` for an algorithm.

    Args:
        algorithm: The class of the algorithm.
        vec_env: The env that it trains on.
        given: The caller's settings; `batch_size` depends on the `n_steps` among them, `clip_range` on the `surrogate`
            among its `policy_kwargs`, and `vf_coef` on the `advantage` among its `rollout_buffer_kwargs`.
    """
    settings: dict[str, Any] = {
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "learning_rate": usual_learning_rate(algorithm),
        "n_steps": vec_env.env.rules.max_new_tokens,  # steps of each lane: the longest episode fits
        "normalize_advantage": False,  # SB3 `ppo.PPO.train` would normalise each minibatch by itself
    }
    if not issubclass(algorithm, TRPO):
        advantage = (given.get("rollout_buffer_kwargs") or {}).get("advantage", "gae")
        has_critic = advantage == "gae" or callable(advantage)  # a function may read the critic's values
        settings.update(vf_coef=0.1 if has_critic else 0.0, max_grad_norm=1.0)
    # A2C trains on the whole rollout at once, without `batch_size`; its RMSprop would replace the policy's optimizer
    # (SB3 `a2c.A2C.__init__` and `train`).
    if issubclass(algorithm, A2C):
        settings["use_rms_prop"] = False
    else:
        # `num_envs` counts the lanes of this process, `batch_size` the transitions of all processes.
        n_envs = vec_env.num_envs * (1 if vec_env.world is None else vec_env.world.size)
        settings["batch_size"] = _batch_size(given.get("n_steps", settings["n_steps"]), n_envs)
    if issubclass(algorithm, (PPO, MaskablePPO)):
        settings["n_epochs"] = 4
        if (given.get("policy_kwargs") or {}).get("surrogate") is not None:
            settings["clip_range"] = NO_CLIP
    return settings


def buffer_settings(vec_env: TextVecEnv, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of the rollout buffer: the given ones, and the settings of `make_agent` for the others."""
    settings = {"advantage": "gae", "complete_episodes": vec_env.env.samples_per_prompt > 1, **(given or {})}
    settings.setdefault("normalize_advantage", settings["advantage"] == "gae")
    if settings.get("aggregation") == "constant":
        settings.setdefault("aggregation_length", vec_env.env.rules.max_new_tokens)
    return settings


def attach_steps(model: OnPolicyAlgorithm, vec_env: TextVecEnv) -> None:
    """Attach the steps that the env needs to a model's buffer, and check that the model can read the env's texts."""
    DataParallel().attach(model)  # does nothing where there is one process
    cast("LMPolicy", model.policy).lm.backbone.check_length(vec_env.env.max_prompt_tokens, vec_env.env.rules.room)
    buffer = cast("SequenceRolloutBuffer", model.rollout_buffer)
    if vec_env.env.samples_per_prompt > 1 or buffer.advantage in GROUPED:
        SampleGroups().attach(model)
    elif buffer.advantage != "gae":
        WithoutCritic().attach(model)
    if vec_env.env.score_at == "rollout_end":
        LateScores().attach(model)
    elif vec_env.env.may_drop:
        DropEpisodes().attach(model)


def _policy_class(algorithm: type) -> type[LMPolicy]:
    """Return the policy class for an algorithm.

    Raises:
        ValueError: If there is none, with the reason.
    """
    for known, policy_class in POLICIES.items():
        if issubclass(algorithm, known):
            return policy_class
    reason = "its policy needs are not known; pass LMPolicy to it yourself if it is like PPO."
    if issubclass(algorithm, RecurrentPPO):
        reason = "a language model sees the whole text in each observation, so a recurrent state has nothing to add."
    if issubclass(algorithm, OffPolicyAlgorithm):
        reason = "it is off-policy: it learns values of single stored actions, and no policy of tokens to sample from."
    names = ", ".join(known.__name__ for known in POLICIES)
    raise ValueError(f"Expected `algorithm` to be one of {names}, got {algorithm.__name__}: {reason}")


def _batch_size(n_steps: int, n_envs: int) -> int:
    """Return 1/8 of the rollout, or the next larger share (1/4, 1/2, all) with enough sequences in a minibatch."""
    size = n_steps * n_envs
    for n_minibatches in (8, 4, 2):  # a share that leaves no rest, of which SB3 `ppo.PPO.__init__` would warn
        if size % n_minibatches == 0 and n_envs >= SEQUENCES_A_MINIBATCH * n_minibatches:
            return size // n_minibatches
    return size
