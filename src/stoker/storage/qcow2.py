"""Empty qcow2 overlays, written without a process: a header, a refcount table and block, an empty L1 table.

The name of the backing file is *not* in the header: the VMM is told on its command line, so that nothing a guest (or anybody else)
writes into the file can make the host open another one.

Layout, in clusters of 64 KiB (qcow2 version 3, 16-bit refcounts)::

    0                   header
    1 .. r              refcount table (r = 1: it covers 2 GiB of file per entry, 8192 entries)
    r + 1               the first refcount block: it counts the clusters up to the end of the L1 table
    r + 2 ..            L1 table, one entry for each 512 MiB of guest disk

Only a few bytes are not zero, so the file is sparse: 12 KiB on the host's disk. A crash leaves the file as far as it was
written; it belongs to one run's directory and goes with it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from stoker.errors import InvalidRequest

__all__ = ["CLUSTER", "create_overlay", "render_overlay"]

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
L2_COVERS = CLUSTER * (CLUSTER // 8)
"""Bytes of guest disk that one L1 entry (one L2 table) maps: 512 MiB."""
REFCOUNTS_PER_BLOCK = CLUSTER // 2
MAX_SIZE = 64 << 40
"""64 TiB: more than ext4 on 32-bit block numbers takes, and an L1 table of 16 clusters."""

_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")


def render_overlay(size: int) -> tuple[int, list[tuple[int, bytes]]]:
    """The file of an empty overlay for a disk of ``size`` bytes: its length and the pieces (offset, bytes) that are not zero."""
    if size <= 0 or size % 512 or size > MAX_SIZE:
        raise InvalidRequest("bad_disk_size", f"a disk of {size} bytes cannot be made", "give a multiple of 512 bytes up to 64T")
    l1_entries = -(-size // L2_COVERS)
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    refcount_table, refcount_block, l1_table = 1, 2, 3
    clusters = l1_table + l1_clusters
    assert clusters <= REFCOUNTS_PER_BLOCK
    header = _HEADER.pack(
        b"QFI\xfb",
        3,  # version
        0,  # no backing file name
        0,
        CLUSTER_BITS,
        size,
        0,  # not encrypted
        l1_entries,
        l1_table * CLUSTER,
        refcount_table * CLUSTER,
        1,  # clusters of the refcount table
        0,  # internal snapshots
        0,
        0,  # incompatible features
        0,  # compatible features
        0,  # autoclear features
        4,  # refcounts of 2^4 bits
        _HEADER.size,
    )
    # Behind the header: the end-of-extensions marker (eight zero bytes) is there already, the file being sparse.
    pieces = [
        (0, header),
        (refcount_table * CLUSTER, struct.pack(">Q", refcount_block * CLUSTER)),
        (refcount_block * CLUSTER, struct.pack(f">{clusters}H", *[1] * clusters)),
    ]
    return clusters * CLUSTER, pieces


def create_overlay(path: Path, backing: Path, size: int) -> None:
    """Writes an empty overlay for ``backing`` (raw), of at least the backing file's size. ``path`` must not exist.

    What lies past the end of the backing file reads as zeros.
    """
    size = max(size, os.stat(backing).st_size)
    length, pieces = render_overlay(-(-size // 512) * 512)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        for offset, data in pieces:
            os.pwrite(fd, data, offset)
        os.ftruncate(fd, length)
    finally:
        os.close(fd)
