"""Fills an overlay from front to back: for a disk that comes from elsewhere, of which nothing but its content is known.

The file is laid out as :mod:`.overlay` has it, with data and L2 tables behind the L1 table in the order they come, and as many more
refcount blocks at the end as it takes. Nothing of the file can lead outside of it: every place in it is chosen here.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from stoker.errors import InvalidRequest
from stoker.storage.overlay import CLUSTER, L2_COVERS, REFCOUNTS_PER_BLOCK, ZEROS, render_overlay

__all__ = ["OverlayWriter"]

COPIED: Final = 1 << 63
"""In a table: nobody else refers to this cluster."""
ENTRIES: Final = CLUSTER // 8
MOST: Final = ENTRIES * REFCOUNTS_PER_BLOCK
"""Clusters that one cluster of the refcount table accounts for: 16 TiB."""


class OverlayWriter:
    """Writes into an empty file. Pieces come ascending, each beginning at a cluster; :meth:`finish` makes the file whole."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        length, pieces = render_overlay(size)
        for offset, data in pieces:
            os.pwrite(fd, data, offset)
        self._next = length // CLUSTER
        self._l1 = [0] * -(-size // L2_COVERS)
        self._l1_at = 3 * CLUSTER
        self._current = -1
        self._l2 = [0] * ENTRIES

    def data(self, start: int, data: bytes) -> None:
        """Content from ``start`` on; the last cluster of a piece is filled up with zeros."""
        at = self._take(-(-len(data) // CLUSTER))
        self._map(start, len(data), at * CLUSTER | COPIED)
        view = memoryview(data)
        offset = at * CLUSTER
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def zeros(self, start: int, length: int) -> None:
        """Reads as zeros, whatever lies below."""
        for offset in range(start // L2_COVERS * L2_COVERS, start + length, L2_COVERS):
            self._turn_to(offset // L2_COVERS)
            first = max(start - offset, 0) // CLUSTER
            last = -(-min(start + length - offset, L2_COVERS) // CLUSTER)
            self._l2[first:last] = [ZEROS] * (last - first)

    def finish(self) -> None:
        """Writes the tables and the counts. The caller syncs."""
        self._flush()
        os.pwrite(self._fd, struct.pack(f">{len(self._l1)}Q", *self._l1), self._l1_at)
        blocks = [2]
        while len(blocks) * REFCOUNTS_PER_BLOCK < self._next:
            blocks.append(self._take(1))
        for number, block in enumerate(blocks):
            used = min(REFCOUNTS_PER_BLOCK, self._next - number * REFCOUNTS_PER_BLOCK)
            os.pwrite(self._fd, struct.pack(f">{used}H", *[1] * used), block * CLUSTER)
        os.pwrite(self._fd, struct.pack(f">{len(blocks)}Q", *(block * CLUSTER for block in blocks)), CLUSTER)
        os.ftruncate(self._fd, self._next * CLUSTER)

    def _take(self, clusters: int) -> int:
        first, self._next = self._next, self._next + clusters
        if self._next >= MOST:
            raise InvalidRequest("disk_too_large", f"a disk with more than {MOST * CLUSTER >> 40} TiB of content cannot be made")
        return first

    def _map(self, start: int, length: int, entry: int) -> None:
        for offset in range(start, start + length, CLUSTER):
            table, within = divmod(offset, L2_COVERS)
            self._turn_to(table)
            self._l2[within // CLUSTER] = entry + offset - start

    def _turn_to(self, table: int) -> None:
        if table != self._current:
            self._flush()
            self._current, self._l2 = table, [0] * ENTRIES

    def _flush(self) -> None:
        if self._current >= 0 and any(self._l2):
            at = self._take(1)
            os.pwrite(self._fd, struct.pack(f">{ENTRIES}Q", *self._l2), at * CLUSTER)
            self._l1[self._current] = at * CLUSTER | COPIED
        self._current = -1
