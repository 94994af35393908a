"""The persistent exception store of device-mapper's snapshot target: what a copy-on-write file says of itself.

In chunks of 4 KiB: a header; then areas, each a chunk of 256 entries (chunk of the origin, chunk of this file; two little-endian
64-bit numbers) followed by the 256 chunks they speak of. An entry whose second number is 0 ends the list.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from stoker.errors import HostError
from stoker.storage.compose import Piece

__all__ = ["CHUNK", "CHUNK_SECTORS", "capacity", "check_store", "pieces", "render_header"]

CHUNK = 4096
CHUNK_SECTORS = CHUNK // 512
PER_AREA = CHUNK // 16
_HEADER = struct.Struct("<4I")
MAGIC = 0x70416E53


def capacity(size: int) -> int:
    """Bytes of a store that has room for every chunk of a disk of ``size`` bytes: it can never overflow."""
    chunks = -(-size // CHUNK)
    return CHUNK * (1 + chunks + -(-chunks // PER_AREA) + 1)


def render_header() -> bytes:
    """Of a valid, empty store; what follows it is zeros."""
    return _HEADER.pack(MAGIC, 1, 1, CHUNK_SECTORS)


def check_store(fd: int, path: Path) -> None:
    """Raises ``clone_corrupt`` (HostError) unless it is a valid store of this program's chunk size."""
    data = os.pread(fd, _HEADER.size, 0)
    if len(data) < _HEADER.size or _HEADER.unpack(data)[0] != MAGIC:
        why = "it is no copy-on-write store"
    elif _HEADER.unpack(data)[2:] != (1, CHUNK_SECTORS):
        why = "it is of another program"
    elif not _HEADER.unpack(data)[1]:
        why = "the kernel found it damaged or full, and gave it up"
    else:
        return
    raise HostError("clone_corrupt", f"the disk {path} cannot be used: {why}", "remove its sandbox")


def pieces(fd: int, path: Path) -> Iterator[Piece]:
    """What the store has, ascending, neighbours joined."""
    check_store(fd, path)
    length = os.fstat(fd).st_size
    found: list[tuple[int, int]] = []
    area = CHUNK
    while area < length:
        data = os.pread(fd, CHUNK, area).ljust(CHUNK, b"\0")
        entries = [(old, new) for old, new in struct.iter_unpack("<QQ", data) if new]
        found += entries
        if len(entries) < PER_AREA:
            break
        area += CHUNK * (PER_AREA + 1)
    run: Piece | None = None
    for old, new in sorted(found):
        if (new + 1) * CHUNK > length:
            raise HostError("clone_corrupt", f"the disk {path} cannot be used: a chunk is not in it", "remove its sandbox")
        if run is not None and run.at is not None and run.start + run.length == old * CHUNK and run.at + run.length == new * CHUNK:
            run = Piece(run.start, run.length + CHUNK, run.at)
            continue
        if run is not None:
            yield run
        run = Piece(old * CHUNK, CHUNK, new * CHUNK)
    if run is not None:
        yield run
