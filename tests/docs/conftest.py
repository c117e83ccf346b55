"""The fixture that the tests of pages share."""

import pytest


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Work in a folder that holds a tiny model and a tokenizer for every name of the pages."""
    from tests.docs.snippets import fill_hub  # imported here, since it loads torch and many tests do without

    fill_hub(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
