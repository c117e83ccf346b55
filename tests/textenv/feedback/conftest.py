"""Fixtures of the tests of the feedback store: an empty store, and the path of its file."""

import pytest

from textenv.feedback.store import FeedbackStore


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.db"


@pytest.fixture
def store(path):
    with FeedbackStore(path, seed=0) as opened:
        yield opened
