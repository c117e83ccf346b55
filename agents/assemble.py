"""From a run's configuration to its objects: environment, tokenizer, agent and what works beside it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from textenv import TASKS, demo
from textenv.completion import Preds
from textenv.env import TextEnv
from textenv.metrics.scores import Metric
from textenv.model_loading import readable
from textenv.prompts import Prompt
from textenv.signatures import check_arguments, needed
from textenv.tokenizer import Tokenizer
from textenv.vector import unwrap_text_env

from .backbone import Pretrained
from .build import make_agent, usual_learning_rate
from .callbacks import EpisodeMetrics
from .config import DEMO, AlgorithmConfig, EnvConfig, ModelConfig, Named, TrainConfig
from .critic import CriticSpec, RewardModelCritic, SeparateCritic, SharedCritic
from .critic_warmup import CriticWarmup
from .demo import model_folder
from .kl import AdaptiveCoef, KLPenalty
from .language_model import LengthError
from .names import MASKS, METRICS, as_reward, build, call, check_allowed, find, look_here
from .policies import LMPolicy
from .refusal import CommandError
from .shaping import RewardShaping
from .trainable import LastLayers, LoRA, Trainable
from .training_warnings import TrainingWarnings

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {"ppo": PPO, "a2c": A2C, "maskable_ppo": MaskablePPO, "trpo": TRPO}
SETTINGS = ("n_steps", "batch_size", "n_epochs")  # that an algorithm may lack
# Arguments of an algorithm that are ours to give.
OWN_ARGUMENTS = ("policy", "env", "policy_kwargs", "rollout_buffer_class", "rollout_buffer_kwargs", "_init_setup_model")


class Trust(NamedTuple):
    """What the command line, and nothing else, allows.

    Args:
        modules: Modules that a configuration may import beside our own.
        remote_code: Whether a model's own code may run.
    """

    modules: Collection[str] = ()
    remote_code: bool = False


class Parts(NamedTuple):
    """What a run works with.

    Args:
        config: Its configuration.
        tokenizer: The model's.
        env: What is trained on.
        held_out: What is evaluated on; the same where the configuration names nothing else.
        agent: The algorithm.
        metrics: The metrics of evaluations.
    """

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    env: TextEnv
    held_out: TextEnv
    agent: OnPolicyAlgorithm
    metrics: list[Metric]


def assemble(config: TrainConfig, trust: Trust = Trust(), progress_bar: bool = False) -> Parts:  # noqa: B008
    """Build what a configuration describes.

    Raises:
        CommandError: If it names something that may not be imported, or is not there.
        ValueError: If its parts do not go together; the message says which, as the parts themselves have it.
    """
    if trust.modules:
        look_here()
    for value in (config.env, config.evaluation, config.loggers, config.algorithm.args):
        check_allowed(list(vars(value).values()) if hasattr(value, "__dict__") else value, trust.modules)
    _check_algorithm(config.algorithm)
    _check_device(config.device)
    transformers_logging.disable_progress_bar()
    model = config.model
    metrics = [make_metric(metric, trust) for metric in config.evaluation.metrics]
    find_model(model.name, progress_bar)
    tokenizer = load_tokenizer(model.tokenizer or model.name, trust)
    env = make_env(config.env, tokenizer, config.seed, trust)
    held_out = env
    evaluation = config.evaluation
    if evaluation.prompts is not None or evaluation.env_args:
        other = EnvConfig(**{**vars(config.env), "args": {**config.env.args, **evaluation.env_args}})
        other.prompts = evaluation.prompts or other.prompts
        held_out = make_env(other, tokenizer, config.seed, trust)
    with _lengths_by_key(env, "env.args"):
        agent = _agent(config, env, trust)
    with _lengths_by_key(held_out, "evaluation.env_args"):  # which are longer, it may be
        cast("LMPolicy", agent.policy).lm.backbone.check_length(held_out.max_prompt_tokens, held_out.rules.room)
    return Parts(config, tokenizer, env, held_out, agent, metrics)


def find_model(name: str, progress_bar: bool = True) -> str:
    """Return what to load a model by, as `model_folder` does.

    Raises:
        CommandError: If it is the folder of a run, or the name of nothing.
    """
    try:
        return model_folder(name, progress_bar)
    except ValueError as error:
        raise CommandError(str(error)) from error


def load_tokenizer(name: str, trust: Trust = Trust()) -> PreTrainedTokenizerBase:  # noqa: B008
    """Return the tokenizer of a name or folder.

    Raises:
        CommandError: If there is none.
    """
    folder = find_model(name)
    try:
        with readable(folder):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code)
    except (OSError, ValueError) as error:
        raise CommandError(f"Expected the tokenizer of {name!r}, got: {str(error).splitlines()[0]}") from error


def mood(prompt: Prompt, preds: Preds, done: bool) -> float:
    """Return the share of positive mood words of a demo review: the reward of the built-in demo."""
    return demo.score(prompt + preds.text)


def make_env(config: EnvConfig, tokenizer: PreTrainedTokenizerBase, seed: int, trust: Trust) -> TextEnv:
    """Build the environment that a configuration names."""
    known = cast("Tokenizer", tokenizer)
    arguments: dict[str, Any] = {"seed": seed, **config.args}
    if config.reward is not None:
        arguments["reward"] = as_reward(config.reward)
    if config.on_failure != "raise":
        arguments["on_failure"] = config.on_failure
    if masks := make_masks(config, trust):
        arguments["mask"] = masks
    if config.max_new_tokens is not None:
        arguments["max_new_tokens"] = config.max_new_tokens
    if config.id not in (DEMO, "text"):
        if config.prompts is not None:
            arguments["prompts"] = config.prompts
        return _named_env(config.id, known, arguments, trust)
    if config.id == DEMO:
        arguments = {"reward": mood, "score_at": "done", **arguments}
        return call(TextEnv, arguments, "env.args", prompts=config.prompts or demo.prompts(), tokenizer=known)
    if config.prompts is None or config.reward is None:
        raise CommandError('Expected --env.prompts FILE and --env.reward NAME with --env.id "text".')
    return call(TextEnv, arguments, "env.args", prompts=config.prompts, tokenizer=known)


def make_masks(config: EnvConfig, trust: Trust) -> list[Any]:
    """Build the masks that a configuration names."""
    return [build(mask, MASKS, "mask", trust.modules) for mask in config.masks]


def _named_env(name: str, tokenizer: Tokenizer, arguments: dict[str, Any], trust: Trust) -> TextEnv:
    short = name.removeprefix("textenv/").removesuffix("-v0")
    if short not in TASKS and ":" not in name:
        known = ", ".join(["demo", "text", *(task for task in TASKS if task != "Text")])  # which is "text"
        raise CommandError(f"Expected `env.id` to be {known} or module:Class, got {name!r}.")
    made = find(TASKS.get(short, name), trust.modules)
    for one in needed(made):
        if one not in ("tokenizer", *arguments):
            key, what = ("prompts", "FILE") if one == "prompts" else (f"args.{one}", "VALUE")
            what = "FOLDER" if one == "data" else what
            also = " (of its data set, or the name of one on the hub)" if one == "data" else ""
            flag = f"--env.{key} {what}"
            raise CommandError(f"Expected {flag}{also} for the task {name}, got none: add {flag} to the command.")
    return unwrap_text_env(call(made, arguments, f"the task {name}", tokenizer=tokenizer))


def make_metric(metric: Named | str, trust: Trust) -> Metric:
    """Build a metric; "perplexity" takes the name of the model that judges."""
    one = Named(metric) if isinstance(metric, str) else metric
    if one.id == "perplexity" and isinstance(one.args.get("model"), str):
        judge = one.args["model"]
        arguments = {**one.args, "model": Pretrained(judge).build().eval(), "tokenizer": load_tokenizer(judge, trust)}
        one = Named(one.id, arguments)
    return build(one, METRICS, "metric", trust.modules)


def load_lm(name: str, trust: Trust) -> Pretrained:
    """Return the spec of a model by name or folder."""
    return Pretrained(name, trust_remote_code=True) if trust.remote_code else Pretrained(name)


def _check_device(name: str) -> None:
    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise CommandError(f"Expected device to be auto, cpu, cuda or another of torch's, got {name!r}.") from error


def _check_algorithm(algorithm: AlgorithmConfig) -> None:
    made = ALGORITHMS[algorithm.name]
    own = {"seed": "seed", "device": "device", **{name: f"algorithm.{name}" for name in vars(algorithm)}}
    for name in algorithm.args.keys() & own.keys():
        raise CommandError(f"Expected {own[name]} in the place of algorithm.args.{name}, got the latter.")
    takes = inspect.signature(made).parameters
    for name in SETTINGS:
        if getattr(algorithm, name) is not None and name not in takes:
            raise CommandError(f"Expected no algorithm.{name} with {algorithm.name}, got {getattr(algorithm, name)}.")
    try:
        check_arguments(made, algorithm.args, "algorithm.args", without=(*OWN_ARGUMENTS, *own))
    except ValueError as error:
        raise CommandError(str(error)) from error


def _agent(config: TrainConfig, env: TextEnv, trust: Trust) -> OnPolicyAlgorithm:
    algorithm, model = config.algorithm, config.model
    given = {name: getattr(algorithm, name) for name in SETTINGS}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if algorithm.schedule == "linear":
        rate = algorithm.learning_rate or usual_learning_rate(ALGORITHMS[algorithm.name])
        settings["learning_rate"] = LinearSchedule(rate, 0.0, 1.0)
    elif algorithm.learning_rate is not None:
        settings["learning_rate"] = algorithm.learning_rate
    if algorithm.advantage != "gae":
        settings["vf_coef"] = 0.0
    buffer = {"advantage": algorithm.advantage, "micro_batch_tokens": algorithm.micro_batch_tokens}
    return make_agent(
        env,
        load_lm(model.name, trust),
        n_envs=algorithm.n_envs,
        algorithm=ALGORITHMS[algorithm.name],
        policy_kwargs=policy_arguments(model),
        rollout_buffer_kwargs={name: value for name, value in buffer.items() if value is not None},
        seed=config.seed,
        device=config.device,
        **{**settings, **algorithm.args},
    )


@contextmanager
def _lengths_by_key(env: TextEnv, args: str) -> Iterator[None]:
    """Say by the keys of a configuration what is longer than the model can read."""
    try:
        yield
    except LengthError as error:
        raise CommandError(
            f"{error.fact}, {env.max_prompt_tokens} of the longest prompt and {env.rules.room} behind it: lower "
            f"--env.max_new_tokens, {env.rules.max_new_tokens} now, or cut prompts: "
            f"--{args} '{{max_prompt_tokens: N, truncation_side: left}}'."
        ) from error


def policy_arguments(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of `LMPolicy` that a configuration describes."""
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


def _critic(model: ModelConfig) -> CriticSpec:
    if model.critic in ("shared", "detached"):
        return SharedCritic(detach=model.critic == "detached")
    if model.critic_model is None:
        raise CommandError(f"Expected --model.critic_model NAME with the critic {model.critic!r}.")
    name = model.critic_model
    return SeparateCritic(Pretrained(name)) if model.critic == "separate" else RewardModelCritic(name)


def training_callbacks(config: TrainConfig) -> list[BaseCallback]:
    """Return what works on rollouts: figures, shaping, penalty, warm-up and warnings."""
    callbacks: list[BaseCallback] = [EpisodeMetrics(), TrainingWarnings()]
    shaping, kl = config.shaping, config.kl
    if any((shaping.clip is not None, shaping.scale, shaping.whiten, shaping.missing_eos_penalty)):
        callbacks.append(RewardShaping(shaping.clip, shaping.scale, shaping.whiten, shaping.missing_eos_penalty))
    if kl.coef:
        coef = kl.coef if kl.target is None else AdaptiveCoef(kl.coef, kl.target, kl.horizon)
        callbacks.append(KLPenalty(coef, kl.reference, kl.estimator, kl.clip))
    if config.algorithm.critic_warmup:
        callbacks.append(CriticWarmup(config.algorithm.critic_warmup))
    return callbacks


def task_name(config: TrainConfig) -> str:
    """Return what a run is called after: its task and its model."""
    model = "" if config.model.name == config.env.id else f"-{Path(config.model.name).name}"
    return config.env.id.removeprefix("textenv/").removesuffix("-v0") + model
