"""Larger disks: a sandbox's own in the pool, in its virtual machine, in its file system; and a further one that it has mounted."""

from __future__ import annotations

import asyncio
from typing import Final

from msgspec.structs import replace

from stoker.api.models import Quota
from stoker.engine.core import Box, Core
from stoker.engine.state import require
from stoker.errors import GuestError, HostError, InvalidRequest

__all__ = ["fill", "resize", "show"]

MIB: Final = 1 << 20
ROOT: Final = "root"
"""The serial number of a sandbox's own disk."""
SEEN: Final = 10.0
"""Seconds until a guest's kernel knows of the larger disk."""


async def resize(core: Core, box: Box, size: int, quota: Quota | None) -> None:
    """Grows the disk to ``size`` bytes (rounded up to MiB). One that has that size already is brought to fill it."""
    size = -(-size // MIB) * MIB
    require(box.record, "resize")
    async with box.lock:
        require(box.record, "resize")
        resources = box.record.resources
        if size < resources.disk:
            raise InvalidRequest(
                "disk_too_small",
                f"{box.record.label} has {resources.disk // MIB} MiB of disk, which cannot be made smaller",
                f"--disk {resources.disk // MIB}M or more",
            )
        before = core.disk_of(box.record)
        core.admission.grow(box.id, before + size - resources.disk, quota)
        try:
            await _disk(core, box, size)
        except BaseException:
            core.admission.grow(box.id, before, None)
            raise
        # From here on it has the size, whatever becomes of its file system.
        await core.save(box, event="sandbox.resized", resources=replace(resources, disk=size))
        await fill(box, ROOT, "/", size)


async def _disk(core: Core, box: Box, size: int) -> None:
    pool = await asyncio.to_thread(core.pools.open, box.record.pool)
    clone = await asyncio.to_thread(pool.open_clone, box.id)
    # What a machine has open as qcow2 is its own to change.
    if (box.live is None or clone.format != "qcow2") and size > clone.size:
        await asyncio.to_thread(pool.grow, box.id, size)
    await show(box, 0, size)


async def show(box: Box, index: int, size: int) -> None:
    """Tells the machine, if there is one, how large its disk of this number is now."""
    if box.live is not None:
        await box.live.machine.resize_disk(index, size)


async def fill(box: Box, serial: str, path: str, size: int) -> None:
    """Lets the file system that a running guest has mounted at ``path`` fill its disk; one that rests does so when it boots."""
    live = box.live
    if live is None:
        return
    if live.agent is None:
        raise HostError("agent_unreachable", f"the agent of {box.record.label} does not answer", "do it again")
    async with asyncio.timeout(SEEN * 2):
        for _ in range(int(SEEN / 0.05)):
            if await live.agent.grow(serial, path) >= size:
                return
            await asyncio.sleep(0.05)
    raise GuestError("disk_not_seen", f"the guest of {box.record.label} does not see its larger disk", "stop and start it")
