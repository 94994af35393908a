"""Loop devices by ioctl: attach (``LOOP_CONFIGURE``), find by the file behind them, detach.

A device is locked (flock) before it is configured, which keeps udev's probes away and settles races between processes, and what
it says it has behind it (device and inode) is compared with what was meant. With ``autoclear`` the kernel detaches it when nobody
has it open any more, so a crash between two steps leaves nothing. Device nodes are made where no udev does it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import CapacityExhausted, HostError
from stoker.host.lock import try_flock

__all__ = ["Loop", "attach", "backing_of", "detach", "find", "listed", "opened", "refresh_size"]

CONTROL = "/dev/loop-control"
BLOCKS = "/sys/block"
LOOP_CLR_FD, LOOP_GET_STATUS64, LOOP_SET_CAPACITY, LOOP_CONFIGURE, LOOP_CTL_GET_FREE = 0x4C01, 0x4C05, 0x4C07, 0x4C0A, 0x4C82
READ_ONLY, AUTOCLEAR, DIRECT_IO = 1, 4, 16
_INFO = struct.Struct("=5Q4I64s64s32s2Q")
"""struct loop_info64: device, inode, rdevice, offset, sizelimit, number, encryption (2), flags, names, key, init."""
_CONFIG = struct.Struct(f"=2I{_INFO.size}s64x")
TRIES = 64
MAJOR = 7


@dataclass(frozen=True, slots=True)
class Loop:
    """An attached loop device. ``device`` and ``inode`` are of the file behind it (``st_dev``, ``st_ino``)."""

    number: int
    device: int
    inode: int
    read_only: bool

    @property
    def path(self) -> Path:
        return Path(f"/dev/loop{self.number}")

    def is_on(self, path: Path) -> bool:
        """Whether it is exactly this file that is behind it."""
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (self.device, self.inode) == (found.st_dev, found.st_ino)


def _decoded(device: int) -> int:
    """The kernel's wire form of a device number (new_encode_dev) as ``st_dev``."""
    return os.makedev((device >> 8) & 0xFFF, (device & 0xFF) | ((device >> 12) & 0xFFF00))


def _open_node(number: int, read_only: bool) -> int:
    path = f"/dev/loop{number}"
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(MAJOR, number))
        fd = os.open(path, flags)
    found = os.fstat(fd)
    if not stat.S_ISBLK(found.st_mode) or found.st_rdev != os.makedev(MAJOR, number):
        os.close(fd)
        raise HostError("loop_foreign", f"{path} is not loop device {number}", f"rm {path}")
    return fd


def _status(fd: int) -> Loop | None:
    """What is behind an open loop device; None when nothing is."""
    buffer = bytearray(_INFO.size)
    try:
        fcntl.ioctl(fd, LOOP_GET_STATUS64, buffer)
    except OSError as e:
        if e.errno == errno.ENXIO:
            return None
        raise
    device, inode, _, _, _, number, _, _, flags, *_ = _INFO.unpack(buffer)
    return Loop(number, _decoded(device), inode, bool(flags & READ_ONLY))


def backing_of(number: int) -> Loop | None:
    """What is attached to ``/dev/loopN``; None when nothing is."""
    try:
        fd = _open_node(number, read_only=True)
    except OSError as e:
        if e.errno in (errno.ENXIO, errno.ENOENT, errno.ENODEV):
            return None
        raise
    try:
        return _status(fd)
    finally:
        os.close(fd)


def listed() -> Iterator[tuple[int, str]]:
    """Attached loop devices: number and the name of the file behind (as sysfs gives it)."""
    for number in sorted(int(name[4:]) for name in os.listdir(BLOCKS) if name.startswith("loop") and name[4:].isdigit()):
        try:
            with open(f"{BLOCKS}/loop{number}/loop/backing_file", "rb") as file:
                name = os.fsdecode(file.read()).rstrip("\n")
        except OSError as e:
            if e.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
                continue  # free, or detached meanwhile
            raise
        yield number, name


def find(path: Path) -> list[Loop]:
    """The loop devices that have exactly this file behind them."""
    if not path.exists():
        return []
    found = (backing_of(number) for number, name in listed())
    return [loop for loop in found if loop is not None and loop.is_on(path)]


def _free_number(control: int) -> int:
    return fcntl.ioctl(control, LOOP_CTL_GET_FREE)


def _configure(fd: int, backing: int, flags: int) -> None:
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, b"", b"", b"", 0, 0)
    fcntl.ioctl(fd, LOOP_CONFIGURE, _CONFIG.pack(backing, 0, info))


def _exhausted(path: Path, reason: str | None) -> CapacityExhausted:
    return CapacityExhausted(
        "loops_exhausted",
        f"no loop device is free for {path}: {reason or 'all are taken'}",
        "losetup -a lists them; stoker fsck names those of nobody",
    )


@contextmanager
def opened(path: Path, *, read_only: bool = False, direct: bool = False, autoclear: bool = True) -> Iterator[Loop]:
    """A loop device on a file, held open meanwhile. With ``autoclear`` it lasts beyond the block only while somebody else (a mount,
    a device-mapper table) has it open. ``direct``: no second page cache, where the file system can do that.

    Errors: ``loops_exhausted`` (CapacityExhausted), ``file_unusable``, ``loop_refused`` (HostError).
    """
    try:
        backing = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as e:
        raise HostError("file_unusable", f"{path}: {e.strerror}", details={"path": str(path)}) from None
    try:
        flags = READ_ONLY * read_only | AUTOCLEAR * autoclear | DIRECT_IO * direct
        fd, loop = _take(path, backing, flags)
    finally:
        os.close(backing)
    try:
        yield loop
    finally:
        os.close(fd)


def attach(path: Path, *, read_only: bool = False, direct: bool = False) -> Loop:
    """A loop device on a file that stays until it is detached."""
    with opened(path, read_only=read_only, direct=direct, autoclear=False) as loop:
        return loop


def _take(path: Path, backing: int, flags: int) -> tuple[int, Loop]:
    try:
        control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise HostError(
            "loop_refused", f"{CONTROL}: {e.strerror}", "loop devices need root, and the kernel's loop driver"
        ) from None
    try:
        for attempt in range(TRIES):
            try:
                fd = _open_node(_free_number(control), bool(flags & READ_ONLY))
            except OSError as e:
                raise _exhausted(path, e.strerror) from None
            try:
                loop = _try_configure(fd, path, backing, flags)
            except BaseException:
                os.close(fd)
                raise
            if loop is not None:
                return fd, loop
            os.close(fd)
            time.sleep(0.001 * attempt)  # another process took this number
        raise _exhausted(path, None)
    finally:
        os.close(control)


def _try_configure(fd: int, path: Path, backing: int, flags: int) -> Loop | None:
    """None: somebody else has it."""
    if not try_flock(fd):
        return None
    try:
        _configure(fd, backing, flags)
    except OSError as e:
        if e.errno == errno.EBUSY:
            return None
        if e.errno == errno.EINVAL and flags & DIRECT_IO:
            _configure(fd, backing, flags & ~DIRECT_IO)
        else:
            raise HostError("loop_refused", f"no loop device for {path}: {e.strerror}") from None
    loop, meant = _status(fd), os.fstat(backing)
    if loop is None or (loop.device, loop.inode) != (meant.st_dev, meant.st_ino):
        raise HostError("loop_foreign", f"the loop device for {path} was taken by somebody else", "try again")
    fcntl.flock(fd, fcntl.LOCK_UN)
    return loop


def detach(loop: Loop, *, timeout: float = 10.0) -> None:
    """Detaches exactly this: a number that meanwhile has another file behind it is left alone. Twice is fine.

    Raises ``loop_busy`` (HostError) when it is in use after ``timeout`` seconds; the kernel then detaches it with its last user.
    """
    deadline = time.monotonic() + timeout
    while (now := backing_of(loop.number)) is not None and (now.device, now.inode) == (loop.device, loop.inode):
        fd = _open_node(loop.number, read_only=True)
        try:
            fcntl.ioctl(fd, LOOP_CLR_FD)
        except OSError as e:
            if e.errno not in (errno.ENXIO, errno.EBUSY):
                raise
        finally:
            os.close(fd)
        if time.monotonic() > deadline:
            raise HostError("loop_busy", f"{loop.path} is in use", f"lsblk {loop.path} says by whom")
        if backing_of(loop.number) is not None:
            time.sleep(0.01)


def refresh_size(loop: Loop) -> None:
    """Lets the device see that its file has grown."""
    fd = _open_node(loop.number, loop.read_only)
    try:
        fcntl.ioctl(fd, LOOP_SET_CAPACITY)
    finally:
        os.close(fd)
