"""The memory of a machine apart from its VMM: a base file that many machines map privately, and what one of them has changed.

A *base* is a sealed memory file (:func:`sealed`): nobody who maps it can write it, punch holes into it or change its size,
whatever a guest makes its VMM do. A machine maps it copy-on-write; :func:`capture` takes the pages that differ, :func:`inject` puts
them into another machine over the same base. A *delta* is flat: always against the base, never against another delta. All functions
block.

The *empty* base (:func:`empty_memory`) is for a machine that boots: all zeros, and no file. (A sealed memory file of holes would
fill: a private mapping's first write to a page reads that page of the file first, and a memory file keeps what was read.)

The module knows a process and its files, not which VMM it is: whatever lies in the guest's range of addresses is looked at. An
anonymous mapping there (a balloon's) hides the base, so its absent pages are zeros, and are recorded as such.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from stoker.errors import GuestError, HostError
from stoker.host.pagemap import PAGE, Mapping, absent_runs, file_mappings, mappings_within, private_runs
from stoker.host.process_memory import LONGEST, read_runs, write_runs

__all__ = [
    "Delta",
    "Scratch",
    "capture",
    "changed_bytes",
    "is_sealed",
    "empty_memory",
    "inject",
    "new_memory",
    "sealed",
]

KEPT: Final = 64 << 20
_BATCH: Final = 16 << 20
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_libc: Final = ctypes.CDLL(None)
_zeros: Final = mmap.mmap(-1, LONGEST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
_NOTHING: Final = ctypes.addressof(ctypes.c_char.from_buffer(_zeros))
"""The address of `LONGEST` zeros: they are only read, so all of them are one page."""


def new_memory(name: str, size: int) -> int:
    """An empty memory file of ``size`` bytes for the machine that makes a base; the caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def empty_memory() -> int:
    """The empty base, of any size: private mappings of it are anonymous memory, and known by the device all the same."""
    return os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)


def sealed(fd: int) -> int:
    """Makes a memory file a base: for ever as it is now. Refused while anybody maps it writable and shared."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as e:
        raise HostError(
            "memory_in_use", f"the memory cannot be made read-only: {e.strerror}", "its machine has to end first"
        ) from None
    return fd


class Scratch:
    """Memory of ours that was touched already: copying into fresh pages is three to twenty times slower. Grows, never shrinks."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None

    def keep(self, used: int, size: int) -> None:
        """Grows to ``size`` bytes and keeps the first ``used``."""
        if self._map is None or len(self._map) < size:
            former = self._map
            self._map = None
            self.reserve(size if former is None else max(size, 2 * len(former)))
            if former is not None:
                self.put(0, address_of(former), used)

    def put(self, at: int, address: int, size: int) -> None:
        """Copies memory of ours to the offset ``at``."""
        assert self._map is not None and at + size <= len(self._map)
        ctypes.memmove(address_of(self._map) + at, address, size)

    def reserve(self, size: int) -> tuple[mmap.mmap, int]:
        """At least ``size`` bytes: the map and its address."""
        if self._map is None or len(self._map) < size:
            length = max(16 << 20, -(-size * 5 // 4 // PAGE) * PAGE)
            self._map = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        return self._map, address_of(self._map)

    def trim(self) -> None:
        """Gives back what only a large machine needed."""
        if self._map is not None and len(self._map) > KEPT:
            self._map = None


def address_of(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@dataclass(slots=True)
class Delta:
    """What a machine changed: runs of guest memory (offsets and lengths in bytes, ascending, whole pages), their content one after
    the other at the start of ``data``, and runs that are zeros now."""

    size: int
    """Bytes of guest memory."""
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    zero_offsets: array[int] = field(default_factory=lambda: array("Q"))
    zero_lengths: array[int] = field(default_factory=lambda: array("Q"))
    data: mmap.mmap | None = None
    start: int = 0
    """Where in ``data`` the content begins."""

    @property
    def bytes(self) -> int:
        return sum(self.lengths)


def _guest_range(pid: int, base: os.stat_result, size: int) -> tuple[int, int]:
    """Where a process has the guest's memory: the addresses of its first byte and behind its last."""
    parts = [m for m in file_mappings(pid, base.st_dev, base.st_ino) if m.private]
    starts = {m.start - m.offset for m in parts}
    if len(starts) != 1:
        raise GuestError("memory_unknown", f"process {pid} does not map the memory it was started from in one piece")
    start = starts.pop()
    return start, start + size


def _size(base: os.stat_result, size: int) -> int:
    """Bytes of guest memory: a file says it, the empty base is of any size."""
    if stat.S_ISREG(base.st_mode):
        return base.st_size
    if not size:
        raise ValueError("the empty base has no size of its own")
    return size


def _parts(pid: int, base: os.stat_result, size: int) -> tuple[int, list[tuple[Mapping, int, int]]]:
    """The guest's first address, and every mapping in its range with the addresses that count of it. There must be no gap."""
    start, end = _guest_range(pid, base, size)
    parts, at = [], start
    for mapping in mappings_within(pid, start, end):
        low, high = max(mapping.start, start), min(mapping.end, end)
        known = mapping.inode in (0, base.st_ino) and mapping.private
        if low != at or not known:
            raise GuestError("memory_unknown", f"process {pid} has something else in the middle of its guest's memory")
        parts.append((mapping, low, high))
        at = high
    if at != end:
        raise GuestError("memory_unknown", f"process {pid} maps only a part of its guest's memory")
    return start, parts


def _append(offsets: array[int], lengths: array[int], starts: Iterable[int], ends: Iterable[int], origin: int) -> None:
    for start, end in zip(starts, ends, strict=True):
        while end - start > LONGEST:
            offsets.append(start - origin)
            lengths.append(LONGEST)
            start += LONGEST
        offsets.append(start - origin)
        lengths.append(end - start)


def _changed(pid: int, base: os.stat_result, size: int) -> tuple[int, Delta]:
    size = _size(base, size)
    origin, parts = _parts(pid, base, size)
    delta = Delta(size)
    _append(delta.offsets, delta.lengths, *private_runs(pid, [(low, high) for _, low, high in parts]), origin)
    for mapping, low, high in parts:
        if not mapping.inode and stat.S_ISREG(base.st_mode):
            _append(delta.zero_offsets, delta.zero_lengths, *absent_runs(pid, low, high), origin)
    return origin, delta


def changed_bytes(pid: int, base: int, size: int = 0) -> int:
    """How much the process differs from the base (a descriptor) now; the guest may be running. ``size``: of the empty base."""
    return _changed(pid, os.fstat(base), size)[1].bytes


def capture(pid: int, base: int, scratch: Scratch, size: int = 0, *, zeros: bool = False) -> Delta:
    """Everything in which the guest's memory differs from its base. The guest must be stopped.

    The content is in ``scratch`` and good until that is used again. ``size``: bytes of memory, where the base is the empty one.
    With ``zeros``, changed pages that are zeros are no data: they become zero runs, and where the base has zeros as well nothing at
    all. That takes longer (each changed byte is looked at), and pays for a guest that filled its free memory with zeros before
    (``drop_caches`` of :class:`stoker.guest.copies.BeforeSnapshot`).
    """
    origin, delta = _changed(pid, os.fstat(base), size)
    if zeros:
        return _without_zeros(pid, base, origin, delta, scratch)
    delta.data, address = scratch.reserve(delta.bytes)
    starts = array("Q", (origin + offset for offset in delta.offsets))
    read_runs(pid, starts, delta.lengths, address)
    return delta


def _zero_ranges(address: int, length: int, found: list[tuple[int, int]], origin: int = 0, step: int = LONGEST) -> None:
    """Adds the ranges of whole pages of zeros in our memory (its offset is ``origin``) to ``found``; neighbours become one."""
    for at in range(0, length, step):
        size = min(step, length - at)
        if not _libc.memcmp(ctypes.c_void_p(address + at), ctypes.c_void_p(_NOTHING), ctypes.c_size_t(size)):
            start = origin + at
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, origin + at + size))
        elif size > PAGE:
            _zero_ranges(address + at, size, found, origin + at, max(PAGE, step // 16))


def _between(ranges: list[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """What some ranges, in order, leave of a larger one."""
    for low, high in [*ranges, (end, end)]:
        if low > start:
            yield start, low
        start = high


def _batches(offsets: array[int], lengths: array[int]) -> Iterator[tuple[int, int]]:
    """The runs in groups of at most `_BATCH` bytes: the numbers of the first and behind the last."""
    first = size = 0
    for number, length in enumerate(lengths):
        if size + length > _BATCH:
            yield first, number
            first, size = number, 0
        size += length
    if first < len(offsets):
        yield first, len(offsets)


def _without_zeros(pid: int, base: int, origin: int, delta: Delta, scratch: Scratch) -> Delta:
    kept, zeros, used = Delta(delta.size), list(zip(delta.zero_offsets, delta.zero_lengths, strict=True)), 0
    zeros = [(offset, offset + length) for offset, length in zeros]
    with mmap.mmap(-1, _BATCH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as stage:
        source = address_of(stage)
        for first, last in _batches(delta.offsets, delta.lengths):
            lengths = delta.lengths[first:last]
            read_runs(pid, array("Q", (origin + offset for offset in delta.offsets[first:last])), lengths, source)
            scratch.keep(used, used + sum(lengths))
            at = 0
            for offset, length in zip(delta.offsets[first:last], lengths, strict=True):
                blank: list[tuple[int, int]] = []
                _zero_ranges(source + at, length, blank)
                for start, end in _between(blank, 0, length):
                    kept.offsets.append(offset + start)
                    kept.lengths.append(end - start)
                    scratch.put(used, source + at + start, end - start)
                    used += end - start
                zeros += ((offset + start, offset + end) for start, end in blank)
                at += length
        differing = [part for start, end in sorted(zeros) for part in _not_zero(base, start, end, source)]
    _append(kept.zero_offsets, kept.zero_lengths, (start for start, _ in differing), (end for _, end in differing), 0)
    kept.data, _ = scratch.reserve(used)
    return kept


def _not_zero(base: int, start: int, end: int, stage: int) -> Iterator[tuple[int, int]]:
    """Where the base has anything but zeros between two offsets. ``stage`` is memory of ours, of `_BATCH` bytes."""
    if not stat.S_ISREG(os.fstat(base).st_mode):
        return  # the empty base
    while start < end:
        try:
            start = os.lseek(base, start, os.SEEK_DATA) // PAGE * PAGE
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            return  # nothing but a hole up to the end
        size = min(end - start, _BATCH)
        if size <= 0:
            return
        view = (ctypes.c_char * size).from_address(stage)
        if os.preadv(base, [view], start) != size:
            raise HostError("memory_unreachable", "the base of a machine's memory is shorter than it was")
        blank: list[tuple[int, int]] = []
        _zero_ranges(stage, size, blank, start)
        yield from _between(blank, start, start + size)
        start += size


def inject(pid: int, base: int, delta: Delta) -> None:
    """Gives a machine over the same base, which has not run yet, the memory of another."""
    status = os.fstat(base)
    size = _size(status, delta.size)
    if delta.size != size:
        raise HostError("memory_mismatch", f"the delta is of {delta.size} bytes of memory, the base of {size}")
    origin, _ = _parts(pid, status, size)
    if delta.data is not None and len(delta.offsets):
        write_runs(
            pid, array("Q", (origin + offset for offset in delta.offsets)), delta.lengths, address_of(delta.data) + delta.start
        )
    if len(delta.zero_offsets):
        for offset, length in zip(delta.zero_offsets, delta.zero_lengths, strict=True):
            write_runs(pid, array("Q", (origin + offset,)), array("Q", (length,)), _NOTHING)


def is_sealed(fd: int) -> bool:
    """Whether a descriptor is of a sealed memory file: then nobody can have changed it since it was a base."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False
