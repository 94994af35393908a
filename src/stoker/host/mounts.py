"""Mounting and unmounting by system call, and the table of what is mounted."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mount", "mount", "mounted_at", "mounts", "umount"]

MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. ``device`` is ``st_dev`` of what is mounted, ``source`` what it was mounted from."""

    point: Path
    device: int
    fstype: str
    source: str


def _plain(word: bytes) -> str:
    """Spaces and the like are written in octal."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), word).decode(errors="surrogateescape")


def mounts() -> Iterator[Mount]:
    """Everything mounted in this process's namespace, in the order of the kernel's table."""
    with open("/proc/self/mountinfo", "rb") as table:
        lines = table.read().splitlines()
    for line in lines:
        words, _, rest = line.partition(b" - ")
        fields, (fstype, source, *_) = words.split(), rest.split(b" ")
        major, _, minor = fields[2].partition(b":")
        yield Mount(Path(_plain(fields[4])), os.makedev(int(major), int(minor)), fstype.decode(), _plain(source))


def mounted_at(path: Path) -> Mount | None:
    """What is mounted exactly there; of several on top of each other the uppermost."""
    wanted = Path(os.path.realpath(path))
    return next((found for found in reversed(list(mounts())) if found.point == wanted), None)


def _check(result: int, path: Path) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))


def mount(source: Path, point: Path, fstype: str, *, flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = [os.fsencode(source), os.fsencode(point), fstype.encode()]
    _check(libc.mount(*words, ctypes.c_ulong(flags), options.encode()), point)


def umount(point: Path, *, lazily: bool = False) -> None:
    """umount2(2). ``lazily``: also when it is in use. Raises OSError (EBUSY, EINVAL when nothing is mounted there)."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.umount2(os.fsencode(point), UMOUNT_NOFOLLOW | (MNT_DETACH if lazily else 0)), point)
