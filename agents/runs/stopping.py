"""The requests to stop a run, by signals, in one process or in several."""

from __future__ import annotations

import os
from functools import partial

from ..distributed.failures import stop_if_another_failed
from ..distributed.world import is_main_process
from ..errors import Exit
from ..signals import Interrupts, leave
from .folder import RunFolder
from .screens import Screen


def watched_signals(run: RunFolder, screen: Screen) -> Interrupts:
    """Return the context in which a run is trained: a first signal stops it once it is saved, a second one at once.

    Of several processes, rank 0 alone says so. A launcher ends the processes by a signal once one of them has failed:
    then there is nothing to save, and this process stops where it is, by a `ProcessLost`.

    Args:
        run: The run's folder.
        screen: The screen of the run.
    """

    def tell(line: str) -> None:
        stop_if_another_failed()
        screen.note(line)

    again = partial(leave, how_to_go_on=run.how_to_go_on) if is_main_process() else _leave_silently
    return Interrupts(tell, again=again)


def _leave_silently(number: int) -> None:
    os._exit(Exit.SIGNAL + number)
