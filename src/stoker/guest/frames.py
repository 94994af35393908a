"""Frames and preambles of the agent protocol (docs/agent-protocol.md): pure, no I/O.

A frame is a 24-byte header, a payload of at most 64 KiB and a 4-byte trailer. :class:`FrameParser` owns one buffer of fixed size,
which the socket is read into directly; whatever the peer sends, nothing is ever allocated beyond that buffer and the payloads of
the frames found in it. Damage is a ``GuestError("protocol_error")``, nothing else, and a damaged parser stays damaged: the
connection is closed and a new one synchronised.
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple
from zlib import crc32

from stoker.errors import GuestError

__all__ = [
    "ACK",
    "CALL",
    "DATA",
    "EOF",
    "EVENT",
    "HELLO",
    "MAX_FRAME",
    "MAX_PAYLOAD",
    "PING",
    "PONG",
    "PREAMBLE_SIZE",
    "REPLY",
    "WELCOME",
    "ZEROS",
    "Frame",
    "FrameParser",
    "encode",
    "encode_parts",
    "find_preamble",
    "preamble",
    "protocol_error",
]

HELLO: Final = 0x01
WELCOME: Final = 0x02
CALL: Final = 0x10
REPLY: Final = 0x11
EVENT: Final = 0x12
DATA: Final = 0x20
ACK: Final = 0x21
EOF: Final = 0x22
PING: Final = 0x30
PONG: Final = 0x31

MAX_PAYLOAD: Final = 65536
HEADER_SIZE: Final = 24
TRAILER_SIZE: Final = 4
OVERHEAD: Final = HEADER_SIZE + TRAILER_SIZE
MAX_FRAME: Final = MAX_PAYLOAD + OVERHEAD
# More than one largest frame: whatever the agent was in the middle of, it has given up on it when these have gone by.
ZEROS: Final = 66048
BUFFER: Final = 4 * MAX_FRAME

SYNC: Final = b"\xf5STOKER-SYNC\r\n\x1a\n"
NONCE_SIZE: Final = 16
PREAMBLE_SIZE: Final = 36
MAGIC: Final = 0x4B53  # "SK", little-endian

_HEADER = struct.Struct("<HBBIQII")
_UNSUMMED = struct.Struct("<HBBIQI")
_WORD = struct.Struct("<I")


class Frame(NamedTuple):
    """One frame. ``offset`` is the position of the payload's first byte in its stream, else 0."""

    type: int
    channel: int
    offset: int
    payload: bytes


def protocol_error(what: str) -> GuestError:
    """What the peer sent cannot be: the connection is over."""
    return GuestError("protocol_error", f"the guest's agent broke the protocol: {what}")


def preamble(nonce: bytes | None = None) -> bytes:
    """A preamble: 16 fixed bytes, the nonce (16 new random bytes by default) and their CRC."""
    head = SYNC + (os.urandom(NONCE_SIZE) if nonce is None else nonce)
    if len(head) != PREAMBLE_SIZE - 4:
        raise ValueError("a nonce has 16 bytes")
    return head + _WORD.pack(crc32(head))


def find_preamble(data: bytes | bytearray, start: int = 0, end: int | None = None) -> int:
    """The position of the first preamble with a good CRC in ``data[start:end]``, or -1."""
    stop = len(data) if end is None else end
    at = data.find(SYNC, start, stop)
    while at >= 0:
        if at + PREAMBLE_SIZE > stop:
            return -1
        if crc32(data[at : at + PREAMBLE_SIZE - 4]) == _WORD.unpack_from(data, at + PREAMBLE_SIZE - 4)[0]:
            return at
        at = data.find(SYNC, at + 1, stop)
    return -1


def encode_parts(type: int, channel: int, offset: int, length: int) -> tuple[bytes, bytes]:
    """Header and trailer for a payload of ``length`` bytes, which the caller sends between them without copying it."""
    if length > MAX_PAYLOAD:
        raise ValueError(f"a payload has at most {MAX_PAYLOAD} bytes, not {length}")
    head = _UNSUMMED.pack(MAGIC, type, 0, channel, offset, length)
    crc = crc32(head)
    return head + _WORD.pack(crc), _WORD.pack((crc ^ 0xA5A5A5A5) | 1)


def encode(type: int, channel: int, offset: int = 0, payload: bytes = b"") -> bytes:
    """A whole frame."""
    header, trailer = encode_parts(type, channel, offset, len(payload))
    return header + payload + trailer


class FrameParser:
    """Bytes in, frames out.

    With ``expect`` (a whole preamble) every byte before its first occurrence is dropped. Bytes come in by :meth:`writable` and
    :meth:`advance` (read into the buffer), or by :meth:`feed` (copied into it).

    The whole frames in front of a damaged one are handed out still, and ``failure`` says what is wrong behind them.
    """

    __slots__ = ("_buffer", "_end", "_expect", "_start", "_view", "failure", "synchronised")

    def __init__(self, expect: bytes | None = None) -> None:
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._expect = expect
        self.failure: GuestError | None = None
        self.synchronised = expect is None

    @property
    def buffered(self) -> int:
        """How many bytes wait for the rest of their frame."""
        return self._end - self._start

    def writable(self) -> memoryview:
        """Where the next bytes belong; never empty, as at least one largest frame always fits."""
        start, end = self._start, self._end
        if start == end:
            self._start = self._end = end = 0
        elif BUFFER - end < MAX_FRAME:
            left = end - start
            self._view[:left] = bytes(self._view[start:end])
            self._start, self._end = 0, left
            end = left
        return self._view[end:]

    def advance(self, count: int) -> list[Frame]:
        """``count`` bytes were written: the frames that are complete now. Look at ``failure`` behind the last of them."""
        if self.failure is not None:
            return []
        self._end += count
        if not self.synchronised and not self._hunt():
            return []
        return self._frames()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that ``data`` completes. Raises the failure, if there is one, at once."""
        found: list[Frame] = []
        rest = memoryview(data)
        while rest:
            room = self.writable()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            rest = rest[count:]
            found += self.advance(count)
            if self.failure is not None:
                raise self.failure
        return found

    def _hunt(self) -> bool:
        assert self._expect is not None
        at = self._buffer.find(self._expect, self._start, self._end)
        if at >= 0:
            self._start = at + len(self._expect)
            self.synchronised = True
            return True
        self._start = max(self._start, self._end - len(self._expect) + 1)
        return False

    def _frames(self) -> list[Frame]:
        view, start, end = self._view, self._start, self._end
        found: list[Frame] = []
        while end - start >= HEADER_SIZE:
            magic, type, _flags, channel, offset, length, crc = _HEADER.unpack_from(view, start)
            if magic != MAGIC or crc32(view[start : start + 20]) != crc or length > MAX_PAYLOAD:
                self.failure = self._damaged(magic, length, start)
                break
            body = start + HEADER_SIZE
            after = body + length
            if after + TRAILER_SIZE > end:
                break
            if _WORD.unpack_from(view, after)[0] != ((crc ^ 0xA5A5A5A5) | 1):
                self.failure = protocol_error("a frame was torn")
                break
            found.append(Frame(type, channel, offset, bytes(view[body:after])))
            self._start = start = after + TRAILER_SIZE
        return found

    def _damaged(self, magic: int, length: int, start: int) -> GuestError:
        if magic != MAGIC:
            return protocol_error(f"a frame cannot start with {bytes(self._view[start : start + 2]).hex(' ')}")
        if length > MAX_PAYLOAD:
            return protocol_error(f"a frame of {length} bytes")
        return protocol_error("a frame's header has a wrong checksum")
