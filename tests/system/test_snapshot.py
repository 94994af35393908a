"""Snapshots with real guests: whole or not there, and the same for everybody who starts from one, whatever became of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crashing import ADMIN, daemon, machines, quiet, whole
from engine_fixtures import own_data
from engine_guests import make, opened, run
from stoker.api.models import CopySandbox, CreateSnapshot, OperationState, Sandbox, SandboxState, Snapshot, StartProcess
from stoker.engine import trace
from stoker.engine.engine import Engine
from stoker.errors import Conflict, NotFound
from stoker.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]
S = SandboxState
MIB = 1 << 20


async def said(engine: Engine, name: str, script: str) -> str:
    code, data = await run(engine, name, script)
    assert code == 0, data
    return data.decode()


async def started(engine: Engine, snapshot: str, **words: object) -> Sandbox:
    operation = await engine.start_snapshot(ADMIN, snapshot, CopySandbox(**words))  # type: ignore[arg-type]
    ended = await engine.wait_operation(ADMIN, operation.id, 300)
    assert ended.state is OperationState.SUCCEEDED, ended.error
    return await engine.get(ADMIN, ended.sandbox or "")


async def taken(engine: Engine, sandbox: str, **words: object) -> Snapshot:
    return await engine.snapshot(ADMIN, sandbox, CreateSnapshot(**words))  # type: ignore[arg-type]


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
async def test_any_number_start_from_it(settings: Settings, short_dir: Path, paused: bool) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        box = await make(engine, name="box")
        job = StartProcess(argv=["sh", "-c", "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.1; done"], tag="job")
        await engine.processes.start(ADMIN, "box", job)
        await said(engine, "box", "yes before | head -c 4M > /dev/shm/p; echo before > /root/kept")
        wanted = await said(engine, "box", "cat /dev/shm/p /root/kept | md5sum")
        if paused:
            await engine.pause(ADMIN, "box")
        first = await taken(engine, "box", name="one", tags=["good"])
        assert (first.state, first.name, first.tags, first.sandbox, first.parent) == ("ready", "one", ["good"], box.id, None)
        assert first.own and first.shared
        assert (await engine.get(ADMIN, "box")).state is (S.PAUSED if paused else S.RUNNING)
        if not paused:
            assert first.steps["stopped"] > 0
        with pytest.raises(Conflict, match="there is a snapshot one"):
            await taken(engine, "box", name="one")
        await said(engine, "box", "echo after > /root/kept; rm /dev/shm/p; sync")
        second = await taken(engine, "box", memory=False)
        assert second.parent == first.id
        copies = [await started(engine, "one", name=name) for name in ("a", "b")]
        assert [copy.origin for copy in copies] == ["snapshot", "snapshot"]
        boots = set()
        for name in ("a", "b"):
            assert await said(engine, name, "cat /dev/shm/p /root/kept | md5sum") == wanted
            assert await said(engine, name, "hostname") == f"{name}\n"
            assert "sleep 0.1" in await said(engine, name, "ps ax 2>/dev/null || cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
            boots.add(await said(engine, name, "cat /proc/sys/kernel/random/boot_id"))
            await said(engine, name, f"echo {name} > /root/kept; sync")
        assert len(boots) == 2
        # Of the disk alone, and on request: it boots.
        for name, snapshot, content in (("c", second.id, "after\n"), ("d", "one", "before\n")):
            copy = await started(engine, snapshot, name=name, cold=name == "d")
            assert copy.origin == "boot"
            assert await said(engine, name, "cat /root/kept") == content
        # Whatever goes first, the rest is whole.
        await engine.destroy(ADMIN, "box")
        third = await taken(engine, "a")
        assert third.parent == first.id
        await engine.snapshots.remove(ADMIN, "one")
        assert (await engine.snapshots.get(ADMIN, third.id)).parent is None
        with pytest.raises(NotFound):
            await engine.snapshots.get(ADMIN, "one")
        assert await said(engine, "a", "cat /root/kept") == "a\n"
        await engine.destroy(ADMIN, "a")
        assert await said(engine, (await started(engine, third.id)).id, "cat /root/kept; head -c 7 /dev/shm/p") == "a\nbefore\n"
        await engine.pause(ADMIN, "b")
        assert await said(engine, "b", "cat /root/kept") == "b\n"
        assert {one.id for one in await engine.snapshots.prune(ADMIN)} == {second.id, third.id}
        assert list(await engine.snapshots.list(ADMIN)) == []


async def test_after_a_restart_and_when_it_does_not_fit(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with Engine.open(own, trace_kill="") as engine:
        await make(engine, name="box")
        await said(engine, "box", "echo x > /root/kept; head -c 30M /dev/urandom > /dev/shm/big; md5sum /dev/shm/big > /root/sum")
        snapshot = await taken(engine, "box", name="one", compact=True)
        await engine.destroy(ADMIN, "box")
    async with opened(own) as engine:
        assert (await engine.snapshots.get(ADMIN, "one")).id == snapshot.id
        copy = await started(engine, "one")
        await said(engine, copy.id, "md5sum -c /root/sum")
        # What is shared is not written by anybody: its file has another name now.
        place = own.data_dir / "snapshots" / snapshot.id
        assert (place / "memory").stat().st_nlink == 2
        manifest = json.loads((place / "manifest.json").read_text())
        (place / "manifest.json").write_text(json.dumps({**manifest, "made_by": {**manifest["made_by"], "vmm": "99.0.0"}}))
        operation = await engine.start_snapshot(ADMIN, "one", CopySandbox(name="bad"))
        ended = await engine.wait_operation(ADMIN, operation.id, 100)
        assert ended.error is not None and ended.error.code == "saved_unusable" and "--cold" in ended.error.hint
        assert await said(engine, (await started(engine, "one", name="cold", cold=True)).id, "cat /root/kept") == "x\n"
        (place / "manifest.json").write_text(json.dumps(manifest))
        with open(place / "memory", "r+b") as file:
            file.seek(40 * MIB)
            file.write(b"damage")
        operation = await engine.start_snapshot(ADMIN, "one", CopySandbox(name="damaged"))
        ended = await engine.wait_operation(ADMIN, operation.id, 100)
        assert ended.error is None or ended.error.code == "saved_damaged"
        await engine.snapshots.remove(ADMIN, "one")
        assert not place.exists()


async def _crash(settings: Settings, point: str) -> None:
    data, run_dir = settings.data_dir, settings.run_dir
    async with daemon(data, run_dir, "real") as first:
        await first.has_box()
        removing = point in ("snapshot.after_unmark", "snapshot.after_gone")
        if removing:
            await first.sure(do="snapshot", name="box")
        await first.sure(do="arm", point=point)
        assert await first.ask(do="remove_snapshots" if removing else "snapshot", name="box") is None
    async with Engine.open(settings, trace_kill="") as engine:
        assert await whole(engine, data, run_dir) == {"box": S.RUNNING}
        found = list(await engine.snapshots.list(ADMIN))
        assert len(found) == (point == "snapshot.after_ready"), point
        assert await said(engine, "box", "echo on") == "on\n"
        for one in found:
            assert await said(engine, (copy := await started(engine, one.id)).id, "echo here") == "here\n"
            await engine.destroy(ADMIN, copy.id)
        await engine.snapshots.prune(ADMIN)
        await quiet(engine)
        await whole(engine, data, run_dir)


SHORT = ("snapshot.after_taken", "snapshot.after_ready", "snapshot.after_unmark")


@pytest.mark.parametrize("points", [SHORT, pytest.param(trace.SNAPSHOT, marks=pytest.mark.full)], ids=["some", "all"])
async def test_crashes(settings: Settings, short_dir: Path, points: tuple[str, ...]) -> None:
    own = own_data(settings, short_dir)
    for point in points:
        await _crash(own, point)
    async with opened(own):
        pass
    assert machines(own.run_dir) == set()
