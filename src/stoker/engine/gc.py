"""Frees what nothing refers to. One collector for each kind of thing; each says what may go, why, and how it is removed.

==============  ==================================================================================================
kind            goes when
==============  ==================================================================================================
image, kernel   no name leads to it (superseded), no sandbox's disk stands on it, and nobody is just making one; a kernel
                that was a file: also when that file is no more what it was
staging         its owner is gone
initramfs       unused for a month, or beyond the bound and not used lately
packages        beyond the bound: the indexes and packages of the suites asked for the longest ago
app             no sandbox has it, and nobody has asked for it for a day
base            no disk stands on a pool's copy of an image, or on its record of one that is gone or was made anew
golden          what it was made from is gone, or a crash left it half made (golden memory, :mod:`.golden`)
backup          the database's copies made before a migration, but for the newest; what an interrupted one left
==============  ==================================================================================================

What can be reached by another data directory (a link in place of a directory of the store) is left alone: its users are not known
here. Every removal is atomic or works on what is left of it, so that after a crash the next clean-up goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from stoker.api.models import Freed, GcReport
from stoker.engine.apps import forget_app
from stoker.engine.core import Core
from stoker.engine.golden import golden_key
from stoker.engine.images import is_used
from stoker.engine.trace import trace
from stoker.errors import StokerError
from stoker.host.files import allocated, remove_tree
from stoker.host.lock import hold_directory, tried
from stoker.images import inventory
from stoker.images.initramfs import superfluous
from stoker.images.inventory import Item
from stoker.images.kernel import POINTER, file_pointer
from stoker.images.store import Store
from stoker.storage.app import discard_app, unused_apps
from stoker.storage.pool import Pool
from stoker.vmm.saved import orphaned

__all__ = ["COLLECTORS", "Garbage", "collect"]

log = logging.getLogger(__name__)
INITRAMFS_BOUND: Final = 128 << 20
PACKAGES_BOUND: Final = 256 << 20
APP_KEPT: Final = 86400.0


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something that may go. ``remove`` says whether it is gone: False when somebody began to use it."""

    kind: str
    name: str
    why: str
    bytes: int
    remove: Callable[[], Awaitable[bool]]


Collector = Callable[[Core], AsyncIterator[Garbage]]


def _unlink(path: Path) -> Callable[[], Awaitable[bool]]:
    async def remove() -> bool:
        path.unlink(missing_ok=True)
        return True

    return remove


def _current(item: Item) -> bool:
    """Whether a name still leads to it. A name made from a file's identity leads nowhere when the file has another by now."""
    for name in item.names:
        if not name.startswith(POINTER):
            return True
        try:
            if item.manifest is not None and file_pointer(Path(item.manifest.name)) == name:
                return True
        except OSError:
            continue
    return False


async def _entries(core: Core, kind: str) -> AsyncIterator[Garbage]:
    store = Store(core.settings)
    for item in await asyncio.to_thread(inventory.items, store, kind):
        if _current(item) or is_used(core, kind, item.digest):
            continue
        # Somebody who is just making a sandbox of it holds it: no garbage, whatever the names say.
        fd = hold_directory(store.entry(kind, item.digest))
        if fd is None:
            continue
        os.close(fd)
        why = "its file has changed or is gone" if item.names else "superseded, and no sandbox uses it"
        yield Garbage(inventory.WORD[kind], item.digest, why, item.disk, _remove_entry(core, store, item))


def _remove_entry(core: Core, store: Store, item: Item) -> Callable[[], Awaitable[bool]]:
    async def remove() -> bool:
        return await inventory.remove(store, item, refused=lambda: is_used(core, item.kind, item.digest))

    return remove


async def _images(core: Core) -> AsyncIterator[Garbage]:
    async for garbage in _entries(core, "images"):
        yield garbage


async def _kernels(core: Core) -> AsyncIterator[Garbage]:
    async for garbage in _entries(core, "kernels"):
        yield garbage


async def _staging(core: Core) -> AsyncIterator[Garbage]:
    store = Store(core.settings)
    for path in store.staged():
        fd = hold_directory(path)
        if fd is not None:
            os.close(fd)
            size = await asyncio.to_thread(allocated, path)
            yield Garbage("staging", path.name, "who made it is gone", size, partial(store.discard, path))


async def _initramfs(core: Core) -> AsyncIterator[Garbage]:
    directory = core.settings.data_dir / "cache" / "initramfs"
    for path, why in superfluous(directory, INITRAMFS_BOUND) if directory.is_dir() else ():
        yield Garbage("initramfs", path.name, why, allocated(path), _unlink(path))


async def _packages(core: Core) -> AsyncIterator[Garbage]:
    store = Store(core.settings)
    kept = 0
    place = core.settings.data_dir / "cache" / "apt"
    suites = list(place.iterdir()) if place.is_dir() else []
    for path in sorted(suites, key=lambda path: -path.stat().st_mtime):
        size = await asyncio.to_thread(allocated, path)
        if kept + size <= PACKAGES_BOUND:
            kept += size
        else:
            why = f"beyond the {PACKAGES_BOUND >> 20} MiB that are kept"
            yield Garbage("packages", path.name, why, size, _remove_suite(store, path))


def _remove_suite(store: Store, path: Path) -> Callable[[], Awaitable[bool]]:
    async def remove() -> bool:
        # Whoever fetches packages of the suite holds this lock (images.kernel).
        with tried(store.directory("locks") / f"kernel-{path.name}") as ours:
            if ours:
                await asyncio.to_thread(remove_tree, path)
            return ours

    return remove


async def _apps(core: Core) -> AsyncIterator[Garbage]:
    data_dir = core.settings.data_dir
    for path in await asyncio.to_thread(unused_apps, data_dir, APP_KEPT):
        if _has_app(core, path.name):
            continue
        size = await asyncio.to_thread(allocated, path)
        yield Garbage("app", path.name, "no sandbox has it", size, partial(_remove_app, core, path.name))


def _has_app(core: Core, digest: str) -> bool:
    return any(box.record.request.app == digest for box in core.boxes.values())


async def _remove_app(core: Core, digest: str) -> bool:
    # Asked for in the meantime, it is not among the unused any more: a create looks first, and takes a moment after.
    if _has_app(core, digest) or digest not in {path.name for path in unused_apps(core.settings.data_dir, APP_KEPT)}:
        return False
    await asyncio.to_thread(discard_app, core.settings.data_dir, digest)
    await forget_app(core, digest)
    return True


async def _golden(core: Core) -> AsyncIterator[Garbage]:
    place = core.settings.data_dir / "golden"
    for path in sorted(place.iterdir()) if place.is_dir() else []:
        if not path.is_dir():
            continue
        with tried(place / f"{golden_key(path)}.lock") as ours:
            why = ("half made" if path.name.startswith(".") else await asyncio.to_thread(orphaned, path)) if ours else ""
        if why:
            yield Garbage("golden", path.name, why, await asyncio.to_thread(allocated, path), _remove_golden(place, path))


def _remove_golden(place: Path, path: Path) -> Callable[[], Awaitable[bool]]:
    async def remove() -> bool:
        # Whoever makes it holds this lock; whoever has loaded it needs the files no more.
        with tried(place / f"{golden_key(path)}.lock") as ours:
            if ours:
                await asyncio.to_thread(remove_tree, path)
            return ours

    return remove


async def _backups(core: Core) -> AsyncIterator[Garbage]:
    name = core.settings.database.name
    # We hold the data directory, so nobody is at a migration.
    for path in core.settings.data_dir.glob(f"{name}*.new*"):
        yield Garbage("backup", path.name, "an interrupted migration left it", allocated(path), _unlink(path))
    copies = sorted(core.settings.data_dir.glob(f"{name}.v*.bak"), key=lambda path: path.stat().st_mtime)
    for path in copies[:-1]:
        yield Garbage("backup", path.name, f"{copies[-1].name} is newer", allocated(path), _unlink(path))


async def _bases(core: Core) -> AsyncIterator[Garbage]:
    for name, pool in core.pools.opened().items():
        try:
            found = await asyncio.to_thread(pool.unused)
        except (StokerError, OSError) as error:
            log.warning("the bases of pool %s cannot be looked at: %s", name or "data directory", error)
            continue
        for base in found:
            why = "no disk stands on it; it is copied again when one is to" if base.current else "its image is gone or another"
            yield Garbage("base", f"{pool.directory}/bases/{base.key}", why, base.bytes, partial(_drop_base, pool, base.key))


async def _drop_base(pool: Pool, key: str) -> bool:
    return await asyncio.to_thread(pool.drop, key) is not None


COLLECTORS: Final[dict[str, tuple[Collector, str]]] = {
    # What is reported while it works: the collector, and the directory that must not be another data directory's.
    "images": (_images, "images"),
    "kernels": (_kernels, "kernels"),
    "staging": (_staging, "staging"),
    "initramfs": (_initramfs, "cache"),
    "packages": (_packages, "cache"),
    "apps": (_apps, "apps"),
    "bases": (_bases, ""),
    "golden": (_golden, "golden"),
    "backups": (_backups, ""),
}


async def collect(core: Core, *, dry_run: bool) -> GcReport:
    """One clean-up. What cannot be removed is in the report, with the reason; the rest goes on."""
    items: list[Freed] = []
    skipped: list[str] = []
    async with core.upkeep:
        for what, (collector, directory) in COLLECTORS.items():
            if directory and inventory.shared_elsewhere(core.settings, directory):
                skipped.append(f"{what}: {core.settings.data_dir / directory} is another data directory's")
                continue
            items += [await _free(garbage, dry_run) async for garbage in collector(core)]
    by_kind: dict[str, int] = {}
    for item in items:
        if not item.error:
            by_kind[item.kind] = by_kind.get(item.kind, 0) + item.bytes
    return GcReport(dry_run=dry_run, items=items, freed=sum(by_kind.values()), by_kind=by_kind, skipped=skipped)


async def _free(garbage: Garbage, dry_run: bool) -> Freed:
    error = ""
    if not dry_run:
        trace("gc.before_item")
        try:
            if not await garbage.remove():
                error = "it is in use again"
        except (StokerError, OSError) as problem:
            log.exception("%s %s could not be removed", garbage.kind, garbage.name)
            error = str(problem)
        trace("gc.after_item")
    return Freed(kind=garbage.kind, name=garbage.name, why=garbage.why, bytes=garbage.bytes, error=error)
