"""The configuration of a search for good settings: the ranges of keys, and the bound on the divergence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import CommandError
from .config import FREE_ON_RESUME, TrainConfig

NUMBERS, CHOICES = ("low", "high", "log"), ("choices",)  # the two forms of a range
# Keys that a search may not draw: they have no influence on the weights, or change the figure that trials are compared
# by.
FIXED = (*FREE_ON_RESUME, "seed", "evaluation", "tune", "trials", "config")


@dataclass
class SearchConfig:
    """The search of `textenv tune`: what it draws, and how far a model may move.

    Args:
        ranges: By key of this configuration, the values to draw from: `algorithm.learning_rate: {low: 1e-5, high: 1e-2,
            log: true}`, or `kl.coef: {choices: [0.0, 0.05]}`.
        max_kl: The largest divergence of a trial from the start, in nats a text, on the prompts of evaluations: a trial
            above it is not feasible, whatever its reward.
    """

    ranges: dict[str, Any] = field(default_factory=dict)
    max_kl: float = 10.0


@dataclass
class TuneConfig(TrainConfig):
    """Search for the settings with the best held-out figure at a bounded divergence from the start.

    Args:
        out: The folder of the search, which the same command joins or continues; by default one in runs/ by the name of
            the task.
        trials: The number of trials in the folder, those of all processes together.
        tune: The search.
    """

    trials: int = 20
    tune: SearchConfig = field(default_factory=SearchConfig)


class Range(NamedTuple):
    """The values of one key that a search draws from: numbers, evenly or on a logarithmic scale, or choices.

    Args:
        key: The key of the configuration.
        low: The smallest number; with choices unused.
        high: The largest number, which is drawn as well; with choices unused.
        log: Whether to draw on a logarithmic scale.
        choices: The choices, of any type and shape; empty for numbers.
        is_whole: Whether to draw whole numbers.

    Example:
        >>> Range("kl.coef", choices=(0.0, 0.05)).words(["0.05"])
        ['--kl.coef=0.05']
    """

    key: str
    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[Any, ...] = ()
    is_whole: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The choices as JSON: a study keeps these texts, and a text that it returns is only looked up here."""
        return tuple(json.dumps(choice, sort_keys=True) for choice in self.choices)

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values to check before anything runs: both ends, or all choices."""
        return self.names or (self.low, self.high)

    def has(self, drawn: Any) -> bool:
        """Return whether the range contains a drawn value: a number, or the JSON of a choice."""
        if self.choices:
            return drawn in self.names
        return isinstance(drawn, (int, float)) and self.low <= drawn <= self.high

    def value(self, drawn: Any) -> Any:
        """Return the value of the key for a drawn one."""
        return self.choices[self.names.index(drawn)] if self.choices else drawn

    def words(self, drawn: Sequence[Any]) -> list[str]:
        """Return the words of a command line that set the key to each of the drawn values."""
        values = map(self.value, drawn)
        # A text is not quoted, since jsonargparse would keep the quotes of a value that may be a text.
        return [f"--{self.key}={value if isinstance(value, str) else json.dumps(value)}" for value in values]


def read_ranges(ranges: Mapping[str, Any]) -> list[Range]:
    """Return the ranges of the section `tune`, in the order of their keys.

    Args:
        ranges: By key, `{low, high, log}` or `{choices}`; keys may also be nested, as `{kl: {coef: {...}}}`.

    Raises:
        CommandError: If there is none, one is upside down or of another form, or its key may not be searched.

    Example:
        >>> read_ranges({"kl": {"coef": {"low": 0.0, "high": 0.1}}})[0].high
        0.1
    """
    found = [_range(key, given) for key, given in _flat(ranges)]
    if not found:
        raise CommandError("Expected ranges to search in, got none: tune.ranges: {kl.coef: {low: 0.0, high: 0.1}}.")
    keys = [one.key for one in found]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise CommandError(f"Expected each key once in tune.ranges, got {twice[0]!r} twice.")
    return sorted(found, key=lambda one: one.key)


def _flat(ranges: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, given in ranges.items():
        is_nested = isinstance(given, Mapping) and given and all(isinstance(inner, Mapping) for inner in given.values())
        if is_nested:
            yield from _flat(given, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", given


def _range(key: str, given: Any) -> Range:
    where = f"tune.ranges.{key}"
    if key.split(".")[0] in FIXED:
        raise CommandError(
            f"Expected a key that changes training and not its measure in tune.ranges, got {key!r}, which is one of "
            f"{', '.join(FIXED)}."
        )
    if not isinstance(given, Mapping) or not ({"low", "high"} <= given.keys() or "choices" in given):
        raise CommandError(f"Expected {where} as {{low: .., high: ..}} or {{choices: [..]}}, got {given!r:.80}.")
    form = CHOICES if "choices" in given else NUMBERS
    if other := sorted(map(str, given.keys() - set(form))):
        raise CommandError(f"Expected {where} with {', '.join(form)} alone, got {', '.join(other)} as well.")
    if form is CHOICES:
        choices = given["choices"]
        if not isinstance(choices, list) or not choices:
            raise CommandError(f"Expected choices of {where} as a list, as [ONE, ANOTHER], got {choices!r:.80}.")
        listed = Range(key, choices=tuple(choices))
        if len(set(listed.names)) < len(choices):
            raise CommandError(f"Expected each choice of {where} once, got {choices!r:.80}.")
        return listed
    low, high, log = given["low"], given["high"], given.get("log", False)
    if not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (low, high)):
        raise CommandError(f"Expected numbers as low and high of {where}, got {low!r:.40} and {high!r:.40}.")
    if not low < high < float("inf") or not isinstance(log, bool):
        raise CommandError(f"Expected low below high in {where}, and log true or false, got {low}, {high} and {log!r}.")
    if log and low <= 0:
        raise CommandError(f"Expected low above 0 in {where} with log, which 0 does not have, got {low}.")
    return Range(key, low, high, log)


def value_at(config: Any, key: str) -> Any:
    """Return the value of a dotted key in a configuration, whose last parts may be the keys of a mapping.

    Example:
        >>> value_at(TrainConfig(), "kl.coef")
        0.05
    """
    for part in key.split("."):
        config = config[part] if isinstance(config, Mapping) else getattr(config, part)
    return config
