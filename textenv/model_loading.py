"""Loading a model's weights whole: transformers draws what a folder lacks at random, and says so in a log line."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any


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
        ValueError: If the folder lacks a tensor of the model, or has others.
    """
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


def _some(keys: Iterable[str]) -> str:
    first, *others = keys
    return f"{first!r} and {len(others)} more" if others else repr(first)
