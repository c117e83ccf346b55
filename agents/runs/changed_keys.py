"""The keys in which two configurations of a run differ. Importing this does not load torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..configuration.config import TrainConfig


def changed_keys(before: TrainConfig, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which a run's new configuration differs, each with its values before and after."""
    return {key: pair for key, pair in differences(asdict(before), asdict(config)).items() if key != "out"}


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two configurations differ, each with its values before and after.

    Example:
        >>> differences({"kl": {"coef": 0.1}, "seed": 0}, {"kl": {"coef": 0.2}, "seed": 0})
        {'kl.coef': (0.1, 0.2)}
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and key != "args":  # arguments count as one value
            changed |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changed[prefix + key] = (old, new)
    return dict(sorted(changed.items()))
