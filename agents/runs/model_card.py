"""The model card of a trained model: task, reward, settings, results and licence, in Markdown."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from textenv.text.printable import page_text, printable

from ..configuration.config import Named, TrainConfig

SHOWN = 8  # the most prompts whose samples the card shows


def model_card(
    config: TrainConfig,
    about: Mapping[str, Any],
    results: str,
    samples: Sequence[Mapping[str, Any]] = (),
    reward_after: float | None = None,
    curves: str | None = None,
) -> str:
    """Return the model card as Markdown, with the YAML fields that the Hugging Face hub reads.

    Args:
        config: The run's configuration.
        about: The content of `run.json`.
        results: A table in Markdown.
        samples: Rows of `samples.jsonl`; the first and the last text of each prompt go into a table.
        reward_after: The mean reward after training, for the hub's list of results; None leaves the entry out.
        curves: The file name of the picture of the curves in the card's folder; None for no picture.
    """
    reward = config.env.reward
    described = json.dumps(asdict(reward), ensure_ascii=False) if isinstance(reward, Named) else reward
    settings = json.dumps(asdict(config), ensure_ascii=False, indent=1).replace("```", "'''")  # must not end the block
    settings = printable(settings)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    commit = about["git"]["textenv"]
    fields = ["---", f"license: {_plain(config.license or 'unknown')}", "library_name: transformers"]
    if config.model.name != "demo":
        fields.append(f"base_model: {json.dumps(config.model.name)}")
    return "\n".join(
        [
            *fields,
            "tags: [reinforcement-learning, textenv]",
            *_listing(config, reward_after),
            "---",
            "",
            f"# {_text(config.model.name)}, trained on {_text(config.env.id)}",
            "",
            f"Trained with {config.algorithm.name.upper()} by textenv, for {config.total_tokens:,} tokens.",
            "",
            f"- Task: `{_text(config.env.id)}`",
            f"- Reward: `{_text(described or 'the own one of the task')}`",
            f"- Licence: {_text(config.license or 'not given')}",
            f"- Made with: {_text(versions)}" + (f"; commit `{_text(commit)}`" if commit else ""),
            "",
            "## Results",
            "",
            results,
            "",
            *(["## Curves", "", f"![Reward, divergence and length over training]({curves})", ""] if curves else []),
            *(["## Samples", "", *_sample_lines(samples), ""] if samples else []),
            "## Settings",
            "",
            "```json",
            settings,
            "```",
            "",
        ]
    )


def _listing(config: TrainConfig, reward: float | None) -> list[str]:
    """Return the field `model-index`, from which the hub lists the mean reward, in the form of huggingface_sb3."""
    if reward is None or not math.isfinite(reward):
        return []
    task = {"type": "reinforcement-learning", "name": "reinforcement-learning"}
    data = {"type": config.env.id, "name": config.env.id}
    metric = {"type": "mean_reward", "name": "mean_reward", "value": round(reward, 4)}
    name = config.algorithm.name.upper()
    listed = [{"name": name, "results": [{"task": task, "dataset": data, "metrics": [metric]}]}]
    return [f"model-index: {json.dumps(listed)}"]  # any JSON is YAML


def _sample_lines(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the first and the last texts of each prompt, side by side."""
    tokens = [row["tokens"] for row in samples]
    first, last = min(tokens), max(tokens)
    before, after = ([row for row in samples if row["tokens"] == time][:SHOWN] for time in (first, last))
    lines = [f"| prompt | after {first:,} tokens | after {last:,} tokens | reward |", "|---|---|---|---|"]
    for old, new in zip(before, after):  # noqa: B905  (a resumed run may have another number of prompts)
        cells = [page_text(" ".join(text.split())) for text in (new["prompt"], old["text"], new["text"])]
        lines.append(f"| {' | '.join(cells)} | {new['reward']:.3g} |")
    return lines


def _plain(text: str) -> str:
    """Return a text as a value of YAML, quoted unless it is a plain word."""
    return text if re.fullmatch(r"[\w.+-]+", text) else json.dumps(text)


def _text(text: str) -> str:
    """Return a text for one line of Markdown, within or outside of backticks, with HTML escaped."""
    return html.escape(printable(" ".join(text.split())).replace("`", "'"))
