"""The examination of one family of models: what it can do, proven on a small model of it, or why it is refused."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedConfig

from .exactness import TOLERANCE, Exactness, exactness_agent, sensitivity
from .sharp_model import SharpModel
from .small_config import small_config

Verdict = Literal["exact", "refused", "wrong", "died"]
PACKAGES = Path(__file__).resolve().parents[2]
SHARP = 1e-3  # nats by which a token must move the distribution, for the comparisons to mean something


class ModelRow(NamedTuple):
    """The outcome of an examination."""

    model: str
    verdict: Verdict
    reason: str = ""
    cache: str = ""
    attention: str = ""
    differences: dict[str, float] = {}
    sensitivity: float = 0.0
    warnings: tuple[str, ...] = ()


def examine_model(config: PreTrainedConfig) -> ModelRow:
    """Train a small model of a family on a few tokens, and compare all that it computes with the model alone."""
    name = type(config).__name__
    spec = SharpModel(small_config(config))
    try:
        plain = spec.build()
    except ValueError as error:
        return ModelRow(name, "refused" if is_ours(error) else "died", f"construction: {described(error)}")
    try:
        sharp = sensitivity(plain)
    except Exception:
        sharp = 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stage = "construction"
        try:
            agent = exactness_agent(spec)
            stage = "training"
            exactness = Exactness(plain)
            agent.learn(2 * agent.n_steps * agent.n_envs, callback=exactness)
        except Exception as error:
            verdict: Verdict = "refused" if is_ours(error) and stage == "construction" else "died"
            return ModelRow(name, verdict, f"{stage}: {described(error)}", sensitivity=sharp)
    said = tuple(dict.fromkeys(str(w.message)[:100] for w in caught if "textenv" in str(w.message) or is_of_package(w)))
    backbone = agent.policy.backbone
    off = {key: value for key, value in exactness.differences.items() if not value <= TOLERANCE}
    return ModelRow(
        name,
        "wrong" if off else "exact",
        ", ".join(f"{key} {value:.1e}" for key, value in off.items()),
        "yes" if backbone.is_cacheable else "no",
        str(backbone.model.config.get_text_config()._attn_implementation),
        exactness.differences,
        sharp,
        said,
    )


def is_of_package(warning: Any) -> bool:
    return str(PACKAGES) in warning.filename


def is_ours(error: Exception) -> bool:
    """Return whether the library itself refused: an error of its own words, from its own line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    inside = Path(frame.filename).resolve()
    is_worded = isinstance(error, ValueError | TypeError) and str(error).startswith("Expected ")
    return is_worded and any(inside.is_relative_to(PACKAGES / name) for name in ("agents", "textenv"))


def described(error: Exception) -> str:
    """Return an error in one line, with the file and line where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    words = " ".join(str(error).split())
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {words[:300]}"
