"""A machine of our own for a while: a kernel, the agent, one volume, nothing else. What a guest has written is read by a guest.

Its directory is ``RUN_DIR/helpers/JOB`` (the ledger knows it and its process by that), and it ends with this process, however that
ends. Leaving the block unmounts the volume and powers off; a failure ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stoker.engine.filling import reserve
from stoker.engine.ledger import Entry, Kind, Ledger
from stoker.engine.state import Mounted, new_id
from stoker.engine.trace import trace
from stoker.errors import CapacityExhausted, DeadlineExceeded, HostError, StokerError

if TYPE_CHECKING:
    from stoker.engine.core import Core
    from stoker.guest.agent import Agent
    from stoker.vmm.driver import Machine

__all__ = ["MEMORY", "helper"]

log = logging.getLogger(__name__)
MIB: Final = 1 << 20
MEMORY: Final = 192 * MIB
LOOK: Final = 1.0
UNMOUNT: Final = 120.0
"""Seconds that writing back what was unpacked may take."""


@asynccontextmanager
async def helper(core: Core, owner: str, mounted: Mounted, file: Path) -> AsyncIterator[Agent]:
    """The agent of a machine that has ``file`` mounted as ``mounted`` says."""
    job = new_id("job")
    directory = core.settings.run_dir / "helpers" / job
    things = [(Kind.PROCESS, str(directory)), (Kind.DIRECTORY, str(directory))]
    core.admission.admit(job, owner="stoker", memory=MEMORY, cpus=1, disk=0)
    core.jobs.add(job)
    try:
        await core.database.write(lambda db: Ledger.intend_in(db, job, things), durable=True)
        directory.mkdir(mode=0o700)
        async with core.queue.turn(owner):
            machine, agent = await core.booter.helper(job, directory, mounted, file)
        trace("helper.after_boot")
        writing = _Writing(machine)
        try:
            yield agent
            try:
                async with asyncio.timeout(UNMOUNT):
                    await agent.shutdown("poweroff", 0.0)
                    await machine.wait()
            except TimeoutError:
                raise DeadlineExceeded("unmount_timeout", f"volume {mounted.name} could not be unmounted") from None
        except StokerError:
            if writing.failed:
                raise _failed(mounted, file) from None
            raise
        finally:
            writing.watch.cancel()
            await asyncio.shield(_end(machine, agent))
    finally:
        core.admission.release(job)
        await asyncio.shield(_forget(core, job, things))


class _Writing:
    """Looks whether the VMM has stopped at a write that failed. Nobody waits for room here: such a machine is ended."""

    def __init__(self, machine: Machine) -> None:
        self.failed = False
        self.watch = asyncio.create_task(self._watch(machine))

    async def _watch(self, machine: Machine) -> None:
        try:
            while await machine.status() != "io-error":  # noqa: ASYNC110 - the monitor tells it to who asks
                await asyncio.sleep(LOOK)
        except StokerError:
            return  # it has ended
        self.failed = True
        await machine.kill()


def _failed(mounted: Mounted, file: Path) -> StokerError:
    found = os.statvfs(file.parent)
    if found.f_bavail * found.f_frsize < reserve(found.f_blocks * found.f_frsize):
        return CapacityExhausted("no_space", f"the file system of {file.parent} is full", "stoker rm what is not needed, stoker gc")
    return HostError("disk_error", f"volume {mounted.name} cannot be written to: the host's disk failed", "dmesg")


async def _end(machine: Machine, agent: Agent) -> None:
    await agent.aclose()
    await machine.kill()
    await machine.close()


async def _forget(core: Core, job: str, things: list[tuple[Kind, str]]) -> None:
    for kind, name in things:
        await core.release(Entry(kind, name, job, True, {}))
    await core.database.write(lambda db: Ledger.released_in(db, job))
    core.jobs.discard(job)
