"""Volumes: file systems that outlive sandboxes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from stoker.api.models import CreateVolume, ResizeVolume, Volume, VolumePage
from stoker.api.types import Name
from stoker.api.volumes import VolumeSize
from stoker.errors import InvalidRequest
from stoker.server.bodies import stream_body
from stoker.server.download import accepts_gzip, gzipped
from stoker.server.endpoint import Call, Content, Routes
from stoker.server.query import Query
from stoker.server.replies import ByteStream, Reply, json_reply
from stoker.server.routes.files import MAX_UPLOAD, TAR
from stoker.server.routes.sandboxes import Cursor, Limit

__all__ = ["routes"]

routes: Routes[Any] = Routes("volumes")
RAW = Content(("application/octet-stream",), "The file system as it is.")
IMPORT_SIZE = 10 << 30


class VolumesQuery(Query, frozen=True):
    limit: Limit = 100
    cursor: Cursor | None = None


class ImportQuery(Query, frozen=True):
    size: Annotated[VolumeSize, Meta(description="Of the new volume, in bytes.")] = IMPORT_SIZE


@routes.post("/v1/volumes", answers={201: Volume}, errors=(409, 429))
async def create_volume(call: Call, body: CreateVolume) -> Reply:
    """Make an empty volume."""
    return json_reply(await call.engine.volumes.create(call.principal, body), 201)


@routes.get("/v1/volumes", answers={200: VolumePage})
async def list_volumes(call: Call, query: VolumesQuery) -> VolumePage:
    """List volumes, newest first."""
    return await call.engine.volumes.list(call.principal, limit=query.limit, cursor=query.cursor)


@routes.get("/v1/volumes/{volume}", answers={200: Volume}, errors=(404,))
async def get_volume(call: Call) -> Volume:
    """One volume, and who uses it."""
    return await call.engine.volumes.get(call.principal, call.path["volume"])


@routes.delete("/v1/volumes/{volume}", answers={204: None}, errors=(404, 409))
async def remove_volume(call: Call) -> None:
    """Remove a volume and all that is in it. `volume_in_use` (409) names its users."""
    await call.engine.volumes.remove(call.principal, call.path["volume"])


@routes.post("/v1/volumes/{volume}/resize", answers={200: Volume}, errors=(404, 409, 429, 502, 503, 504))
async def resize_volume(call: Call, body: ResizeVolume) -> Volume:
    """Make a volume larger, also under a running sandbox that writes to it. One that is only read is refused (`volume_in_use`)."""
    return await call.engine.volumes.resize(call.principal, call.path["volume"], body.size)


@routes.put("/v1/volumes/{volume}/tar", answers={201: Volume}, errors=(409, 413, 429, 502, 504), upload=TAR)
async def import_volume(call: Call, query: ImportQuery) -> Reply:
    """Make a volume of this name with the content of a tar.

    Owners, modes, links, extended attributes and holes (GNU's sparse format 1.0) are the archive's. The volume is there whole or
    not at all. `Content-Encoding: gzip` is undone.
    """
    try:
        name = msgspec.convert(call.path["volume"], Name)
    except msgspec.ValidationError:
        raise InvalidRequest("bad_name", "a volume's name has letters, digits, '.', '_' and '-', at most 64") from None
    body = stream_body(call.headers, call.request.receive, MAX_UPLOAD)
    return json_reply(await call.engine.volumes.import_tar(call.principal, name, query.size, body), 201)


@routes.get("/v1/volumes/{volume}/tar", answers={200: TAR}, errors=(404, 409, 429, 502, 504))
async def export_volume(call: Call) -> ByteStream:
    """Download a volume's content as a tar. A volume that somebody writes to is refused. `Accept-Encoding: gzip` is understood."""
    source = call.engine.volumes.export_tar(call.principal, call.path["volume"])
    if accepts_gzip(call.header(b"accept-encoding")):
        return ByteStream(
            gzipped(source), b"application/x-tar", 200, [(b"content-encoding", b"gzip"), (b"vary", b"accept-encoding")]
        )
    return ByteStream(source, b"application/x-tar", 200, [(b"vary", b"accept-encoding")])


@routes.get("/v1/volumes/{volume}/raw", answers={200: RAW}, errors=(404, 409))
async def export_raw_volume(call: Call) -> ByteStream:
    """Download a volume as it is: a raw ext4 file system. One that somebody writes to is refused."""
    volume = await call.engine.volumes.get(call.principal, call.path["volume"])

    @asynccontextmanager
    async def pieces() -> AsyncIterator[AsyncIterator[bytes]]:
        async with call.engine.volumes.export_raw(call.principal, volume.id) as (_, source):
            yield source

    return ByteStream(pieces(), b"application/octet-stream", 200, [], volume.size)
