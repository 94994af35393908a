"""What is on the host below our own directories and belongs to no sandbox (any more)."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Final

from stoker.engine.fsck.finding import SANDBOX, Finding, Mend, Scene
from stoker.engine.fsck.strays import listed
from stoker.engine.ledger import Entry, Kind
from stoker.engine.release import end_process, end_processes, release, shims_below
from stoker.errors import Conflict
from stoker.host.process import ProcessIdentity

__all__ = ["clones", "directories", "entries", "processes", "runs"]

OWNED: Final = re.compile(r"run-(\d{1,10})-(\d{1,20})(\.qcow2)?")
"""A machine of one command: named after the process that owns it (:mod:`stoker.engine.run`)."""


def _still(scene: Scene, sandbox: str, path: Path) -> bool:
    """Nobody's, and still there: looked at again after the books."""
    return sandbox not in scene.core.boxes and os.path.lexists(path)


def _unless_owned(scene: Scene, sandbox: str, mend: Mend) -> Mend:
    """``mend``, after one more look whether a sandbox of this name has come to be."""

    async def checked() -> None:
        if sandbox in scene.core.boxes:
            raise Conflict("sandbox_exists", f"{sandbox} exists by now", "stoker fsck")
        await mend()

    return checked


async def processes(scene: Scene) -> list[Finding]:
    """Shims whose directory is below ours, and the machines that they supervise."""
    core = scene.core
    below = core.settings.run_dir / "sandboxes"
    running = await asyncio.to_thread(shims_below, below)
    found = []
    for name, identities in running.items():
        sandbox = Path(name).name
        box = core.boxes.get(sandbox)
        scene.count("process", len(identities))
        if box is not None:
            # One of a sandbox at rest is the sandbox's own finding. A second one beside a running one's is nobody's.
            found += await _second(scene, sandbox, identities)
            continue
        for identity in identities:
            if identity.alive():
                mend = _unless_owned(scene, sandbox, partial(asyncio.to_thread, end_processes, Path(name), [identity.pid]))
                what = f"stoker-shim --dir {name}, process {identity.pid}"
                found.append(Finding("process", str(identity.pid), "nothing: no such sandbox", what, sandbox, "end it", mend))
    return found


async def _second(scene: Scene, sandbox: str, identities: list[ProcessIdentity]) -> list[Finding]:
    from stoker.vmm.shim import find

    box = scene.core.boxes[sandbox]
    directory = scene.core.places(sandbox).directory
    machine = await asyncio.to_thread(find, directory)
    if machine is None or box.work is not None or box.lock.locked():
        return []
    others = [one for one in identities if one.pid != machine.shim.pid and one.alive()]
    return [
        Finding(
            "process",
            str(one.pid),
            f"one machine, process {machine.shim.pid}",
            f"a second shim of {directory}",
            sandbox,
            "end it",
            partial(asyncio.to_thread, end_process, one),
        )
        for one in others
    ]


async def directories(scene: Scene) -> list[Finding]:
    """``RUN_DIR/sandboxes``: one directory for each sandbox that ran."""
    below = scene.core.settings.run_dir / "sandboxes"
    names = await asyncio.to_thread(listed, below)
    await scene.core.ledger.all()  # the books, after the host
    scene.count("directory", len(names))
    found = []
    for name in names:
        path = below / name
        if not SANDBOX.fullmatch(name):
            found.append(Finding("directory", str(path), "directories of sandboxes only", "it is none of ours"))
        elif _still(scene, name, path):
            mend = _unless_owned(scene, name, partial(_remove_machine, scene, path, name))
            found.append(Finding("directory", str(path), "nothing: no such sandbox", "it is there", name, "remove it", mend))
    return found


async def _remove_machine(scene: Scene, path: Path, sandbox: str) -> None:
    for kind in (Kind.PROCESS, Kind.DIRECTORY):
        await release(Entry(kind, str(path), sandbox, True, {}), scene.core.pools)


async def clones(scene: Scene) -> list[Finding]:
    """``clones`` of every pool: one disk for each sandbox that ran."""
    found = []
    for place in scene.core.pools.directories():
        names = await asyncio.to_thread(listed, place / "clones")
        scene.count("clone", len(names))
        for sandbox in names:
            path = place / "clones" / sandbox
            if sandbox in scene.core.snapshots:
                continue  # its disk: an overlay that nobody writes to
            if not SANDBOX.fullmatch(sandbox):
                found.append(Finding("clone", str(path), "disks of sandboxes only", "it is none of ours"))
            elif _still(scene, sandbox, path):
                entry = Entry(Kind.CLONE, str(path), sandbox, True, {})
                mend = _unless_owned(scene, sandbox, partial(release, entry, scene.core.pools))
                found.append(Finding("clone", str(path), "nothing: no such sandbox", "it is there", sandbox, "remove it", mend))
    return found


async def entries(scene: Scene) -> list[Finding]:
    """Entries of the ledger whose sandbox is gone."""
    core = scene.core
    found = []
    for entry in await core.ledger.all():
        if core.owns(entry.owner):
            continue

        async def mend(entry: Entry = entry) -> None:
            await core.release(entry)
            await core.ledger.released(entry.owner, entry.kind)

        what = f"an entry in the ledger of {entry.owner}, which is gone"
        found.append(
            Finding(
                entry.kind.value, entry.name, "nothing", what, entry.owner, "release it", _unless_owned(scene, entry.owner, mend)
            )
        )
    return found


async def runs(scene: Scene) -> list[Finding]:
    """Machines of single commands whose owner is gone, and probes of the accelerator that nobody is at."""
    settings = scene.core.settings
    found = []
    for place, kind in ((settings.run_dir / "runs", "directory"), (settings.data_dir / "runs", "clone")):
        for name in await asyncio.to_thread(listed, place):
            match = OWNED.fullmatch(name)
            if match is None or _lives(int(match[1]), int(match[2])):
                continue
            path = place / name
            mend = partial(asyncio.to_thread, _remove_run, path)
            found.append(Finding(kind, str(path), "nothing: its process is gone", "it is there", None, "remove it", mend))
    return found


def _lives(pid: int, start: int) -> bool:
    try:
        return ProcessIdentity.of(pid).start == start
    except ProcessLookupError:
        return False


def _remove_run(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        end_processes(path)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
