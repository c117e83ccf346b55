"""The prompts for a verb that writes texts: from a file, the demo's, or a run's."""

from __future__ import annotations

from textenv.prompts.prompts import PromptLike, read_rows
from textenv.text import demo_corpus as demo
from textenv.text.named_tokenizer import DEMO

from ..errors import CommandError


def prompts_for(verb: str, model: str, path: str | None, encoding: str, *, is_run: bool = False) -> list[PromptLike]:
    """Return the prompts of a file; without a file, the demo's, or an empty list for a run, which has its own.

    Args:
        verb: The verb, for the message.
        model: The run or model that will continue the prompts.
        path: A .jsonl, .json, .csv or .txt file, or None.
        encoding: The file's encoding.
        is_run: Whether `model` is a run whose own prompts the verb uses.

    Raises:
        CommandError: If the file cannot be read or is empty, or no file is named and nothing else has prompts.
    """
    if path is not None:
        return _read_prompts(path, encoding)
    if is_run:
        return []
    if model != DEMO:
        raise CommandError(f"Expected --prompts FILE for textenv {verb} {model}, got none.")
    return list(demo.prompts())


def _read_prompts(path: str, encoding: str) -> list[PromptLike]:
    try:
        prompts = list(read_rows(path, encoding))
    except (OSError, ValueError) as error:
        raise CommandError(f"Expected prompts in {path}, got: {error}") from error
    if not prompts:
        raise CommandError(f"Expected prompts in {path}, got an empty file.")
    return prompts
