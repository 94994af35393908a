"""The work of a create and a start: everything on the host in the order of the ledger, the boot, the row that says it runs.

Each step has its undo. A create that fails releases everything it made and leaves a ``failed`` row with the error; a start that
fails keeps the disk. The work belongs to the engine: who asked for it may go.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec
from msgspec.structs import replace

import stoker
from stoker.api.models import (
    InitMode,
    NetworkMode,
    Origin,
    SandboxState,
    Versions,
)
from stoker.engine.booter import Booted
from stoker.engine.core import Box, Core, Live, Places, released_in
from stoker.engine.ending import detach, ended, release_all
from stoker.engine.hub import Hub, Started, decode_started
from stoker.engine.ledger import Entry, Kind, Ledger
from stoker.engine.network_words import ON_THE_HOST
from stoker.engine.operations import Running
from stoker.engine.release import release
from stoker.engine.slots import make_slots
from stoker.engine.state import Attached, Record, to_body
from stoker.engine.trace import trace
from stoker.engine.volume_files import volume_path, volume_ready
from stoker.engine.wake import certificate
from stoker.engine.watch import watch
from stoker.errors import Conflict, HostError, InternalError, StokerError
from stoker.host import cgroups
from stoker.host.cgroups import Limits
from stoker.storage.app import app_image
from stoker.vmm.machine import translated_code

if TYPE_CHECKING:
    from stoker.engine.boot import MachineRequest
    from stoker.vmm.driver import Machine

__all__ = [
    "begin",
    "boot_up",
    "cancel",
    "enter_machine",
    "enter_unit",
    "kept_rows",
    "let_go",
    "made_in",
    "machine_request",
    "make_hub",
    "make_places",
    "requested",
    "run_main",
    "running",
    "serve",
    "undo",
    "why",
]

log = logging.getLogger(__name__)
FAILED_KEPT: Final = 64
"""Failed rows kept of one owner."""
VMM_MOST: Final = 256 << 20
"""Bytes that a VMM may take besides the guest's memory and what it translates. (It is reckoned with much less.)"""


def begin(core: Core, box: Box, operation: Running, verb: str, then: Callable[[], Awaitable[None]] | None = None) -> None:
    """Starts the work in a task of the engine's own. ``then`` is a part of it, once the machine runs."""
    task = core.spawn(_build(core, box, operation, then), f"{verb} {box.id}")

    def over(_: object) -> None:
        # A task that is cancelled before its first step never runs: cancel() has the row put right, this the operation.
        box.work = None
        operation.end(_cancelled(box), cancelled=True)

    task.add_done_callback(over)
    box.work = task
    core.alarm.set()


def _cancelled(box: Box) -> StokerError:
    return Conflict(
        "cancelled", f"the {'start' if box.record.boots else 'create'} of {box.record.label} was cancelled", "do it again"
    )


async def cancel(core: Core, box: Box) -> None:
    """Stops a create or start that is going on, and waits until nothing of it is left but the row."""
    work = box.work
    if work is not None:
        work.cancel()
        await asyncio.wait({work})
    async with box.lock:
        if not box.gone and box.record.state is SandboxState.CREATING and box.work is None and not box.record.doomed:
            await undo(core, box, _cancelled(box))


async def _build(core: Core, box: Box, operation: Running, then: Callable[[], Awaitable[None]] | None) -> None:
    """From the intent to a running machine, or back to nothing and a failed row."""
    error: StokerError | None = None
    async with box.lock:
        try:
            await boot_up(core, box, operation)
            if then is not None:
                await then()
        except BaseException as cause:
            error = why(cause, core, box)
            with anyio.CancelScope(shield=True):
                await undo(core, box, error)
            if isinstance(cause, asyncio.CancelledError):
                raise
    operation.end(error)


async def boot_up(core: Core, box: Box, operation: Running) -> None:
    """From the intent to a running machine; the box's lock is held. Whoever calls this undoes it when it fails."""
    async with core.queue.turn(box.record.owner):
        booted = await _make(core, box, operation)
    with booted.held:
        await running(core, box, booted)


def why(cause: BaseException, core: Core, box: Box) -> StokerError:
    if isinstance(cause, StokerError):
        return cause
    if isinstance(cause, asyncio.CancelledError):
        if core.closing:
            return HostError("daemon_stopped", "the daemon ended while the sandbox was created", "create it again")
        return _cancelled(box)
    if isinstance(cause, OSError):
        code = "no_space" if cause.errno == errno.ENOSPC else "host_failed"
        return HostError(code, f"{cause.strerror}: {cause.filename or 'the host refused it'}", "stoker doctor")
    log.error("create of %s failed", box.id, exc_info=cause)
    return InternalError("internal", f"{type(cause).__name__}: {cause}", "see the daemon's log")


async def _make(core: Core, box: Box, operation: Running) -> Booted:
    """Everything on the host, in the order of the ledger."""
    places = core.places(box.id)
    await make_places(core, box, places)
    record = box.record
    request = requested(core, box, places, copied=bool(record.disk_of))
    if record.boots:
        disk = core.pools.opener(record.pool, box.id)
    elif record.disk_of:
        disk = core.pools.copier(record.pool, record.disk_of, box.id)
    else:
        disk = core.pools.maker(record.pool, box.id)
    if box.golden_only:
        request = dataclasses.replace(request, golden_only=True)
    booted = await core.booter.boot(request, places.directory, disk, places.cgroup, operation)
    trace("create.after_boot")
    return booted


async def make_places(core: Core, box: Box, places: Places) -> None:
    """What a machine needs before it is started: its directory, its control group, its volumes."""
    if box.record.boots:
        await release(Entry(Kind.DIRECTORY, str(places.directory), box.id, True, {}), core.pools)
    places.directory.mkdir(mode=0o700)
    trace("create.after_directory")
    if places.cgroup is not None:
        cgroups.create(places.cgroup, limits(box.record))
    trace("create.after_cgroup")
    for volume in box.record.volumes:
        await volume_ready(core, volume)
    if box.record.request.network in ON_THE_HOST or box.record.request.interfaces:
        await make_slots(core, box, places.directory)
    trace("create.after_slot")


def requested(core: Core, box: Box, places: Places, *, copied: bool = False) -> MachineRequest:
    """What to boot, in the unit and with the slot that were made for it."""
    request = machine_request(core, box.record, places, copied=copied)
    gate = partial(enter_machine, core, box) if places.unit is not None else None
    return dataclasses.replace(request, gate=gate, wire=box.wire, joined=box.joined)


async def enter_unit(core: Core, box: Box, pids: list[int]) -> None:
    """Puts processes into the machine's unit. :class:`HostError` when systemd does not do it."""
    record = box.record
    await core.units.enter(record.id, pids, f"Stoker sandbox {record.label} ({record.request.image})", limits(record))


async def enter_machine(core: Core, box: Box, pid: int) -> None:
    """Puts a shim that waits into the machine's unit; where systemd does not do it, into a plain control group."""
    try:
        await enter_unit(core, box, [pid])
        trace("unit.after_enter")
    except HostError as error:
        log.warning("%s gets no unit: %s", box.id, error)
        if error.code != "systemd_silent":  # else it may come to be yet
            await core.ledger.released(box.id, Kind.UNIT)
        base = await asyncio.to_thread(cgroups.base)
        if base is not None:
            group = base / box.id
            await core.ledger.intend(box.id, Kind.CGROUP, str(group))
            cgroups.create(group, limits(box.record))
            cgroups.place(group, pid)


def limits(record: Record) -> Limits:
    """The guest's memory and what its VMM takes besides: generous, or the host's killer ends a healthy machine."""
    memory = record.resources.memory
    return Limits(memory=memory + translated_code(memory) + VMM_MOST, pids=512, cpus=record.resources.cpus)


def machine_request(core: Core, record: Record, places: Places, *, copied: bool = False) -> MachineRequest:
    """What to boot. A sandbox that ran before, or is ``copied`` from one that did, has a disk of its own, over the same root file
    system."""
    from stoker.engine.boot import MachineRequest

    request = record.request
    again = record.boots > 0 or copied
    return MachineRequest(
        name=record.id,
        # The image may have been built anew since: the disk stands on the root file system it was made over.
        image=f"ext4:{record.image_path}" if again else request.image,
        kernel=record.kernel_path if again and record.kernel_path else request.kernel,
        initrd=Path(request.initrd) if request.initrd else None,
        cpus=record.resources.cpus,
        memory=record.resources.memory,
        disk=record.resources.disk if again else request.disk,
        network=(request.network or NetworkMode.USER).value,
        hostname=record.hostname,
        env=tuple((record.env if again else request.env).items()),
        user=record.user if again else request.user or "",
        workdir=record.workdir if again else request.workdir or "",
        # A disk that was used agrees with no memory but its own.
        cold=request.cold or again,
        init=(request.init or InitMode.AGENT).value,
        attached=attached(core, record, places),
        base_file=places.memory,
        keys=core.host_keys.take if copied and not record.boots else None,
    )


def attached(core: Core, record: Record, places: Places) -> tuple[Attached, ...]:
    """The further disks: the app's own overlay, then the volumes in their order."""
    disks = [Attached(one.id, volume_path(core, one.id), one.path, read_only=one.read_only) for one in record.volumes]
    if record.request.app is not None and places.app is not None:
        disks.insert(0, Attached("app", places.app, "/app", base=app_image(core.settings.data_dir, record.request.app)))
    return tuple(disks)


def made_in(db: sqlite3.Connection, places: Places, sandbox: str) -> None:
    """All that a machine needs was made. Its process is not among it: that one has particulars."""
    for kind, name in places.things(lease=False, sandbox=sandbox):
        if kind is not Kind.PROCESS:
            Ledger.live_in(db, sandbox, kind, name)
    Ledger.kinds_live_in(db, sandbox, (Kind.DHCP, Kind.SLOT))


async def running(core: Core, box: Box, booted: Booted, hub: Hub | None = None, rows: Mapping[int, Started] | None = None) -> None:
    """The machine answers: its row says so, and from now on it is watched. ``rows``: the background processes it has already."""
    places = core.places(box.id)
    core.networks.begun(box.record)
    hub = hub or make_hub(core, box)
    identity = booted.machine.vmm
    values = [(box.id, number, msgspec.json.encode(started).decode()) for number, started in (rows or {}).items()]

    def also(db: sqlite3.Connection) -> None:
        Ledger.live_in(db, box.id, Kind.PROCESS, str(places.directory), {"pid": identity.pid, "start": identity.start})
        made_in(db, places, box.id)
        db.execute("DELETE FROM processes WHERE sandbox = ?", (box.id,))
        db.executemany("INSERT INTO processes (sandbox, number, started) VALUES (?, ?, ?)", values)

    record = box.record
    welcome = booted.agent.welcome
    live = Live(booted.machine, hub, booted.agent)
    live.reached.set()
    try:
        await core.save(
            box,
            event="sandbox.state",
            also=also,
            state=SandboxState.RUNNING,
            error=None,
            started_at=time.time(),
            ended_at=None,
            boots=record.boots + 1,
            base=booted.base,
            image_digest=booted.image_digest or record.image_digest,
            image_path=booted.image_path or record.image_path,
            kernel_path=booted.kernel_path,
            kernel=booted.kernel,
            env=booted.env,
            user=booted.user,
            workdir=booted.workdir,
            command=list(booted.command),
            resources=replace(record.resources, disk=booted.disk or record.resources.disk),
            origin=booted.origin,
            timings=booted.milliseconds(),
            **_identity(record, booted),
            versions=Versions(
                daemon=stoker.__version__,
                agent=welcome.agent,
                protocol=welcome.version,
                kernel=welcome.kernel or booted.kernel,
                vmm=booted.vmm,
                accelerator=booted.accelerator,
            ),
        )
    except BaseException:
        with anyio.CancelScope(shield=True):
            await let_go(booted.machine, live)
        raise
    serve(core, box, live)
    if places.unit is not None:
        core.spawn(core.units.register(box.id, identity.pid), f"machine {box.id}")
    trace("create.after_running" if record.boots == 0 else "start.after_running")
    if record.request.start and booted.command:
        await run_main(core, box, live, booted.command)


def _identity(record: Record, booted: Booted) -> dict[str, Any]:
    """Of a copy that ran for the first time: which restore this is, and what became of each hazard."""
    if not record.parent or record.boots:
        return {}
    generation = record.generation + 1 if booted.origin not in (Origin.BOOT, Origin.GOLDEN) else 0
    return {"generation": generation, "certificate": certificate(booted.report, generation)}


def serve(core: Core, box: Box, live: Live) -> None:
    """From here on it is used and watched."""
    box.live = live
    box.rings.restart()
    box.touch()
    core.ring()
    # The size of its disk is known by now.
    resources = box.record.resources
    core.admission.hold(box.id, owner=box.record.owner, memory=resources.memory, cpus=resources.cpus, disk=core.disk_of(box.record))
    live.watch = core.spawn(watch(core, box, live), f"watch {box.id}")


async def let_go(machine: Machine, live: Live) -> None:
    if live.agent is not None:
        await live.agent.aclose()
    await machine.close()


async def run_main(core: Core, box: Box, live: Live, command: tuple[str, ...]) -> None:
    """The image's own command, in the background. That it cannot be started is the create's failure no more: it is an event."""
    from stoker.api.models import StartProcess

    try:
        if live.agent is not None:
            info = await live.hub.start(live.agent, StartProcess(argv=list(command), tag="main"))
            await core.save(box, main=info.id)
    except StokerError as error:
        await core.happen(box, "process.failed", tag="main", code=error.code, message=error.message)


async def kept_rows(core: Core, box: Box) -> dict[int, Started]:
    """What is known of the processes that were started in the background."""
    rows: list[tuple[int, str]] = await core.database.read(
        lambda db: db.execute("SELECT number, started FROM processes WHERE sandbox = ?", (box.id,)).fetchall()
    )
    return {number: decode_started(text) for number, text in rows}


def make_hub(core: Core, box: Box) -> Hub:
    def tell(kind: str, **data: object) -> None:
        core.spawn(core.happen(box, kind, **data), f"event {kind}")

    def keep(number: int, started: object | None) -> None:
        def work(db: sqlite3.Connection) -> None:
            if started is None:
                db.execute("DELETE FROM processes WHERE sandbox = ? AND number = ?", (box.id, number))
            else:
                text = msgspec.json.encode(started).decode()
                # It may have been destroyed between the call and now.
                db.execute(
                    "INSERT OR REPLACE INTO processes (sandbox, number, started)"
                    " SELECT ?1, ?2, ?3 WHERE EXISTS (SELECT 1 FROM sandboxes WHERE id = ?1)",
                    (box.id, number, text),
                )

        if not box.gone:
            core.spawn(core.database.write(work), f"row of process {number}")

    return Hub(box.record.label, tell, keep)


async def undo(core: Core, box: Box, error: StokerError) -> None:
    """Whatever was made goes; the row stays, with the reason."""
    try:
        live = box.live
        if live is not None:
            await detach(box, error)
            await live.machine.kill()
            await live.machine.close()
        if box.record.boots:
            await ended(core, box, SandboxState.FAILED, error)
            return
        await release_all(core, box)
        await core.save(
            box,
            event="sandbox.state",
            also=lambda db: released_in(db, box.id),
            state=SandboxState.FAILED,
            slot="",
            error=to_body(error),
            ended_at=time.time(),
        )
        core.admission.release(box.id)
        await forget_old_failures(core, box.record.owner)
    except (StokerError, OSError) as problem:
        log.exception("%s could not be unwound; the next start of the daemon goes on with it", box.id)
        core.problems.append(f"{box.id} could not be unwound: {problem}")


async def forget_old_failures(core: Core, owner: str) -> None:
    """Rows of failed creates would grow without bound."""
    failed = [
        box
        for box in core.boxes.values()
        if box.record.owner == owner and box.record.state is SandboxState.FAILED and not box.record.boots
    ]
    for box in sorted(failed, key=lambda box: box.record.created_at)[:-FAILED_KEPT]:
        await core.drop(box)
