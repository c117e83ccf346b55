"""Who may talk to the rating server: a layer in front of an app that refuses all others."""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from collections.abc import Callable, Iterable
from urllib.parse import urlencode, urlsplit

from textenv.extras import needs

with needs("feedback", "starlette", "the rating page"):
    from starlette.datastructures import MutableHeaders
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, RedirectResponse, Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 16 * 1024  # bytes: an answer is less than one kilobyte
SAFE = ("GET", "HEAD")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """An ASGI layer that lets through only what the pages behind it send themselves.

    Refused are names of hosts that are not ours, which is how a foreign page reaches a local server by a domain of its
    own that it points here ("DNS rebinding"): 403; requests that write and come from another site or from another
    port: 403; bodies over `MAX_BODY` bytes: 413; and, where there is a token, whoever does not have it: 401. The token
    comes once in the URL, `?token=...`, and leaves it by a redirect into a cookie that scripts cannot read.

    Args:
        app: What it guards.
        names: The names of hosts that are ours.
        any_address: Whether numeric addresses other than this machine's own count as ours, as for a server that listens
            on a network. They are never the work of a foreign domain.
        token: The secret; None for none.
        open_path: The start of paths that need no token: style sheets, scripts.
        unauthorised: Makes the answer for those without the token.
    """

    def __init__(
        self,
        app: ASGIApp,
        names: Iterable[str],
        any_address: bool,
        token: str | None,
        open_path: str,
        unauthorised: Callable[[Request], Response],
    ) -> None:
        self.app = app
        self.names = {name.lower() for name in names}
        self.any_address = any_address
        self.token = token
        self.open_path = open_path
        self.unauthorised = unauthorised
        # named by the token: servers on other ports of this machine share the browser's cookies
        self.cookie = "textenv_" + hashlib.sha256((token or "").encode()).hexdigest()[:12]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        request = Request(scope, receive)
        response = self._refuse_site(request) or self._refuse_stranger(request)
        if response is None:
            try:
                body = await _read(request)
            except ClientDisconnect:  # in the middle of it: nobody is there to be answered
                return
            if body is not None:
                await self.app(scope, _replay(body, receive), send_guarded)
                return
            response = _refusal(413, f"Expected at most {MAX_BODY} bytes.")
        await response(scope, receive, send_guarded)

    def _refuse_site(self, request: Request) -> Response | None:
        """Refuse a host that is not ours, and a request that writes and does not come from our pages."""
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return _refusal(403, f"Expected a host that is ours, got {hosts!r:.100}.")
        if request.method in SAFE:
            return None
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        from_page = site in (None, "same-origin") and origin in (None, f"http://{hosts[0]}", f"https://{hosts[0]}")
        if not from_page or (site is None and origin is None):
            return _refusal(403, "Expected a request from a page of this server.")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _refusal(415, "Expected application/json.")
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:  # brackets that are not closed
            return False
        if name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:  # a name
            return False
        return self.any_address or address.is_loopback

    def _refuse_stranger(self, request: Request) -> Response | None:
        """Refuse who does not have the token; who brings it in the URL gets it as a cookie and the URL without it."""
        if self.token is None or request.url.path.startswith(self.open_path):
            return None
        brought = request.query_params.get("token")
        if brought is not None and request.method in SAFE and self._is_token(brought):
            rest = [(name, value) for name, value in request.query_params.multi_items() if name != "token"]
            # one slash: two would make what follows a host
            path = "/" + request.url.path.lstrip("/") + ("?" + urlencode(rest) if rest else "")
            response = RedirectResponse(path, status_code=303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return response
        if self._is_token(request.cookies.get(self.cookie, "")):
            return None
        return self.unauthorised(request)

    def _is_token(self, brought: str) -> bool:
        return self.token is not None and secrets.compare_digest(brought.encode(), self.token.encode())


def _refusal(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status_code=status)


async def _read(request: Request) -> bytes | None:
    """Return the body, or None where it is over the limit; no more than the limit is read."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            return None
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Receive the body that was read, then what `receive` has, which is that the visitor went away."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return messages.pop() if messages else await receive()

    return received
