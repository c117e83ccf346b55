"""Fixtures that several test files share."""

import os
import signal

import pytest

from textenv import CharTokenizer, TextEnv

# Before torch is loaded: more threads than a tiny model can use make it slower, and so do two test processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts what it sends to the background with Ctrl-C ignored, nohup ignores that a terminal hangs up, and
# processes that tests start would inherit both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def no_reward(prompt, preds, done):
    return 0.0


@pytest.fixture
def char_tokenizer():
    """Token 0 ends a text; "a" is 1, "b" is 2, ... "z" is 26, the space 27."""
    return CharTokenizer()


@pytest.fixture
def make_env(char_tokenizer):
    """Build a `TextEnv` of characters (or the subclass `cls`) from what matters to a test."""

    def make(prompts=("ab", "cde"), cls=TextEnv, tokenizer=char_tokenizer, max_new_tokens=4, **kwargs):
        if cls is TextEnv:
            kwargs.setdefault("reward", no_reward)
        return cls(prompts, tokenizer, max_new_tokens=max_new_tokens, **kwargs)

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model of one layer that the command can train; files with another model have one of their own."""
    from tests.helpers.command import small_model  # which loads torch: tests without it need not

    return small_model(tmp_path_factory.mktemp("models") / "small")
