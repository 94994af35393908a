"""How sandboxes end: destroy, stop, and what is left to do when a machine is gone by itself."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from stoker.api.models import SandboxState
from stoker.engine.core import Box, Core, Live
from stoker.engine.ledger import OF_A_MACHINE, Kind, Ledger
from stoker.engine.release import clear_directory
from stoker.engine.state import require, to_body
from stoker.engine.trace import trace
from stoker.errors import Conflict, GuestError, StokerError

__all__ = ["destroy", "detach", "ended", "lay_down", "release_all", "stop"]

log = logging.getLogger(__name__)
UNMOUNT: Final = 10.0
"""Seconds a guest has for unmounting and powering off after its processes are gone."""
WITH_VOLUMES: Final = 1.0
"""Seconds that the processes of a sandbox with writable volumes have to end when it is destroyed."""


async def release_all(core: Core, box: Box, *, tracing: bool = False) -> None:
    """Takes away everything the ledger names as this sandbox's."""
    entries = await core.ledger.of(box.id)
    for kind in Kind:
        for entry in entries:
            if entry.kind is kind:
                await core.release(entry)
        if tracing and kind not in (Kind.LEASE, Kind.VOLUME, Kind.APP_DISK, Kind.MEMORY, Kind.SAVED):
            trace(f"destroy.after_{kind.value}")


async def detach(box: Box, error: StokerError) -> None:
    """The sandbox has no machine from here on: nobody watches it any more, everyone who looked on gets ``error``."""
    hub, box.asleep = box.asleep, None
    if hub is not None:
        await hub.close(error)
    live, box.live = box.live, None
    if live is None:
        return
    if live.watch is not None and live.watch is not asyncio.current_task():
        live.watch.cancel()
        await asyncio.wait({live.watch})
    await live.hub.close(error)
    if live.agent is not None:
        await live.agent.aclose()
    live.reached.set()


async def lay_down(box: Box) -> None:
    """The sandbox has no machine from here on, but will have it again: who looks on waits."""
    live, box.live = box.live, None
    if live is None:
        return
    if live.watch is not None:
        live.watch.cancel()
        await asyncio.wait({live.watch})
    if live.agent is not None:
        await live.agent.aclose()
    box.asleep = live.hub


async def ended(core: Core, box: Box, state: SandboxState, error: StokerError | None) -> None:
    """The machine is gone, the disk stays: everything else of it goes, and the row says so."""
    kinds = (*OF_A_MACHINE, Kind.SAVED)
    for entry in await core.ledger.of(box.id):
        if entry.kind in kinds:
            await core.release(entry)
    await clear_directory(core.places(box.id).directory)
    await core.save(
        box,
        event="sandbox.state",
        also=lambda db: Ledger.released_in(db, box.id, kinds),
        state=state,
        error=to_body(error) if error is not None else None,
        ended_at=time.time(),
        reason="",
        main=None,
        slot="",
        base="",
        saved="",
        woken=False,
    )
    core.admission.rest(box.id)


async def _shut_down(box: Box, live: Live, before: SandboxState, grace: float) -> None:
    """The guest ends its processes, unmounts and powers off; one that does not is ended by the caller."""
    try:
        async with asyncio.timeout(grace + UNMOUNT):
            if before is SandboxState.FROZEN:
                await live.machine.thaw()
            if live.agent is not None:
                await live.agent.shutdown("poweroff", grace)
                await live.machine.wait()
    except (StokerError, TimeoutError) as error:
        log.warning("%s did not shut down by itself: %s", box.id, error or "out of time")


async def destroy(core: Core, box: Box) -> None:
    """Ends and removes everything of a sandbox, whatever it is doing. Returns when nothing is left."""
    trace("destroy.before_mark")
    before = box.record.state
    if not box.record.doomed:
        await core.save(box, event="sandbox.state", durable=True, doomed=True, state=SandboxState.STOPPING)
    trace("destroy.after_mark")
    work = box.work
    if work is not None:
        work.cancel()
        await asyncio.wait({work})
    async with box.lock:
        if box.gone:
            return
        live = box.live
        if live is not None and any(not volume.read_only for volume in box.record.volumes):
            # Its disk is thrown away, what is in its volumes is not: the guest still has it in memory.
            await _shut_down(box, live, before, WITH_VOLUMES)
        await detach(box, GuestError("sandbox_destroyed", f"{box.record.label} was destroyed"))
        if live is not None:
            await live.machine.kill()
            await live.machine.close()
        await release_all(core, box, tracing=True)
        await core.drop(box)
        trace("destroy.after_forget")


async def stop(core: Core, box: Box, grace: float) -> None:
    """Shuts the guest down and keeps its disk. A guest that does not end in time is ended."""
    require(box.record, "stop")
    async with box.lock:
        require(box.record, "stop")
        live, before = box.live, box.record.state
        if before is SandboxState.PAUSED:
            # Its memory is given up; what it wrote to its disk by then is there.
            await core.save(box, event="sandbox.state", durable=True, state=SandboxState.STOPPING)
            await detach(box, GuestError("sandbox_stopped", f"{box.record.label} was stopped", f"stoker start {box.record.label}"))
            await ended(core, box, SandboxState.STOPPED, None)
            return
        if live is None:
            raise Conflict("wrong_state", f"{box.record.label} has no machine", f"stoker rm {box.id}")
        await core.save(box, event="sandbox.state", durable=True, state=SandboxState.STOPPING)
        trace("stop.after_mark")
        await _shut_down(box, live, before, grace)
        trace("stop.after_shutdown")
        await detach(box, GuestError("sandbox_stopped", f"{box.record.label} was stopped", f"stoker start {box.record.label}"))
        await live.machine.kill()
        await live.machine.close()
        trace("stop.after_process")
        try:
            await asyncio.to_thread(core.pools.sync, box.record.pool, box.id)
        except (StokerError, OSError) as error:
            log.warning("the disk of %s could not be synced: %s", box.id, error)
        await ended(core, box, SandboxState.STOPPED, None)
        trace("stop.after_stopped")
