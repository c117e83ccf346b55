"""The card of a trained model: task, reward, settings, results and licence, as the README of its folder."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from textenv.printable import printable

from .config import Named, TrainConfig


def model_card(config: TrainConfig, about: Mapping[str, Any], results: str) -> str:
    """Return the card as Markdown with the fields that the hub reads.

    Args:
        config: The run's configuration.
        about: What `run.json` says.
        results: A table in Markdown.
    """
    reward = config.env.reward
    described = json.dumps(asdict(reward), ensure_ascii=False) if isinstance(reward, Named) else reward
    settings = json.dumps(asdict(config), ensure_ascii=False, indent=1).replace("```", "'''")
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
            "## Settings",
            "",
            "```json",
            settings,
            "```",
            "",
        ]
    )


def _plain(text: str) -> str:
    """Return a text as a value of YAML."""
    return text if re.fullmatch(r"[\w.+-]+", text) else json.dumps(text)


def _text(text: str) -> str:
    return html.escape(printable(" ".join(text.split())).replace("`", "'"))
