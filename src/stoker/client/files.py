"""The files of a sandbox. Paths are the guest's: absolute, ``~``, or relative to the default directory."""

from __future__ import annotations

import builtins
import inspect
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import TypeAlias

from stoker.api.codec import decode_answer
from stoker.api.models import (
    ChangeMode,
    ChangeOwner,
    FileContent,
    FileExists,
    FileInfo,
    FileList,
    MakeDirectory,
    MakeSymlink,
    MoveFile,
    SignedOperation,
    SignedUrl,
    SignUrl,
    WatchEvent,
    WriteFiles,
)
from stoker.client.api import Api, path
from stoker.client.data import as_bytes, chunks
from stoker.client.feed import AsyncFeed, bytes_feed, events_feed
from stoker.client.results import Data
from stoker.errors import TooLarge

__all__ = ["AsyncFiles", "OnBytes", "counted", "total_size"]

OnBytes: TypeAlias = Callable[[int], object]
"""Called with the bytes that have gone over so far."""
READ_LIMIT = 1 << 30
STALL = 120.0


class AsyncFiles:
    """``sandbox.files``. ``user`` everywhere is who acts in the guest; the sandbox's own user where it is left out."""

    def __init__(self, api: Api, sandbox: str) -> None:
        self._api = api
        self._sandbox = sandbox

    def _path(self, *rest: str) -> str:
        return path("sandboxes", self._sandbox, "files", *rest)

    async def read(self, path: str, *, user: str | None = None) -> bytes:
        """A whole file (at most 1 GiB; :meth:`read_stream` has no bound)."""
        async with self._api.stream("GET", self._path(), query={"path": path, "user": user}, idle=STALL) as stream:
            return await stream.read(READ_LIMIT)

    async def read_text(self, path: str, *, user: str | None = None, errors: str = "strict") -> str:
        """A whole file as UTF-8."""
        return (await self.read(path, user=user)).decode("utf-8", errors)

    async def read_stream(
        self, path: str, *, user: str | None = None, offset: int = 0, length: int | None = None
    ) -> AsyncFeed[bytes]:
        """A file, or a part of it, piece by piece in constant memory."""
        headers = []
        if offset or length is not None:
            headers.append(("Range", f"bytes={offset}-" + ("" if length is None else str(offset + length - 1))))
        query: dict[str, object] = {"path": path, "user": user}
        feed, _ = await bytes_feed(self._api.stream("GET", self._path(), query=query, headers=headers, idle=STALL))
        return feed

    async def write(
        self, path: str, data: Data, *, user: str | None = None, mode: int | None = None, append: bool = False
    ) -> FileInfo:
        """Writes a file, whole or not at all, and makes its directories. ``data``: text, bytes, an open file, pieces of bytes."""
        query: dict[str, object] = {"path": path, "user": user, "mode": mode, "append": append or None}
        whole = as_bytes(data)
        async with self._api.stream(
            "PUT", self._path(), query=query, body=chunks(data) if whole is None else whole, timeout=None
        ) as s:
            return decode_answer(await s.read(), FileInfo)

    async def write_many(
        self, files: Mapping[str, str | bytes], *, user: str | None = None, mode: int | None = None
    ) -> builtins.list[FileInfo]:
        """Writes many small files in one request (64 MiB together); paths to contents."""
        import base64

        items = [
            FileContent(path=name, data=base64.b64encode(raw).decode(), base64=True, mode=mode)
            for name, data in files.items()
            if (raw := as_bytes(data)) is not None
        ]
        answer = await self._api.call("POST", self._path(), FileList, body=WriteFiles(files=items, user=user), timeout=300.0)
        return answer.items

    async def list(
        self, path: str = ".", *, depth: int = 1, user: str | None = None, limit: int = 10_000
    ) -> builtins.list[FileInfo]:
        """What is below a directory, sorted by path. More entries than ``limit`` are :class:`TooLarge`."""
        query: dict[str, object] = {"path": path, "depth": depth, "limit": limit, "user": user}
        answer = await self._api.call("GET", self._path("list"), FileList, query=query)
        if answer.truncated:
            raise TooLarge("too_many_files", f"{path} has more than {limit} entries", "raise limit, or lower depth")
        return answer.items

    async def stat(self, path: str, *, follow: bool = True, user: str | None = None) -> FileInfo:
        """What is known of one path. ``follow``: of what a symbolic link points to."""
        return await self._api.call("GET", self._path("stat"), FileInfo, query={"path": path, "follow": follow, "user": user})

    async def exists(self, path: str, *, user: str | None = None) -> bool:
        return (await self._api.call("GET", self._path("exists"), FileExists, query={"path": path, "user": user})).exists

    async def mkdir(self, path: str, *, parents: bool = True, mode: int | None = None, user: str | None = None) -> FileInfo:
        """Makes a directory. With ``parents``, missing ones are made too and one that is there is no error."""
        return await self._change("mkdir", MakeDirectory(path=path, parents=parents, mode=mode, user=user))

    async def move(self, source: str, destination: str, *, overwrite: bool = True, user: str | None = None) -> FileInfo:
        return await self._change("move", MoveFile(source=source, destination=destination, overwrite=overwrite, user=user))

    async def remove(self, path: str, *, recursive: bool = False, user: str | None = None) -> None:
        """Removes a file, a link or an empty directory; with ``recursive``, whatever is below it."""
        await self._api.send("DELETE", self._path(), query={"path": path, "recursive": recursive, "user": user}, timeout=600.0)

    async def chmod(self, path: str, mode: int, *, recursive: bool = False, user: str | None = None) -> FileInfo:
        return await self._change("chmod", ChangeMode(path=path, mode=mode, recursive=recursive, user=user))

    async def chown(self, path: str, owner: str, *, recursive: bool = False) -> FileInfo:
        """``owner`` is ``user``, ``user:group`` or numbers."""
        return await self._change("chown", ChangeOwner(path=path, owner=owner, recursive=recursive))

    async def symlink(self, path: str, target: str, *, user: str | None = None) -> FileInfo:
        """Makes ``path`` a symbolic link to ``target``."""
        return await self._change("symlink", MakeSymlink(path=path, target=target, user=user))

    async def _change(self, what: str, request: object) -> FileInfo:
        return await self._api.call("POST", self._path(what), FileInfo, body=request, timeout=600.0)

    async def watch(self, path: str, *, recursive: bool = False, user: str | None = None) -> AsyncFeed[WatchEvent]:
        """Changes below a directory. What happens after this has returned is seen; ``overflow`` says that events were lost."""
        query: dict[str, object] = {"path": path, "recursive": recursive, "user": user}
        return await events_feed(self._api, self._path("watch"), lambda data: decode_answer(data, WatchEvent), query=query)

    async def tar(self, path: str, *, user: str | None = None) -> AsyncFeed[bytes]:
        """A directory's contents, or one file, as a tar archive."""
        query: dict[str, object] = {"path": path, "user": user}
        feed, _ = await bytes_feed(self._api.stream("GET", self._path("tar"), query=query, idle=STALL))
        return feed

    async def untar(self, path: str, data: Data, *, user: str | None = None) -> None:
        """Unpacks a tar archive below a directory, which is made where it is missing."""
        query: dict[str, object] = {"path": path, "user": user}
        async with self._api.stream("PUT", self._path("tar"), query=query, body=chunks(data), timeout=None) as stream:
            await stream.read()

    async def upload(
        self, source: str | os.PathLike[str], path: str, *, user: str | None = None, on_progress: OnBytes | None = None
    ) -> None:
        """Copies a file of this host to ``path``, or a directory's contents into ``path``, in constant memory."""
        from stoker.client.archive import pack

        if os.path.isdir(source):
            await self.untar(path, counted(pack(source), on_progress), user=user)
            return
        with open(source, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            await self.write(path, counted(chunks(file), on_progress), user=user, mode=mode)

    async def download(
        self, path: str, destination: str | os.PathLike[str], *, user: str | None = None, on_progress: OnBytes | None = None
    ) -> None:
        """Copies a file of the sandbox to ``destination``, or a directory's contents into it.

        A file appears whole or not at all. Nothing the sandbox sends leads out of ``destination``.
        """
        from stoker.client.archive import save, unpack

        info = await self.stat(path, user=user)
        if info.type == "directory":
            async with await self.tar(path, user=user) as archive:
                await unpack(counted(archive, on_progress), destination)
            return
        async with await self.read_stream(path, user=user) as content:
            await save(counted(content, on_progress), destination, info.mode & 0o777)

    async def signed_url(
        self, path: str, *, operation: SignedOperation | str = "read", expires_in: int = 3600, user: str | None = None
    ) -> SignedUrl:
        """A URL that reads (GET) or writes (PUT) one file without a key, until it expires. Relative to the daemon's address."""
        request = SignUrl(path=path, operation=SignedOperation(operation), expires_in=expires_in, user=user)
        return await self._api.call("POST", self._path("sign"), SignedUrl, body=request)


async def counted(pieces: AsyncIterator[bytes] | AsyncFeed[bytes], report: OnBytes | None) -> AsyncIterator[bytes]:
    """The same pieces; ``report`` hears how many bytes have gone by."""
    total = 0
    async for piece in pieces:
        yield piece
        total += len(piece)
        if report is not None:
            result = report(total)
            if inspect.isawaitable(result):
                await result


def total_size(paths: Iterable[str | os.PathLike[str]]) -> int:
    """Bytes of the files in local trees, for progress; what vanishes meanwhile is not counted."""
    total = 0
    for top in paths:
        if os.path.isfile(top):
            total += os.path.getsize(top)
            continue
        for directory, _, names in os.walk(top):
            for name in names:
                try:
                    total += os.lstat(os.path.join(directory, name)).st_size
                except OSError:
                    continue
    return total
