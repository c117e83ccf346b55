"""The objects that a run's configuration describes: environment, tokenizer, agent, metrics and callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from textenv import TASKS
from textenv.checks.signatures import check_arguments, needed
from textenv.checks.trust import Kind, Trust, only_with
from textenv.env import TextEnv
from textenv.episodes.completion import Preds
from textenv.episodes.scores import RewardFunction
from textenv.huggingface.weights import from_pretrained
from textenv.metrics.scores import Metric
from textenv.prompts.prompts import Prompt, PromptLike
from textenv.rewards.registry import read_reward
from textenv.text import demo_corpus as demo
from textenv.text.named_tokenizer import DEMO
from textenv.text.tokenizer import Tokenizer
from textenv.vector import unwrap_text_env

from ..build import make_agent, usual_learning_rate
from ..callbacks.episode_metrics import EpisodeMetrics
from ..callbacks.training_warnings import TrainingWarnings
from ..configuration.config import AlgorithmConfig, EnvConfig, Named, TrainConfig, TrustOptions
from ..configuration.names import MASK, MASKS, METRIC, METRICS, as_reward, build, built_for, call, find
from ..errors import CommandError
from ..evaluation.generation import no_reward
from ..models.interface import LengthError
from ..models.pretrained import Pretrained
from ..policies.lm_policy import LMPolicy
from ..policies.surrogate_names import make_surrogate
from ..small_models.demo_model import model_folder
from ..steps.critic_warmup import CriticWarmup
from ..steps.kl_penalty import AdaptiveCoef, KLPenalty
from .advantage_names import make_advantage
from .policy_arguments import policy_arguments, shards_of
from .score_steps import score_steps

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {"ppo": PPO, "a2c": A2C, "maskable_ppo": MaskablePPO, "trpo": TRPO}
SETTINGS = ("n_steps", "batch_size", "n_epochs")  # null leaves one to `make_agent`; A2C and TRPO lack some
# The arguments of an algorithm that `make_agent` sets itself, so that a configuration cannot.
OWN_ARGUMENTS = ("policy", "env", "policy_kwargs", "rollout_buffer_class", "rollout_buffer_kwargs", "_init_setup_model")
ENV = Kind("environment", "a TextEnv", lambda cls: issubclass(cls, TextEnv))
# The arguments of environments that only serve the reward: an environment without rewards leaves them out.
REWARDING = ("reward", "classifier", "references_column", "score_at", "on_failure")


class Parts:
    """The objects of a run; each is built at its first use.

    Args:
        config: The run's configuration.
        trust: The permissions of the command line.
        progress_bar: Whether to show a progress bar while the demo's model is made.

    Raises:
        CommandError: If the algorithm does not have one of its settings, or torch does not know the device.

    Example:
        >>> from textenv.checks.trust import Trust
        >>> parts = Parts(TrainConfig(), Trust())
        >>> # parts.agent.learn(1000)
    """

    def __init__(self, config: TrainConfig, trust: Trust, progress_bar: bool = False) -> None:
        _check_algorithm(config.algorithm)
        _check_device(config.device)
        transformers_logging.disable_progress_bar()  # the bars of loading weights would tear the live view
        self.config, self.trust, self.progress_bar = config, trust, progress_bar

    @cached_property
    def folder(self) -> str:
        """The model's folder, or its name on the hub."""
        return find_model(self.config.model.name, self.progress_bar)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        folder = self.folder  # first, so that a missing model is reported before a missing tokenizer
        return load_tokenizer(self.config.model.tokenizer or folder, self.trust)

    @cached_property
    def metrics(self) -> list[Metric]:
        """The metrics of evaluations."""
        return [make_metric(metric, self.trust) for metric in self.config.evaluation.metrics]

    @cached_property
    def judge(self) -> RewardFunction | None:
        """The reward of evaluations that the run is not trained on."""
        judge = self.config.evaluation.judge
        if judge is None:
            return None
        with built_for("the reward of evaluation.judge", {"judge": judge}, self.trust):
            return read_reward(as_reward(judge))

    @cached_property
    def env(self) -> TextEnv:
        """The environment to train on."""
        return make_env(self.config.env, self.tokenizer, self.config.seed, self.trust)

    def unscored(self, prompts: Sequence[PromptLike] = ()) -> TextEnv:
        """Return the training environment without its reward, for writing texts only.

        Args:
            prompts: Prompts that replace the environment's own, which then need not be read from a file.
        """
        env = self.config.env
        other = EnvConfig(**{**vars(env), "prompts": prompts}) if prompts and env.id in (DEMO, "text") else env
        return make_env(other, self.tokenizer, self.config.seed, self.trust, is_scored=False)

    @cached_property
    def held_out(self) -> TextEnv:
        """The environment of evaluations: the training environment, unless its prompts or arguments differ."""
        evaluation, env = self.config.evaluation, self.config.env
        if evaluation.prompts is None and not evaluation.env_args:
            return self.env
        other = EnvConfig(**{**vars(env), "args": {**env.args, **evaluation.env_args}})
        other.prompts = evaluation.prompts or other.prompts
        return make_env(other, self.tokenizer, self.config.seed, self.trust)

    @cached_property
    def agent(self) -> OnPolicyAlgorithm:
        """The algorithm, with its policy and its vector environment."""
        with only_with(self.trust), _lengths_by_key(self.env, "env.args"):
            return _agent(self.config, self.env, self.trust)


def assemble(config: TrainConfig, trust: Trust = Trust(), progress_bar: bool = False) -> Parts:  # noqa: B008
    """Build all objects of a configuration.

    Args:
        config: The configuration.
        trust: The permissions of the command line.
        progress_bar: Whether to show a progress bar while the demo's model is made.

    Raises:
        CommandError: If the configuration names something that does not exist or may not be imported.
        ValueError: If settings exclude each other; the message comes from the object that refuses them.
    """
    parts = Parts(config, trust, progress_bar)
    for name in ("metrics", "tokenizer", "judge", "env", "held_out", "agent"):  # quick ones first, to refuse early
        getattr(parts, name)  # builds and caches it
    held_out = parts.held_out
    with _lengths_by_key(held_out, "evaluation.env_args"):  # held-out prompts may be longer than those of training
        cast("LMPolicy", parts.agent.policy).lm.backbone.check_length(held_out.max_prompt_tokens, held_out.rules.room)
    return parts


def trust_of(options: TrustOptions) -> Trust:
    """Return the permissions of the command line in the form of `textenv.checks.trust`."""
    return Trust(options.allow, options.trust_remote_code, options.allow_env)


def find_model(name: str, progress_bar: bool = True) -> str:
    """Return the name or folder to load a model from, as `agents.small_models.demo_model.model_folder` does.

    Raises:
        CommandError: If it is the folder of a run, or does not exist.
    """
    try:
        return model_folder(name, progress_bar)
    except ValueError as error:
        raise CommandError(str(error)) from error


def load_tokenizer(name: str, trust: Trust = Trust()) -> PreTrainedTokenizerBase:  # noqa: B008
    """Return a tokenizer by its name or folder.

    Raises:
        CommandError: If it does not exist or cannot be loaded.
    """
    folder = find_model(name)
    try:
        return from_pretrained(AutoTokenizer, folder, trust_remote_code=trust.remote_code)
    except (OSError, ValueError) as error:
        raise CommandError(f"Expected the tokenizer of {name!r}, got: {str(error).splitlines()[0]}") from error


def mood(prompt: Prompt, preds: Preds, done: bool) -> float:
    """Return the share of positive mood words of a demo review: the reward of the built-in demo."""
    return demo.score(prompt + preds.text)


def make_env(
    config: EnvConfig, tokenizer: PreTrainedTokenizerBase, seed: int, trust: Trust, is_scored: bool = True
) -> TextEnv:
    """Build the environment that a configuration names.

    Args:
        config: The environment's part of a run's configuration.
        tokenizer: The model's tokenizer.
        seed: The run's seed.
        trust: The permissions of the command line.
        is_scored: Whether to build its reward; False leaves it out if the environment works without one.

    Raises:
        CommandError: If the environment does not exist, or its arguments do not fit it.
    """
    with built_for(config.id, {"reward": config.reward, **config.args}, trust):
        return _make_env(config, cast("Tokenizer", tokenizer), seed, trust, is_scored)


def _make_env(config: EnvConfig, tokenizer: Tokenizer, seed: int, trust: Trust, is_scored: bool) -> TextEnv:
    arguments: dict[str, Any] = {"seed": seed, **config.args}
    if not is_scored:
        arguments = {key: value for key, value in arguments.items() if key not in REWARDING}
    if not is_scored and (config.reward is not None or "reward" in config.args or _takes_reward(config.id, trust)):
        arguments["reward"] = no_reward
    elif config.reward is not None:
        arguments["reward"] = as_reward(config.reward)
    if is_scored and config.on_failure != "raise":
        arguments["on_failure"] = config.on_failure
    if masks := make_masks(config, trust):
        arguments["mask"] = masks
    if config.max_new_tokens is not None:
        arguments["max_new_tokens"] = config.max_new_tokens
    if config.id not in (DEMO, "text"):
        if config.prompts is not None:
            arguments["prompts"] = config.prompts
        return _named_env(config.id, tokenizer, arguments, trust)
    if config.id == DEMO:
        arguments = {"reward": mood, "score_at": "done", **arguments}
        return call(TextEnv, arguments, "env.args", prompts=config.prompts or demo.prompts(), tokenizer=tokenizer)
    if config.prompts is None or config.reward is None:
        raise CommandError('Expected --env.prompts FILE and --env.reward NAME with --env.id "text".')
    return call(TextEnv, arguments, "env.args", prompts=config.prompts, tokenizer=tokenizer)


def make_masks(config: EnvConfig, trust: Trust) -> list[Any]:
    """Build the masks of a configuration."""
    return [build(mask, MASKS, MASK, trust) for mask in config.masks]


def _env_class(name: str, trust: Trust) -> Any:
    if name in (DEMO, "text"):
        return TextEnv
    short = name.removeprefix("textenv/").removesuffix("-v0")
    if short not in TASKS and ":" not in name:
        known = ", ".join(["demo", "text", *(task for task in TASKS if task != "Text")])  # the same as "text"
        raise CommandError(f"Expected `env.id` to be {known} or module:Class, got {name!r}.")
    return find(TASKS.get(short, name), ENV, trust)


def _takes_reward(name: str, trust: Trust) -> bool:
    return "reward" in inspect.signature(_env_class(name, trust)).parameters


def _named_env(name: str, tokenizer: Tokenizer, arguments: dict[str, Any], trust: Trust) -> TextEnv:
    env_class = _env_class(name, trust)
    for argument in needed(env_class):
        if argument not in ("tokenizer", *arguments):
            key, value = ("prompts", "FILE") if argument == "prompts" else (f"args.{argument}", "VALUE")
            value = "FOLDER" if argument == "data" else value
            remark = " (of its data set, or the name of one on the hub)" if argument == "data" else ""
            flag = f"--env.{key} {value}"
            raise CommandError(f"Expected {flag}{remark} for the task {name}, got none: add {flag} to the command.")
    return unwrap_text_env(call(env_class, arguments, f"the task {name}", tokenizer=tokenizer))


def make_metric(metric: Named | str, trust: Trust) -> Metric:
    """Build a metric.

    Args:
        metric: Its name, with or without arguments. "perplexity" takes a model's name or folder as argument `model`.
        trust: The permissions of the command line.
    """
    spec = Named(metric) if isinstance(metric, str) else metric
    if spec.id == "perplexity" and isinstance(spec.args.get("model"), str):
        judge = spec.args["model"]
        loaded = {"model": load_lm(judge, trust).build().eval(), "tokenizer": load_tokenizer(judge, trust)}
        spec = Named(spec.id, {**spec.args, **loaded})
    return build(spec, METRICS, METRIC, trust)


def load_lm(name: str, trust: Trust) -> Pretrained:
    """Return the spec of a model by its name or folder."""
    return Pretrained(name, trust_remote_code=True) if trust.remote_code else Pretrained(name)


def _check_device(name: str) -> None:
    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise CommandError(f"Expected device to be auto, cpu, cuda or another of torch's, got {name!r}.") from error


def _check_algorithm(algorithm: AlgorithmConfig) -> None:
    algorithm_class = ALGORITHMS[algorithm.name]
    own = {"seed": "seed", "device": "device", **{name: f"algorithm.{name}" for name in vars(algorithm)}}
    for name in algorithm.args.keys() & own.keys():
        raise CommandError(f"Expected {own[name]} in the place of algorithm.args.{name}, got the latter.")
    takes = inspect.signature(algorithm_class).parameters
    for name in SETTINGS:
        if getattr(algorithm, name) is not None and name not in takes:
            raise CommandError(f"Expected no algorithm.{name} with {algorithm.name}, got {getattr(algorithm, name)}.")
    try:
        check_arguments(algorithm_class, algorithm.args, "algorithm.args", without=(*OWN_ARGUMENTS, *own))
    except ValueError as error:
        raise CommandError(str(error)) from error


def _agent(config: TrainConfig, env: TextEnv, trust: Trust) -> OnPolicyAlgorithm:
    algorithm, model = config.algorithm, config.model
    # Only what the configuration sets: for the rest `make_agent` has defaults that suit text.
    settings: dict[str, Any] = {name: getattr(algorithm, name) for name in SETTINGS}
    settings = {name: value for name, value in settings.items() if value is not None}
    if algorithm.schedule == "linear":
        rate = algorithm.learning_rate or usual_learning_rate(ALGORITHMS[algorithm.name])
        settings["learning_rate"] = LinearSchedule(rate, 0.0, 1.0)  # from `rate` to 0 over all (1.0) of the training
    elif algorithm.learning_rate is not None:
        settings["learning_rate"] = algorithm.learning_rate
    names = ("critic_lambda", "lambda_alpha", "aggregation", "micro_batch_tokens")
    buffer = {
        "advantage": make_advantage(algorithm.advantage, trust),
        **{name: getattr(algorithm, name) for name in names},
    }
    return make_agent(
        env,
        load_lm(model.name, trust),
        n_envs=algorithm.n_envs,
        algorithm=ALGORITHMS[algorithm.name],
        policy_kwargs={
            **policy_arguments(model),
            "surrogate": make_surrogate(algorithm.surrogate, trust),
            "shard": shards_of(model, config.device),
        },
        rollout_buffer_kwargs={name: value for name, value in buffer.items() if value is not None},
        seed=config.seed,
        device=config.device,
        **{**settings, **algorithm.args},
    )


@contextmanager
def _lengths_by_key(env: TextEnv, args: str) -> Iterator[None]:
    """Within, turn a LengthError into a CommandError that names the configuration's keys.

    Args:
        env: The environment whose texts are too long.
        args: The key of its arguments.
    """
    try:
        yield
    except LengthError as error:
        raise CommandError(
            f"{error.fact}, {env.max_prompt_tokens} of the longest prompt and {env.rules.room} behind it: lower "
            f"--env.max_new_tokens, {env.rules.max_new_tokens} now, or cut prompts: "
            f"--{args} '{{max_prompt_tokens: N, truncation_side: left}}'."
        ) from error


def training_callbacks(config: TrainConfig, trust: Trust) -> list[BaseCallback]:
    """Return the callbacks of a configuration: figures, warnings, reward shaping, KL penalty and critic warm-up.

    Their order matters: it is the order in which they change rewards.
    """
    callbacks: list[BaseCallback] = [EpisodeMetrics(), TrainingWarnings(), *score_steps(config)]
    kl = config.kl
    if kl.coef:
        coef = kl.coef if kl.target is None else AdaptiveCoef(kl.coef, kl.target, kl.horizon)
        reference = None if kl.reference is None else load_lm(kl.reference, trust)
        callbacks.append(KLPenalty(coef, reference, kl.estimator, kl.clip, kl.where))
    if config.algorithm.critic_warmup:
        callbacks.append(CriticWarmup(config.algorithm.critic_warmup))
    return callbacks


def task_name(config: TrainConfig) -> str:
    """Return the name of a run's task and model, for titles and folders.

    Example:
        >>> from agents import EnvConfig, ModelConfig, TrainConfig
        >>> task_name(TrainConfig(env=EnvConfig("textenv/Reviews-v0"), model=ModelConfig("org/gpt2")))
        'Reviews-gpt2'
    """
    model = "" if config.model.name == config.env.id else f"-{Path(config.model.name).name}"
    return config.env.id.removeprefix("textenv/").removesuffix("-v0") + model
