"""Connections of the rating server: so many from an address, and a request within so many seconds."""

from __future__ import annotations

import asyncio
from typing import Any

from textenv.extras import needs

with needs("feedback", "uvicorn", "the rating page"):
    from uvicorn.protocols.http.h11_impl import H11Protocol

FROM_ONE_ADDRESS = 32  # connections; a browser holds six
FROM_ALL = 160  # fewer than a process may have files open anywhere
REQUEST_SECONDS = 20.0  # from a connection, or a further request's first byte, to the request's last


class BoundedConnection(H11Protocol):
    """A connection of uvicorn's that is closed where its visitor does not say in time what is asked.

    uvicorn itself waits for the end of a request for ever, and accepts until no more files can be opened. Where there
    are too many, the one that has owed a request for longest goes; where none owes any, the new one.
    """

    _made = 0.0
    _limit: asyncio.TimerHandle | None = None

    @property
    def owes_request(self) -> bool:
        """Whether nothing, or a part of a request, has come since the last one was answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take up a connection, for which another may have to go."""
        super().connection_made(transport)
        self._made = self.loop.time()
        self._limit = self.loop.call_later(REQUEST_SECONDS, transport.close)
        every = [one for one in self.connections if isinstance(one, BoundedConnection)]
        same = [one for one in every if one._address() == self._address()]
        if len(same) > FROM_ONE_ADDRESS:
            self._drop_one(same)
        elif len(every) > FROM_ALL:
            self._drop_one(every)

    def _drop_one(self, among: list[BoundedConnection]) -> None:
        idle = [one for one in among if one is not self and one.owes_request]
        dropped = min(idle, key=lambda one: one._made, default=self)
        dropped.connections.discard(dropped)  # at once: the next may come before its end is noticed
        dropped.transport.abort()

    def _address(self) -> Any:
        return self.client and self.client[0]

    def data_received(self, data: bytes) -> None:
        """Take up bytes: of a request that has its time, until it is whole."""
        if self._limit is None:
            self._limit = self.loop.call_later(REQUEST_SECONDS, self.transport.close)
        super().data_received(data)
        if not self.owes_request:
            self._stop_clock()

    def shutdown(self) -> None:
        """Let the visitor have the answer that is on its way, and wait for no further request."""
        if self.owes_request:
            self.transport.abort()
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._stop_clock()
        super().connection_lost(exc)

    def _stop_clock(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
