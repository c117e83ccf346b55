"""The commands `sft`, `classifier` and `reward-model`: the training before PPO, from a configuration to a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from textenv.text.named_tokenizer import DEMO
from textenv.text.tokenizer import Tokenizer

from ..errors import CommandError, Exit
from ..models.pretrained import PretrainedRewardModel
from ..runs.assemble import load_lm, load_tokenizer, trust_of
from ..small_models.tokenizers import char_tokenizer
from ..supervised.classifier import LabelledTexts, train_classifier
from ..supervised.reward_model import train_reward_model
from ..supervised.sft import Tuned, tune
from ..supervised.sft_data import Text, words_of
from .options import ClassifierConfig, RewardModelConfig, SFTConfig, StageConfig, StageOptions
from .stage_data import LABEL_NAMES, Label, read_labels, read_preferences, read_texts

ENOUGH = 40  # examples of a reward model: the fewest for which examples/people.md has a measured accuracy
MIN_COUNT = 2  # a character gets its own token from two occurrences on: a single one teaches nothing
END = 0  # the id of the end token in the tokenizers of fresh models


def tune_model(config: SFTConfig, options: StageOptions) -> int:
    """Fine-tune a model and print its losses; return the exit code."""
    trust = trust_of(options)
    texts = read_texts(config)
    if _is_fresh(config):
        lm, tokenizer = _fresh_model(config, texts.train)
    else:
        lm, tokenizer = load_lm(config.model, trust), load_tokenizer(config.model, trust)
    tuned = tune(
        lm,
        texts.train,
        _out(config),
        tokenizer=tokenizer,
        held_out=texts.held_out,
        packing=config.packing,
        **_training(config, options),
    )
    print(f"{tuned.n_steps} steps, loss {tuned.train_loss:.3f} nats a token on what it was trained on")
    if tuned.held_out_loss is not None and tuned.held_out_loss_before is not None:
        both = (tuned.held_out_loss_before, tuned.held_out_loss)
        print("held out: loss {:.3f} -> {:.3f}".format(*both), end=", ")
        print("perplexity {:.2f} -> {:.2f}".format(*(Tuned.perplexity(loss) for loss in both)))
    print(f"model: {config.out}")
    return Exit.DONE


def _is_fresh(config: SFTConfig | ClassifierConfig | RewardModelConfig) -> bool:
    if config.fresh and config.model != DEMO:
        raise CommandError(f"Expected either `model` or `fresh`, got {config.model!r} and {config.fresh}.")
    return bool(config.fresh)


def _fresh_model(config: SFTConfig, texts: Sequence[Text]) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """Return the config of a model with fresh weights, and its tokenizer, or None if `tune` makes one of byte pairs."""
    sizes = {"bos_token_id": END, "eos_token_id": END, **config.fresh}
    if config.fresh_tokenizer == "byte_pairs":
        return fresh_config(sizes), None
    tokenizer = char_tokenizer([words_of(text) for text in texts], MIN_COUNT)
    return fresh_config({**sizes, "vocab_size": len(tokenizer)}), tokenizer


def fresh_config(sizes: dict[str, Any]) -> PreTrainedConfig:
    """Return the transformers config of a model by its type and sizes.

    Args:
        sizes: The key "model_type", and attributes of that type's config.

    Raises:
        CommandError: If the type is missing or unknown, or its config has no such attribute.

    Example:
        >>> fresh_config({"model_type": "gpt2", "n_layer": 2}).n_layer
        2
    """
    rest = dict(sizes)
    kind = rest.pop("model_type", None)
    try:
        config = AutoConfig.for_model(kind)
    except ValueError as error:
        raise CommandError(f"Expected the model_type of a fresh model, such as gpt2, got {kind!r}.") from error
    # transformers `AutoConfig.for_model` takes any keyword, and an unknown one becomes an attribute that nothing reads.
    unknown = sorted(name for name in rest if not hasattr(config, name))
    if unknown:
        raise CommandError(f"Expected sizes of {kind}, got {', '.join(unknown)}, which its config does not have.")
    return AutoConfig.for_model(kind, **rest)


def classify(config: ClassifierConfig, options: StageOptions) -> int:
    """Train a classifier and print its accuracy; return the exit code."""
    labels = read_labels(config)
    names = config.labels or list(LABEL_NAMES.get(config.task or "", sorted({row.label for row in labels.train})))
    lm, tokenizer = _reader(config, options)
    texts, numbers = _numbered(labels.train, names)
    trained = train_classifier(
        lm,
        tokenizer,
        texts,
        numbers,
        _out(config),
        held_out=_numbered(labels.held_out, names) if labels.held_out else None,
        label_names=names,
        **_training(config, options),
    )
    print(f"{trained.n_steps} steps")
    for part, result in (("trained on", trained.training), ("held out", trained.held_out)):
        if result is not None:
            interval = f"{result.accuracy:.3f} [{result.low:.3f}, {result.high:.3f}]"
            print(f"{part}: accuracy {interval} of {result.n_texts} texts")
    print(f"model: {config.out}")
    return Exit.DONE


def _reader(
    config: ClassifierConfig | RewardModelConfig, options: StageOptions
) -> tuple[str | PreTrainedConfig, PreTrainedTokenizerBase]:
    """Return a model's name or folder, or the config for fresh weights, and the model's tokenizer."""
    own = None if _is_fresh(config) else config.model
    source = config.tokenizer or own
    if source is None:
        raise CommandError("Expected --tokenizer NAME with `fresh`, got none: fresh weights have no tokenizer yet.")
    tokenizer = load_tokenizer(source, trust_of(options))
    if own is not None:
        return own, tokenizer
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **config.fresh}
    return fresh_config(sizes), tokenizer


def _numbered(rows: Sequence[Label], names: Sequence[str]) -> LabelledTexts:
    """Return texts and the numbers of their labels, which are the labels' positions in `names`."""
    for row in rows:
        if row.label not in names:
            raise CommandError(f"Expected labels among {', '.join(names)}, got {row.label!r}: give --labels.")
    return [row.text for row in rows], [names.index(row.label) for row in rows]


def train_scorer(config: RewardModelConfig, options: StageOptions) -> int:
    """Train a reward model and print its loss and accuracy; return the exit code."""
    more = {"trust_remote_code": True} if options.trust_remote_code else {}
    lm, tokenizer = _reader(config, options)
    examples = read_preferences(config, cast("Tokenizer", tokenizer))
    n = len(examples.train)
    print(f"{n} examples, {len(examples.held_out)} held out")
    if n < ENOUGH:
        print(
            f"warning: {n} examples are too few for a reward model: {ENOUGH} are the least, and 200 are better, as "
            "measured with a simulated rater (examples/people.md).",
            file=sys.stderr,
        )
    trained = train_reward_model(
        PretrainedRewardModel(lm, num_labels=1, **more) if isinstance(lm, str) else lm,
        tokenizer,
        examples.train,
        _out(config),
        held_out=examples.held_out,
        first_layers=config.first_layers,
        train=config.train,
        loss=config.loss,
        centring=config.centring,
        **_training(config, options),
    )
    if config.train == "head":
        print(f"score head fitted, loss {trained.losses[-1]:.3f}")
    else:
        print(f"{len(trained.losses)} steps, loss {trained.losses[-1]:.3f} in the last")
    if trained.held_out is not None:
        result = trained.held_out
        interval = f"{result.accuracy:.3f} [{result.low:.3f}, {result.high:.3f}]"
        print(f"held out: {interval} of {result.n_pairs} pairs in the right order, loss {result.loss:.3f}")
    print(f"model: {config.out}")
    return Exit.DONE


def _training(config: StageConfig, options: StageOptions) -> dict[str, Any]:
    """Return the arguments that the three trainings share."""
    names = ("n_epochs", "batch_size", "learning_rate", "max_tokens", "seed")
    return {
        **{name: getattr(config, name) for name in names},
        "resume": options.resume,
        "overwrite": options.overwrite,
        "progress_bar": not options.quiet,
    }


def _out(config: StageConfig) -> str:
    transformers_logging.disable_progress_bar()
    assert config.out is not None  # `cli._read_stage` refuses None
    return config.out
