"""Rewards by coroutines, which wait for a server's answer: several rows at a time, with time limits and retries."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from textenv.checks.trust import Kind, is_called_with
from textenv.episodes.completion import Preds
from textenv.episodes.failure_policy import Failures, OnFailure, RowError
from textenv.episodes.scores import Score, ScoreAt, check_rewards
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import BatchReward, check_choice
from textenv.rewards.registry import make_named

if TYPE_CHECKING:
    import tenacity

Result = TypeVar("Result")

LONGEST_WAIT = 60.0  # seconds between two attempts: a longer wait would hold up the whole rollout
POLL = 0.1  # seconds after which Windows notices Ctrl-C, which does not interrupt a wait without a limit there


@dataclass(kw_only=True)
class AsyncReward(BatchReward):
    """Base class of rewards whose coroutine `score_row`, which subclasses write, scores one finished row.

    The rows of a call run concurrently, in an event loop in a thread of its own, so that the reward works in a
    notebook, too. When the call returns, raises or is interrupted (Ctrl-C), none of its coroutines is left running. A
    coroutine has to wait by `await`: a blocking call holds up the other rows and its own time limit. An attempt fails
    if `score_row` raises, exceeds the time limit, or returns no finite number; a `RowError` says whether and when to
    try again.

    Declare the parameters of a subclass as the fields of a dataclass, so that it can be pickled.

    Args:
        concurrency: The most rows at a time.
        time_limit: The seconds after which an attempt is cancelled.
        retries: The most further attempts for a row.
        backoff: The seconds before the first retry; they double with each further one and are multiplied by a random
            number in [0.5, 1.5], up to 60 s. A `RowError` may ask for a longer pause.
        on_failure: The treatment of a row whose last attempt has failed. "raise": a `RewardError` that lists all such
            rows. "drop": the episode is left out of training (`textenv.rewards.DROPPED`), and too many dropped episodes
            stop the run (see `textenv.episodes.failure_policy.Failures`). A number: the row's reward, as the part
            "failure". Dropped and penalised rows are counted, with one warning.
        score_at: "rollout_end" scores the texts of a rollout together, "done" each text when it ends.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> class Counted(AsyncReward):
        ...     async def score_row(self, prompt, preds):
        ...         await asyncio.sleep(0.01)
        ...         return float(len(preds.text))
        >>> Counted(concurrency=4).score([Prompt("a")] * 2, [Preds(CharTokenizer("ab"), [1, 2])] * 2, [True] * 2)
        [2.0, 2.0]
    """

    concurrency: int = 16
    time_limit: float = 30.0
    retries: int = 2
    backoff: float = 1.0
    on_failure: OnFailure = "raise"
    score_at: ScoreAt = "rollout_end"

    def __post_init__(self) -> None:
        check_choice("score_at", self.score_at, ("done", "rollout_end"))
        if self.concurrency < 1:
            raise ValueError(f"Expected `concurrency` to be at least 1, got {self.concurrency}.")
        if not self.time_limit > 0:
            raise ValueError(f"Expected `time_limit` to be positive, got {self.time_limit}.")
        if self.retries < 0 or not self.backoff >= 0:
            raise ValueError(f"Expected `retries` and `backoff` of 0 or more, got {self.retries} and {self.backoff}.")
        self.failures = Failures(self.on_failure)
        self.may_drop = self.on_failure == "drop"

    @property
    def n_failed(self) -> int:
        """The number of rows that have failed so far."""
        return self.failures.n_failed

    @abstractmethod
    async def score_row(self, prompt: Prompt, preds: Preds) -> Score:
        """Return the reward of a finished row: a finite number, a dict of named numbers, or `DROPPED`."""

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Enclose the rows of a call: override it to open a client before the first row and close it after the last."""
        yield

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Sequence[Score]:
        """Return the rewards of the rows.

        Raises:
            RewardError: If rows failed and `on_failure` is "raise"; the message lists them with their causes.
        """
        answers = run_apart(self._score_rows(prompts, preds))
        causes = {row: answer for row, answer in enumerate(answers) if isinstance(answer, Exception)}
        if causes:
            tried = f", each asked {self.retries + 1} times at most"
            self.failures.note(type(self).__name__, causes, prompts, preds, tried)
        self.failures.count(len(answers), len(causes))
        return [self.failures.instead if isinstance(answer, Exception) else answer for answer in answers]

    async def _score_rows(self, prompts: Sequence[Prompt], preds: Sequence[Preds]) -> list[Score | Exception]:
        turns = asyncio.Semaphore(self.concurrency)

        async def wait_for_turn(row: int) -> Score | Exception:
            async with turns:  # held during the pauses between attempts, too, so that an overloaded server gets a rest
                return await self._answer(row, prompts[row], preds[row])

        async with self.session():
            tasks = [asyncio.create_task(wait_for_turn(row)) for row in range(len(prompts))]
            try:
                if tasks:
                    await asyncio.wait(tasks)
            finally:
                # Each task is cancelled only once, since a second time would interrupt its clean-up. Hence
                # `asyncio.wait` above: `gather` cancels its tasks itself.
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return [task.result() for task in tasks]

    async def _answer(self, row: int, prompt: Prompt, preds: Preds) -> Score | Exception:
        """Return the score of a row, or the error of its last attempt."""
        import tenacity  # here, since `import textenv` loads this file, and may load gymnasium and numpy only

        jitter = Random(row)  # a generator of its own, so that rows wait for different times, reproducibly
        # A new object for each row: tenacity keeps the state of an attempt in it (`BaseRetrying.iter_state`).
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_is_worth_another),
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=lambda state: self._pause(state, jitter),
            reraise=True,
        )
        try:
            return await attempts(self._ask_once, prompt, preds)
        except Exception as error:
            return error

    async def _ask_once(self, prompt: Prompt, preds: Preds) -> Score:
        """Return the checked score of a row, or raise the reason why this attempt failed."""
        try:
            value = await asyncio.wait_for(self._ask(prompt, preds), self.time_limit)
            return check_rewards([value], [prompt], [preds])[0].score
        except TimeoutError as error:
            raise RowError(f"no answer within {self.time_limit:g} s") from error
        except RowError as error:
            if error.again and error.wait > LONGEST_WAIT:
                message = f"{error}; to be asked again in {error.wait:.0f} s, over {LONGEST_WAIT:.0f}"
                raise RowError(message, again=False) from error
            raise

    async def _ask(self, prompt: Prompt, preds: Preds) -> Score:
        try:
            return await self.score_row(prompt, preds)
        except SystemExit as error:  # it would end the event loop, and with it the other rows
            raise RowError(f"SystemExit: {error}") from error

    def _pause(self, state: tenacity.RetryCallState, jitter: Random) -> float:
        """Return the seconds to wait before the next attempt."""
        pause = min(self.backoff * 2 ** (state.attempt_number - 1) * jitter.uniform(0.5, 1.5), LONGEST_WAIT)
        error = None if state.outcome is None else state.outcome.exception()
        return max(pause, error.wait) if isinstance(error, RowError) else pause


def _is_worth_another(error: BaseException) -> bool:
    # `CancelledError` is no `Exception`, so a cancelled attempt is not repeated.
    return error.again if isinstance(error, RowError) else isinstance(error, Exception)


_is_called = is_called_with("prompt", "preds")
JUDGE = Kind(
    "judge",
    "a class with async def __call__(self, prompt, preds)",
    lambda candidate: _is_called(candidate) and inspect.iscoroutinefunction(candidate.__call__),
)


@dataclass
class AsyncFunction(AsyncReward):
    """The reward of a coroutine function, `async def judge(prompt, preds)`.

    Args:
        function: The function, or its "module:name"; in a configuration, the "module:name" of a class with such a
            `__call__`.
        **options: The arguments of `AsyncReward`.

    Raises:
        TypeError: If `function` is no coroutine function.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> async def judge(prompt, preds):
        ...     await asyncio.sleep(0.01)
        ...     return float(preds.text == "ab")
        >>> AsyncFunction(judge, time_limit=5.0)(Prompt("a"), Preds(CharTokenizer("ab"), [1, 2]), True)
        1.0
    """

    function: str | Callable[[Prompt, Preds], Awaitable[Score]]

    def __post_init__(self) -> None:
        super().__post_init__()
        function: Any = make_named(self.function, JUDGE, {}) if isinstance(self.function, str) else self.function
        if not is_coroutine_function(function):
            raise TypeError(f"Expected a function `async def judge(prompt, preds)`, got {function!r:.80}.")
        self._function = function

    async def score_row(self, prompt: Prompt, preds: Preds) -> Score:
        """Return the function's score of a finished row."""
        return await self._function(prompt, preds)


def is_coroutine_function(function: Any) -> bool:
    """Return whether a call of a function or object returns a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def run_apart(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in an event loop in a thread of its own, and return its result.

    If this call is interrupted, it cancels the coroutine and waits for its clean-up.
    """
    outcome: Future[Result] = Future()
    stops: list[Callable[[], Any]] = []
    has_begun, has_ended = threading.Event(), threading.Event()

    async def watched() -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        stops.append(lambda: loop.call_soon_threadsafe(task.cancel))
        has_begun.set()
        return await work

    def run() -> None:
        try:
            outcome.set_result(asyncio.run(watched()))
        except BaseException as error:
            outcome.set_exception(error)
        finally:
            has_begun.set()
            has_ended.set()

    thread = threading.Thread(target=run, name="rewards", daemon=True)
    thread.start()
    try:
        while not has_ended.wait(POLL):  # below Python 3.13, a `thread.join` that is interrupted counts as joined
            pass
    except BaseException:
        has_begun.wait()
        for stop in stops:
            with contextlib.suppress(RuntimeError):  # the loop has closed in the meantime
                stop()
        raise
    finally:
        has_ended.wait()
        thread.join()
    return outcome.result()
