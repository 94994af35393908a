"""Snapshots: what a sandbox was at one moment, kept whole, and any number of sandboxes out of it.

A snapshot has a disk in the pool, an overlay that nobody writes to above the layer that the sandbox's disk was frozen into, and
(unless it is of the disk alone) a directory with memory and devices (:mod:`stoker.vmm.kept`). Both are in the ledger under the
snapshot's id before they are made. Its row says ``making`` until all of it is on the host's disk; what a crash leaves of one that
is not whole is removed by the next start. Layers and bases are shared by links, so snapshots and sandboxes go in any order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import anyio
from msgspec.structs import replace

from stoker.api.models import CopySandbox, CreateSnapshot, Operation, Principal, Quota, SandboxState, Snapshot, SnapshotState
from stoker.engine.build import begin
from stoker.engine.copies import begin_copy, check_copyable, intend, planned
from stoker.engine.core import Box, Core, Live
from stoker.engine.layers import flatten_in_time, flatten_now
from stoker.engine.pause import about, prepare_guest, saved_place
from stoker.engine.snapshot_rows import intend_in, ready_in, remove
from stoker.engine.state import Record, SnapshotRecord, new_id, require
from stoker.engine.trace import trace
from stoker.engine.travel.inward import bring_in
from stoker.engine.travel.outward import exported
from stoker.errors import Conflict, HostError, NotFound, StokerError
from stoker.guest.copies import BeforeSnapshot
from stoker.host.laps import Laps
from stoker.vmm.driver import NextDisk
from stoker.vmm.kept import Base, again, keep
from stoker.vmm.memory import is_sealed

if TYPE_CHECKING:
    from stoker.engine.operations import Running
    from stoker.vmm.driver import Captured

__all__ = ["Snapshots"]

log = logging.getLogger(__name__)
S = SandboxState
ROOT: Final = 0
COLD: Final = "stoker create --from {0} --cold boots from its disk"
Warm = Callable[["Live"], Awaitable[None]]


class Snapshots:
    """Fits :class:`stoker.server.ports.Snapshots`."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def begin(self) -> None:
        """What was only being made when the daemon ended goes."""
        for record in list(self._core.snapshots.values()):
            if record.state is SnapshotState.MAKING:
                log.warning("removing the snapshot %s, which was not finished", record.id)
                await self.discard(record)

    # -- finding ------------------------------------------------------------------------------------------------------

    def find(self, who: Principal, reference: str) -> SnapshotRecord:
        """By id or name; what belongs to others does not exist."""
        found = self._core.snapshots.get(reference)
        if found is None or found.template:
            mine = [one for one in self._listed() if one.name == reference]
            found = next((one for one in mine if one.owner == who.owner), mine[0] if mine and who.admin else None)
        if found is None or not (who.admin or found.owner == who.owner):
            raise NotFound("snapshot_unknown", f"there is no snapshot {reference}", "stoker snapshot ls")
        return found

    def find_whole(self, who: Principal, reference: str) -> SnapshotRecord:
        """One that can be used. ``snapshot_making`` (Conflict)."""
        found = self.find(who, reference)
        if found.state is not SnapshotState.READY:
            raise Conflict("snapshot_making", f"the snapshot {found.label} is not whole yet", "try again in a moment")
        return found

    def _listed(self) -> Sequence[SnapshotRecord]:
        """All but those that belong to templates."""
        return [one for one in self._core.snapshots.values() if not one.template]

    async def get(self, who: Principal, snapshot: str) -> Snapshot:
        return await asyncio.to_thread(self._value, self.find(who, snapshot))

    async def list(self, who: Principal) -> Sequence[Snapshot]:
        found = [one for one in self._listed() if who.admin or one.owner == who.owner]
        found.sort(key=lambda one: one.created_at, reverse=True)
        return await asyncio.to_thread(lambda: [self._value(one) for one in found])

    def sizes(self, record: SnapshotRecord) -> tuple[int, int]:
        """Bytes that go with it, and those that others have, too. Blocks."""
        own = shared = 0
        with suppress(StokerError, OSError):
            # Each layer is shared with the sandbox that goes on above it.
            usage = self._core.pools.open(record.box.pool).usage(record.id)
            own, shared = usage.own, usage.shared
        with suppress(OSError):
            for entry in os.scandir(saved_place(self._core, record.id)):
                status = entry.stat(follow_symlinks=False)
                if status.st_nlink == 1:
                    own += status.st_blocks * 512
                else:
                    shared += status.st_blocks * 512
        return own, shared

    def _value(self, record: SnapshotRecord) -> Snapshot:
        own, shared = self.sizes(record)
        box = record.box
        return Snapshot(
            id=record.id,
            state=record.state,
            created_at=record.created_at,
            name=record.name,
            tags=record.tags,
            owner=record.owner,
            parent=record.parent or None,
            sandbox=box.id,
            image=box.request.image,
            image_digest=box.image_digest,
            kernel=box.kernel,
            memory=record.memory,
            resources=box.resources,
            own=own,
            shared=shared,
            unfit=record.unfit,
            operation=record.operation,
            steps=record.steps,
        )

    # -- making -------------------------------------------------------------------------------------------------------

    async def create(self, who: Principal, box: Box, request: CreateSnapshot) -> Snapshot:
        """Of a running, frozen or paused sandbox, which goes on as it was."""
        core = self._core
        require(box.record, "snapshot")
        async with box.lock:
            require(box.record, "snapshot")
            check_copyable(box.record)
            core.filling.check(box.record.pool)
            operation = core.operations.begin("snapshot", box.record.owner, box.id)
            error: StokerError | None = None
            try:
                record = await self.take(box, request, operation)
            except StokerError as problem:
                error = problem
                raise
            except OSError as problem:
                error = HostError(
                    "host_failed", f"{problem.strerror}: {problem.filename or 'the host refused it'}", "stoker doctor"
                )
                raise error from None
            finally:
                operation.end(error)
        flatten_in_time(core, box)
        return await asyncio.to_thread(self._value, record)

    async def take(
        self,
        box: Box,
        request: CreateSnapshot,
        operation: Running,
        *,
        template: str = "",
        row: Record | None = None,
        warm: Warm | None = None,
    ) -> SnapshotRecord:
        """The work of it; the box's lock is held. One of a template's has a base of its own, and ``row`` for its sandboxes;
        ``warm`` is done in a running guest when that is ready for it."""
        record = SnapshotRecord(
            id=new_id("sn"),
            owner=box.record.owner,
            state=SnapshotState.MAKING,
            created_at=time.time(),
            box=row or box.record,
            name=request.name,
            tags=request.tags,
            parent=box.record.ancestor,
            memory=request.memory,
            template=template,
            operation=operation.value.id,
        )

        async def make(laps: Laps) -> None:
            if box.record.state is S.PAUSED:
                await self._core.pools.freeze(box.record.pool, box.id)
                trace("snapshot.after_layer")
                await self._beside(record, box.id, box.record.saved)
            else:
                await self._of_running(box, record, request, laps, warm)

        return await self._make(record, operation, make, box)

    async def adopt(
        self, source: SnapshotRecord, row: Record, operation: Running, template: str, *, memory: bool = True
    ) -> SnapshotRecord:
        """The same once more, as a template's."""
        record = replace(
            source,
            id=new_id("sn"),
            state=SnapshotState.MAKING,
            created_at=time.time(),
            box=row,
            name=None,
            tags=[],
            memory=memory and source.memory and not source.unfit,
            template=template,
            operation=operation.value.id,
            steps={},
        )

        async def make(laps: Laps) -> None:
            with laps.lap("save"):
                await self._beside(record, source.id, source.id)

        return await self._make(record, operation, make)

    async def _make(
        self, record: SnapshotRecord, operation: Running, make: Callable[[Laps], Awaitable[None]], box: Box | None = None
    ) -> SnapshotRecord:
        """``make`` does it, between the intent and the row that says that it is whole."""
        core, laps = self._core, Laps()

        with laps.lap("mark"):
            await core.database.write(lambda db: intend_in(core, db, record), durable=True)
        core.snapshots[record.id] = record
        trace("snapshot.after_mark")
        try:
            await make(laps)
            trace("snapshot.after_saved")
            steps = {name: round(seconds * 1000, 3) for name, seconds in laps.seconds.items()}
            record = replace(record, state=SnapshotState.READY, steps=steps)

            also = partial(ready_in, core, record)
            if box is not None and not record.template:
                await core.save(box, event="sandbox.snapshot", also=also, durable=True, ancestor=record.id)
            else:
                await core.database.write(also, durable=True)
            core.snapshots[record.id] = record
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.discard(record)
            raise
        trace("snapshot.after_ready")
        operation.laps(laps.seconds)
        log.info("snapshot %s of %s: %s", record.id, record.box.id, steps)
        return record

    async def _beside(self, record: SnapshotRecord, disk: str, saved: str) -> None:
        """With the layer that another disk stands on, and what was put away elsewhere."""
        core, pool = self._core, record.box.pool
        await asyncio.to_thread(lambda: core.pools.open(pool).beside(disk, record.id))
        trace("snapshot.after_disk")
        if record.memory:
            words = {**about(record.box), "snapshot": record.id}
            place = saved_place(core, record.id)
            await asyncio.to_thread(again, saved_place(core, saved), place, words, flat=bool(record.template))

    async def _of_running(self, box: Box, record: SnapshotRecord, request: CreateSnapshot, laps: Laps, warm: Warm | None) -> None:
        core, pool, live = self._core, box.record.pool, box.live
        if live is None:
            raise HostError("machine_missing", f"{box.record.label} has no machine", f"stoker inspect {box.id}")
        with laps.lap("guest"):
            await prepare_guest(live, box.record, BeforeSnapshot(drop_caches=request.compact))
            if warm is not None:
                await warm(live)
        async with core.copying:
            with laps.lap("layer"):
                await flatten_now(core, box)
                disk = await core.pools.freeze(pool, box.id)
            trace("snapshot.after_layer")
            taken = await live.machine.capture(core.scratch, disks=[NextDisk(ROOT, disk.path)], go_on=True, zeros=request.compact)
            laps.seconds |= taken.steps
            trace("snapshot.after_taken")
            with laps.lap("disk"):
                await asyncio.to_thread(self._disk, box, record)
            trace("snapshot.after_disk")
            if record.memory:
                with laps.lap("save"):
                    await asyncio.to_thread(self._keep, box, record, live, taken)
            core.scratch.trim()

    def _disk(self, box: Box, record: SnapshotRecord) -> None:
        pools, pool = self._core.pools, box.record.pool
        pools.open(pool).beside(box.id, record.id)
        pools.sync_layers(pool, record.id)

    def _keep(self, box: Box, record: SnapshotRecord, live: Live, taken: Captured) -> None:
        fd = live.machine.memory()
        try:
            # A file that a VMM could write to belongs to that machine alone.
            linkable = box.record.base and is_sealed(fd) and not record.template
            base = Base(fd, self._core.places(box.id).memory if linkable else None, box.record.base)
            words = {**about(box.record), "snapshot": record.id, "parent": record.parent}
            keep(saved_place(self._core, record.id), base, taken, live.machine.made_by(), words)
        finally:
            os.close(fd)

    # -- using --------------------------------------------------------------------------------------------------------

    async def start(self, who: Principal, snapshot: str, request: CopySandbox, quota: Quota | None) -> Operation:
        """A new sandbox out of a snapshot; the rest goes on by itself."""
        core, record = self._core, self.find_whole(who, snapshot)
        if record.memory and record.unfit and not request.cold:
            why = f"the memory of {record.label} is of no use here: {record.unfit}"
            raise Conflict("saved_unusable", why, COLD.format(record.label))
        core.filling.check(record.box.pool)
        source = replace(record.box, ancestor=record.id)
        [row] = planned(core, who.owner, source, request, 1, record.id)
        operation = core.operations.begin("create", who.owner, row.id)
        try:
            boots = request.cold or not record.memory
            [box] = await intend(core, [replace(row, disk_of=record.id if boots else "")], operation, quota)
        except BaseException:
            core.operations.discard(operation)
            raise
        if boots:
            begin(core, box, operation, "create")
            return operation.value
        copy = begin_copy(core, box, record.id, saved_place(core, record.id), {}, operation)

        def over(done: asyncio.Future[StokerError | None]) -> None:
            error = done.result() if not done.cancelled() else None
            if error is not None and error.code.startswith("saved_"):
                error.hint = COLD.format(record.label)
            operation.end(error)

        copy.add_done_callback(over)
        return operation.value

    # -- to other hosts and from them -------------------------------------------------------------------------------

    @asynccontextmanager
    async def export_file(self, who: Principal, snapshot: str, *, image: bool) -> AsyncIterator[AsyncIterator[bytes]]:
        """All of it as one file (:mod:`stoker.engine.travel.format`)."""
        async with exported(self._core, self.find_whole(who, snapshot), image=image) as pieces:
            yield pieces

    async def import_file(self, who: Principal, source: AsyncIterator[bytes], name: str | None) -> Snapshot:
        """It is there whole or not at all."""
        return await asyncio.to_thread(self._value, await bring_in(self._core, who, source, name))

    # -- removing -----------------------------------------------------------------------------------------------------

    async def remove(self, who: Principal, snapshot: str) -> None:
        """What was made from it, or after it, stays."""
        await self.discard(self.find(who, snapshot))

    async def prune(self, who: Principal) -> Sequence[Snapshot]:
        """Removes those that have neither a name nor a tag."""
        gone = [one for one in await self.list(who) if not one.name and not one.tags and one.state is SnapshotState.READY]
        for one in gone:
            await self.remove(who, one.id)
        return gone

    async def discard(self, record: SnapshotRecord) -> None:
        """Row and files."""
        await remove(self._core, record)
