"""Progress: a bar in a terminal, seldom lines in a pipe, and nothing where none was asked for."""

import io

import pytest
from tqdm import auto

from agents.small_models import progress as module
from agents.small_models.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, seconds=0.0, **settings):
    """Return what is written to standard error by work of four steps, with `seconds` between two lines."""
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(module, "SECONDS_OF_A_LINE", seconds)
    with progress(description="steps made", unit="step", total=4, **settings) as bar:
        for _ in range(4 - settings.get("initial", 0)):
            bar.set_postfix(loss="0.5", refresh=False)
            bar.update()
    return stream.getvalue()


def test_a_terminal_has_a_bar(monkeypatch):
    written = shown(monkeypatch, Terminal())
    assert "\r" in written and "4/4" in written


def test_a_pipe_has_lines(monkeypatch):
    written = shown(monkeypatch, io.StringIO())
    assert "\r" not in written and "\x1b" not in written
    lines = written.splitlines()
    assert lines[-1].startswith("steps made: 4 of 4 steps in 00:00, 00:00 left, loss=0.5"), written
    assert all(line.startswith("steps made: ") for line in lines)


def test_a_line_takes_its_time(monkeypatch):
    assert shown(monkeypatch, io.StringIO(), 30.0) == ""
    now = [0.0]
    monkeypatch.setattr("sys.stderr", io.StringIO())
    bar = progress(range(1000), description="rows", unit="row")
    bar._time, bar.start_t, bar.last_print_t = lambda: now[0], 0.0, 0.0  # a clock of a second a row
    for _ in bar:
        now[0] += 1.0
    lines = bar.fp.getvalue().splitlines()
    assert 1000 / 35 < len(lines) <= 1000 / 30, "one in thirty seconds"


def test_a_resumed_work_goes_on_from_its_steps(monkeypatch):
    assert "3 of 4 steps" in shown(monkeypatch, io.StringIO(), initial=2)
    assert "1 of 4 steps" not in shown(monkeypatch, io.StringIO(), initial=2)


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_nothing_is_shown_unasked(monkeypatch, stream):
    assert shown(monkeypatch, stream(), is_shown=False) == ""


def test_a_notebook_keeps_its_widget(monkeypatch):
    class Widget(module.tqdm):
        """What `tqdm.auto` has in a notebook, whose standard error is no terminal."""

    monkeypatch.setattr(auto, "tqdm", Widget)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(progress(description="steps", unit="step", total=1), Widget)
