"""Modules that are loaded before a verb starts, among them all configurations: none of them loads torch."""

import pytest

from tests.helpers.house import ROOT, loaded_by

CONFIGURATION = [f"configuration.{path.stem}" for path in (ROOT / "agents" / "configuration").glob("[!_]*.py")]
CLI = ("arguments", "catalogue", "compare", "main", "options", "prompt_files", "seeds")


@pytest.mark.parametrize(
    "module",
    [*sorted(CONFIGURATION), "runs.folder", "runs.plan", *(f"cli.{name}" for name in CLI)],
)
def test_what_is_read_before_a_verb_starts_loads_no_torch(module):
    assert not loaded_by(f"agents.{module}", ROOT) & {"torch", "transformers", "stable_baselines3"}


def test_what_loads_torch_would_be_noticed(tmp_path):
    (tmp_path / "heavy.py").write_text("from torch import nn\n")
    (tmp_path / "torch.py").write_text("nn = None\n")
    assert loaded_by("heavy", tmp_path) == {"torch"}
