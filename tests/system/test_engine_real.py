"""The engine with real guests: life, files on its disk, processes for many, death, a crowd."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from crashing import ADMIN
from engine_fixtures import own_data
from engine_guests import make, opened, run
from stoker.api.models import CreateSandbox, OperationState, SandboxState, StartProcess
from stoker.engine.engine import Engine
from stoker.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]
S = SandboxState
MIB = 1 << 20


async def test_a_life(settings: Settings, short_dir: Path) -> None:
    async with opened(own_data(settings, short_dir)) as engine:
        box = await make(engine, name="box", env={"COLOUR": "red"}, hostname="castle")
        assert box.versions.kernel and box.versions.agent and box.versions.vmm.startswith("qemu ") and box.versions.protocol == 1
        assert await run(engine, "box", "echo $COLOUR $(hostname); echo kept > /root/kept") == (0, b"red castle\n")
        code, data = await run(engine, "box", "head -c 20000000 /dev/zero | sha256sum; head -c 20000000 /dev/zero")
        assert code == 0 and len(data) > 20_000_000
        await engine.freeze(ADMIN, "box")
        await asyncio.sleep(0.3)
        await engine.thaw(ADMIN, "box")
        assert await engine.ping(ADMIN, "box") < 5000
        stopped = await engine.stop(ADMIN, "box", 2.0)
        assert stopped.state is S.STOPPED and stopped.error is None
        operation = await engine.start(ADMIN, "box")
        assert (await engine.wait_operation(ADMIN, operation.id, 200)).state is OperationState.SUCCEEDED
        assert await run(engine, "box", "cat /root/kept; echo $COLOUR; hostname") == (0, b"kept\nred\ncastle\n")
        start, text, oldest = await engine.console(ADMIN, "box", offset=None, limit=65536)
        assert oldest <= start and isinstance(text, bytes)
        await asyncio.sleep(1.0)
        newest = (await engine.metrics(ADMIN, "box", window=600, since=None)).samples[-1]
        assert newest.memory_guest_total and newest.memory_guest_used and newest.memory_host > 64 * MIB
        assert newest.disk_read and newest.cpu_seconds > 0


async def test_deaths(settings: Settings, short_dir: Path) -> None:
    """A VMM that is killed, a guest that powers itself off, a guest that panics: seen at once, and told apart."""
    async with opened(own_data(settings, short_dir)) as engine:
        boxes = await asyncio.gather(*(make(engine, name=name) for name in ("killed", "off", "panic")))
        live = engine._core.boxes[boxes[0].id].live
        assert live is not None
        began = time.monotonic()
        os.kill(live.machine.vmm.pid, signal.SIGKILL)
        dead = await engine.wait(ADMIN, "killed", frozenset({S.FAILED}), 2.0)
        assert time.monotonic() - began < 1.0
        assert dead.error is not None and dead.error.code == "machine_died"
        await engine.processes.start(ADMIN, "off", StartProcess(argv=["sh", "-c", "echo o > /proc/sysrq-trigger"]))
        off = await engine.wait(ADMIN, "off", frozenset({S.STOPPED, S.FAILED}), 60.0)
        assert off.state is S.STOPPED and off.error is None
        await engine.processes.start(ADMIN, "panic", StartProcess(argv=["sh", "-c", "echo c > /proc/sysrq-trigger"]))
        panic = await engine.wait(ADMIN, "panic", frozenset({S.STOPPED, S.FAILED}), 60.0)
        assert panic.state is S.FAILED and panic.error is not None and panic.error.code == "guest_panicked"
        assert any("panic" in line for line in panic.error.console)


async def test_a_daemon_that_comes_back(settings: Settings, short_dir: Path) -> None:
    settings = own_data(settings, short_dir)
    async with Engine.open(settings, trace_kill="") as engine:
        await make(engine, name="box")
        script = "read x; echo got $x; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.1; done"
        await engine.processes.start(ADMIN, "box", StartProcess(argv=["sh", "-c", script], stdin=True, tag="job"))
        await engine.processes.write_stdin(ADMIN, "box", "job", b"first\n", close=False)
        pid = engine._core.boxes[(await engine.get(ADMIN, "box")).id].live.machine.vmm.pid  # type: ignore[union-attr]
    began = time.monotonic()
    async with opened(settings) as engine:
        assert time.monotonic() - began < 2.0
        box = await engine.get(ADMIN, "box")
        assert box.state is S.RUNNING
        assert engine._core.boxes[box.id].live.machine.vmm.pid == pid  # type: ignore[union-attr]
        attached = await engine.processes.attach(ADMIN, "box", "job", 0, 0)
        data = b""
        async with asyncio.timeout(60):
            while b"line 30\n" not in data:
                piece = await attached.read()
                assert piece is not None and piece.offset == len(data)
                data += piece.data
        await attached.aclose()
        assert data.startswith(b"got first\nline 1\nline 2\n")
        await engine.processes.signal(ADMIN, "box", "job", 9, group=True)


async def test_impossible_images_leave_failed_rows(settings: Settings, short_dir: Path) -> None:
    async with opened(own_data(settings, short_dir)) as engine:
        for image, code in (("debian:nonsuch", "image_unknown"), ("ext4:/dev/null", "image_invalid")):
            operation = await engine.create(ADMIN, CreateSandbox(image=image))
            operation = await engine.wait_operation(ADMIN, operation.id, 30)
            assert operation.state is OperationState.FAILED and operation.error is not None and operation.error.code == code


@pytest.mark.full
@pytest.mark.timeout(1800)
async def test_fifty_at_once(settings: Settings, short_dir: Path) -> None:
    """None fails and all are usable. How long it takes is for `stoker bench create --at-once 50` to say."""
    async with opened(own_data(settings, short_dir)) as engine:
        boxes = await asyncio.gather(*(make(engine) for _ in range(50)))
        assert {box.state for box in boxes} == {S.RUNNING}
        answers = await asyncio.gather(*(run(engine, box.id, "echo usable") for box in boxes))
        assert answers == [(0, b"usable\n")] * 50
