"""The command line's own standard streams, read and written without ever stopping the event loop.

O_NONBLOCK belongs to the open file, which a shell and other programs share with us, so it is never set on what we were given.
Pipes and terminals are opened again through /proc for a description of our own; where that is refused, reads wait for the
poll first and writes go through a thread. Regular files and the like neither block nor can be polled.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

__all__ = ["Reader", "Writer"]

CHUNK = 256 << 10


def _reopen(fd: int, flags: int) -> int | None:
    """Our own non-blocking description of the same pipe or terminal, or None where there is no such thing."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and os.isatty(fd))):
        return None
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        # Another user's terminal (su), no /proc, or a pipe whose other end is gone.
        return None


async def _poll(add: Callable[..., None], remove: Callable[[int], object], fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    add(fd, wake)
    try:
        await ready
    finally:
        remove(fd)


class Reader:
    """``await read()`` gives the next bytes, ``b""`` at the end of file."""

    def __init__(self, fd: int) -> None:
        own = _reopen(fd, os.O_RDONLY)
        self._fd = fd if own is None else own
        self._close = own is not None
        mode = os.fstat(fd).st_mode
        self._pollable = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._close:
            os.close(self._fd)

    async def read(self, size: int = CHUNK) -> bytes:
        loop = asyncio.get_running_loop()
        if not self._pollable:
            return await loop.run_in_executor(None, os.read, self._fd, size)
        while True:
            if not self._close:
                await _poll(loop.add_reader, loop.remove_reader, self._fd)
            try:
                return os.read(self._fd, size)
            except BlockingIOError:
                await _poll(loop.add_reader, loop.remove_reader, self._fd)
            except OSError:
                # EIO: the terminal was hung up. ECONNRESET: the other side of a socket went. Both are an end.
                return b""


class Writer:
    """``await write(data)`` returns when all of it has been taken. A reader that is gone raises :class:`BrokenPipeError`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        mode = os.fstat(fd).st_mode
        self._own = _reopen(fd, os.O_WRONLY)
        self._socket = socket.socket(fileno=os.dup(fd)) if stat.S_ISSOCK(mode) else None
        self._blocks = self._own is None and self._socket is None and (stat.S_ISFIFO(mode) or os.isatty(fd))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._own is not None:
            os.close(self._own)
        if self._socket is not None:
            self._socket.close()

    def _try(self, data: memoryview) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return os.write(self._fd if self._own is None else self._own, data)

    async def write(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        rest = memoryview(data)
        while rest:
            if self._blocks:
                rest = rest[await _in_thread(os.write, self._fd, rest) :]
                continue
            try:
                rest = rest[self._try(rest) :]
            except BlockingIOError:
                fd = self._socket.fileno() if self._socket is not None else self._own
                assert fd is not None
                await _poll(loop.add_writer, loop.remove_writer, fd)


async def _in_thread(call: Callable[[int, memoryview], int], fd: int, data: memoryview) -> int:
    """Like an executor, but nobody waits for a thread that never comes back when the program ends."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[int] = loop.create_future()

    def settle(result: int | BaseException) -> None:
        if done.done():
            return
        if isinstance(result, BaseException):
            done.set_exception(result)
        else:
            done.set_result(result)

    def work() -> None:
        result: int | BaseException
        try:
            result = call(fd, data)
        except OSError as e:
            result = e
        try:
            loop.call_soon_threadsafe(settle, result)
        except RuntimeError:
            pass  # the loop is closed: the program is ending

    threading.Thread(target=work, daemon=True, name=f"write-{fd}").start()
    return await done
