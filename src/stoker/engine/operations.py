"""Long work with a name: its progress, its end, who may see it.

Kept in memory; what a restart forgets is told by the sandbox's row.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from msgspec.structs import replace

from stoker.api.models import Operation, OperationPage, OperationState, Principal, Progress, SandboxState
from stoker.engine.pages import page_after
from stoker.engine.state import Record, new_id, to_body
from stoker.errors import NotFound, StokerError

__all__ = ["Operations", "Running", "hidden"]

KEPT = 1000


class Running:
    """The engine's own end of one operation; it is a progress reporter (``images.progress.Progress``)."""

    def __init__(self, value: Operation, owner: str) -> None:
        self.value = value
        self.owner = owner
        self._changed = asyncio.Event()
        self.cancel: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Ends it, where that is not by its sandbox. Returns when it has ended."""

    def _set(self, value: Operation) -> None:
        self.value = value
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        await self._changed.wait()

    def step(self, name: str, done: float | None = None, total: float | None = None, detail: str = "") -> None:
        progress = Progress(step=name, done=done, total=total, detail=detail[:500])
        if self.value.state is OperationState.RUNNING and progress != self.value.progress:
            self._set(replace(self.value, progress=progress))

    def laps(self, seconds: dict[str, float]) -> None:
        """How long parts of it took."""
        steps = {**self.value.steps, **{name: round(value * 1000, 3) for name, value in seconds.items()}}
        if self.value.state is OperationState.RUNNING:
            self._set(replace(self.value, steps=steps))

    def end(self, error: StokerError | None = None, *, cancelled: bool = False) -> None:
        if self.value.state is not OperationState.RUNNING:
            return
        state = OperationState.CANCELLED if cancelled else OperationState.FAILED if error else OperationState.SUCCEEDED
        self._set(replace(self.value, state=state, ended_at=time.time(), error=to_body(error) if error else None))


def hidden(kind: str, sandbox: str) -> Running:
    """One that nobody sees."""
    return Running(Operation(id=new_id("op"), kind=kind, state=OperationState.RUNNING, created_at=time.time(), sandbox=sandbox), "")


class Operations:
    """All of them: the running ones, and the last that ended."""

    def __init__(self) -> None:
        self._all: OrderedDict[str, Running] = OrderedDict()

    @property
    def running(self) -> int:
        return sum(op.value.state is OperationState.RUNNING for op in self._all.values())

    def working_on(self, sandbox: str) -> bool:
        """Whether something is being done to it, or it is just being made."""
        return any(one.value.sandbox == sandbox and one.value.state is OperationState.RUNNING for one in self._all.values())

    def discard(self, running: Running) -> None:
        """It never began."""
        self._all.pop(running.value.id, None)

    def of(self, record: Record) -> Operation:
        """The last operation of a sandbox. After a restart it is told by the row."""
        running = self._all.get(record.operation or "")
        if running is not None:
            return running.value
        state = OperationState.SUCCEEDED
        if record.state is SandboxState.CREATING:
            state = OperationState.RUNNING
        elif record.state is SandboxState.FAILED:
            state = OperationState.FAILED
        return Operation(
            id=record.operation or new_id("op"),
            kind="create",
            state=state,
            created_at=record.created_at,
            sandbox=record.id,
            ended_at=None if state is OperationState.RUNNING else record.ended_at or record.started_at,
            error=record.error,
        )

    def begin(self, kind: str, owner: str, sandbox: str | None) -> Running:
        operation = Operation(id=new_id("op"), kind=kind, state=OperationState.RUNNING, created_at=time.time(), sandbox=sandbox)
        running = self._all[operation.id] = Running(operation, owner)
        if len(self._all) > KEPT:
            for key, op in list(self._all.items()):
                if op.value.state is not OperationState.RUNNING:
                    del self._all[key]
                if len(self._all) <= KEPT:
                    break
        return running

    def find(self, who: Principal, operation: str) -> Running:
        running = self._all.get(operation)
        if running is None or not (who.admin or running.owner == who.owner):
            raise NotFound("operation_unknown", f"there is no operation {operation}", "ended ones are forgotten after a while")
        return running

    def page(self, who: Principal, sandbox: str | None, limit: int, cursor: str | None) -> OperationPage:
        """Newest first."""
        values = [
            op.value
            for op in reversed(self._all.values())
            if (who.admin or op.owner == who.owner) and sandbox in (None, op.value.sandbox)
        ]
        items, following = page_after(values, limit, cursor, lambda op: (op.created_at, op.id))
        return OperationPage(items=items, next=following)

    async def wait(self, who: Principal, operation: str, timeout: float, seen: Operation | None) -> Operation:
        """Until it ended or differs from ``seen``; after ``timeout`` as it is."""
        running = self.find(who, operation)
        try:
            async with asyncio.timeout(timeout):
                while running.value.state is OperationState.RUNNING and (seen is None or running.value == seen):
                    await running.change()
        except TimeoutError:
            pass
        return running.value
