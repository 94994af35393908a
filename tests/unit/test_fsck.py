"""The check of the books against the host: each difference by its exact name, mended once and for all, and nothing else touched."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from crashing import daemon, machines, whole
from engine_host import Faults, HostBooter
from stoker.api.models import CreateSandbox
from stoker.engine.engine import Engine
from stoker.engine.fsck.check import check_offline
from stoker.engine.ledger import Kind
from stoker.engine.pools import Pools
from stoker.errors import Conflict
from stoker.host.process import ProcessIdentity
from stoker.images.store import Store
from stoker.settings import Settings
from upkeep_host import ADMIN, STRANGER, S, entry, make, mends, opened, shim, told

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


@pytest.fixture
def settings(short_dir: Path) -> Settings:
    return Settings(short_dir / "data", short_dir / "run", short_dir / "none.toml")


async def test_a_host_in_order(settings: Settings) -> None:
    async with opened(settings) as engine:
        await make(engine, "runs")
        await make(engine, "rests", stopped=True)
        await entry(settings, "images", "one", "name")
        report = await engine.upkeep.fsck(repair=True)
        assert report.clean and report.differences == [] and report.busy == []
        assert report.checked["sandbox"] == 2 and report.checked["ledger"] == 6 and report.checked["clone"] == 2
        assert report.checked["image"] == report.checked["image-name"] == report.checked["database"] == 1
        await engine.freeze(ADMIN, "runs")
        assert (await engine.upkeep.fsck(repair=False)).clean


async def test_things_of_nobody(settings: Settings) -> None:
    async with opened(settings) as engine:
        await make(engine, "bystander")
        directory, clone = settings.run_dir / "sandboxes" / STRANGER, settings.data_dir / "pool" / "clones" / STRANGER
        with shim(directory) as process:
            while not (directory / "shim.json").exists():
                await asyncio.sleep(0.01)
            clone.mkdir()
            (clone / "disk.0").write_bytes(b"disk")
            await mends(engine, ("process", str(process.pid)), ("directory", str(directory)), ("clone", str(clone)))
            assert process.wait(5) in (0, -9)
        assert not directory.exists() and not clone.exists()
        assert (await engine.get(ADMIN, "bystander")).state is S.RUNNING


async def test_what_belongs_to_another_data_directory(settings: Settings, short_dir: Path) -> None:
    """Same names, another run directory: not ours, not named, not touched."""
    theirs = short_dir / "other" / "sandboxes" / STRANGER
    below = settings.run_dir / "sandboxes" / STRANGER / "inside"
    async with opened(settings) as engine:
        with shim(theirs) as process, shim(below) as other:
            report = await engine.upkeep.fsck(repair=True)
            assert told(report) == [("directory", str(below.parent))]
            assert process.poll() is None and other.poll() is None
        assert theirs.is_dir()


async def test_names_that_are_not_ours_are_told_and_left(settings: Settings) -> None:
    async with opened(settings) as engine:
        notes, other = settings.data_dir / "pool" / "clones" / "notes.txt", settings.run_dir / "sandboxes" / "mine"
        notes.write_text("mine")
        other.mkdir()
        for repair in (False, True):
            report = await engine.upkeep.fsck(repair=repair)
            assert sorted(told(report)) == sorted([("clone", str(notes)), ("directory", str(other))]) and not report.clean
        assert notes.read_text() == "mine" and other.is_dir()
        notes.unlink()
        other.rmdir()


async def test_entries_of_the_ledger_whose_sandbox_is_gone(settings: Settings) -> None:
    async with opened(settings) as engine:
        clone = settings.data_dir / "pool" / "clones" / STRANGER
        clone.mkdir()
        await engine._core.ledger.intend(STRANGER, Kind.CLONE, str(clone))
        await engine._core.ledger.intend(STRANGER, Kind.DIRECTORY, str(settings.run_dir / "sandboxes" / STRANGER))
        await mends(
            engine,
            ("clone", str(clone)),
            ("clone", str(clone)),
            ("directory", str(settings.run_dir / "sandboxes" / STRANGER)),
        )
        assert await engine._core.ledger.all() == []


async def test_a_running_one_that_is_not_in_the_ledger(settings: Settings) -> None:
    async with opened(settings) as engine:
        sandbox = await make(engine, "box")
        core = engine._core
        owned = await core.ledger.of(sandbox)
        await core.database.write(lambda db: db.execute("DELETE FROM owned").rowcount)
        await mends(engine, *[(entry.kind.value, entry.name) for entry in owned])
        assert {(one.kind, one.name) for one in await core.ledger.of(sandbox)} == {(one.kind, one.name) for one in owned}
        await core.ledger.live(sandbox, Kind.PROCESS, str(core.places(sandbox).directory), {"pid": 1, "start": 1})
        await mends(engine, ("process", str(core.places(sandbox).directory)))
        assert (await core.ledger.of(sandbox))[0].detail == owned[0].detail


async def test_a_second_shim_beside_a_machine(settings: Settings) -> None:
    async with opened(settings) as engine:
        sandbox = await make(engine, "box")
        directory = settings.run_dir / "sandboxes" / sandbox
        record = (directory / "shim.json").read_bytes()
        with shim(directory) as process:
            while (directory / "shim.json").read_bytes() == record:
                await asyncio.sleep(0.01)
            (directory / "shim.json").write_bytes(record)
            await mends(engine, ("process", str(process.pid)))
            assert process.wait(5) in (0, -9)
        (directory / "shim.json").write_bytes(record)
        assert (await engine.get(ADMIN, "box")).state is S.RUNNING
        assert ProcessIdentity.of(engine._core.boxes[sandbox].live.machine.vmm.pid).alive()  # type: ignore[union-attr]


async def test_leftovers_of_a_machine_that_stopped(settings: Settings) -> None:
    async with opened(settings) as engine:
        sandbox = await make(engine, "box", stopped=True)
        core = engine._core
        directory = core.places(sandbox).directory
        await core.ledger.intend(sandbox, Kind.PROCESS, str(directory))
        with shim(directory) as process:
            while not (directory / "shim.json").exists():
                await asyncio.sleep(0.01)
            mended = await mends(engine, *[("process", str(directory))] * 2, ("directory", str(directory)))
            assert {one.repair for one in mended} == {"end it", "release it", "remove the rest"}
            assert process.wait(5) in (0, -9)
        assert os.listdir(directory) == ["console.log"]
        await engine.start(ADMIN, "box")
        await engine.wait(ADMIN, "box", frozenset({S.RUNNING}), 20)


async def test_a_disk_that_is_gone_is_told(settings: Settings) -> None:
    async with opened(settings) as engine:
        sandbox = await make(engine, "box", stopped=True)
        clone = engine._core.places(sandbox).clone
        shutil.rmtree(clone)
        report = await engine.upkeep.fsck(repair=True)
        assert told(report) == [("clone", str(clone))] and not report.clean and report.differences[0].repair == ""
        assert report.differences[0].sandbox == sandbox


async def test_reservations(settings: Settings) -> None:
    async with opened(settings) as engine:
        runs, rests = await make(engine, "runs"), await make(engine, "rests", stopped=True)
        admission = engine._core.admission
        right = admission.totals()
        admission.hold(STRANGER, owner="local", memory=1 << 30, cpus=1, disk=0)
        admission.release(runs)
        admission.hold(rests, owner="local", memory=1 << 30, cpus=1, disk=1 << 20)
        await mends(engine, ("admission", STRANGER), ("admission", runs), ("admission", rests))
        assert admission.totals() == right


async def test_rows(settings: Settings) -> None:
    async with opened(settings) as engine:
        sandbox = await make(engine, "box")

        def spoil(db: sqlite3.Connection) -> None:
            db.execute("UPDATE sandboxes SET state = 'stopped'")
            db.execute("INSERT INTO events VALUES (?, 999999, '{}')", (STRANGER,))
            db.execute("INSERT INTO processes VALUES (?, 1, '{}')", (STRANGER,))

        await engine._core.database.write(spoil)
        await mends(engine, ("row", sandbox), ("row", f"events of {STRANGER}"), ("row", f"processes of {STRANGER}"))


async def test_the_store(settings: Settings) -> None:
    async with opened(settings) as engine:
        store = Store(settings)
        good, bad = await entry(settings, "images", "good", "good"), await entry(settings, "images", "bad", "bad")
        used = await entry(settings, "images", "used", "used")
        (settings.data_dir / "staging" / "dead").mkdir()
        store.point("kernels", "nowhere", "0" * 64)
        sandbox = await make(engine, "box")
        await engine._core.save(engine._core.boxes[sandbox], image_digest=used)
        for digest in (bad, used):
            with open(store.entry("images", digest) / "rootfs.ext4", "r+b") as file:
                file.write(b"X")
        (store.entry("images", good) / "SEAL").unlink()
        fixable = [
            ("staging", str(settings.data_dir / "staging/dead")),
            ("kernel-name", str(settings.data_dir / "kernels/names/nowhere")),
            ("image", str(store.entry("images", bad))),
        ]
        report = await engine.upkeep.fsck(repair=False)
        assert sorted(told(report)) == sorted([*fixable, ("image", str(store.entry("images", used)))])
        report = await engine.upkeep.fsck(repair=True)
        assert {one.name for one in report.differences if one.repaired} == {name for _, name in fixable}
        [left] = (await engine.upkeep.fsck(repair=True)).differences
        assert left.name == str(store.entry("images", used)) and "rootfs.ext4 has changed" in left.found and "box" in left.found
        assert set(store.names("images")) == {"good", "used"} and store.names("kernels") == {}
        await engine.destroy(ADMIN, "box")
        assert (await engine.upkeep.fsck(repair=True)).clean


async def test_staging_with_an_owner_is_left(settings: Settings) -> None:
    async with opened(settings) as engine, Store(settings).stage() as stage:
        report = await engine.upkeep.fsck(repair=True)
        assert report.clean and report.checked["staging"] == 1 and stage.path.is_dir()


async def test_machines_of_single_commands(settings: Settings) -> None:
    async with opened(settings) as engine:
        me = ProcessIdentity.of(os.getpid())
        for name in (f"run-{me.pid}-{me.start}", f"run-{me.pid}-{me.start + 1}", "run-4194305-7"):
            (settings.run_dir / "runs" / name).mkdir(parents=True)
            (settings.data_dir / "runs").mkdir(exist_ok=True)
            (settings.data_dir / "runs" / f"{name}.qcow2").touch()
        gone = [f"run-{me.pid}-{me.start + 1}", "run-4194305-7"]
        await mends(
            engine,
            *[("directory", str(settings.run_dir / "runs" / name)) for name in gone],
            *[("clone", str(settings.data_dir / "runs" / f"{name}.qcow2")) for name in gone],
        )
        assert os.listdir(settings.run_dir / "runs") == [f"run-{me.pid}-{me.start}"]
        shutil.rmtree(settings.run_dir / "runs")
        (settings.data_dir / "runs" / f"run-{me.pid}-{me.start}.qcow2").unlink()


async def test_a_create_in_progress_is_nobodys_difference(settings: Settings) -> None:
    """At every step: held before its machine starts, after it, and many at once while the check runs over and over."""
    go = asyncio.Event()

    async def hold() -> None:
        await go.wait()

    for faults in (Faults(before=hold), Faults(after=hold)):
        go.clear()
        async with opened(settings, faults) as engine:
            operation = await engine.create(ADMIN, CreateSandbox(image="host", name="box"))
            await asyncio.sleep(0.3)
            report = await engine.upkeep.fsck(repair=True)
            assert report.clean and report.differences == [] and report.busy == ["box"]
            go.set()
            assert (await engine.wait(ADMIN, operation.sandbox or "", frozenset({S.RUNNING}), 20)).name == "box"
    async with opened(settings) as engine:

        async def life(number: int) -> None:
            for _ in range(3):
                await make(engine, f"box{number}", stopped=True)
                await engine.start(ADMIN, f"box{number}")
                await engine.wait(ADMIN, f"box{number}", frozenset({S.RUNNING}), 20)
                await engine.destroy(ADMIN, f"box{number}")

        lives = asyncio.gather(*(life(number) for number in range(4)))
        checks = 0
        while not lives.done() or checks < 3:
            report = await engine.upkeep.fsck(repair=True)
            assert report.differences == []
            checks += 1
        await lives


async def test_a_machine_that_died_while_the_daemon_was_away(settings: Settings) -> None:
    """Offline: the row says running, its process is gone. Mended, the row says what a daemon would have said."""
    async with Engine.open(settings, booter=HostBooter(), trace_kill="") as engine:
        sandbox = await make(engine, "dies")
        lives = await make(engine, "lives")
        directory = engine._core.places(sandbox).directory
        pid = engine._core.boxes[sandbox].live.machine.vmm.pid  # type: ignore[union-attr]
        with pytest.raises(Conflict) as refused:
            await check_offline(settings, repair=True)
        assert refused.value.code == "engine_running"
    os.kill(pid, 9)
    while ProcessIdentity(pid, 0).pid in [int(name) for name in os.listdir("/proc") if name.isdigit()] and machines(
        settings.run_dir
    ) != {lives}:
        await asyncio.sleep(0.01)
    report = await check_offline(settings, repair=False)
    assert told(report) == [("process", str(directory))] and not report.clean
    assert (await check_offline(settings, repair=True)).clean
    assert (await check_offline(settings, repair=True)).differences == []
    async with opened(settings) as engine:
        assert await whole(engine, settings.data_dir, settings.run_dir) == {"dies": S.FAILED, "lives": S.RUNNING}


@pytest.mark.parametrize(
    "point", ["create.after_intent", "boot.after_launch", "destroy.after_mark", "destroy.after_process", "stop.after_mark"]
)
async def test_a_daemon_that_was_killed_and_cannot_start(settings: Settings, point: str) -> None:
    """What the next start would have put right, the offline check puts right too: the same end."""
    data, run = settings.data_dir, settings.run_dir
    async with daemon(data, run, "host") as first:
        if not point.startswith(("create", "boot")):
            await first.sure(do="create", image="host", name="victim")
        await first.sure(do="arm", point=point)
        verb = point.partition(".")[0].replace("boot", "create")
        assert await first.ask(do=verb, name="victim", image="host") is None
    report = await check_offline(settings, repair=False)
    assert not report.clean and report.differences
    assert (await check_offline(settings, repair=True)).clean
    assert (await check_offline(settings, repair=False)).differences == []
    async with opened(settings) as engine:
        ends = {"stop.after_mark": {"victim": S.STOPPED}, "destroy.after_mark": {}, "destroy.after_process": {}}
        assert await whole(engine, data, run) == ends.get(point, {"victim": S.FAILED})


async def test_a_database_that_cannot_be_used(settings: Settings) -> None:
    async with opened(settings):
        pass
    settings.database.write_bytes(b"no database")
    for repair in (False, True):
        report = await check_offline(settings, repair=repair)
        assert told(report) == [("database", str(settings.database))] and not report.clean
    assert settings.database.read_bytes() == b"no database"


@pytest.mark.parametrize("point", [f"fsck.{when}_repair:{number}" for when in ("before", "after") for number in (1, 2, 4)])
async def test_killed_while_it_mends(settings: Settings, point: str) -> None:
    data, run = settings.data_dir, settings.run_dir
    names = ["sb-" + letter * 20 for letter in "qrst"]
    async with daemon(data, run, "host") as first:
        await first.sure(do="create", image="host", name="bystander")
        for name in names:
            (run / "sandboxes" / name).mkdir()
            stray_disk(data / "pool" / "clones" / name)
        await first.sure(do="arm", point=point)
        assert await first.ask(do="fsck", repair=True) is None
    async with opened(settings) as engine:
        left = await engine.upkeep.fsck(repair=True)
        assert left.clean and 0 < len(left.differences) < 9
        assert (await engine.upkeep.fsck(repair=False)).differences == []
        assert await whole(engine, data, run) == {"bystander": S.RUNNING}


def fails(pools: Pools, path: Path) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def stray_disk(path: Path) -> None:
    """A whole disk of the pool that belongs to no sandbox."""
    path.mkdir()
    (path / "disk.0").write_bytes(b"disk")
    (path / "record").symlink_to("qcow2:0:-:-:disk.0")


async def test_a_repair_that_fails_is_told_and_the_rest_goes_on(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(settings) as engine:
        clone, directory = settings.data_dir / "pool" / "clones" / STRANGER, settings.run_dir / "sandboxes" / STRANGER
        stray_disk(clone)
        directory.mkdir()
        monkeypatch.setattr(Pools, "remove", fails)
        report = await engine.upkeep.fsck(repair=True)
        [failed] = [one for one in report.differences if one.error]
        assert failed.name == str(clone) and not failed.repaired and not report.clean and not directory.exists()
        monkeypatch.undo()
        assert (await engine.upkeep.fsck(repair=True)).clean and not clone.exists()
