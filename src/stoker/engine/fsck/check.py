"""The whole check: the table of its parts, the second look, mending; through a serving engine or over a data directory at rest.

Everything is looked at twice, a moment apart, and only what differs in the same way both times counts: what was just changing
has changed by then. Mending looks a third time: a sandbox's things under its lock, nobody's things right before they go.
A process that is killed between two mendings leaves a host with fewer differences, and no others.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from stoker.api.models import Difference, FsckReport
from stoker.engine.core import Box, Core
from stoker.engine.database import Database, lock_data
from stoker.engine.fsck import books, host, storage, store, strays
from stoker.engine.fsck.finding import Checker, Finding, Scene
from stoker.engine.fsck.sandboxes import examine, is_busy
from stoker.engine.hidden import PARKED
from stoker.engine.reconcile import load_all
from stoker.engine.trace import trace
from stoker.errors import StokerError

if TYPE_CHECKING:
    from stoker.settings import Settings

__all__ = ["CHECKERS", "check", "check_offline"]

log = logging.getLogger(__name__)
MOMENT: Final = 0.2
"""Seconds between the two looks."""

CHECKERS: Final[tuple[Checker, ...]] = (
    # In the order of mending: processes before the files they have open.
    books.soundness,
    books.rows,
    books.reservations,
    host.processes,
    host.entries,
    host.directories,
    host.clones,
    host.runs,
    storage.devices,
    storage.loops,
    storage.mounts,
    storage.references,
    storage.volumes,
    storage.apps,
    storage.templates,
    strays.pools,
    strays.apps,
    strays.helpers,
    store.staging,
    store.names,
    store.content,
)
_Key = tuple[str, str, str, str]


def _key(finding: Finding) -> _Key:
    return finding.kind, finding.name, finding.expected, finding.found


async def _of_sandboxes(scene: Scene) -> dict[str, list[Finding]]:
    found = {}
    for box in list(scene.core.boxes.values()):
        if box.gone:
            continue
        if is_busy(box):
            if box.record.warm != PARKED:  # nobody knows of that one, and it is always being made
                scene.busy.add(box.record.label)
            continue
        async with box.lock:
            if not box.gone:
                found[box.id] = await examine(scene, box)
    return found


async def _look(scene: Scene) -> tuple[dict[str, list[Finding]], list[Finding]]:
    """What differs: of each sandbox, and of nobody."""
    found = [finding for checker in CHECKERS for finding in await checker(scene)]
    return await _of_sandboxes(scene), found


async def check(core: Core, *, repair: bool, online: bool = True) -> FsckReport:
    """One check of everything; with ``repair`` what differs is mended."""
    async with core.upkeep:
        first = Scene(core, online)
        of_first, nobodys_first = await _look(first)
        before = {_key(finding) for found in (*of_first.values(), nobodys_first) for finding in found}
        if not before:
            return _report(first, [], repair)
        await asyncio.sleep(MOMENT)
        scene = Scene(core, online)
        of, nobodys = await _look(scene)
        kept = {name: [f for f in found if _key(f) in before] for name, found in of.items()}
        nobodys = [finding for finding in nobodys if _key(finding) in before]
        differences = [_difference(finding) for found in kept.values() for finding in found]
        if repair:
            differences = []
            for name, found in kept.items():
                if found and (box := core.boxes.get(name)) is not None:
                    differences += await _mend_sandbox(scene, box, found)
            differences += [await _mend(finding) for finding in nobodys]
        else:
            differences += [_difference(finding) for finding in nobodys]
        return _report(scene, differences, repair)


def _report(scene: Scene, differences: list[Difference], repair: bool) -> FsckReport:
    return FsckReport(
        clean=all(difference.repaired for difference in differences),
        repair=repair,
        differences=differences,
        checked=scene.checked,
        busy=sorted(scene.busy),
    )


def _difference(finding: Finding, *, repaired: bool = False, error: str = "") -> Difference:
    return Difference(
        kind=finding.kind,
        name=finding.name,
        expected=finding.expected,
        found=finding.found,
        sandbox=finding.sandbox,
        repair=finding.repair,
        repaired=repaired,
        error=error,
    )


async def _mend_sandbox(scene: Scene, box: Box, found: list[Finding]) -> list[Difference]:
    """Under the sandbox's lock: whoever wants to do something to it waits, and finds it mended."""
    if is_busy(box):
        scene.busy.add(box.record.label)
        return [_difference(finding, error="something is being done to the sandbox") for finding in found]
    wanted = {_key(finding) for finding in found}
    async with box.lock:
        if box.gone:
            return []
        return [await _mend(finding) for finding in await examine(Scene(scene.core, scene.online), box) if _key(finding) in wanted]


async def _mend(finding: Finding) -> Difference:
    if finding.mend is None:
        return _difference(finding)
    trace("fsck.before_repair")
    try:
        await finding.mend()
    except (StokerError, OSError) as error:
        log.exception("%s %s could not be mended", finding.kind, finding.name)
        return _difference(finding, error=str(error))
    log.warning("mended %s %s: %s instead of %s: %s", finding.kind, finding.name, finding.found, finding.expected, finding.repair)
    trace("fsck.after_repair")
    return _difference(finding, repaired=True)


async def check_offline(settings: Settings, *, repair: bool) -> FsckReport:
    """The check of a data directory that no daemon serves (or can serve). Holds the directory meanwhile: ``engine_running``.

    Machines that live go on, unwatched, until a daemon adopts them. A database that cannot be used is the one difference named.
    """
    from stoker.engine.machines import RealBooter

    async with lock_data(settings.data_dir):
        try:
            async with Database.open(settings.database) as database:
                core = Core(settings, database, RealBooter(settings), lease_grace=0.0, boots=1)
                await load_all(core)
                try:
                    return await check(core, repair=repair, online=False)
                finally:
                    await core.end_tasks()
                    core.pools.close()
        except StokerError as error:
            if not error.code.startswith("database_"):
                raise
            broken = Difference(
                kind="database", name=str(settings.database), expected="a database that can be used", found=str(error)
            )
            return FsckReport(clean=False, repair=repair, differences=[broken])
