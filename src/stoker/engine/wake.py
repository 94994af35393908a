"""Taking up a machine where it was put away: what :mod:`.boot` is for one that begins."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stoker.engine.boot import LiveMachine, plan
from stoker.engine.start import Watch, explained, first_word, launched
from stoker.engine.trace import trace
from stoker.vmm.kept import load
from stoker.vmm.machine import GuestMemory
from stoker.vmm.qemu.facts import qemu_facts
from stoker.vmm.saved import portable

if TYPE_CHECKING:
    from stoker.engine.bases import Bases
    from stoker.engine.boot import MachineRequest
    from stoker.engine.pools import MakeDisk
    from stoker.guest.agent import Agent
    from stoker.images.progress import Progress
    from stoker.settings import Settings
    from stoker.vmm.driver import Machine

__all__ = ["wake"]

TIMEOUT: Final = 60.0
"""Seconds that a machine has to answer after it was taken up."""


async def wake(
    request: MachineRequest,
    settings: Settings,
    directory: Path,
    disk: MakeDisk,
    saved: Path,
    bases: Bases,
    *,
    ready: Callable[[Machine], Awaitable[None]],
    progress: Progress,
    cgroup: Path | None,
) -> LiveMachine:
    """A machine with the memory, devices and disk of one that was put away in ``saved``; it outlives this process.

    ``ready`` is awaited when it is whole; from then on the guest runs. A failure ends the machine. Errors: those of
    :func:`stoker.vmm.kept.load` besides those of a boot.
    """
    watch = Watch()
    with ExitStack() as held:
        made = await plan(request, settings, directory, disk, watch, held, progress, detached=True, cgroup=cgroup)
        spec = replace(made.spec, guest_memory=GuestMemory(0), restore=True)
        kept = await asyncio.to_thread(load, saved, portable(spec, await qemu_facts(settings)))
        base = await bases.open(kept)
        held.callback(os.close, base)
        watch.lap("check")
        async with AsyncExitStack() as undo:
            machine = await launched(replace(spec, guest_memory=GuestMemory(base)), settings, watch, undo)
            trace("resume.after_launch")
            async with explained(machine, settings), asyncio.timeout(TIMEOUT):
                await machine.restore(base, kept.delta, kept.state)
                watch.lap("restore")
                trace("resume.after_restore")
                if request.base_file is not None:
                    request.base_file.unlink(missing_ok=True)
                    os.link(kept.memory, request.base_file)
                await ready(machine)
                watch.lap("ready")
                await machine.thaw()
                trace("resume.after_thaw")
                agent = await first_word(machine, TIMEOUT, fresh=False)
                undo.push_async_callback(agent.aclose)
                watch.lap("guest")
                trace("resume.after_hello")
                await _tell(agent)
                watch.lap("configure")
            undo.pop_all()
        live = LiveMachine(
            request,
            machine,
            agent,
            made.rootfs,
            made.kernel,
            made.clone,
            watch.laps,
            made.spec.accelerator.value,
            base=kept.digest,
        )
        live.held = held.pop_all()
        return live


async def _tell(agent: Agent) -> None:
    """Its clock stood still, and what its random generator would have said next is in a file."""
    await asyncio.gather(agent.set_time(), agent.reseed(os.urandom(64)))
