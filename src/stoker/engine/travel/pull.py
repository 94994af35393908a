"""Joins work in a thread that reads to an asynchronous source of bytes. Ending the one ends the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

__all__ = ["Pull"]

T = TypeVar("T")


class Pull:
    """Made on the event loop that ``source`` is of. Who reads, and that it has ended, is known on that loop alone."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._reading: asyncio.Task[bytes] | None = None
        self._ended = False

    async def _next(self) -> bytes:
        if self._ended:
            raise asyncio.CancelledError
        self._reading = asyncio.current_task()
        try:
            async for piece in self._source:
                if piece:
                    return piece
            return b""
        finally:
            self._reading = None

    def more(self) -> bytes:
        """The next piece, nothing at the end. To be called in :meth:`run`'s thread."""
        return asyncio.run_coroutine_threadsafe(self._next(), self._loop).result()

    async def run(self, work: Callable[[], T]) -> T:
        """``work``, in a thread. It has ended when this returns, cancelled or not."""
        task = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._ended = True
            if self._reading is not None:
                self._reading.cancel()
            await asyncio.wait({task})
            raise
