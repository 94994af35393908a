"""New sandboxes out of the memory and disk of another: what a fork and a create from a snapshot have in common.

A copy has a row, a disk above the layer that both share, and memory over a base that both map. It is another machine: the guest is
told so before anything else can be asked of it, and a copy that cannot be made safe is not made.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from msgspec.structs import replace

import stoker
from stoker.api.models import CopySandbox, Quota, SandboxState
from stoker.engine.build import make_hub, make_places, requested, running, undo, why
from stoker.engine.claims import claim_in
from stoker.engine.core import Box, Core, put
from stoker.engine.create import expiry, settled
from stoker.engine.ledger import Ledger
from stoker.engine.state import Record, new_id
from stoker.engine.wake import Identity
from stoker.errors import Conflict, StokerError

if TYPE_CHECKING:
    from stoker.api.models import Event
    from stoker.engine.hub import Started
    from stoker.engine.operations import Running
    from stoker.engine.wake import TakeMemory
    from stoker.vmm.driver import Machine

__all__ = ["begin_copy", "check_copyable", "intend", "planned"]


def check_copyable(record: Record) -> None:
    """Refuses what a copy would share with its original: both would write to it."""
    writable = [volume.name for volume in record.volumes if not volume.read_only]
    if writable:
        raise Conflict(
            "volume_writable",
            f"{record.label} writes to its volume {writable[0]}, and a copy of it would too",
            "a sandbox with volumes that it only reads can be copied",
        )
    if record.pinned or record.joined:
        raise Conflict(
            "address_own",
            f"{record.label} has addresses of its own, and a copy of its memory would have them too",
            "machines of the network nat without a run id, a range, a TAP of their own or further interfaces can be copied",
        )
    if record.request.app is not None:
        raise Conflict("app_disk", f"{record.label} has an app: its disk is not one that can be shared yet")


def planned(core: Core, owner: str, source: Record, request: CopySandbox, count: int, parent: str) -> list[Record]:
    """The rows of ``count`` copies. With a name and more than one they are called NAME-1, NAME-2..."""
    found = []
    for number in range(1, count + 1):
        name = request.name if request.name is None or count == 1 else f"{request.name}-{number}"
        labels = request.labels if request.labels is not None else source.request.labels
        timeout = settled(request.timeout) if request.timeout is not None else source.timeout
        found.append(
            Record(
                id=new_id("sb"),
                owner=owner,
                state=SandboxState.CREATING,
                request=replace(source.request, name=name, publish=[], labels=labels, timeout=timeout, lease=False, start=False),
                created_at=time.time(),
                name=name,
                resources=source.resources,
                image_digest=source.image_digest,
                image_path=source.image_path,
                kernel_path=source.kernel_path,
                kernel=source.kernel,
                env=source.env,
                user=source.user,
                workdir=source.workdir,
                command=source.command,
                hostname=request.hostname or name or "",
                volumes=source.volumes,
                timeout=timeout,
                expires_at=expiry(timeout),
                versions=replace(source.versions, daemon=stoker.__version__),
                pool=source.pool,
                generation=source.generation,
                parent=parent,
                ancestor=source.ancestor,
            )
        )
    return found


async def intend(core: Core, records: list[Record], operation: Running, quota: Quota | None) -> list[Box]:
    """Admits the copies and writes their rows and what they will consist of, all or none."""
    boxes = [Box(replace(record, operation=operation.value.id)) for record in records]
    events: list[Event] = []
    try:
        for box in boxes:
            await core.admit(box, quota)

        def work(db: sqlite3.Connection) -> None:
            for box in boxes:
                record = box.record
                if record.name is not None:
                    where = (record.owner, record.name)
                    taken = db.execute("SELECT id FROM sandboxes WHERE owner = ? AND name = ?", where).fetchone()
                    if taken is not None:
                        raise Conflict("name_taken", f"there is a sandbox {record.name} already: {taken[0]}", "another name")
                event = core.events.make(
                    "sandbox.created", box.id, name=record.name, image=record.request.image, parent=record.parent
                )
                events.append(event)
                put(db, record)
                claim_in(db, record.id, record.label, record.volumes)
                Ledger.intend_in(db, box.id, core.places(box.id, record.pool).things(lease=False, sandbox=box.id))
                core.events.insert_in(db, event)

        await core.database.write(work, durable=True)
    except BaseException:
        for box in boxes:
            core.admission.release(box.id)
        raise
    for box, event in zip(boxes, events, strict=True):
        core.add(box)
        core.events.tell(box.record.owner, event)
    return boxes


Otherwise = Callable[[StokerError], Awaitable[bool]]
"""What is done where the memory could not be taken up; False: nothing. A copy with one waits for its turn among the boots."""


def begin_copy(
    core: Core,
    box: Box,
    source: str,
    memory: Path | TakeMemory,
    rows: dict[int, Started],
    operation: Running,
    identity: Identity | None = None,
    otherwise: Otherwise | None = None,
) -> asyncio.Future[StokerError | None]:
    """Has a copy made by a task that is its own: who destroys the copy ends it. The future is done when that is over."""
    who = identity or Identity(box.record.generation + 1, copy=True, hostname=box.record.hostname or box.id)
    result: asyncio.Future[StokerError | None] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        error = await bring_up(core, box, source, memory, rows, operation, who, otherwise)
        result.set_result(error)

    def over(task: asyncio.Task[None]) -> None:
        box.work = None
        if not result.done():
            result.set_result(Conflict("cancelled", f"{box.record.label} was destroyed before it was made"))

    box.work = core.spawn(work(), f"copy {box.id}")
    box.work.add_done_callback(over)
    return result


async def bring_up(
    core: Core,
    box: Box,
    source: str,
    memory: Path | TakeMemory,
    rows: dict[int, Started],
    operation: Running,
    identity: Identity,
    otherwise: Otherwise | None,
) -> StokerError | None:
    """From the row to a machine that runs, or back to nothing and a failed row: then why. Its disk is on ``source``'s layer."""
    try:
        async with box.lock:
            try:
                async with core.queue.turn(box.record.owner) if otherwise is not None else nullcontext():
                    await _make(core, box, source, memory, rows, operation, identity)
            except StokerError as problem:
                if otherwise is None or not await otherwise(problem):
                    raise
    except BaseException as cause:
        error = why(cause, core, box)
        with anyio.CancelScope(shield=True):
            async with box.lock:
                if not box.gone and not box.record.doomed:
                    await undo(core, box, error)
        if isinstance(cause, asyncio.CancelledError):
            raise
        return error
    return None


async def _make(
    core: Core,
    box: Box,
    source: str,
    memory: Path | TakeMemory,
    rows: dict[int, Started],
    operation: Running,
    identity: Identity,
) -> None:
    places = core.places(box.id)
    await make_places(core, box, places)
    request = requested(core, box, places, copied=True)

    async def ready(machine: Machine) -> None:
        """Nothing is lost when this is interrupted: what it is a copy of is there."""

    disk = core.pools.copier(box.record.pool, source, box.id)
    booted = await core.booter.resume(request, places.directory, disk, places.cgroup, operation, memory, identity, ready)
    with booted.held:
        hub = make_hub(core, box)
        try:
            await hub.adopt(booted.agent, rows)
            await running(core, box, booted, hub, rows)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await booted.agent.aclose()
                await booted.machine.close()
            raise
