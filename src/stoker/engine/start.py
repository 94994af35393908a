"""From a :class:`MachineSpec` to a VMM whose guest answers: out of golden memory where there is some, else by booting."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.engine.golden import begin_disk
from stoker.engine.trace import trace
from stoker.errors import DeadlineExceeded, HostError, StokerError
from stoker.guest.channel import connect
from stoker.vmm.diagnosis import explain
from stoker.vmm.machine import GuestMemory, MachineSpec
from stoker.vmm.memory import empty_memory
from stoker.vmm.qemu.driver import QemuMachine, launch

if TYPE_CHECKING:
    from stoker.engine.golden import Golden, Goldens, Shape
    from stoker.guest.agent import Agent
    from stoker.settings import Settings
    from stoker.vmm.driver import Machine

__all__ = ["NO_GOLDEN", "Started", "Watch", "explained", "first_word", "launched", "start"]

NO_GOLDEN = "no_golden"
"""The code of the error that a machine that must not boot would have to."""
RESTORE_TIMEOUT = 30.0
"""Seconds until a machine out of golden memory must have answered; after that one is booted instead."""


@dataclass(frozen=True, slots=True)
class Started:
    """``golden``: golden memory made it; ``base`` is then its digest, where it could be linked to."""

    machine: Machine
    agent: Agent
    golden: bool = False
    base: str = ""


class Watch:
    """Seconds between the named points of one boot."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self._last
        self._last = now


@asynccontextmanager
async def explained(machine: Machine, settings: Settings) -> AsyncIterator[None]:
    """What goes wrong inside is told with the console's last lines."""
    try:
        yield
    except TimeoutError:
        raise DeadlineExceeded(
            "boot_timeout",
            f"{machine.spec_name} did not come up within {settings.boot_timeout:g} s",
            "stoker doctor; a slow host needs a larger boot_timeout",
            console=await machine.console_tail(20),
        ) from None
    except StokerError as error:
        if error.code == "no_init":
            error.hint = "--init agent, or an image with an init: systemd-sysv in Debian"
        if not error.console:
            error.console = await machine.console_tail(20)
        raise


async def first_word(machine: Machine, deadline: float, *, fresh: bool = True) -> Agent:
    """Connects to the agent, or says why the machine ended instead. ``fresh``: nobody has spoken to it yet."""
    ended = asyncio.ensure_future(machine.wait())
    spoken = asyncio.ensure_future(connect(machine.channel(), fresh=fresh, timeout=deadline))
    try:
        await asyncio.wait({ended, spoken}, return_when=asyncio.FIRST_COMPLETED)
        if spoken.done() and spoken.exception() is None:
            return spoken.result()
        if not ended.done():
            # The channel's end and the VMM's come in either order; the VMM's says more.
            await asyncio.wait({ended}, timeout=2.0)
        if ended.done():
            raise await explain(machine, ended.result())
        spoken.result()
        raise AssertionError("a future that is done has a result or an exception")
    finally:
        for future in (ended, spoken):
            future.cancel()
        await asyncio.gather(ended, spoken, return_exceptions=True)


async def start(
    spec: MachineSpec,
    settings: Settings,
    watch: Watch,
    goldens: Goldens | None = None,
    shape: Shape | None = None,
    base_file: Path | None = None,
    golden_only: bool = False,
) -> Started:
    """A running machine that answers. The laps of ``watch`` are ``vmm`` and ``guest``. With ``golden_only`` it does not boot."""
    golden = await goldens.take(shape) if goldens is not None and shape is not None else None
    if goldens is not None and golden is not None:
        try:
            machine, agent = await _restored(spec, settings, watch, golden)
            linked = base_file is not None and goldens.link(golden, base_file)
            return Started(machine, agent, True, golden.saved.digest if linked else "")
        except (StokerError, TimeoutError) as error:
            await goldens.failed(golden, error)
        finally:
            os.close(golden.saved.memory)
    if golden_only:
        raise HostError(NO_GOLDEN, "there is no golden memory for this kind of machine")
    async with AsyncExitStack() as undo:
        # So that its memory can be taken out of it, a machine that boots has a base like any other: the empty one.
        empty = empty_memory()
        try:
            machine = await launched(replace(spec, guest_memory=GuestMemory(empty)), settings, watch, undo)
        finally:
            os.close(empty)
        async with explained(machine, settings):
            agent = await first_word(machine, settings.boot_timeout)
        watch.lap("guest")
        trace("boot.after_hello")
        undo.pop_all()
    return Started(machine, agent)


async def launched(spec: MachineSpec, settings: Settings, watch: Watch, undo: AsyncExitStack) -> QemuMachine:
    machine = await launch(spec, settings)
    undo.push_async_callback(machine.close)
    undo.push_async_callback(machine.kill)
    watch.lap("vmm")
    trace("boot.after_launch")
    return machine


async def _restored(
    spec: MachineSpec,
    settings: Settings,
    watch: Watch,
    golden: Golden,
) -> tuple[QemuMachine, Agent]:
    async with AsyncExitStack() as undo:
        root = spec.disks[0].path
        before = await asyncio.to_thread(begin_disk, root, golden.saved)
        # Should this fail, the machine boots.
        undo.push_async_callback(asyncio.to_thread, root.write_bytes, before)
        copy = replace(spec, guest_memory=GuestMemory(golden.saved.memory), restore=True)
        machine = await launched(copy, settings, watch, undo)
        async with asyncio.timeout(RESTORE_TIMEOUT):
            await machine.restore(golden.saved.memory, None, golden.saved.state)
            await machine.thaw()
            agent = await first_word(machine, RESTORE_TIMEOUT)
        watch.lap("guest")
        trace("boot.after_hello")
        undo.pop_all()
    return machine, agent
