"""A sandbox's serial console by offset, over the two files the shim keeps (see :mod:`stoker.vmm.console`).

The files do not say how much was thrown away before them. So offsets count from what this daemon saw first, and a half that came
and went between two looks is not counted: they never go back, and following by ``next`` never shows a byte twice.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

__all__ = ["Console"]


class Console:
    """Knows which files it saw, and where they begin. Blocking: used in threads."""

    def __init__(self) -> None:
        self._base = 0
        """Offset of the first byte of the oldest file."""
        self._seen: list[tuple[int, int, int]] = []
        """(descriptor, inode, size) of the files at the last look, oldest first. Held open, so that no inode is given away."""
        self._lock = threading.Lock()
        self._closed = False

    def _look(self, path: Path) -> list[tuple[int, int, int]]:
        for _ in range(8):
            found: list[tuple[int, int, int]] = []
            for name in (path.with_name(path.name + ".1"), path):
                try:
                    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                except FileNotFoundError:
                    continue
                status = os.fstat(descriptor)
                found.append((descriptor, status.st_ino, status.st_size))
            # One file under both names: it was renamed between the two opens.
            if len(found) < 2 or found[0][1] != found[1][1]:
                return found
            _close(found)
        return []

    def _move(self, files: list[tuple[int, int, int]]) -> None:
        """What was seen before and is not there any more counts into the base."""
        before, now = [inode for _, inode, _ in self._seen], [inode for _, inode, _ in files]
        gone = next(n for n in range(len(before) + 1) if before[n:] == now[: len(before) - n])
        self._base += sum(size for _, _, size in self._seen[:gone])
        _close(self._seen)
        self._seen = files

    def read(self, path: Path, offset: int | None, limit: int) -> tuple[int, bytes, int]:
        """(offset of the first byte, bytes, oldest offset held). Offset None: the last ``limit`` bytes."""
        with self._lock:
            self._move(self._look(path))
            oldest = self._base
            end = oldest + sum(size for _, _, size in self._seen)
            start = end - limit if offset is None else offset
            start = max(oldest, min(start, end))
            data, position = bytearray(), oldest
            for descriptor, _, size in self._seen:
                here = start + len(data)
                if here < position + size and len(data) < limit:
                    data += os.pread(descriptor, min(limit - len(data), position + size - here), here - position)
                position += size
            if self._closed:
                # Its sandbox went meanwhile: nobody else will close them.
                _close(self._seen)
                self._seen = []
            return start, bytes(data), oldest

    def close(self) -> None:
        with self._lock:
            self._closed = True
            _close(self._seen)
            self._seen = []


def _close(files: list[tuple[int, int, int]]) -> None:
    for descriptor, _, _ in files:
        os.close(descriptor)
