"""What ends by itself: timeouts (idle or absolute) and leases nobody holds. One task, asleep until the next of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from stoker.api.models import TimeoutAction
from stoker.engine.core import Box, Core
from stoker.engine.ending import destroy
from stoker.engine.pause import pause
from stoker.engine.state import require
from stoker.errors import Conflict, NotFound, StokerError

__all__ = ["hold_lease", "reap"]

log = logging.getLogger(__name__)
RETRY: Final = 5.0


def _due(box: Box) -> float | None:
    """Seconds until the sandbox must go; None: not by itself."""
    waits = []
    if (deadline := box.deadline) is not None:
        waits.append(deadline - time.time())
    if box.lease_until is not None:
        waits.append(box.lease_until - time.monotonic())
    return min(waits) if waits else None


async def reap(core: Core) -> None:
    """Destroys what is due, for as long as the engine is open."""
    busy: dict[str, float] = {}
    while True:
        core.alarm.clear()
        now = time.monotonic()
        soonest: float | None = None
        for box in list(core.boxes.values()):
            due = _due(box)
            if due is None:
                continue
            due = max(due, busy.get(box.id, 0.0) - now)
            if due <= 0:
                busy[box.id] = now + RETRY
                why = "its lease is not held" if box.lease_until is not None else "its timeout has passed"
                timeout = box.record.timeout
                if box.lease_until is None and timeout is not None and timeout.action is TimeoutAction.PAUSE:
                    core.spawn(_rest(core, box), f"pause {box.id}")
                else:
                    core.spawn(_expire(core, box, why), f"expire {box.id}")
                due = RETRY
            soonest = due if soonest is None else min(soonest, due)
        for gone in busy.keys() - core.boxes.keys():
            del busy[gone]
        try:
            async with asyncio.timeout(soonest):
                await core.alarm.wait()
        except TimeoutError:
            pass


async def _expire(core: Core, box: Box, why: str) -> None:
    log.info("destroying %s: %s", box.id, why)
    try:
        await core.happen(box, "sandbox.expired", reason=why)
        await destroy(core, box)
    except StokerError as error:
        log.error("%s could not be destroyed: %s", box.id, error)


async def _rest(core: Core, box: Box) -> None:
    """Nobody used it for long enough. Somebody may again by now."""
    if (deadline := box.deadline) is None or deadline > time.time():
        return
    log.info("pausing %s: its timeout has passed", box.id)
    try:
        await pause(core, box, idle=True)
    except StokerError as error:
        log.error("%s could not be paused: %s", box.id, error)


@asynccontextmanager
async def hold_lease(core: Core, box: Box) -> AsyncIterator[None]:
    """Holds a sandbox's lease. When the last holder lets go, it is destroyed."""
    if not box.record.request.lease:
        raise Conflict("no_lease", f"{box.record.label} was created without a lease", "create it with lease=true")
    require(box.record, "lease")
    box.holders += 1
    box.lease_until = None
    try:
        async with core.used(box):
            yield
    finally:
        box.holders -= 1
        if not box.holders and not box.gone and not core.closing:
            # Not awaited here: the holder may be gone in the middle of its cancellation.
            box.lease_until = time.monotonic()
            core.spawn(_release(core, box), f"lease of {box.id}")


async def _release(core: Core, box: Box) -> None:
    try:
        await destroy(core, box)
    except NotFound:
        pass
