"""Limits on the rating server's connections: a number per address, a number in all, and a time for each request."""

from __future__ import annotations

import asyncio
from typing import Any

from textenv.checks.extras import needs

with needs("feedback", "uvicorn", "the rating page"):
    from uvicorn.protocols.http.h11_impl import H11Protocol

FROM_ONE_ADDRESS = 32  # the most connections of one address; a browser opens six to a host
FROM_ALL = 160  # the most connections in all: below the lowest usual limit of open files, 256 on macOS
REQUEST_SECONDS = 20.0  # the most time from the connection, or a later request's first byte, to the request's end


class BoundedConnection(H11Protocol):
    """A uvicorn connection that is closed if its visitor does not send a whole request in time.

    uvicorn itself waits for the end of a request for ever, and accepts connections until no more files can be opened.
    With too many connections, the one that has waited longest for its visitor's request is dropped; if all of them are
    busy with a request, the new connection is dropped.
    """

    _opened = 0.0  # on the event loop's clock, in seconds
    _timer: asyncio.TimerHandle | None = None

    @property
    def awaits_request(self) -> bool:
        """Whether no complete request has arrived since the last one was answered."""
        # `cycle` is uvicorn's record of the latest request (`h11_impl.RequestResponseCycle`).
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register this connection, and drop a connection if there are now too many."""
        super().connection_made(transport)
        self._opened = self.loop.time()
        self._timer = self.loop.call_later(REQUEST_SECONDS, transport.close)
        bounded = [connection for connection in self.connections if isinstance(connection, BoundedConnection)]
        same_address = [connection for connection in bounded if connection._address() == self._address()]
        if len(same_address) > FROM_ONE_ADDRESS:
            self._drop_longest_idle(same_address)
        elif len(bounded) > FROM_ALL:
            self._drop_longest_idle(bounded)

    def _drop_longest_idle(self, candidates: list[BoundedConnection]) -> None:
        idle = [connection for connection in candidates if connection is not self and connection.awaits_request]
        dropped = min(idle, key=lambda connection: connection._opened, default=self)
        # Removed from uvicorn's set at once: the next connection may come before `connection_lost` is called.
        dropped.connections.discard(dropped)
        dropped.transport.abort()

    def _address(self) -> Any:
        return self.client and self.client[0]

    def data_received(self, data: bytes) -> None:
        """Pass the bytes on to uvicorn, and keep a timer running until their request is complete."""
        if self._timer is None:
            self._timer = self.loop.call_later(REQUEST_SECONDS, self.transport.close)
        super().data_received(data)
        if not self.awaits_request:
            self._stop_timer()

    def shutdown(self) -> None:
        """Close the connection: at once if it awaits a request, else after the answer (uvicorn calls this to stop)."""
        if self.awaits_request:
            self.transport.abort()
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer of a connection that has ended."""
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
