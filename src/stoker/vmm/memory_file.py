"""Memory on disk: bases (sparse files of the guest's memory) and deltas (what a machine differs from its base in).

File of a delta, little endian: ``STKDELTA``, u32 version (1), u32 page size, u64 bytes of guest memory, u64 runs with data, u64
runs of zeros; the runs' offsets, their lengths, the zero runs' offsets, their lengths (u64 each); from the next page on, the data.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from typing import Final

from stoker.errors import HostError
from stoker.host.pagemap import PAGE
from stoker.host.process_memory import LONGEST
from stoker.host.reflink import data_ranges
from stoker.vmm.memory import Delta

__all__ = ["copy_memory", "flatten", "read_delta", "write_delta"]

_MAGIC: Final = b"STKDELTA"
_HEADER: Final = struct.Struct("<8sIIQQQ")
_MOST_RUNS: Final = 64 << 20
_GRAIN: Final = 16 << 10
"""Runs of zeros shorter than this are written like anything else."""
_ZEROS: Final = memoryview(bytes(LONGEST))


def copy_memory(source: int, target: int) -> None:
    """What a memory file holds, to the same places of an empty one; holes stay holes."""
    os.ftruncate(target, os.fstat(source).st_size)
    for offset, length in data_ranges(source):
        os.lseek(target, offset, os.SEEK_SET)
        while length:
            done = os.sendfile(target, source, offset, length)
            if not done:
                raise HostError("memory_damaged", "a memory file is cut off")
            offset, length = offset + done, length - done


def flatten(base: int, delta: Delta, target: int) -> None:
    """Writes base and delta as a new base into an empty file. A page of zeros and a hole are the same memory there."""
    over = stat.S_ISREG(os.fstat(base).st_mode)
    if over:
        copy_memory(base, target)
    os.ftruncate(target, delta.size)
    for offset, length in zip(delta.zero_offsets, delta.zero_lengths, strict=True):
        _fill(target, offset, length)
    if delta.data is None:
        return
    at = delta.start
    with memoryview(delta.data) as data:
        for offset, length in zip(delta.offsets, delta.lengths, strict=True):
            _write_sparse(target, data[at : at + length], offset, over)
            at += length


def _fill(fd: int, offset: int, length: int) -> None:
    for start in range(offset, offset + length, LONGEST):
        os.pwrite(fd, _ZEROS[: min(LONGEST, offset + length - start)], start)


def _write_sparse(fd: int, data: memoryview, offset: int, over: bool) -> None:
    """Writes a run; where nothing was before, what is zeros is left out."""
    if over:
        _write(fd, data, offset)
        return
    start = None
    for at in range(0, len(data), _GRAIN):
        if data[at : at + _GRAIN] == _ZEROS[: min(_GRAIN, len(data) - at)]:
            if start is not None:
                _write(fd, data[start:at], offset + start)
                start = None
        elif start is None:
            start = at
    if start is not None:
        _write(fd, data[start:], offset + start)


def write_delta(delta: Delta, fd: int) -> None:
    """Writes a delta into an empty file. The caller syncs and renames."""
    header = _HEADER.pack(_MAGIC, 1, PAGE, delta.size, len(delta.offsets), len(delta.zero_offsets))
    table = b"".join(part.tobytes() for part in (delta.offsets, delta.lengths, delta.zero_offsets, delta.zero_lengths))
    _write(fd, memoryview(header + table), 0)
    if delta.data is not None:
        with memoryview(delta.data) as data:
            _write(fd, data[delta.start : delta.start + delta.bytes], _data_start(len(header) + len(table)))
    else:
        os.ftruncate(fd, _data_start(len(header) + len(table)))


def _data_start(length: int) -> int:
    return -(-length // PAGE) * PAGE


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data[: 64 << 20], offset)
        data, offset = data[done:], offset + done


def read_delta(fd: int) -> Delta:
    """Maps a delta's file. A file that is not one, or not whole, is :class:`HostError` ``delta_damaged``."""

    def damaged(why: str) -> HostError:
        return HostError("delta_damaged", f"the memory of a snapshot is damaged: {why}", "boot from the snapshot's disk")

    length = os.fstat(fd).st_size
    head = os.pread(fd, _HEADER.size, 0)
    if len(head) < _HEADER.size:
        raise damaged("too short")
    magic, version, page, size, runs, zeros = _HEADER.unpack(head)
    if magic != _MAGIC or version != 1 or page != PAGE or max(runs, zeros) > _MOST_RUNS:
        raise damaged("not a delta of this version and page size")
    table = os.pread(fd, 16 * (runs + zeros), _HEADER.size)
    if len(table) != 16 * (runs + zeros):
        raise damaged("the list of its runs is cut off")
    delta = Delta(size)
    at = 0
    for part, count in ((delta.offsets, runs), (delta.lengths, runs), (delta.zero_offsets, zeros), (delta.zero_lengths, zeros)):
        part.frombytes(table[at : at + 8 * count])
        at += 8 * count
    for offsets, lengths in ((delta.offsets, delta.lengths), (delta.zero_offsets, delta.zero_lengths)):
        before = 0
        for offset, count in zip(offsets, lengths, strict=True):
            if offset < before or not 0 < count <= LONGEST or offset % PAGE or count % PAGE or offset + count > size:
                raise damaged("its runs are not in order")
            before = offset + count
    delta.start = _data_start(_HEADER.size + len(table))
    if length < delta.start + delta.bytes:
        raise damaged("its content is cut off")
    if runs:
        delta.data = mmap.mmap(fd, length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return delta
