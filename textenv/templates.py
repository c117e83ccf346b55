"""Rendering a chat template that may be anybody's: within some seconds, some memory and some length of text."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from textenv.extras import MissingExtraError, needs
from textenv.lines import MAX_CHARS

SECONDS = 10.0  # a template takes milliseconds
MEMORY = 2 << 30  # bytes beside what the process has; a text that is doubled again and again would take all there is
STATM = Path("/proc/self/statm")  # the first number is that of the process's pages, on Linux


def apply_template(tokenizer: Any, messages: Any, where: str, **options: Any) -> str:
    """Return `tokenizer.apply_chat_template(messages, tokenize=False, **options)`.

    A template is a program. transformers runs it where it can reach nothing, but for as long as it likes.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        messages: Role and content of each.
        where: What an error calls them.
        **options: Other arguments.

    Raises:
        MissingExtraError: If jinja2 is not installed, which every template needs.
        ValueError: If the template refuses the messages, or writes more than 4,000,000 characters; in the main thread
            (no other can be stopped) also if it is not done after 10 seconds, or on Linux needs more than 2 GiB.
    """
    try:
        if isinstance(tokenizer.chat_template, str):
            _refuse_powers(tokenizer.chat_template)
        with _no_longer_than(SECONDS), _no_more_than(MEMORY):
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except MissingExtraError:
        raise
    except Exception as error:  # whatever the template raises
        raise ValueError(f"The chat template refuses {where}: {type(error).__name__}: {error}.") from error
    if len(text) > MAX_CHARS:
        raise ValueError(f"Expected a chat template that writes at most {MAX_CHARS:,} characters, got {len(text):,}.")
    return text


@cache
def _refuse_powers(template: str) -> None:
    """Refuse what one step of takes for ever: `9 ** 9 ** 9`, which the template's compiler computes as well."""
    with needs("feedback", "jinja2", "a chat template"):  # transformers needs it for any
        from jinja2 import Environment

    if any(kind == "operator" and value == "**" for _, kind, value in Environment().lex(template)):
        raise ValueError("powers (**) are not computed")


@contextmanager
def _no_longer_than(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer; a timer that runs already goes on behind it."""
    if not _may_limit() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} seconds")

    begun = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 1e-3), interval)


@contextmanager
def _no_more_than(n_bytes: int) -> Iterator[None]:
    """Raise MemoryError in what takes more memory than so much beside what is there."""
    if not _may_limit() or not STATM.is_file():
        yield
        return
    import resource  # Linux has it

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = int(STATM.read_text().split()[0]) * resource.getpagesize() + n_bytes
    tighter = room if soft == resource.RLIM_INFINITY else min(room, soft)
    resource.setrlimit(resource.RLIMIT_AS, (tighter, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _may_limit() -> bool:
    return threading.current_thread() is threading.main_thread()
