"""Drives tests/engine_daemon.py and looks at what a crash left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from stoker.api.models import Principal, SandboxState
from stoker.engine.engine import Engine
from stoker.storage.layout import LAYER

ADMIN = Principal()
DAEMON = Path(__file__).parent / "engine_daemon.py"


class Daemon:
    """The daemon's process. ``ask`` returns None when it died instead of answering."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ask(self, **words: Any) -> dict[str, Any] | None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(ConnectionError):
            self.process.stdin.write(json.dumps(words).encode() + b"\n")
            await self.process.stdin.drain()
        line = await self.process.stdout.readline()
        return json.loads(line) if line else None

    async def sure(self, **words: Any) -> dict[str, Any]:
        answer = await self.ask(**words)
        assert answer is not None and "error" not in answer or answer and answer.get("error") is None, answer
        return answer

    async def has_box(self, script: str = "") -> None:
        """There is a sandbox ``box``, with a job if there is something to do."""
        if not (await self.sure(do="list"))["boxes"]:
            await self.sure(do="create", image="debian:12", name="box")
            if script:
                await self.sure(do="job", name="box", script=script)

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        # That it has ended is known before its pipes are found closed, and only then does asyncio close what it has of it.
        self.process._transport.close()  # type: ignore[attr-defined]


@asynccontextmanager
async def daemon(data: Path, run: Path, kind: str, point: str = "") -> AsyncIterator[Daemon]:
    env = {**os.environ, "STOKER_TRACE_KILL": point}
    process = await asyncio.create_subprocess_exec(
        sys.executable, DAEMON, data, run, kind, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=env
    )
    found = Daemon(process)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline(), "the daemon did not start"
        yield found
    finally:
        await found.kill()


def machines(run: Path) -> set[str]:
    """Sandboxes that have a process on this host: any whose arguments name their directory."""
    found = set()
    prefix = os.fsencode(run / "sandboxes") + b"/"
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = Path(entry.path, "cmdline").read_bytes()
                if prefix in words and b"engine_daemon" not in words:
                    found.add(words.split(prefix)[1].split(b"/")[0].split(b"\0")[0].decode())
    return found


async def whole(engine: Engine, data: Path, run: Path) -> dict[str, SandboxState]:
    """Asserts that rows, ledger, files and processes tell the same story; the sandboxes by name."""
    boxes = (await engine.list(ADMIN, limit=1000)).items
    living = {box.id for box in boxes if box.state in (SandboxState.RUNNING, SandboxState.FROZEN, SandboxState.LOST)}
    with_disk = living | {box.id for box in boxes if box.started_at is not None}
    assert not [box for box in boxes if box.state in (SandboxState.CREATING, SandboxState.STOPPING)], boxes
    snapshots = {one.id for one in engine._core.snapshots.values()}
    with_memory = {one.id for one in engine._core.snapshots.values() if one.memory}
    of_templates = {one.id for one in engine._core.snapshots.values() if one.template}
    assert of_templates == {one.snapshot for one in engine._core.templates.values()}
    assert {entry.name for entry in os.scandir(data / "pool" / "clones")} == with_disk | snapshots
    stands = {path.name for path in (data / "pool" / "bases").glob("*/refs/*")}
    assert {name for name in stands if not name.startswith(LAYER)} == with_disk | snapshots
    for layer in (data / "pool" / "layers").iterdir():
        assert list((layer / "refs").iterdir()), "a layer that nothing stands on"
    assert {entry.name for entry in os.scandir(run / "sandboxes")} == with_disk
    paused = {box.id for box in boxes if box.state is SandboxState.PAUSED}
    await quiet(engine)
    assert {entry.name.partition(".")[0] for entry in os.scandir(data / "snapshots")} == paused | with_memory
    assert {entry.name for entry in os.scandir(data / "memory")} <= living
    assert machines(run) == living
    owned = await engine._core.ledger.all()
    assert {entry.owner for entry in owned if entry.kind != "volume"} == with_disk | snapshots
    assert {entry.owner for entry in owned if entry.kind == "process"} == living
    return {box.name or box.id: box.state for box in boxes}


async def quiet(engine: Engine) -> None:
    """Until what nobody waits for is done."""
    async with asyncio.timeout(20):
        while any(task.get_name().startswith("files of ") for task in engine._core._tasks):
            await asyncio.sleep(0.005)


async def output(engine: Engine, name: str, enough: bytes) -> bytes:
    """What the process tagged ``job`` wrote from its first byte, until ``enough`` is in it."""
    attached = await engine.processes.attach(ADMIN, name, "job", 0, 0)
    data = b""
    async with asyncio.timeout(60):
        while enough not in data:
            piece = await attached.read()
            assert piece is not None and piece.offset == len(data)
            data += piece.data
    await attached.aclose()
    return data
