"""Files that share blocks (FICLONE), and copies that keep holes."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["copy_range", "data_ranges", "share", "shares", "sparse_copy"]

FICLONE = 0x40049409
STEP = 4 << 20
AHEAD = 4 * STEP
ZERO = bytes(64 << 10)
_NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
"""What copy_file_range says of two files it cannot copy between."""


def share(source: int, target: int) -> None:
    """Makes ``target`` (an open, empty file) the same as ``source``, block for block shared. OSError: EOPNOTSUPP, EXDEV, EINVAL."""
    fcntl.ioctl(target, FICLONE, source)


def shares(directory: Path) -> bool:
    """Whether files of this directory can share blocks; tried, with two files that have no name."""
    with tempfile.TemporaryFile(dir=directory) as source, tempfile.TemporaryFile(dir=directory) as target:
        source.write(b"stoker" * 1024)
        source.flush()
        try:
            share(source.fileno(), target.fileno())
        except OSError as e:
            if e.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EXDEV, errno.ENOSYS, errno.EPERM):
                return False
            raise
        return True


def data_ranges(fd: int, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Where a file has data: (offset, length), ascending, within [start, end)."""
    if end is None:
        end = os.fstat(fd).st_size
    while start < end:
        try:
            begin = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return  # a hole up to the end
            raise
        if begin >= end:
            return
        start = min(os.lseek(fd, begin, os.SEEK_HOLE), end)
        yield begin, start - begin


def copy_range(source: int, offset: int, length: int, target: int, at: int) -> None:
    """Copies bytes between open files: in the kernel where it can, else by reading, which leaves out blocks of zeros.

    ``target`` has a hole there. A source that ends early leaves the rest as it is.
    """
    if not stat.S_ISBLK(os.fstat(source).st_mode):
        while length:
            try:
                done = os.copy_file_range(source, target, length, offset, at)
            except OSError as e:
                if e.errno not in _NOT_HERE:
                    raise
                break
            if not done:
                return
            offset, at, length = offset + done, at + done, length - done
    _copy_by_reading(source, offset, length, target, at)


def _copy_by_reading(source: int, offset: int, length: int, target: int, at: int) -> None:
    while length:
        data = os.pread(source, min(STEP, length), offset)
        if not data:
            return
        if length > len(data):
            # The disk goes on reading while this is written.
            os.posix_fadvise(source, offset + len(data), min(AHEAD, length - len(data)), os.POSIX_FADV_WILLNEED)
        for begin, end in _data_in(data):
            _write_all(target, memoryview(data)[begin:end], at + begin)
        offset, at, length = offset + len(data), at + len(data), length - len(data)


def _data_in(data: bytes) -> Iterator[tuple[int, int]]:
    """Where there is anything but blocks of zeros: (start, end), ascending, neighbours as one."""
    start = None
    for begin in range(0, len(data), len(ZERO)):
        blank = data[begin : begin + len(ZERO)] == ZERO[: len(data) - begin]
        if blank and start is not None:
            yield start, begin
            start = None
        elif not blank and start is None:
            start = begin
    if start is not None:
        yield start, len(data)


def _write_all(fd: int, view: memoryview, at: int) -> None:
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def sparse_copy(source: int, target: int, length: int | None = None) -> None:
    """The first ``length`` bytes of a file or block device (all: None) into an empty file: what was a hole stays one."""
    if length is None:
        length = os.lseek(source, 0, os.SEEK_END)
    if stat.S_ISBLK(os.fstat(source).st_mode):
        _copy_by_reading(source, 0, length, target, 0)
    else:
        for offset, size in data_ranges(source, 0, length):
            copy_range(source, offset, size, target, offset)
    os.ftruncate(target, length)
