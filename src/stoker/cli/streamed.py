"""A process behind the API as :class:`stoker.cli.attach.RemoteProcess`: one stream of pieces becomes two, and one to write to."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.errors import HostError

if TYPE_CHECKING:
    from stoker.client.process import AsyncProcess

__all__ = ["Ended", "Streamed"]

ROOM = 2 << 20
"""Bytes of each output that wait for our reader before the guest is made to wait."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended: one of both."""

    code: int | None
    signal: int | None


class _Queue:
    """Bytes on their way to one reader."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._changed = asyncio.Condition()

    async def put(self, data: bytes) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._size < ROOM)
            self._pieces.append(data)
            self._size += len(data)
            self._changed.notify_all()

    async def end(self) -> None:
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._pieces or self._ended)
                if not self._pieces:
                    return
                data = self._pieces.popleft()
                self._size -= len(data)
                self._changed.notify_all()
            yield data


class _Input:
    def __init__(self, process: AsyncProcess) -> None:
        self._process = process

    async def write(self, data: bytes) -> None:
        if not await self._process.write(data):
            raise HostError("stdin_closed", "the process reads no more")

    async def close(self) -> None:
        await self._process.end_input()


class Streamed:
    """Used with ``async with``, while which the output is fetched. Leaving it lets go of the process, which goes on."""

    def __init__(self, process: AsyncProcess) -> None:
        self._process = process
        self._queues = {"stdout": _Queue(), "stderr": _Queue()}
        self._pump: asyncio.Task[None] | None = None
        self.stdin = _Input(process)
        self.stdout: AsyncIterator[bytes] = self._queues["stdout"].__aiter__()
        self.stderr: AsyncIterator[bytes] = self._queues["stderr"].__aiter__()
        self.lost = 0
        """Bytes of output that were overwritten before they could be fetched."""

    async def __aenter__(self) -> Streamed:
        self._pump = asyncio.create_task(self._fetch())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        await self._process.disconnect()

    async def _fetch(self) -> None:
        try:
            async for output in self._process.pieces():
                self.lost += output.lost
                await self._queues[output.stream].put(output.data)
        finally:
            for queue in self._queues.values():
                await queue.end()

    async def wait(self) -> Ended:
        assert self._pump is not None
        await asyncio.shield(self._pump)
        info = self._process.info
        return Ended(info.exit_code, info.signal)

    async def signal(self, number: int, /) -> None:
        await self._process.signal(number)

    async def resize(self, rows: int, cols: int, /) -> None:
        await self._process.resize(rows, cols)
