"""Guarded loading of Hugging Face models, with errors that name an unknown model, a damaged file or missing weights."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from textenv.checks.json_files import read_json
from textenv.checks.trust import runs_remote_code
from textenv.huggingface.gguf import FILE, as_floats, check_gguf, is_gguf, located, readable_gguf

# The JSON files that transformers reads from a folder, and the keys without which it raises a bare KeyError.
OBJECTS: dict[str, dict[Any, Any]] = {
    "config.json": {},
    "generation_config.json": {},
    "tokenizer_config.json": {},
    "special_tokens_map.json": {},
    "model.safetensors.index.json": {"weight_map": {str: str}},
    "tokenizer.json": {"model": dict, "added_tokens": [dict]},
}
LOOK_UP_SECONDS = 5.0  # for one request to the hub; transformers would retry for about half a minute


def check_name(name: str | PathLike[str], expected: str = "the folder of a model or its name on the hub") -> None:
    """Raise ValueError unless a name is a folder, a GGUF file, a model downloaded before, or a model on the hub.

    The hub is asked once per name and process, for at most `LOOK_UP_SECONDS`; with HF_HUB_OFFLINE=1 it is not asked.

    Args:
        name: The name or folder of a model or tokenizer.
        expected: The names that are accepted, in words, for the message.

    Raises:
        ValueError: If the name is none of these; the message lists what was tried.
        MissingExtraError: If it is a GGUF file, and a package that reads it is missing.

    Example:
        >>> check_name(".")  # any folder passes: its files are checked when they are loaded
    """
    text = fspath(name)
    if Path(text).is_dir():
        return
    if is_gguf(text):
        check_gguf(text)
        return
    try:
        _look_up(text)
    except LookupError as error:
        raise ValueError(f"Expected {expected}, got {text!r}: there is no such folder, and {error.args[0]}.") from error


@cache
def _look_up(name: str) -> None:
    """Raise LookupError with the reason if a model is neither downloaded nor on the hub; success is cached."""
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
        raise LookupError("no model on the hub can have this name") from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise LookupError("it was not downloaded before, and HF_HUB_OFFLINE forbids asking the hub") from error
    answer = _ask_hub(name)
    if isinstance(answer, RepositoryNotFoundError) and not isinstance(answer, GatedRepoError):
        raise LookupError(f"{constants.ENDPOINT} has no such model, or a private one, which needs `hf auth login`")
    # Other answers of the hub are left to transformers, whose error explains how to get access to a gated model.
    if answer is not None and not isinstance(answer, HfHubHTTPError):
        raise LookupError(f"it was not downloaded before, and {constants.ENDPOINT} cannot be reached: {answer}")


def _ask_hub(name: str) -> Exception | None:
    """Return the error with which the hub answers a request for a model, or None if it has the model.

    The request runs in a thread with a time limit of its own, since the `timeout` of a request applies to each of the
    hub's IP addresses in turn, and not to the DNS look-up.
    """
    from huggingface_hub import HfApi

    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=LOOK_UP_SECONDS)
            answers.put(None)
        except Exception as error:  # any error of huggingface_hub, httpx or the sockets below is the answer
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=LOOK_UP_SECONDS)
    except queue.Empty:
        return TimeoutError(f"no answer within {LOOK_UP_SECONDS:g} s")


def from_pretrained(auto_class: Any, name: str | PathLike[str], **kwargs: Any) -> Any:
    """Return `auto_class.from_pretrained(name, **kwargs)`, without the question whether to run the model's own code.

    Args:
        auto_class: A class of transformers.
        name: A name on the hub, the path of a folder, or that of a GGUF file.
        **kwargs: Other arguments. `trust_remote_code` is True only if the command line allows it or the caller sets it.

    Raises:
        ValueError: If the model has code of its own that may not run, or a file is damaged, or no GGUF file.
        MissingExtraError: If a package that reads GGUF files is missing.
    """
    name, kwargs = located(name, kwargs)
    with readable(name) if kwargs.get(FILE) is None else readable_gguf(name, kwargs[FILE]):
        try:
            return auto_class.from_pretrained(name, **{"trust_remote_code": runs_remote_code(), **kwargs})
        except ValueError as error:
            raise refused_code(error, name) from error


def check_whole(name: str | PathLike[str]) -> None:
    """Raise ValueError if a folder has an adapter of peft: transformers would put it into its base model.

    Args:
        name: The folder of a model, or a GGUF file in it; a name on the hub has no files here and is not checked.
    """
    if ((Path(name).parent if is_gguf(name) else Path(name)) / "adapter_config.json").is_file():
        raise ValueError(
            f"Expected the folder of a whole model, got {str(name)!r}, which holds an adapter of peft: merge it into "
            "its base, AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(other)."
        )


def from_config(auto_class: Any, config: Any, trust_remote_code: bool = False) -> Any:
    """Return `auto_class.from_config(config)`, a model with fresh weights, under the rules of `from_pretrained`.

    Raises:
        ValueError: If the model has code of its own that may not run, or transformers builds no such model.
    """
    name = type(config).__name__
    try:
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if str(error).startswith("Unrecognized configuration class"):
            raise ValueError(
                f"Expected the config of a language model, got {name}, for which transformers' {auto_class.__name__} "
                "has no class: use the config of its text model, if it has one (get_text_config())."
            ) from error
        raise refused_code(error, config.name_or_path or config.model_type) from error
    except AssertionError as error:  # Reformer: "make sure that is_decoder=True"
        raise ValueError(f"Expected a config of which transformers builds a model, got {name}: {error}") from error


def refused_code(error: ValueError, name: object) -> ValueError:
    """Return the error, or where transformers asks to trust the model's own code, one that says how to allow it."""
    if "trust_remote_code=True" not in str(error):
        return error
    return ValueError(
        f"Expected a model without code of its own, got {str(name)!r}, which has some: if you trust it, "
        "--trust_remote_code on the command line, or trust_remote_code=True, lets it run."
    )


def load_whole(
    auto_class: Any, name: str | PathLike[str], *, fresh_head: bool = False, any_more: bool = False, **kwargs: Any
) -> Any:
    """Return `from_pretrained(auto_class, name, **kwargs)` if every weight of the model comes from the folder.

    transformers itself draws missing weights at random and leaves unexpected ones out, with no more than a warning.

    Args:
        auto_class: A class of transformers.
        name: A name on the hub, the path of a folder, or that of a GGUF file, whose weights become floats.
        fresh_head: Whether the head, that is, all weights outside the base model, may be a new one with random weights.
        any_more: Whether the folder may hold weights that the model does not have.
        **kwargs: The other arguments.

    Raises:
        ValueError: If the folder lacks a tensor of the model or has others, or a file is damaged.
    """
    if is_gguf(name) or kwargs.get(FILE) is not None:
        kwargs = {**as_floats(), **kwargs}
    # `output_loading_info` is an argument of transformers' `PreTrainedModel.from_pretrained`.
    model, loading_info = from_pretrained(auto_class, name, output_loading_info=True, **kwargs)
    body = f"{model.base_model_prefix}."
    missing, unexpected = sorted(loading_info["missing_keys"]), sorted(loading_info["unexpected_keys"])
    if fresh_head:
        missing = [key for key in missing if key.startswith(body)]
        unexpected = [key for key in unexpected if key.startswith(body)]
    if missing:
        raise ValueError(
            f"Expected all weights of {type(model).__name__} in {str(name)!r}, got none for {_named(missing)}, which "
            "would be random. Is the folder damaged, cut short, or one of a model with another head or config?"
        )
    if unexpected and not any_more:
        raise ValueError(
            f"Expected the weights of {type(model).__name__} alone in {str(name)!r}, got {_named(unexpected)} besides, "
            "which its config has no place for. Is it the folder of another model? If they are to be left out, load it "
            "with transformers, save_pretrained(folder), and give that folder."
        )
    return model


def has_tokenizer(name: str | PathLike[str], **where: Any) -> bool:
    """Return whether a model has its tokenizer beside it, as GGUF files always have.

    Args:
        name: A name on the hub, the path of a folder, or that of a GGUF file.
        **where: The arguments of `from_pretrained` that say where its files are.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    return is_gguf(name) or where.pop(FILE, None) is not None or bool(get_tokenizer_config(name, **where))


@contextmanager
def readable(name: str | PathLike[str]) -> Iterator[None]:
    """Turn errors that a damaged file causes inside the block into a ValueError that names the file.

    Args:
        name: The folder that is loaded; a name on the hub has no files here and is not checked.

    Raises:
        ValueError: If a file of the folder is damaged, or loading fails with an error that only damage explains.
    """
    folder = Path(name)
    for file, shape in OBJECTS.items():
        if (folder / file).is_file():
            read_json(folder / file, shape)
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # KeyError, SafetensorError, ...: transformers does not check the files it reads
        if isinstance(error, (OSError, ValueError)) and (not folder.is_dir() or str(folder) in str(error)):
            raise  # this message of transformers already names the cause
        damaged = next(filter(_is_damaged, sorted(folder.glob("*.safetensors"))), folder)
        raise ValueError(f"Expected to load {damaged}, got {type(error).__name__}: {_first_line(error)}") from error


def _is_damaged(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open  # required by transformers

    try:
        with safe_open(file, "np"):
            return False
    except SafetensorError:
        return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _named(keys: Iterable[str]) -> str:
    first, *others = keys
    return f"{first!r} and {len(others)} more" if others else repr(first)
