"""Limits of chat templates: endless or huge ones end in one error, and the limits are removed afterwards."""

import resource
import signal
import threading

import pytest

from agents import word_tokenizer
from textenv.prompts import templates
from textenv.prompts.chat import render_chat

CHAT = [{"role": "user", "content": "hi"}]
DOUBLING = "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def with_template(text):
    tokenizer = word_tokenizer(["hi"])
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NESTED, "The chat template refuses the prompt: TimeoutError: not done after 1 seconds"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 9 ** 9 ** 9 }}", r"powers \(\*\*\) are not computed"),
        ("{{ 'x' * 10000000000 }}", "MemoryError"),
        ("{{ 'x' * 5000000 }}", "a chat template that writes at most 4,000,000 characters, got 5,000,000"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_a_template_that_does_not_end_is_stopped(template, message, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 1.0 if template == NESTED else 100.0)
    with pytest.raises(ValueError, match=message):
        render_chat(with_template(template), CHAT)


@pytest.mark.slow
def test_a_text_that_doubles_again_and_again_is_stopped_by_the_memory_limit():
    with pytest.raises(ValueError, match="The chat template refuses the prompt: MemoryError"):
        render_chat(with_template(DOUBLING), CHAT)


def test_the_limits_leave_everything_as_it_was():
    """Another timer runs on, its handler and the memory limit are restored; `**` in a text is not taken for a power."""
    tokenizer = with_template("**{{ messages[0].content }}**")
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, print)
    signal.setitimer(signal.ITIMER_REAL, 100.0, 7.0)
    try:
        assert render_chat(tokenizer, CHAT) == "**hi**"
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 50 < left <= 100 and interval == 7.0
        assert signal.getsignal(signal.SIGALRM) is print and resource.getrlimit(resource.RLIMIT_AS) == before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)


def test_another_thread_renders_without_the_limits():
    rendered = []
    tokenizer = with_template("{{ messages[0].content }}")
    thread = threading.Thread(target=lambda: rendered.append(render_chat(tokenizer, CHAT)))
    thread.start()
    thread.join()
    assert rendered == ["hi"]
