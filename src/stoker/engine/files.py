"""The API's view of files: finds the sandbox and its agent, counts the use, and turns what the guest says into the wire's models.

What a guest says is bytes; on the wire they are text, with U+FFFD where they are not UTF-8. Fits ``server.ports.Files``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from stoker.api.models import (
    ChangeMode,
    ChangeOwner,
    FileInfo,
    FileType,
    MakeDirectory,
    MakeSymlink,
    MoveFile,
    Principal,
    WatchEvent,
    WatchKind,
)
from stoker.engine.core import Core

if TYPE_CHECKING:
    from stoker.guest.files import Change, Entry
    from stoker.guest.files import Files as GuestFiles

__all__ = ["Files"]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _info(entry: Entry) -> FileInfo:
    return FileInfo(
        path=_text(entry.path),
        name=_text(entry.name),
        type=FileType(entry.type),
        size=entry.size,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        modified_at=entry.mtime / 1e9,
        etag=entry.version,
        user=entry.user,
        group=entry.group,
        target=None if entry.target is None else _text(entry.target),
    )


def _event(change: Change) -> WatchEvent:
    return WatchEvent(
        kind=WatchKind(change.e),
        path=_text(change.path),
        directory=change.directory,
        old_path=None if change.old_path is None else _text(change.old_path),
    )


class Files:
    """Each call is one use of the sandbox, for as long as it takes."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @asynccontextmanager
    async def _of(self, who: Principal, sandbox: str, user: str | None = None) -> AsyncIterator[GuestFiles]:
        from stoker.guest.files import Files as GuestFiles

        box = self._core.find(who, sandbox)
        _, agent = await self._core.agent(box)
        async with self._core.used(box):
            yield GuestFiles(agent, user=user)

    async def stat(self, who: Principal, sandbox: str, path: str, *, user: str | None, follow: bool) -> FileInfo:
        async with self._of(who, sandbox, user) as files:
            return _info(await files.stat(path, follow=follow))

    async def list(
        self, who: Principal, sandbox: str, path: str, *, depth: int, limit: int, user: str | None
    ) -> tuple[Sequence[FileInfo], bool]:
        async with self._of(who, sandbox, user) as files:
            listing = await files.list(path, depth=depth, limit=limit)
        return [_info(entry) for entry in listing.entries], listing.truncated

    @asynccontextmanager
    async def read(
        self, who: Principal, sandbox: str, path: str, *, offset: int, length: int | None, user: str | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._of(who, sandbox, user) as files, files.open(path, offset=offset, length=length) as pieces:
            yield pieces

    async def write(
        self,
        who: Principal,
        sandbox: str,
        path: str,
        source: AsyncIterator[bytes],
        *,
        append: bool,
        mode: int | None,
        user: str | None,
    ) -> FileInfo:
        async with self._of(who, sandbox, user) as files:
            return _info(await files.write(path, source, append=append, mode=mode))

    async def make_directory(self, who: Principal, sandbox: str, request: MakeDirectory) -> FileInfo:
        async with self._of(who, sandbox, request.user) as files:
            return _info(await files.mkdir(request.path, mode=request.mode, parents=request.parents))

    async def make_symlink(self, who: Principal, sandbox: str, request: MakeSymlink) -> FileInfo:
        async with self._of(who, sandbox, request.user) as files:
            return _info(await files.symlink(request.path, request.target))

    async def move(self, who: Principal, sandbox: str, request: MoveFile) -> FileInfo:
        async with self._of(who, sandbox, request.user) as files:
            return _info(await files.move(request.source, request.destination, overwrite=request.overwrite))

    async def remove(self, who: Principal, sandbox: str, path: str, *, recursive: bool, user: str | None) -> None:
        async with self._of(who, sandbox, user) as files:
            await files.remove(path, recursive=recursive)

    async def change_mode(self, who: Principal, sandbox: str, request: ChangeMode) -> FileInfo:
        async with self._of(who, sandbox, request.user) as files:
            return _info(await files.chmod(request.path, request.mode, recursive=request.recursive))

    async def change_owner(self, who: Principal, sandbox: str, request: ChangeOwner) -> FileInfo:
        """As the superuser: nobody else may give a file away."""
        async with self._of(who, sandbox, "0:0") as files:
            return _info(await files.chown(request.path, request.owner, recursive=request.recursive))

    @asynccontextmanager
    async def watch(
        self, who: Principal, sandbox: str, path: str, *, recursive: bool, user: str | None
    ) -> AsyncIterator[AsyncIterator[WatchEvent]]:
        async def events(changes: AsyncIterator[Change]) -> AsyncIterator[WatchEvent]:
            async for change in changes:
                if change.e != "ready":
                    yield _event(change)

        async with self._of(who, sandbox, user) as files, files.watch(path, recursive=recursive) as watch:
            yield events(watch)

    @asynccontextmanager
    async def export_tar(self, who: Principal, sandbox: str, path: str, *, user: str | None) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._of(who, sandbox, user) as files, files.tar_out(path) as pieces:
            yield pieces

    async def import_tar(self, who: Principal, sandbox: str, path: str, source: AsyncIterator[bytes], *, user: str | None) -> None:
        async with self._of(who, sandbox, user) as files:
            await files.tar_in(path, source)
