"""Loading models: names of nothing are refused soon, damage is named, what a folder lacks is not drawn at random."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from textenv.json_files import read_json
from textenv.trust import runs_remote_code

# The files of a folder that transformers reads as objects; without these keys it raises a KeyError.
OBJECTS: dict[str, dict[Any, Any]] = {
    "config.json": {},
    "generation_config.json": {},
    "tokenizer_config.json": {},
    "special_tokens_map.json": {},
    "model.safetensors.index.json": {"weight_map": {str: str}},
    "tokenizer.json": {"model": dict, "added_tokens": [dict]},
}
LOOK_UP_SECONDS = 5.0  # for one question to the hub, where transformers asks again and again for half a minute


def check_name(name: str | PathLike[str], expected: str = "the folder of a model or its name on the hub") -> None:
    """Raise ValueError unless a name is that of a folder, of a model downloaded before, or of one on the hub.

    The hub is asked once in a process, for at most `LOOK_UP_SECONDS`, and with HF_HUB_OFFLINE=1 not at all.

    Args:
        name: What a model or tokenizer is to be loaded by.
        expected: What it may be, for the message.

    Example:
        >>> check_name(".")  # any folder: what is in it is looked at when it is loaded
    """
    text = fspath(name)
    if Path(text).is_dir():
        return
    try:
        _look_up(text)
    except LookupError as error:
        raise ValueError(f"Expected {expected}, got {text!r}: there is no such folder, and {error.args[0]}.") from error


@cache
def _look_up(name: str) -> None:
    """Raise LookupError, which says why, where a model is neither downloaded nor on the hub; success is remembered."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        snapshot_download(name, local_files_only=True)
        return
    except HFValidationError as error:
        raise LookupError("no model of the hub can be called so") from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise LookupError("it was not downloaded before, and HF_HUB_OFFLINE forbids to ask the hub") from error
    answer = _ask_hub(name)
    if isinstance(answer, RepositoryNotFoundError) and not isinstance(answer, GatedRepoError):
        raise LookupError(f"{constants.ENDPOINT} has no such model, or a private one, for which `hf auth login` asks")
    # Any other answer of the hub is left to transformers, which says how to get at a gated model.
    if answer is not None and not isinstance(answer, HfHubHTTPError):
        raise LookupError(f"it was not downloaded before, and {constants.ENDPOINT} cannot be reached: {answer}")


def _ask_hub(name: str) -> Exception | None:
    """Return why the hub does not tell of a model; None if it does.

    In a thread, since the time limit of a request holds for each of the hub's addresses, and for no look-up of them.
    """
    from huggingface_hub import HfApi

    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=LOOK_UP_SECONDS)
            answers.put(None)
        except Exception as error:  # of whatever library carries the request: it is the answer
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=LOOK_UP_SECONDS)
    except queue.Empty:
        return TimeoutError(f"no answer within {LOOK_UP_SECONDS:g} s")


def from_pretrained(auto_class: Any, name: str | PathLike[str], **kwargs: Any) -> Any:
    """Return `auto_class.from_pretrained(name, **kwargs)`, which asks nobody whether to run a model's code.

    Args:
        auto_class: A class of transformers.
        name: A name on the hub or the path of a folder.
        **kwargs: The other arguments. `trust_remote_code` is what the command line says, and False elsewhere.

    Raises:
        ValueError: If it has code of its own that may not run, or a file is damaged.
    """
    with readable(name):
        try:
            return auto_class.from_pretrained(name, **{"trust_remote_code": runs_remote_code(), **kwargs})
        except ValueError as error:
            raise refused_code(error, name) from error


def from_config(auto_class: Any, config: Any, trust_remote_code: bool = False) -> Any:
    """Return `auto_class.from_config(config)`, a model with fresh weights, as `from_pretrained` loads one with its own.

    Raises:
        ValueError: If it has code of its own that may not run.
    """
    try:
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise refused_code(error, config.name_or_path or config.model_type) from error


def n_positions(config: Any) -> int | None:
    """Return how long a sequence a model can read, in tokens; None where nothing bounds it (BLOOM's ALiBi, T5).

    Args:
        config: The model's config, of transformers; of a model of text and pictures its text part counts.

    Example:
        >>> from transformers import BloomConfig, GPT2Config
        >>> n_positions(GPT2Config(n_positions=64)), n_positions(BloomConfig())
        (64, None)
    """
    # Configs of transformers map their own name, as GPT-2's `n_positions`, to this one (`attribute_map`).
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def refused_code(error: ValueError, name: object) -> ValueError:
    """Return an error of loading a model; where it asks for trust in the model's own code, with how to give it."""
    if "trust_remote_code=True" not in str(error):
        return error
    return ValueError(
        f"Expected a model without code of its own, got {str(name)!r}, which has some: if you trust it, "
        "--trust_remote_code on the command line, or trust_remote_code=True, lets it run."
    )


def load_whole(
    auto_class: Any, name: str | PathLike[str], *, fresh_head: bool = False, any_more: bool = False, **kwargs: Any
) -> Any:
    """Return `from_pretrained(auto_class, name, **kwargs)`, whose weights are all those of the folder.

    Args:
        auto_class: A class of transformers.
        name: A name on the hub or the path of a folder.
        fresh_head: Whether the head may be a new one, in place of another: what stands beside the base model.
        any_more: Whether the folder may have more than the model.
        **kwargs: The other arguments.

    Raises:
        ValueError: If the folder lacks a tensor of the model, or has others, or a file is damaged.
    """
    model, found = from_pretrained(auto_class, name, output_loading_info=True, **kwargs)
    body = f"{model.base_model_prefix}."
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if fresh_head:
        missing = [key for key in missing if key.startswith(body)]
        unexpected = [key for key in unexpected if key.startswith(body)]
    if missing:
        raise ValueError(
            f"Expected all weights of {type(model).__name__} in {str(name)!r}, got none for {_some(missing)}, which "
            "would be random. Is the folder damaged, cut short, or one of a model with another head or config?"
        )
    if unexpected and not any_more:
        raise ValueError(
            f"Expected the weights of {type(model).__name__} alone in {str(name)!r}, got {_some(unexpected)} besides, "
            "which its config has no place for. Is it the folder of another model? If they are to be left out, load it "
            "with transformers, save_pretrained(folder), and give that folder."
        )
    return model


@contextmanager
def readable(name: str | PathLike[str]) -> Iterator[None]:
    """Name the file where what transformers loads within is damaged.

    Args:
        name: What it is loaded by; a name on the hub has no files here, and is let through.

    Raises:
        ValueError: If a file of the folder is damaged, or transformers raises what only a damaged one makes it raise.
    """
    folder = Path(name)
    for file, shape in OBJECTS.items():
        if (folder / file).is_file():
            read_json(folder / file, shape)
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # a KeyError, a SafetensorError, ...: it takes files for what they should be
        if isinstance(error, (OSError, ValueError)) and (not folder.is_dir() or str(folder) in str(error)):
            raise  # transformers says what is wrong
        damaged = next(filter(_is_damaged, sorted(folder.glob("*.safetensors"))), folder)
        raise ValueError(f"Expected to load {damaged}, got {type(error).__name__}: {_line(error)}") from error


def _is_damaged(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open  # comes with transformers

    try:
        with safe_open(file, "np"):
            return False
    except SafetensorError:
        return True


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _some(keys: Iterable[str]) -> str:
    first, *others = keys
    return f"{first!r} and {len(others)} more" if others else repr(first)
