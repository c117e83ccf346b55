"""Training that Ctrl-C stops between two steps: its state waits in a folder, and the same arguments go on from it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .files import replaced_folder
from .optim import load_optimizer, optimizer_state

SAVE_STEPS = 500  # how often the state is written, against a process that is killed


class CtrlC:
    """Within the block, a first Ctrl-C is noted in `pressed`, and a second one raises `KeyboardInterrupt` at once.

    In another thread than the main one nothing changes: no other may set handlers.

    Example:
        >>> import signal
        >>> with CtrlC() as ctrl_c:
        ...     signal.raise_signal(signal.SIGINT)
        ...     print(ctrl_c.pressed)
        True
    """

    pressed = False

    def __enter__(self) -> CtrlC:
        self._is_main = threading.current_thread() is threading.main_thread()
        self._previous = signal.signal(signal.SIGINT, self._press) if self._is_main else None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, self._previous)

    def _press(self, *args: Any) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


def interrupted_at(step: int) -> KeyboardInterrupt:
    """Return what is raised once the state is saved."""
    return KeyboardInterrupt(f"stopped after step {step}; `resume=True` goes on from there")


def work_folder(folder: str | os.PathLike[str]) -> Path:
    """Return where the state of a run waits, beside the folder that its result goes to."""
    target = Path(folder).absolute()
    return target.with_name(f".{target.name}.training")


def origin(model: PreTrainedModel, lm: object) -> tuple[str, str | None]:
    """Return what a run began with, as its arguments say it: the model's config, and the name or path it came from."""
    return model.config.to_json_string(), os.fspath(lm) if isinstance(lm, (str, os.PathLike)) else None


def claim_folder(work: Path, arguments: object, has_state: bool) -> None:
    """Make the folder of a run's state, empty unless it has the state of an interrupted run to go on with.

    Args:
        work: The folder.
        arguments: All that the result depends on, the data included; compared by its `repr`.
        has_state: Whether there is a state in the folder that is wanted.

    Raises:
        ValueError: If that state is of other arguments or data.
    """
    fingerprint = hashlib.sha256(repr(arguments).encode()).hexdigest()
    mark = work / "fingerprint"
    if not has_state or not mark.is_file():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        mark.write_text(fingerprint)
    elif mark.read_text() != fingerprint:
        raise ValueError(
            f"Expected the arguments and data of the interrupted run in {work}, got others: repeat them, or start "
            "anew with resume=False."
        )


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[Tensor]) -> None:
    """Write weights, optimizer and the losses so far, whole or not at all."""
    tensors, groups = optimizer_state(optimizer)
    parts = {"model": dict(_weights(model)), "optimizer": tensors, "losses": {"losses": torch.stack(losses)}}
    with replaced_folder(folder) as beside:
        for name, content in parts.items():
            safetensors.torch.save_file({k: v.contiguous() for k, v in content.items()}, beside / f"{name}.safetensors")
        (beside / "groups.json").write_text(json.dumps(groups), encoding="utf-8")


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Bring model and optimizer to the state that `save_state` wrote; return the loss of each step."""
    parts = {name: safetensors.torch.load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer")}
    with torch.no_grad():
        for name, weight in _weights(model).items():
            weight.copy_(parts["model"][name])
    load_optimizer(optimizer, parts["optimizer"], json.loads((folder / "groups.json").read_text(encoding="utf-8")))
    device = next(model.parameters()).device
    return list(safetensors.torch.load_file(folder / "losses.safetensors", device=str(device))["losses"])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return each weight and buffer once: tied ones under their first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
