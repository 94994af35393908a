"""A server for the client's tests that does what a script says, byte by byte: for failures no real server shows on demand."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int


@dataclass
class Wire:
    """One accepted connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int
    requests: list[Request] = field(default_factory=list)

    async def request(self) -> Request | None:
        """The next whole request; None at the end of the connection."""
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        first, *lines = head.strip().split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = b""
        if "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readline() or b"-1", 16):
                if size < 0:
                    return None
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        request = Request(method, target, headers, body, self.number)
        self.requests.append(request)
        return request

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes = b"{}", status: int = 200, headers: str = "") -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        await self.send(head.encode() + body)

    async def upgrade(self, request: Request) -> None:
        accept = base64.b64encode(hashlib.sha1((request.headers["sec-websocket-key"] + GUID).encode()).digest()).decode()
        await self.send(
            f"HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: {accept}\r\n\r\n".encode()
        )

    async def frame(self, opcode: int, data: bytes = b"", final: bool = True) -> None:
        size = len(data)
        first = (0x80 if final else 0) | opcode
        header = struct.pack("!BB", first, size) if size < 126 else struct.pack("!BBQ", first, 127, size)
        await self.send(header + data)

    async def read_frame(self) -> tuple[int, bytes]:
        first, second = await self.reader.readexactly(2)
        assert second & 0x80, "a client's frames are masked"
        size = second & 0x7F
        if size == 126:
            size = struct.unpack("!H", await self.reader.readexactly(2))[0]
        elif size == 127:
            size = struct.unpack("!Q", await self.reader.readexactly(8))[0]
        key = await self.reader.readexactly(4)
        data = await self.reader.readexactly(size)
        return first & 0x0F, bytes(b ^ key[i % 4] for i, b in enumerate(data))


Script = Callable[[Wire], Awaitable[None]]


@dataclass
class Stub:
    path: Path
    wires: list[Wire] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    @property
    def requests(self) -> list[Request]:
        return [request for wire in self.wires for request in wire.requests]


@asynccontextmanager
async def stub(path: Path, *scripts: Script) -> AsyncIterator[Stub]:
    """Serves each connection with the next script, the last one again and again."""
    state = Stub(path)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer, len(state.wires))
        state.wires.append(wire)
        try:
            await scripts[min(wire.number, len(scripts) - 1)](wire)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except Exception as e:  # shown by the test that looks
            state.errors.append(e)
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield state
    finally:
        await asyncio.sleep(0.01)  # what was connected is accepted first, or nobody would close it
        server.close()
        for wire in state.wires:
            wire.writer.transport.abort()
        await asyncio.sleep(0.01)
    assert not state.errors, state.errors


async def serve_json(wire: Wire) -> None:
    """Answers everything with an empty object."""
    while await wire.request() is not None:
        await wire.answer()
