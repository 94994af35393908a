"""A file system of a pool's own: XFS in a sparse file, mounted through a loop device.

``POOLS/NAME.xfs`` is the file, ``POOLS/NAME`` the directory it is mounted on (empty, and nobody writes there while nothing is). The
loop device bypasses the page cache of the file (no second copy of what the file system caches) and goes with the mount; what is
deleted inside is given back to the host (``discard``). A reboot takes loop device and mount away and leaves the file.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from stoker.errors import Conflict, HostError, InvalidRequest
from stoker.host import loop
from stoker.host.mounts import mount, mounted_at, umount
from stoker.host.run import run
from stoker.host.trace import declare, trace
from stoker.storage.layout import no_space

__all__ = ["ATTACH", "LEAST", "MAKE", "attach", "detach", "is_attached", "make"]

MAKE = declare("pool.after_file", "pool.after_mkfs", "pool.after_link", "pool.after_name")
ATTACH = declare("pool.after_point", "pool.after_loop", "pool.after_mount")

LEAST = 320 << 20
"""What mkfs.xfs takes at least, and a little."""
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME = 2, 4, 8, 1024


async def make(image: Path, size: int) -> None:
    """Makes the file with an empty file system of ``size`` bytes in it; it takes no space until something is in there.

    Errors: ``pool_exists`` (Conflict), ``pool_too_small`` (InvalidRequest), ``tool_failed`` (HostError), ``no_space``.
    """
    if size < LEAST:
        raise InvalidRequest("pool_too_small", f"{size} bytes are too few for a pool", f"--size {LEAST >> 20}M or more")
    if image.exists():
        raise Conflict("pool_exists", f"there is a pool {image.stem} already", f"stoker pool rm {image.stem}")
    temporary = image.with_name(f".{image.name}.{os.getpid()}")
    try:
        with no_space():
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.ftruncate(fd, size)
            finally:
                os.close(fd)
        trace("pool.after_file")
        await run(["mkfs.xfs", "-q", "-m", "reflink=1,crc=1", "-L", "stoker-pool", temporary], timeout=120)
        trace("pool.after_mkfs")
        os.link(temporary, image)
        trace("pool.after_link")
    except FileExistsError:
        raise Conflict("pool_exists", f"there is a pool {image.stem} already", f"stoker pool rm {image.stem}") from None
    finally:
        temporary.unlink(missing_ok=True)
    trace("pool.after_name")


def is_attached(image: Path, point: Path) -> bool:
    """Whether exactly this file is what is mounted there. Something else is ``pool_foreign`` (HostError)."""
    found = mounted_at(point)
    if found is None:
        return False
    behind, meant = loop.backing_of(os.minor(found.device)) if os.major(found.device) == loop.MAJOR else None, os.stat(image)
    if behind is None or (behind.device, behind.inode) != (meant.st_dev, meant.st_ino):
        raise HostError("pool_foreign", f"{found.source} is mounted on {point}, not {image}", f"umount {point}")
    return True


def attach(image: Path, point: Path) -> None:
    """Mounts the file system, unless it is. Errors: ``pool_damaged``, ``pool_not_empty``, ``loops_exhausted``, ``loop_refused``."""
    if is_attached(image, point):
        return
    point.mkdir(mode=0o711, exist_ok=True)
    trace("pool.after_point")
    if os.listdir(point):
        raise HostError("pool_not_empty", f"{point}, where the pool is to be mounted, holds files", f"move them away: ls {point}")
    # Two loop devices on one file would be two file systems that do not know of each other.
    for found in loop.find(image):
        loop.detach(found)
    with loop.opened(image, direct=True) as device:
        trace("pool.after_loop")
        try:
            mount(device.path, point, "xfs", flags=MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME, options="discard")
        except OSError as e:
            hint = f"xfs_repair {image}" if e.errno != errno.ENODEV else "this kernel has no XFS: modprobe xfs"
            raise HostError("pool_damaged", f"the pool {image} cannot be mounted: {e.strerror}", hint) from None
    trace("pool.after_mount")
    os.chmod(point, 0o711)


def detach(point: Path) -> bool:
    """Unmounts; the loop device goes along. False: it is in use and stays."""
    if mounted_at(point) is None:
        return True
    try:
        umount(point)
    except OSError as e:
        if e.errno == errno.EBUSY:
            return False
        raise
    return True
