"""The agent's protocol in plain Python, for the agent's own tests: no dependency, blocking sockets, written from the
document and independently of the product's client.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
import zlib
from typing import Any

MAGIC = b"\xf5STOKER-SYNC\r\n\x1a\n"
HELLO, WELCOME, CALL, REPLY, EVENT, DATA, ACK, EOF, PING, PONG = 1, 2, 0x10, 0x11, 0x12, 0x20, 0x21, 0x22, 0x30, 0x31
PAYLOAD_MAX = 65536
ZEROS = bytes(66048)


def pack(v: Any) -> bytes:
    """msgpack, the kinds the protocol uses."""
    if v is None:
        return b"\xc0"
    if isinstance(v, bool):
        return b"\xc3" if v else b"\xc2"
    if isinstance(v, int):
        if v < 0:
            return struct.pack("b", v) if v >= -32 else b"\xd3" + struct.pack(">q", v)
        if v < 128:
            return bytes([v])
        for tag, code, top in ((0xCC, "B", 8), (0xCD, ">H", 16), (0xCE, ">I", 32), (0xCF, ">Q", 64)):
            if v < 1 << top:
                return bytes([tag]) + struct.pack(code, v)
    if isinstance(v, str):
        b = v.encode()
        if len(b) < 32:
            return bytes([0xA0 | len(b)]) + b
        return _sized(b, 0xD9) + b
    if isinstance(v, (bytes, bytearray)):
        return _sized(v, 0xC4) + bytes(v)
    if isinstance(v, (list, tuple)):
        head = bytes([0x90 | len(v)]) if len(v) < 16 else b"\xdc" + struct.pack(">H", len(v))
        return head + b"".join(map(pack, v))
    if isinstance(v, dict):
        head = bytes([0x80 | len(v)]) if len(v) < 16 else b"\xde" + struct.pack(">H", len(v))
        return head + b"".join(pack(k) + pack(x) for k, x in v.items())
    raise TypeError(v)


def _sized(b: bytes | bytearray, tag: int) -> bytes:
    for i, (code, top) in enumerate((("B", 8), (">H", 16), (">I", 32))):
        if len(b) < 1 << top:
            return bytes([tag + i]) + struct.pack(code, len(b))
    raise ValueError


def unpack(data: bytes) -> Any:
    value, at = unpack_from(data, 0)
    if at != len(data):
        raise ValueError("bytes behind the value")
    return value


def unpack_from(d: bytes, at: int) -> tuple[Any, int]:
    t = d[at]
    at += 1
    if t < 0x80:
        return t, at
    if t >= 0xE0:
        return t - 256, at
    if t < 0x90:
        return _map(d, at, t & 15)
    if t < 0xA0:
        return _array(d, at, t & 15)
    if t < 0xC0:
        return _raw(d, at, t & 31, True)
    simple = {0xC0: None, 0xC2: False, 0xC3: True}
    if t in simple:
        return simple[t], at
    numbers = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
    if t in numbers:
        n = struct.calcsize(numbers[t])
        return struct.unpack(numbers[t], d[at : at + n])[0], at + n
    sizes = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}
    n = struct.calcsize(sizes[t])
    count = struct.unpack(sizes[t], d[at : at + n])[0]
    at += n
    if t <= 0xC6:
        return _raw(d, at, count, False)
    if t <= 0xDB:
        return _raw(d, at, count, True)
    return _array(d, at, count) if t <= 0xDD else _map(d, at, count)


def _raw(d: bytes, at: int, n: int, text: bool) -> tuple[Any, int]:
    b = d[at : at + n]
    if len(b) != n:
        raise ValueError("short")
    return (b.decode() if text else b), at + n


def _array(d: bytes, at: int, n: int) -> tuple[list[Any], int]:
    out = []
    for _ in range(n):
        v, at = unpack_from(d, at)
        out.append(v)
    return out, at


def _map(d: bytes, at: int, n: int) -> tuple[dict[Any, Any], int]:
    out = {}
    for _ in range(n):
        k, at = unpack_from(d, at)
        out[k], at = unpack_from(d, at)
    return out, at


def frame(kind: int, channel: int = 0, offset: int = 0, payload: bytes = b"") -> bytes:
    head = struct.pack("<2sBBIQI", b"SK", kind, 0, channel, offset, len(payload))
    crc = zlib.crc32(head)
    return head + struct.pack("<I", crc) + payload + struct.pack("<I", (crc ^ 0xA5A5A5A5) | 1)


def preamble(nonce: bytes) -> bytes:
    b = MAGIC + nonce
    return b + struct.pack("<I", zlib.crc32(b))


class Failure(Exception):
    """An error reply."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['code']}: {error['message']}")
        self.code, self.message, self.errno = error["code"], error["message"], error["errno"]


class Stream:
    def __init__(self) -> None:
        self.data = bytearray()
        self.offset: int | None = None  # of the next byte; None: whatever comes first
        self.gaps: list[tuple[int, int]] = []
        self.end: int | None = None
        self.received = 0
        self.keep = True


class Host:
    """One connection. Streams are acknowledged as they come, unless `acknowledge` is False."""

    def __init__(self, sock: socket.socket, *, fresh: bool = False, timeout: float = 20) -> None:
        self.sock, self.timeout = sock, timeout
        self.buffer = bytearray()
        self.at = 0
        self.request = 0
        self.acknowledge = True
        self.replies: dict[int, Any] = {}
        self.events: list[tuple[int, Any]] = []
        self.streams: dict[int, Stream] = {}
        self.acks: dict[int, int] = {}
        self.pongs: list[bytes] = []
        self.welcome: dict[str, Any] | None = None
        sock.setblocking(False)
        self.synchronise(fresh)

    def synchronise(self, fresh: bool = False) -> None:
        self.nonce = os.urandom(16)
        self.synced = False
        self.welcome = None
        self.buffer, self.at = bytearray(), 0
        self.send(
            (b"" if fresh else ZEROS) + preamble(self.nonce) + frame(HELLO, payload=pack({"min": 1, "max": 1, "host": "test"}))
        )
        self.until(lambda: self.welcome is not None)

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        deadline = time.monotonic() + self.timeout
        while view:
            r, w, _ = select.select([self.sock], [self.sock], [], max(0, deadline - time.monotonic()))
            if not r and not w:
                raise TimeoutError("the agent takes nothing")
            if w:
                view = view[self.sock.send(view[: 1 << 18]) :]
            elif r:
                self.receive()

    def receive(self) -> None:
        data = self.sock.recv(1 << 20)
        if not data:
            raise ConnectionError("closed")
        self.buffer += data
        self.parse()

    def parse(self) -> None:
        b = self.buffer
        if not self.synced:
            want = preamble(self.nonce)
            i = b.find(want)
            if i < 0:
                del b[: -len(want)]
                return
            self.at = i + len(want)
            self.synced = True
        while len(b) - self.at >= 24:
            magic, kind, _, channel, offset, n, crc = struct.unpack_from("<2sBBIQII", b, self.at)
            if magic != b"SK" or zlib.crc32(b[self.at : self.at + 20]) != crc or n > PAYLOAD_MAX:
                raise AssertionError(f"damaged frame from the agent: {bytes(b[self.at : self.at + 24]).hex()}")
            if len(b) - self.at < 28 + n:
                break
            payload = bytes(b[self.at + 24 : self.at + 24 + n])
            (trailer,) = struct.unpack_from("<I", b, self.at + 24 + n)
            assert trailer == (crc ^ 0xA5A5A5A5) | 1, "trailer"
            self.at += 28 + n
            self.handle(kind, channel, offset, payload)
        del b[: self.at]
        self.at = 0

    def handle(self, kind: int, channel: int, offset: int, payload: bytes) -> None:
        if kind == WELCOME:
            self.welcome = unpack(payload)
        elif kind == REPLY:
            self.replies[channel] = unpack(payload)
        elif kind == EVENT:
            self.events.append((channel, unpack(payload)))
        elif kind == PONG:
            self.pongs.append(payload)
        elif kind == ACK:
            assert offset >= self.acks.get(channel, 0), "acknowledgements go back"
            self.acks[channel] = offset
        elif kind in (DATA, EOF):
            s = self.streams.setdefault(channel, Stream())
            if s.offset is not None and offset != s.offset:
                assert offset > s.offset, (channel, offset, s.offset)
                s.gaps.append((s.offset, offset))
            s.offset = offset + len(payload)
            if s.keep:
                s.data += payload
            s.received += len(payload)
            if kind == EOF:
                s.end = offset
            elif self.acknowledge:
                self.sock.setblocking(True)
                self.sock.sendall(frame(ACK, channel, s.offset))
                self.sock.setblocking(False)

    def until(self, done: Any, timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or self.timeout)
        while not done():
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.sock], [], [], left)[0]:
                raise TimeoutError
            self.receive()

    def settle(self, seconds: float) -> None:
        """Takes what comes for a while."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.sock], [], [], left)[0]:
                self.receive()

    def start_call(self, method: str, **arguments: Any) -> int:
        self.request += 1
        self.send(frame(CALL, self.request, 0, pack({"m": method, **arguments})))
        return self.request

    def result(self, request: int, timeout: float | None = None) -> Any:
        self.until(lambda: request in self.replies, timeout)
        r = self.replies.pop(request)
        if "error" in r:
            raise Failure(r["error"])
        return r

    def call(self, method: str, **arguments: Any) -> Any:
        return self.result(self.start_call(method, **arguments))

    def exit_of(self, id: int, timeout: float | None = None) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            return next((e for c, e in self.events if c == id and e["e"] == "exit"), None)

        self.until(found, timeout)
        result = found()
        assert result is not None
        return result

    def stream(self, number: int) -> Stream:
        return self.streams.setdefault(number, Stream())

    def run(
        self, id: int, *argv: str | bytes, input: bytes | None = None, timeout: float | None = None, **more: Any
    ) -> tuple[dict, bytes, bytes]:
        """Starts, feeds, waits, forgets."""
        self.call("exec", id=id, argv=list(argv), stdin=input is not None, **more)
        if input is not None:
            self.feed(4 * id, input)
        done = self.exit_of(id, timeout)
        self.call("forget", id=id)
        return done, bytes(self.stream(4 * id + 1).data), bytes(self.stream(4 * id + 2).data)

    def feed(self, stream: int, data: bytes, *, start: int = 0, end: bool = True, window: int = 256 << 10) -> None:
        self.acks.setdefault(stream, start)
        at = start
        total = start + len(data)
        while at < total:
            self.until(lambda at=at: at - self.acks[stream] < window)
            n = min(PAYLOAD_MAX, total - at, window - (at - self.acks[stream]))
            self.send(frame(DATA, stream, at, data[at - start : at - start + n]))
            at += n
        if end:
            self.send(frame(EOF, stream, total))

    def ping(self, payload: bytes = b"x") -> float:
        n, started = len(self.pongs), time.perf_counter()
        self.sock.send(frame(PING, payload=payload))
        self.until(lambda: len(self.pongs) > n)
        return time.perf_counter() - started
