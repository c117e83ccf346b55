"""The examination of one model by its config: a small model like it is trained exactly, or refused with a reason."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stable_baselines3 import PPO
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.critic import SeparateCritic
from ..models.trainable import LoRA, adapted_layers
from ..policies.lm_policy import LMPolicy
from .exactness import TOLERANCE, Exactness, exactness_agent, sensitivity
from .sharp_model import SharpModel
from .small_config import small_config

Verdict = Literal["exact", "refused", "wrong", "failed"]
COLUMNS = ("result", "cache", "attention", "critic", "LoRA", "remarks")
ROOT = Path(__file__).resolve().parents[2]
BOTH_CRITICS = "shared, separate"
N_ROLLOUTS = 2  # one with the first weights, one after an update


class ModelRow(NamedTuple):
    """What the library does with a family of models.

    Attributes:
        verdict: "exact", where rollouts and updates equal the model alone; "refused", where `LMPolicy` says why not;
            "wrong" and "failed" are faults of this library: other numbers, or an error that is not its own.
        cache: Whether rollouts decode from cached keys and values.
        attention: The implementation of attention.
        critic: The critics that it takes: "shared", and "separate" for a trunk of the same family.
        lora: The endings of the names of the layers that `LoRA()` adapts.
        remarks: The reason where the verdict is not "exact", else the library's warnings.
        differences: By check, the largest difference (see `Exactness`).
        sensitivity: By how much a token moves the distribution two tokens later, in nats: near 0, nothing is proven.
    """

    verdict: Verdict
    cache: str = ""
    attention: str = ""
    critic: str = ""
    lora: str = ""
    remarks: str = ""
    differences: Mapping[str, float] = {}
    sensitivity: float = 0.0

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of a table with `COLUMNS`."""
        return self.verdict, self.cache, self.attention, self.critic, self.lora, self.remarks

    def __str__(self) -> str:
        """Return the row as lines of plain text."""
        lines = [f"{name:11}{cell}" for name, cell in zip(COLUMNS, self.cells, strict=True) if cell]
        if self.differences:
            largest = max(self.differences.values())
            lines.append(f"{'measured':11}at most {largest:.1e} from the model alone, over {N_ROLLOUTS} rollouts")
        return "\n".join(lines)


def examine_config(config: PreTrainedConfig) -> ModelRow:
    """Examine a model by its config: train a small model with the same switches, and compare it with a plain copy.

    The model's weights are not loaded, so that any size takes a second or two. Two policies are trained: all weights
    with the shared critic, and LoRA with a separate one.

    Args:
        config: The config, of any size.

    Example:
        >>> from transformers import GPT2Config
        >>> row = examine_config(GPT2Config())
        >>> row.verdict, row.cache, row.critic
        ('exact', 'yes', 'shared, separate')
    """
    spec = SharpModel(small_config(config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            agent = exactness_agent(spec)
        except Exception as error:
            return _not_built(error)
        plain = spec.build()
        faults: list[str] = []  # errors that are not the library's own
        differences = _trained(agent, Exactness(plain), "", faults)
        critic, lora = _critics(spec, faults), "needs peft"
        if find_spec("peft") is not None:
            lora = _lora(spec, plain, critic == BOTH_CRITICS, differences, faults)
    off = {check: value for check, value in differences.items() if not value <= TOLERANCE.get(check, TOLERANCE[""])}
    remarks = [*faults, *(f"{check} {value:.1e} off" for check, value in off.items())]
    remarks += dict.fromkeys(str(warning.message) for warning in caught if is_inside(warning.filename))
    policy = agent.policy
    assert isinstance(policy, LMPolicy)
    return ModelRow(
        "failed" if faults else "wrong" if off else "exact",
        "yes" if policy.backbone.is_cacheable else "no",
        str(policy.backbone.model.config.get_text_config()._attn_implementation),
        critic,
        lora,
        "; ".join(remarks),
        differences,
        sensitivity(plain),
    )


def _trained(agent: PPO, exactness: Exactness, prefix: str, faults: list[str]) -> dict[str, float]:
    """Train for a few rollouts; return the differences by check, with a prefix, and note an error."""
    try:
        agent.learn(N_ROLLOUTS * agent.n_steps * agent.n_envs, callback=exactness)
    except Exception as error:  # a model of transformers may raise anything
        faults.append(f"{prefix}training: {described(error)}")
    return {prefix + check: value for check, value in exactness.differences.items()}


def _critics(spec: SharpModel, faults: list[str]) -> str:
    """Return the critics that a model takes."""
    try:
        SeparateCritic(spec).build(0)
        return BOTH_CRITICS
    except Exception as error:  # as above
        if not is_ours(error):
            faults.append(f"SeparateCritic: {described(error)}")
        return "shared"


def _lora(
    spec: SharpModel, plain: PreTrainedModel, with_critic: bool, differences: dict[str, float], faults: list[str]
) -> str:
    """Train LoRA, beside a separate critic if there is one; return the endings of the names of the adapted layers."""
    try:
        agent = exactness_agent(spec, train=LoRA(), **({"critic": SeparateCritic(spec)} if with_critic else {}))
    except Exception as error:  # as above
        if is_ours(error):
            return f"refused: {error}"
        faults.append(f"LoRA(): {described(error)}")
        return ""
    differences |= _trained(agent, Exactness(plain, with_gradient=False), "LoRA's ", faults)
    policy = agent.policy
    assert isinstance(policy, LMPolicy)
    # peft nests the adapters of several weights of one module, in modules called "base_layer".
    paths = (name.replace(".base_layer", "").split(".") for name in adapted_layers(policy.backbone.model))
    return ", ".join(sorted({path[-1] for path in paths}))


def _not_built(error: Exception) -> ModelRow:
    """Return the row of a model that no policy was built of."""
    return ModelRow("refused", remarks=str(error)) if is_ours(error) else ModelRow("failed", remarks=described(error))


def is_ours(error: Exception) -> bool:
    """Return whether the library itself refused: in its own words, from a line of its own."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        isinstance(error, ValueError | TypeError) and str(error).startswith("Expected ") and is_inside(frame.filename)
    )


def is_inside(filename: str) -> bool:
    """Return whether a file belongs to this library."""
    return any(Path(filename).resolve().is_relative_to(ROOT / package) for package in ("agents", "textenv"))


def described(error: Exception) -> str:
    """Return an error in one line, with the file and line where it was raised."""
    frame: Any = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {' '.join(str(error).split())[:200]}"
