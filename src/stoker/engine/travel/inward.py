"""A snapshot out of a file that may come from anybody.

Nothing is a snapshot until every digest was found right. The row (``making``) and the ledger come first; the image is unpacked in
the store's staging, the disk as half a clone of the pool, memory and devices beside their place: what a crash leaves of them is
removed by the next start. Then, in this order: the image becomes an entry of the store (without a name), the disk a layer above it,
the row says ``ready``.

Whether its memory can be taken up here is asked as a restore asks it; what speaks against it is told, and its disk boots.
"""

from __future__ import annotations

import asyncio
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
import msgspec
from msgspec.structs import replace

from stoker.api.models import Principal, Resources, SandboxState, SnapshotState, Versions
from stoker.engine.build import machine_request
from stoker.engine.pause import about, saved_place
from stoker.engine.snapshot_rows import intend_in, ready_in, remove
from stoker.engine.state import Record, SnapshotRecord, new_id
from stoker.engine.trace import trace
from stoker.engine.travel.format import Image, Manifest, Part, Reader, damaged
from stoker.engine.travel.outward import FACTS, portable_request
from stoker.engine.travel.pull import Pull
from stoker.engine.wake import unfit
from stoker.errors import CapacityExhausted, HostError, NotFound, StokerError
from stoker.host.durable import whole_directory
from stoker.host.ext4 import read_superblock
from stoker.images import inventory
from stoker.images.store import MAIN, Store
from stoker.images.store import Manifest as Entry
from stoker.storage.overlay import CLUSTER, MAX_SIZE
from stoker.storage.overlay_writer import OverlayWriter
from stoker.storage.strategy import Base
from stoker.vmm.kept import describe, staging
from stoker.vmm.qemu.facts import qemu_facts
from stoker.vmm.saved import program

if TYPE_CHECKING:
    from stoker.engine.core import Core

__all__ = ["bring_in"]

log = logging.getLogger(__name__)
ORDER: Final = ("image", "disk", "memory", "delta", "state")
GRAIN: Final = 4096
ROOM: Final = 64 << 20
"""Bytes that stay free besides what the file says it unpacks to."""
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
    _check(core, manifest)
    core.filling.check(core.pools.default)
    store = Store(core.settings)
    async with AsyncExitStack() as stack:
        here = await _here(store, manifest, stack)
        stage = None if here else await stack.enter_async_context(store.stage())
        kernel = _kernel(store, manifest)
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
                await _here(store, manifest, stack)
                trace("import.after_image")
            await asyncio.to_thread(_take_disk, core, arrival)
            trace("import.after_disk")
            why = await _unfit(core, who, arrival) if record.memory else ""
            steps = {"all": round((time.perf_counter() - began) * 1000, 3)}
            ready = replace(record, state=SnapshotState.READY, unfit=why, steps=steps)
            await core.database.write(lambda db: ready_in(core, ready, db), durable=True)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await remove(core, record)
            raise
    core.snapshots[record.id] = ready
    trace("import.after_ready")
    log.info("snapshot %s came in from %s%s", record.id, manifest.id, f"; its memory is of no use here: {why}" if why else "")
    return ready


# -- looking ----------------------------------------------------------------------------------------------------------


def _check(core: Core, manifest: Manifest) -> None:
    """What the parts are, and whether there is room for them."""
    names = [part.name for part in manifest.parts]
    if names != [name for name in ORDER if name in names] or "disk" not in names:
        raise damaged("its parts are " + ", ".join(names))
    memory, state, delta = manifest.part("memory"), manifest.part("state"), manifest.part("delta")
    if (memory is None) != (state is None) or (delta is not None and memory is None):
        raise damaged("it has a part of a machine's memory")
    disk, image = manifest.part("disk"), manifest.part("image")
    if disk is None or disk.size % 512 or not manifest.image.size <= disk.size <= MAX_SIZE or disk.size != manifest.machine.disk:
        raise damaged("the size of its disk")
    if manifest.image.size % 512 or (image is not None and image.size != manifest.image.size):
        raise damaged("the size of its image")
    _check_image(manifest.image)
    if memory is not None and memory.size != manifest.machine.memory:
        raise damaged("the size of its memory")
    for part in manifest.parts:
        if part.bytes > part.size:
            raise damaged(f"the size of its {part.name}")
    wanted = sum(part.bytes for part in manifest.parts) + ROOM
    status = os.statvfs(core.settings.data_dir)
    free = min(status.f_bavail * status.f_frsize, core.pools.space(core.pools.default).free)
    if wanted > free:
        raise CapacityExhausted(
            "no_space", f"the snapshot unpacks to {wanted >> 20} MiB and {free >> 20} MiB are free", "stoker rm, stoker gc"
        )


def _check_image(image: Image) -> None:
    """Its entry is of the kind that the store makes of a root file system, and has the digest that it says."""
    data = image.entry.encode()
    try:
        entry = msgspec.json.decode(data, type=Entry)
    except msgspec.DecodeError:
        raise damaged("its image's entry") from None
    facts = entry.facts
    known = facts.keys() <= FACTS and facts.get("size") == image.size and facts.get("fstype") == "ext4"
    named = isinstance(facts.get("suite", ""), str) and len(entry.name) <= 1024
    if entry.kind != "images" or not known or not named or hashlib.sha256(data).hexdigest() != image.digest:
        raise damaged("its image's entry")


async def _here(store: Store, manifest: Manifest, stack: AsyncExitStack) -> bool:
    """Whether its image is in the store; it stays there until the stack is closed."""
    digest = manifest.image.digest
    if store.lookup("images", digest) is None:
        if manifest.part("image") is None:
            label = manifest.image.label or digest
            raise NotFound(
                "image_missing", f"the file is without its image, {label} ({digest}), which is not here", "export it with its image"
            )
        return False
    fd = inventory.hold(store, "images", digest)
    if fd is None:
        raise HostError("image_going", f"the image {digest} is just being removed", "try again")
    stack.callback(os.close, fd)
    await store.require_intact("images", digest)
    if os.stat(store.entry("images", digest) / MAIN["images"]).st_size != manifest.image.size:
        raise damaged("the size of its image")
    return True


def _kernel(store: Store, manifest: Manifest) -> str:
    """The kernel it boots with: its own, or else what its name stands for here. (Memory brings its kernel along.)"""
    machine = manifest.machine
    for name in (machine.kernel_digest, inventory.pointer(machine.kernel)):
        if name and "/" not in name and (found := store.lookup("kernels", name)) is not None:
            return found[0]
    raise NotFound(
        "kernel_missing",
        f"the snapshot's kernel, {machine.kernel} ({machine.kernel_digest}), is not here, nor any of that name",
        f"stoker run --kernel {machine.kernel or 'NAME'} {manifest.image.label or 'IMAGE'} true gets it",
    )


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
