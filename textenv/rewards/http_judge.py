"""A score that a server gives: JSON posted to a URL, and a number read from the JSON that comes back."""

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

from textenv.completion import Preds
from textenv.extras import needs
from textenv.failures import RowError
from textenv.prompts import Prompt
from textenv.rewarding import Score
from textenv.rewards.asynchronous import AsyncReward
from textenv.trust import check_variable

if TYPE_CHECKING:
    import httpx

EXCERPT = 200  # characters of a server's answer in an error

_client: ContextVar[httpx.AsyncClient] = ContextVar("client")  # of the call that is running


@dataclass
class HTTPJudge(AsyncReward):
    """What a server says of a text: POSTs JSON for each finished row, side by side, and reads the score of the answer.

    The request is `{"prompt": ..., "completion": ..., "references": [...]}`, and `"row"` with the columns asked for. A
    subclass may write another `body` and another `read`. Answers of status 429 and 5xx, lost connections, time limits
    and answers without a score are asked for again, after what the header Retry-After says; other statuses are not.
    Redirects are not followed. Proxies are taken from the environment.

    Needs httpx: `pip install "textenv[judge]"`.

    Args:
        url: Where to; http or https. A key belongs into `api_key_variable`, not into it.
        key: Where the answer has the score: names and, in lists, numbers from 0, with dots between them, as
            "choices.0.score". There stands a number, or a mapping of named ones, whose sum is the score.
        row_columns: The columns of `prompt.row` that are sent.
        api_key_variable: The environment variable with a key, which is sent as `Authorization: Bearer ...`. It is read
            when it is used, and stored nowhere. In a configuration, one that the command line allows (--allow_env).
        max_bytes: The largest answer.
        **options: Those of `AsyncReward`: `concurrency`, `time_limit`, `retries`, `backoff`, `on_failure`, `score_at`.

    Raises:
        ImportError: Without httpx.
        ValueError: If the URL is none, has a user or password in it, or the variable is not set.

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
    max_bytes: int = 1_000_000

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
        """Return what is posted for a row, as what goes into JSON."""
        body: dict[str, Any] = {"prompt": str(prompt), "completion": preds.text, "references": prompt.references}
        missing = [column for column in self.row_columns if column not in prompt.row]
        if missing:
            raise RowError(f"Expected a row with the columns {missing}, got {list(prompt.row)}", again=False)
        if self.row_columns:
            body["row"] = {column: prompt.row[column] for column in self.row_columns}
        return body

    def read(self, answer: Any) -> Score:
        """Return the score that an answer, parsed JSON, has.

        Raises:
            RowError: If it has none.
        """
        found = answer
        for step in self.key.split("."):
            try:
                found = found[int(step)] if isinstance(found, list) else found[step]
            except (LookupError, TypeError, ValueError) as error:
                raise RowError(f"Expected {self.key!r} in the answer, got {repr(answer)[:EXCERPT]}") from error
        return found

    async def score_row(self, prompt: Prompt, preds: Preds) -> Score:
        """Return the score that the server gives."""
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
        """Open the connections of a call."""
        httpx = _load_httpx()
        limits = httpx.Limits(max_connections=self.concurrency)
        # The time limit is the attempt's own.
        async with httpx.AsyncClient(timeout=None, limits=limits, follow_redirects=False) as client:
            token = _client.set(client)
            try:
                yield
            finally:
                _client.reset(token)

    async def _post(self, content: bytes) -> str:
        """Return the answer, in which a repeated key is blanked."""
        # An answer that is not compressed has no more bytes than are counted.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        api_key = self._api_key()
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        async with _client.get().stream("POST", self.url, content=content, headers=headers) as response:
            received = bytearray()
            async for part in response.aiter_raw():
                received += part
                if len(received) > self.max_bytes:
                    raise RowError(f"Expected an answer of at most max_bytes={self.max_bytes}, got more", again=False)
            status = response.status_code
            text = self._blanked(received.decode("utf-8", "replace"))
            if 200 <= status < 300:
                return text
            again = status == 429 or status >= 500
            wait = _seconds(response.headers.get("Retry-After", "")) if again else 0.0
            target = self._blanked(response.headers.get("Location", ""))
            where = f" to {target!r:.80}" if 300 <= status < 400 else ""
            raise RowError(f"status {status}{where}: {text[:EXCERPT]!r}", again, wait)

    def _api_key(self) -> str | None:
        if self.api_key_variable is None:
            return None
        api_key = os.environ.get(self.api_key_variable, "").strip()
        # What cannot be sent must not reach the libraries below, whose errors show it.
        if not api_key or not api_key.isascii() or not api_key.isprintable():
            raise ValueError(
                f"Expected the environment variable {self.api_key_variable!r} to hold a key of printable ASCII, got "
                f"{'something else' if api_key else 'nothing'}."
            )
        return api_key

    def _blanked(self, text: str) -> str:
        """Return what a server sent without the key, which it may repeat."""
        api_key = self._api_key()
        return text if api_key is None else text.replace(api_key, "***")


@dataclass
class ChatJudge(HTTPJudge):
    """The mark that a chat model gives, from a server of OpenAI's chat completions (vLLM, llama.cpp, ...), as 0 to 1.

    A reply without a mark from `low` to `high` is asked for again. The policy learns what earns marks, which may be to
    talk the judge round: read its texts.

    Args:
        url: As "http://127.0.0.1:8000/v1/chat/completions".
        model: What the server calls the model.
        question: What it is asked; {prompt}, {completion} and {references} (a line each) stand for the row's.
        low: The worst mark.
        high: The best mark.
        pattern: Finds the mark in the reply, as its first group. The reply must be a number, unless another is given.
        options: What else is posted.
        **others: Those of `HTTPJudge`.

    Raises:
        ValueError: If `low` is not below `high`, the pattern has no group, or the question asks for something else.

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
            places = [place[1:] for place in Formatter().parse(self.question) if place[1] is not None]
        except ValueError as error:
            places = [(str(error), "", None)]
        # A format or an attribute would let a text of the configuration ask for any amount of memory.
        wrong = [name for name, *rest in places if name not in ("prompt", "completion", "references") or any(rest)]
        if wrong:
            raise ValueError(
                "Expected a `question` with {prompt}, {completion} and {references} alone, and other braces doubled, "
                f"got {self.question!r:.80}: {wrong[0]!r}."
            )

    def body(self, prompt: Prompt, preds: Preds) -> dict[str, Any]:
        """Return what is posted for a row."""
        row = {"prompt": str(prompt), "completion": preds.text, "references": "\n".join(prompt.references)}
        messages = [{"role": "user", "content": self.question.format(**row)}]
        return {"model": self.model, "messages": messages, **self.options}

    def read(self, answer: Any) -> Score:
        """Return the mark as a number from 0 to 1."""
        reply = str(super().read(answer))
        found = re.search(self.pattern, reply)
        mark = float(found.group(1)) if found else math.nan
        if not self.low <= mark <= self.high:
            raise RowError(f"Expected a mark from {self.low:g} to {self.high:g}, got {reply[:EXCERPT]!r}")
        return (mark - self.low) / (self.high - self.low)


def _load_httpx() -> Any:
    with needs("judge", "httpx", "HTTPJudge"):
        import httpx
    return httpx


def _seconds(retry_after: str) -> float:
    """Return the seconds that a header Retry-After asks for: a number, or a date (RFC 9110, section 10.2.3)."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return 0.0
