"""The example of film reviews, run from top to bottom on made-up sentences, and resumed."""

import json

import numpy as np
import pytest

from tests.docs.test_examples import run
from textenv.tasks.reviews import FILES

MOODS = (["sad", "dull", "flat"], ["warm", "wise", "great"])


@pytest.fixture
def folder(tmp_path):
    """Write sentences in which one word tells the mood; return their folder."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, moods in zip(FILES, MOODS):
        lines = [
            f"the {rng.choice(['film', 'plot', 'cast'])} is a {rng.choice(moods)} thing to see {i}" for i in range(60)
        ]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_the_example_runs_and_resumes_where_it_was_stopped(folder, tmp_path):
    out = tmp_path / "out"
    command = ("examples/reviews.py", "--data", folder, "--smoke", "--out", out)
    printed = run(*command)
    assert "| judge | " in printed and "found" not in printed
    result = json.loads((out / "results.json").read_text())
    shown = {"length", "reward", "kl", "kl_token", "judge", "perplexity", "distinct_2"}
    assert result["figures"].keys() == result["before"].keys() == shown and len(result["texts"]) == 8
    assert json.loads((out / "judge.json").read_text())["held_out"]["n_texts"] == 12
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "policy" / "model.safetensors").is_file() and (out / "results.md").is_file()

    # Stopped before the last stage: finished stages are skipped, and the others give the same results.
    weights = {name: (out / name / "model.safetensors").read_bytes() for name in ("tuned", "reward", "judge")}
    (out / "results.json").unlink()
    (out / "judge.json").unlink()
    again = run(*command)
    assert "tuned: found in" in again and "reward: found in" in again and "judge: found" not in again
    assert "PPO: continues from" in again
    assert weights == {name: (out / name / "model.safetensors").read_bytes() for name in weights}
    assert json.loads((out / "results.json").read_text())["figures"] == result["figures"]

    with pytest.raises(AssertionError, match="holds a run with other settings"):
        run(*command, "--seed", 1)
