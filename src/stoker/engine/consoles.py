"""A sandbox's serial console by offset, over the two files the shim keeps (see :mod:`stoker.vmm.console`).

The files do not say how much was thrown away before them. So offsets count from what this daemon saw first, and a half that came
and went between two looks is not counted: they never go back, and following by ``next`` never shows a byte twice.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["Console"]


class Console:
    """Knows which files it saw, and where they begin. Blocking: used in a thread."""

    def __init__(self) -> None:
        self._base = 0
        """Offset of the first byte of the oldest file."""
        self._seen: list[tuple[int, int]] = []
        """(inode, size) of the files at the last look, oldest first."""

    def _look(self, path: Path) -> list[tuple[int, int]]:
        """Opens both files, oldest first: (descriptor, size)."""
        for _ in range(8):
            found: list[tuple[int, int]] = []
            for name in (path.with_name(path.name + ".1"), path):
                try:
                    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                except FileNotFoundError:
                    continue
                found.append((descriptor, os.fstat(descriptor).st_size))
            inodes = [os.fstat(descriptor).st_ino for descriptor, _ in found]
            # One file under both names: it was renamed between the two opens.
            if len(set(inodes)) == len(inodes):
                self._move([(inode, size) for inode, (_, size) in zip(inodes, found, strict=True)])
                return found
            for descriptor, _ in found:
                os.close(descriptor)
        return []

    def _move(self, files: list[tuple[int, int]]) -> None:
        inodes = [inode for inode, _ in files]
        for inode, size in self._seen:
            if inode in inodes:
                break
            self._base += size
        self._seen = files

    def read(self, path: Path, offset: int | None, limit: int) -> tuple[int, bytes, int]:
        """(offset of the first byte, bytes, oldest offset held). Offset None: the last ``limit`` bytes."""
        files = self._look(path)
        try:
            oldest = self._base
            end = oldest + sum(size for _, size in files)
            start = end - limit if offset is None else offset
            start = max(oldest, min(start, end))
            data, position = bytearray(), oldest
            for descriptor, size in files:
                if start + len(data) < position + size and len(data) < limit:
                    wanted = min(limit - len(data), position + size - start - len(data))
                    data += os.pread(descriptor, wanted, start + len(data) - position)
                position += size
            return start, bytes(data), oldest
        finally:
            for descriptor, _ in files:
                os.close(descriptor)
