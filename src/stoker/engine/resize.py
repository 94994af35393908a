"""A larger disk for a sandbox: in the pool, in its virtual machine, in its file system."""

from __future__ import annotations

import asyncio
from typing import Final

from msgspec.structs import replace

from stoker.api.models import Quota, SandboxState
from stoker.engine.core import Box, Core
from stoker.engine.state import require
from stoker.errors import GuestError, HostError, InvalidRequest

__all__ = ["resize"]

MIB: Final = 1 << 20
ROOT: Final = "/dev/vda"
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
        core.admission.grow(box.id, size, quota)
        try:
            await _disk(core, box, size)
        except BaseException:
            core.admission.grow(box.id, resources.disk, None)
            raise
        # From here on it has the size, whatever becomes of its file system.
        await core.save(box, event="sandbox.resized", resources=replace(resources, disk=size))
        if box.record.state is SandboxState.RUNNING:
            await _file_system(box, size)


async def _disk(core: Core, box: Box, size: int) -> None:
    pool = await asyncio.to_thread(core.pools.open, box.record.pool)
    clone = await asyncio.to_thread(pool.open_clone, box.id)
    # What a machine has open as qcow2 is its own to change.
    if (box.live is None or clone.format != "qcow2") and size > clone.size:
        await asyncio.to_thread(pool.grow, box.id, size)
    if box.live is not None:
        await box.live.machine.resize_disk(0, size)


async def _file_system(box: Box, size: int) -> None:
    live = box.live
    if live is None or live.agent is None:
        raise HostError("agent_unreachable", f"the agent of {box.record.label} does not answer", "do it again")
    async with asyncio.timeout(SEEN * 2):
        for _ in range(int(SEEN / 0.05)):
            if await live.agent.grow(ROOT) >= size:
                return
            await asyncio.sleep(0.05)
    raise GuestError("disk_not_seen", f"the guest of {box.record.label} does not see its larger disk", "stop and start it")
