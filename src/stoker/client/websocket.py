"""The client's half of RFC 6455: a codec without input or output, and one connection that uses it.

Our own few lines because of cost: wsproto masks 200 MB/s in Python and takes 15 ms to import. A client masks so that a page
in a browser cannot forge bytes a proxy takes for HTTP. On a Unix socket there is neither, so there the key is zero and
masking costs nothing; over TCP it is random, as the RFC wants it.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from stoker.errors import DeadlineExceeded, HostError, InternalError, StokerError

__all__ = ["Closed", "Codec", "Frame", "WebSocket", "encode"]

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
READ = 256 << 10


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole message, or one control frame. ``data`` is the payload, of a TEXT message UTF-8 not yet checked."""

    opcode: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """How the other side ended it: its code (1006 when it said nothing) and reason."""

    code: int
    reason: str = ""


def _mask(data: bytes | bytearray | memoryview, key: bytes) -> bytes:
    size = len(data)
    repeated = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(repeated, "little")).to_bytes(size, "little")


def encode(
    opcode: int, data: bytes | bytearray | memoryview, key: bytes | None = None
) -> tuple[bytes, bytes | bytearray | memoryview]:
    """Header and payload of a client's frame with FIN set. ``key``: None for zero (no masking), else 4 bytes."""
    size = len(data)
    if size < 126:
        header = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    elif size < 65536:
        header = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        header = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    return (header + b"\0\0\0\0", data) if key is None else (header + key, _mask(data, key))


@dataclass(slots=True)
class Codec:
    """Bytes from a server in, frames out. What breaks the protocol is an :class:`InternalError` (``bad_websocket``)."""

    limit: int = 16 << 20
    """The largest message taken."""
    _buffer: bytearray = field(default_factory=bytearray)
    _parts: list[bytes] = field(default_factory=list)
    _opcode: int = 0
    _size: int = 0

    def feed(self, data: bytes) -> list[Frame]:
        self._buffer += data
        frames: list[Frame] = []
        position = 0
        view = memoryview(self._buffer)
        try:
            while (found := self._next(view, position)) is not None:
                first, start, position = found
                frame = self._take(first & 0x80 != 0, first & 0x0F, bytes(view[start:position]))
                if frame is not None:
                    frames.append(frame)
        finally:
            view.release()
        del self._buffer[:position]
        return frames

    def _next(self, view: memoryview, at: int) -> tuple[int, int, int] | None:
        """First byte, start and end of the payload of the frame at ``at``; None when it is not all there."""
        have = len(view) - at
        if have < 2:
            return None
        first, second = view[at], view[at + 1]
        if first & 0x70 or second & 0x80:
            raise InternalError("bad_websocket", "the server sent a frame with reserved or mask bits set")
        size, start = second, at + 2
        if size == 126:
            if have < 4:
                return None
            size, start = struct.unpack_from("!H", view, start)[0], at + 4
        elif size == 127:
            if have < 10:
                return None
            size, start = struct.unpack_from("!Q", view, start)[0], at + 10
        if first & 0x08 and size > 125:
            raise InternalError("bad_websocket", "the server sent a control frame of more than 125 bytes")
        if size > self.limit:
            raise InternalError("bad_websocket", f"the server sent a frame of {size} bytes, more than the {self.limit} taken")
        return (first, start, start + size) if len(view) - start >= size else None

    def _take(self, final: bool, opcode: int, data: bytes) -> Frame | None:
        if opcode & 0x08:
            if opcode not in (CLOSE, PING, PONG) or not final:
                raise InternalError("bad_websocket", f"the server sent a wrong control frame ({opcode})")
            return Frame(opcode, data)
        if (opcode == CONTINUATION) != bool(self._opcode) or opcode not in (CONTINUATION, TEXT, BINARY):
            raise InternalError("bad_websocket", f"the server sent a frame out of order ({opcode})")
        self._size += len(data)
        if self._size > self.limit:
            raise InternalError("bad_websocket", f"the server sent a message of more than {self.limit} bytes")
        self._parts.append(data)
        self._opcode = self._opcode or opcode
        if not final:
            return None
        frame = Frame(self._opcode, b"".join(self._parts) if len(self._parts) > 1 else data)
        self._parts.clear()
        self._opcode = self._size = 0
        return frame


class WebSocket:
    """An open WebSocket. One task may receive while others send. ``receive`` gives str, bytes, or :class:`Closed` at the end.

    A server that is silent for ``silence`` seconds is asked with a ping; one that does not answer that is gone: a network that
    swallowed the connection must not hang a client for ever.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, mask: bool, early: bytes = b"", silence: float = 60.0
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._masked = mask
        self._codec = Codec()
        self._frames: deque[Frame] = deque()
        self._early = early
        self._silence = silence
        self._sending = asyncio.Lock()
        self.closed: Closed | None = None

    async def send(self, data: str | bytes | bytearray | memoryview) -> None:
        """Sends one message, text or binary, and waits while the connection is full."""
        if isinstance(data, str):
            await self._send(TEXT, data.encode())
        else:
            await self._send(BINARY, data)

    async def _send(self, opcode: int, data: bytes | bytearray | memoryview) -> None:
        header, payload = encode(opcode, data, os.urandom(4) if self._masked else None)
        async with self._sending:
            if self._writer.is_closing() or (self.closed is not None and opcode != CLOSE):
                raise HostError("connection_closed", "the daemon has closed the connection")
            try:
                if len(payload) < 4096:
                    self._writer.write(header + payload)
                else:
                    self._writer.writelines((header, payload))
                await self._writer.drain()
            except OSError as e:
                raise HostError("connection_lost", f"the connection to the daemon broke: {e.strerror or e}") from e

    async def receive(self) -> str | bytes | Closed:
        """The next message. After :class:`Closed` it gives the same again."""
        while self.closed is None:
            while self._frames:
                frame = self._frames.popleft()
                if frame.opcode == BINARY:
                    return frame.data
                if frame.opcode == TEXT:
                    return frame.data.decode("utf-8", "replace")
                await self._control(frame)
                if self.closed is not None:
                    return self.closed
            data, self._early = (self._early or await self._read()), b""
            if data:
                self._frames.extend(self._codec.feed(data))
            else:
                self.closed = Closed(1006, "the connection ended")
        return self.closed

    async def _read(self) -> bytes:
        asked = False
        while True:
            try:
                async with asyncio.timeout(self._silence):
                    return await self._reader.read(READ)
            except TimeoutError:
                if asked:
                    self.abort()
                    raise DeadlineExceeded(
                        "daemon_silent", f"the daemon has not answered a ping for {self._silence:.0f} s", "stoker daemon status"
                    ) from None
                asked = True
                await self._send(PING, b"")
            except OSError as e:
                raise HostError("connection_lost", f"the connection to the daemon broke: {e.strerror or e}") from e

    async def _control(self, frame: Frame) -> None:
        if frame.opcode == PING:
            await self._send(PONG, frame.data)
        elif frame.opcode == CLOSE:
            code = struct.unpack_from("!H", frame.data)[0] if len(frame.data) >= 2 else 1005
            self.closed = Closed(code, frame.data[2:].decode("utf-8", "replace"))
            try:
                await self._send(CLOSE, frame.data[:2])
            except StokerError:
                pass  # it said what it had to say; that it does not hear our echo changes nothing

    def __aiter__(self) -> AsyncIterator[str | bytes]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[str | bytes]:
        while not isinstance(message := await self.receive(), Closed):
            yield message

    async def close(self, code: int = 1000, reason: str = "", *, wait: float = 1.0) -> None:
        """Says goodbye, waits a moment for the answer and closes. May be called again."""
        if not self._writer.is_closing():
            try:
                async with asyncio.timeout(wait):
                    if self.closed is None:
                        await self._send(CLOSE, struct.pack("!H", code) + reason.encode()[:120])
                        while not isinstance(await self.receive(), Closed):
                            pass
            except (StokerError, TimeoutError, OSError):
                pass  # the other side is gone or busy: closing is all that is left
            finally:
                self.abort()
        self.closed = self.closed or Closed(code, reason)

    def abort(self) -> None:
        """Drops the connection at once, without a word."""
        self._writer.transport.abort()
        self.closed = self.closed or Closed(1006, "closed by this side")
