"""A machine that waited in a warm set becomes the sandbox that somebody asked for."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

import anyio

from stoker.api.models import OperationState, Origin, SandboxState
from stoker.engine.build import run_main, undo, why
from stoker.engine.ending import detach, release_all
from stoker.engine.trace import trace
from stoker.engine.wake import Identity, certificate, introduce
from stoker.errors import GuestError, StokerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stoker.engine.core import Box, Core, Live
    from stoker.engine.operations import Running

__all__ = ["take_over"]

log = logging.getLogger(__name__)
PATIENCE: Final = 10.0
"""Seconds that a machine has to go on in; then one is made."""


def take_over(core: Core, box: Box, operation: Running, instead: Callable[[], None]) -> None:
    """Has the machine go on by a task of the engine's own. Where it cannot, nothing of it is left, and ``instead`` begins to make
    one for the same row."""

    async def work() -> None:
        error: StokerError | None = None
        async with box.lock:
            live = box.live
            try:
                if live is None or not await _taken_over(core, box, live):
                    return
                if box.record.request.start and box.record.command:
                    await run_main(core, box, live, tuple(box.record.command))
            except BaseException as cause:
                error = why(cause, core, box)
                with anyio.CancelScope(shield=True):
                    await undo(core, box, error)
                if isinstance(cause, asyncio.CancelledError):
                    raise
        operation.end(error)

    def over(task: asyncio.Task[None]) -> None:
        box.work = None
        if task.cancelled():
            operation.end(cancelled=True)
        elif operation.value.state is OperationState.RUNNING:
            instead()

    box.work = core.spawn(work(), f"take over {box.id}")
    box.work.add_done_callback(over)
    core.alarm.set()


async def _taken_over(core: Core, box: Box, live: Live) -> bool:
    """The machine goes on, and the row says so. False: it cannot, and nothing of it is left."""
    from stoker.engine.boot import DEFAULT_PATH

    record, began = box.record, time.perf_counter()
    generation = record.generation + 1
    try:
        async with asyncio.timeout(PATIENCE):
            if live.agent is None or not (record.template or await core.booter.still(record)):
                raise GuestError("warm_stale", "it is not what a create would make now")
            if record.slot:
                await core.networks.change(record, wait=False)
            await live.machine.thaw()
            trace("warm.after_thaw")
            identity = Identity(
                generation,
                copy=True,
                hostname=record.hostname or box.id,
                env={"PATH": DEFAULT_PATH, **record.env},
                user=record.user,
                workdir=record.workdir,
            )
            report = await introduce(live.agent, identity, core.host_keys.take)
            if report is not None and report.unhandled:
                raise GuestError("copy_unsafe", ", ".join(one.name for one in report.unhandled))
    except (StokerError, TimeoutError) as error:
        log.warning("%s does not go on with the machine that waited for it: %s", box.id, error or "out of time")
        await _thrown_away(core, box, live)
        return False
    except BaseException:
        with anyio.CancelScope(shield=True):
            await _thrown_away(core, box, live)
        raise
    box.rings.restart()
    box.touch()
    await core.save(
        box,
        event="sandbox.state",
        state=SandboxState.RUNNING,
        started_at=time.time(),
        boots=1,
        generation=generation,
        certificate=certificate(report, generation),
        origin=Origin.WARM,
        timings={"thaw": round((time.perf_counter() - began) * 1000, 3)},
    )
    trace("create.after_running")
    return True


async def _thrown_away(core: Core, box: Box, live: Live) -> None:
    """Ends the machine that waited, with everything of it. The ledger goes on to name what a machine consists of."""
    await detach(box, GuestError("machine_died", f"the machine of {box.record.label} is gone"))
    await live.machine.kill()
    await live.machine.close()
    await release_all(core, box)
