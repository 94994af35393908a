"""A scripted agent for failure injection: it answers the preamble and then does exactly what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from stoker.guest import frames
from stoker.guest.agent import Agent
from stoker.guest.channel import connect
from stoker.guest.frames import Frame, FrameParser, encode, find_preamble

WELCOME: dict[str, Any] = {"version": 1, "agent": "peer 1", "state": "ready", "generation": 1, "pid": 1, "processes": []}


class Peer:
    """The agent's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.nonce_at = -1
        self._parser = FrameParser()
        self._frames: list[Frame] = []

    async def synchronise(self, welcome: dict[str, Any] | None = None, *, before: bytes = b"") -> dict[str, Any]:
        """Hunts, answers the preamble and (with a WELCOME) the greeting; the HELLO."""
        seen = b""
        while (at := find_preamble(seen)) < 0:
            seen += await self._read()
        self.nonce_at = at
        end = at + frames.PREAMBLE_SIZE
        self._frames += self._parser.feed(seen[end:])
        hello = await self.next(frames.HELLO)
        self.writer.write(before + seen[at:end])
        if welcome is not None:
            self.send(frames.WELCOME, 0, 0, welcome)
        result: dict[str, Any] = msgspec.msgpack.decode(hello.payload)
        return result

    async def _read(self) -> bytes:
        data = await self.reader.read(65536)
        if not data:
            raise ConnectionResetError("the host closed the connection")
        return data

    async def next(self, type: int | None = None) -> Frame:
        """The next frame; it must be of this type."""
        while not self._frames:
            self._frames += self._parser.feed(await self._read())
        frame = self._frames.pop(0)
        assert type is None or frame.type == type, frame
        return frame

    async def call(self) -> tuple[int, dict[str, Any]]:
        """The next CALL: its number and arguments."""
        frame = await self.next(frames.CALL)
        return frame.channel, msgspec.msgpack.decode(frame.payload)

    def send(self, type: int, channel: int, offset: int = 0, payload: bytes | dict[str, Any] = b"") -> None:
        self.writer.write(encode(type, channel, offset, payload if isinstance(payload, bytes) else msgspec.msgpack.encode(payload)))

    def reply(self, number: int, result: dict[str, Any]) -> None:
        self.send(frames.REPLY, number, 0, result)

    def event(self, channel: int, kind: str, **keys: Any) -> None:
        self.send(frames.EVENT, channel, 0, {"e": kind, **keys})


Script = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def listening(path: Path, *scripts: Script) -> AsyncIterator[None]:
    """A socket whose first connection runs the first script, and so on. A script that fails fails the test."""
    waiting = list(scripts)
    running: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.append(asyncio.current_task())  # type: ignore[arg-type]
        try:
            await waiting.pop(0)(Peer(reader, writer))
            await writer.drain()
        except ConnectionResetError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
        async with asyncio.timeout(10):
            await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def peered(path: Path, script: Script, *, fresh: bool = True) -> AsyncIterator[Agent]:
    """An agent whose other end is greeted and then runs the script."""

    async def whole(peer: Peer) -> None:
        await peer.synchronise(WELCOME)
        await script(peer)
        # The host hangs up first, or else what it does meanwhile would race with the end of the script.
        while await peer.reader.read(65536):
            pass

    async with listening(path, whole):
        async with await connect(path, fresh=fresh, timeout=5) as agent:
            yield agent
