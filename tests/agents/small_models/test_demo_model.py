"""The demo model's cache: a folder that cannot be written to."""

import pytest

from agents import demo_model
from agents.small_models import demo_model as demo_models


def test_a_cache_that_cannot_be_written_to_works(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(demo_models, "_temporary", {})
    with pytest.warns(UserWarning, match=r"cache .*file.* cannot be written to .*TEXTENV_CACHE"):
        folder = demo_model(tmp_path / "file" / "cache", n_epochs=0.01, progress_bar=False)
    assert (folder / "model.safetensors").is_file() and tmp_path not in folder.parents
    assert demo_model(tmp_path / "file" / "cache", n_epochs=0.01) == folder  # trained once per process
