"""Whole trees of files: removing one, and the checksums of one."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

__all__ = ["remove_tree", "tree_sums"]


def remove_tree(path: Path) -> None:
    """Removes a tree of our own, what is in directories without write permission included.

    Raises :class:`PermissionError` when something in it belongs to another user.
    """
    with os.scandir(path) as items:
        found = list(items)
    mode = os.lstat(path).st_mode
    if found and mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(path, stat.S_IRWXU)
    for item in found:
        if item.is_dir(follow_symlinks=False):
            try:
                remove_tree(Path(item.path))
            except PermissionError:
                # Not even readable: make it so, if it is ours.
                os.chmod(item.path, stat.S_IRWXU)
                remove_tree(Path(item.path))
        else:
            os.unlink(item.path)
    os.rmdir(path)


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
