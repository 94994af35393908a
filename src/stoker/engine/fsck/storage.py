"""Pools and what the kernel has because of them, volumes, apps: nothing that no disk, volume or sandbox needs."""

from __future__ import annotations

import asyncio
import os
from functools import partial

from stoker.engine.fsck.finding import SANDBOX, Finding, Scene
from stoker.engine.fsck.sandboxes import is_busy
from stoker.engine.fsck.strays import listed
from stoker.engine.ledger import Kind
from stoker.engine.pause import saved_place
from stoker.host import devicemapper, loop
from stoker.host.lock import hold_directory
from stoker.host.mounts import mounts as mount_table
from stoker.images.inventory import shared_elsewhere
from stoker.storage import filesystem
from stoker.storage.app import app_image, sweep_apps
from stoker.storage.volume import size_of
from stoker.vmm.kept import missing

__all__ = ["apps", "devices", "loops", "mounts", "references", "templates", "volumes"]


async def devices(scene: Scene) -> list[Finding]:
    """Mapped devices whose names begin with one of our pools' own digits: each is in the ledger."""
    names = await asyncio.to_thread(devicemapper.listed)
    prefixes = tuple(pool.device_prefix for pool in scene.core.pools.opened().values())
    booked = {entry.name for entry in await scene.core.ledger.all() if entry.kind is Kind.DEVICE}
    found = []
    for name in names:
        if not name.startswith(prefixes) or not prefixes:
            continue
        scene.count("device")
        # Those below a snapshot (its base, padded) end in a word of their own.
        if not any(name == known or name.startswith(f"{known}-") for known in booked):
            mend = partial(asyncio.to_thread, devicemapper.remove, name)
            found.append(Finding("device", name, "an entry in the ledger", "none", None, "remove it", mend))
    return found


async def loops(scene: Scene) -> list[Finding]:
    """Loop devices on files below our data directory: a disk's in the ledger, a base's that disks stand on, a pool's own."""
    core = scene.core
    data = f"{os.path.realpath(core.settings.data_dir)}/"
    there = await asyncio.to_thread(lambda: [(number, name) for number, name in loop.listed() if name.startswith(data)])
    needed = {os.path.realpath(entry.name) for entry in await core.ledger.all() if entry.kind is Kind.LOOP}
    needed |= {os.path.realpath(core.pools.image(name)) for name in core.pools.names()}
    for pool in core.pools.opened().values():
        needed |= {os.path.realpath(path) for path in await asyncio.to_thread(pool.images)}
    found = []
    for number, name in there:
        scene.count("loop")
        if name not in needed:
            mend = partial(asyncio.to_thread, _detach, number, name)
            found.append(Finding("loop", f"/dev/loop{number}", "nothing behind it of ours", name, None, "detach it", mend))
    return found


def _detach(number: int, name: str) -> None:
    if (number, name) in loop.listed() and (device := loop.backing_of(number)) is not None:
        loop.detach(device)


async def mounts(scene: Scene) -> list[Finding]:
    """Each pool with a file system of its own that is in use is mounted, and nothing else is below ``pools``."""
    core = scene.core
    place = core.settings.data_dir / "pools"
    names = core.pools.names()
    found = []
    for name in core.pools.opened():
        if name:
            scene.count("mount")
            if not await asyncio.to_thread(filesystem.is_attached, core.pools.image(name), core.pools.directory(name)):
                hint = "restart the daemon: stoker daemon restart"
                found.append(Finding("mount", str(core.pools.directory(name)), str(core.pools.image(name)), f"nothing; {hint}"))
    wanted = {os.path.realpath(core.pools.directory(name)) for name in names}
    below = f"{os.path.realpath(place)}/"
    strange = [mount for mount in await asyncio.to_thread(list, mount_table()) if str(mount.point).startswith(below)]
    return found + [
        Finding("mount", str(mount.point), "nothing mounted", mount.source) for mount in strange if str(mount.point) not in wanted
    ]


async def references(scene: Scene) -> list[Finding]:
    """What a crash left of disks in the pools: a part of one, or a reference of one that is gone."""
    core = scene.core
    found = []
    for pool in core.pools.opened().values():
        for name, places in (await asyncio.to_thread(pool.stray)).items():
            if name in core.boxes or (pool.directory / "clones" / name) in places:
                continue  # it is just being made; or its directory is a finding of its own
            mend = partial(asyncio.to_thread, pool.discard, name)
            what = ", ".join(map(str, places[:5]))
            found.append(
                Finding("disk", f"{pool.directory}/clones/{name}", "a whole disk, or nothing", what, None, "remove it", mend)
            )
    return found


async def volumes(scene: Scene) -> list[Finding]:
    """Each volume has its file, and each file its volume (or whoever is making it)."""
    core = scene.core
    place = core.settings.data_dir / "volumes"
    names = await asyncio.to_thread(listed, place)
    booked = {entry.name for entry in await core.ledger.all() if entry.kind is Kind.VOLUME}
    found = []
    for identity in list(core.volumes):
        path = place / f"{identity}.ext4"
        scene.count("volume")
        record, size = core.volumes[identity], await asyncio.to_thread(size_of, path)
        if size < record.size and core.volumes.get(identity) == record:
            what = f"{size} bytes" if path.exists() else "no such file"
            found.append(Finding("volume", str(path), f"its file of {record.size} bytes", what))
        elif str(path) not in booked:
            mend = partial(_adopt_volume, scene, identity, str(path))
            found.append(Finding("volume", str(path), "an entry in the ledger", "none", None, "adopt it", mend))
    for name in names:
        path = place / name
        if str(path) not in booked and name.removesuffix(".ext4") not in core.volumes and path.exists():
            # Data of somebody's, most likely: nothing removes it by itself.
            found.append(Finding("volume", str(path), "files of volumes only", "a file that no volume has"))
    return found


async def _adopt_volume(scene: Scene, identity: str, name: str) -> None:
    await scene.core.ledger.intend(identity, Kind.VOLUME, name)
    await scene.core.ledger.live(identity, Kind.VOLUME, name)


async def apps(scene: Scene) -> list[Finding]:
    """The image and the overlay of each sandbox that has an app, no overlay of nobody's, and nothing half made."""
    core, data = scene.core, scene.core.settings.data_dir
    shared = shared_elsewhere(core.settings, "apps")
    disks = await asyncio.to_thread(listed, data / "apps" / "disks")
    found = []
    for box in list(core.boxes.values()):
        digest = box.record.request.app
        if digest is None or not box.record.boots:
            continue
        scene.count("app")
        if not app_image(data, digest).exists():
            found.append(Finding("app", str(app_image(data, digest)), f"the app of {box.record.label}", "no such file", box.id))
        overlay = core.places(box.id).app
        if overlay is not None and not overlay.exists() and not is_busy(box) and not box.gone:
            found.append(Finding("app-disk", str(overlay), f"what {box.record.label} wrote to its app", "no such file", box.id))
    if shared:
        return found
    for name in disks:
        sandbox, overlay = name.removesuffix(".qcow2"), data / "apps" / "disks" / name
        if SANDBOX.fullmatch(sandbox) and sandbox not in core.boxes and overlay.exists():
            mend = partial(asyncio.to_thread, overlay.unlink, True)
            found.append(Finding("app-disk", str(overlay), "nothing: no such sandbox", "it is there", sandbox, "remove it", mend))
    for name in await asyncio.to_thread(listed, data / "apps" / "staging"):
        stage = data / "apps" / "staging" / name
        fd = hold_directory(stage)
        if fd is not None:
            os.close(fd)
            mend = partial(asyncio.to_thread, sweep_apps, data)
            found.append(Finding("staging", str(stage), "somebody who is making it", "nobody", None, "remove it", mend))
    return found


async def templates(scene: Scene) -> list[Finding]:
    """The memory of each is there as it was written. Otherwise its sandboxes boot, and the first of them has it made anew."""
    core, found = scene.core, []
    for template in list(core.templates.values()):
        scene.count("template")
        snapshot = core.snapshots.get(template.snapshot)
        if snapshot is not None and not snapshot.memory:
            continue
        place = saved_place(core, template.snapshot)
        lost = await asyncio.to_thread(missing, place)
        if lost and core.templates.get(template.id) is template:
            found.append(Finding("template", str(place), f"the memory of {template.name}", lost))
    return found
