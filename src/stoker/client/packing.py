"""A directory as an exact tar: owners, modes, links, nanoseconds, extended attributes, holes. GNU tar understands it too."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from pathlib import Path
from typing import IO, Final

__all__ = ["add_exactly", "allocated"]

PIECE: Final = 256 << 10
BLOCK: Final = 512
MOST_PIECES: Final = 1 << 16


def add_exactly(archive: tarfile.TarFile, top: Path) -> None:
    """Adds what is below a directory, and the directory itself as ``.``; names are relative to it, in a fixed order."""
    _add(archive, top, ".")
    pending = [""]
    while pending:
        below = pending.pop()
        for name in sorted(os.listdir(top / below)):
            relative = f"{below}{name}"
            if _add(archive, top / relative, relative):
                pending.append(f"{relative}/")


def _add(archive: tarfile.TarFile, path: Path, name: str) -> bool:
    """One entry; True for a directory, whose content is still to come. Sockets mean nothing elsewhere."""
    info = archive.gettarinfo(str(path), name)
    if info is None:
        return False
    status = path.lstat()
    info.uname = info.gname = ""
    info.pax_headers = {"mtime": f"{status.st_mtime_ns // 10**9}.{status.st_mtime_ns % 10**9:09d}"}
    if not info.islnk():
        info.pax_headers = {**info.pax_headers, **_attributes(path)}
    if not info.isreg():
        archive.addfile(info)
        return info.isdir()
    with open(path, "rb") as file:
        pieces = _pieces(file, status)
        if pieces is None:
            archive.addfile(info, file)
        else:
            _add_sparse(archive, info, file, pieces)
    return False


def _attributes(path: Path) -> dict[str, str]:
    found = {}
    try:
        for name in os.listxattr(path, follow_symlinks=False):
            key = name.replace("%", "%25").replace("=", "%3D")
            value = os.getxattr(path, name, follow_symlinks=False)
            found[f"SCHILY.xattr.{key}"] = value.decode("utf-8", "surrogateescape")
    except OSError as e:
        if e.errno not in (errno.ENOTSUP, errno.ENODATA):
            raise
    return found


def _pieces(file: IO[bytes], status: os.stat_result) -> list[tuple[int, int]] | None:
    """Where a file with holes has data; None for one without, or in too many pieces."""
    if status.st_blocks * 512 >= status.st_size:
        return None
    found, at, fd = [], 0, file.fileno()
    while at < status.st_size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                break
            return None
        at = min(os.lseek(fd, start, os.SEEK_HOLE), status.st_size)
        found.append((start, at - start))
        if len(found) > MOST_PIECES:
            return None
    return [*found, (status.st_size, 0)]


class _Joined:
    """A map and the pieces it names, read one after the other."""

    def __init__(self, head: bytes, file: IO[bytes], pieces: list[tuple[int, int]]) -> None:
        self._head = head
        self._file = file
        self._pieces = [piece for piece in pieces if piece[1]]

    def read(self, size: int) -> bytes:
        data = bytearray(self._head[:size])
        self._head = self._head[size:]
        while len(data) < size and self._pieces:
            offset, length = self._pieces.pop(0)
            self._file.seek(offset)
            part = self._file.read(min(length, size - len(data)))
            data += part
            if not part:  # it shrank: the header has promised
                part = bytes(min(length, size - len(data)))
                data += part
            if len(part) < length:
                self._pieces.insert(0, (offset + len(part), length - len(part)))
        return bytes(data)


def _add_sparse(archive: tarfile.TarFile, info: tarfile.TarInfo, file: IO[bytes], pieces: list[tuple[int, int]]) -> None:
    """GNU's sparse format 1.0: the map as decimal lines in whole blocks, then the data without the holes."""
    lines = "".join(f"{offset}\n{length}\n" for offset, length in pieces)
    head = f"{len(pieces)}\n{lines}".encode()
    head += bytes(-len(head) % BLOCK)
    info.pax_headers = {
        **info.pax_headers,
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": info.name,
        "GNU.sparse.realsize": str(info.size),
    }
    directory, _, last = info.name.rpartition("/")
    info.name = f"{directory or '.'}/GNUSparseFile.0/{last}"
    info.size = len(head) + sum(length for _, length in pieces)
    archive.addfile(info, _Joined(head, file, pieces))  # type: ignore[arg-type]


def allocated(top: Path) -> int:
    """Bytes that a tree takes on its own disk."""
    total = 0
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            try:
                status = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(status.st_mode):
                total += status.st_blocks * 512
            total += 4096
    return total
