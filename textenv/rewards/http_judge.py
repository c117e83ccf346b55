"""Rewards by HTTP services: a row is posted as JSON, and its score is read from the JSON of the answer."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from string import Formatter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from textenv.checks.extras import needs
from textenv.checks.trust import check_variable
from textenv.episodes.completion import Preds
from textenv.episodes.failure_policy import RowError
from textenv.episodes.scores import Score
from textenv.prompts.prompts import Prompt
from textenv.rewards.asynchronous import AsyncReward

if TYPE_CHECKING:
    import httpx

EXCERPT = 200  # characters of a server's answer that an error quotes

# The client of the running call. It is no attribute of the reward, which is pickled, and which several threads may call
# at once.
_client: ContextVar[httpx.AsyncClient] = ContextVar("client")


@dataclass
class HTTPJudge(AsyncReward):
    """The score that an HTTP service gives to each finished completion, several requests at a time.

    A row is posted as `{"prompt": ..., "completion": ..., "references": [...]}`, with `"row"` for the columns asked
    for. Subclasses may override `body` and `read`. A request is repeated after status 429 or 5xx, a lost connection,
    the time limit or an answer without a score, and not before the time in the header Retry-After. After any other
    status it is not repeated. Redirects are not followed. Proxies are taken from the environment.

    The reward needs httpx: `pip install "textenv[judge]"`.

    Args:
        url: The address of the service, http or https. A key belongs in `api_key_variable`, not in the address.
        key: The path of the score in the answer: names and, in lists, numbers from 0, joined by dots, such as
            "choices.0.score". The path leads to a number, or to a mapping of named numbers, whose sum is the score.
        row_columns: The columns of `prompt.row` that are sent.
        api_key_variable: The name of the environment variable that holds a key, sent as `Authorization: Bearer ...`.
            The key is read for each request and stored nowhere. A configuration may only name a variable that the
            command line allows (--allow_env).
        max_bytes: The most bytes of an answer.
        **options: The arguments of `AsyncReward`: `concurrency`, `time_limit`, `retries`, `backoff`, `on_failure`,
            `score_at`.

    Raises:
        ImportError: If httpx is not installed.
        ValueError: If the URL is malformed or contains a user or password, an option is out of its range, or the
            variable holds no key.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> judge = HTTPJudge("http://127.0.0.1:8000/score", key="result.score", on_failure="drop")
        >>> judge.body(Prompt("a"), Preds(CharTokenizer("ab"), [2]))
        {'prompt': 'a', 'completion': 'b', 'references': []}
        >>> judge.read({"result": {"score": 0.5}})
        0.5
    """

    url: str
    key: str = "score"
    row_columns: Sequence[str] = ()
    api_key_variable: str | None = None
    max_bytes: int = 1_000_000  # far more than a score takes; the limit bounds the memory if something else is sent

    def __post_init__(self) -> None:
        super().__post_init__()
        _load_httpx()
        parts = urlsplit(self.url)
        if "@" in parts.netloc:
            raise ValueError("Expected `url` without a user or password: give a key by api_key_variable.")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"Expected `url` to begin with http:// or https:// and a host, got {self.url!r}.")
        if not all(self.key.split(".")) or self.max_bytes < 1:
            raise ValueError(f"Expected a `key` as 'a.b' and `max_bytes` >= 1, got {self.key!r}, {self.max_bytes}.")
        if isinstance(self.row_columns, str):
            raise ValueError(f"Expected `row_columns` to be a list of names, got the text {self.row_columns!r}.")
        if self.api_key_variable is not None:
            check_variable(self.api_key_variable)
        self._api_key()

    def body(self, prompt: Prompt, preds: Preds) -> dict[str, Any]:
        """Return the JSON value that is posted for a row."""
        body: dict[str, Any] = {"prompt": str(prompt), "completion": preds.text, "references": prompt.references}
        missing = [column for column in self.row_columns if column not in prompt.row]
        if missing:
            raise RowError(f"Expected a row with the columns {missing}, got {list(prompt.row)}", again=False)
        if self.row_columns:
            body["row"] = {column: prompt.row[column] for column in self.row_columns}
        return body

    def read(self, answer: Any) -> Score:
        """Return the score in an answer, a parsed JSON value.

        Raises:
            RowError: If the answer has no value at `key`.
        """
        value = answer
        for step in self.key.split("."):
            try:
                value = value[int(step)] if isinstance(value, list) else value[step]
            except (LookupError, TypeError, ValueError) as error:
                raise RowError(f"Expected {self.key!r} in the answer, got {repr(answer)[:EXCERPT]}") from error
        return value

    async def score_row(self, prompt: Prompt, preds: Preds) -> Score:
        """Return the score that the service gives to a finished row."""
        try:
            content = json.dumps(self.body(prompt, preds)).encode()
        except (TypeError, ValueError) as error:
            raise RowError(f"Expected a row that can be written as JSON: {error}", again=False) from error
        received = await self._post(content)
        try:
            answer = json.loads(received)
        except ValueError as error:
            raise RowError(f"Expected JSON, got {received[:EXCERPT]!r}") from error
        return self.read(answer)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Open the client that the requests of a call share."""
        httpx = _load_httpx()
        limits = httpx.Limits(max_connections=self.concurrency)
        # httpx gets no time limit: `AsyncReward.time_limit` bounds the whole attempt.
        async with httpx.AsyncClient(timeout=None, limits=limits, follow_redirects=False) as client:
            token = _client.set(client)  # the rows' tasks see it, since a task copies the context when it is created
            try:
                yield
            finally:
                _client.reset(token)

    async def _post(self, content: bytes) -> str:
        """Return the text of the answer, with the API key blanked if the service repeats it."""
        # "identity" asks for no compression: a small compressed answer could unpack to any size, past the count below.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        api_key = self._api_key()
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        async with _client.get().stream("POST", self.url, content=content, headers=headers) as response:
            received = bytearray()
            async for chunk in response.aiter_raw():
                received += chunk
                if len(received) > self.max_bytes:
                    raise RowError(f"Expected an answer of at most max_bytes={self.max_bytes}, got more", again=False)
            status = response.status_code
            text = self._blanked(received.decode("utf-8", "replace"))
            if 200 <= status < 300:
                return text
            # 429 (too many requests) and server errors may pass. Any other status would be the same the next time.
            again = status == 429 or status >= 500
            wait = _seconds(response.headers.get("Retry-After", "")) if again else 0.0
            target = self._blanked(response.headers.get("Location", ""))
            where = f" to {target!r:.80}" if 300 <= status < 400 else ""
            raise RowError(f"status {status}{where}: {text[:EXCERPT]!r}", again, wait)

    def _api_key(self) -> str | None:
        if self.api_key_variable is None:
            return None
        api_key = os.environ.get(self.api_key_variable, "").strip()
        # h11, below httpx, quotes a header value that it cannot send in its error, where a key must not appear.
        if not api_key or not api_key.isascii() or not api_key.isprintable():
            raise ValueError(
                f"Expected the environment variable {self.api_key_variable!r} to hold a key of printable ASCII, got "
                f"{'something else' if api_key else 'nothing'}."
            )
        return api_key

    def _blanked(self, text: str) -> str:
        """Return a text from the service with "***" for the API key, which the text may repeat."""
        api_key = self._api_key()
        return text if api_key is None else text.replace(api_key, "***")


@dataclass
class ChatJudge(HTTPJudge):
    """The mark that a chat model gives, by OpenAI's chat completions API (vLLM, llama.cpp, ...), scaled to 0 to 1.

    A reply without a mark from `low` to `high` fails the attempt, which is repeated. The policy may learn to talk the
    judge round instead of writing better: read its texts.

    Args:
        url: The address of the API, such as "http://127.0.0.1:8000/v1/chat/completions".
        model: The name of the model on the server.
        question: The message to the model; {prompt}, {completion} and {references} (a line each) are filled in.
        low: The worst mark, which scores 0.
        high: The best mark, which scores 1.
        pattern: A regular expression whose first group is the mark in the reply. By default the reply has to be a
            number and nothing else.
        options: Further fields of the request.
        **others: The other arguments of `HTTPJudge`.

    Raises:
        ValueError: If `low` is not below `high`, the pattern has no group, or the question has other placeholders.

    Example:
        >>> judge = ChatJudge("http://127.0.0.1:8000/v1/chat/completions", model="m", low=1, high=5)
        >>> judge.read({"choices": [{"message": {"content": " 4 "}}]})
        0.75
    """

    key: str = "choices.0.message.content"
    model: str = field(kw_only=True)
    question: str = field(
        default="{prompt}\n\nAnswer:\n{completion}\n\nHow good is the answer, from 0 to 10? Reply with a number alone.",
        kw_only=True,
    )
    low: float = field(default=0.0, kw_only=True)
    high: float = field(default=10.0, kw_only=True)
    pattern: str = field(default=r"^\s*(-?\d+(?:\.\d+)?)\s*$", kw_only=True)
    options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0}, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high or re.compile(self.pattern).groups < 1:
            raise ValueError(
                f"Expected low < high and a `pattern` with a group, got {self.low}, {self.high}, {self.pattern!r}."
            )
        try:
            fields = [parsed[1:] for parsed in Formatter().parse(self.question) if parsed[1] is not None]
        except ValueError as error:
            fields = [(str(error), "", None)]
        # A format such as {prompt:999999999} would let a configuration ask for any amount of memory.
        wrong = [name for name, *rest in fields if name not in ("prompt", "completion", "references") or any(rest)]
        if wrong:
            raise ValueError(
                "Expected a `question` with {prompt}, {completion} and {references} alone, and other braces doubled, "
                f"got {self.question!r:.80}: {wrong[0]!r}."
            )

    def body(self, prompt: Prompt, preds: Preds) -> dict[str, Any]:
        """Return the JSON value that is posted for a row."""
        # str.format does not look into the values, so braces in a text of the policy stay braces.
        row = {"prompt": str(prompt), "completion": preds.text, "references": "\n".join(prompt.references)}
        messages = [{"role": "user", "content": self.question.format(**row)}]
        return {"model": self.model, "messages": messages, **self.options}

    def read(self, answer: Any) -> Score:
        """Return the mark, scaled to 0 to 1.

        Raises:
            RowError: If the reply has no mark from `low` to `high`.
        """
        reply = str(super().read(answer))
        match = re.search(self.pattern, reply)
        mark = float(match.group(1)) if match else math.nan
        if not self.low <= mark <= self.high:
            raise RowError(f"Expected a mark from {self.low:g} to {self.high:g}, got {reply[:EXCERPT]!r}")
        return (mark - self.low) / (self.high - self.low)


def _load_httpx() -> Any:
    with needs("judge", "httpx", "HTTPJudge"):
        import httpx
    return httpx


def _seconds(retry_after: str) -> float:
    """Return the seconds in a header Retry-After, a number or a date (RFC 9110, section 10.2.3); else 0."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return 0.0
