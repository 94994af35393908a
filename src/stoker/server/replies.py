"""What goes back: whole answers, streams of bytes, streams of events. Each is an ASGI application."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import anyio
import structlog

from stoker.api.codec import encode
from stoker.errors import InternalError, StokerError, error_to_wire, http_status

__all__ = ["ByteStream", "EventStream", "Reply", "ServerEvent", "error_reply", "json_reply"]

Headers = list[tuple[bytes, bytes]]
Scope = Any
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

KEEPALIVE = 15.0
JSON = b"application/json"
_log = structlog.get_logger("stoker.server")
_date: tuple[int, bytes] = (0, b"")


def _common() -> Headers:
    """``Date``, made once a second, and what keeps browsers from guessing."""
    global _date
    now = int(time.time())
    if _date[0] != now:
        _date = (now, formatdate(now, usegmt=True).encode())
    return [(b"date", _date[1]), (b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


def _merge(extra: Headers) -> Headers:
    names = {name for name, _ in extra}
    return [pair for pair in _common() if pair[0] not in names] + extra


@dataclass(slots=True)
class Reply:
    """A whole answer."""

    status: int = 200
    body: bytes = b""
    content_type: bytes = JSON
    headers: Headers = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _merge(self.headers)
        if self.status not in (204, 304):
            headers.append((b"content-type", self.content_type))
            if not any(name == b"content-length" for name, _ in self.headers):
                headers.append((b"content-length", str(len(self.body)).encode()))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        body = b"" if scope["method"] == "HEAD" else self.body
        await send({"type": "http.response.body", "body": body, "more_body": False})


def json_reply(value: Any, status: int = 200, headers: Headers | None = None) -> Reply:
    return Reply(status, encode(value), headers=headers or [])


def error_reply(error: StokerError, status: int | None = None) -> Reply:
    """The one shape of failure, with what HTTP wants besides."""
    status = http_status(error) if status is None else status
    headers: Headers = []
    if status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="stoker"'))
    elif status == 429:
        headers.append((b"retry-after", b"5"))
    return json_reply(error_to_wire(error), status, headers)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass(slots=True)
class ByteStream:
    """A body that comes in pieces. ``source`` is entered before anything is sent, so what fails there is an answer of its own.

    ``length`` is what ``Content-Length`` promised: a source that gives more is cut, one that gives less breaks the connection, as
    the client must not take a part for the whole.
    """

    source: AbstractAsyncContextManager[AsyncIterator[bytes]]
    content_type: bytes
    status: int = 200
    headers: Headers = field(default_factory=list)
    length: int | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as tasks, self.source as pieces:
            tasks.start_soon(self._watch, receive, tasks.cancel_scope)
            headers = [*_merge(self.headers), (b"content-type", self.content_type)]
            if self.length is not None:
                headers.append((b"content-length", str(self.length).encode()))
            await send({"type": "http.response.start", "status": self.status, "headers": headers})
            await self._copy(pieces, send)
            tasks.cancel_scope.cancel()

    async def _copy(self, pieces: AsyncIterator[bytes], send: Send) -> None:
        left = self.length
        async for piece in pieces:
            data = piece if left is None else piece[:left]
            if left is not None:
                left -= len(data)
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if left == 0:
                break
        if left:
            raise InternalError("short_stream", f"the source ended {left} bytes early")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def _watch(receive: Receive, scope: anyio.CancelScope) -> None:
        await _until_gone(receive)
        scope.cancel()


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One server-sent event. ``data`` is JSON, so it is one line."""

    data: bytes
    name: str = ""
    id: str = ""

    def render(self) -> bytes:
        head = (f"event: {self.name}\n" if self.name else "") + (f"id: {self.id}\n" if self.id else "")
        return b"".join((head.encode(), b"data: ", self.data, b"\n\n"))


@dataclass(slots=True)
class EventStream:
    """Server-sent events until the source ends or the client goes."""

    source: AbstractAsyncContextManager[AsyncIterator[ServerEvent]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lock = anyio.Lock()

        async def say(data: bytes, more: bool = True) -> None:
            async with lock:
                await send({"type": "http.response.body", "body": data, "more_body": more})

        async def keep_alive() -> None:
            while True:
                await anyio.sleep(KEEPALIVE)
                await say(b":\n\n")

        async def watch() -> None:
            await _until_gone(receive)
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks, self.source as events:
            headers = [*_merge([(b"x-accel-buffering", b"no")]), (b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await say(b":\n\n")
            tasks.start_soon(keep_alive)
            tasks.start_soon(watch)
            try:
                async for event in events:
                    await say(event.render())
            except StokerError as e:
                await say(ServerEvent(encode(error_to_wire(e)), "error").render())
            await say(b"", more=False)
            tasks.cancel_scope.cancel()
