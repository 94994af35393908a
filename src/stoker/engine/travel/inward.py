"""A snapshot out of a file that may come from anybody.

Nothing is a snapshot until every digest was found right. The row (``making``) and the ledger come first; the image is unpacked in
the store's staging, the disk as half a clone of the pool, memory and devices beside their place: what a crash leaves of them is
removed by the next start. Then, in this order: the image becomes an entry of the store (without a name), the disk a layer above it,
the row says ``ready``.

Whether its memory can be taken up here is asked as a restore asks it; what speaks against it is told, and its disk boots.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
from msgspec.structs import replace

from stoker.api.models import Principal, Resources, SandboxState, SnapshotState, Versions
from stoker.engine.build import machine_request
from stoker.engine.pause import about, saved_place
from stoker.engine.snapshot_rows import intend_in, ready_in, remove
from stoker.engine.state import Record, SnapshotRecord, new_id
from stoker.engine.trace import trace
from stoker.engine.travel.format import Manifest, Part, Reader, damaged
from stoker.engine.travel.looking import check, image_here, kernel_here
from stoker.engine.travel.outward import portable_request
from stoker.engine.travel.pull import Pull
from stoker.engine.wake import unfit
from stoker.errors import CapacityExhausted, HostError, StokerError
from stoker.host.durable import whole_directory
from stoker.host.ext4 import read_superblock
from stoker.images.store import MAIN, Store
from stoker.storage.overlay import CLUSTER
from stoker.storage.overlay_writer import OverlayWriter
from stoker.storage.strategy import Base
from stoker.vmm.kept import describe, staging
from stoker.vmm.qemu.facts import qemu_facts
from stoker.vmm.saved import program

if TYPE_CHECKING:
    from stoker.engine.core import Core

__all__ = ["bring_in"]

log = logging.getLogger(__name__)
GRAIN: Final = 4096
CLOCK: Final = 1e-3
"""By so much may the frequency of the clock that a guest was told of differ from this host's."""
FOREIGN: Final = "the state of devices is taken from administrators of this host only"


@dataclass(frozen=True, slots=True)
class _Arrival:
    """What is to be made of a file. ``made_by``: what made its memory, in this host's words; ``stage``: where its image goes.

    None: it is here already.
    """

    manifest: Manifest
    record: SnapshotRecord
    made_by: dict[str, Any]
    stage: Path | None


async def bring_in(core: Core, who: Principal, source: AsyncIterator[bytes], name: str | None) -> SnapshotRecord:
    """Reads the file and makes the snapshot. ``bad_snapshot_file`` (InvalidRequest) says what is wrong with it."""
    pull = Pull(source)
    reader = Reader(pull.more)
    began = time.perf_counter()
    manifest = await pull.run(reader.manifest)
    await asyncio.to_thread(check, core, manifest)
    core.filling.check(core.pools.default)
    store = Store(core.settings)
    async with AsyncExitStack() as stack:
        here = await image_here(store, manifest, stack)
        stage = None if here else await stack.enter_async_context(store.stage())
        kernel = kernel_here(store, manifest)
        record = _record(core, who, manifest, name, kernel)
        arrival = _Arrival(manifest, record, await _made_by(core, manifest), None if stage is None else stage.path / "image")
        await core.database.write(lambda db: intend_in(core, db, record), durable=True)
        core.snapshots[record.id] = record
        trace("import.after_mark")
        try:
            await pull.run(lambda: _unpack(core, arrival, reader))
            trace("import.after_unpacked")
            if stage is not None and arrival.stage is not None:
                await asyncio.to_thread(store.publish_as, stage, arrival.stage, manifest.image.entry.encode())
                await image_here(store, manifest, stack)
                trace("import.after_image")
            await asyncio.to_thread(_take_disk, core, arrival)
            trace("import.after_disk")
            why = await _unfit(core, who, arrival) if record.memory else ""
            steps = {"all": round((time.perf_counter() - began) * 1000, 3)}
            ready = replace(record, state=SnapshotState.READY, unfit=why, steps=steps)
            await core.database.write(lambda db: ready_in(core, ready, db), durable=True)
        except BaseException as problem:
            with anyio.CancelScope(shield=True):
                await remove(core, record)
            if isinstance(problem, OSError):
                raise _words(problem) from None
            raise
    core.snapshots[record.id] = ready
    trace("import.after_ready")
    log.info("snapshot %s came in from %s%s", record.id, manifest.id, f"; its memory is of no use here: {why}" if why else "")
    return ready


def _words(problem: OSError) -> StokerError:
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityExhausted("no_space", "the disk filled up while the snapshot was unpacked", "stoker rm, stoker gc")
    return HostError("host_failed", f"{problem.strerror}: {problem.filename or 'the host refused it'}", "stoker doctor")


# -- what it becomes ----------------------------------------------------------------------------------------------------


def _record(core: Core, who: Principal, manifest: Manifest, name: str | None, kernel: str) -> SnapshotRecord:
    machine = manifest.machine
    request = portable_request(machine.request)
    place = Store(core.settings).entry("images", manifest.image.digest) / MAIN["images"]
    box = Record(
        id=machine.id,
        owner=who.owner,
        state=SandboxState.STOPPED,
        request=request,
        created_at=manifest.created_at,
        resources=Resources(cpus=machine.cpus, memory=machine.memory, disk=machine.disk),
        image_digest=manifest.image.digest,
        image_path=str(place),
        kernel_path=kernel,
        kernel=machine.kernel,
        env=machine.env,
        user=machine.user,
        workdir=machine.workdir,
        command=machine.command,
        pool=core.pools.default,
        boots=1,
        generation=machine.generation,
        versions=Versions(accelerator=machine.accelerator, agent=machine.agent),
    )
    return SnapshotRecord(
        id=new_id("sn"),
        owner=who.owner,
        state=SnapshotState.MAKING,
        created_at=time.time(),
        box=box,
        name=name,
        tags=list(manifest.tags),
        memory=manifest.part("memory") is not None,
        imported=True,
    )


# -- unpacking --------------------------------------------------------------------------------------------------------


def _unpack(core: Core, arrival: _Arrival, reader: Reader) -> None:
    """All of the file, to where a crash leaves nothing of it. In a thread."""
    record, manifest = arrival.record, arrival.manifest
    with ExitStack() as stack:
        place = saved_place(core, record.id)
        beside = stack.enter_context(whole_directory(place, staging(place))) if record.memory else None
        for part in manifest.parts:
            if part.name == "disk":
                _disk(reader, part, core.pools.open(record.box.pool).receive(record.id))
            elif part.name == "image":
                _write_image(reader, part, arrival.stage)
            elif beside is not None:
                _write(reader, part, beside / part.name)
        reader.end()
        if beside is not None:
            try:
                describe(beside, arrival.made_by, {**about(record.box), "snapshot": record.id}, record.box.resources.memory)
            except HostError as error:
                raise damaged(error.message) from None


def _disk(reader: Reader, part: Part, path: Path) -> None:
    with open(path, "xb", opener=_private) as file:
        writer = OverlayWriter(file.fileno(), part.size)
        for offset, length, data in reader.part(part, CLUSTER):
            if data is None:
                writer.zeros(offset, length)
            else:
                writer.data(offset, data)
        writer.finish()
        os.fsync(file.fileno())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _write(reader: Reader, part: Part, path: Path) -> None:
    with open(path, "xb", opener=_private) as file:
        os.ftruncate(file.fileno(), part.size)
        for offset, _, data in reader.part(part, GRAIN):
            view = memoryview(data or b"")
            while view:
                done = os.pwrite(file.fileno(), view, offset)
                view, offset = view[done:], offset + done
        os.fsync(file.fileno())


def _write_image(reader: Reader, part: Part, tree: Path | None) -> None:
    if tree is None:
        for _ in reader.part(part, GRAIN):
            pass
        return
    tree.mkdir()
    path = tree / MAIN["images"]
    _write(reader, part, path)
    with open(path, "rb") as file:
        superblock = read_superblock(file.fileno())
        if superblock is None or superblock.size > part.size:
            raise damaged("its image holds no whole ext4 file system")
        os.fchmod(file.fileno(), 0o444)


def _take_disk(core: Core, arrival: _Arrival) -> None:
    record = arrival.record
    path = Path(record.box.image_path)
    core.pools.open(record.box.pool).received(record.id, Base(path, arrival.manifest.image.size))
    core.pools.sync_layers(record.box.pool, record.id)


# -- fitness ----------------------------------------------------------------------------------------------------------


async def _made_by(core: Core, manifest: Manifest) -> dict[str, Any]:
    """As it came, but that the VMM's program has this host's name where it is the same by its content, and none where it is not."""
    if manifest.program is None:
        return {**manifest.made_by, "program": None}
    facts = await qemu_facts(core.settings)

    def digest() -> str:
        with open(facts.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    same = await asyncio.to_thread(digest) == manifest.program.sha256
    return {**manifest.made_by, "program": program(facts) if same else None}


async def _unfit(core: Core, who: Principal, arrival: _Arrival) -> str:
    """Why a machine of this host cannot take up its memory; empty: it can."""
    if not who.admin:
        return FOREIGN
    record, manifest = arrival.record, arrival.manifest
    if arrival.made_by["program"] is None:
        return "another build of the virtual machine made it"
    facts = await qemu_facts(core.settings)
    clocks = (manifest.program.tsc_khz if manifest.program is not None else 0, facts.tsc_khz)
    if manifest.machine.accelerator == "tcg" and all(clocks) and abs(clocks[0] - clocks[1]) > CLOCK * clocks[1]:
        return f"its guest counts on a clock of {clocks[0]} kHz, this host's has {clocks[1]} kHz"
    places = core.places(record.id, record.box.pool)
    request = machine_request(core, record.box, places)
    disk = core.pools.opener(record.box.pool, record.id)
    try:
        return await unfit(request, core.settings, places.directory, disk, arrival.made_by)
    except StokerError as error:
        return error.message
