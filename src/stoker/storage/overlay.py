"""qcow2 overlays: empty ones written without a process (a header, a refcount table and block, an empty L1 table), grown, and read.

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stoker.errors import HostError, InvalidRequest
from stoker.host.trace import declare, trace
from stoker.storage.compose import Piece

__all__ = [
    "JOINED",
    "GROW",
    "CLUSTER",
    "Header",
    "allocated",
    "create_overlay",
    "grow_overlay",
    "read_header",
    "render_overlay",
    "write_overlay",
]

GROW = declare("grow.after_table")
CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
L2_COVERS = CLUSTER * (CLUSTER // 8)
"""Bytes of guest disk that one L1 entry (one L2 table) maps: 512 MiB."""
REFCOUNTS_PER_BLOCK = CLUSTER // 2
MAX_SIZE = 64 << 40
"""64 TiB: more than ext4 on 32-bit block numbers takes, and an L1 table of 16 clusters."""

OFFSET, COMPRESSED, ZEROS = 0x00FFFFFFFFFFFE00, 1 << 62, 1
"""Of an entry in a table: where in the file; that its cluster is compressed; that it reads as zeros."""

JOINED: Final = "stoker-base"
"""What a virtual machine writes as the backing file's name when it joins layers. Nobody ever follows it."""
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
    write_overlay(path, -(-size // 512) * 512)


def write_overlay(path: Path, size: int) -> None:
    """Writes an empty overlay of ``size`` bytes. ``path`` must not exist."""
    length, pieces = render_overlay(size)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        for offset, data in pieces:
            os.pwrite(fd, data, offset)
        os.ftruncate(fd, length)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Header:
    """What an overlay says of itself, checked: nothing in it can lead anywhere outside the file."""

    size: int
    l1_offset: int
    l1_entries: int
    length: int
    """Of the file."""

    @property
    def capacity(self) -> int:
        """Bytes of guest disk that the L1 table's clusters have room for."""
        return -(-self.l1_entries * 8 // CLUSTER) * (CLUSTER // 8) * L2_COVERS


def read_header(fd: int, path: Path) -> Header:
    """The header of an overlay of this module's kind, perhaps written to by QEMU since. ``clone_corrupt`` (HostError) otherwise."""
    data = os.pread(fd, _HEADER.size, 0)
    length = os.fstat(fd).st_size
    if len(data) < _HEADER.size:
        raise _corrupt(path, "it is too short")
    magic, version, name, long, bits, size, crypt, entries, l1, _, _, _, _, incompatible, _, _, order, _ = _HEADER.unpack(data)
    if magic != b"QFI\xfb" or version != 3:
        raise _corrupt(path, "it is no qcow2 file of version 3")
    foreign = name and (long != len(JOINED) or os.pread(fd, long, name) != JOINED.encode())
    if foreign or crypt or incompatible or bits != CLUSTER_BITS or order != 4:
        raise _corrupt(path, "it is not one of this program's, or was found damaged by the virtual machine")
    if not 0 < size <= MAX_SIZE or size % 512 or entries * L2_COVERS < size or entries * 8 > MAX_SIZE // L2_COVERS * 8:
        raise _corrupt(path, f"it says to have {size} bytes in {entries} tables")
    if l1 % CLUSTER or not CLUSTER <= l1 <= length:
        raise _corrupt(path, "its first table is not in it")
    return Header(size, l1, entries, length)


def _corrupt(path: Path, why: str) -> HostError:
    return HostError("clone_corrupt", f"the disk {path} cannot be used: {why}", "restore it, or remove its sandbox")


def grow_overlay(fd: int, path: Path, size: int) -> None:
    """A larger disk in an overlay that nobody has open. Up to what its first table has room for (4 TiB)."""
    header = read_header(fd, path)
    if size > header.capacity:
        raise InvalidRequest(
            "disk_too_large", f"a disk of {size} bytes is more than {path} has room for", f"{header.capacity} at most"
        )
    entries = -(-size // L2_COVERS)
    if entries > header.l1_entries:
        # What lies behind the table in its last cluster may be the rest of what the cluster once was.
        os.pwrite(fd, bytes((entries - header.l1_entries) * 8), header.l1_offset + header.l1_entries * 8)
        os.fdatasync(fd)
        trace("grow.after_table")
    # The size and the table's length (between them: no encryption) in one write: a crash finds both or neither.
    os.pwrite(fd, struct.pack(">QII", size, 0, entries), 24)


def allocated(fd: int, path: Path) -> Iterator[Piece]:
    """What an overlay has of its own, ascending, neighbours joined. Everything else is what lies below it."""
    header = read_header(fd, path)
    table = os.pread(fd, header.l1_entries * 8, header.l1_offset)
    if len(table) < header.l1_entries * 8:
        raise _corrupt(path, "its first table is cut off")
    run: Piece | None = None
    for index, entry in enumerate(struct.unpack(f">{header.l1_entries}Q", table)):
        l2 = entry & OFFSET
        if not l2:
            continue
        data = os.pread(fd, CLUSTER, l2)
        if l2 % CLUSTER or len(data) < CLUSTER:
            raise _corrupt(path, "a table is not in it")
        for number, word in enumerate(struct.unpack(f">{CLUSTER // 8}Q", data)):
            if not word:
                continue
            if word & COMPRESSED:
                raise _corrupt(path, "it has compressed parts")
            start = index * L2_COVERS + number * CLUSTER
            if start >= header.size:
                break
            at = None if word & ZEROS else word & OFFSET
            if at is not None and (at == 0 or at % CLUSTER or at >= header.length):
                if at == 0:
                    continue
                raise _corrupt(path, "a cluster is not in it")
            length = min(CLUSTER, header.size - start)
            follows = run is not None and run.start + run.length == start
            if run is not None and follows and (at == run.at if run.at is None or at is None else at == run.at + run.length):
                run = Piece(run.start, run.length + length, run.at)
                continue
            if run is not None:
                yield run
            run = Piece(start, length, at)
    if run is not None:
        yield run
