"""Forks of live machines: the original goes on, each copy has all of it, and none is another's twin."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from crashing import ADMIN, daemon, output, quiet, whole
from engine_fixtures import own_data
from engine_guests import make, opened, run
from stoker.api.models import CreateVolume, ForkSandbox, OutputMode, Sandbox, SandboxState, StartProcess
from stoker.api.volumes import parse_mount
from stoker.engine import layers, trace
from stoker.engine.engine import Engine
from stoker.errors import CapacityExhausted, Conflict
from stoker.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]
S = SandboxState
MIB = 1 << 20
COUNTER = "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.1; done"
WRITER = "while :; do date +%N >> /root/log; dd if=/dev/urandom of=/root/churn bs=64k count=32 2>/dev/null; done"
UNIQUE = ("cat /proc/sys/kernel/random/boot_id", "head -c 32 /dev/urandom | od -x", "cat /proc/sys/kernel/random/uuid", "hostname")


async def said(engine: Engine, name: str, script: str) -> str:
    code, data = await run(engine, name, script)
    assert code == 0, data
    return data.decode()


async def forked(engine: Engine, original: str, **words: object) -> list[Sandbox]:
    result = await engine.fork(ADMIN, original, ForkSandbox(**words))  # type: ignore[arg-type]
    assert result.steps["stopped"] > 0
    found = []
    for item in result.items:
        assert item.error is None and item.sandbox is not None, item.error
        found.append(item.sandbox)
    return found


@pytest.mark.parametrize("cold", [True, False], ids=["booted", "golden"])
async def test_copies_have_all_and_are_no_twins(settings: Settings, short_dir: Path, cold: bool) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        await make(engine, name="box", cold=cold, env={"A": "b"})
        await engine.processes.start(ADMIN, "box", StartProcess(argv=["sh", "-c", COUNTER], tag="job"))
        await engine.processes.start(ADMIN, "box", StartProcess(argv=["sh", "-c", WRITER], tag="writer"))
        cat = await engine.processes.open(ADMIN, "box", StartProcess(argv=["cat"], stdin=True, tag="cat", mode=OutputMode.BLOCK))
        pattern = await said(engine, "box", "yes x | head -c 8M > /dev/shm/p; echo disk > /root/kept; md5sum /dev/shm/p")
        copies = await forked(engine, "box", count=3, name="copy", labels={"k": "v"})
        assert [copy.name for copy in copies] == ["copy-1", "copy-2", "copy-3"]
        assert all(copy.state is S.RUNNING and copy.origin == "fork" and copy.labels == {"k": "v"} for copy in copies)
        names = ["box", *(copy.id for copy in copies)]
        for name in names:
            assert await said(engine, name, "md5sum /dev/shm/p; cat /root/kept; echo $A") == f"{pattern}disk\nb\n"
            await output(engine, name, b"line 20\n")
        assert len({await said(engine, name, "env | grep -v ^_= | sort") for name in names}) == 1
        for script in UNIQUE:
            answers = [await said(engine, name, script) for name in names]
            assert len(set(answers)) == len(names), (script, answers)
        assert [await said(engine, name, "cat /run/stoker/generation") for name in names[1:]] == ["1\n"] * 3
        certificate = await engine.identity(ADMIN, names[1])
        assert certificate.generation == 1 and certificate.restored_at and certificate.steps
        assert {"random", "clock", "boot_id"} <= {hazard.name for hazard in certificate.hazards if hazard.handled}, certificate
        assert all(hazard.handled or hazard.beyond for hazard in certificate.hazards)
        # What they write is theirs.
        for name in names:
            await said(engine, name, f"echo {name} > /root/own; echo {name} > /dev/shm/own; sync")
        for name in names:
            assert await said(engine, name, "cat /root/own /dev/shm/own") == f"{name}\n{name}\n"
        await cat.write(b"on\n")
        assert (await cat.read()).data == b"on\n"  # type: ignore[union-attr]
        await cat.aclose()
        # The original goes first, then a copy in the middle: the others have their layers.
        await engine.destroy(ADMIN, "box")
        await engine.destroy(ADMIN, "copy-2")
        assert await said(engine, "copy-3", "cat /root/kept; cat /root/log | wc -l") != ""
        # A copy can be all that its original could be.
        await engine.pause(ADMIN, "copy-1")
        assert await said(engine, "copy-1", "cat /root/own") == f"{names[1]}\n"
        await engine.stop(ADMIN, "copy-3", 5)
        operation = await engine.start(ADMIN, "copy-3")
        await engine.wait_operation(ADMIN, operation.id, 300)
        assert await said(engine, "copy-3", "cat /root/own; hostname") == f"{names[3]}\ncopy-3\n"


async def test_generations(settings: Settings, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks of forks, and many forks of one: patterns stay whole, and layers are joined while the guest writes."""
    monkeypatch.setattr(layers, "SOON", 3)
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        parent = await make(engine, name="g0")
        await engine.processes.start(ADMIN, "g0", StartProcess(argv=["sh", "-c", WRITER]))
        for number in range(1, 5):
            word = f"yes {number} | head -c 6M"
            wanted = await said(engine, parent.id, f"{word} > /root/p; {word} > /dev/shm/p; cat /root/p /dev/shm/p | md5sum")
            [child] = await forked(engine, parent.id, name=f"g{number}")
            for name in (parent.id, child.id):
                assert await said(engine, name, "cat /root/p /dev/shm/p | md5sum") == wanted
            if number > 1:
                await engine.destroy(ADMIN, parent.id)
            parent = child
        for _ in range(5):
            [child] = await forked(engine, "g1" if "g1" in {b.name for b in (await engine.list(ADMIN)).items} else parent.id)
            assert await said(engine, child.id, "cat /root/p | md5sum") == await said(engine, parent.id, "cat /root/p | md5sum")
            await engine.destroy(ADMIN, child.id)
        async with asyncio.timeout(120):
            while await layers.depth(engine._core, engine._core.boxes[parent.id]) > 3:
                await asyncio.sleep(0.1)
        assert await said(engine, parent.id, "cat /root/p /dev/shm/p | md5sum") == wanted
        await engine.stop(ADMIN, parent.id, 5)
        operation = await engine.start(ADMIN, parent.id)
        await engine.wait_operation(ADMIN, operation.id, 300)
        assert await said(engine, parent.id, "md5sum < /root/p") == await said(engine, parent.id, f"{word} | md5sum")


async def test_what_cannot_be_copied_is_refused(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        await engine.volumes.create(ADMIN, CreateVolume(name="data", size=16 * MIB))
        await make(engine, name="writes", volumes=[parse_mount("data:/d")])
        with pytest.raises(Conflict, match="writes to its volume"):
            await engine.fork(ADMIN, "writes", ForkSandbox())
        await engine.destroy(ADMIN, "writes")
        await make(engine, name="reads", volumes=[parse_mount("data:/d:ro")])
        [copy] = await forked(engine, "reads", name="too")
        assert await said(engine, copy.id, "grep -c ' /d .*ro' /proc/mounts") == "1\n"
        with pytest.raises(Conflict, match="there is a sandbox too"):
            await engine.fork(ADMIN, "reads", ForkSandbox(name="too"))
        engine._core.admission._settings = replace(own, max_sandboxes=3)
        with pytest.raises(CapacityExhausted):
            await engine.fork(ADMIN, "reads", ForkSandbox(count=2))
        assert len((await engine.list(ADMIN)).items) == 2
        for name in ("too", "reads"):
            await engine.destroy(ADMIN, name)
        await engine.volumes.remove(ADMIN, "data")


async def _crash(settings: Settings, point: str) -> None:
    data, run_dir = settings.data_dir, settings.run_dir
    async with daemon(data, run_dir, "real") as first:
        await first.has_box(COUNTER)
        await first.sure(do="arm", point=point)
        assert await first.ask(do="fork", name="box") is None
    async with Engine.open(settings, trace_kill="") as engine:
        states = await whole(engine, data, run_dir)
        assert states.pop("box") is S.RUNNING, point
        number = int((await output(engine, "box", b"line 1\n")).count(b"\n"))
        await output(engine, "box", b"line %d\n" % (number + 5))
        for name, state in states.items():
            assert state in (S.FAILED, S.RUNNING)
            if state is S.RUNNING:
                assert await said(engine, name, "echo here") == "here\n"
            await engine.destroy(ADMIN, name)
        [copy] = await forked(engine, "box")
        assert await said(engine, copy.id, "echo here") == "here\n"
        await engine.destroy(ADMIN, copy.id)
        await quiet(engine)
        await whole(engine, data, run_dir)


SHORT = ("fork.after_layer", "resume.after_thaw")
ALL = (*trace.FORK, "resume.after_launch", "resume.after_restore", "resume.after_hello", "create.after_running")


@pytest.mark.parametrize("points", [SHORT, pytest.param(ALL, marks=pytest.mark.full)], ids=["some", "all"])
async def test_crashes(settings: Settings, short_dir: Path, points: tuple[str, ...]) -> None:
    own = own_data(settings, short_dir)
    for point in points:
        await _crash(own, point)
    async with opened(own):
        pass
