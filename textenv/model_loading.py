"""Loading a model's weights whole: transformers draws what a folder lacks at random, and says so in a log line."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any

from textenv.trust import runs_remote_code


def from_pretrained(auto_class: Any, name: str | PathLike[str], **kwargs: Any) -> Any:
    """Return `auto_class.from_pretrained(name, **kwargs)`, which asks nobody whether to run a model's code.

    Args:
        auto_class: A class of transformers.
        name: A name on the hub or the path of a folder.
        **kwargs: The other arguments. `trust_remote_code` is what the command line says, and False elsewhere.

    Raises:
        ValueError: If it has code of its own that may not run.
    """
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
        ValueError: If the folder lacks a tensor of the model, or has others.
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


def _some(keys: Iterable[str]) -> str:
    first, *others = keys
    return f"{first!r} and {len(others)} more" if others else repr(first)
