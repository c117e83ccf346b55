"""Fixtures that several test files share."""

import os
import signal

import pytest

from textenv import CharTokenizer, TextEnv

# Set before torch is loaded: a tiny model runs slower on several threads, and more so beside a second test process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell ignores Ctrl-C (SIGINT) for background jobs, and nohup ignores SIGHUP. Processes that tests start would
# inherit both, so restore the defaults.
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
    """Build a `TextEnv` of characters, or the subclass `cls`; a test passes only the arguments that matter to it."""

    def make(prompts=("ab", "cde"), cls=TextEnv, tokenizer=char_tokenizer, max_new_tokens=4, **kwargs):
        if cls is TextEnv:
            kwargs.setdefault("reward", no_reward)
        return cls(prompts, tokenizer, max_new_tokens=max_new_tokens, **kwargs)

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a one-layer model that the command can train; test files may override this fixture."""
    from tests.helpers.command import small_model  # imported here, since it loads torch and many tests do without

    return small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window, for the tests of a file."""
    from tests.helpers.browsing import Browser, need_browser  # imported here, since it loads torch

    need_browser()
    browser = Browser()
    yield browser
    browser.close()
