"""The web page on which people score, compare and rank: a Starlette app over a store, and its server."""

from __future__ import annotations

import ipaddress
import json
import math
import re
import socket
import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode

from textenv.checks.extras import needs
from textenv.feedback.agreement import agreement, self_agreement
from textenv.feedback.connections import BoundedConnection
from textenv.feedback.exchange import rows_of
from textenv.feedback.guard import Guard
from textenv.feedback.records import Answer, Item, Kind, check_rater
from textenv.feedback.store import FeedbackStore
from textenv.feedback.words import LANGUAGES, words

with needs("feedback", "starlette, uvicorn and jinja2", "the rating page"):
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
    from starlette.templating import Jinja2Templates

FOLDER = Path(__file__).resolve().parent
THEMES = ("light", "dark")
YEAR = 365 * 24 * 3600  # seconds for which the browser keeps name, language and theme
PAGE = 50  # answers of the history that are sent at a time
TOKEN = re.compile("[A-Za-z0-9_-]{16,}")  # characters that URLs and cookies need not escape


class Pages:
    """The app's endpoints: its pages, and the JSON interface of their scripts.

    Args:
        store: The store of questions and answers.
        kind: The kind of question that is asked; None for any.
    """

    def __init__(self, store: FeedbackStore, kind: Kind | None) -> None:
        self.store = store
        self.kind = kind
        self.templates = Jinja2Templates(directory=FOLDER / "templates")
        self.routes = [
            Route("/", self.rate),
            Route("/history", self.history),
            Route("/export", self.export),
            Route("/api/history", self.answers),
            Route("/api/rater", self.enter, methods=["POST"]),
            Route("/api/next", self.next, methods=["POST"]),
            Route("/api/answer", self.answer, methods=["POST"]),
            Route("/api/undo", self.undo, methods=["POST"]),
            Mount("/static", StaticFiles(directory=FOLDER / "static")),
        ]

    def page(self, request: Request, name: str, status: int = 200) -> Response:
        """Return a page in the visitor's language and theme; query parameters set these, and cookies keep them."""
        language = _preferred(request, "language", LANGUAGES, _accepted_language(request))
        theme = _preferred(request, "theme", THEMES, "")
        context = {"words": words(language), "language": language, "languages": LANGUAGES, "theme": theme}
        response = self.templates.TemplateResponse(
            request, f"{name}.html", {**context, "page": name, "rater": _rater(request)}, status_code=status
        )
        for key, value in {"language": language, "theme": theme}.items():
            if request.query_params.get(key) == value:
                response.set_cookie(key, value, max_age=YEAR, httponly=True, samesite="strict")
        return response

    def unauthorised(self, request: Request) -> Response:
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": "Expected the token."}, status_code=401)
        return self.page(request, "token", status=401)

    def rate(self, request: Request) -> Response:
        return self.page(request, "rate" if _rater(request) else "name")

    def history(self, request: Request) -> Response:
        return self.page(request, "history" if _rater(request) else "name")

    async def enter(self, request: Request) -> Response:
        """Store the rater's name in a cookie; for the name null, delete the cookie."""
        body = await _body(request, "rater")
        response = JSONResponse({})
        if body.get("rater") is None:
            response.delete_cookie("rater", httponly=True, samesite="strict")
        else:
            name = quote(check_rater(body["rater"]))
            response.set_cookie("rater", name, max_age=YEAR, httponly=True, samesite="strict")
        return response

    async def next(self, request: Request) -> Response:
        rater, _ = _known_rater(request), await _body(request)
        # In a thread, like all writes: a write that waits for a locked file would block all other visitors.
        return JSONResponse(await run_in_threadpool(self._state, rater))

    async def answer(self, request: Request) -> Response:
        """Write an answer; the response comes when it is on the disk, and holds the next item."""
        rater, body = _known_rater(request), await _body(request, "showing", "kind", "value", "seconds")
        return JSONResponse(await run_in_threadpool(self._answer, rater, body))

    async def undo(self, request: Request) -> Response:
        """Take back the answer that the page names, so that a request that arrives twice takes back only one."""
        rater, body = _known_rater(request), await _body(request, "answer")
        return JSONResponse(await run_in_threadpool(self._undo, rater, body))

    def _state(self, rater: str) -> dict[str, Any]:
        item = self.store.next(rater, self.kind)
        progress = self.store.progress(rater, self.kind)
        shown = None if item is None else _shown(item)
        return {"item": shown, "progress": progress._asdict(), "last": self.store.last_answer(rater)}

    def _answer(self, rater: str, body: dict[str, Any]) -> dict[str, Any]:
        item = self.store.showing(_number_in(body, "showing"), rater)
        kind, seconds = body.get("kind"), body.get("seconds")
        if kind == "skip":
            if body.get("value") is not None:
                raise ValueError(f"Expected no value where an item is skipped, got {body['value']!r:.80}.")
            self.store.skip(item, seconds)
        elif kind == "score":
            self.store.score(item, body.get("value"), seconds)  # type: ignore[arg-type]
        elif kind == "compare":
            self.store.choose(item, body.get("value"), seconds)  # type: ignore[arg-type]
        elif kind == "rank":
            self.store.rank(item, body.get("value"), seconds)  # type: ignore[arg-type]
        else:
            raise ValueError(f"Expected `kind` to be score, compare, rank or skip, got {kind!r:.80}.")
        return self._state(rater)

    def _undo(self, rater: str, body: dict[str, Any]) -> dict[str, Any]:
        self.store.undo(rater, _number_in(body, "answer"))
        return self._state(rater)

    def answers(self, request: Request) -> Response:
        """Return a page of the history, newest answers first, with the agreement of raters."""
        rater = _known_rater(request)
        answers = self.store.answers()
        matching = [answer for answer in reversed(answers) if _matches(answer, request)]
        start = _start(request)
        raters = sorted({answer.rater for answer in answers} | {rater})
        shared = agreement(answers)
        between = {kind: {**figures._asdict(), "alpha": _number(figures.alpha)} for kind, figures in shared.items()}
        own = {name: figures._asdict() for name, figures in self_agreement(answers).items()}
        rows = [_row(answer) for answer in matching[start : start + PAGE]]
        more = {"raters": raters, "me": rater, "agreement": between, "self_agreement": own}
        return JSONResponse({"rows": rows, "n": len(matching), **more})

    def export(self, request: Request) -> Response:
        """Return the answers that match the filters as lines of JSON."""
        _known_rater(request)
        form = request.query_params.get("form", "")
        matching = [answer for answer in self.store.answers() if _matches(answer, request)]
        rows = rows_of(matching, form)  # type: ignore[arg-type]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        disposition = {"content-disposition": f'attachment; filename="{form}.jsonl"'}
        return Response("".join(lines), media_type="application/jsonl", headers=disposition)


def make_app(
    store: FeedbackStore,
    *,
    kind: Kind | None = None,
    token: str | None = None,
    names: Iterable[str] = ("localhost",),
    any_address: bool = False,
) -> Starlette:
    """Return the page as an ASGI app, for a server of your own; `serve` runs one.

    Args:
        store: The store of questions and answers.
        kind: The kind of question that is asked; None for any.
        token: The secret that visitors must have; see `Guard`.
        names: The host names by which visitors reach the server.
        any_address: Whether visitors may reach it by any numeric address, too; see `Guard`.
    """
    pages = Pages(store, kind)
    guard = Middleware(Guard, names, any_address, token, open_path="/static/", unauthorised=pages.unauthorised)
    handlers: dict[Any, Any] = {ValueError: _bad_request, sqlite3.OperationalError: _busy}
    return Starlette(routes=pages.routes, middleware=[guard], exception_handlers=handlers)


def _print_address(address: str) -> None:
    print(address, flush=True)  # at once: Python buffers output that goes to a file or pipe


def serve(
    store: FeedbackStore,
    *,
    kind: Kind | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    names: Sequence[str] = (),
    announce: Callable[[str], object] = _print_address,
) -> None:
    """Serve the page until Ctrl+C.

    Anyone who reaches the server may rate under any name. Without a token the server listens on this machine alone.

    Args:
        store: The store of questions and answers; other processes may use its file at the same time.
        kind: The kind of question that is asked; None for any.
        host: The address to listen on: "127.0.0.1" for this machine alone, "0.0.0.0" for its networks.
        port: The port; 0 takes a free one.
        token: The secret that visitors must have, of at least 16 letters, digits, - and _. It is required for an
            address that others can reach.
        names: Further host names of this machine by which others reach it, besides `localhost` and its own.
        announce: A function that is called with the URL to open once the server listens; by default it prints the URL.

    Raises:
        ValueError: If the token is missing where it is required, too short, or has other characters.
        OSError: If the server cannot listen on the address.
    """
    local = _is_local(host)
    if token is None and not local:
        raise ValueError(
            f"Expected a `token` to listen on {host}, which others can reach, got none. Pass one, as "
            "secrets.token_urlsafe() makes them, or listen on 127.0.0.1."
        )
    if token is not None and not TOKEN.fullmatch(token):
        raise ValueError(f"Expected a `token` of {TOKEN.pattern}, got one of {len(token)} characters.")
    # A local server may have no token, so the check of host names alone keeps foreign pages out (see `Guard`).
    known = ["localhost", *names] if local else ["localhost", socket.gethostname(), *names]
    app = make_app(store, kind=kind, token=token, names=known, any_address=not local)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family)
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    query = "" if token is None else "?" + urlencode({"token": token})
    announce(f"http://{shown}:{listening.getsockname()[1]}/{query}")
    # No access log, since URLs may hold the token; no warnings, since malformed requests could fill the disk with them.
    quiet: dict[str, Any] = {"log_level": "error", "access_log": False, "server_header": False}
    plain: dict[str, Any] = {"ws": "none", "lifespan": "off", "proxy_headers": False, **quiet}
    # A backlog of 64, since asyncio accepts up to that many connections at once before `BoundedConnection` counts them.
    config = uvicorn.Config(app, http=BoundedConnection, backlog=64, timeout_graceful_shutdown=3, **plain)
    with suppress(KeyboardInterrupt), listening:  # Ctrl+C is the regular end
        uvicorn.Server(config).run(sockets=[listening])


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


async def _body(request: Request, *names: str) -> dict[str, Any]:
    """Return the JSON object of a request, which may have the keys `names` and no others."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON, got {type(error).__name__}.") from error
    if not isinstance(body, dict) or not body.keys() <= set(names):
        expected = f"an object of {', '.join(names)}" if names else "an empty object"
        raise ValueError(f"Expected {expected}, got {body!r:.80}.")
    return body


def _number_in(body: dict[str, Any], name: str) -> int:
    number = body.get(name)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 2**63:
        raise ValueError(f"Expected `{name}` to be the number of one, got {number!r:.80}.")
    return number


def _start(request: Request) -> int:
    """Return the index of the first answer of the requested page of the history."""
    start = request.query_params.get("start", "0")
    if not re.fullmatch("[0-9]{1,18}", start):
        raise ValueError(f"Expected `start` to be a whole number from 0, got {start!r:.80}.")
    return int(start)


def _rater(request: Request) -> str:
    """Return the rater's name from the cookie, or "" if there is no valid one."""
    try:
        return check_rater(unquote(request.cookies.get("rater", "")))
    except ValueError:
        return ""


def _known_rater(request: Request) -> str:
    rater = _rater(request)
    if not rater:
        raise ValueError("Expected to know who rates, got no name. Reload the page.")
    return rater


def _preferred(request: Request, name: str, known: Collection[str], default: str) -> str:
    requested, stored = request.query_params.get(name, ""), request.cookies.get(name, "")
    return next((value for value in (requested, stored) if value in known), default)


def _accepted_language(request: Request) -> str:
    return "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"


def _shown(item: Item) -> dict[str, Any]:
    """Return an item as the page receives it: without models, and without a sign that a gold item is shown again."""
    texts = {"prompt": item.prompt, "messages": item.messages, "completions": item.completions}
    return {"showing": item.showing, "kind": item.kind, **texts, "scale": item.scale}


def _matches(answer: Answer, request: Request) -> bool:
    query = request.query_params
    rater, kind, search = query.get("rater"), query.get("kind"), query.get("search", "").casefold()
    said = [message["content"] for message in answer.messages or ()]
    texts = (*(said or [answer.prompt]), *answer.completions)
    has_text = not search or any(search in text.casefold() for text in texts)
    return has_text and (not rater or answer.rater == rater) and (not kind or answer.kind == kind)


def _row(answer: Answer) -> dict[str, Any]:
    columns = ("id", "rater", "kind", "prompt", "messages", "completions", "value", "seconds", "time")
    return {name: value for name, value in answer._asdict().items() if name in columns}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _bad_request(request: Request, error: ValueError) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


def _busy(request: Request, error: sqlite3.OperationalError) -> Response:
    return JSONResponse({"error": f"The answer is not written: {error}."}, status_code=503)
