"""The rendering of untrusted chat templates, with limits on time, memory and length."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from textenv.checks.extras import MissingExtraError, needs
from textenv.checks.lines import MAX_CHARS

SECONDS = 10.0  # a template usually takes milliseconds
MEMORY = 2 << 30  # bytes that a template may add to the process: one that doubles a text in a loop would fill it
STATM = Path("/proc/self/statm")  # on Linux; its first number is the size of the process in pages


def apply_template(tokenizer: Any, messages: Any, where: str, **options: Any) -> str:
    """Return `tokenizer.apply_chat_template(messages, tokenize=False, **options)`.

    A template is a program by the tokenizer's author. transformers runs it in jinja2's sandbox
    (`utils/chat_template_utils.py`), which stops it from reaching anything, but not from running for ever.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        messages: The messages, each with "role" and "content".
        where: The messages as errors name them, such as "prompt 3".
        **options: Other arguments of `apply_chat_template`.

    Raises:
        MissingExtraError: If jinja2 is not installed, which every template needs.
        ValueError: If the template refuses the messages or writes more than 4,000,000 characters. In the main thread
            also if it takes more than 10 seconds, or on Linux more than 2 GiB: Python can stop no other thread.
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
    """Refuse powers such as `9 ** 9 ** 9`, a single step of Python that no timer interrupts.

    jinja2 would compute a constant power already when it compiles the template.
    """
    with needs("feedback", "jinja2", "a chat template"):  # transformers needs it for every template
        from jinja2 import Environment

    if any(kind == "operator" and value == "**" for _, kind, value in Environment().lex(template)):
        raise ValueError("powers (**) are not computed")


@contextmanager
def _no_longer_than(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer; a timer that was already running continues after the block."""
    if not _may_limit() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} seconds")

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # 1 ms at least, since 0 would switch the timer off
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)


@contextmanager
def _no_more_than(n_bytes: int) -> Iterator[None]:
    """Raise MemoryError in a block that adds more than `n_bytes` to the memory of the process."""
    if not _may_limit() or not STATM.is_file():
        yield
        return
    import resource  # not on Windows, which has no STATM either

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = int(STATM.read_text().split()[0]) * resource.getpagesize() + n_bytes
    tighter = room if soft == resource.RLIM_INFINITY else min(room, soft)
    resource.setrlimit(resource.RLIMIT_AS, (tighter, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _may_limit() -> bool:
    """Return whether this is the main thread, the only one that may set signal handlers."""
    return threading.current_thread() is threading.main_thread()
