"""Async rewards: bounded concurrency, time limits, retries, and the handling of failed rows."""

import asyncio
import copy
import pickle
import signal
import threading
import time
import warnings
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from agents.callbacks.episode_metrics import EpisodeMetrics
from tests.helpers.rewards import preds_of, rows, scores
from tests.helpers.training import TOKENIZER, Recorder, same_weights, tiny_agent, tiny_env, weights
from textenv import Prompt, RewardError
from textenv.episodes import failure_policy as failures
from textenv.rewards import (
    DROPPED,
    AsyncFunction,
    AsyncReward,
    BatchReward,
    Cached,
    RowError,
    WeightedSum,
    make_reward,
    read_reward,
)
from textenv.rewards.asynchronous import run_apart

QUICK = {"backoff": 0.0}


@dataclass
class Slow(AsyncReward):
    """Scores the length of a text; a digit in it makes the row fail that often first, and "!" always."""

    seconds: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.running, self.most, self.asked, self.ended = 0, 0, [], 0

    async def score_row(self, prompt, preds):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            n_asked = self.asked.count(preds.text)
            self.asked.append(preds.text)
            await asyncio.sleep(self.seconds)
            if "!" in preds.text or any(char.isdigit() and n_asked < int(char) for char in preds.text):
                raise ConnectionError(f"no line for {preds.text}")
            return float(len(preds.text))
        finally:
            self.running -= 1
            self.ended += 1


def no_rewards_thread():
    return all(thread.name != "rewards" for thread in threading.enumerate())


def test_rows_are_asked_side_by_side_within_the_bound():
    reward = Slow(concurrency=4, seconds=0.05)
    assert scores(reward, ["a", "bb", "ccc", "dddd"] * 3) == [1.0, 2.0, 3.0, 4.0] * 3
    assert reward.most == 4 and no_rewards_thread()


def test_one_row_named_parts_and_dropped_rows():
    async def judge(prompt, preds):
        return {"dropped": DROPPED, "parts": {"a": 1.0, "b": 2.0}}.get(preds.text, 3)

    reward = AsyncFunction(judge)
    assert reward(Prompt("p"), preds_of("parts"), True) == {"a": 1.0, "b": 2.0}
    assert list(reward.score(*rows(["dropped", "x"]))) == [DROPPED, 3.0]


def test_a_failing_row_is_asked_again_and_the_others_are_not():
    reward = Slow(retries=2, **QUICK)
    assert scores(reward, ["a", "2b", "1c"]) == [1.0, 2.0, 2.0]
    assert sorted(reward.asked) == ["1c", "1c", "2b", "2b", "2b", "a"]
    assert reward.n_failed == 0


def test_the_backoff_doubles_and_its_jitter_is_its_own(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    async def judge(prompt, preds):
        raise ConnectionError

    monkeypatch.setattr("textenv.rewards.asynchronous.asyncio.sleep", sleep)
    reward = AsyncFunction(judge, retries=4, backoff=2.0, on_failure=0.0)
    with pytest.warns(UserWarning, match="earn 0"):
        scores(reward, ["a"])
    first = list(slept)
    assert len(first) == 4 and all(2.0**i <= pause <= 3 * 2.0**i for i, pause in enumerate(first))
    slept.clear()
    scores(reward, ["a", "b"])
    assert set(first) < set(slept) and len(set(slept)) == 8  # a row has the same jitter each time, and rows differ


def test_a_row_error_says_whether_and_when_to_ask_again(monkeypatch):
    slept, asked = [], []

    async def sleep(seconds):
        slept.append(seconds)

    async def judge(prompt, preds):
        asked.append(preds.text)
        raise {"never": RowError("no", again=False), "soon": RowError("busy", wait=7.0)}.get(
            preds.text, RowError("closed", wait=3600.0)
        )

    monkeypatch.setattr("textenv.rewards.asynchronous.asyncio.sleep", sleep)
    with pytest.raises(RewardError) as error:
        scores(AsyncFunction(judge, retries=1, **QUICK), ["never", "soon", "late"])
    assert sorted(asked) == ["late", "never", "soon", "soon"] and slept == [7.0]
    assert "closed; to be asked again in 3600 s, over 60" in str(error.value)


def test_an_attempt_that_takes_too_long_is_cancelled():
    reward = Slow(seconds=30.0, time_limit=0.05, retries=1, **QUICK)
    with pytest.raises(RewardError, match=r"no answer within 0\.05 s"):  # not the cancelled rows' scores
        scores(reward, ["a", "b"])
    assert reward.running == 0 and reward.ended == 4 and no_rewards_thread()


def test_raise_names_every_row_and_its_cause():
    reward = Slow(retries=1, **QUICK)
    with pytest.raises(RewardError) as error:
        scores(reward, ["!a", "b", "!c"], prompts=["one" * 99, "two", "three"])
    text = str(error.value)
    assert "Slow has no score of 2 of 3 rows, each asked 2 times at most:" in text
    assert f"prompt {('one' * 99)[:80]!r}, text '!a': ConnectionError: no line for !a" in text
    assert "prompt 'three', text '!c': ConnectionError: no line for !c" in text and "two" not in text
    assert isinstance(error.value.__cause__, ConnectionError) and reward.n_failed == 2


def test_drop_and_penalty_warn_once_and_count():
    for on_failure, expected, words in (("drop", DROPPED, "dropped"), (-2.0, {"failure": -2.0}, "earn -2")):
        reward = Slow(retries=0, on_failure=on_failure)
        with pytest.warns(UserWarning, match=f"2 of 3 rows; such rows (are )?{words}.*no line for !a") as warned:
            assert list(reward.score(*rows(["!a", "b", "!c"]))) == [expected, 1.0, expected]
            reward.score(*rows(["!a"]))
        assert len(warned) == 1 and reward.n_failed == 3


@pytest.mark.parametrize("answer", [None, "0.5", float("nan"), {"a": None}])
def test_a_score_that_is_no_number_is_a_failure_of_its_row(answer):
    async def judge(prompt, preds):
        return 1.0 if preds.text == "a" else answer

    with pytest.raises(RewardError, match=r"has no score of 1 of 2 rows(.|\n)*to be a finite number"):
        scores(AsyncFunction(judge, **QUICK), ["a", "b"])


def test_async_rewards_work_inside_a_running_loop():
    async def notebook():
        await asyncio.sleep(0)
        return scores(Slow(), ["a", "bb"])

    assert asyncio.run(notebook()) == [1.0, 2.0]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals of POSIX")
def test_an_interrupt_leaves_nothing_running():
    """Ctrl-C cancels the running rows and waits for their clean-up."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread, where this test does not run")
    cleaned = []

    class Careful(Slow):
        async def score_row(self, prompt, preds):
            try:
                return await super().score_row(prompt, preds)
            finally:
                await asyncio.sleep(0.05)
                cleaned.append(preds.text)

    reward, main = Careful(seconds=60.0, time_limit=99.0, concurrency=2), threading.main_thread().ident

    def interrupt():
        while reward.running < 2:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background job SIGINT is ignored
    try:
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            scores(reward, ["a", "b", "c"])
    finally:
        helper.join()
        signal.signal(signal.SIGINT, before)
    assert sorted(reward.asked) == ["a", "b"]  # no row ended, so that "c" had no turn
    assert sorted(cleaned) == ["a", "b"] and reward.running == 0 and no_rewards_thread()


def test_errors_are_raised_and_unfinished_tasks_are_cancelled():
    seen = []

    async def straggler():
        try:
            await asyncio.sleep(60)
        finally:
            seen.append("cancelled")

    async def work():
        task = asyncio.create_task(straggler())
        await asyncio.sleep(0)
        raise LookupError(task.get_name())

    with pytest.raises(LookupError):
        run_apart(work())
    assert seen == ["cancelled"] and no_rewards_thread()


def test_a_session_is_shared_by_the_rows_of_a_call_and_closed():
    seen = []

    class Shared(Slow):
        @asynccontextmanager
        async def session(self):
            seen.append("open")
            yield
            seen.append("closed")

        async def score_row(self, prompt, preds):
            assert seen[-1] == "open"
            return await super().score_row(prompt, preds)

    reward = Shared(on_failure=0.0, retries=0)
    with pytest.warns(UserWarning):
        scores(reward, ["a", "!b"])
    assert seen == ["open", "closed"]


def test_a_judge_that_ends_the_process_has_failed():
    async def ending(prompt, preds):
        if preds.text == "a":
            raise SystemExit(0)
        return 1.0

    with pytest.raises(RewardError, match=r"(?s)has no score of 1 of 2 rows.*SystemExit: 0"):
        AsyncFunction(ending, retries=0).score(*rows(["a", "b"]))
    with pytest.warns(UserWarning, match="such rows earn -1"):
        assert scores(AsyncFunction(ending, retries=0, on_failure=-1.0), ["a", "b"]) == [-1.0, 1.0]


async def judge_length(prompt, preds):
    return float(len(preds.text))


def test_async_rewards_pickle_copy_and_have_a_name():
    for reward in (Slow(time_limit=9.0, on_failure="drop"), AsyncFunction(judge_length, concurrency=2)):
        scores(reward, ["a"])
        for twin in (pickle.loads(pickle.dumps(reward)), copy.deepcopy(reward)):
            assert twin == reward and scores(twin, ["abc"]) == [3.0]
    named = read_reward(
        {"name": "async", "function": "tests.textenv.rewards.test_async_rewards:judge_length", "on_failure": -1.0}
    )
    assert (named.on_failure, named.score_at, scores(named, ["ab"])) == (-1.0, "rollout_end", [2.0])


def test_async_rewards_work_in_compositions():
    reward = WeightedSum({"slow": Slow(retries=0, on_failure="drop"), "one": lambda *_: 1.0})
    with pytest.warns(UserWarning, match="are dropped"):
        assert list(reward.score(*rows(["!", "ab"]))) == [DROPPED, {"slow": 2.0, "one": 1.0}]
    inner = Slow(retries=0, on_failure="drop")
    cached = Cached(inner)
    with pytest.warns(UserWarning, match="are dropped"):
        for _ in range(2):
            cached.score(*rows(["!", "ab"]))
    assert inner.asked.count("!") == 2 and inner.asked.count("ab") == 1  # a failure is not remembered


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"concurrency": 0}, "`concurrency` to be at least 1, got 0"),
        ({"time_limit": 0}, "`time_limit` to be positive, got 0"),
        ({"retries": -1}, "`retries` and `backoff` of 0 or more, got -1 and 1.0"),
        ({"on_failure": "skip"}, "'raise', 'drop' or a number, got 'skip'"),
        ({"on_failure": float("nan")}, "'raise', 'drop' or a number, got nan"),
        ({"score_at": "step"}, "`score_at` to be one of"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        Slow(**options)


def test_a_function_that_is_no_coroutine_is_refused():
    with pytest.raises(TypeError, match="async def judge"):
        AsyncFunction(lambda prompt, preds: 1.0)
    with pytest.raises(TypeError, match=r"Expected AsyncFunction\(function\) for a coroutine function"):
        tiny_env(judge_length)
    assert make_reward("async", function=judge_length).retries == 2


# In training


@dataclass
class Failing(AsyncReward):
    """A reward that fails if the ids of a text sum to a multiple of 3."""

    async def score_row(self, prompt, preds):
        await asyncio.sleep(0.001 * (sum(preds.ids) % 5))
        if sum(preds.ids) % 3 == 0:
            raise ConnectionError("gone")
        return sum(preds.ids) / 30


def last_letter(prompt, preds, done):
    return 0.1 * float(preds[-1])


class Plain(BatchReward):
    """The scores of `Failing`, without waiting; failures are dropped."""

    score_at = "rollout_end"

    def score(self, prompts, preds, dones):
        return [DROPPED if sum(text.ids) % 3 == 0 else sum(text.ids) / 30 for text in preds]


def test_the_same_training_as_with_a_reward_that_does_not_wait(monkeypatch):
    """The weights are equal bit for bit: the order of answers and retries makes no difference."""
    monkeypatch.setattr(failures, "MOST_DROPPED", 1.0)
    trained = []
    for reward in (Failing(retries=1, on_failure="drop", concurrency=3, **QUICK), Plain()):
        model = tiny_agent(tiny_env(reward), n_envs=8)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*are dropped")
            model.learn(32 * 3)
        trained.append(weights(model))
    assert same_weights(*trained)


@pytest.mark.parametrize("score_at", ["done", "step"])
def test_a_reward_that_may_drop_is_trained_with_by_make_agent(score_at):
    """The reward is scored at done, and in a sum with a function that scores every token."""
    judge = Failing(retries=0, on_failure="drop", score_at="done")
    env = tiny_env(judge if score_at == "done" else WeightedSum({"judge": judge, "last": last_letter}))
    assert env.score_at == score_at
    model, recorder = tiny_agent(env, n_envs=8), Recorder()
    with pytest.warns(UserWarning, match="are dropped"):
        model.learn(32, callback=recorder)
    n_dropped = sum(info["dropped"] for info, _ in recorder.episodes())
    assert 0 < n_dropped == model.rollout_buffer.trained.n_dropped
    assert model.rollout_buffer.expected_steps == ["DropEpisodes"]
    assert tiny_agent(tiny_env(Failing(score_at="done"))).rollout_buffer.expected_steps == []


@pytest.mark.parametrize("on_failure", ["raise", "drop", -1.0])
def test_each_policy_in_training(on_failure):
    reward = Failing(retries=0, on_failure=on_failure)
    env = tiny_env(WeightedSum({"judge": reward}))
    model, recorder, metrics = tiny_agent(env, n_envs=8), Recorder(), EpisodeMetrics()
    if on_failure == "raise":
        with pytest.raises(RewardError, match=r"Failing has no score of \d of \d+ rows(.|\n)*ConnectionError: gone"):
            model.learn(32, callback=[metrics, recorder])
        return
    with pytest.warns(UserWarning, match="Later failures are only counted, in `n_failed`"):
        model.learn(32, callback=[metrics, recorder], log_interval=None)
    logged = model.logger.name_to_value
    infos = [info for info, _ in recorder.episodes()]
    failed = [info for info in infos if sum(TOKENIZER.encode(info["text"])) % 3 == 0]
    assert 0 < len(failed) == reward.n_failed < len(infos)
    key, other = ("dropped", "failed") if on_failure == "drop" else ("failed", "dropped")
    assert (logged[f"episode/{key}"], logged[f"episode/{other}"]) == (len(failed), 0)
    assert all(info["dropped"] == (on_failure == "drop") for info in failed)
    if on_failure != "drop":
        assert logged["reward/judge/failure"] == pytest.approx(-len(failed) / len(infos))
        assert all(info["episode"]["r"] == -1.0 for info in failed)
