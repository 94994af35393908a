"""Locks between processes: flock(2) on files that are never removed, and on directories that are.

The kernel drops a lock when its last descriptor closes, however the process ended, so there is nothing stale to clean up. A lock
*file* stays where it is for good: removing it would let two processes hold "the same" lock on two inodes. Waiting is a
non-blocking try every 50 ms, which needs no thread and can be cancelled.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

__all__ = ["hold_directory", "locked", "tried", "try_flock"]

POLL = 0.05


def try_flock(fd: int) -> bool:
    """Takes the exclusive lock of an open file, or says that another holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


@asynccontextmanager
async def locked(path: Path, on_wait: Callable[[], None] | None = None) -> AsyncIterator[None]:
    """Holds the lock of ``path`` (created if need be) between processes. ``on_wait`` is called once if another holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if not try_flock(fd):
            if on_wait is not None:
                on_wait()
            while not try_flock(fd):  # noqa: ASYNC110 (another process frees it: there is no event to wait for)
                await asyncio.sleep(POLL)
        yield
    finally:
        os.close(fd)


def hold_directory(path: Path) -> int | None:
    """Locks an existing directory itself and returns its descriptor, or None if another holds it or it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        # Between our open and our lock its owner may have removed it: then what we hold is no longer what the path names.
        if try_flock(fd) and os.path.lexists(path) and os.fstat(fd).st_ino == os.lstat(path).st_ino:
            return fd
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


@contextmanager
def tried(path: Path) -> Iterator[bool]:
    """Holds the lock of ``path`` if nobody else does, and says whether it does. Never waits."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield try_flock(fd)
    finally:
        os.close(fd)
