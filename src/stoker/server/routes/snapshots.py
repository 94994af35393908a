"""Snapshots: what a sandbox was at one moment, and sandboxes out of it."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from stoker.api.models import CopySandbox, CreateSnapshot, Operation, Sandbox, Snapshot, SnapshotList
from stoker.api.types import Name
from stoker.server.bodies import stream_body
from stoker.server.endpoint import SANDBOX, Call, Content, Routes
from stoker.server.query import Query
from stoker.server.replies import ByteStream, Reply, json_reply
from stoker.server.routes.files import MAX_UPLOAD
from stoker.server.routes.sandboxes import CreateQuery, finished

__all__ = ["routes"]

routes: Routes[Any] = Routes("snapshots")
FILE = Content(("application/zstd",), "A snapshot's file.")


@routes.post("/v1/sandboxes/{sandbox}/snapshots", answers={201: Snapshot}, errors=(403, *SANDBOX, 429, 502, 503, 504))
async def create_snapshot(call: Call, body: CreateSnapshot) -> Reply:
    """Keep what a sandbox is now.

    Disk, memory and devices of one moment, whole on the host's disk when this answers. A running sandbox stands for milliseconds
    and goes on; a paused one stays paused.
    """
    made = await call.engine.snapshot(call.principal, call.sandbox, body)
    return json_reply(made, 201, [(b"location", f"/v1/snapshots/{made.id}".encode())])


class ExportQuery(Query, frozen=True):
    image: Annotated[bool, Meta(description="With the image that its disk lies above.")] = True


class ImportQuery(Query, frozen=True):
    name: Annotated[Name | None, Meta(description="Of the new snapshot; its name elsewhere is not kept.")] = None


@routes.get("/v1/snapshots/{snapshot}/file", answers={200: FILE}, errors=(404, 409, 429, 502, 503, 504))
async def export_snapshot(call: Call, query: ExportQuery) -> ByteStream:
    """Download a snapshot as one file, to be imported on another host.

    One zstd frame with disk, memory and devices, and the digest of each. Without its image the other host has to have that already.
    """
    source = call.engine.snapshots.export_file(call.principal, call.path["snapshot"], image=query.image)
    return ByteStream(source, FILE.media[0].encode(), 200, [])


@routes.post("/v1/snapshots", answers={201: Snapshot}, errors=(404, 409, 413, 429, 502, 503, 504), upload=FILE)
async def import_snapshot(call: Call, query: ImportQuery) -> Reply:
    """Make a snapshot out of such a file.

    It is there whole or not at all: every digest is checked first. One whose memory cannot be used here (another VMM or processor)
    is there all the same, with the reason in `unfit`: its disk boots. Memory is only used of what administrators import.
    """
    body = stream_body(call.headers, call.request.receive, MAX_UPLOAD)
    made = await call.engine.snapshots.import_file(call.principal, body, query.name)
    return json_reply(made, 201, [(b"location", f"/v1/snapshots/{made.id}".encode())])


@routes.get("/v1/snapshots", answers={200: SnapshotList})
async def list_snapshots(call: Call) -> SnapshotList:
    """All snapshots, newest first."""
    return SnapshotList(items=list(await call.engine.snapshots.list(call.principal)))


@routes.get("/v1/snapshots/{snapshot}", answers={200: Snapshot}, errors=(404,))
async def get_snapshot(call: Call) -> Snapshot:
    """One snapshot, by id or name."""
    return await call.engine.snapshots.get(call.principal, call.path["snapshot"])


@routes.delete("/v1/snapshots/{snapshot}", answers={204: None}, errors=(404, 503))
async def remove_snapshot(call: Call) -> None:
    """Remove a snapshot. What was made from it, or after it, stays."""
    await call.engine.snapshots.remove(call.principal, call.path["snapshot"])


@routes.delete("/v1/snapshots", answers={200: SnapshotList}, errors=(503,))
async def prune_snapshots(call: Call) -> SnapshotList:
    """Remove the snapshots that have neither a name nor a tag."""
    return SnapshotList(items=list(await call.engine.snapshots.prune(call.principal)))


@routes.post(
    "/v1/snapshots/{snapshot}/sandboxes",
    answers={201: Sandbox, 202: Operation},
    errors=(403, 404, 409, 429, 502, 503, 504),
)
async def start_snapshot(call: Call, query: CreateQuery, body: CopySandbox) -> Reply:
    """Create a sandbox out of a snapshot.

    It goes on where the snapshot was taken, as another machine. `cold`: it boots from the snapshot's disk instead.
    """
    operation = await call.engine.start_snapshot(call.principal, call.path["snapshot"], body)
    if not query.wait:
        return json_reply(operation, 202, [(b"location", f"/v1/operations/{operation.id}".encode())])
    sandbox = await finished(call, operation)
    return json_reply(sandbox, 201, [(b"location", f"/v1/sandboxes/{sandbox.id}".encode())])
