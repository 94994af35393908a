"""The way of one create, and of a start: admit, write the intent, make, boot, running. Each arrow has its undo.

A create that fails releases everything it made and leaves a ``failed`` row with the error; a start that fails leaves the disk and
the sandbox ``stopped``'s way: ``failed``, to be started again. The work belongs to the engine: who asked for it may go.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import msgspec
from msgspec.structs import replace

import stoker
from stoker.api.models import (
    CreateSandbox,
    Event,
    Operation,
    Principal,
    Quota,
    Resources,
    SandboxState,
    Timeout,
    TimeoutAction,
    TimeoutMode,
    Versions,
)
from stoker.engine.admission import VMM_OVERHEAD
from stoker.engine.core import Booted, Box, Core, Live, put
from stoker.engine.ending import ended, release_all
from stoker.engine.hub import Hub
from stoker.engine.ledger import Entry, Kind, Ledger
from stoker.engine.operations import Running
from stoker.engine.release import release
from stoker.engine.state import Record, new_id, require, to_body
from stoker.engine.trace import trace
from stoker.engine.watch import watch
from stoker.errors import Conflict, Forbidden, HostError, InternalError, InvalidRequest, StokerError
from stoker.host import cgroups
from stoker.host.cgroups import Limits

if TYPE_CHECKING:
    from stoker.engine.boot import MachineRequest
    from stoker.vmm.driver import Machine

__all__ = ["cancel", "check_timeout", "create", "expiry", "make_hub", "start"]

log = logging.getLogger(__name__)
MIB: Final = 1 << 20
IDEMPOTENT_SECONDS: Final = 86400.0
FAILED_KEPT: Final = 64
"""Failed rows kept of one owner."""


def check_timeout(timeout: Timeout | None) -> None:
    """A timeout that pauses is for later."""
    if timeout is not None and timeout.action is TimeoutAction.PAUSE:
        raise InvalidRequest(
            "not_supported_yet", "this Stoker cannot pause a sandbox yet", 'use {"action": "destroy"}, or set no timeout'
        )


def expiry(timeout: Timeout | None) -> float | None:
    return time.time() + timeout.seconds if timeout is not None and timeout.mode is TimeoutMode.ABSOLUTE else None


def _check(who: Principal, request: CreateSandbox) -> None:
    check_timeout(request.timeout)
    if not who.admin and (request.initrd or request.kernel.startswith(("/", ".", "~")) or request.image.startswith("ext4:")):
        raise Forbidden("host_path", "files of the daemon's host are for its own users", "ask over the Unix socket, or use a name")


def digest_of(request: CreateSandbox) -> str:
    """What makes two requests the same."""
    return hashlib.sha256(msgspec.json.encode(request, order="sorted")).hexdigest()


class _Repeated(Exception):
    """The idempotency key was used before."""

    def __init__(self, sandbox: str, digest: str) -> None:
        super().__init__(sandbox)
        self.sandbox, self.digest = sandbox, digest


async def create(core: Core, who: Principal, request: CreateSandbox, key: str | None, quota: Quota | None) -> Operation:
    """Admits, records and begins; the rest goes on by itself."""
    _check(who, request)
    if core.closing:
        raise HostError("daemon_stopping", "the daemon is ending", "try again in a moment")
    memory = -(-request.memory // MIB) * MIB
    record = Record(
        id=new_id("sb"),
        owner=who.owner,
        state=SandboxState.CREATING,
        request=request,
        created_at=time.time(),
        name=request.name,
        resources=Resources(cpus=request.cpus, memory=memory, disk=request.disk),
        hostname=request.hostname or request.name or "",
        timeout=request.timeout,
        expires_at=expiry(request.timeout),
        versions=Versions(daemon=stoker.__version__),
    )
    box = Box(record)
    digest = digest_of(request)
    if key is not None and (former := await _former(core, who, key)) is not None:
        return _again(core, who, *former, digest)
    core.admission.admit(box.id, owner=who.owner, memory=memory, cpus=request.cpus, disk=request.disk, quota=quota)
    operation = core.operations.begin("create", who.owner, box.id)
    box.record = record = replace(record, operation=operation.value.id)
    event = core.events.make("sandbox.created", box.id, name=record.name, image=request.image)
    trace("create.after_admit")
    try:
        await _intend(core, who, box, key, digest, event)
    except BaseException as error:
        core.admission.release(box.id)
        core.operations.discard(operation)
        if isinstance(error, _Repeated):
            return _again(core, who, error.sandbox, error.digest, digest)
        raise
    core.add(box)
    core.events.tell(record.owner, event)
    if request.lease:
        box.lease_until = time.monotonic() + core.lease_grace
    trace("create.after_intent")
    _spawn(core, box, operation, "create")
    return operation.value


async def _former(core: Core, who: Principal, key: str) -> tuple[str, str] | None:
    row: tuple[str, str] | None = await core.database.read(
        lambda db: db.execute(
            "SELECT sandbox, digest FROM idempotency WHERE owner = ? AND key = ? AND created > ?",
            (who.owner, key, time.time() - IDEMPOTENT_SECONDS),
        ).fetchone()
    )
    return row


def _again(core: Core, who: Principal, sandbox: str, before: str, digest: str) -> Operation:
    if before != digest:
        raise Conflict(
            "idempotency_mismatch", "this Idempotency-Key was used for another request", "use a new key for a new request"
        )
    box = core.find(who, sandbox)
    return core.operations.of(box.record)


async def _intend(core: Core, who: Principal, box: Box, key: str | None, digest: str, event: Event) -> None:
    record = box.record
    things = core.places(record.id).things(lease=record.request.lease, sandbox=record.id)

    def work(db: sqlite3.Connection) -> None:
        if key is not None:
            db.execute("DELETE FROM idempotency WHERE created < ?", (time.time() - IDEMPOTENT_SECONDS,))
            former = db.execute("SELECT sandbox, digest FROM idempotency WHERE owner = ? AND key = ?", (who.owner, key)).fetchone()
            if former is not None:
                raise _Repeated(*former)
            values = (who.owner, key, digest, record.id, record.created_at)
            db.execute("INSERT INTO idempotency (owner, key, digest, sandbox, created) VALUES (?, ?, ?, ?, ?)", values)
        if record.name is not None:
            taken = db.execute("SELECT id FROM sandboxes WHERE owner = ? AND name = ?", (record.owner, record.name)).fetchone()
            if taken is not None:
                raise Conflict(
                    "name_taken",
                    f"there is a sandbox {record.name} already: {taken[0]}",
                    f"stoker rm {record.name}, or another name",
                )
        put(db, record)
        Ledger.intend_in(db, record.id, things)
        core.events.insert_in(db, event)

    await core.database.write(work, durable=True)


# -- the work ---------------------------------------------------------------------------------------------------------


def _spawn(core: Core, box: Box, operation: Running, verb: str) -> None:
    task = core.spawn(_build(core, box, operation), f"{verb} {box.id}")

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
            await _undo(core, box, _cancelled(box))


async def _build(core: Core, box: Box, operation: Running) -> None:
    """From the intent to a running machine, or back to nothing and a failed row."""
    error: StokerError | None = None
    async with box.lock:
        try:
            async with core.queue.turn(box.record.owner):
                booted = await _make(core, box, operation)
            await _running(core, box, booted)
        except BaseException as cause:
            error = _why(cause, core, box)
            with anyio.CancelScope(shield=True):
                await _undo(core, box, error)
            if isinstance(cause, asyncio.CancelledError):
                raise
    operation.end(error)


def _why(cause: BaseException, core: Core, box: Box) -> StokerError:
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
    if box.record.boots:
        await release(Entry(Kind.DIRECTORY, str(places.directory), box.id, True, {}))
    places.directory.mkdir(mode=0o700)
    trace("create.after_directory")
    if places.cgroup is not None:
        cgroups.create(places.cgroup, limits(box.record))
    trace("create.after_cgroup")
    booted = await core.booter.boot(
        machine_request(box.record), places.directory, places.clone, places.cgroup, operation, again=box.record.boots > 0
    )
    trace("create.after_boot")
    return booted


def limits(record: Record) -> Limits:
    """The guest's memory and what its VMM takes besides: generous, or the host's killer ends a healthy machine."""
    return Limits(memory=record.resources.memory + 4 * VMM_OVERHEAD, pids=512, cpus=record.resources.cpus)


def machine_request(record: Record) -> MachineRequest:
    """What to boot. A sandbox that ran before boots from its own disk, over the same root file system."""
    from stoker.engine.boot import MachineRequest

    request = record.request
    again = record.boots > 0
    return MachineRequest(
        name=record.id,
        # The image may have been built anew since: the disk stands on the root file system it was made over.
        image=f"ext4:{record.image_path}" if again else request.image,
        kernel=record.kernel_path if again and record.kernel_path else request.kernel,
        initrd=Path(request.initrd) if request.initrd else None,
        cpus=record.resources.cpus,
        memory=record.resources.memory,
        disk=record.resources.disk if again else request.disk,
        network=request.network.value,
        hostname=record.hostname,
        env=tuple((record.env if again else request.env).items()),
        user=record.user if again else request.user or "",
        workdir=record.workdir if again else request.workdir or "",
        cold=request.cold,
    )


async def _running(core: Core, box: Box, booted: Booted) -> None:
    """The machine answers: its row says so, and from now on it is watched."""
    places = core.places(box.id)
    hub = make_hub(core, box)
    identity = booted.machine.vmm

    def also(db: sqlite3.Connection) -> None:
        Ledger.live_in(db, box.id, Kind.PROCESS, str(places.directory), {"pid": identity.pid, "start": identity.start})
        for kind, name in places.things(lease=False, sandbox=box.id):
            if kind is not Kind.PROCESS:
                Ledger.live_in(db, box.id, kind, name)
        db.execute("DELETE FROM processes WHERE sandbox = ?", (box.id,))

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
            image_digest=booted.image_digest or record.image_digest,
            image_path=booted.image_path or record.image_path,
            kernel_path=booted.kernel_path,
            kernel=booted.kernel,
            env=booted.env,
            user=booted.user,
            workdir=booted.workdir,
            command=list(booted.command),
            resources=replace(record.resources, disk=booted.disk or record.resources.disk),
            timings=booted.milliseconds(),
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
    box.live = live
    box.rings.restart()
    box.touch()
    core.ring()
    core.admission.settle(box.id)
    live.watch = core.spawn(watch(core, box, live), f"watch {box.id}")
    trace("create.after_running" if record.boots == 0 else "start.after_running")
    if record.request.start and booted.command:
        await _main(core, box, live, booted.command)


async def let_go(machine: Machine, live: Live) -> None:
    if live.agent is not None:
        await live.agent.aclose()
    await machine.close()


async def _main(core: Core, box: Box, live: Live, command: tuple[str, ...]) -> None:
    """The image's own command, in the background. That it cannot be started is the create's failure no more: it is an event."""
    from stoker.api.models import StartProcess

    try:
        if live.agent is not None:
            info = await live.hub.start(live.agent, StartProcess(argv=list(command), tag="main"))
            await core.save(box, main=info.id)
    except StokerError as error:
        await core.happen(box, "process.failed", tag="main", code=error.code, message=error.message)


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


async def _undo(core: Core, box: Box, error: StokerError) -> None:
    """Whatever was made goes; the row stays, with the reason."""
    try:
        if box.record.boots:
            await ended(core, box, SandboxState.FAILED, error)
            return
        await release_all(core, box)
        await core.save(
            box,
            event="sandbox.state",
            also=lambda db: Ledger.released_in(db, box.id),
            state=SandboxState.FAILED,
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


async def start(core: Core, box: Box, quota: Quota | None) -> Operation:
    """Boots a stopped sandbox from its disk again."""
    require(box.record, "start")
    async with box.lock:
        require(box.record, "start")
        resources = box.record.resources
        core.admission.admit(
            box.id, owner=box.record.owner, memory=resources.memory, cpus=resources.cpus, disk=resources.disk, quota=quota
        )
        operation = core.operations.begin("start", box.record.owner, box.id)
        try:
            places = core.places(box.id)
            things = places.things(lease=False, sandbox=box.id)
            await core.save(
                box,
                event="sandbox.state",
                durable=True,
                also=lambda db: Ledger.intend_in(db, box.id, things),
                state=SandboxState.CREATING,
                error=None,
                main=None,
                operation=operation.value.id,
                expires_at=expiry(box.record.timeout),
            )
        except BaseException:
            core.admission.rest(box.id)
            core.operations.discard(operation)
            raise
        trace("start.after_mark")
        _spawn(core, box, operation, "start")
    return operation.value
