"""Answers that go on: server-sent events as models, and raw bytes, behind one iterator that can be closed."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from stoker.client.api import Api, error_of
from stoker.client.transport import Stream
from stoker.errors import InternalError, StokerError

__all__ = ["AsyncFeed", "Message", "Parser", "bytes_feed", "events_feed"]

T = TypeVar("T")
IDLE = 60.0
"""Seconds without a byte after which a stream of events is dead: the daemon sends a comment every 15."""
LINE_LIMIT = 8 << 20


@dataclass(frozen=True, slots=True)
class Message:
    """One server-sent event."""

    event: str
    data: str
    id: str = ""


class Parser:
    """Server-sent events without input or output: bytes in, messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._data: list[str] = []
        self._event = ""
        self._id = ""

    def feed(self, data: bytes) -> list[Message]:
        self._buffer += data
        if b"\n" not in data:
            if len(self._buffer) > LINE_LIMIT:
                raise InternalError("bad_answer", f"the daemon sent an event of more than {LINE_LIMIT} bytes")
            return []
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        return [
            message for line in lines if (message := self._line(line.removesuffix(b"\r").decode("utf-8", "replace"))) is not None
        ]

    def _line(self, line: str) -> Message | None:
        if not line:
            message = Message(self._event or "message", "\n".join(self._data), self._id) if self._data else None
            self._data, self._event = [], ""
            return message
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id":
            self._id = value
        return None


class AsyncFeed(Generic[T]):
    """Something that goes on coming: iterate over it, and close it (or use it with ``async with``) to stop early."""

    def __init__(self, source: AsyncIterable[T], close: Callable[[], Awaitable[object]]) -> None:
        self._source = source.__aiter__()
        self._close = close
        self._open = True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'open' if self._open else 'closed'}>"

    async def __aenter__(self) -> AsyncFeed[T]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[T]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[T]:
        try:
            async for item in self._source:
                yield item
        except StokerError:
            await self.close()
            raise
        await self.close()

    async def close(self) -> None:
        """Lets go of the connection. May be called again."""
        if self._open:
            self._open = False
            await self._close()


async def _entered(opening: AbstractAsyncContextManager[Stream]) -> tuple[Stream, Callable[[], Awaitable[object]]]:
    stream = await opening.__aenter__()

    async def close() -> None:
        # As if the reader had stopped with an error: what was not read must not stay in a kept connection.
        try:
            await opening.__aexit__(GeneratorExit, GeneratorExit(), None)
        except GeneratorExit:
            pass

    return stream, close


async def bytes_feed(opening: AbstractAsyncContextManager[Stream]) -> tuple[AsyncFeed[bytes], dict[str, str]]:
    """A body as it comes, and the headers of its answer."""
    stream, close = await _entered(opening)
    return AsyncFeed(stream, close), stream.headers


async def events_feed(
    api: Api, target: str, decode: Callable[[bytes], T], *, query: dict[str, object] | None = None, last_id: str = ""
) -> AsyncFeed[T]:
    """Server-sent events as models. It is open, and misses nothing from then on, when this returns."""
    headers = [("Accept", "text/event-stream"), *([("Last-Event-ID", last_id)] if last_id else [])]
    stream, close = await _entered(api.stream("GET", target, query=query, headers=headers, idle=IDLE))

    async def models() -> AsyncIterator[T]:
        parser = Parser()
        async for piece in stream:
            for message in parser.feed(piece):
                if message.event == "error":
                    raise error_of(500, message.data.encode())
                yield decode(message.data.encode())

    return AsyncFeed(models(), close)
