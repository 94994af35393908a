"""One sandbox: does its row fit the ledger, the machine, the files and the reservation? Called under the sandbox's lock."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import Final

from stoker.api.models import SandboxState
from stoker.engine.build import enter_unit
from stoker.engine.core import Box, Places
from stoker.engine.ending import detach, ended
from stoker.engine.fsck.finding import Finding, Mend, Scene
from stoker.engine.ledger import OF_A_MACHINE, Entry, Kind, Ledger
from stoker.engine.pause import saved_place
from stoker.engine.reconcile import settle
from stoker.engine.release import CONSOLE, clear_directory, end_processes, release, shims
from stoker.engine.state import TRANSIENT, WITH_MACHINE
from stoker.engine.units import unit_name
from stoker.errors import HostError
from stoker.host.systemd import unit_of
from stoker.vmm.kept import missing
from stoker.vmm.shim import Supervised
from stoker.vmm.shim import find as find_machine

__all__ = ["examine", "is_busy"]

SOCKETS: Final = ("agent.sock", "qmp.sock")


def is_busy(box: Box) -> bool:
    """Somebody is at work on it: it is in between on purpose."""
    return box.work is not None or box.lock.locked()


async def examine(scene: Scene, box: Box) -> list[Finding]:
    """Everything that differs. ``box.lock`` is held, and nobody is at work on it."""
    core, record = scene.core, box.record
    places = core.places(box.id)
    entries = await core.ledger.of(box.id)
    scene.count("sandbox")
    scene.count("ledger", len(entries))
    if record.doomed or record.state in TRANSIENT:
        state = "being destroyed" if record.doomed else record.state.value
        mend = partial(settle, core, box)
        return [Finding("sandbox", box.id, "somebody at work on it", f"{state}, and nobody is", box.id, "finish it", mend)]
    machine = await asyncio.to_thread(find_machine, places.directory)
    if record.state in WITH_MACHINE:
        scene.count("process")
        if machine is None or (scene.online and box.live is None):
            found = [_unwatched(scene, box, machine)]
        else:
            found = [
                *_booked(scene, box, places, entries, machine),
                *_identity(scene, box, places, entries, machine),
                *await _unit(scene, box, entries, machine),
                *_files(box, places, running=True),
            ]
    elif record.boots:
        found = [*await _no_machine(scene, box, places, entries, machine), *_files(box, places, running=False)]
        found += [*_booked(scene, box, places, entries, None), *await _saved(scene, box)]
    else:
        found = await _nothing(scene, box, places, entries)
    return found + (_reservation(scene, box) if scene.online else [])


def _unwatched(scene: Scene, box: Box, machine: Supervised | None) -> Finding:
    """A running one has a machine, and a serving engine watches it."""
    mend = partial(settle, scene.core, box)
    if machine is None:
        directory = str(scene.core.places(box.id).directory)
        return Finding("process", directory, "its VMM and shim", "none", box.id, "end it; its disk stays", mend)
    found = f"process {machine.vmm.pid}, unwatched"
    return Finding("sandbox", box.id, "a machine that is watched", found, box.id, "adopt it", mend)


def _booked(scene: Scene, box: Box, places: Places, entries: list[Entry], machine: Supervised | None) -> list[Finding]:
    """What there is of it is in the ledger, so that it goes with it."""
    core = scene.core
    have = {(entry.kind, entry.name) for entry in entries}
    running = machine is not None
    found = []
    for kind, name in places.things(lease=False, sandbox=box.id):
        if (kind, name) in have or (not running and kind in OF_A_MACHINE) or kind is Kind.UNIT:
            continue

        async def mend(kind: Kind = kind, name: str = name) -> None:
            await core.ledger.intend(box.id, kind, name)
            await core.ledger.live(box.id, kind, name, _detail(machine) if kind is Kind.PROCESS and machine else None)

        if kind in OF_A_MACHINE or os.path.lexists(name):
            found.append(Finding(kind.value, name, "an entry in the ledger", "none", box.id, "adopt it", mend))
    return found


def _detail(machine: Supervised) -> dict[str, int]:
    return {"pid": machine.vmm.pid, "start": machine.vmm.start}


def _identity(scene: Scene, box: Box, places: Places, entries: list[Entry], machine: Supervised) -> list[Finding]:
    """The ledger's process is the one that runs."""
    now = _detail(machine)
    name = str(places.directory)
    booked = next((entry for entry in entries if entry.kind is Kind.PROCESS and entry.name == name), None)
    if booked is None or booked.detail == now:
        return []
    mend = partial(scene.core.ledger.live, box.id, Kind.PROCESS, name, now)
    found = f"{booked.detail.get('pid', 'none')} in the ledger"
    return [Finding("process", name, f"process {machine.vmm.pid}", found, box.id, "write it down", mend)]


async def _unit(scene: Scene, box: Box, entries: list[Entry], machine: Supervised) -> list[Finding]:
    """The machine is in the unit that the ledger has, and the ledger has the unit that it is in."""
    core, name = scene.core, unit_name(box.id)
    where = await asyncio.to_thread(unit_of, machine.vmm.pid)
    inside = where is not None and where[0] == name
    booked = any(entry.kind is Kind.UNIT for entry in entries)
    if inside == booked:
        return []
    if inside:

        async def adopt() -> None:
            await core.ledger.intend(box.id, Kind.UNIT, name)
            await core.ledger.live(box.id, Kind.UNIT, name)

        return [Finding("unit", name, "an entry in the ledger", "none", box.id, "adopt it", adopt)]
    found = f"process {machine.vmm.pid} in {where[0] if where else 'no unit'}"
    if not core.units.usable:
        return [Finding("unit", name, "the machine in its unit", found, box.id)]
    mend = partial(enter_unit, core, box, [machine.shim.pid, machine.vmm.pid])
    return [Finding("unit", name, "the machine in its unit", found, box.id, "put it back into one", mend)]


def _files(box: Box, places: Places, *, running: bool) -> list[Finding]:
    """Its disk is there; a running one's sockets are too."""
    found = []
    if not places.clone.exists():
        found.append(Finding("clone", str(places.clone), "its disk", "no such file", box.id))
    if running and (places.directory / "machine.json").exists():
        sockets = (places.directory / name for name in SOCKETS)
        found += [Finding("socket", str(path), "a socket", "no such file", box.id) for path in sockets if not path.is_socket()]
    return found


async def _no_machine(scene: Scene, box: Box, places: Places, entries: list[Entry], machine: Supervised | None) -> list[Finding]:
    """A sandbox at rest: no process, nothing of one in the ledger, and only its console in the directory."""
    state = box.record.state.value
    running = await asyncio.to_thread(shims, [str(places.directory)])
    found = []
    pids = {pid for found_ in running.values() for pid in found_} | ({machine.vmm.pid} if machine else set())
    if pids:
        mend = partial(asyncio.to_thread, end_processes, places.directory)
        what = "process " + ", ".join(map(str, sorted(pids)))
        found.append(Finding("process", str(places.directory), f"none: it is {state}", what, box.id, "end it", mend))
    for entry in entries:
        if entry.kind in OF_A_MACHINE:
            what = f"none: it is {state}"
            found.append(
                Finding(entry.kind.value, entry.name, what, "an entry in the ledger", box.id, "release it", _let_go(scene, entry))
            )
    try:
        left = sorted(entry.name for entry in os.scandir(places.directory) if entry.name not in CONSOLE)
    except FileNotFoundError:
        left = []
    if left:
        mend = partial(clear_directory, places.directory)
        what = ", ".join(left[:10])
        found.append(Finding("directory", str(places.directory), "its console only", what, box.id, "remove the rest", mend))
    return found


async def _saved(scene: Scene, box: Box) -> list[Finding]:
    """What a paused one is paused in is there. If not, nothing brings its memory back; its disk boots."""
    core, label = scene.core, box.record.label
    if box.record.state is not SandboxState.PAUSED:
        return []
    place = saved_place(core, box.record.saved)
    scene.count("saved")
    lost = await asyncio.to_thread(missing, place)
    if not lost:
        return []

    async def mend() -> None:
        error = HostError(
            "saved_lost", f"what {label} was paused in is gone: {lost}", f"stoker start {label} boots it from its disk"
        )
        await detach(box, error)
        await ended(core, box, SandboxState.STOPPED, error)

    return [Finding("saved", str(place), "its memory and devices", lost, box.id, "stop it; its disk stays", mend)]


async def _nothing(scene: Scene, box: Box, places: Places, entries: list[Entry]) -> list[Finding]:
    """One that never ran has left nothing."""
    found = [
        Finding(
            entry.kind.value,
            entry.name,
            "nothing: it never ran",
            "an entry in the ledger",
            box.id,
            "release it",
            _let_go(scene, entry),
        )
        for entry in entries
    ]
    booked = {(entry.kind, entry.name) for entry in entries}
    for kind, name in places.things(lease=False, sandbox=box.id):
        if kind is not Kind.PROCESS and (kind, name) not in booked and os.path.lexists(name):
            mend = partial(release, Entry(kind, name, box.id, True, {}), scene.core.pools)
            found.append(Finding(kind.value, name, "nothing: it never ran", "it is there", box.id, "remove it", mend))
    return found


def _let_go(scene: Scene, entry: Entry) -> Mend:
    async def mend() -> None:
        await scene.core.release(entry)
        await scene.core.database.write(lambda db: Ledger.released_in(db, entry.owner, [entry.kind]))

    return mend


def _reservation(scene: Scene, box: Box) -> list[Finding]:
    """What it holds of the host: all of it while it has a machine, its disk while it rests."""
    core, resources = scene.core, box.record.resources
    held = core.admission.held(box.id)
    scene.count("admission")
    running = box.record.state in WITH_MACHINE
    expected = None
    if running:
        expected = (resources.memory, resources.cpus, core.disk_of(box.record))
    elif box.record.boots:
        expected = (0, 0, core.disk_of(box.record))
    has = None if held is None else (held.memory, held.cpus, held.disk)
    if has == expected:
        return []

    async def mend() -> None:
        if expected is None:
            core.admission.release(box.id)
        else:
            memory, cpus, disk = expected
            core.admission.hold(box.id, owner=box.record.owner, memory=memory, cpus=cpus, disk=disk)

    return [Finding("admission", box.id, _reserved(expected), _reserved(has), box.id, "correct it", mend)]


def _reserved(what: tuple[int, int, int] | None) -> str:
    return "nothing reserved" if what is None else f"reserved: {what[0]} bytes of memory, {what[1]} CPUs, {what[2]} bytes of disk"
