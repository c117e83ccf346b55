"""The configuration of a training run as dataclasses: names, types, defaults and help of YAML and command line."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

# The names of `agents.configuration.recipes.RECIPES`; a test holds that they are the same.
Recipe: TypeAlias = Literal["ppo", "grpo", "dr_grpo", "rloo", "reinforce++", "dapo", "gspo", "cispo", "vapo"]
PLOTTED = {"tensorboard": "tensorboard", "curves": "matplotlib"}  # the default loggers, and the package of each


@dataclass
class Named:
    """A reward, metric, mask, logger or environment by its name.

    Args:
        id: A name that `textenv tasks` lists, or `module:Class` of a module that `--allow module` permits.
        args: The arguments of the class.

    Example:
        >>> Named("length", {"target": 20})
        Named(id='length', args={'target': 20})
    """

    id: str
    args: dict[str, Any] = field(default_factory=dict)


def default_loggers() -> list[Named | str]:
    """Return the default loggers, "tensorboard" and "curves", as far as their packages (extra `plot`) are installed."""
    return [logger for logger, package in PLOTTED.items() if find_spec(package) is not None]


@dataclass
class EnvConfig:
    """The episodes of the task, and their reward.

    Args:
        id: "demo" (built-in product reviews), "text" (your own prompts and reward), a task that `textenv tasks` lists,
            or `module:Class`.
        args: Further arguments of the environment, such as `data`, `stop_strings` or `encoding`.
        prompts: A .jsonl, .json, .csv or .txt file of prompts; required for "text", replaces the prompts of other
            tasks.
        reward: A reward by name, or {id: NAME, args: {...}}; for tasks that have no reward of their own.
        on_failure: What to do with a text whose reward raises an error or is not a number: "raise" stops the run,
            "drop" leaves the text out (up to 5 % of all texts), and a number is used as its reward. Rewards that call
            servers have their own setting.
        masks: Masks of the tokens that may be sampled next; they need algorithm.name "maskable_ppo".
        max_new_tokens: The most tokens of an episode; null is the environment's own limit, 64 for "text".
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
    """The language model, its trained part, its critic and its sampling.

    Args:
        name: A name on the Hugging Face hub, a folder, or a GGUF file, "folder/file.gguf", whose weights become
            float32; "demo" is a tiny GPT-2 (64 positions) built in seconds.
        tokenizer: The name, folder or GGUF file of the tokenizer, if it is not the model's own.
        train: The weights to train: all, the head alone, the last layers, or LoRA adapters.
        last_layers: With train "last_layers", the number of layers to train.
        lora_r: With train "lora", the rank of the adapters.
        lora_alpha: With train "lora", the scale of the adapters, whose output is multiplied by alpha / rank.
        critic: The critic that predicts values: "shared" is a head on the policy's own layers, "detached" the same
            without training those layers; "separate" and "reward_model" are models of their own; "pretrained" is any of
            these, as `textenv critic` has fitted it.
        critic_model: With critic "separate" or "reward_model", the name, folder or GGUF file of its model; with
            "pretrained", the folder that `textenv critic` wrote.
        critic_normalise: With critic "reward_model", normalise values by the statistics beside its model, as a reward
            with stats "stored" does.
        value_norm: How to normalise returns for the critic: "norm" by running mean and deviation; "popart" does the
            same and keeps the predicted values unchanged meanwhile (PopArt); null for not at all.
        critic_lr_scale: A factor on the learning rate of the critic.
        temperature: The temperature, which divides the logits, both in sampling and in the update.
        top_k: Sample from the k most probable tokens only.
        top_p: Sample from the most probable tokens that together have this probability.
        min_p: Sample from the tokens with at least this share of the largest probability.
        repetition_penalty: A factor that lowers the logits of tokens that the text already has; 1 for none.
        top_p_lag: Choose the tokens of `top_p` by a copy of the policy, renewed after this many updates (NLPO).
        autocast: "bfloat16" computes in 16 bits, to save time and memory; null for not at all.
        gradient_checkpointing: Save memory, at the cost of about a third more time.
        shard: With several processes, spread weights, gradients and optimizer over them (FSDP2; docs/scaling.md), for
            models that do not fit into one device: "gathered" holds all weights while texts are written, "lock_step"
            one layer at a time, and "offloaded" keeps the shards in the host's memory. null keeps a copy in each
            process, and one process always has a copy.
    """

    name: str = "demo"
    tokenizer: str | None = None
    train: Literal["all", "head", "last_layers", "lora"] = "all"
    last_layers: int = 2
    lora_r: int = 8
    lora_alpha: float = 16.0
    critic: Literal["shared", "detached", "separate", "reward_model", "pretrained"] = "shared"
    critic_model: str | None = None
    critic_normalise: bool = False
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
    shard: Literal["gathered", "lock_step", "offloaded"] | None = None


@dataclass
class AlgorithmConfig:
    """The algorithm and its settings; null leaves a setting to `agents.make_agent`.

    Args:
        name: The algorithm of Stable-Baselines3 or sb3-contrib.
        recipe: A published algorithm, whose settings become the defaults of the other keys; `--print_config` shows
            them, and docs/losses.md their table.
        n_envs: The number of episodes that run side by side.
        learning_rate: The learning rate at the start; null is 1e-5 (with trpo 1e-3, for the critic alone).
        schedule: Keep the learning rate constant, or lower it linearly to zero at the end.
        n_steps: The number of tokens that each of the `n_envs` episodes adds to a rollout; null is env.max_new_tokens.
        batch_size: The number of tokens in a minibatch; null is an eighth of a rollout, or more if that holds too few
            texts.
        n_epochs: The number of passes over each rollout; null is 4.
        advantage: The estimate of advantages: "gae" uses a critic; "reinforce++" is what is still to come of rewards;
            "grpo", "grpo_mean", "rloo" and "reinforce++_baseline" compare samples of the same prompt and need
            `--env.args '{samples_per_prompt: N}'`. Or `module:Class` of a class with __call__(self, episodes), with
            arguments as {id: NAME, args: {...}} (see docs/losses.md).
        critic_lambda: With "gae", the lambda of the critic's targets; null is `gae_lambda`, 0.95 unless args has it.
        lambda_alpha: With "gae", the policy's lambda is 1 - 1 / (lambda_alpha * the tokens of the text); null is
            `gae_lambda`.
        surrogate: The weights of the policy gradient in place of PPO's clipped ratios, by name or {id: NAME, args:
            {...}}: "clip_higher", "dual_clip", "cispo", "gspo", "soft_gate" (see docs/losses.md), or `module:Class` of
            a class with __call__(self, terms); null is PPO's own clip.
        aggregation: The mean that the policy loss is: "token" over all tokens, "sequence" over the texts' own means,
            "constant" over the texts' sums, divided by env.max_new_tokens.
        min_groups: Dynamic sampling (DAPO): leave out groups of samples with equal scores, and train when there are
            this many others; null trains on every rollout.
        max_rollouts: With `min_groups`, train after this many rollouts at the latest.
        micro_batch_tokens: Split each minibatch into parts of this many tokens, to save memory.
        critic_warmup: The number of rollouts at the start in which only the critic learns.
        args: Further arguments of the algorithm, such as `target_kl` or `ent_coef`.
    """

    name: Literal["ppo", "a2c", "maskable_ppo", "trpo"] = "ppo"
    recipe: Recipe | None = None
    n_envs: int = 64
    learning_rate: float | None = None
    schedule: Literal["constant", "linear"] = "constant"
    n_steps: int | None = None
    batch_size: int | None = None
    n_epochs: int | None = None
    advantage: Named | str = "gae"
    critic_lambda: float | None = None
    lambda_alpha: float | None = None
    surrogate: Named | str | None = None
    aggregation: Literal["token", "sequence", "constant"] = "token"
    min_groups: int | None = None
    max_rollouts: int = 10
    micro_batch_tokens: int | None = None
    critic_warmup: int = 0
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class KLConfig:
    """The penalty on divergence from a reference model.

    Args:
        coef: The coefficient: the reward that is subtracted per nat of divergence; 0 switches the penalty off.
        target: The divergence, in nats per episode, at which an adaptive coefficient aims; null keeps `coef` fixed.
        horizon: The number of episodes over which an adaptive coefficient adapts: the more, the slower.
        reference: The name, folder or GGUF file of the reference model; null is the policy as it was before training.
        estimator: The estimator of a token's divergence: k1, k2 and k3 use the sampled token (Schulman), "exact" uses
            the whole distribution.
        clip: The limit to the divergence of a single token, in nats; null for none.
        where: Whether the penalty is subtracted from the reward of each token, or added to the loss, as "exact" or k2:
            the others have another gradient there.
    """

    coef: float = 0.05
    target: float | None = None
    horizon: float = 10_000.0
    reference: str | None = None
    estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    clip: float | None = None
    where: Literal["reward", "loss"] = "reward"


@dataclass
class ShapingConfig:
    """Changes to the score of each episode, before the KL penalty is subtracted.

    Args:
        clip: Limit scores to this absolute value; null for no limit.
        scale: Divide scores by their running standard deviation.
        whiten: Normalise the scores of each rollout to mean 0 and deviation 1.
        missing_eos_penalty: Subtract this from texts that were cut off before they ended.
        overlong_tokens: Subtract a penalty that grows linearly over the last tokens below the limit, as many as this
            (DAPO); null for none.
        overlong_penalty: With `overlong_tokens`, the penalty of a text of its full limit.
        drop_cut: Leave texts that were cut off before they ended out of training (DAPO's overlong filtering).
    """

    clip: float | None = None
    scale: bool = False
    whiten: bool = False
    missing_eos_penalty: float = 0.0
    overlong_tokens: int | None = None
    overlong_penalty: float = 1.0
    drop_cut: bool = False


@dataclass
class EvaluationConfig:
    """Evaluations before, during and after training.

    Args:
        every: The number of tokens trained on between two evaluations.
        n_prompts: The number of prompts in an evaluation.
        n: The number of texts per prompt.
        prompts: A file of held-out prompts; the training prompts by default.
        env_args: Arguments of the environment that differ in evaluations, such as `{part: held_out}`.
        metrics: Metrics by name, or {id: NAME, args: {...}}.
        judge: A reward that the run is not trained on, by name, or {id: NAME, args: {...}}; its mean score of the
            texts is the figure `judge`, and `gap` says how far the reward has risen ahead of it, in deviations.
        best: The figure by which the best model is chosen, which is kept; in a file or on the command line `judge` is
            the default if there is a judge.
        higher_is_better: Whether a higher value of the figure `best` is better.
        patience: Stop training after this many evaluations in a row without a better figure; null never stops.
    """

    every: int = 20_000
    n_prompts: int = 64
    n: int = 1
    prompts: str | None = None
    env_args: dict[str, Any] = field(default_factory=dict)
    metrics: list[Named | str] = field(default_factory=list)
    judge: Named | str | None = None
    best: str = "reward"
    higher_is_better: bool = True
    patience: int | None = None


@dataclass
class TrainConfig:
    """Train a language model on a task.

    Args:
        total_tokens: The number of tokens that the policy writes in the whole training.
        seed: The seed of everything random.
        device: The device of the model, as torch names it: "cpu", "cuda", ...; "auto" is a GPU if there is one.
        env: The task.
        model: The language model.
        algorithm: The algorithm.
        kl: The KL penalty.
        shaping: Changes to scores.
        evaluation: Evaluations.
        loggers: The loggers that get the figures besides metrics.jsonl: "tensorboard", "curves", "wandb", "trackio",
            "mlflow", or the `module:Class` of a KVWriter of Stable-Baselines3; by name, or {id: NAME, args: {...}}. By
            default the first two, if `pip install "textenv[plot]"` has installed their packages.
        samples: The number of prompts whose texts go into samples.jsonl; with 0, tokens.jsonl is not written either.
        samples_every: The number of rollouts between two sets of such texts.
        checkpoint_every: The number of rollouts between two checkpoints.
        keep_checkpoints: The number of newest checkpoints to keep.
        license: The licence of the model, for its model card.
        out: The folder of the run; by default a new one in runs/.

    Example:
        >>> config = TrainConfig(env=EnvConfig("Reviews", args={"data": "reviews.csv"}), model=ModelConfig("gpt2"))
        >>> config.algorithm.n_envs
        64
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
    """Permissions: only the command line can give them, never a configuration file.

    Args:
        allow: A module that the configuration may import. Can be repeated.
        allow_env: An environment variable, such as a key, that the configuration may send to a reward's server
            (api_key_variable). Can be repeated.
        trust_remote_code: Let a model from the hub run its own code.
    """

    allow: list[str] = field(default_factory=list)
    allow_env: list[str] = field(default_factory=list)
    trust_remote_code: bool = False


@dataclass
class ProcessOptions(TrustOptions):
    """The options of the verbs that several processes can run together: only the command line has them.

    Args:
        processes: Start this many processes on this machine, which do the work together, each on a GPU of its own or on
            its share of the CPU; for several machines use torchrun -m agents.cli. Without it, one process.
        timeout: With several processes, the seconds after which one that hangs is named and all end, instead of the
            variable TEXTENV_TIMEOUT; by default 1800. A reward that waits for people does not count.
    """

    processes: str | None = field(default=None, metadata={"metavar": "N"})
    timeout: float | None = None


@dataclass
class RunOptions(TrustOptions):
    """Options of `textenv train` and `tune`: only the command line has them, never a configuration file.

    Args:
        dry_run: Do one rollout and one update, and print an estimate of the whole run's time, memory and disk space.
        quiet: Print errors only.
        json: Print one line of JSON per iteration. With several seeds it has the seed, and the last line is their
            table; in a search it has the trial, and a line follows each trial.
    """

    dry_run: bool = False
    quiet: bool = False
    json: bool = False


@dataclass
class TrainOptions(RunOptions, ProcessOptions):
    """Options of `textenv train` alone.

    Args:
        seeds: Train one run for each of these seeds, one after the other, in the folders seed_N of `out`, which then
            has seeds.md, seeds.json and seeds.png with all of them: means and interquartile means with intervals.
        resume: Continue the run in this folder; further arguments change its configuration. With --seeds, without a
            folder: continue the seed that was stopped, and leave out those that are finished.
        change: With --resume, a key that may differ from the configuration so far; the result then differs from that
            of an uninterrupted run. Can be repeated.
        watch: Write report.html again and again while the run goes on; an open page follows.
    """

    seeds: list[int] = field(default_factory=list, metadata={"action": "extend", "nargs": "+", "type": int})
    resume: str | None = field(default=None, metadata={"nargs": "?", "const": ""})
    change: list[str] = field(default_factory=list)
    watch: bool = False


# The keys that a resumed run may change freely, since they have no influence on the weights.
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


def argument_help(config: type) -> dict[str, str]:
    """Return the description of each argument in the docstrings of a dataclass and of its base classes.

    Example:
        >>> argument_help(Named)["args"]
        'The arguments of the class.'
    """
    texts: dict[str, str] = {}
    for described in reversed(config.__mro__):
        _, _, arguments = inspect.cleandoc(described.__doc__ or "").partition("Args:\n")
        # An entry begins with four spaces and a name; its further lines are indented more.
        entries = re.findall(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", arguments, flags=re.MULTILINE)
        texts |= {name: " ".join(text.split()) for name, text in entries}
    return texts
