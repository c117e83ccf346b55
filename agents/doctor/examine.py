"""The examination of a model and its env before training: runs all checks in order, and reports their findings."""

from __future__ import annotations

from collections.abc import Callable

from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from textenv.env import TextEnv

from ..policies.lm_policy import ForeignBackendError, LMPolicy
from ..steps.step import text_vec_env
from .model_checks import (
    check_cache,
    check_divergence,
    check_dropout,
    check_head,
    check_padding,
    check_ratio,
    check_weights,
)
from .report import Finding, Report
from .sample import Sample, Subject, take_sample, undisturbed
from .setting_checks import (
    check_batches,
    check_chat_template,
    check_discount,
    check_generation_config,
    check_learning_rate,
    check_opening,
    check_positions,
    check_prompts,
    check_stop_tokens,
    check_vocabulary,
)
from .trial_checks import check_memory, check_reward, check_time

SETTING_CHECKS: tuple[Callable[[Subject], list[Finding]], ...] = (
    check_vocabulary,
    check_positions,
    check_prompts,
    check_opening,
    check_stop_tokens,
    check_chat_template,
    check_generation_config,
    check_discount,
    check_learning_rate,
    check_batches,
    check_reward,
)
MODEL_CHECKS: tuple[Callable[[Subject, Sample], list[Finding]], ...] = (
    check_weights,
    check_ratio,
    check_padding,
    check_cache,
    check_head,
    check_dropout,
    check_divergence,
    check_time,
    check_memory,
)


def check(model: OnPolicyAlgorithm | LMPolicy, env: TextEnv | None = None) -> Report:
    """Examine a model before it is trained: probabilities, padding, cache, tokens, settings, reward, time and memory.

    The checks decode and evaluate a few rows as PPO will, and compare the results. They take seconds (20 on one core
    for GPT-2 with 124 M parameters). Weights, gradients, random generators, cached rows and the env's episodes and
    order of prompts are restored, so that training is the same with and without an examination. The reward is called
    on two sampled episodes; state that a reward or a hook keeps outside `preds.state` is not restored.

    Args:
        model: An algorithm that `make_agent` built, or a policy.
        env: The env to examine with a policy alone, or with a model whose VecEnv is not a `TextVecEnv`.

    Returns:
        The report: `print(report)`, `report.ok`, `report.raise_if_failed()`.

    Raises:
        TypeError: If the policy is not an `LMPolicy`.
        ValueError: If a policy comes without an env, or its weights are sharded over processes.

    Example:
        >>> from agents import doctor, make_agent
        >>> from textenv import CharTokenizer, TextEnv
        >>> from transformers import GPT2Config
        >>> env = TextEnv(["a", "bcd"], CharTokenizer(), reward=lambda prompt, preds, done: 0.0, max_new_tokens=4)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40, bos_token_id=0, eos_token_id=0)
        >>> doctor.check(make_agent(env, config, n_envs=8, device="cpu")).ok
        True
    """
    algorithm = None if isinstance(model, LMPolicy) else model
    policy = model if isinstance(model, LMPolicy) else model.policy
    if not isinstance(policy, LMPolicy):
        raise TypeError(f"Expected a model with an LMPolicy, got {type(policy).__name__}.")
    if policy.lm.shards is not None:
        raise ValueError(
            "Expected weights that are whole in each process, got sharded ones: examine it in one process."
        )
    if env is None and algorithm is None:
        raise ValueError("Expected the env that the policy acts in: check(policy, env).")
    if env is None:
        assert algorithm is not None
        env = text_vec_env(algorithm.get_env()).env
    subject = Subject(policy, env, algorithm)
    findings: list[Finding] = []
    for setting_check in SETTING_CHECKS:
        findings += _run(setting_check, subject)
    with undisturbed(policy, env):
        try:
            sample = take_sample(policy, env)
        except Exception as error:  # the user's own model may raise anything
            return Report((*findings, _broken("rollout", error)))
    for model_check in MODEL_CHECKS:
        findings += _run(model_check, subject, sample)
    return Report(tuple(findings))


def _run(examine: Callable[..., list[Finding]], subject: Subject, *sample: Sample) -> list[Finding]:
    """Run one check; turn an error that the user's model or hooks raise in it into a finding."""
    name = examine.__name__.removeprefix("check_").replace("_", " ")
    try:
        with undisturbed(subject.policy, subject.env):
            return examine(subject, *sample)
    except ForeignBackendError as error:
        return [Finding(name, "skipped", str(error))]
    except Exception as error:
        return [_broken(name, error)]


def _broken(name: str, error: Exception) -> Finding:
    cause = "The model, the tokenizer or the env raised this error in a call that training makes, too."
    return Finding(name, "failed", f"{type(error).__name__}: {error}", cause, "Correct what the message names.")
