"""What a run is, as dataclasses: the one source of the names, types, defaults and help of YAML and command line."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

PLOTTED = {"tensorboard": "tensorboard", "curves": "matplotlib"}  # the default loggers, and their packages


@dataclass
class Named:
    """A reward, metric, mask, logger or environment by its name.

    Args:
        id: A name that `textenv tasks` lists, or `module:Class`, which the module defines; allowed with `--allow`.
        args: The arguments of the class.
    """

    id: str
    args: dict[str, Any] = field(default_factory=dict)


def default_loggers() -> list[Named | str]:
    """Return the loggers of a configuration that names none: those of the extra `plot` whose packages are installed."""
    return [logger for logger, package in PLOTTED.items() if find_spec(package) is not None]


@dataclass
class EnvConfig:
    """What an episode is, and what it earns.

    Args:
        id: "demo" (the built-in reviews), "text" (prompts and a reward), a task of `textenv tasks`, or `module:Class`.
        args: Other arguments of the environment, as `data`, `stop_strings` or `score_at`.
        prompts: For "text": a .jsonl, .csv or .txt file; for the others, prompts in place of their own.
        reward: A reward by name, or its id and args; where the task has none of its own.
        on_failure: What becomes of a text whose reward raises or is no number: "raise" stops the run, "drop" leaves it
            out (up to 5 %), a number is its reward. Rewards that ask servers have their own.
        masks: Which tokens are allowed next; needs the algorithm "maskable_ppo".
        max_new_tokens: The most tokens of an episode; null is the environment's own number, 64 for "text".
    """

    id: str = "demo"
    args: dict[str, Any] = field(default_factory=dict)
    prompts: str | None = None
    reward: Named | str | None = None
    on_failure: Literal["raise", "drop"] | float = "raise"
    masks: list[Named | str] = field(default_factory=list)
    max_new_tokens: int | None = None


@dataclass
class ModelConfig:
    """The language model, what of it is trained, its critic and its sampling.

    Args:
        name: A name on the hub, or a folder; "demo" is a tiny GPT-2 of 64 positions that is made in seconds.
        tokenizer: The name or folder of its tokenizer, where that is another.
        train: What is trained.
        last_layers: How many layers, with train "last_layers".
        lora_r: The rank of the adapters, with train "lora".
        lora_alpha: Their scale, in units of 1 / rank.
        critic: Where the values come from: the policy's trunk ("detached" does not train it), or a model of its own.
        critic_model: Name or folder of the critic "separate" or "reward_model".
        value_norm: How returns are normalised for the critic.
        critic_lr_scale: Multiplies the critic's learning rate.
        temperature: Divides the logits, in rollout and update alike.
        top_k: Sample from so many tokens.
        top_p: Sample from the most probable tokens that sum to this.
        min_p: Sample from tokens of at least this share of the largest probability.
        repetition_penalty: Lowers the logits of tokens that are already there.
        top_p_lag: Updates between the renewals of the copy that chooses the tokens of `top_p` (NLPO).
        autocast: "bfloat16" computes in 16 bits.
        gradient_checkpointing: Less memory, a third more time.
    """

    name: str = "demo"
    tokenizer: str | None = None
    train: Literal["all", "head", "last_layers", "lora"] = "all"
    last_layers: int = 2
    lora_r: int = 8
    lora_alpha: float = 16.0
    critic: Literal["shared", "detached", "separate", "reward_model"] = "shared"
    critic_model: str | None = None
    value_norm: Literal["norm", "popart"] | None = None
    critic_lr_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    top_p_lag: int | None = None
    autocast: Literal["bfloat16"] | None = None
    gradient_checkpointing: bool = False


@dataclass
class AlgorithmConfig:
    """The algorithm; null is what `agents.make_agent` has.

    Args:
        name: The class of Stable-Baselines3 or sb3-contrib.
        n_envs: Episodes side by side.
        learning_rate: The learning rate at the start; null is 1e-5, or 1e-3 with trpo, of the critic alone.
        schedule: Whether it stays, or falls to zero at the end.
        n_steps: Tokens of a rollout in each of them; null is env.max_new_tokens.
        batch_size: Tokens of a minibatch; null is an eighth of a rollout, or more where it has few texts.
        n_epochs: Passes over a rollout; null is 4.
        advantage: "gae" with a critic; the others compare the samples of a prompt (env.args: samples_per_prompt).
        micro_batch_tokens: Split minibatches into parts of so many tokens, to save memory.
        critic_warmup: Rollouts in which the critic alone learns.
        args: Other arguments of the algorithm, as `target_kl` or `ent_coef`.
    """

    name: Literal["ppo", "a2c", "maskable_ppo", "trpo"] = "ppo"
    n_envs: int = 64
    learning_rate: float | None = None
    schedule: Literal["constant", "linear"] = "constant"
    n_steps: int | None = None
    batch_size: int | None = None
    n_epochs: int | None = None
    advantage: Literal["gae", "grpo", "grpo_mean", "rloo"] = "gae"
    micro_batch_tokens: int | None = None
    critic_warmup: int = 0
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class KLConfig:
    """The penalty on leaving the reference model.

    Args:
        coef: Reward per nat; 0 for none.
        target: Nats an episode that the coefficient is adapted to; fixed by default.
        horizon: How slowly it is adapted, in episodes.
        reference: Name or folder of the reference; the policy as it was at the start by default.
        estimator: How the divergence of a token is estimated.
        clip: The most nats that one token counts.
    """

    coef: float = 0.05
    target: float | None = None
    horizon: float = 10_000.0
    reference: str | None = None
    estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    clip: float | None = None


@dataclass
class ShapingConfig:
    """What is done to the score of an episode before the KL penalty.

    Args:
        clip: The largest absolute score.
        scale: Divide by the running deviation.
        whiten: Normalise over a rollout.
        missing_eos_penalty: Subtracted from texts that were cut off.
    """

    clip: float | None = None
    scale: bool = False
    whiten: bool = False
    missing_eos_penalty: float = 0.0


@dataclass
class EvaluationConfig:
    """Evaluation before training, meanwhile and at the end.

    Args:
        every: Tokens from one to the next.
        n_prompts: Prompts of each.
        n: Texts a prompt.
        prompts: A file of held-out prompts; the training prompts by default.
        env_args: Arguments of the environment that differ here, as `{part: held_out}`.
        metrics: Metrics by name, or their id and args.
        best: The figure by which the best model is kept.
        higher_is_better: Whether a larger one is better.
        patience: Stop after so many evaluations without a better one.
    """

    every: int = 20_000
    n_prompts: int = 64
    n: int = 1
    prompts: str | None = None
    env_args: dict[str, Any] = field(default_factory=dict)
    metrics: list[Named | str] = field(default_factory=list)
    best: str = "reward"
    higher_is_better: bool = True
    patience: int | None = None


@dataclass
class TrainConfig:
    """Train a language model on a task.

    Args:
        total_tokens: Tokens that the policy writes in all.
        seed: Of everything random.
        device: "auto", "cpu", "cuda", ...
        env: The task.
        model: The language model.
        algorithm: The algorithm.
        kl: The KL penalty.
        shaping: What is done to scores.
        evaluation: Evaluations.
        loggers: Where figures go besides metrics.jsonl: "tensorboard", "curves", "wandb", "trackio", "mlflow", or
            the `module:Class` of a KVWriter of Stable-Baselines3; by name, or their id and args. By default the
            first two, as far as the extra `plot` is installed.
        samples: Prompts that are continued for samples.jsonl.
        samples_every: Rollouts from one such sample to the next.
        checkpoint_every: Rollouts from one checkpoint to the next.
        keep_checkpoints: How many of the newest stay.
        license: The licence of the model, for its card.
        out: The folder of the run; a new one below runs/ by default.
    """

    total_tokens: int = 100_000
    seed: int = 0
    device: str = "auto"
    env: EnvConfig = field(default_factory=EnvConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    loggers: list[Named | str] = field(default_factory=default_loggers)
    samples: int = 4
    samples_every: int = 10
    checkpoint_every: int = 10
    keep_checkpoints: int = 3
    license: str | None = None
    out: str | None = None


@dataclass
class TrustOptions:
    """What the command line alone may allow.

    Args:
        allow: A module that the configuration may import.
        allow_env: An environment variable that the configuration may send to a reward's server (api_key_variable).
        trust_remote_code: Let a model from the hub run its own code.
    """

    allow: list[str] = field(default_factory=list)
    allow_env: list[str] = field(default_factory=list)
    trust_remote_code: bool = False


@dataclass
class TrainOptions(TrustOptions):
    """What the command line alone says about training: no configuration can.

    Args:
        resume: Go on with the run in this folder; give changed keys beside it.
        change: A key that may differ from the resumed run's, which then is another run than if never stopped.
        dry_run: One rollout and one update, and what the whole run would take.
        quiet: Print errors only.
        json: Print a line of JSON an iteration.
    """

    resume: str | None = None
    change: list[str] = field(default_factory=list)
    dry_run: bool = False
    quiet: bool = False
    json: bool = False


# The defaults with the built-in model, which is small and new; with any other they are those of the dataclasses above.
# See examples/quickstart.py, which is the same in Python.
DEMO_SETTINGS: dict[str, Any] = {
    "total_tokens": 56_000,
    "env.max_new_tokens": 32,
    "algorithm.learning_rate": 1.5e-3,
    "algorithm.schedule": "linear",
}
DEMO_PPO_SETTINGS: dict[str, Any] = {  # besides, with the algorithms that have them
    "algorithm.batch_size": 512,
    "algorithm.args": {"target_kl": 0.05},
}
PPO_NAMES = ("ppo", "maskable_ppo")
# What may change when a run is resumed without changing what comes out of it.
FREE_ON_RESUME = (
    "device",
    "out",
    "loggers",
    "checkpoint_every",
    "keep_checkpoints",
    "license",
    "samples_every",
    "samples",
)


def default_settings(given: TrainConfig) -> dict[str, Any]:
    """Return the defaults, by dotted key, that are others for what is given than those of `TrainConfig`.

    Example:
        >>> default_settings(TrainConfig())["algorithm.batch_size"]
        512
        >>> default_settings(TrainConfig(model=ModelConfig("gpt2")))
        {}
    """
    if given.model.name != ModelConfig.name:
        return {}
    settings, algorithm = dict(DEMO_SETTINGS), given.algorithm
    if algorithm.name in PPO_NAMES:
        settings |= DEMO_PPO_SETTINGS
        n_steps = algorithm.n_steps or given.env.max_new_tokens or settings["env.max_new_tokens"]
        if n_steps * algorithm.n_envs % settings["algorithm.batch_size"]:
            del settings["algorithm.batch_size"]  # which has to divide the rollout
    return settings


def argument_help(config: type) -> dict[str, str]:
    """Return what the docstrings of a config and of its base classes say of each argument.

    Example:
        >>> argument_help(Named)["args"]
        'The arguments of the class.'
    """
    texts: dict[str, str] = {}
    for described in reversed(config.__mro__):
        _, _, arguments = inspect.cleandoc(described.__doc__ or "").partition("Args:\n")
        entries = re.findall(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", arguments, flags=re.MULTILINE)
        texts |= {name: " ".join(text.split()) for name, text in entries}
    return texts
