"""What is in an app archive (zip, tar, tar.gz): read with bounds, refused with the name of what is wrong, unpacked by plain names.

The archive is hostile. Every entry is looked at before anything of it is written: a name is relative, without ``..``, and below
directories only, never through a link; it occurs once; it is a file, a directory or a link. Links may point anywhere: nothing is
ever written through them here, and in the guest they lead to what is there. Counts, sizes and depths have bounds, also what is
unpacked in fact, whatever the archive says of itself.

Files are written below a directory of our own with plain permissions; what they are to be in the end comes with the entries.
"""

from __future__ import annotations

import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

from stoker.errors import InvalidRequest, TooLarge

__all__ = ["Bounds", "Entry", "unpack"]

PIECE: Final = 1 << 20
LONGEST_HEADER: Final = 1 << 20
LONGEST_TARGET: Final = 4095
DIRECTORY_BYTES: Final = 64 << 20
"""Most that a zip's central directory may have: Python reads it as a whole."""
LINE_BREAKS: Final = frozenset("\n\r\0")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an archive may hold at most."""

    entries: int = 100_000
    bytes: int = 8 << 30
    depth: int = 64
    path: int = 3000


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in the app. ``path`` is relative; ``kind`` is ``file``, ``directory``, ``link`` or ``same`` (another name of
    ``target``, a file that came before)."""

    path: str
    kind: str
    mode: int
    mtime: int
    size: int = 0
    target: str = ""


def _refuse(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        "bad_archive", f"{name[:200]!r} in the archive {why}", "nothing of it is used", details={"entry": name[:1000]}
    )


class _Tree:
    """What has been unpacked so far, and whether the next entry may be."""

    def __init__(self, top: Path, bounds: Bounds) -> None:
        self.top = top
        self.bounds = bounds
        self.entries: dict[str, Entry] = {}
        self.bytes = 0

    def relative(self, name: str) -> str:
        """The name without slashes and dots that mean nothing; "" is the top itself."""
        if name.startswith("/"):
            raise _refuse(name, "is an absolute name")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise _refuse(name, "leads out of the app")
        if set(name) & LINE_BREAKS:
            raise _refuse(name, "has a line break or NUL in its name")
        if len(parts) > self.bounds.depth or len(os.fsencode(name)) > self.bounds.path:
            raise _refuse(name, "is too deep or too long")
        if any(len(os.fsencode(part)) > 255 for part in parts):
            raise _refuse(name, "has a part of more than 255 bytes")
        return "/".join(parts)

    def _parents(self, name: str, path: str) -> None:
        """Directories that the archive does not name are made; anything else in their place is refused."""
        above = path.rpartition("/")[0]
        if not above:
            return
        there = self.entries.get(above)
        if there is None:
            self.put(name, Entry(above, "directory", 0o755, 0))
        elif there.kind != "directory":
            raise _refuse(name, f"is below {above[:200]!r}, which is no directory")

    def put(self, name: str, entry: Entry) -> Path | None:
        """Takes an entry in: the place of a file to be written, or None when there is nothing more to do."""
        self._parents(name, entry.path)
        before = self.entries.get(entry.path)
        if before is not None and not before.kind == entry.kind == "directory":
            raise _refuse(name, "is there twice")
        if len(self.entries) >= self.bounds.entries:
            raise TooLarge("bad_archive", f"the archive has more than {self.bounds.entries} entries, {name[:200]!r} among them")
        self.entries[entry.path] = entry
        place = self.top / entry.path
        if entry.kind == "directory":
            place.mkdir(0o700, exist_ok=True)
        elif entry.kind == "link":
            if not 0 < len(os.fsencode(entry.target)) <= LONGEST_TARGET or set(entry.target) & LINE_BREAKS:
                raise _refuse(name, "is a link to an impossible name")
            os.symlink(entry.target, place)
        elif entry.kind == "same":
            former = self.entries.get(entry.target)
            if former is None or former.kind != "file":
                raise _refuse(name, f"is a link to {entry.target[:200]!r}, which is no file before it")
            os.link(self.top / entry.target, place, follow_symlinks=False)
        else:
            return place
        return None

    def write(self, name: str, place: Path, source: IO[bytes], entry: Entry) -> None:
        """Writes a file's content, and counts it; zeros at the end of pieces are left out."""
        size = 0
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            while piece := source.read(PIECE):
                size += len(piece)
                self.bytes += len(piece)
                if self.bytes > self.bounds.bytes:
                    raise TooLarge(
                        "bad_archive", f"the archive unpacks to more than {self.bounds.bytes} bytes, {name[:200]!r} among them"
                    )
                file.write(piece)
        self.entries[entry.path] = replace(entry, size=size)


def unpack(archive: Path, top: Path, bounds: Bounds | None = None) -> list[Entry]:
    """Unpacks below ``top``, an empty directory, and gives the entries in their order. Raises ``bad_archive``."""
    bounds = bounds or Bounds()
    tree = _Tree(top, bounds)
    with open(archive, "rb") as file:
        head = file.read(512)
        file.seek(0)
        try:
            if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
                _unzip(file, tree)
            elif head[:2] == b"\x1f\x8b":
                _untar(file, "r|gz", tree)
            elif head[257:262] == b"ustar":
                _untar(file, "r|", tree)
            else:
                raise InvalidRequest(
                    "bad_archive", "the app is neither a zip nor a tar nor a tar.gz", "zip, tar, tar.gz or a directory"
                )
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError, struct.error, NotImplementedError) as e:
            if isinstance(e, OSError) and e.errno is not None:
                raise
            raise InvalidRequest("bad_archive", f"the archive is damaged: {e or type(e).__name__}", "make it again") from None
        except Exception as e:
            # zlib.error has no common base with the others.
            if type(e).__module__ != "zlib":
                raise
            raise InvalidRequest("bad_archive", f"the archive is damaged: {e}", "make it again") from None
    return list(tree.entries.values())


# ---- tar


class _Member(tarfile.TarInfo):
    """A tar's member whose headers have bounds: the library reads them as a whole, whatever size they say."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        headers = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if self.type == tarfile.GNUTYPE_SPARSE or (self.type in headers and self.size > LONGEST_HEADER):
            raise _refuse(self.name, "is a sparse file, or has a header without end")
        return super()._proc_member(archive)  # type: ignore[misc, no-any-return]

    def _sparse(self, *_: object) -> None:
        raise _refuse(self.name, "is a sparse file")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _sparse


def _untar(file: IO[bytes], mode: str, tree: _Tree) -> None:
    with tarfile.open(fileobj=file, mode=mode, bufsize=PIECE, tarinfo=_Member, errors="surrogateescape") as archive:  # type: ignore[call-overload]
        member: tarfile.TarInfo
        for member in archive:
            # The library remembers every member it has seen; we have our own books.
            archive.members = []
            _put_member(archive, member, tree)


def _put_member(archive: tarfile.TarFile, member: tarfile.TarInfo, tree: _Tree) -> None:
    path = tree.relative(member.name)
    mtime = min(max(int(member.mtime), 0), 1 << 33)
    mode = member.mode & 0o7777
    if member.isdir():
        if path:
            tree.put(member.name, Entry(path, "directory", mode, mtime))
        return
    if not path:
        raise _refuse(member.name, "has no name")
    if member.issym():
        tree.put(member.name, Entry(path, "link", 0o777, mtime, target=member.linkname))
    elif member.islnk():
        tree.put(member.name, Entry(path, "same", mode, mtime, target=tree.relative(member.linkname)))
    elif member.isreg():
        if member.size > tree.bounds.bytes:
            raise TooLarge("bad_archive", f"{member.name[:200]!r} in the archive has {member.size} bytes")
        entry = Entry(path, "file", mode, mtime)
        place = tree.put(member.name, entry)
        content = archive.extractfile(member)
        if place is not None and content is not None:
            tree.write(member.name, place, content, entry)
    else:
        raise _refuse(member.name, "is a device or a pipe")


# ---- zip


def _check_directory(file: IO[bytes]) -> None:
    """The size of the central directory as the end of the file says it: zipfile reads all of it before anybody can count."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - 65557)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise InvalidRequest("bad_archive", "the zip has no end: it is cut off", "make it again")
    length = struct.unpack_from("<I", tail, at + 12)[0]
    locator = tail.rfind(b"PK\x06\x06", 0, at)
    if length == 0xFFFFFFFF and locator >= 0 and len(tail) - locator >= 48:
        length = struct.unpack_from("<Q", tail, locator + 40)[0]
    if length > DIRECTORY_BYTES:
        raise TooLarge("bad_archive", f"the zip has a directory of {length} bytes")
    file.seek(0)


def _unzip(file: IO[bytes], tree: _Tree) -> None:
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        if len(archive.filelist) > tree.bounds.entries:
            raise TooLarge("bad_archive", f"the archive has {len(archive.filelist)} entries, more than {tree.bounds.entries}")
        for info in _in_order(archive):
            _put_info(archive, info, tree)


def _in_order(archive: zipfile.ZipFile) -> Iterator[zipfile.ZipInfo]:
    """Directories first: an archive may name one after what is in it."""
    yield from sorted(archive.filelist, key=lambda info: not info.is_dir())


def _put_info(archive: zipfile.ZipFile, info: zipfile.ZipInfo, tree: _Tree) -> None:
    name = info.filename
    path = tree.relative(name)
    bits = info.external_attr >> 16 if info.create_system == 3 else 0
    kind = stat.S_IFMT(bits)
    mtime = _zip_time(info)
    if info.is_dir():
        if path:
            tree.put(name, Entry(path, "directory", bits & 0o7777 or 0o755, mtime))
        return
    if not path:
        raise _refuse(name, "has no name")
    if info.flag_bits & 1:
        raise _refuse(name, "is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _refuse(name, f"is packed by method {info.compress_type}: only deflate is understood")
    if kind not in (0, stat.S_IFREG, stat.S_IFLNK):
        raise _refuse(name, "is a device or a pipe")
    if info.file_size > tree.bounds.bytes:
        raise TooLarge("bad_archive", f"{name[:200]!r} in the archive has {info.file_size} bytes")
    with archive.open(info) as content:
        if kind == stat.S_IFLNK:
            target = os.fsdecode(content.read(LONGEST_TARGET + 1))
            tree.put(name, Entry(path, "link", 0o777, mtime, target=target))
            return
        entry = Entry(path, "file", bits & 0o7777 or 0o644, mtime)
        place = tree.put(name, entry)
        if place is not None:
            tree.write(name, place, content, entry)


def _zip_time(info: zipfile.ZipInfo) -> int:
    import calendar

    try:
        return max(0, calendar.timegm((*info.date_time, 0, 0, 0)))
    except (ValueError, OverflowError):
        return 0
