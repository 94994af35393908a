"""The seam between the SDK and the network: requests, streams and WebSockets over a pool of connections.

What is sent again, and when: nothing was sent (nobody listened, or the name was not found) - always, after starting the
daemon where that is ours to do; a kept connection that died before a byte of the answer - once, on a fresh one, and only what
may be repeated: GET, HEAD, PUT, DELETE, and anything with an ``Idempotency-Key``. Nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.client.connection import Body, Connection, Failure, Head, Headers, open_connection
from stoker.client.endpoint import Endpoint
from stoker.errors import DeadlineExceeded, HostError

if TYPE_CHECKING:
    from stoker.client.websocket import WebSocket

__all__ = ["Answer", "Stream", "Transport"]

CONNECT_TIMEOUT = 10.0
REQUEST_TIMEOUT = 60.0
IDLE_LIMIT = 20.0
"""Seconds a kept connection is trusted; the server keeps them longer."""
KEPT = 32
ANSWER_LIMIT = 64 << 20
REPEATABLE = frozenset({"GET", "HEAD", "PUT", "DELETE"})


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes


class Stream:
    """An answer whose body is still to come. Iterate over it, or ``read`` it whole."""

    def __init__(self, connection: Connection, head: Head, timeout: float | None) -> None:
        self._connection = connection
        self._timeout = timeout
        self.status = head.status
        self.headers = head.headers

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[bytes]:
        while piece := await self.chunk():
            yield piece

    async def chunk(self) -> bytes:
        """The next piece; empty at the end. A stream that stands still longer than its timeout is an error."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._connection.chunk()
        except TimeoutError:
            raise DeadlineExceeded("answer_stalled", f"nothing came from the daemon for {self._timeout:g} s") from None
        except Failure as e:
            raise HostError("connection_lost", f"the connection to the daemon broke: {e.reason}") from e

    async def read(self, limit: int = ANSWER_LIMIT) -> bytes:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._connection.read(limit)
        except TimeoutError:
            raise DeadlineExceeded("answer_stalled", f"the daemon's answer did not end within {self._timeout:g} s") from None
        except Failure as e:
            raise HostError("connection_lost", f"the connection to the daemon broke: {e.reason}") from e


class Transport:
    """Connections to one endpoint, for one event loop. ``start`` is called once when nobody listens, before one more try."""

    def __init__(
        self, endpoint: Endpoint, *, headers: Headers = (), start: Callable[[], Awaitable[None]] | None = None, hint: str = ""
    ) -> None:
        self.endpoint = endpoint
        self._headers = tuple(headers)
        self._start = start
        self._hint = hint or f"is the daemon running at {endpoint}?"
        self._idle: list[Connection] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def request(
        self,
        method: str,
        target: str,
        *,
        body: Body | None = None,
        headers: Headers = (),
        timeout: float | None = REQUEST_TIMEOUT,
    ) -> Answer:
        """One request and its whole answer, within ``timeout`` seconds altogether."""
        try:
            async with asyncio.timeout(timeout):
                async with self.stream(method, target, body=body, headers=headers, timeout=None, idle=None) as stream:
                    return Answer(stream.status, stream.headers, await stream.read())
        except TimeoutError:
            raise DeadlineExceeded("request_timeout", f"{method} {target} was not answered within {timeout:g} s") from None

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        target: str,
        *,
        body: Body | None = None,
        headers: Headers = (),
        timeout: float | None = REQUEST_TIMEOUT,
        idle: float | None = None,
    ) -> AsyncIterator[Stream]:
        """An answer to be read piece by piece. ``timeout``: until its head is there; ``idle``: between two pieces."""
        try:
            async with asyncio.timeout(timeout):
                connection, head = await self._exchange(method, target, headers, body)
        except TimeoutError:
            raise DeadlineExceeded("request_timeout", f"{method} {target} was not answered within {timeout:g} s") from None
        try:
            yield Stream(connection, head, idle)
        except BaseException:
            connection.close()
            raise
        self._release(connection)

    async def websocket(self, target: str, *, headers: Headers = (), timeout: float = REQUEST_TIMEOUT) -> WebSocket | Answer:
        """A WebSocket on a connection of its own, or the answer that refused it."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(timeout):
                connection = await self._connect()
                opened = await connection.upgrade(target, (*self._headers, *headers))
                if not isinstance(opened, Head):
                    return opened
                answer = Answer(opened.status, opened.headers, await connection.read(ANSWER_LIMIT))
        except BaseException as e:
            if connection is not None:
                connection.close()
            if isinstance(e, TimeoutError):
                raise DeadlineExceeded("request_timeout", f"{target} did not open within {timeout:g} s") from None
            if isinstance(e, Failure):
                raise self._translate(e) from e
            raise
        connection.close()
        return answer

    async def _exchange(self, method: str, target: str, headers: Headers, body: Body | None) -> tuple[Connection, Head]:
        headers = (*self._headers, *headers)
        streamed = body is not None and not isinstance(body, bytes)
        repeatable = not streamed and (method in REPEATABLE or any(name.lower() == "idempotency-key" for name, _ in headers))
        while True:
            # What cannot be sent twice gets a connection that has not been kept: one fewer way to fail.
            connection = (self._take() if repeatable else self._take(fresh=5.0)) or await self._connect()
            try:
                return connection, await connection.exchange(method, target, headers, body)
            except Failure as e:
                kept = connection.used > 1
                connection.close()
                if not (kept and repeatable):
                    raise self._translate(e) from e
            except BaseException:
                connection.close()
                raise

    def _take(self, fresh: float = IDLE_LIMIT) -> Connection | None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            # Another loop's connections, or after a fork our parent's: they are not ours to use, and not to close either.
            self._idle.clear()
            self._loop = loop
        now = loop.time()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable() and now - connection.idle_since < fresh:
                return connection
            connection.close()
        return None

    def _release(self, connection: Connection) -> None:
        if self._closed or self._loop is not asyncio.get_running_loop() or len(self._idle) >= KEPT or not connection.recycle():
            connection.close()
        else:
            self._idle.append(connection)

    async def _connect(self) -> Connection:
        if self._closed:
            raise HostError("client_closed", "this client has been closed")
        try:
            return await open_connection(self.endpoint, CONNECT_TIMEOUT)
        except Failure as e:
            if self._start is None or not e.refused:
                raise self._translate(e) from e
        await self._start()
        try:
            return await open_connection(self.endpoint, CONNECT_TIMEOUT)
        except Failure as e:
            raise self._translate(e) from e

    def _translate(self, failure: Failure) -> HostError:
        if failure.sent:
            return HostError("connection_lost", f"the connection to {self.endpoint} broke: {failure.reason}", self._hint)
        return HostError("daemon_unreachable", f"cannot connect to {self.endpoint}: {failure.reason}", self._hint)

    def close(self) -> None:
        """Closes what is idle; what is in use is closed when it is given back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
