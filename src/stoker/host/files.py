"""Whole trees of files: removing one, its size, its checksums. A removal never leaves the file system it began on."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from stoker.host.mounts import mounts

__all__ = ["allocated", "mounts_below", "remove_tree", "tree_sums"]


def mounts_below(path: Path) -> list[Path]:
    """The mount points at or below a path, the innermost first."""
    wanted = os.path.realpath(path)
    found = [mount.point for mount in mounts()]
    return [point for point in found if str(point) == wanted or str(point).startswith(f"{wanted}/")][::-1]


def remove_tree(path: Path) -> None:
    """Removes a tree of our own, what is in directories without write permission included.

    Nothing is mounted below it, or it is refused (EBUSY) before anything is removed. Raises :class:`PermissionError` when something
    in it belongs to another user.
    """
    if mounts := mounts_below(path):
        raise OSError(errno.EBUSY, "something is mounted there", str(mounts[0]))
    _remove(path, os.lstat(path).st_dev)


def _remove(path: Path, device: int) -> None:
    if os.lstat(path).st_dev != device:
        raise OSError(errno.EBUSY, "something is mounted there", str(path))
    with os.scandir(path) as items:
        found = list(items)
    mode = os.lstat(path).st_mode
    if found and mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(path, stat.S_IRWXU)
    for item in found:
        if item.is_dir(follow_symlinks=False):
            try:
                _remove(Path(item.path), device)
            except PermissionError:
                # Not even readable: make it so, if it is ours.
                os.chmod(item.path, stat.S_IRWXU)
                _remove(Path(item.path), device)
        else:
            os.unlink(item.path)
    os.rmdir(path)


def allocated(path: Path) -> int:
    """Bytes of the disk that a file or a tree takes: its blocks, not its length; a file with several names counts once.

    What vanishes meanwhile counts as nothing. What a reflink shares with another file counts for both.
    """
    seen: set[tuple[int, int]] = set()

    def measure(place: str | Path) -> int:
        try:
            found = os.lstat(place)
            inside = list(os.scandir(place)) if stat.S_ISDIR(found.st_mode) else []
        except (FileNotFoundError, PermissionError):
            return 0
        key = (found.st_dev, found.st_ino)
        if key in seen:
            return 0
        seen.add(key)
        return found.st_blocks * 512 + sum(measure(item.path) for item in inside)

    return measure(path)


def tree_sums(tree: Path, *, without: Collection[str] = ()) -> list[tuple[str, str]]:
    """The regular files of a tree with their SHA-256, sorted; ``without`` are names at the top that do not count."""
    sums = []
    for name, path in _files(tree):
        if name not in without:
            with open(path, "rb") as file:
                sums.append((name, hashlib.file_digest(file, "sha256").hexdigest()))
    return sums


def _files(tree: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    with os.scandir(tree) as items:
        found = sorted(items, key=lambda item: item.name)
    for item in found:
        if item.is_dir(follow_symlinks=False):
            yield from _files(Path(item.path), f"{prefix}{item.name}/")
        elif item.is_file(follow_symlinks=False):
            yield f"{prefix}{item.name}", Path(item.path)
