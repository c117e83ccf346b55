"""The groups of `--help`: what a person wants to do, and the verbs or arguments for it."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Mapping

from jsonargparse import ArgumentParser

from ..configuration.config import TrainConfig
from .options import RateConfig, StageConfig
from .verb import Verb

ONLY_HERE = "only on the command line"
READ = "read or print a configuration"
START = f"start and continue ({ONLY_HERE})"
PERMIT = f"give permissions ({ONLY_HERE})"
PERMISSIONS = ("allow", "allow_env", "trust_remote_code")

VERB_GROUPS = {
    "look around, and check before training": ("tasks", "doctor"),
    "train by reinforcement learning": ("train", "tune"),
    "prepare a model or a reward with data": ("sft", "classifier", "reward-model", "critic"),
    "let people judge": ("rate",),
    "see what a run has learned": ("evaluate", "compare", "show", "report"),
    "use a model": ("generate", "chat", "export"),
}

# By the dataclass of a verb's arguments: what a person wants to do, and the arguments for it. The name of a section,
# such as "env", stands for the argument `--env` and for those of its keys that no group names.
GROUPS: dict[type, dict[str, tuple[str, ...]]] = {
    TrainConfig: {
        READ: ("help", "config", "print_config"),
        START: ("dry_run", "seeds", "processes", "timeout", "resume", "change", "overwrite", "watch", "quiet", "json"),
        "fit the critic": ("rollouts", "n_epochs", "batch_size", "learning_rate"),
        "search for the best settings": ("trials", "tune"),
        "choose the task and its reward": ("env",),
        "choose the model, and the weights that learn": ("model",),
        "set how texts are sampled": (
            "model.temperature",
            "model.top_k",
            "model.top_p",
            "model.min_p",
            "model.repetition_penalty",
            "model.top_p_lag",
        ),
        "choose the algorithm, its length and its pace": ("total_tokens", "seed", "algorithm"),
        "choose advantages and the loss": (
            "algorithm.advantage",
            "algorithm.lambda_alpha",
            "algorithm.surrogate",
            "algorithm.aggregation",
            "algorithm.min_groups",
            "algorithm.max_rollouts",
        ),
        "choose the critic, and how it learns": (
            "model.critic",
            "model.critic_model",
            "model.value_norm",
            "model.critic_lr_scale",
            "algorithm.critic_lambda",
            "algorithm.critic_warmup",
        ),
        "stay close to the model before training": ("kl",),
        "change scores before anything is learned from them": ("shaping",),
        "evaluate, keep the best model and stop early": ("evaluation",),
        "save time and memory": (
            "device",
            "model.autocast",
            "model.gradient_checkpointing",
            "model.shard",
            "algorithm.micro_batch_tokens",
        ),
        "log and keep": (
            "out",
            "loggers",
            "samples",
            "samples_every",
            "checkpoint_every",
            "keep_checkpoints",
            "license",
        ),
        PERMIT: PERMISSIONS,
    },
    StageConfig: {
        READ: ("help", "config", "print_config"),
        START: ("processes", "timeout", "resume", "overwrite", "quiet"),
        "choose the model to train from": ("model", "fresh", "fresh_tokenizer", "tokenizer", "first_layers", "train"),
        "choose the data": (
            "data",
            "task",
            "task_args",
            "from_feedback",
            "half",
            "held_out",
            "encoding",
            "text_column",
            "prompt_column",
            "reference_column",
            "labels",
        ),
        "set the training": (
            "n_epochs",
            "batch_size",
            "learning_rate",
            "max_tokens",
            "packing",
            "loss",
            "centring",
            "seed",
        ),
        "write the model": ("out",),
        PERMIT: PERMISSIONS,
    },
    RateConfig: {
        "get help": ("help",),
        f"choose where to answer ({ONLY_HERE})": ("terminal", "web", "train"),
        "choose the model and its prompts": ("model", "prompts", "encoding", "max_new_tokens", "seed"),
        "choose the questions, and who answers them": ("kind", "n", "low", "high", "rater", "raters", "db"),
        "serve the page, with --web": ("host", "port", "token"),
        "learn from the scores, with --train": ("out", "learning_rate", "kl", "updates"),
        PERMIT: PERMISSIONS,
    },
}


def overview(verbs: Mapping[str, Verb]) -> str:
    """Return the help of the command itself, as wide as the terminal.

    Args:
        verbs: The verbs by name.

    Example:
        >>> from agents.cli.main import VERBS
        >>> "train         train a model on a task" in overview(VERBS)
        True
    """
    groups = [
        "\n".join([f"{title}:", *(f"  {name:<14}{verbs[name].does}" for name in names)])
        for title, names in VERB_GROUPS.items()
    ]
    notes = [
        "`textenv train` alone runs the built-in demo. `textenv VERB --help` lists a verb's arguments, "
        "and `textenv --version` prints the version.",
        "Exit codes: 0 done, 1 unexpected error (doctor: something to fix), 2 wrong arguments or refused input, "
        "3 a NaN or infinity in training, 4 a failed reward, 5 a failed write to the disk, 6 a missing package, "
        "130 and 143 interrupted.",
    ]
    width = shutil.get_terminal_size().columns - 2  # as argparse has it
    parts = ["usage: textenv VERB ...", "Reinforcement learning of language models on text.", *groups]
    return "\n\n".join([*parts, "\n".join(textwrap.fill(note, width) for note in notes)])


def regroup(parser: ArgumentParser, config: type) -> None:
    """Arrange the arguments in a parser's help by what a person wants to do.

    Args:
        parser: The parser of a verb.
        config: The dataclass of the verb's arguments; nothing is done for one with few of them.
    """
    table = next((groups for kind, groups in GROUPS.items() if issubclass(config, kind)), {})
    place = {key: (title, n) for title, keys in table.items() for n, key in enumerate(keys)}
    found: dict[str, list[tuple[int, argparse.Action]]] = {title: [] for title in table}
    for group in parser._action_groups:  # argparse has no public list of them
        for action in list(group._group_actions):
            title, n = place.get(action.dest) or place.get(action.dest.partition(".")[0], ("", 0))
            if title:
                group._group_actions.remove(action)
                found[title].append((n, action))
    for title, actions in found.items():
        new = parser.add_argument_group(title)
        new._group_actions += [action for _, action in sorted(actions, key=lambda pair: pair[0])]
