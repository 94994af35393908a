"""Volumes as files: raw, sparse ext4 images made by mke2fs. Whoever calls owns the names and has written them down.

A volume that a guest has written to is hostile content: its file system is mounted by guests only, never read by this host, but for
two flags of its superblock. Making one is not on the way of a sandbox's create.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path

from stoker.errors import HostError
from stoker.host.durable import sync_directory
from stoker.host.ext4 import empty_command, needs_recovery
from stoker.host.run import run

__all__ = ["grow_volume", "is_dirty", "make_volume", "size_of", "used_bytes"]


async def make_volume(path: Path, size: int) -> None:
    """Makes an empty volume of ``size`` bytes (whole MiB). ``path`` must not exist; after a failure it may, and is the caller's."""
    await asyncio.to_thread(_sparse, path, size)
    await run(empty_command(path, size, str(uuid.uuid4())))
    # An empty volume is empty: programs that want an empty directory for their data look. e2fsck makes it anew if it needs it.
    await run(["debugfs", "-w", "-R", "rmdir lost+found", path])
    await asyncio.to_thread(_sync, path)


def _sparse(path: Path, size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_directory(path.parent)


def grow_volume(path: Path, size: int) -> None:
    """A larger file. Its file system is grown by the guest that has it mounted, or mounts it next."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_size > size:
            raise HostError("volume_larger", f"{path} is larger than {size} bytes already")
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)


def is_dirty(path: Path) -> bool:
    """Its last user did not unmount it: what it wrote is whole once the next writer has mounted it, and not before."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return needs_recovery(fd)
    finally:
        os.close(fd)


def size_of(path: Path) -> int:
    """Bytes as a guest sees it; 0 when it is not there."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def used_bytes(path: Path) -> int:
    """What it takes on the host's disk; 0 when it is not there."""
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
