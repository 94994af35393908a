"""Files and directories that are whole or not there: written beside their place, synced, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["begin_writing", "sync_directory", "sync_filesystem", "whole_directory", "write_atomically", "write_synced"]


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_filesystem(path: Path) -> None:
    """Makes everything below ``path`` durable with one syncfs(2): a tree of a thousand small files would need as many fsyncs."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)


def begin_writing(fd: int, offset: int, length: int) -> None:
    """Has the kernel begin to put a part of a file onto the disk, so that less is left for an fsync. A hint: errors are nothing."""
    import ctypes

    ctypes.CDLL(None).sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), 2)  # SYNC_FILE_RANGE_WRITE


@contextmanager
def whole_directory(directory: Path, staging: Path) -> Iterator[Path]:
    """Makes ``directory``, which must not exist: what the caller writes (and syncs) in ``staging``, on the same file system, is
    there when the block ends, and nothing when it fails. What a crash left at ``staging`` goes first."""
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700)
    made = staging
    try:
        yield staging
        sync_directory(staging)
        os.rename(staging, directory)
        made = directory
        sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file whose directory is synced by the caller."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replaces ``path`` with ``data``; a reader sees the old file or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
