"""Files: contents, listings, changes. Paths travel as query parameters or in bodies, never in the URL's path."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from msgspec import Meta

from stoker.api.codec import encode
from stoker.api.models import (
    ChangeMode,
    ChangeOwner,
    FileExists,
    FileInfo,
    FileList,
    FileType,
    MakeDirectory,
    MakeSymlink,
    MoveFile,
    Principal,
    WatchEvent,
    WriteFiles,
)
from stoker.api.processes import MAX_INLINE
from stoker.api.types import FileMode, FilePath, GuestUser
from stoker.errors import Conflict, InvalidRequest, NotFound, error_to_wire
from stoker.server.bodies import stream_body
from stoker.server.bytes import inline_bytes
from stoker.server.download import (
    Unsatisfiable,
    accepts_gzip,
    disposition,
    entity_tag,
    fresh,
    gzipped,
    last_modified,
    requested_range,
)
from stoker.server.endpoint import GUEST, Call, Content, Routes
from stoker.server.query import Query
from stoker.server.replies import ByteStream, EventStream, Reply, ServerEvent

__all__ = ["MAX_UPLOAD", "FileQuery", "WriteQuery", "download", "routes", "upload"]

routes: Routes[Any] = Routes("files")
BASE = "/v1/sandboxes/{sandbox}/files"
MAX_UPLOAD = 1 << 40
GZIP_FROM = 1024
BINARY = Content(("application/octet-stream",), "The file's bytes.")
TAR = Content(("application/x-tar",), "A POSIX tar.")
CHANGES = Content(("text/event-stream",), "Changes as they happen.", WatchEvent)
FILE_ERRORS = (*GUEST, 413)


class FileQuery(Query, frozen=True):
    path: FilePath
    user: GuestUser | None = None


class WriteQuery(FileQuery, frozen=True):
    mode: FileMode | None = None
    append: bool = False


class RemoveQuery(FileQuery, frozen=True):
    recursive: bool = False


class ListQuery(FileQuery, frozen=True):
    depth: Annotated[int, Meta(ge=1, le=64)] = 1
    limit: Annotated[int, Meta(ge=1, le=10000)] = 1000


class StatQuery(FileQuery, frozen=True):
    follow: Annotated[bool, Meta(description="Look at what a link points to.")] = False


class WatchQuery(FileQuery, frozen=True):
    recursive: bool = False


def _validators(info: FileInfo, *, packed: bool = False) -> list[tuple[bytes, bytes]]:
    tag = entity_tag(info)
    return [
        (b"etag", (f'{tag[:-1]}-gzip"' if packed else tag).encode()),
        (b"last-modified", last_modified(info).encode()),
        (b"accept-ranges", b"bytes"),
        (b"vary", b"accept-encoding"),
        (b"cache-control", b"private, no-cache"),
    ]


async def download(call: Call, who: Principal, sandbox: str, query: FileQuery) -> Reply | ByteStream:
    """The file, a part of it, or word that the client's copy is good."""
    files = call.engine.files
    info = await files.stat(who, sandbox, query.path, user=query.user, follow=True)
    if info.type is not FileType.FILE:
        code = "is_directory" if info.type is FileType.DIRECTORY else "not_a_file"
        raise Conflict(code, f"{info.path} is a {info.type.value}", "take a directory as a tar: /files/tar")
    if fresh(info, call.header(b"if-none-match"), call.header(b"if-modified-since")):
        return Reply(304, headers=_validators(info))
    try:
        part = requested_range(info, call.header(b"range"), call.header(b"if-range"))
    except Unsatisfiable:
        error = InvalidRequest("range_not_satisfiable", f"{info.path} has {info.size} bytes")
        return Reply(416, encode(error_to_wire(error)), headers=[(b"content-range", f"bytes */{info.size}".encode())])
    # A file of /proc says 0 and has more: there the length is left open.
    length = part.length if part else info.size or None
    offset = part.offset if part else 0
    headers = [(b"content-disposition", disposition(info.name))]
    if part:
        headers.append((b"content-range", f"bytes {offset}-{offset + part.length - 1}/{info.size}".encode()))
    packed = part is None and info.size >= GZIP_FROM and accepts_gzip(call.header(b"accept-encoding"))
    headers += _validators(info, packed=packed)
    if call.request.method == "HEAD":
        size = [] if packed or length is None else [(b"content-length", str(length).encode())]
        return Reply(206 if part else 200, content_type=b"application/octet-stream", headers=headers + size)
    source = files.read(who, sandbox, query.path, offset=offset, length=length, user=query.user)
    if packed:
        return ByteStream(gzipped(source), b"application/octet-stream", 200, [*headers, (b"content-encoding", b"gzip")])
    return ByteStream(source, b"application/octet-stream", 206 if part else 200, headers, length)


async def upload(call: Call, who: Principal, sandbox: str, query: WriteQuery) -> FileInfo:
    body = stream_body(call.headers, call.request.receive, MAX_UPLOAD)
    return await call.engine.files.write(who, sandbox, query.path, body, append=query.append, mode=query.mode, user=query.user)


DOWNLOAD_ANSWERS: dict[int, Any] = {200: BINARY, 206: BINARY, 304: None}


@routes.get(BASE, answers=DOWNLOAD_ANSWERS, errors=(*GUEST, 416))
async def read_file(call: Call, query: FileQuery) -> Reply | ByteStream:
    """Download a file.

    `Range` (one range), `If-None-Match`, `If-Modified-Since`, `If-Range` and `Accept-Encoding: gzip` are understood.
    """
    return await download(call, call.principal, call.sandbox, query)


@routes.add("HEAD", BASE, answers={200: None, 206: None, 304: None}, errors=(*GUEST, 416))
async def head_file(call: Call, query: FileQuery) -> Reply | ByteStream:
    """A download's headers."""
    return await download(call, call.principal, call.sandbox, query)


@routes.put(BASE, answers={200: FileInfo}, errors=FILE_ERRORS, upload=BINARY)
async def write_file(call: Call, query: WriteQuery) -> FileInfo:
    """Upload a file: the body is its content.

    Missing directories are made. The file appears whole or not at all, except with `append`. It belongs to `user`, else to the
    sandbox's user. `Content-Encoding: gzip` is undone.
    """
    return await upload(call, call.principal, call.sandbox, query)


async def _piece(data: bytes) -> AsyncIterator[bytes]:
    yield data


@routes.post(BASE, answers={200: FileList}, errors=FILE_ERRORS, bound=4 * MAX_INLINE)
async def write_files(call: Call, body: WriteFiles) -> FileList:
    """Write several small files, one after the other. The first that fails ends it."""
    written: list[FileInfo] = []
    contents = [await inline_bytes(file.data, file.base64) for file in body.files]
    for file, data in zip(body.files, contents, strict=True):
        info = await call.engine.files.write(
            call.principal, call.sandbox, file.path, _piece(data), append=file.append, mode=file.mode, user=body.user
        )
        written.append(info)
    return FileList(items=written)


@routes.delete(BASE, answers={204: None}, errors=GUEST)
async def remove_file(call: Call, query: RemoveQuery) -> None:
    """Remove a file, a link, an empty directory, or with `recursive` a whole tree."""
    await call.engine.files.remove(call.principal, call.sandbox, query.path, recursive=query.recursive, user=query.user)


@routes.get(BASE + "/list", answers={200: FileList}, errors=GUEST)
async def list_files(call: Call, query: ListQuery) -> FileList:
    """List a directory, down to `depth` levels, sorted by path. Links are not followed."""
    items, truncated = await call.engine.files.list(
        call.principal, call.sandbox, query.path, depth=query.depth, limit=query.limit, user=query.user
    )
    return FileList(items=list(items), truncated=truncated)


@routes.get(BASE + "/stat", answers={200: FileInfo}, errors=GUEST)
async def stat_file(call: Call, query: StatQuery) -> FileInfo:
    """One file's properties."""
    return await call.engine.files.stat(call.principal, call.sandbox, query.path, user=query.user, follow=query.follow)


@routes.get(BASE + "/exists", answers={200: FileExists}, errors=GUEST)
async def file_exists(call: Call, query: FileQuery) -> FileExists:
    """Whether there is something of this name; a dangling link is something."""
    try:
        info = await call.engine.files.stat(call.principal, call.sandbox, query.path, user=query.user, follow=False)
    except NotFound as e:
        if e.code != "file_not_found":
            raise
        return FileExists(exists=False)
    return FileExists(exists=True, type=info.type)


@routes.post(BASE + "/mkdir", answers={200: FileInfo}, errors=GUEST)
async def make_directory(call: Call, body: MakeDirectory) -> FileInfo:
    """Make a directory."""
    return await call.engine.files.make_directory(call.principal, call.sandbox, body)


@routes.post(BASE + "/move", answers={200: FileInfo}, errors=GUEST)
async def move_file(call: Call, body: MoveFile) -> FileInfo:
    """Move or rename."""
    return await call.engine.files.move(call.principal, call.sandbox, body)


@routes.post(BASE + "/chmod", answers={200: FileInfo}, errors=GUEST)
async def change_mode(call: Call, body: ChangeMode) -> FileInfo:
    """Change permissions."""
    return await call.engine.files.change_mode(call.principal, call.sandbox, body)


@routes.post(BASE + "/chown", answers={200: FileInfo}, errors=GUEST)
async def change_owner(call: Call, body: ChangeOwner) -> FileInfo:
    """Change the owner."""
    return await call.engine.files.change_owner(call.principal, call.sandbox, body)


@routes.post(BASE + "/symlink", answers={200: FileInfo}, errors=GUEST)
async def make_symlink(call: Call, body: MakeSymlink) -> FileInfo:
    """Make a symbolic link."""
    return await call.engine.files.make_symlink(call.principal, call.sandbox, body)


@asynccontextmanager
async def _changes(call: Call, query: WatchQuery) -> AsyncIterator[AsyncIterator[ServerEvent]]:
    async def events(source: AsyncIterator[WatchEvent]) -> AsyncIterator[ServerEvent]:
        async for event in source:
            yield ServerEvent(encode(event))

    watch = call.engine.files.watch(call.principal, call.sandbox, query.path, recursive=query.recursive, user=query.user)
    async with watch as source:
        yield events(source)


@routes.get(BASE + "/watch", answers={200: CHANGES}, errors=GUEST)
async def watch_files(call: Call, query: WatchQuery) -> EventStream:
    """Watch a directory. Once the answer has begun, every change is seen; `overflow` says that some were lost."""
    return EventStream(_changes(call, query))


@routes.get(BASE + "/tar", answers={200: TAR}, errors=GUEST)
async def export_tar(call: Call, query: FileQuery) -> ByteStream:
    """Download a directory's contents, or one file, as a tar. `Accept-Encoding: gzip` is understood."""
    source = call.engine.files.export_tar(call.principal, call.sandbox, query.path, user=query.user)
    headers = [(b"vary", b"accept-encoding"), (b"content-disposition", disposition("files.tar"))]
    if accepts_gzip(call.header(b"accept-encoding")):
        return ByteStream(gzipped(source), b"application/x-tar", 200, [*headers, (b"content-encoding", b"gzip")])
    return ByteStream(source, b"application/x-tar", 200, headers)


@routes.put(BASE + "/tar", answers={204: None}, errors=FILE_ERRORS, upload=TAR)
async def import_tar(call: Call, query: FileQuery) -> None:
    """Unpack a tar below a directory, which is made where it is missing. No entry leaves it."""
    body = stream_body(call.headers, call.request.receive, MAX_UPLOAD)
    await call.engine.files.import_tar(call.principal, call.sandbox, query.path, body, user=query.user)
