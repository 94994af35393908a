"""Trees of this host to tar and back. What comes from a sandbox is hostile: the rules of PEP 706's ``data``, and nothing followed.

tarfile is synchronous: it runs in a thread, and a bounded queue of pieces joins it to the event loop.
"""

from __future__ import annotations

import asyncio
import io
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from stoker.errors import HostError, InvalidRequest, StokerError

if TYPE_CHECKING:
    from tarfile import TarFile, TarInfo

__all__ = ["pack", "packed_size", "save", "unpack"]

PIECE = 256 << 10
DEPTH = 8
BLOCK = 64 << 10


class _Gone(Exception):
    """The other side of the queue has given up."""


class _Pipe(io.RawIOBase):
    """A file object for tarfile's streams: a bounded queue between a thread and the loop."""

    def __init__(self) -> None:
        self.queue: queue.Queue[bytes | None] = queue.Queue(DEPTH)
        self.gone = threading.Event()
        self._rest = b""
        self._ended = False

    def put(self, piece: bytes | None) -> None:
        while not self.gone.is_set():
            try:
                return self.queue.put(piece, timeout=0.2)
            except queue.Full:
                continue
        raise _Gone

    def get(self) -> bytes | None:
        while not self.gone.is_set():
            try:
                return self.queue.get(timeout=0.2)
            except queue.Empty:
                continue
        raise _Gone

    def write(self, data: object) -> int:
        piece = bytes(cast(bytes, data))
        self.put(piece)
        return len(piece)

    def read(self, size: int = -1) -> bytes:
        parts: list[bytes] = []
        missing = size if size >= 0 else 1 << 62
        while missing and not self._ended:
            if not self._rest:
                piece = self.get()
                if piece is None:
                    self._ended = True
                    break
                self._rest = piece
            part, self._rest = self._rest[:missing], self._rest[missing:]
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)


def _write_tree(top: Path, pipe: _Pipe, exact: bool) -> None:
    import tarfile

    with tarfile.open(fileobj=cast(IO[bytes], pipe), mode="w|", bufsize=PIECE, format=tarfile.PAX_FORMAT) as archive:
        if exact:
            from stoker.client.packing import add_exactly

            add_exactly(archive, top)
        for name in () if exact else sorted(os.listdir(top)):
            archive.add(top / name, arcname=name)
    pipe.put(None)


def packed_size(source: str | os.PathLike[str]) -> int:
    """About what the contents of a directory take."""
    from stoker.client.packing import allocated

    return allocated(Path(source))


async def pack(source: str | os.PathLike[str], *, exact: bool = False) -> AsyncIterator[bytes]:
    """The contents of a directory as a tar archive; names are relative to it. Owners are left to the unpacking side.

    ``exact``: with extended attributes, holes, and times to the nanosecond.
    """
    pipe = _Pipe()
    work = asyncio.ensure_future(asyncio.to_thread(_guarded, lambda: _write_tree(Path(source), pipe, exact), pipe))
    try:
        while (piece := await asyncio.to_thread(pipe.get)) is not None:
            yield piece
        await work
    except _Gone:
        await work  # says what went wrong in the thread
    finally:
        pipe.gone.set()
        await asyncio.gather(work, return_exceptions=True)


def _refuse_links(destination: Path, name: str) -> None:
    """Nothing is written through a symbolic link: an archive of a tree never has a name below one, a forged one has.

    The filter alone resolves such names, and has been fooled by paths that are too long to resolve.
    """
    place = destination
    if name.startswith("/"):
        raise InvalidRequest("unsafe_archive", f"{name[:200]!r} in the archive is an absolute name")
    for part in Path(name).parts[:-1]:
        place = place / part
        if part == ".." or place.is_symlink():
            raise InvalidRequest("unsafe_archive", f"{name[:200]!r} in the archive leads through a link, {place}")


def _is_inside(place: str, destination: Path) -> bool:
    top = os.path.realpath(destination)
    return os.path.commonpath([os.path.realpath(place), top]) == top


def _extract(archive: TarFile, member: TarInfo, destination: Path) -> None:
    """One member, by the rules of PEP 706's ``data`` filter, which Python 3.11.2 (Debian 12) does not have.

    Files, directories and links only, all below the destination; nobody's owner, no special bits, nothing writable by others.
    """
    _refuse_links(destination, member.name)
    place = destination / member.name
    said = member.name[:200]
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        raise InvalidRequest("unsafe_archive", f"{said!r} in the archive is a device or a pipe")
    if member.isdir():
        if place.is_symlink() or ".." in Path(member.name).parts:
            raise InvalidRequest("unsafe_archive", f"{said!r} in the archive leads out of {destination}")
        place.mkdir(parents=True, exist_ok=True)
        return
    if place.name in ("", "..") or place == destination:
        raise InvalidRequest("unsafe_archive", f"{said!r} in the archive is no name of a file")
    if member.islnk():
        _refuse_links(destination, member.linkname)
    if member.issym() or member.islnk():
        base = place.parent if member.issym() else destination
        if os.path.isabs(member.linkname) or not _is_inside(os.path.join(base, member.linkname), destination):
            raise InvalidRequest("unsafe_archive", f"{said!r} in the archive links to a place outside of {destination}")
    if place.is_symlink():
        place.unlink()  # a file takes a link's place, and is not written through it
    archive.extract(member, destination, set_attrs=False)
    if member.isreg():
        mode = (member.mode & 0o755) | 0o600
        os.chmod(place, mode if mode & 0o100 else mode & ~0o111)
        os.utime(place, (member.mtime, member.mtime))


def _read_tree(pipe: _Pipe, destination: Path) -> None:
    import tarfile

    destination.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(fileobj=cast(IO[bytes], pipe), mode="r|", bufsize=PIECE) as archive:
            # Pythons that have filters of their own need not ask which: ours has looked at the member.
            archive.extraction_filter = lambda member, _path: member
            for member in archive:
                _extract(archive, member, destination)
    except tarfile.TarError as e:
        raise HostError("bad_archive", f"the sandbox sent no proper archive: {e}") from None
    while pipe.read(PIECE):  # the padding after an archive's end, so that the sender can finish
        pass


def _guarded(work: Callable[[], None], pipe: _Pipe) -> None:
    """Only a failure closes the pipe: after an end without one, the other side still takes what is in it."""
    try:
        work()
    except BaseException as e:
        pipe.gone.set()
        if isinstance(e, OSError):
            raise HostError("file_failed", f"{e.filename or 'a file'}: {e.strerror or e}") from e
        if not isinstance(e, _Gone):
            raise


async def unpack(pieces: AsyncIterator[bytes], destination: str | os.PathLike[str]) -> None:
    """Unpacks below a directory, which is made where it is missing. Links out of it, devices and absolute names are refused."""
    pipe = _Pipe()
    work = asyncio.ensure_future(asyncio.to_thread(_guarded, lambda: _read_tree(pipe, Path(destination)), pipe))
    try:
        async for piece in pieces:
            await asyncio.to_thread(pipe.put, piece)
        await asyncio.to_thread(pipe.put, None)
        await work
    except _Gone:
        await work
    finally:
        pipe.gone.set()
        await asyncio.gather(work, return_exceptions=True)


async def save(pieces: AsyncIterator[bytes], destination: str | os.PathLike[str], mode: int, *, sparse: bool = False) -> None:
    """Writes a file beside its place and renames it. A directory gets no file of that name silently: it is an error.

    ``sparse``: blocks of zeros become holes. A pipe or a device that is there already is written to.
    """
    place = Path(destination)
    if place.exists() and not place.is_file() and not place.is_dir():
        return await _write_into(place, pieces)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            async for piece in pieces:
                await asyncio.to_thread(_write_sparse if sparse else _write_all, fd, piece)
            os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR))
            os.fchmod(fd, mode)
        finally:
            os.close(fd)
        os.replace(temporary, place)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise HostError("file_failed", f"{destination} cannot be written: {e.strerror}") from e
    except (StokerError, asyncio.CancelledError):
        temporary.unlink(missing_ok=True)
        raise


async def _write_into(place: Path, pieces: AsyncIterator[bytes]) -> None:
    try:
        with open(place, "wb", buffering=0) as file:
            async for piece in pieces:
                await asyncio.to_thread(_write_all, file.fileno(), piece)
    except OSError as e:
        raise HostError("file_failed", f"{place} cannot be written: {e.strerror}") from e


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _write_sparse(fd: int, data: bytes) -> None:
    """The same, but that blocks of zeros are skipped."""
    for start in range(0, len(data), BLOCK):
        block = data[start : start + BLOCK]
        if block.count(0) == len(block):
            os.lseek(fd, len(block), os.SEEK_CUR)
        else:
            _write_all(fd, block)
