"""The commands `textenv sft` and `textenv reward-model`: from files and a configuration to `tune` and its sibling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from textenv.prompts import read_rows

from .assemble import Trust, load_lm, load_tokenizer
from .backbone import PretrainedRewardModel
from .config import DEMO
from .demo import demo_model
from .feedback_data import read_feedback
from .preferences import Labelled, Ranking, hh_pairs
from .refusal import CommandError, Exit
from .reward_model import train_reward_model
from .sft import Tuned, tune
from .sft_data import Text
from .verb_config import RewardModelConfig, SFTConfig, SFTOptions, StageOptions


def tune_model(config: SFTConfig, options: SFTOptions) -> int:
    """Tune a model and print its losses."""
    assert config.data is not None and config.out is not None
    name = _name(config.model)
    trust = Trust(options.allow, options.trust_remote_code)
    tuned = tune(
        load_lm(name, trust),
        texts(config.data, config),
        config.out,
        tokenizer=load_tokenizer(name, trust),
        held_out=texts(config.held_out, config) if config.held_out else (),
        packing=config.packing,
        n_epochs=config.n_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        max_tokens=config.max_tokens,
        seed=config.seed,
        resume=options.resume,
        progress_bar=not options.quiet,
    )
    print(f"{tuned.n_steps} steps, loss {tuned.train_loss:.3f} nats a token on what it was trained on")
    if tuned.held_out_loss is not None and tuned.held_out_loss_before is not None:
        both = (tuned.held_out_loss_before, tuned.held_out_loss)
        print("held out: loss {:.3f} -> {:.3f}".format(*both), end=", ")
        print("perplexity {:.2f} -> {:.2f}".format(*(Tuned.perplexity(loss) for loss in both)))
    print(f"model: {config.out}")
    return Exit.DONE


def texts(path: str, config: SFTConfig) -> list[Text]:
    """Read texts, or pairs of prompt and reference.

    Raises:
        CommandError: If a row has neither.
    """
    found: list[Text] = []
    for number, row in enumerate(_rows(path), 1):
        if not isinstance(row, Mapping):
            found.append(str(row))
        elif {config.prompt_column, config.reference_column} <= row.keys():
            found.append((row[config.prompt_column], row[config.reference_column]))
        elif config.text_column in row:
            found.append(row[config.text_column])
        else:
            raise CommandError(
                f"Expected {config.prompt_column} and {config.reference_column}, or {config.text_column}, in row "
                f"{number} of {path}, got {sorted(row)}."
            )
    return found


def train_scorer(config: RewardModelConfig, options: StageOptions) -> int:
    """Train a reward model and print its figures."""
    assert config.out is not None
    name = _name(config.model)
    data, held_out = _scorer_data(config)
    more = {"trust_remote_code": True} if options.trust_remote_code else {}
    trained = train_reward_model(
        PretrainedRewardModel(name, num_labels=1, **more),
        load_tokenizer(name, Trust(options.allow, options.trust_remote_code)),
        data,
        config.out,
        held_out=held_out,
        loss=config.loss,
        centring=config.centring,
        n_epochs=config.n_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        max_tokens=config.max_tokens,
        seed=config.seed,
        progress_bar=not options.quiet,
    )
    print(f"{len(trained.losses)} steps, loss {trained.losses[-1]:.3f} in the last")
    if trained.held_out is not None:
        print(f"held out: {trained.held_out}")
    print(f"model: {config.out}")
    return Exit.DONE


def _scorer_data(config: RewardModelConfig) -> tuple[Any, Any]:
    """Return what is trained on, and what is measured."""
    held_out = examples(config.held_out) if config.held_out else ()
    if config.from_feedback is None:
        assert config.data is not None
        return examples(config.data), held_out
    found = read_feedback(config.from_feedback, everything=config.held_out is not None)
    kind = type(found.data[0]).__name__.lower()
    print(f"{config.from_feedback}: {len(found.data)} {kind} examples", end="")
    print(f", {len(found.held_out)} of other prompts held out" if found.held_out else "")
    return found.data, held_out or found.held_out


def examples(path: str) -> Any:
    """Read pairs, those of hh-rlhf included, or labelled texts.

    Raises:
        CommandError: If the rows have other columns.
    """
    rows = [row if isinstance(row, Mapping) else {"prompt": row} for row in _rows(path)]
    columns = set.intersection(*(set(row) for row in rows)) if rows else set()
    if {"text", "label"} <= columns:
        return [Labelled(row["text"], float(row["label"])) for row in rows]
    if not {"chosen", "rejected"} <= columns:
        raise CommandError(f"Expected chosen and rejected, or text and label, in {path}, got {sorted(columns)}.")
    if "prompt" not in columns and all("\n\nAssistant:" in row["chosen"] for row in rows):
        return hh_pairs(rows)
    return [Ranking((row["chosen"], row["rejected"]), row.get("prompt", "")) for row in rows]


def _rows(path: str) -> list[Any]:
    try:
        return list(read_rows(path))
    except (OSError, ValueError) as error:
        raise CommandError(f"Expected rows in {path}, got: {error}") from error


def _name(model: str) -> str:
    return str(demo_model()) if model == DEMO else model
