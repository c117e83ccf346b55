"""Loading a model's folder whole: transformers draws what it lacks at random, and trips over what is damaged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from textenv.json_files import read_json

# The files of a folder that transformers reads as objects; without these keys it raises a KeyError.
OBJECTS: dict[str, dict[Any, Any]] = {
    "config.json": {},
    "generation_config.json": {},
    "tokenizer_config.json": {},
    "special_tokens_map.json": {},
    "model.safetensors.index.json": {"weight_map": {str: str}},
    "tokenizer.json": {"model": dict, "added_tokens": [dict]},
}


def load_whole(
    auto_class: Any, name: str | PathLike[str], *, fresh_head: bool = False, any_more: bool = False, **kwargs: Any
) -> Any:
    """Return `auto_class.from_pretrained(name, **kwargs)`, whose weights are all those of the folder.

    Args:
        auto_class: A class of transformers.
        name: A name on the hub or the path of a folder.
        fresh_head: Whether the head may be a new one, in place of another: what stands beside the base model.
        any_more: Whether the folder may have more than the model.
        **kwargs: The other arguments.

    Raises:
        ValueError: If the folder lacks a tensor of the model, or has others, or a file is damaged.
    """
    with readable(name):
        model, found = auto_class.from_pretrained(name, output_loading_info=True, **kwargs)
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
