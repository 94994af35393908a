"""Pause and resume: a machine's memory and devices go into files, and come back with everything that ran in it.

The order of a pause, and what a crash after each step leaves:

============  ============================================================================================
marked        the row says ``pausing``; the machine lives: it goes on
stopped       its vCPUs stand: it goes on
saved         files of memory and devices are whole; the machine has not gone on: they are dropped, it goes on
ended         its VMM is gone: it is paused
disk          what it wrote is on the host's disk; memory, CPUs, processes are free
paused        the row says so
============  ============================================================================================

Before all that, requests to ports of its guest that are being answered are waited for, within bounds (:mod:`.lines`).

A resume is over the point of no return when the row says ``woken``: from then on the disk may differ from the files, and they are
its past. Until then a failure ends the new machine and the sandbox is paused as before.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio

from stoker.api.models import Operation, SandboxState, TimeoutAction
from stoker.engine.booter import Booted
from stoker.engine.build import kept_rows, let_go, made_in, make_hub, make_places, requested, serve
from stoker.engine.core import Box, Core, Live
from stoker.engine.create import expiry
from stoker.engine.ending import lay_down
from stoker.engine.ledger import OF_A_MACHINE, Entry, Kind, Ledger
from stoker.engine.release import clear_directory
from stoker.engine.state import Record, require, to_body
from stoker.engine.trace import trace
from stoker.engine.wake import Identity, certificate
from stoker.errors import GuestError, HostError, StokerError
from stoker.guest.copies import BeforeSnapshot
from stoker.host.laps import Laps
from stoker.vmm.kept import Base, keep

if TYPE_CHECKING:
    from stoker.api.models import Quota
    from stoker.engine.operations import Running
    from stoker.vmm.driver import Captured, Machine

__all__ = ["drop_saved", "laid_away", "pause", "prepare_guest", "resume", "saved_place", "wake_up"]

log = logging.getLogger(__name__)
S = SandboxState
PREPARE: Final = 60.0
"""Seconds that a guest has for writing its files out and for its hooks."""
COLD: Final = "stoker stop {0} gives its memory up, then stoker start {0} boots it from its disk"


def saved_place(core: Core, name: str) -> Path:
    """Where what a sandbox is paused in is."""
    return core.settings.data_dir / "snapshots" / name


async def drop_saved(core: Core, box: Box) -> None:
    """Takes away what it was paused in, and is not any more."""
    for entry in await core.ledger.of(box.id):
        if entry.kind is Kind.SAVED and entry.name != str(saved_place(core, box.record.saved)):
            await core.release(entry)
            await core.ledger.dropped(Kind.SAVED, entry.name)


# -- pause ------------------------------------------------------------------------------------------------------------


async def pause(core: Core, box: Box, *, idle: bool = False) -> Operation | None:
    """Puts the machine away. ``idle``: because nobody uses it; somebody may again when its turn comes, and nothing happens."""
    require(box.record, "pause")
    async with box.lock:
        require(box.record, "pause")
        if idle and (box.deadline is None or box.deadline > time.time()):
            return None
        live = box.live
        if live is None:
            raise HostError("machine_missing", f"{box.record.label} has no machine", f"stoker inspect {box.id}")
        operation = core.operations.begin("pause", box.record.owner, box.id)
        error: StokerError | None = None
        try:
            await live.hub.lines.drain()
            await _pause(core, box, live, operation)
        except StokerError as problem:
            error = problem
            raise
        except OSError as problem:
            error = HostError("host_failed", f"{problem.strerror}: {problem.filename or 'the host refused it'}", "stoker doctor")
            raise error from None
        finally:
            live.hub.lines.reopen()
            operation.end(error)
    log.info("%s is paused: %s", box.id, operation.value.steps)
    return operation.value


async def _pause(core: Core, box: Box, live: Live, operation: Running) -> None:
    laps = Laps()
    before = box.record
    name = f"{box.id}.{before.pauses + 1}"
    place = saved_place(core, name)
    with laps.lap("mark"):
        await core.save(
            box,
            event="sandbox.state",
            durable=True,
            also=lambda db: Ledger.intend_in(db, box.id, [(Kind.SAVED, str(place))]),
            state=S.PAUSING,
            saved=name,
            woken=False,
            pauses=before.pauses + 1,
            operation=operation.value.id,
        )
    trace("pause.after_mark")
    try:
        with laps.lap("guest"):
            await prepare_guest(live, before, BeforeSnapshot())
        async with core.copying:
            taken = await live.machine.capture(core.scratch, go_on=False)
            laps.seconds |= taken.steps
            trace("pause.after_stop")
            with laps.lap("save"):
                await asyncio.to_thread(_keep, core, box, live.machine, place, taken)
            core.scratch.trim()
        trace("pause.after_saved")
    except BaseException as problem:
        with anyio.CancelScope(shield=True):
            await _go_on(core, box, live, before)
        if isinstance(problem, StokerError | OSError):
            log.warning("%s goes on, it could not be put away: %s", box.id, problem)
        raise
    with laps.lap("end"):
        await lay_down(box)
        await live.machine.kill()
        await live.machine.close()
    trace("pause.after_process")
    with laps.lap("disk"):
        await asyncio.to_thread(core.pools.sync, before.pool, box.id)
    trace("pause.after_disk")
    await laid_away(core, box)
    trace("pause.after_paused")
    operation.laps(laps.seconds)


async def prepare_guest(live: Live, record: Record, words: BeforeSnapshot) -> None:
    """The guest's own part: hooks, and its files written out, so that its disk alone is worth something, too. One that does not
    answer is taken as it is: memory and disk agree all the same."""
    if live.agent is None or record.state is not S.RUNNING:
        return
    try:
        await live.agent.before_snapshot(words, timeout=PREPARE)
    except StokerError as problem:
        if problem.code != "unsupported":
            log.warning("%s was not prepared by its guest: %s", record.id, problem)


def _keep(core: Core, box: Box, machine: Machine, place: Path, taken: Captured) -> None:
    import os

    record = box.record
    fd = machine.memory()
    try:
        base = Base(fd, core.places(box.id).memory if record.base else None, record.base)
        keep(place, base, taken, machine.made_by(), about(record))
    finally:
        os.close(fd)


def about(record: Record) -> dict[str, Any]:
    """What is told about what was put away."""
    return {
        "sandbox": record.id,
        "created_at": time.time(),
        "image": {"name": record.request.image, "digest": record.image_digest},
        "kernel": {"name": record.kernel, "digest": record.kernel_path},
        "accelerator": record.versions.accelerator,
        "agent": record.versions.agent,
    }


async def _go_on(core: Core, box: Box, live: Live, before: Record) -> None:
    """A pause that failed, or was given up, while the VMM was there."""
    place = saved_place(core, box.record.saved)
    try:
        await core.release(Entry(Kind.SAVED, str(place), box.id, True, {}))
        if before.state is S.RUNNING:
            await live.machine.thaw()
    except StokerError as problem:
        log.error("%s does not go on: %s", box.id, problem)

    def also(db: sqlite3.Connection) -> None:
        Ledger.dropped_in(db, Kind.SAVED, str(place))

    await core.save(box, event="sandbox.state", also=also, state=before.state, saved="", reason=before.reason)
    if live.agent is not None and before.state is S.RUNNING:
        try:
            await live.agent.set_time()
        except StokerError as problem:
            log.warning("the clock of %s could not be set: %s", box.id, problem)


async def laid_away(core: Core, box: Box, error: StokerError | None = None) -> None:
    """The machine is gone, what it was is in files: its row says so, and nothing else of it is left but its disk."""
    for entry in await core.ledger.of(box.id):
        if entry.kind in OF_A_MACHINE:
            await core.release(entry)
    await clear_directory(core.places(box.id).directory)

    def also(db: sqlite3.Connection) -> None:
        Ledger.released_in(db, box.id, OF_A_MACHINE)
        Ledger.live_in(db, box.id, Kind.SAVED, str(saved_place(core, box.record.saved)))

    await core.save(
        box,
        event="sandbox.state",
        durable=True,
        also=also,
        state=S.PAUSED,
        slot="",
        base="",
        reason="",
        woken=False,
        error=to_body(error) if error is not None else None,
    )
    core.admission.rest(box.id)


# -- resume -----------------------------------------------------------------------------------------------------------


async def wake_up(core: Core, box: Box, quota: Quota | None) -> None:
    """For whoever uses it: returns when it runs, or is not paused for another reason."""
    async with box.lock:
        if box.record.state is S.PAUSED and not box.record.doomed:
            await _resume(core, box, quota)


async def resume(core: Core, box: Box, quota: Quota | None) -> Operation:
    """Takes the machine up again. One that runs by now was resumed by somebody who used it: that is as good."""
    async with box.lock:
        if box.record.state is not S.RUNNING or box.record.doomed:
            require(box.record, "resume")
            return await _resume(core, box, quota)
        return core.operations.of(box.record)


async def _resume(core: Core, box: Box, quota: Quota | None) -> Operation:
    core.filling.check(box.record.pool)
    await core.admit(box, quota)
    operation = core.operations.begin("resume", box.record.owner, box.id)
    began = time.perf_counter()
    error: StokerError | None = None
    try:
        things = core.places(box.id).things(lease=False, sandbox=box.id)
        await core.save(
            box,
            event="sandbox.state",
            also=lambda db: Ledger.intend_in(db, box.id, things),
            durable=True,
            state=S.RESUMING,
            error=None,
            operation=operation.value.id,
        )
        trace("resume.after_mark")
        booted = await _make(core, box, operation)
        with booted.held:
            await _resumed(core, box, booted, operation)
    except BaseException as problem:
        error = _why(problem, box)
        with anyio.CancelScope(shield=True):
            await _undo(core, box, error)
        if isinstance(problem, asyncio.CancelledError):
            raise
        raise error from problem
    finally:
        operation.laps({"all": time.perf_counter() - began})
        operation.end(error)
    log.info("%s goes on: %s", box.id, operation.value.steps)
    return operation.value


def _why(problem: BaseException, box: Box) -> StokerError:
    label = box.record.label
    if isinstance(problem, StokerError):
        if problem.code.startswith("saved_"):
            problem.hint = COLD.format(label)
        return problem
    if isinstance(problem, OSError):
        return HostError("host_failed", f"{problem.strerror}: {problem.filename or 'the host refused it'}", "stoker doctor")
    if isinstance(problem, TimeoutError):
        return GuestError("resume_timeout", f"{label} did not go on in time", "do it again, or: " + COLD.format(label))
    if not isinstance(problem, asyncio.CancelledError):
        log.error("resume of %s failed", box.id, exc_info=problem)
    return HostError("resume_failed", f"the resume of {label} was given up: {type(problem).__name__}", "do it again")


async def _make(core: Core, box: Box, operation: Running) -> Booted:
    places = core.places(box.id)
    await make_places(core, box, places)
    trace("resume.after_directory")
    request = requested(core, box, places)

    async def ready(machine: Machine) -> None:
        identity = machine.vmm
        detail = {"pid": identity.pid, "start": identity.start}

        def also(db: sqlite3.Connection) -> None:
            Ledger.live_in(db, box.id, Kind.PROCESS, str(places.directory), detail)

        await core.save(box, also=also, durable=True, woken=True)
        trace("resume.after_woken")

    disk = core.pools.opener(box.record.pool, box.id)
    saved = saved_place(core, box.record.saved)
    identity = Identity(box.record.generation + 1)
    return await core.booter.resume(request, places.directory, disk, places.cgroup, operation, saved, identity, ready)


async def _resumed(core: Core, box: Box, booted: Booted, operation: Running) -> None:
    """The machine answers: its processes go on where clients left them, and its row says so."""
    places = core.places(box.id)
    core.networks.begun(box.record)
    hub, known = box.asleep, box.asleep is not None
    hub = hub or make_hub(core, box)
    live = Live(booted.machine, hub, booted.agent)
    live.reached.set()
    rows = {} if known else await kept_rows(core, box)

    timeout = box.record.timeout
    again = timeout is not None and timeout.action is TimeoutAction.PAUSE
    try:
        if known:
            await hub.resynchronise(booted.agent)
        else:
            await hub.adopt(booted.agent, rows)
        await core.save(
            box,
            event="sandbox.state",
            also=lambda db: made_in(db, places, box.id),
            state=S.RUNNING,
            error=None,
            base=booted.base,
            saved="",
            woken=False,
            generation=box.record.generation + 1,
            certificate=certificate(booted.report, box.record.generation + 1),
            timings=booted.milliseconds(),
            expires_at=expiry(timeout) if again else box.record.expires_at,
        )
    except BaseException:
        with anyio.CancelScope(shield=True):
            await let_go(booted.machine, live)
        raise
    box.asleep = None
    operation.laps(booted.timings)
    serve(core, box, live)
    if places.unit is not None:
        core.spawn(core.units.register(box.id, booted.machine.vmm.pid), f"machine {box.id}")
    trace("resume.after_running")
    core.spawn(_forget(core, box), f"files of {box.id}")


async def _forget(core: Core, box: Box) -> None:
    """Nobody waits for the old files to go."""
    await drop_saved(core, box)
    trace("resume.after_saved_gone")


async def _undo(core: Core, box: Box, error: StokerError) -> None:
    """The machine did not come up, or not whole: it is paused as before, unless it had gone on already."""
    from stoker.engine.ending import detach, ended

    try:
        if box.record.woken:
            await detach(box, error)
            await ended(core, box, S.FAILED, error)
        else:
            await laid_away(core, box, error)
    except (StokerError, OSError) as problem:
        log.exception("%s could not be unwound; the next start of the daemon goes on with it", box.id)
        core.problems.append(f"{box.id} could not be unwound: {problem}")
