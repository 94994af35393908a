"""The byte streams of a guest process as the host sees them: offsets, acknowledgements, windows.

Both classes outlive the connection they were made on. An :class:`OutputStream` knows the offset it has received everything before,
a :class:`Stdin` keeps what the process has not taken; after a resynchronisation they go on from there on the next connection, and
no byte is lost or seen twice. Memory is bounded by the window (plus one frame) for output and by 256 KiB for input.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Final, Protocol

from stoker.errors import Conflict, StokerError
from stoker.guest.frames import DATA, EOF, MAX_PAYLOAD, protocol_error
from stoker.guest.messages import STDIN_WINDOW

__all__ = ["Link", "OutputStream", "Stdin", "gone", "sleep_in", "wake"]

SMALL: Final = 4096
MAX_GAPS: Final = 4096


class Link(Protocol):
    """The connection as streams use it."""

    def send(self, type: int, channel: int, offset: int = 0, payload: bytes | memoryview = b"") -> None: ...

    async def drain(self) -> None: ...

    def send_ack(self, channel: int, offset: int) -> None: ...


def wake(waiters: deque[asyncio.Future[None]]) -> None:
    while waiters:
        future = waiters.popleft()
        if not future.done():
            future.set_result(None)


async def sleep_in(waiters: deque[asyncio.Future[None]]) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiters.append(future)
    try:
        await future
    finally:
        if future in waiters:
            waiters.remove(future)


class OutputStream:
    """Bytes out of the guest: ``async for data in stream``, ``await stream.read(n)``.

    ``offset`` is the position of the next byte the consumer gets, ``lost`` how many bytes a ring in ``discard`` mode dropped before
    they could be sent. Taking bytes is what acknowledges them (coalesced), so a consumer that waits makes the guest wait.
    """

    def __init__(self, number: int, link: Link, *, window: int, start: int | None = 0, strict: bool = True) -> None:
        self.number = number
        self.window = window
        self.strict = strict
        self.lost = 0
        self.final: int | None = None
        self.error: StokerError | None = None
        self._link: Link | None = link
        self._chunks: deque[tuple[int, bytes | bytearray]] = deque()
        self._buffered = 0
        self._carried = 0
        self._gaps = 0
        self._sink: bytearray | None = None
        self._sink_limit: int | None = None
        self._known = start is not None
        self.offset = self.received = self._acked = start or 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        data = await self.read()
        if not data:
            raise StopAsyncIteration
        return data

    @property
    def buffered(self) -> int:
        """Bytes received and not consumed."""
        return self._buffered

    @property
    def at_eof(self) -> bool:
        """Everything there will ever be has been consumed."""
        return self.final is not None and not self._chunks

    async def read(self, limit: int = -1) -> bytes:
        """The next bytes, at most ``limit``, as soon as there are some; ``b""`` at the end."""
        return (await self.read_at(limit))[1]

    async def read_at(self, limit: int = -1) -> tuple[int, bytes]:
        """Like :meth:`read`, with the offset of the first byte: after a gap it is not where the last read ended."""
        while not self._chunks:
            if self.final is not None:
                return self.final, b""
            if self.error is not None:
                raise gone(self.error)
            await sleep_in(self._waiters)
        return self._take(limit)

    async def read_all(self, limit: int | None = None) -> bytes:
        """Everything to the end; with ``limit`` the first so many bytes, while the rest is read and dropped."""
        kept = self.collect(limit)
        while self.final is None:
            if self.error is not None:
                raise gone(self.error)
            await sleep_in(self._waiters)
        return bytes(kept)

    def collect(self, limit: int | None = None) -> bytearray:
        """From now on everything goes (up to ``limit`` bytes, the rest is dropped) into the buffer that is returned.

        No task has to wait and take: for short commands. The stream cannot be read otherwise afterwards.
        """
        sink = self._sink = bytearray()
        self._sink_limit = limit
        while self._chunks:
            self._pour(self._take(-1)[1])
        return sink

    def _pour(self, data: bytes) -> None:
        sink, limit = self._sink, self._sink_limit
        assert sink is not None
        if limit is None:
            sink += data
        elif len(sink) < limit:
            sink += data[: limit - len(sink)]

    @property
    def resume_at(self) -> int | None:
        """What to ask for on the next connection: the first byte not received, or None for the oldest there is."""
        return self.received if self._known else None

    def _take(self, limit: int) -> tuple[int, bytes]:
        at, data = self._chunks[0]
        if 0 <= limit < len(data):
            self._chunks[0] = (at + limit, data[limit:])
            data = data[:limit]
        else:
            self._chunks.popleft()
        if at != self.offset:
            self._gaps -= 1
        self._buffered -= len(data)
        self.offset = at + len(data)
        self.acknowledge()
        return at, data if isinstance(data, bytes) else bytes(data)

    def acknowledge(self, force: bool = False) -> None:
        """Tells the guest what has been consumed, once it is worth a frame."""
        behind = self.offset - self._acked
        if self._link is not None and self.final is None and behind and (force or behind >= self.window >> 2):
            self._acked = self.offset
            self._link.send_ack(self.number, self.offset)

    def on_data(self, offset: int, data: bytes) -> None:
        """A DATA frame."""
        if not data:
            return
        if self.final is not None:
            raise protocol_error(f"data behind the end of stream {self.number}")
        if not self._known:
            self._known = True
            self.offset = self.received = self._acked = offset
        if offset != self.received:
            self._on_gap(offset)
        size = len(data)
        if self._sink is not None:
            self._pour(data)
            self._gaps = 0
            self.offset = self.received = offset + size
            self.acknowledge()
            return
        self._buffered += size
        if self._buffered > self.window + self._carried + MAX_PAYLOAD:
            raise protocol_error(f"stream {self.number} sent more than its window of {self.window} bytes")
        self.received = offset + size
        # A guest may send byte by byte: an object for each would take far more memory than the window says.
        if self._chunks and size < SMALL:
            at, last = self._chunks[-1]
            if at + len(last) == offset and len(last) < MAX_PAYLOAD:
                if isinstance(last, bytearray):
                    last += data
                else:
                    self._chunks[-1] = (at, bytearray(last) + data)
                return
        self._chunks.append((offset, data))
        if self._waiters:
            wake(self._waiters)

    def _on_gap(self, offset: int) -> None:
        if offset < self.received:
            raise protocol_error(f"stream {self.number} went back from {self.received} to {offset}")
        if self.strict:
            raise protocol_error(f"stream {self.number} lost {offset - self.received} bytes at {self.received}")
        self._gaps += 1
        if self._gaps > MAX_GAPS:
            raise protocol_error(f"stream {self.number} has more than {MAX_GAPS} gaps")
        self.lost += offset - self.received

    def on_eof(self, offset: int) -> None:
        """An EOF frame."""
        if self.final is not None:
            if offset != self.final:
                raise protocol_error(f"stream {self.number} ended at {self.final} and again at {offset}")
            return
        if not self._known:
            self._known = True
            self.offset = self.received = offset
        if offset != self.received:
            self._on_gap(offset)
            self._gaps -= 1
        self.received = self.final = offset
        wake(self._waiters)

    def begin(self, oldest: int, head: int) -> None:
        """The guest sends from here: what was asked for (None: the oldest), as far as it holds that."""
        start = min(max(self.offset, oldest), head) if self._known else oldest
        self._known = True
        self.offset = self.received = self._acked = start

    def on_lost(self, error: StokerError | None) -> None:
        """The connection is gone. With an error, readers get it once the buffer is empty; without, they wait for the next one."""
        self._link = None
        self.error = error
        if error is not None:
            wake(self._waiters)

    def on_link(self, link: Link) -> None:
        """Goes on over a new connection, which was asked for everything from ``received``."""
        self._link = link
        self.error = None
        # The agent may count what it sends from the offset it was asked for: what lies here already comes on top, once.
        self._carried = min(self._buffered, self.window)
        self._acked = 0
        self.acknowledge(force=True)


class Stdin:
    """Bytes into the guest: ``await write(data)`` waits for room, ``close()`` is the end of file.

    At most 256 KiB are on their way; they are kept until the process's pipe took them, and sent again after a resynchronisation.
    """

    def __init__(self, number: int, link: Link, *, start: int = 0, closed: bool = False) -> None:
        self.number = number
        self.closed = closed
        self.refused = False
        """The process closed its stdin (or ended): nobody reads what is written."""
        self.error: StokerError | None = None
        self._link: Link | None = link
        self._sent = self._acked = start
        self._kept: deque[tuple[int, memoryview]] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._turn = asyncio.Lock()

    @property
    def sent(self) -> int:
        """The offset of the next byte to be written."""
        return self._sent

    @property
    def unacknowledged(self) -> int:
        """How many bytes the process has not taken yet."""
        return self._sent - self._acked

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends all of ``data``; returns when the last of it is on its way. Raises ``Conflict("stdin_closed")`` if nobody reads."""
        rest = memoryview(data if isinstance(data, bytes) else bytes(data))
        async with self._turn:
            while rest:
                room = await self._room(min(len(rest), MAX_PAYLOAD >> 1))
                part, rest = rest[:room], rest[room:]
                self._send(part)
                if self._link is not None:
                    await self._link.drain()

    def write_now(self, data: bytes) -> None:
        """For what certainly fits into the window (the first 256 KiB): sends without waiting."""
        if len(data) > STDIN_WINDOW - self.unacknowledged:
            raise ValueError("more than the window has room for")
        rest = memoryview(data)
        while rest:
            part, rest = rest[:MAX_PAYLOAD], rest[MAX_PAYLOAD:]
            self._send(part)

    def close(self) -> None:
        """The end of file, behind everything written. Again is no error."""
        if self.closed:
            return
        self.closed = True
        if self._link is not None and not self.refused:
            self._link.send(EOF, self.number, self._sent)
        wake(self._waiters)

    async def drain(self) -> None:
        """Waits until the process's pipe took everything (or nobody reads it any more)."""
        while self._sent > self._acked and not self.refused:
            if self.error is not None:
                raise gone(self.error)
            await sleep_in(self._waiters)

    async def _room(self, wanted: int) -> int:
        while True:
            if self.refused or self.closed:
                raise Conflict(
                    "stdin_closed", "the process does not read its standard input any more" if self.refused else "stdin was closed"
                )
            if self.error is not None:
                raise gone(self.error)
            room = STDIN_WINDOW - self.unacknowledged
            if room >= wanted and self._link is not None:
                return min(room, MAX_PAYLOAD)
            await sleep_in(self._waiters)

    def _send(self, part: memoryview) -> None:
        at = self._sent
        self._kept.append((at, part))
        self._sent = at + len(part)
        if self._link is not None:
            self._link.send(DATA, self.number, at, part)

    def on_ack(self, offset: int) -> None:
        """An ACK frame."""
        if offset > self._sent:
            raise protocol_error(f"stream {self.number} acknowledges {offset} bytes of {self._sent}")
        if offset <= self._acked:
            return
        self._acked = offset
        while self._kept and self._kept[0][0] + len(self._kept[0][1]) <= offset:
            self._kept.popleft()
        wake(self._waiters)

    def on_refused(self) -> None:
        """The process reads no more."""
        self.refused = True
        self._kept.clear()
        self._acked = self._sent
        wake(self._waiters)

    def on_lost(self, error: StokerError | None) -> None:
        """The connection is gone; see :meth:`OutputStream.on_lost`."""
        self._link = None
        self.error = error
        if error is not None:
            wake(self._waiters)

    def on_link(self, link: Link, wanted: int) -> None:
        """Goes on over a new connection: the agent has everything before ``wanted``."""
        if not self._acked <= wanted <= self._sent:
            raise protocol_error(f"stream {self.number} wants offset {wanted}, not in {self._acked} to {self._sent}")
        self._link = link
        self.error = None
        if not self.refused:
            if wanted > self._acked:
                # The acknowledgement of what the process took may be lost: to one byte it has seen, the agent says it again.
                at, part = self._kept[0]
                link.send(DATA, self.number, self._acked, part[self._acked - at : self._acked - at + 1])
            for at, part in self._kept:
                if at + len(part) > wanted:
                    skip = max(0, wanted - at)
                    link.send(DATA, self.number, at + skip, part[skip:])
            if self.closed:
                link.send(EOF, self.number, self._sent)
        wake(self._waiters)


def gone(reason: StokerError) -> StokerError:
    """A fresh exception for everyone who waits: one object raised in several tasks would collect their tracebacks."""
    return type(reason)(reason.code, reason.message, reason.hint, details=reason.details, console=reason.console)
