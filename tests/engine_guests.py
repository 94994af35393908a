"""An engine with real guests, for tests: opened and checked for what it leaves, its sandboxes, a script in one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from crashing import ADMIN, whole
from stoker.api.models import CreateSandbox, OperationState, OutputMode, Sandbox, StartProcess
from stoker.engine.engine import Engine
from stoker.engine.hidden import PARKED
from stoker.settings import Settings

MIB = 1 << 20


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Engine]:
    """An engine whose sandboxes are gone, with everything that was theirs, at the end."""
    async with Engine.open(settings, trace_kill="") as engine:
        try:
            yield engine
        finally:
            for box in (await engine.list(ADMIN, limit=1000)).items:
                await engine.destroy(ADMIN, box.id)
            await engine._waiting.clear_parked()
        async with asyncio.timeout(60):  # one that is just being made goes when it is done
            while any(box.record.warm.startswith(PARKED) for box in engine._core.boxes.values()):
                await asyncio.sleep(0.02)
        assert await whole(engine, settings.data_dir, settings.run_dir) == {}


async def make(engine: Engine, **values: object) -> Sandbox:
    request = CreateSandbox(image="debian:12", memory=256 * MIB, **values)  # type: ignore[arg-type]
    operation = await engine.create(ADMIN, request)
    operation = await engine.wait_operation(ADMIN, operation.id, 1200)
    assert operation.state is OperationState.SUCCEEDED, operation.error
    return await engine.get(ADMIN, operation.sandbox or "")


async def run(engine: Engine, name: str, script: str, **values: object) -> tuple[int | None, bytes]:
    request = StartProcess(argv=["sh", "-c", script], mode=OutputMode.BLOCK, **values)  # type: ignore[arg-type]
    attached = await engine.processes.open(ADMIN, name, request)
    data = bytearray()
    async with asyncio.timeout(120):
        while (piece := await attached.read()) is not None:
            if piece.stream == 1:
                data += piece.data
        ended = await attached.wait()
    await attached.aclose()
    return ended.exit_code, bytes(data)
