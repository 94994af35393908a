"""Forks: copies of a live machine, which goes on.

What the machine wrote to its disk so far becomes a layer that all share, before it is stopped; in the stop it is switched to the
next overlay and its memory and devices are taken. The copies are made from memory at once, together.

A crash at any point leaves the machine as it is (its disk is in one layer more), and of the copies failed rows or whole machines.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from stoker.api.models import CopySandbox, Forked, ForkSandbox, Operation
from stoker.engine.build import kept_rows
from stoker.engine.copies import begin_copy, check_copyable, intend, planned
from stoker.engine.core import Box, Core, Live
from stoker.engine.layers import flatten_in_time, flatten_now
from stoker.engine.state import require, to_body
from stoker.engine.trace import trace
from stoker.engine.wake import Memory
from stoker.errors import Conflict, HostError, StokerError
from stoker.host.laps import Laps
from stoker.vmm.driver import NextDisk
from stoker.vmm.kept import MOST_DELTA, differs
from stoker.vmm.memory import is_sealed, new_memory, sealed
from stoker.vmm.memory_file import flatten

if TYPE_CHECKING:
    from pathlib import Path

    from stoker.api.models import Quota
    from stoker.engine.operations import Running
    from stoker.vmm.driver import Captured

__all__ = ["fork"]

log = logging.getLogger(__name__)
ROOT: Final = 0
"""The place of the root disk among a machine's."""


async def fork(core: Core, box: Box, request: ForkSandbox, quota: Quota | None) -> tuple[Operation, list[Forked]]:
    """Copies a machine ``request.count`` times. What went wrong with single copies is in their places."""
    await core.agent(box, "fork")  # a machine that was just found again may still be being reached
    async with box.lock:
        require(box.record, "fork")
        check_copyable(box.record)
        core.filling.check(box.record.pool)
        live = box.live
        if live is None:
            raise HostError("machine_missing", f"{box.record.label} has no machine", f"stoker inspect {box.id}")
        operation = core.operations.begin("fork", box.record.owner, box.id)
        error: StokerError | None = None
        try:
            forked = await _fork(core, box, live, request, quota, operation)
        except StokerError as problem:
            error = problem
            raise
        finally:
            operation.end(error)
    flatten_in_time(core, box)
    log.info("%s was forked %d times: %s", box.id, request.count, operation.value.steps)
    return operation.value, forked


async def _fork(core: Core, box: Box, live: Live, request: ForkSandbox, quota: Quota | None, operation: Running) -> list[Forked]:
    laps = Laps()
    words = CopySandbox(name=request.name, labels=request.labels, timeout=request.timeout)
    with laps.lap("mark"):
        children = await intend(core, planned(core, box.record.owner, box.record, words, request.count, box.id), operation, quota)
    trace("fork.after_mark")
    failed: StokerError | None = None
    errors: list[StokerError | None] = []
    with ExitStack() as close:
        try:
            async with core.copying:
                with laps.lap("layer"):
                    await flatten_now(core, box)
                    disk = await core.pools.freeze(box.record.pool, box.id)
                trace("fork.after_layer")
                taken = await live.machine.capture(core.scratch, disks=[NextDisk(ROOT, disk.path)], go_on=True)
                laps.seconds |= taken.steps
                trace("fork.after_taken")
                with laps.lap("base"):
                    memory = await asyncio.to_thread(_memory, core, box, live, taken, close)
                box.touch()
                rows = await kept_rows(core, box)
                made_by = live.machine.made_by()

                async def take(now: dict[str, Any]) -> Memory:
                    if different := differs({"made_by": made_by}, now):
                        raise Conflict(
                            "fork_unfit", f"{box.record.label} was started by another {different}", "stop it, and start it again"
                        )
                    return Memory(os.dup(memory.base), memory.delta, memory.state, memory.digest, memory.file)

                with laps.lap("copies"):
                    copies = [begin_copy(core, child, box.id, take, rows, operation) for child in children]
                    errors = [await copy for copy in copies]
                core.scratch.trim()
        except BaseException as problem:
            failed = problem if isinstance(problem, StokerError) else HostError("fork_failed", f"the fork was given up: {problem}")
            raise
        finally:
            if failed is not None:
                await _give_up(core, children, failed)
    trace("fork.after_all")
    operation.laps(laps.seconds)
    if errors and all(errors) and errors[0] is not None:
        raise errors[0]
    return [
        Forked(sandbox=child.value if error is None else None, error=to_body(error) if error is not None else None)
        for child, error in zip(children, errors, strict=True)
    ]


async def _give_up(core: Core, children: list[Box], error: StokerError) -> None:
    from stoker.engine.build import undo

    for child in children:
        if child.work is not None:
            child.work.cancel()
            await asyncio.wait({child.work})
        async with child.lock:
            if not child.gone and not child.record.doomed and child.live is None:
                await undo(core, child, error)


def _memory(core: Core, box: Box, live: Live, taken: Captured, close: ExitStack) -> Memory:
    """What the copies begin with: the parent's base and a delta; or, where that is large, or others could write to the base, a new
    one. Its file is linked to only where nobody can."""
    base = live.machine.memory()
    close.callback(os.close, base)
    safe = is_sealed(base)
    if safe and taken.delta.bytes <= MOST_DELTA:
        file: Path | None = core.places(box.id).memory if box.record.base else None
        return Memory(base, taken.delta, taken.state, box.record.base, file)
    fresh = new_memory("base", taken.delta.size)
    close.callback(os.close, fresh)
    flatten(base, taken.delta, fresh)
    return Memory(sealed(fresh), None, taken.state)
