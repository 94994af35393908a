"""Taking up a machine where it was put away, or copied: what :mod:`.boot` is for one that begins."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stoker.api.models import Certificate, Hazard, Origin
from stoker.engine.boot import LiveMachine, plan, told
from stoker.engine.start import Watch, explained, first_word, launched
from stoker.engine.trace import trace
from stoker.errors import GuestError, StokerError
from stoker.guest.copies import AfterRestore
from stoker.images.progress import NullProgress
from stoker.vmm.kept import differs, load
from stoker.vmm.machine import GuestMemory
from stoker.vmm.qemu.facts import qemu_facts
from stoker.vmm.saved import portable

if TYPE_CHECKING:
    from stoker.engine.bases import Bases
    from stoker.engine.boot import MachineRequest
    from stoker.engine.pools import MakeDisk
    from stoker.guest.agent import Agent, MakeKeys
    from stoker.guest.copies import Report
    from stoker.guest.messages import NetworkConfiguration
    from stoker.images.progress import Progress
    from stoker.settings import Settings
    from stoker.vmm.driver import Machine
    from stoker.vmm.memory import Delta

__all__ = ["Identity", "Memory", "TakeMemory", "certificate", "introduce", "kept_memory", "unfit", "wake"]

TIMEOUT: Final = 60.0
"""Seconds that a machine has to answer after it was taken up."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory and devices of a machine: a base (a descriptor; whoever takes this closes it), what differs from it, the devices.

    ``file`` has the base's content, with ``digest``, and may be linked to; ``None``: no file has.
    """

    base: int
    delta: Delta | None
    state: bytes
    digest: str = ""
    file: Path | None = None


TakeMemory = Callable[[dict[str, Any]], Awaitable[Memory]]
"""Gives the memory to a machine that is made like this (:func:`stoker.vmm.saved.portable`), or says why it does not fit."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the machine is from now on. ``copy``: another than the one whose memory it has."""

    generation: int
    copy: bool = False
    hostname: str | None = None
    env: Mapping[str, str] | None = None
    user: str | None = None
    workdir: str | None = None
    origin: Origin | None = None
    """What it is said to have begun as."""


def certificate(report: Report | None, generation: int) -> Certificate:
    """What the guest reported, in the words of the API."""
    if report is None:
        return Certificate(generation=generation, restored_at=time.time())
    hazards = [Hazard(name=h.name, handled=h.handled, beyond=h.beyond, detail=h.detail, at=h.at / 1e9) for h in report.hazards]
    steps = {name: round(seconds * 1000, 3) for name, seconds in report.seconds.items()}
    return Certificate(generation=generation, restored_at=time.time(), hazards=hazards, steps=steps)


def kept_memory(place: Path, bases: Bases, *, alone: bool) -> TakeMemory:
    """What was put away in a directory. ``alone``: nobody else will ever take it up from there."""

    async def take(made_by: dict[str, Any]) -> Memory:
        kept = await asyncio.to_thread(load, place, made_by)
        kept = replace(kept, alone=kept.alone and alone)
        return Memory(await bases.open(kept), kept.delta, kept.state, kept.digest, kept.memory)

    return take


async def wake(
    request: MachineRequest,
    settings: Settings,
    directory: Path,
    disk: MakeDisk,
    take: TakeMemory,
    identity: Identity,
    *,
    ready: Callable[[Machine], Awaitable[None]],
    progress: Progress,
    cgroup: Path | None,
) -> LiveMachine:
    """A machine with the memory, devices and disk of another, or of itself; it outlives this process.

    ``ready`` is awaited when it is whole; from then on the guest runs. A failure ends the machine. Errors: those of
    :func:`stoker.vmm.kept.load` besides those of a boot.
    """
    watch = Watch()
    with ExitStack() as held:
        made = await plan(request, settings, directory, disk, watch, held, progress, detached=True, cgroup=cgroup)
        spec = replace(made.spec, guest_memory=GuestMemory(0), restore=True)
        memory = await take(portable(spec, await qemu_facts(settings)))
        watch.lap("check")
        async with AsyncExitStack() as undo:
            try:
                machine = await launched(replace(spec, guest_memory=GuestMemory(memory.base)), settings, watch, undo)
                trace("resume.after_launch")
                async with explained(machine, settings), asyncio.timeout(TIMEOUT):
                    await machine.restore(memory.base, memory.delta, memory.state)
            finally:
                os.close(memory.base)
            watch.lap("restore")
            trace("resume.after_restore")
            linked = request.base_file is not None and _linked(memory.file, request.base_file)
            await ready(machine)
            watch.lap("ready")
            async with explained(machine, settings), asyncio.timeout(TIMEOUT):
                await machine.thaw()
                trace("resume.after_thaw")
                agent = await first_word(machine, TIMEOUT, fresh=False)
                undo.push_async_callback(agent.aclose)
                watch.lap("guest")
                trace("resume.after_hello")
                wire = request.wire if identity.copy else None
                report = await introduce(agent, identity, request.keys, told(wire, 0) if wire is not None and wire.own else None)
                if identity.copy and report is not None and report.unhandled:
                    names = ", ".join(f"{one.name} ({one.detail})" for one in report.unhandled)
                    raise GuestError("copy_unsafe", f"the copy would be a twin: {names}", "see its console: stoker logs")
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
            base=memory.digest if linked else "",
            report=report,
        )
        live.held = held.pop_all()
        return live


async def unfit(request: MachineRequest, settings: Settings, directory: Path, disk: MakeDisk, made_by: Mapping[str, Any]) -> str:
    """Why a machine like this could not take up memory that was made so; empty: it could. Nothing is made or started."""
    with ExitStack() as held:
        made = await plan(request, settings, directory, disk, Watch(), held, NullProgress(), detached=True, cgroup=None)
        spec = replace(made.spec, guest_memory=GuestMemory(0), restore=True)
        different = differs({"made_by": made_by}, portable(spec, await qemu_facts(settings)))
    return f"it is of a machine with another {different}" if different else ""


def _linked(file: Path | None, name: Path) -> bool:
    name.unlink(missing_ok=True)
    if file is None:
        return False
    try:
        os.link(file, name)
    except OSError:
        return False  # its next pause writes a base of its own
    return True


async def introduce(
    agent: Agent, identity: Identity, keys: MakeKeys | None, network: NetworkConfiguration | None = None
) -> Report | None:
    """Before anything else is asked of it: who it is now, and what time. An older agent is told what it understands. Without
    ``network`` it keeps its addresses."""
    words = AfterRestore(
        entropy=os.urandom(64),
        generation=identity.generation,
        copy=identity.copy,
        hostname=identity.hostname,
        machine_id=os.urandom(16).hex() if identity.copy else None,
        boot_id=str(uuid.uuid4()) if identity.copy else None,
        network=network,
        drop_connections=identity.copy,
        env=identity.env,
        user=identity.user,
        workdir=identity.workdir,
    )
    try:
        return await agent.after_restore(words, keys=keys)
    except StokerError as error:
        if error.code != "unsupported":
            raise
    await asyncio.gather(agent.set_time(), agent.reseed(os.urandom(64)))
    return None
