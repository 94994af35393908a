"""Watches one machine: sees its end at once, and reaches its agent again when the connection is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from stoker.api.models import SandboxState
from stoker.engine.core import Box, Core, Live
from stoker.engine.ending import detach, ended
from stoker.engine.hub import Started
from stoker.engine.state import to_body
from stoker.errors import GuestError, StokerError

if TYPE_CHECKING:
    from stoker.vmm.machine import MachineExit

__all__ = ["died", "verdict_on", "watch"]

log = logging.getLogger(__name__)
LOST_AFTER: Final = 15.0
"""Seconds without an agent, while the VMM lives, until the sandbox is called lost."""
PAUSE: Final = (0.05, 0.2, 0.5, 1.0, 2.0)
LINES: Final = 40
LOOK_BACK: Final = 400
"""A panic's registers and call trace may fill a screen below the line that names it."""
PANIC: Final = ("Kernel panic", "stoker-agent: fatal")


async def watch(core: Core, box: Box, live: Live, rows: dict[int, Started] | None = None) -> None:
    """Until the machine is gone, or somebody else took it (``box.live`` is another)."""
    loop = asyncio.get_running_loop()
    ending: asyncio.Task[MachineExit] = loop.create_task(live.machine.wait())
    other: asyncio.Task[object] | None = None
    try:
        while True:
            agent = live.agent
            other = loop.create_task(_reach(core, box, live, rows) if agent is None else agent.wait_closed())
            await asyncio.wait({ending, other}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                break
            other.result()
            if agent is not None:
                if box.record.state not in (SandboxState.STOPPING, SandboxState.PAUSING):
                    log.warning("%s: %s", box.id, agent.reason)
                live.agent = None
                live.reached.clear()
            else:
                rows = None
    finally:
        for task in (ending, other):
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait({task})
    await died(core, box, live, ending.result())


async def _reach(core: Core, box: Box, live: Live, rows: dict[int, Started] | None) -> None:
    """Connects to the agent, as often as it takes, and puts the processes' streams onto the new connection."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    tries = 0
    while True:
        # A frozen guest cannot answer, one that shuts down will not.
        while box.record.state in (SandboxState.FROZEN, SandboxState.STOPPING, SandboxState.PAUSING):
            await box.changed.wait()
            began = loop.time()
        try:
            agent = await core.booter.connect(live.machine)
            try:
                await live.hub.resynchronise(agent)
                if rows is not None:
                    await live.hub.adopt(agent, rows)
            except BaseException:
                await agent.aclose()
                raise
        except StokerError as error:
            log.info("%s: %s", box.id, error)
            if loop.time() - began > LOST_AFTER and box.record.state is SandboxState.RUNNING:
                await core.save(box, event="sandbox.state", state=SandboxState.LOST, error=to_body(error))
            await asyncio.sleep(PAUSE[min(tries, len(PAUSE) - 1)])
            tries += 1
            continue
        live.agent = agent
        live.reached.set()
        if box.record.state is SandboxState.LOST:
            await core.save(box, event="sandbox.state", state=SandboxState.RUNNING, error=None)
        return


def verdict_on(label: str, exit: MachineExit | None, tail: Sequence[str]) -> tuple[SandboxState, StokerError | None]:
    """What a machine's end means: the guest powered off, or something went wrong."""
    found = next((index for index, line in enumerate(tail) if any(mark in line for mark in PANIC)), None)
    if found is not None:
        panic, tail = tail[found], tail[found : found + LINES]
        return SandboxState.FAILED, GuestError(
            "guest_panicked", f"the guest of {label} gave up: {panic.strip()[-200:]}", f"stoker logs {label}", console=tuple(tail)
        )
    if exit is not None and exit.requested:
        # Not by us: who asks for an end of ours says so in the row, and never gets here.
        return SandboxState.STOPPED, GuestError(
            "stopped_outside",
            f"the machine of {label} was ended from outside: systemctl stop, machinectl terminate, or a SIGTERM to its shim",
            f"its disk is kept: stoker start {label}",
        )
    if exit is not None and exit.code == 0:
        return SandboxState.STOPPED, None
    how = "is gone" if exit is None else f"was killed by signal {exit.signal}" if exit.signal else f"ended with {exit.code}"
    return SandboxState.FAILED, GuestError(
        "machine_died",
        f"the machine of {label} {how}",
        f"its disk is kept: stoker start {label}",
        details={"code": exit.code, "signal": exit.signal} if exit is not None else {},
        console=tuple(tail[-LINES:]),
    )


async def died(core: Core, box: Box, live: Live, exit: MachineExit) -> None:
    """A machine ended and nobody asked for it."""
    async with box.lock:
        if box.live is not live or box.record.doomed:
            return
        tail = await live.machine.console_tail(LOOK_BACK)
        state, error = verdict_on(box.record.label, exit, tail)
        reason = error or GuestError("sandbox_stopped", f"the guest of {box.record.label} powered off")
        await detach(box, reason)
        await live.machine.close()
        await ended(core, box, state, error)
