"""The rows of snapshots, and what each of them has on the host, in the ledger's words."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from stoker.api.models import SnapshotState
from stoker.engine.core import Core
from stoker.engine.images import is_used
from stoker.engine.ledger import Kind, Ledger
from stoker.engine.pause import saved_place
from stoker.engine.state import SnapshotRecord
from stoker.engine.trace import trace
from stoker.errors import Conflict, NotFound
from stoker.images import inventory
from stoker.images.store import Store

__all__ = ["intend_in", "ready_in", "remove"]


def _put(db: sqlite3.Connection, record: SnapshotRecord) -> None:
    db.execute(
        "INSERT INTO snapshots (id, owner, name, created, record) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET record = excluded.record",
        (record.id, record.owner, record.name, record.created_at, msgspec.json.encode(record).decode()),
    )


def _things(core: Core, record: SnapshotRecord) -> Sequence[tuple[Kind, str]]:
    things = [*core.pools.things(record.box.pool, record.id)]
    if record.memory:
        things.append((Kind.SAVED, str(saved_place(core, record.id))))
    return things


def intend_in(core: Core, db: sqlite3.Connection, record: SnapshotRecord) -> None:
    """Before anything of it is made. ``name_taken`` (Conflict)."""
    if record.name is not None:
        taken = db.execute("SELECT id FROM snapshots WHERE owner = ? AND name = ?", (record.owner, record.name)).fetchone()
        if taken is not None:
            raise Conflict("name_taken", f"there is a snapshot {record.name} already: {taken[0]}", "another name")
    _put(db, record)
    Ledger.intend_in(db, record.id, _things(core, record))


def ready_in(core: Core, record: SnapshotRecord, db: sqlite3.Connection) -> None:
    """All of it is on the host's disk."""
    if record.id not in core.snapshots:
        raise Conflict("snapshot_removed", f"the snapshot {record.label} was removed while it was made")
    _put(db, record)
    for kind, name in _things(core, record):
        Ledger.live_in(db, record.id, kind, name)


async def remove(core: Core, record: SnapshotRecord) -> None:
    """What was made from it, or after it, stays."""
    children = [one for one in core.snapshots.values() if one.parent == record.id]

    def unmark(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM snapshots WHERE id = ?", (record.id,))
        for child in children:
            _put(db, replace(child, parent=record.parent))

    await core.database.write(unmark)
    core.snapshots.pop(record.id, None)
    for child in children:
        core.snapshots[child.id] = replace(child, parent=record.parent)
    trace("snapshot.after_unmark")
    # From here on its things are nobody's: a start of the daemon removes what is left of them.
    for entry in await core.ledger.of(record.id):
        await core.release(entry)
    await core.database.write(lambda db: Ledger.released_in(db, record.id))
    if record.imported and record.state is SnapshotState.MAKING:
        await _forget_image(core, record.box.image_digest)
    trace("snapshot.after_gone")


async def _forget_image(core: Core, digest: str) -> None:
    """The image that came with a file which did not become a snapshot, if nothing else has to do with it."""
    store = Store(core.settings)
    try:
        item, _ = await asyncio.to_thread(inventory.find, store, "images", digest)
    except NotFound:
        return
    if not item.names and not inventory.shared_elsewhere(core.settings, "images"):
        await inventory.remove(store, item, refused=lambda: is_used(core, "images", digest))
