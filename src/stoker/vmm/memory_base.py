"""A base on disk, written and hashed in one pass: what was there before, and over it what a machine changed.

The digest is over the pieces of the memory that are not zeros, each with its place, so that it says nothing of a file's holes: a
copy may have others.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import stat
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Final

from stoker.errors import HostError
from stoker.host.durable import begin_writing
from stoker.host.reflink import data_ranges
from stoker.vmm.memory import Delta, address_of

__all__ = ["digest_of_memory", "write_base"]

WINDOW: Final = 1 << 20
"""Bytes that are put together at a time."""
PIECE: Final = 64 << 10
"""Bytes that are written and hashed as a whole, unless they are zeros."""
AHEAD: Final = 4
"""Windows that are still being hashed while the next is put together."""
TOLD: Final = 8 << 20
"""Bytes after which the kernel is told to begin with the disk."""
_libc: Final = ctypes.CDLL(None)
_blank: Final = mmap.mmap(-1, WINDOW, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class _Window:
    """A piece of memory that is put together. It has a place only once it is begun."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, WINDOW, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = address_of(self._map)
        self.data = memoryview(self._map)
        self.start = 0
        self.hashed: Future[None] | None = None

    def close(self) -> None:
        if self.hashed is not None:
            self.hashed.result()
        self.data.release()

    def read(self, fd: int, start: int, end: int) -> None:
        """Begins with what a file has there."""
        self.start = start
        if os.preadv(fd, [self.data[: end - start]], start) != end - start:
            raise HostError("memory_damaged", "a memory file is cut off")

    def clear(self, start: int, end: int) -> None:
        self.start = start
        self.data[: end - start] = memoryview(_blank)[: end - start]

    def pieces(self, end: int) -> list[tuple[int, int]]:
        """Where it is not zeros, in whole pieces: offsets within it. Neighbours stay apart."""
        found, zeros = [], address_of(_blank)
        for low in range(0, end - self.start, PIECE):
            size = min(PIECE, end - self.start - low)
            if _libc.memcmp(ctypes.c_void_p(self._address + low), ctypes.c_void_p(zeros), ctypes.c_size_t(size)):
                found.append((low, low + size))
        return found

    def hash(self, digest: hashlib._Hash, pieces: list[tuple[int, int]]) -> None:
        for low, high in pieces:
            digest.update((self.start + low).to_bytes(8, "little"))
            digest.update(self.data[low:high])

    def write(self, fd: int, pieces: list[tuple[int, int]]) -> None:
        joined: list[tuple[int, int]] = []
        for low, high in pieces:
            low = joined.pop()[0] if joined and joined[-1][1] == low else low
            joined.append((low, high))
        for low, high in joined:
            while low < high:
                low += os.pwrite(fd, self.data[low:high], self.start + low)


class _Runs:
    """Runs of a delta, taken from the first to the last. ``data``: their content, from ``at`` on; ``None``: they are zeros."""

    def __init__(self, offsets: array[int], lengths: array[int], data: memoryview | None = None, at: int = 0) -> None:
        self._offsets, self._lengths, self._data, self._at, self._next = offsets, lengths, data, at, 0

    def begins_before(self, end: int) -> bool:
        return self._next < len(self._offsets) and self._offsets[self._next] < end

    def skip(self, end: int) -> None:
        while self.begins_before(end) and self._offsets[self._next] + self._lengths[self._next] <= end:
            self._at += self._lengths[self._next]
            self._next += 1

    def lay(self, window: _Window, end: int) -> None:
        """Puts over a window, which ends there, what of them is in it."""
        start = window.start
        for number in range(self._next, len(self._offsets)):
            offset, length = self._offsets[number], self._lengths[number]
            if offset >= end:
                break
            low, high = max(offset, start), min(offset + length, end)
            if self._data is None:
                window.data[low - start : high - start] = memoryview(_blank)[: high - low]
            else:
                at = self._at - offset
                window.data[low - start : high - start] = self._data[at + low : at + high]
            if offset + length <= end:  # else the rest is the next window's
                self._next += 1
                self._at += length


def _windows(fd: int) -> Iterator[int]:
    """Where those windows begin in which a file has anything."""
    last = -1
    for offset, length in data_ranges(fd):
        for start in range(max(offset // WINDOW, last + 1) * WINDOW, offset + length, WINDOW):
            last = start // WINDOW
            yield start


def digest_of_memory(fd: int) -> str:
    """SHA-256 over all pieces of a memory file that are not zeros, each with its place."""
    found, window, size = hashlib.sha256(), _Window(), os.fstat(fd).st_size
    for start in _windows(fd):
        end = min(start + WINDOW, size)
        window.read(fd, start, end)
        window.hash(found, window.pieces(end))
    window.close()
    return found.hexdigest()


def write_base(base: int, delta: Delta, target: int) -> str:
    """Writes base and delta as a new base into an empty file, and gives its digest (:func:`digest_of_memory`). The caller syncs."""
    os.ftruncate(target, delta.size)
    over = stat.S_ISREG(os.fstat(base).st_mode)
    if over and os.fstat(base).st_size != delta.size:
        raise HostError("memory_mismatch", "a delta is of another size than its base")
    there = set(_windows(base)) if over else set()
    digest, told = hashlib.sha256(), 0
    with ExitStack() as stack, ThreadPoolExecutor(1) as other:
        data = stack.enter_context(memoryview(delta.data)) if delta.data is not None else None
        changed = _Runs(delta.offsets, delta.lengths, data, delta.start)
        cleared = _Runs(delta.zero_offsets, delta.zero_lengths)
        ring = deque(_Window() for _ in range(AHEAD))
        for window in ring:
            stack.callback(window.close)
        for start in range(0, delta.size, WINDOW):
            end = min(start + WINDOW, delta.size)
            if start not in there and not changed.begins_before(end):
                cleared.skip(end)
                continue
            window = ring[0]
            ring.rotate(-1)
            if window.hashed is not None:
                window.hashed.result()
            window.read(base, start, end) if start in there else window.clear(start, end)
            cleared.lay(window, end)
            changed.lay(window, end)
            pieces = window.pieces(end)
            window.hashed = other.submit(window.hash, digest, pieces)
            window.write(target, pieces)
            if start - told >= TOLD:
                begin_writing(target, told, start - told)
                told = start
        for window in ring:
            if window.hashed is not None:
                window.hashed.result()
    return digest.hexdigest()
