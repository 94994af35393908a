"""One HTTP/1.1 connection: h11 over an asyncio stream. It opens, exchanges one request after the other, and becomes a WebSocket.

What fails below HTTP comes out as a :class:`Failure` that says how far the request got, because only the pool above knows
whether it may be sent again.
"""

from __future__ import annotations

import asyncio
import base64
import os
import select
from collections.abc import AsyncIterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h11

from stoker.errors import DeadlineExceeded, InternalError, TooLarge

if TYPE_CHECKING:
    from stoker.client.endpoint import Endpoint
    from stoker.client.websocket import WebSocket

__all__ = ["Body", "Connection", "Failure", "Head", "Headers", "open_connection"]

Headers = Sequence[tuple[str, str]]
Body = bytes | AsyncIterable[bytes]

READ = 256 << 10
HEAD_LIMIT = 64 << 10
BUFFER = 1 << 20
STALL = 60.0
"""Seconds an upload may stand still before it is given up."""


class Failure(Exception):
    """The connection could not be made or broke. ``sent``: the server may have acted on the request."""

    def __init__(self, reason: str, *, sent: bool, refused: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sent = sent
        self.refused = refused
        """Nobody listens there at all."""


@dataclass(frozen=True, slots=True)
class Head:
    """An answer's status and headers; the names are lower case."""

    status: int
    headers: dict[str, str]


def _headers(event: h11.Response) -> dict[str, str]:
    return {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}


async def open_connection(endpoint: Endpoint, timeout: float) -> Connection:
    """Connects, and does the TLS handshake where there is one."""
    try:
        async with asyncio.timeout(timeout):
            if endpoint.socket is not None:
                reader, writer = await asyncio.open_unix_connection(str(endpoint.socket), limit=BUFFER)
            elif endpoint.tls:
                import ssl

                context = ssl.create_default_context()
                reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context, limit=BUFFER)
            else:
                reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, limit=BUFFER)
    except TimeoutError:
        raise DeadlineExceeded("connect_timeout", f"{endpoint} did not answer within {timeout:g} s") from None
    except OSError as e:
        refused = isinstance(e, ConnectionRefusedError | FileNotFoundError)
        # getaddrinfo and TLS put their words elsewhere than a plain errno does.
        raise Failure(e.strerror or str(e), sent=False, refused=refused) from e
    return Connection(endpoint, reader, writer)


class Connection:
    """Made by :func:`open_connection`. One request at a time; ``close`` is synchronous and may be called again."""

    def __init__(self, endpoint: Endpoint, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._endpoint = endpoint
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_LIMIT)
        self._upload: asyncio.Task[None] | None = None
        self._ended = False
        self.used = 0
        self.idle_since = 0.0

    def usable(self) -> bool:
        """Whether an idle connection still seems open. A server that went away is seen here, before anything is sent.

        The kernel is asked as well: the event loop may not have had the time to notice.
        """
        if self._writer.is_closing() or self._reader.at_eof() or self._reader.exception():
            return False
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket").fileno(), select.POLLIN | select.POLLHUP)
        return not poll.poll(0)

    async def exchange(self, method: str, target: str, headers: Headers, body: Body | None) -> Head:
        """Sends a request and gives the head of its answer. A streamed body goes on being sent while the answer is awaited."""
        self.used += 1
        fixed = body if isinstance(body, bytes) else None
        head = [("Host", self._endpoint.authority), *headers]
        if fixed is not None:
            head.append(("Content-Length", str(len(fixed))))
        elif body is not None:
            head.append(("Transfer-Encoding", "chunked"))
        try:
            data = self._http.send(h11.Request(method=method, target=self._endpoint.prefix + target, headers=head)) or b""
        except h11.LocalProtocolError as e:
            raise InternalError("bad_request_head", f"{method} {target} cannot be sent: {e}") from e
        try:
            if body is None or isinstance(body, bytes):
                data += self._http.send(h11.Data(data=fixed)) or b"" if fixed else b""
                self._writer.write(data + (self._http.send(h11.EndOfMessage()) or b""))
                await self._writer.drain()
            else:
                self._writer.write(data)
                self._upload = asyncio.create_task(self._send_stream(body))
        except OSError as e:
            raise Failure(e.strerror or str(e), sent=True) from e
        return await self._head()

    async def _send_stream(self, body: AsyncIterable[bytes]) -> None:
        async for chunk in body:
            if chunk:
                pieces = self._http.send_with_data_passthrough(h11.Data(data=chunk)) or []
                self._writer.writelines(pieces)
                await self._drained()
        self._writer.write(self._http.send(h11.EndOfMessage()) or b"")
        await self._drained()

    async def _drained(self) -> None:
        try:
            async with asyncio.timeout(STALL):
                await self._writer.drain()
        except TimeoutError:
            raise DeadlineExceeded("upload_stalled", f"the daemon has taken nothing of the upload for {STALL:g} s") from None

    def _event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as e:
            if self._ended:
                raise Failure("the connection ended in the middle of an answer", sent=True) from e
            raise InternalError("bad_answer", f"{self._endpoint} does not answer as HTTP: {e}") from e

    async def _receive(self) -> None:
        """Gets more bytes for h11, minding an upload that fails meanwhile."""
        try:
            data = await (
                self._reader.read(READ) if self._upload is None or self._upload.done() else self._read_beside(self._upload)
            )
        except OSError as e:
            raise Failure(e.strerror or str(e), sent=True) from e
        if not data:
            self._ended = True
            if self._http.their_state is h11.SEND_RESPONSE and not self._http.trailing_data[0]:
                raise Failure("the daemon closed the connection without an answer", sent=True)
        self._http.receive_data(data)

    async def _read_beside(self, upload: asyncio.Task[None]) -> bytes:
        reading = asyncio.ensure_future(self._reader.read(READ))
        try:
            await asyncio.wait((reading, upload), return_when=asyncio.FIRST_COMPLETED)
            # A source of ours that fails ends the request. A pipe that breaks may have an answer waiting (413, say).
            if upload.done() and not isinstance(upload.exception(), OSError | None):
                upload.result()
            return await reading
        finally:
            reading.cancel()

    async def _head(self) -> Head:
        while True:
            event = self._event()
            if isinstance(event, h11.Response):
                return Head(event.status_code, _headers(event))
            if event is h11.NEED_DATA:
                await self._receive()

    async def chunk(self) -> bytes:
        """The next piece of the answer's body; empty at its end."""
        while True:
            event = self._event()
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                return b""
            await self._receive()

    async def read(self, limit: int) -> bytes:
        """The whole body, at most ``limit`` bytes of it."""
        parts: list[bytes] = []
        size = 0
        while piece := await self.chunk():
            size += len(piece)
            if size > limit:
                raise TooLarge("answer_too_large", f"the answer has more than {limit} bytes")
            parts.append(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def recycle(self) -> bool:
        """Readies the connection for another request. False: it must be closed."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        self._upload = None
        self.idle_since = asyncio.get_running_loop().time()
        return self.usable()

    async def upgrade(self, target: str, headers: Headers) -> WebSocket | Head:
        """Asks for a WebSocket; gives the answer's head when the server says something else than 101."""
        import hashlib

        from stoker.client.websocket import WebSocket

        key = base64.b64encode(os.urandom(16)).decode()
        extra = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", key)]
        head = [("Host", self._endpoint.authority), *headers, *extra]
        data = self._http.send(h11.Request(method="GET", target=self._endpoint.prefix + target, headers=head)) or b""
        try:
            self._writer.write(data + (self._http.send(h11.EndOfMessage()) or b""))
            await self._writer.drain()
        except OSError as e:
            raise Failure(e.strerror or str(e), sent=True) from e
        while True:
            event = self._event()
            if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                break
            if isinstance(event, h11.Response):
                return Head(event.status_code, _headers(event))
            if event is h11.NEED_DATA:
                await self._receive()
        accept = base64.b64encode(hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest())
        if dict(event.headers).get(b"sec-websocket-accept") != accept:
            raise InternalError("bad_answer", f"{self._endpoint} does not speak WebSocket")
        return WebSocket(self._reader, self._writer, mask=self._endpoint.socket is None, early=self._http.trailing_data[0])

    def close(self) -> None:
        """Drops the connection at once."""
        if self._upload is not None and not self._upload.cancel() and not self._upload.cancelled():
            self._upload.exception()  # seen, so that asyncio does not complain about it
        with suppress(RuntimeError):  # the loop may be closed already when a pool is dropped late
            self._writer.transport.abort()
