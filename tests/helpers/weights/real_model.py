"""The files of a real pretrained model, SmolLM2-135M-Instruct, for slow tests; they skip where it cannot be had."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from agents.small_models.demo_model import cache_folder
from tests.helpers.command import ROOT, environment

MINUTES = 20  # for the download of 93 MB and the unpacking, which takes two on a free processor


def real_model() -> Path:
    """Return its Hugging Face folder: TEXTENV_REAL_MODEL, or else the one that the machine's cache keeps.

    The first call on a machine downloads and writes it (`examples/real_model.py`); where that fails, the test skips.
    """
    given = os.environ.get("TEXTENV_REAL_MODEL")
    if given:
        assert (Path(given) / "config.json").is_file(), f"TEXTENV_REAL_MODEL={given} is no folder of a model"
        return Path(given)
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    reason = "" if folder.is_dir() else _run(f"unpack(real_model.download(), real_model.Path({str(folder)!r}))")[1]
    if not folder.is_dir():  # another process of pytest may have written it meanwhile
        pytest.skip(f"no real model: {reason}")
    return folder


def real_gguf() -> Path:
    """Return its GGUF file, which the machine's cache keeps; the test skips where it cannot be downloaded."""
    path, reason = _run("download()")
    if not path:
        pytest.skip(f"no real model: {reason}")
    return Path(path)


@cache  # a machine without a network is asked once
def _run(call: str) -> tuple[str, str]:
    """Return what a function of the example returns, as text, and the last line of its errors."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); import real_model; print(real_model.{call})"
    cached = {**environment(), "TEXTENV_CACHE": str(cache_folder())}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=cached, capture_output=True, text=True, timeout=60 * MINUTES)
    lines = {name: text.strip().splitlines() or [""] for name, text in (("out", done.stdout), ("err", done.stderr))}
    return ("" if done.returncode else lines["out"][-1]), lines["err"][-1]
