"""Reading the bounded logs a shim writes (``console.log``, ``vmm.log``).

Each log is at most two files: ``X.log``, written now, and ``X.log.1``, the half before it. When ``X.log`` is full it is renamed to
``X.log.1`` (which replaces the former one) and a new ``X.log`` begins. A reader therefore never sees a file shrink; a file it
holds open stays whole, and may only stop growing.

:func:`tail` gives the last lines. :func:`follow` gives bytes from the oldest kept one on, and goes on for as long as asked: it
holds the file it reads, and when the name means another file reads the held one to its end first. A reader slower than two
halves loses the bytes between, as the writer does not wait; it then gets a gap, told by :data:`GAP`.

The files are the guest's words: any bytes, any length of line.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

__all__ = ["GAP", "clean_lines", "follow", "tail"]

GAP = b"\n[... lost ...]\n"
TAIL_BYTES = 64 << 10
CHUNK = 64 << 10


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None


def _last_bytes(path: Path, limit: int) -> bytes:
    """The last ``limit`` bytes of both files. A rotation between the two opens is seen by the inode, and tried again."""
    older = path.with_name(path.name + ".1")
    for _ in range(8):
        current, before = _open(path), None
        try:
            if current is None:
                if (before := _open(older)) is None:
                    return b""  # also between the rename and the new file; the caller asks again
                return os.pread(before, limit, max(0, os.fstat(before).st_size - limit))
            size = os.fstat(current).st_size
            data = os.pread(current, limit, max(0, size - limit))
            if len(data) >= limit or (before := _open(older)) is None:
                return data
            one, two = os.fstat(current), os.fstat(before)
            if one.st_ino == two.st_ino:
                continue
            missing = limit - len(data)
            return os.pread(before, missing, max(0, two.st_size - missing)) + data
        finally:
            for fd in (current, before):
                if fd is not None:
                    os.close(fd)
    return b""


def clean_lines(data: bytes, lines: int) -> tuple[str, ...]:
    """The last lines that hold something, free of control characters, at most 400 characters each."""
    found = []
    for raw in data.replace(b"\r", b"\n").decode(errors="replace").split("\n"):
        text = "".join(c for c in raw.replace("\t", "    ") if c.isprintable()).rstrip()
        if text:
            found.append(text[:400])
    return tuple(found[-lines:])


def tail(path: Path, lines: int = 20) -> tuple[str, ...]:
    """The last lines of a log; empty when there is none."""
    return clean_lines(_last_bytes(path, TAIL_BYTES), lines)


async def follow(path: Path, ended: Callable[[], bool], interval: float = 0.1) -> AsyncIterator[bytes]:
    """Bytes of a log from the oldest kept one; ends when ``ended()`` is true and everything has been given."""
    older = path.with_name(path.name + ".1")
    fd = await asyncio.to_thread(_open, older)
    if fd is None:
        fd = await asyncio.to_thread(_open, path)
    try:
        while True:
            last_round = ended()
            chunk = await asyncio.to_thread(os.read, fd, CHUNK) if fd is not None else b""
            if chunk:
                yield chunk
                continue
            moved = await asyncio.to_thread(_next_file, path, fd)
            if moved is not None:
                following, gap = moved
                # What was written into the held file before it was renamed, after our last read of it.
                while fd is not None and (rest := await asyncio.to_thread(os.read, fd, CHUNK)):
                    yield rest
                if fd is not None:
                    os.close(fd)
                fd = following
                if gap:
                    yield GAP
                continue
            if last_round:
                return
            await asyncio.sleep(interval)
    finally:
        if fd is not None:
            os.close(fd)


def _next_file(path: Path, held: int | None) -> tuple[int, bool] | None:
    """The file after the held one and whether something between was lost; ``None`` while the held one is the current."""
    current = _open(path)
    if current is None:
        return None
    if held is None:
        return current, False
    inode = os.fstat(held).st_ino
    if os.fstat(current).st_ino == inode:
        os.close(current)
        return None
    before = _open(path.with_name(path.name + ".1"))
    if before is None:
        return current, False
    if os.fstat(before).st_ino == inode:
        os.close(before)
        return current, False
    os.close(current)
    return before, True
