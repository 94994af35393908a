"""The guest's files, by the agent's applets (docs/files.md).

Each operation is a process of its own in the guest, which runs as the user it is asked for; contents stream through its standard
input and output with the protocol's own flow control, so both ends need constant memory whatever the size. Leaving a transfer early
kills its applet, and with it the half-written file.

Errors: ``file_not_found`` (NotFound); ``file_exists``, ``is_directory``, ``not_directory``, ``directory_not_empty``,
``not_a_file``, ``read_only`` (Conflict); ``permission_denied`` (Forbidden); ``no_space`` (CapacityExhausted); ``bad_path``,
``bad_request``, ``bad_archive``, ``short_input``, ``no_such_user``, ``no_such_group`` (InvalidRequest); ``too_many`` (TooLarge);
the rest GuestError.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from stoker.errors import (
    CapacityExhausted,
    Conflict,
    Forbidden,
    GuestError,
    InvalidRequest,
    NotFound,
    StokerError,
    TooLarge,
)
from stoker.guest.frames import MAX_PAYLOAD, protocol_error
from stoker.guest.messages import STDIN_WINDOW, Count, ExecRequest, Text, decode, printable

if TYPE_CHECKING:
    from stoker.guest.agent import Agent
    from stoker.guest.process import Process
    from stoker.guest.streams import OutputStream

__all__ = ["Change", "Entry", "Files", "Listing", "Source", "Watch"]

ERROR_LIMIT: Final = 32 << 10
RESULT_LIMIT: Final = 128 << 10
Path = Text | os.PathLike[str]
Source = bytes | AsyncIterable[bytes]
Seconds = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]

_LENGTH = struct.Struct("<I")
_FAMILIES: dict[str, type[StokerError]] = {
    "file_not_found": NotFound,
    "file_exists": Conflict,
    "is_directory": Conflict,
    "not_directory": Conflict,
    "directory_not_empty": Conflict,
    "not_a_file": Conflict,
    "read_only": Conflict,
    "permission_denied": Forbidden,
    "no_space": CapacityExhausted,
    "bad_path": InvalidRequest,
    "bad_request": InvalidRequest,
    "bad_archive": InvalidRequest,
    "short_input": InvalidRequest,
    "no_such_user": InvalidRequest,
    "no_such_group": InvalidRequest,
    "too_many": TooLarge,
}


class Entry(Struct, frozen=True):
    """One name in the guest. ``mode`` is the permission bits alone, times are nanoseconds of the epoch."""

    path: bytes
    name: bytes
    type: Literal["file", "directory", "symlink", "fifo", "socket", "character", "block", "unknown"]
    size: Count = 0
    mode: Annotated[int, Meta(ge=0, le=0o7777)] = 0
    uid: Count = 0
    gid: Count = 0
    nlink: Count = 0
    ino: Annotated[int, Meta(ge=0)] = 0
    dev: Annotated[int, Meta(ge=0)] = 0
    mtime: Seconds = 0
    ctime: Seconds = 0
    user: str = ""
    group: str = ""
    target: bytes | None = None

    @property
    def version(self) -> str:
        """Changes whenever the content does."""
        return f"{self.ino:x}-{self.size:x}-{self.mtime:x}-{self.ctime:x}"


class Listing(Struct, frozen=True):
    """``truncated``: there was more than the limit; ``unreadable``: so many directories could not be opened."""

    entries: list[Entry]
    truncated: bool
    unreadable: int


class Change(Struct, frozen=True):
    """Something happened below a watched path. ``overflow``: events were lost, look again; ``ended``: the path itself is gone."""

    e: Literal["created", "modified", "removed", "attributes", "moved", "overflow", "ended", "ready"]
    path: bytes = b""
    directory: bool = False
    old_path: bytes | None = None


class _End(Struct, frozen=True):
    end: bool = False
    truncated: bool = False
    unreadable: Count = 0


class _Error(Struct, frozen=True):
    code: Annotated[str, Meta(max_length=64)]
    message: str = ""
    errno: int = 0
    path: bytes | None = None


def applet_error(name: str, code: int | None, signal: int | None, said: bytes) -> StokerError:
    """What an applet that did not end with 0 wants to say."""
    try:
        error = msgspec.msgpack.decode(said, type=_Error)
    except (msgspec.DecodeError, ValueError, RecursionError):
        how = f"signal {signal}" if signal is not None else f"code {code}"
        text = printable(said.decode(errors="replace"), 200)
        return GuestError("applet_failed", f"the agent's applet {name} ended with {how}{': ' if text else ''}{text}")
    message = printable(error.message, 5000) or f"{name} failed: {printable(error.code, 64)}"
    details: dict[str, Any] = {"errno": error.errno} if error.errno else {}
    if error.path is not None:
        details["path"] = printable(error.path.decode(errors="replace"), 4096)
    known = error.code if error.code.isascii() and error.code.replace("_", "").isalnum() else "io"
    return _FAMILIES.get(known, GuestError)(known, message, details=details)


class _Records:
    """The records in a stream, each a length and a map."""

    def __init__(self, stream: OutputStream) -> None:
        self._stream = stream
        self._held = bytearray()

    async def next(self) -> bytes | None:
        """The next map, or None at the end (a broken-off record is one too: the applet's status says why)."""
        while True:
            if len(self._held) >= 4:
                size = _LENGTH.unpack_from(self._held)[0]
                if size > MAX_PAYLOAD:
                    raise protocol_error(f"a record of {size} bytes")
                if len(self._held) >= 4 + size:
                    record = bytes(self._held[4 : 4 + size])
                    del self._held[: 4 + size]
                    return record
            data = await self._stream.read()
            if not data:
                return None
            self._held += data


class Watch:
    """Changes below a path, as they happen: ``async for change in watch``. It ends after ``ended``."""

    def __init__(self, transfer: _Transfer) -> None:
        self._transfer = transfer
        self._records = _Records(transfer.process.stdout)
        self._over = False

    async def ready(self) -> None:
        change = await self._next()
        if change is None or change.e != "ready":
            raise protocol_error("a watch that was not ready")

    def __aiter__(self) -> AsyncIterator[Change]:
        return self

    async def __anext__(self) -> Change:
        change = None if self._over else await self._next()
        if change is None:
            raise StopAsyncIteration
        self._over = change.e == "ended"
        return change

    async def _next(self) -> Change | None:
        record = await self._records.next()
        if record is None:
            await self._transfer.finish()
            return None
        return decode(Change, record)


class _Transfer:
    """A running applet."""

    def __init__(self, name: str, process: Process) -> None:
        self.name = name
        self.process = process
        self.said = process.stderr.collect(ERROR_LIMIT)

    async def finish(self) -> None:
        """Waits for its end, and raises what it says about a failure."""
        status = await self.process.wait()
        if status.code != 0:
            raise applet_error(self.name, status.code, status.signal, bytes(self.said))

    async def feed(self, source: AsyncIterable[bytes]) -> None:
        """All of ``source`` into it. When it ends early, its own error is what counts."""
        try:
            async for data in source:
                await self.process.stdin.write(data)
        except Conflict as e:
            if e.code != "stdin_closed":
                raise
            await self.finish()
        else:
            self.process.stdin.close()


class Files:
    """Files of one guest as one user of it; ``None`` stands for the configured user and directory."""

    def __init__(self, agent: Agent, *, user: str | None = None, cwd: Text | None = None, umask: int | None = None) -> None:
        self._agent = agent
        self._user = user
        self._cwd = cwd
        self._umask = umask

    def _request(self, name: str, arguments: Mapping[str, Any], *, stdin: bool = False) -> ExecRequest:
        args = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in arguments.items()}
        given = {key: value for key, value in args.items() if value is not None}
        return ExecRequest(
            (name,), args=given, builtin=True, stdin=stdin, user=self._user, cwd=self._cwd, umask=self._umask, tag=f"files.{name}"
        )

    async def _run(self, name: str, *, input: bytes | None = None, **arguments: Any) -> bytes:
        done = await self._agent.run(self._request(name, arguments), input=input, limit=RESULT_LIMIT)
        if done.status.code != 0:
            raise applet_error(name, done.status.code, done.status.signal, done.stderr)
        return done.stdout

    async def _entry(self, name: str, *, input: bytes | None = None, **arguments: Any) -> Entry:
        return _one(await self._run(name, input=input, **arguments))

    @asynccontextmanager
    async def _transfer(self, name: str, *, stdin: bool = False, **arguments: Any) -> AsyncIterator[_Transfer]:
        process = await self._agent.exec(self._request(name, arguments, stdin=stdin))
        try:
            yield _Transfer(name, process)
        finally:
            process.dispose()

    # -- one thing ----------------------------------------------------------------------------------------------------------------

    async def stat(self, path: Path, *, follow: bool = True) -> Entry:
        """What is there."""
        return await self._entry("stat", path=path, follow=follow)

    async def exists(self, path: Path, *, follow: bool = True) -> bool:
        """Whether something is there; a parent that is no directory counts as no."""
        try:
            await self.stat(path, follow=follow)
        except StokerError as e:
            if e.code not in ("file_not_found", "not_directory"):
                raise
            return False
        return True

    async def mkdir(self, path: Path, *, mode: int | None = None, parents: bool = True) -> Entry:
        """Makes a directory. With ``parents`` the missing ones too, and one that exists is no error."""
        return await self._entry("mkdir", path=path, mode=mode, parents=parents)

    async def remove(self, path: Path, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Removes a name, and with ``recursive`` everything below it. Links are not followed."""
        await self._run("remove", path=path, recursive=recursive, missing_ok=missing_ok)

    async def move(self, source: Path, destination: Path, *, overwrite: bool = True, parents: bool = False) -> Entry:
        """Renames; across file systems it copies and removes."""
        return await self._entry("move", source=source, destination=destination, overwrite=overwrite, parents=parents)

    async def chmod(self, path: Path, mode: int, *, recursive: bool = False) -> Entry:
        return await self._entry("chmod", path=path, mode=mode, recursive=recursive)

    async def chown(self, path: Path, owner: str, *, recursive: bool = False, follow: bool = False) -> Entry:
        """``owner`` is ``user``, ``user:group``, ``:group`` or numbers."""
        return await self._entry("chown", path=path, owner=owner, recursive=recursive, follow=follow)

    async def symlink(self, path: Path, target: Path, *, overwrite: bool = False) -> Entry:
        """``path`` becomes a link to ``target``."""
        return await self._entry("symlink", path=path, target=target, overwrite=overwrite)

    async def readlink(self, path: Path, *, canonical: bool = False) -> bytes:
        """Where a link points; ``canonical``: the absolute path with every link resolved."""
        return await self._run("readlink", path=path, canonical=canonical)

    # -- listings -----------------------------------------------------------------------------------------------------------------

    async def _scan(self, path: Path, depth: int, limit: int, follow: bool) -> AsyncGenerator[Entry | _End, None]:
        async with self._transfer("list", path=path, depth=depth, limit=limit, follow=follow) as transfer:
            records, end, count = _Records(transfer.process.stdout), None, 0
            while (record := await records.next()) is not None:
                if end is not None or count > limit:
                    raise protocol_error("a listing that goes on behind its end")
                last = decode(_End, record)
                if last.end:
                    end = last
                    yield end
                else:
                    count += 1
                    yield decode(Entry, record)
            await transfer.finish()
            if end is None:
                raise protocol_error("a listing without an end")

    async def list(self, path: Path, *, depth: int = 1, limit: int = 10_000, follow: bool = True) -> Listing:
        """Entries below a directory, a directory before its content, names sorted."""
        entries: list[Entry] = []
        end = _End()
        async with aclosing(self._scan(path, depth, limit, follow)) as items:
            async for item in items:
                if isinstance(item, Entry):
                    entries.append(item)
                else:
                    end = item
        return Listing(entries, end.truncated, end.unreadable)

    # -- contents -----------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def open(self, path: Path, *, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """A regular file's content in pieces. Entered once the file is open: that it is not there is raised here."""
        async with self._content("read", path=path, offset=offset, length=length) as pieces:
            yield pieces

    async def read(self, path: Path, *, offset: int = 0, length: int | None = None, limit: int = 16 << 20) -> bytes:
        """A file's content at once; ``TooLarge`` beyond ``limit`` bytes."""
        kept = bytearray()
        async with self.open(path, offset=offset, length=length) as pieces:
            async for data in pieces:
                kept += data
                if len(kept) > limit:
                    raise TooLarge("file_too_large", f"the file has more than {limit:,} bytes", "read it in pieces")
        return bytes(kept)

    async def write(
        self,
        path: Path,
        source: Source,
        *,
        mode: int | None = None,
        append: bool = False,
        parents: bool = True,
        exclusive: bool = False,
        size: int | None = None,
    ) -> Entry:
        """Writes a file: there whole or not at all, but for ``append``. ``size``: fewer bytes than that change nothing."""
        arguments = {"path": path, "mode": mode, "append": append, "parents": parents, "exclusive": exclusive, "size": size}
        if isinstance(source, bytes):
            if len(source) <= STDIN_WINDOW:
                return await self._entry("write", input=source, **{**arguments, "size": len(source) if size is None else size})
            source = _once(source)
        async with self._transfer("write", stdin=True, **arguments) as transfer:
            await transfer.feed(source)
            result = await transfer.process.stdout.read_all(RESULT_LIMIT)
            await transfer.finish()
            return _one(result)

    @asynccontextmanager
    async def tar_out(
        self, path: Path, *, limit: int | None = None, exact: bool | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """A directory's tree (names relative to it), or one file, as a POSIX tar in pieces.

        ``exact``: with holes, extended attributes, and times to the nanosecond.
        """
        async with self._content("tar-out", path=path, limit=limit, exact=exact) as pieces:
            yield pieces

    async def tar_in(self, path: Path, source: Source, *, preserve: bool = False, parents: bool = True) -> None:
        """Unpacks a tar below a directory, which is made where missing. ``preserve``: owners, devices and
        extended attributes too, as root."""
        async with self._transfer("tar-in", stdin=True, path=path, preserve=preserve, parents=parents) as transfer:
            transfer.process.stdout.collect(0)
            await transfer.feed(_once(source) if isinstance(source, bytes) else source)
            await transfer.finish()

    @asynccontextmanager
    async def watch(self, path: Path, *, recursive: bool = False, limit: int | None = None) -> AsyncIterator[Watch]:
        """Changes below a path. Entered once the watch is in place: what happens after that is seen."""
        async with self._transfer("watch", path=path, recursive=recursive, limit=limit) as transfer:
            watch = Watch(transfer)
            await watch.ready()
            yield watch

    @asynccontextmanager
    async def _content(self, name: str, **arguments: Any) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._transfer(name, **arguments) as transfer:
            stream = transfer.process.stdout
            first = await stream.read()
            if not first:
                await transfer.finish()

            async def pieces() -> AsyncGenerator[bytes, None]:
                data = first
                while data:
                    yield data
                    data = await stream.read()
                await transfer.finish()

            async with aclosing(pieces()) as iterator:
                yield iterator


def _one(data: bytes) -> Entry:
    """The one record of an answer."""
    if len(data) < 4 or _LENGTH.unpack_from(data)[0] != len(data) - 4:
        raise protocol_error("an applet's answer is not one record")
    return decode(Entry, data[4:])


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
