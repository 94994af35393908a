"""What is in our own directories and in no book. What a crash of ours leaves there goes; any other name is told, and left."""

from __future__ import annotations

import asyncio
import os
import re
from functools import partial
from pathlib import Path
from typing import Final

from stoker.engine.apps import forget_app
from stoker.engine.fsck.finding import SANDBOX, Finding, Scene
from stoker.engine.release import end_processes
from stoker.errors import Conflict, StokerError
from stoker.host.files import remove_tree
from stoker.host.mounts import mounted_at
from stoker.images.inventory import shared_elsewhere
from stoker.storage.app import discard_app

__all__ = ["apps", "helpers", "listed", "pools"]

JOB: Final = re.compile(r"job-[a-z2-7]{20}")
POOL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
UNFINISHED: Final = re.compile(r"\..+\.xfs\.([0-9]{1,10})")
"""A pool's file while a process makes it (:func:`stoker.storage.filesystem.make`)."""
DIGEST: Final = re.compile(r"[0-9a-f]{64}")
OF_APPS: Final = frozenset({"staging", "locks", "disks"})


def listed(path: Path) -> list[str]:
    """Names in a directory; there may be none."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def _strange(kind: str, path: Path, expected: str) -> Finding:
    return Finding(kind, str(path), expected, "it is none of ours")


async def pools(scene: Scene) -> list[Finding]:
    """``DATA_DIR/pools``, and the directories of every pool."""
    core = scene.core
    place = core.settings.data_dir / "pools"
    names = await asyncio.to_thread(listed, place)
    known = {entry for name in core.pools.names() for entry in (name, f"{name}.xfs")}
    found = []
    for name in names:
        path = place / name
        if name in known or not os.path.lexists(path):
            continue
        if match := UNFINISHED.fullmatch(name):
            # We hold the data directory: nobody else makes one.
            if int(match[1]) != os.getpid():
                mend = partial(asyncio.to_thread, path.unlink, True)
                found.append(Finding("pool", str(path), "somebody who makes it", "nobody", None, "remove it", mend))
        elif POOL.fullmatch(name) and _is_empty(path):
            mend = partial(asyncio.to_thread, path.rmdir)
            found.append(Finding("pool", str(path), "a pool's file beside it", "none", None, "remove it", mend))
        else:
            found.append(_strange("pool", path, "pools only"))
    for pool in core.pools.opened().values():
        scene.count("pool")
        try:
            found += [_strange("pool", path, "parts of the pool") for path in await asyncio.to_thread(pool.foreign)]
        except (StokerError, OSError):
            continue  # unmounted: that is a finding of its own
    return found


def _is_empty(path: Path) -> bool:
    """A directory of its own with nothing in it, and nothing mounted there."""
    return path.is_dir() and not path.is_symlink() and mounted_at(path) is None and not listed(path)


async def apps(scene: Scene) -> list[Finding]:
    """``DATA_DIR/apps``: whole images, and overlays of sandboxes that have an app."""
    core = scene.core
    place = core.settings.data_dir / "apps"
    if shared_elsewhere(core.settings, "apps"):
        return []
    found = []
    for name in await asyncio.to_thread(listed, place):
        if name in OF_APPS:
            continue
        if not DIGEST.fullmatch(name):
            found.append(_strange("app", place / name, "apps only"))
        elif lacks := [part for part in ("app.ext4", "facts.json") if not (place / name / part).is_file()]:
            used = any(box.record.request.app == name for box in core.boxes.values())
            mend = None if used else partial(_unless_used, scene, name)
            repair = "" if used else "remove it; it is made again when it is sent again"
            found.append(Finding("app", str(place / name), "a whole image", f"no {lacks[0]}", None, repair, mend))
    disks = await asyncio.to_thread(listed, place / "disks")
    strange = [name for name in disks if not (name.endswith(".qcow2") and SANDBOX.fullmatch(name.removesuffix(".qcow2")))]
    return found + [_strange("app-disk", place / "disks" / name, "overlays of sandboxes only") for name in strange]


async def _unless_used(scene: Scene, digest: str) -> None:
    if any(box.record.request.app == digest for box in scene.core.boxes.values()):
        raise Conflict("app_in_use", f"a sandbox has the app {digest} by now", "stoker fsck")
    await asyncio.to_thread(discard_app, scene.core.settings.data_dir, digest)
    await forget_app(scene.core, digest)


async def helpers(scene: Scene) -> list[Finding]:
    """``RUN_DIR/helpers``: machines that work on a volume, for as long as their job goes on."""
    core = scene.core
    place = core.settings.run_dir / "helpers"
    names = await asyncio.to_thread(listed, place)
    booked = {entry.owner for entry in await core.ledger.all()}
    found = []
    for name in names:
        path = place / name
        if not JOB.fullmatch(name):
            found.append(_strange("directory", path, "machines of jobs only"))
        elif name not in core.jobs and name not in booked and os.path.lexists(path):
            mend = partial(asyncio.to_thread, _end_helper, path)
            found.append(Finding("directory", str(path), "a job that goes on", "none", None, "end its machine and remove it", mend))
    return found


def _end_helper(path: Path) -> None:
    end_processes(path)
    remove_tree(path)
