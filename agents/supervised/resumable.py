"""The resumable states of a training stage before PPO: saved in a folder, and continued by the same arguments."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from textenv.checks.json_files import read_json

from ..checkpoints.manifest import newest_intact, numbered, of_our_making, seal
from ..checkpoints.storage import explain
from ..distributed.collectives import from_main, gather, once
from ..distributed.failures import stop_if_another_failed
from ..distributed.hangs import ProcessLost
from ..distributed.world import is_main_process
from ..errors import StageStopped, StorageError
from ..files import naming, write_text
from ..policies.optimizers import load_optimizer, optimizer_state
from ..signals import Interrupts, raise_interrupt, write_line

SAVE_STEPS = 500  # steps from one state to the next: the most that a killed process loses
RETRY_STEPS = 20  # steps until the next attempt after a failed one: a full disk may have room again soon
KEPT = 2  # how many of the newest states stay: one could be damaged
MARK = "fingerprint"  # the file that says to which arguments the states belong
STATE = "checkpoint"  # states are named "checkpoint-<step>", after transformers' `trainer_utils.PREFIX_CHECKPOINT_DIR`


def stop_requests() -> Interrupts:
    """Return a context that notes Ctrl-C, SIGTERM and SIGHUP; a second Ctrl-C or SIGTERM raises KeyboardInterrupt.

    Of several processes, rank 0 alone says so; once another has failed, a signal ends this one by a `ProcessLost`.
    """

    def tell(line: str) -> None:
        stop_if_another_failed()
        if is_main_process():
            write_line(line)

    return Interrupts(tell, "step", raise_interrupt)


def first_request(signals: Interrupts) -> int:
    """Return the signal that asked any process to stop, 0 for none; all processes must call it after the same step."""
    return max(gather("requests to stop", signals.number))


def work_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the hidden folder of a stage's states, which lies beside the folder of its result."""
    target = Path(folder).absolute()
    return target.with_name(f".{target.name}.training")


def origin(model: PreTrainedModel, lm: object) -> tuple[str, str | None]:
    """Return the identity of the model that a stage starts from: its config, and its name or path if it has one."""
    return model.config.to_json_string(), os.fspath(lm) if isinstance(lm, (str, os.PathLike)) else None


def prepare(work: Path, arguments: object, resume: bool) -> Path | None:
    """Return the newest intact state to continue from; without one, make an empty folder of states and return None.

    Damaged states are passed over, each with a warning. Of several processes, which must all call it, rank 0 looks.

    Args:
        work: The folder of states, which `work_folder` returned.
        arguments: Everything that the result depends on, data included; compared by its `repr`.
        resume: Whether to continue from existing states.

    Raises:
        ValueError: If the states belong to other arguments or data, or the folder holds anything but states.
    """
    found: list[Path | None] = [None]

    def look() -> None:
        found[0] = _prepare(work, arguments, resume)

    once(look)
    return from_main("the state of a stage", found[0])


def _prepare(work: Path, arguments: object, resume: bool) -> Path | None:
    newest, damage = newest_intact(work, STATE) if resume else (None, [])
    goes_on = "training begins anew" if newest is None else f"continuing from {newest}"
    for message in damage:
        warnings.warn(f"{message.rstrip('.')}; {goes_on}.", stacklevel=6)
    fingerprint = hashlib.sha256(repr(arguments).encode()).hexdigest()
    mark = work / MARK
    if newest is None:
        foreign = (
            [] if mark.is_file() or not work.is_dir() else [path.name for path in work.iterdir() if path.name[0] != "."]
        )
        if foreign:
            raise ValueError(f"Expected no folder {work}, where a stage keeps its states, got one with {foreign[0]}.")
        if work.is_dir():
            remove_states(work)
        write_text(mark, fingerprint)
        return None
    if not mark.is_file() or mark.read_bytes() != fingerprint.encode():
        raise ValueError(
            f"Expected the arguments and data of the interrupted run in {work}, got others: repeat them, or start "
            "anew with resume=False."
        )
    return newest


def remove_states(work: Path) -> None:
    """Remove the folder of states, its fingerprint last; of several processes, one alone must call it.

    A process that is killed in between leaves states that are still known as this stage's, so that `prepare` can
    continue from them or remove them.
    """
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    shutil.rmtree(work)


class States:
    """The writer of a stage's states: a complete state gets a manifest, and then older ones are removed.

    If a state cannot be written, it warns, and tries again `RETRY_STEPS` later; training and older states continue.

    Args:
        work: The folder that `prepare` made.

    Attributes:
        failure: The reason why the last state could not be written; None if it was written.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.failure: str | None = None

    def is_due(self, step: int) -> bool:
        """Whether to write a state after this step."""
        return step % SAVE_STEPS == 0 or (self.failure is not None and step % RETRY_STEPS == 0)

    def save(self, step: int, write: Callable[[Path], object]) -> None:
        """Write the state after a step, and its manifest. All processes must call it.

        Args:
            step: The number of steps so far.
            write: A function that writes the state into the folder that it receives; all processes call it.
        """
        folder = self.work / f"{STATE}-{step}"
        # Rank 0 makes the folder before the others write into it, and seals it once they have.
        self.failure = (
            _together(lambda: _make(folder), folder, is_main_process())
            or _together(lambda: write(folder), folder, True)
            or _together(lambda: seal(folder, step), folder, is_main_process())
        )
        if self.failure is not None:
            self.failure = f"The state after step {step} could not be written: {self.failure}"
            warnings.warn(f"{self.failure} Training continues, and saving is tried again.", stacklevel=3)
        if not is_main_process():
            return
        if self.failure is not None:
            shutil.rmtree(folder, ignore_errors=True)
            return
        for old in [path for path in numbered(self.work, STATE) if path != folder][KEPT - 1 :]:
            shutil.rmtree(old)

    def stopped(self, step: int, number: int) -> BaseException:
        """Return the error that ends training after a signal, which says whether the state was saved."""
        if self.failure is not None:
            return StorageError(self.failure)
        return StageStopped(f"stopped after step {step}; `resume=True` continues from there", number)


def _make(folder: Path) -> None:
    """Make an empty folder: a killed process may have left half a state there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _together(act: Callable[[], object], folder: Path, is_mine: bool) -> str | None:
    """Do something that writes a state, if it is this process's; return why it failed in any process, None if not."""
    failure = None
    if is_mine:
        try:
            with naming(folder):
                act()
        except ProcessLost:
            raise
        except (OSError, SafetensorError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            failure = explain(error, folder)
    return next((other for other in gather("a state", failure) if other is not None), None)


class ResumableFit:
    """A context in which `fit` can be stopped by Ctrl-C, SIGTERM and SIGHUP, and continued from its saved states.

    Args:
        work: The folder that `prepare` made.
        state: The state to continue from, as `prepare` returned it; None for none.
    """

    def __init__(self, work: Path, state: Path | None) -> None:
        self.states, self.state, self.interrupts = States(work), state, stop_requests()

    def __enter__(self) -> ResumableFit:
        self.interrupts.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.interrupts.__exit__(kind, error, traceback)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Load the state to continue from, if there is one; return the loss of each earlier step."""
        if self.state is None:
            return []
        with of_our_making(self.state):
            return load_state(self.state, model, optimizer)

    def after_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[Tensor], n_steps: int
    ) -> None:
        """Save the state if it is due or a signal came; after a signal also stop, except at the last step.

        Raises:
            StageStopped: After a signal, once the state is saved.
            StorageError: After a signal, if the state could not be saved.
        """
        step, number = len(losses), first_request(self.interrupts)
        must_stop = number != 0 and step < n_steps
        if must_stop or self.states.is_due(step):
            self.states.save(step, lambda folder: write_state(folder, model, optimizer, losses))
        if must_stop:
            raise self.states.stopped(step, number)


def write_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[Tensor]) -> None:
    """Write weights, optimizer and the loss of each step so far into a folder; of several processes, rank 0 does."""
    if not is_main_process():
        return
    tensors, groups = optimizer_state(optimizer)
    files = {"model": dict(_weights(model)), "optimizer": tensors, "losses": {"losses": torch.stack(losses)}}
    for name, content in files.items():
        safetensors.torch.save_file({k: v.contiguous() for k, v in content.items()}, folder / f"{name}.safetensors")
    (folder / "groups.json").write_text(json.dumps(groups), encoding="utf-8")


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Load the state that `write_state` wrote into model and optimizer; return the loss of each step."""
    files = {name: safetensors.torch.load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer")}
    with torch.no_grad():
        for name, weight in _weights(model).items():
            weight.copy_(files["model"][name])
    load_optimizer(optimizer, files["optimizer"], read_json(folder / "groups.json", [{"params": list}]))
    device = next(model.parameters()).device
    return list(safetensors.torch.load_file(folder / "losses.safetensors", device=str(device))["losses"])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return each weight and buffer once: tied ones under their first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
