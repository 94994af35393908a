"""The layers under a running machine's disk: every fork and snapshot makes one more, and each costs every read a little.

From :data:`SOON` on they are joined in the background; with :data:`LATEST` the next fork waits for that.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from stoker.engine.core import Box, Core
from stoker.errors import StokerError
from stoker.storage.overlay import JOINED

__all__ = ["depth", "flatten_in_time", "flatten_now"]

log = logging.getLogger(__name__)
SOON: Final = 4
LATEST: Final = 8


async def depth(core: Core, box: Box) -> int:
    """How many layers lie between its disk and the base."""
    clone = await asyncio.to_thread(lambda: core.pools.open(box.record.pool).open_clone(box.id))
    return max(0, len(clone.backing) - 1)


def flatten_in_time(core: Core, box: Box) -> None:
    """Joins them in the background, when there are enough."""
    core.spawn(_flatten(core, box), f"layers of {box.id}")


async def flatten_now(core: Core, box: Box) -> None:
    """Before another layer is made. The sandbox's lock is held."""
    if await depth(core, box) >= LATEST:
        await _join(core, box)


async def _flatten(core: Core, box: Box) -> None:
    async with box.lock:
        if box.live is None or box.record.doomed or await depth(core, box) < SOON:
            return
        try:
            await _join(core, box)
        except StokerError as error:
            log.warning("the layers of %s could not be joined: %s", box.id, error)


async def _join(core: Core, box: Box) -> None:
    if box.live is None:
        return
    await box.live.machine.flatten_disk(0, JOINED)
    # Until here the record names layers whose content is in the overlay as well: as right, only deeper.
    await asyncio.to_thread(lambda: core.pools.open(box.record.pool).streamed(box.id))
