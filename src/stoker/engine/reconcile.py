"""What a new engine finds: adopts every machine that lives, finishes what was begun, removes what must not be there.

========================  =======================================================================================
the row says              after a restart
========================  =======================================================================================
doomed                    the destroy is finished
a template was built in   it is removed
waits in a warm set       it is removed
creating, never ran       unwound; ``failed`` (``create_interrupted``)
creating, ran before      the half-started machine is ended; ``stopped``, its disk is whole
running, frozen, lost     adopted where the VMM lives, its agent reached again (in the background); else ``failed`` or
                          ``stopped``, as the VMM's end says
stopping                  the machine is ended; ``stopped``
pausing                   where the VMM lives it goes on; else ``paused``, or, without whole files, as a machine that ended
resuming                  ``paused``; past the point of no return (``woken``) as running
stopped, failed, paused   nothing runs; what the ledger still names of a machine is removed
no row                    what the ledger names is removed
========================  =======================================================================================
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from pathlib import Path

import msgspec

from stoker.api.models import SandboxState
from stoker.engine.build import kept_rows, make_hub
from stoker.engine.core import Box, Core, Live, released_in
from stoker.engine.ending import detach, ended, release_all
from stoker.engine.leases import lease_of
from stoker.engine.ledger import Entry, Kind
from stoker.engine.pause import drop_saved, laid_away, saved_place
from stoker.engine.release import shims
from stoker.engine.state import Record, SnapshotRecord, VolumeRecord, to_body
from stoker.engine.templates import TemplateRecord
from stoker.engine.watch import verdict_on, watch
from stoker.errors import GuestError, HostError, StokerError

__all__ = ["load_all", "private_directory", "reconcile", "settle"]

log = logging.getLogger(__name__)
S = SandboxState


def private_directory(path: Path, mode: int) -> None:
    """Makes a directory of ours; one that belongs to somebody else (a trap in /tmp) is refused."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        status = os.lstat(path)
    except OSError as e:
        hint = "set STOKER_RUN_DIR and STOKER_DATA_DIR to directories of yours"
        raise HostError("directory_refused", f"{path} cannot be made: {e.strerror}", hint) from None
    if status.st_uid != os.geteuid() or path.is_symlink():
        raise HostError("directory_refused", f"{path} is not a directory of this user's", f"remove it: {path}")


def _texts(db: sqlite3.Connection, table: str) -> list[bytes]:
    return [text.encode() for (text,) in db.execute(f"SELECT record FROM {table} ORDER BY created")]


async def load_all(core: Core) -> None:
    """Rows and events into memory."""

    def work(db: sqlite3.Connection) -> tuple[dict[str, list[bytes]], list[tuple[str, int, str]], int]:
        texts = {table: _texts(db, table) for table in ("sandboxes", "volumes", "snapshots", "templates")}
        events = db.execute("SELECT sandbox, number, event FROM events ORDER BY number").fetchall()
        last = db.execute("SELECT value FROM numbers WHERE name = 'event'").fetchone()
        return texts, events, last[0] if last else 0

    texts, events, last = await core.database.read(work)
    volumes = [msgspec.json.decode(text, type=VolumeRecord) for text in texts["volumes"]]
    core.volumes.update({record.id: record for record in volumes})
    snapshots = [msgspec.json.decode(text, type=SnapshotRecord) for text in texts["snapshots"]]
    core.snapshots.update({record.id: record for record in snapshots})
    templates = [msgspec.json.decode(text, type=TemplateRecord) for text in texts["templates"]]
    core.templates.update({record.id: record for record in templates})
    for text in texts["sandboxes"]:
        core.add(Box(msgspec.json.decode(text, type=Record)))
    core.events.load(events, {box.id: box.record.owner for box in core.boxes.values()}, last)


async def reconcile(core: Core) -> None:
    """Everything but reaching the agents of adopted machines is done when this returns."""
    entries = await core.ledger.all()
    slots = [entry.name for entry in entries if entry.kind is Kind.SLOT]
    for box in core.boxes.values():
        core.networks.keep(box.record)
    machines = [entry.name for entry in entries if entry.kind is Kind.PROCESS]
    found = await asyncio.to_thread(shims, machines) if machines else {}
    orphans = [entry for entry in entries if not core.owns(entry.owner)]
    await asyncio.gather(*(_one(core, box, found) for box in list(core.boxes.values())), _orphans(core, orphans, found))
    if slots:
        await core.networks.prune([slot for box in core.boxes.values() for slot in (box.record.slot, *box.record.joined) if slot])


async def _orphans(core: Core, entries: list[Entry], found: dict[str, list[int]]) -> None:
    for entry in entries:
        log.warning("removing %s %s of %s, which is gone", entry.kind.value, entry.name, entry.owner)
        try:
            await core.release(entry, found.get(entry.name, []))
            await core.ledger.released(entry.owner, entry.kind)
        except (StokerError, OSError) as error:
            log.exception("%s %s could not be removed", entry.kind.value, entry.name)
            core.problems.append(f"{entry.name} could not be removed: {error}")


async def _one(core: Core, box: Box, found: dict[str, list[int]]) -> None:
    try:
        async with box.lock:
            await settle(core, box)
    except (StokerError, OSError) as error:
        log.exception("%s could not be put right", box.id)
        core.problems.append(f"{box.id} could not be put right: {error}")


async def settle(core: Core, box: Box) -> None:
    """Puts one sandbox right, as the table above has it. Its lock is held, and nobody is at work on it."""
    record = box.record
    if record.request.lease:
        box.lease_until = time.monotonic() + core.lease_grace
    if record.doomed or record.builds or record.warm:
        log.info("finishing the destroy of %s" if record.doomed else "removing %s: its daemon is gone", box.id)
        await release_all(core, box)
        await core.drop(box)
    elif record.state is S.CREATING and not record.boots:
        log.info("unwinding the create of %s", box.id)
        await release_all(core, box)
        error = HostError("create_interrupted", f"the daemon ended while {record.label} was created", "create it again")
        await core.save(
            box,
            event="sandbox.state",
            also=lambda db: released_in(db, box.id),
            state=S.FAILED,
            error=to_body(error),
            ended_at=time.time(),
        )
    elif record.state in (S.PAUSING, S.RESUMING):
        _hold(core, box)
        await _half(core, box)
    elif record.state in (S.CREATING, S.STOPPING, S.RUNNING, S.FROZEN, S.LOST):
        _hold(core, box)
        if record.state in (S.CREATING, S.STOPPING) or not await _adopt(core, box):
            await _end(core, box)
    elif record.boots:
        _hold(core, box)
        core.admission.rest(box.id)
        await drop_saved(core, box)
        # A machine that was on its way out, and its files: nothing of it may be left.
        if any(entry.kind is Kind.PROCESS for entry in await core.ledger.of(box.id)):
            await ended(core, box, record.state, None)


async def _half(core: Core, box: Box) -> None:
    """A pause or a resume that was interrupted."""
    record = box.record
    whole = (saved_place(core, record.saved) / "manifest.json").exists()
    machine = await core.booter.adopt(core.places(box.id).directory)
    if record.state is S.PAUSING or record.woken:
        if machine is not None:
            # It has not gone on since it was stopped, or has for good: what is in files is nothing, or its past.
            await core.save(box, saved="")
            await drop_saved(core, box)
            await machine.thaw()
            await machine.close()
            await _adopt(core, box)
            await core.save(box, woken=False)
            return
        if record.state is S.RESUMING or not whole:
            await _end(core, box)
            return
    elif machine is not None:
        await machine.kill()
        await machine.close()
    log.info("%s is paused", box.id)
    await laid_away(core, box)


def _hold(core: Core, box: Box) -> None:
    resources = box.record.resources
    core.admission.hold(box.id, owner=box.record.owner, memory=resources.memory, cpus=resources.cpus, disk=core.disk_of(box.record))


async def _lease_again(core: Core, box: Box) -> None:
    """What offers a machine its addresses is there; without, it keeps what it has."""
    name = lease_of(box.record, box.record.slot, core.places(box.id).directory, core.units)
    if not name:
        return
    try:
        await core.networks.lease(box.record, name, core.units, found=True)
    except StokerError as error:
        log.error("%s is offered its addresses by nobody: %s", box.id, error)


async def _adopt(core: Core, box: Box) -> bool:
    """True when the machine lives; it is watched again, and its agent is being reached."""
    places = core.places(box.id)
    machine = await core.booter.adopt(places.directory)
    if machine is None:
        return False
    state = box.record.state
    try:
        async with asyncio.timeout(1.0):
            frozen = await machine.status() == "paused"
    except (GuestError, TimeoutError) as error:
        log.warning("%s: its VMM does not answer: %s", box.id, error or "out of time")
        frozen = state is S.FROZEN
    if frozen and state is S.RUNNING:
        # It was stopped for a moment only: its memory was being taken.
        await machine.thaw()
        frozen = False
    actual = S.FROZEN if frozen else S.LOST if state is S.LOST else S.RUNNING
    if actual is S.RUNNING:
        await drop_saved(core, box)
    if actual is not state:
        await core.save(box, event="sandbox.state", state=actual)
    if box.record.slot or box.record.joined:
        try:
            await core.networks.adopt(box.record, machine)
        except StokerError as error:
            # It runs, and nobody judges what it sends: better it is not there.
            log.error("%s is ended, its network cannot be had again: %s", box.id, error)
            await machine.kill()
            await machine.close()
            return False
        await _lease_again(core, box)
    live = box.live = Live(machine, make_hub(core, box))
    rows = await kept_rows(core, box)
    live.watch = core.spawn(watch(core, box, live, rows), f"watch {box.id}")
    log.info("adopted %s (process %d)", box.id, machine.vmm.pid)
    return True


async def _end(core: Core, box: Box) -> None:
    """The machine is gone, or must go because its start or stop was not finished."""
    record, places = box.record, core.places(box.id)
    from stoker.vmm.console import tail
    from stoker.vmm.shim import exit_of, read_exit

    lines = await asyncio.to_thread(tail, places.directory / "console.log", 40)
    state, error = S.STOPPED, None
    if record.state in (S.RUNNING, S.FROZEN, S.LOST, S.PAUSING, S.RESUMING):
        found = await asyncio.to_thread(read_exit, places.directory)
        state, error = verdict_on(record.label, exit_of(found, False) if found else None, lines)
    await detach(box, GuestError("machine_died", f"the machine of {record.label} is gone"))
    await ended(core, box, state, error)
