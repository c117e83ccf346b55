"""Access control of the rating server: an ASGI layer that refuses foreign hosts, sites and visitors without a token."""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from collections.abc import Callable, Iterable
from urllib.parse import urlencode, urlsplit

from textenv.checks.extras import needs

with needs("feedback", "starlette", "the rating page"):
    from starlette.datastructures import MutableHeaders
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, RedirectResponse, Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 16 * 1024  # bytes; an answer has less than one kilobyte
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
    """An ASGI layer that passes only requests from the pages of its app on to that app.

    It refuses with the status

    - 403: a `Host` header with a foreign name, since a foreign page could reach a local server through a domain of its
      own that resolves to this machine ("DNS rebinding");
    - 403: a request that writes and comes from another site or port;
    - 413: a body of more than `MAX_BODY` bytes;
    - 415: a request that writes and is not JSON;
    - 401: with a `token`, a visitor who does not have it. The token arrives once in the URL, `?token=...`; a redirect
      removes it from there and stores it in a cookie that scripts cannot read.

    Args:
        app: The app behind this layer.
        names: The host names of this server.
        any_address: Whether numeric addresses count as this server's beyond those of the loopback, as they must on a
            network. A foreign domain cannot forge them.
        token: The secret, or None for no secret.
        open_path: The prefix of paths that need no token, for style sheets and scripts.
        unauthorised: A function that returns the response to visitors without the token.
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
        # The cookie's name depends on the token, since browsers share cookies between the ports of a host.
        self.cookie = "textenv_" + hashlib.sha256((token or "").encode()).hexdigest()[:12]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on to the app."""
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
            except ClientDisconnect:  # nobody is left to be answered
                return
            if body is not None:
                await self.app(scope, _replay(body, receive), send_guarded)
                return
            response = _refusal(413, f"Expected at most {MAX_BODY} bytes.")
        await response(scope, receive, send_guarded)

    def _refuse_site(self, request: Request) -> Response | None:
        """Return a refusal for a foreign host, and for a request that writes and does not come from a page of ours."""
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
        """Return the refusal of a visitor without the token, or the redirect that moves a token from URL to cookie."""
        if self.token is None or request.url.path.startswith(self.open_path):
            return None
        token = request.query_params.get("token")
        if token is not None and request.method in SAFE and self._is_token(token):
            rest = [(name, value) for name, value in request.query_params.multi_items() if name != "token"]
            # Exactly one slash: browsers read a redirect to "//name" as one to the host "name".
            path = "/" + request.url.path.lstrip("/") + ("?" + urlencode(rest) if rest else "")
            response = RedirectResponse(path, status_code=303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return response
        if self._is_token(request.cookies.get(self.cookie, "")):
            return None
        return self.unauthorised(request)

    def _is_token(self, candidate: str) -> bool:
        return self.token is not None and secrets.compare_digest(candidate.encode(), self.token.encode())


def _refusal(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status_code=status)


async def _read(request: Request) -> bytes | None:
    """Return the body, or None if it is over the limit, beyond which no further chunk is read."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            return None
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI `receive` that delivers the body once more, and after it the messages of the real `receive`."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
