"""Volumes and the engine, with host processes in place of guests: claims, owners, quotas, sizes, what a crash leaves."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import subprocess
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from crashing import daemon
from engine_daemon import settings as settings_of
from engine_host import Faults, HostBooter
from stoker.api.models import CreateKey, CreateSandbox, CreateVolume, Principal, Quota, Sandbox, SandboxState, Volume, VolumeMount
from stoker.api.volumes import parse_mount
from stoker.engine.engine import Engine
from stoker.engine.trace import POINTS
from stoker.engine.volumes import check_paths
from stoker.errors import CapacityExhausted, Conflict, GuestError, InvalidRequest, NotFound, StokerError
from stoker.settings import Settings

pytestmark = pytest.mark.anyio
ADMIN = Principal()
S = SandboxState
MIB = 1 << 20
SETTLED = frozenset({S.RUNNING, S.FAILED, S.STOPPED})


@pytest.fixture
def settings(short_dir: Path) -> Settings:
    return Settings(short_dir / "data", short_dir / "run", short_dir / "none.toml")


@asynccontextmanager
async def opened(settings: Settings, faults: Faults | None = None) -> AsyncIterator[Engine]:
    async with Engine.open(settings, booter=HostBooter(faults), trace_kill="") as engine:
        yield engine


async def sandbox(engine: Engine, *mounts: str, name: str | None = None, who: Principal = ADMIN) -> Sandbox:
    request = CreateSandbox(image="host", name=name, volumes=[parse_mount(mount) for mount in mounts])
    operation = await engine.create(who, request)
    return await engine.wait(who, operation.sandbox or "", SETTLED, 20)


async def volume(engine: Engine, name: str, size: int = 16 * MIB, who: Principal = ADMIN) -> Volume:
    return await engine.volumes.create(who, CreateVolume(name=name, size=size))


async def users(engine: Engine, name: str) -> list[tuple[str, bool]]:
    return [(user.name, user.read_only) for user in (await engine.volumes.get(ADMIN, name)).users]


def files(settings: Settings) -> list[str]:
    return sorted(os.listdir(settings.data_dir / "volumes"))


async def clean(engine: Engine) -> None:
    for box in (await engine.list(ADMIN)).items:
        await engine.destroy(ADMIN, box.id)


async def test_a_volume_lives_and_goes(settings: Settings) -> None:
    async with opened(settings) as engine:
        made = await volume(engine, "data", 100 * MIB + 1)
        assert made.size == 101 * MIB and 0 < made.used < 8 * MIB and made.users == [] and made.owner == "local"
        path = settings.data_dir / "volumes" / f"{made.id}.ext4"
        assert path.stat().st_size == made.size and path.stat().st_mode & 0o777 == 0o600
        await asyncio.to_thread(subprocess.run, ["e2fsck", "-fn", path], stdin=subprocess.DEVNULL, capture_output=True, check=True)
        with pytest.raises(Conflict) as raised:
            await volume(engine, "data")
        assert raised.value.code == "volume_exists"
        assert [v.name for v in (await engine.volumes.list(ADMIN, limit=10, cursor=None)).items] == ["data"]
    async with opened(settings) as engine:
        assert await engine.volumes.get(ADMIN, made.id) == made
        await engine.volumes.remove(ADMIN, "data")
        assert files(settings) == [] and await engine._core.ledger.all() == []
        with pytest.raises(NotFound):
            await engine.volumes.get(ADMIN, "data")


async def test_one_writer_or_any_number_of_readers(settings: Settings) -> None:
    async with opened(settings) as engine:
        await volume(engine, "data")
        writer = await sandbox(engine, "data:/d", name="writer")
        assert writer.state is S.RUNNING and writer.volumes == [VolumeMount(name="data", path="/d")]
        for mount in ("data:/d", "data:/d:ro"):
            with pytest.raises(Conflict, match="writer") as raised:
                await sandbox(engine, mount, name="second")
            assert raised.value.code == "volume_in_use"
            assert raised.value.details["users"] == [{"id": writer.id, "name": "writer", "read_only": False}]
        assert [box.name for box in (await engine.list(ADMIN)).items] == ["writer"]
        # A stopped sandbox keeps its claim.
        await engine.stop(ADMIN, "writer", 0.5)
        with pytest.raises(Conflict):
            await sandbox(engine, "data:/d:ro")
        await engine.destroy(ADMIN, "writer")
        assert await users(engine, "data") == []
        for name in ("one", "two"):
            assert (await sandbox(engine, "data:/d:ro", name=name)).state is S.RUNNING
        assert await users(engine, "data") == [("one", True), ("two", True)]
        with pytest.raises(Conflict, match="one, two"):
            await sandbox(engine, "data:/d")
        for change in (engine.volumes.remove(ADMIN, "data"), engine.volumes.resize(ADMIN, "data", 32 * MIB)):
            with pytest.raises(Conflict, match=r"volume data cannot be re(moved|sized): it is in use by one, two") as raised:
                await change
            assert raised.value.code == "volume_in_use"
        await clean(engine)
        await engine.volumes.remove(ADMIN, "data")


async def test_who_comes_after_one_that_is_going_waits(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next user of a volume does not fail because the last one is still being destroyed."""
    async with opened(settings) as engine:
        await volume(engine, "data", 32 * MIB)
        for use in (
            lambda: sandbox(engine, "data:/d", name="second"),
            lambda: engine.volumes.resize(ADMIN, "data", 64 * MIB),
            lambda: engine.volumes.remove(ADMIN, "data"),
        ):
            first = await sandbox(engine, "data:/d", name="first")
            box = engine._core.boxes[first.id]
            async with box.lock:  # the destroy gets as far as to say that it has begun
                going = asyncio.create_task(engine.destroy(ADMIN, "first"))
                while not box.record.doomed:
                    await asyncio.sleep(0.01)
                coming = asyncio.create_task(use())  # type: ignore[arg-type]
                await asyncio.sleep(0.1)
                assert not coming.done()
            await going
            await coming
            await clean(engine)
        await volume(engine, "data")
        first = await sandbox(engine, "data:/d", name="first")
        monkeypatch.setattr("stoker.engine.volumes.LEAVING", 0.1)
        box = engine._core.boxes[first.id]
        async with box.lock:
            going = asyncio.create_task(engine.destroy(ADMIN, "first"))
            while not box.record.doomed:
                await asyncio.sleep(0.01)
            with pytest.raises(Conflict, match="in use by first"):
                await engine.volumes.remove(ADMIN, "data")
        await going


async def test_of_many_writers_at_once_one_wins(settings: Settings) -> None:
    async with opened(settings) as engine:
        await volume(engine, "data")
        results = await asyncio.gather(*(sandbox(engine, "data:/d", name=f"s{n}") for n in range(6)), return_exceptions=True)
        won = [box for box in results if isinstance(box, Sandbox)]
        lost = [error for error in results if isinstance(error, Conflict) and error.code == "volume_in_use"]
        assert (len(won), len(lost)) == (1, 5)
        assert await users(engine, "data") == [(won[0].name, False)]
        await clean(engine)


async def test_a_failed_create_gives_its_claims_back(settings: Settings) -> None:
    async def fails() -> None:
        raise GuestError("boot_failed", "no")

    async with opened(settings, Faults(before=fails)) as engine:
        await volume(engine, "data")
        assert (await sandbox(engine, "data:/d")).state is S.FAILED
        assert await users(engine, "data") == []
        await engine.volumes.remove(ADMIN, "data")


async def test_a_claim_survives_a_restart(settings: Settings) -> None:
    async with opened(settings) as engine:
        await volume(engine, "data")
        await sandbox(engine, "data:/d", name="box")
    async with opened(settings) as engine:
        assert await users(engine, "data") == [("box", False)]
        with pytest.raises(Conflict):
            await engine.volumes.remove(ADMIN, "data")
        await clean(engine)
        assert await users(engine, "data") == []


async def test_what_belongs_to_others_does_not_exist(settings: Settings) -> None:
    async with opened(settings) as engine:
        keys = [(await engine.create_key(CreateKey(name=name, quota=Quota(disk=64 * MIB)))).key.id for name in "ab"]
        one, two = (Principal(owner=key, admin=False) for key in keys)
        await volume(engine, "data", 40 * MIB, one)
        await volume(engine, "data", 16 * MIB, two)
        assert (await engine.volumes.get(one, "data")).size == 40 * MIB
        assert (await engine.volumes.get(two, "data")).size == 16 * MIB
        mine = await volume(engine, "mine")
        for reference in ("mine", mine.id):
            with pytest.raises(NotFound):
                await engine.volumes.get(one, reference)
            with pytest.raises(NotFound):
                await engine.volumes.remove(one, reference)
        with pytest.raises(NotFound):
            await sandbox(engine, "mine:/d", who=one)
        # Volumes count against the key's disk.
        with pytest.raises(CapacityExhausted):
            await volume(engine, "more", 32 * MIB, one)
        with pytest.raises(CapacityExhausted):
            await engine.volumes.resize(one, "data", 80 * MIB)
        assert (await engine.volumes.get(one, "data")).size == 40 * MIB
        assert (await engine.volumes.resize(one, "data", 60 * MIB)).size == 60 * MIB
        await engine.volumes.remove(one, "data")
        await volume(engine, "more", 32 * MIB, one)


async def test_sizes_only_grow(settings: Settings) -> None:
    async with opened(settings) as engine:
        made = await volume(engine, "data", 32 * MIB)
        with pytest.raises(InvalidRequest) as raised:
            await engine.volumes.resize(ADMIN, "data", 16 * MIB)
        assert raised.value.code == "volume_shrink"
        assert (await engine.volumes.resize(ADMIN, "data", 64 * MIB)).size == 64 * MIB
        assert (settings.data_dir / "volumes" / f"{made.id}.ext4").stat().st_size == 64 * MIB
    async with opened(settings) as engine:
        assert (await engine.volumes.get(ADMIN, "data")).size == 64 * MIB


async def test_a_resize_under_a_writer(settings: Settings) -> None:
    """A stopped writer boots into the larger one. One that is in between, or reads, is refused, and nothing has grown."""
    async with opened(settings) as engine:
        made = await volume(engine, "data", 32 * MIB)
        file = settings.data_dir / "volumes" / f"{made.id}.ext4"
        await sandbox(engine, "data:/d", name="writer")
        await engine.freeze(ADMIN, "writer")
        with pytest.raises(Conflict, match="writer is frozen; resize needs it running or stopped"):
            await engine.volumes.resize(ADMIN, "data", 64 * MIB)
        await engine.thaw(ADMIN, "writer")
        await engine.stop(ADMIN, "writer", 0.5)
        with pytest.raises(InvalidRequest) as raised:
            await engine.volumes.resize(ADMIN, "data", 16 * MIB)
        assert raised.value.code == "volume_shrink" and file.stat().st_size == 32 * MIB
        grown = await engine.volumes.resize(ADMIN, "data", 64 * MIB)
        assert grown.size == file.stat().st_size == 64 * MIB
        assert [user.name for user in grown.users] == ["writer"]
        # The agent of a host process has no such disk: told, and the volume has its size all the same.
        await engine.start(ADMIN, "writer")
        await engine.wait(ADMIN, "writer", SETTLED, 20)
        with pytest.raises(StokerError, match=f"file system of {made.id} at /d"):
            await engine.volumes.resize(ADMIN, "data", 80 * MIB)
        assert (await engine.volumes.get(ADMIN, "data")).size == file.stat().st_size == 80 * MIB
        await engine.destroy(ADMIN, "writer")
        await sandbox(engine, "data:/d:ro", name="reader")
        with pytest.raises(Conflict, match="cannot be resized: it is in use by reader"):
            await engine.volumes.resize(ADMIN, "data", 96 * MIB)
        assert file.stat().st_size == 80 * MIB
        assert engine._core.admission.totals().disk == 80 * MIB + (await engine.get(ADMIN, "reader")).resources.disk
        await clean(engine)


async def test_a_daemon_that_dies_at_a_resize(short_dir: Path) -> None:
    """The file has grown, its row has not: the next one takes it for what it is."""
    data, run = short_dir / "data", short_dir / "run"
    async with daemon(data, run, "host") as first:
        await first.sure(do="volume", name="victim")
        await first.sure(do="arm", point="volume.after_grown")
        assert await first.ask(do="resize_volume", name="victim", size=64 * MIB) is None, "the point was never reached"
    async with Engine.open(settings_of(data, run), booter=HostBooter(), trace_kill="") as engine:
        assert (await engine.volumes.get(ADMIN, "victim")).size == 64 * MIB
        assert engine._core.admission.totals().disk == 64 * MIB
        assert (await engine.volumes.resize(ADMIN, "victim", 96 * MIB)).size == 96 * MIB
    async with Engine.open(settings_of(data, run), booter=HostBooter(), trace_kill="") as engine:
        assert (await engine.volumes.get(ADMIN, "victim")).size == 96 * MIB


async def test_a_dirty_volume_is_not_for_readers(settings: Settings) -> None:
    async with opened(settings) as engine:
        made = await volume(engine, "data")
        path = settings.data_dir / "volumes" / f"{made.id}.ext4"
        with open(path, "r+b") as file:
            file.seek(1024 + 96)
            flags = file.read(1)[0]
            file.seek(1024 + 96)
            file.write(bytes([flags | 4]))
        box = await sandbox(engine, "data:/d:ro")
        assert box.error is not None and box.error.code == "volume_dirty"
        assert (await sandbox(engine, "data:/d", name="writer")).state is S.RUNNING
        await clean(engine)


async def test_a_failed_import_leaves_nothing(settings: Settings) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        yield b""

    async with opened(settings) as engine:
        with pytest.raises(GuestError):  # there are no guests here
            await engine.volumes.import_tar(ADMIN, "data", 16 * MIB, nothing())
        assert files(settings) == [] and await engine._core.ledger.all() == []
        assert list((settings.run_dir / "helpers").iterdir()) == []
        assert engine._core.admission.holders() == []
        await volume(engine, "data")


async def test_the_check_knows_volumes(settings: Settings) -> None:
    """``fsck --repair`` takes a volume for what it is, not for a leftover."""
    async with opened(settings) as engine:
        await volume(engine, "data")
        report = await engine.upkeep.fsck(repair=True)
        assert report.clean and report.differences == []
        assert len(files(settings)) == 1 and (await engine.volumes.get(ADMIN, "data")).used


@pytest.mark.parametrize(
    "paths",
    [["/"], ["//"], ["/a/../b"], ["/a/./b"], ["/proc"], ["/sys/x"], ["/dev/vdb"], ["/a", "/a/"], ["/a//b"]],
    ids=str,
)
def test_impossible_places(paths: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        check_paths([VolumeMount(name=f"v{n}", path=path) for n, path in enumerate(paths)], False)


def test_app_is_taken_and_a_volume_is_mounted_once() -> None:
    check_paths([VolumeMount(name="v", path="/app")], False)
    with pytest.raises(InvalidRequest):
        check_paths([VolumeMount(name="v", path="/app")], True)
    with pytest.raises(InvalidRequest):
        check_paths([VolumeMount(name="v", path="/a"), VolumeMount(name="v", path="/b")], False)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("data:/d", ("data", "/d", False)),
        ("data:/d:ro", ("data", "/d", True)),
        ("data:/d:rw", ("data", "/d", False)),
        ("data:/with:colon", ("data", "/with:colon", False)),
        ("a.b-c:/x y:ro", ("a.b-c", "/x y", True)),
    ],
)
def test_mounts_as_people_write_them(text: str, found: tuple[str, str, bool]) -> None:
    mount = parse_mount(text)
    assert (mount.name, mount.path, mount.read_only) == found


@pytest.mark.parametrize("text", ["data", "data:", "data:relative", ":/d", "da ta:/d", "data:/", "../x:/d", "data:/a\0b"])
def test_mounts_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_mount(text)


@pytest.mark.parametrize("point", ["volume.after_intent", "volume.after_row", "volume.after_row_gone"])
async def test_a_daemon_that_dies_at_a_volume(short_dir: Path, point: str) -> None:
    data, run = short_dir / "data", short_dir / "run"
    async with daemon(data, run, "host") as first:
        await first.sure(do="volume", name="bystander")
        gone = point == "volume.after_row_gone"
        if gone:
            await first.sure(do="volume", name="victim")
        await first.sure(do="arm", point=point)
        assert await first.ask(do="remove_volume" if gone else "volume", name="victim") is None, "the point was never reached"
    wanted = ["bystander", "victim"] if point == "volume.after_row" else ["bystander"]
    settings = settings_of(data, run)
    async with Engine.open(settings, booter=HostBooter(), trace_kill="") as engine:
        there = (await engine.volumes.list(ADMIN, limit=10, cursor=None)).items
        assert sorted(v.name for v in there) == wanted
        assert files(settings) == sorted(f"{v.id}.ext4" for v in there)
        assert {entry.owner for entry in await engine._core.ledger.all()} == {v.id for v in there}


@pytest.mark.parametrize("point", [p for p in POINTS if p.startswith(("create", "boot", "destroy"))])
async def test_claims_of_a_sandbox_whose_daemon_dies(short_dir: Path, point: str) -> None:
    """Between claim and boot, and on the way out: a claim is there exactly as long as something uses the volume."""
    data, run = short_dir / "data", short_dir / "run"
    async with daemon(data, run, "host") as first:
        await first.sure(do="volume", name="data")
        if point.startswith("destroy"):
            await first.sure(do="create", image="host", name="victim", volumes=["data:/d"])
        await first.sure(do="arm", point=point)
        verb = "destroy" if point.startswith("destroy") else "create"
        assert await first.ask(do=verb, image="host", name="victim", volumes=["data:/d"]) is None
    async with Engine.open(settings_of(data, run), booter=HostBooter(), trace_kill="") as engine:
        living = [box.name for box in (await engine.list(ADMIN)).items if box.state is S.RUNNING]
        assert [name for name, _ in await users(engine, "data")] == living
        await clean(engine)
        await engine.volumes.remove(ADMIN, "data")


def app_of(content: bytes) -> tuple[str, bytes]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("f")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return hashlib.sha256(out.getvalue()).hexdigest(), out.getvalue()


async def test_apps_count_like_other_disks(settings: Settings) -> None:
    """What is in an archive against each owner that has it; a sandbox's layer over it against the sandbox's disk."""
    (first, small), (second, large) = app_of(b"x" * (3 * MIB)), app_of(b"y" * (40 * MIB))
    async with opened(settings) as engine:
        admission = engine._core.admission
        key = (await engine.create_key(CreateKey(name="a", quota=Quota(disk=2048 * MIB)))).key.id
        who = Principal(owner=key, admin=False)
        for _ in range(2):
            await engine.apps.put(who, first, pieces(small))
            assert admission.totals(key).disk == 3 * MIB
        await engine.apps.put(ADMIN, first, pieces(small))
        assert (admission.totals("local").disk, admission.totals().disk) == (3 * MIB, 6 * MIB)
        layer = (settings.data_dir / "apps" / first / "app.ext4").stat().st_size
        request = CreateSandbox(image="host", app=first, name="box")
        box = (await engine.wait(who, (await engine.create(who, request)).sandbox or "", SETTLED, 20)).resources
        assert admission.totals(key).disk == 3 * MIB + layer + box.disk and layer > 1024 * MIB
        with pytest.raises(CapacityExhausted):  # another GiB of layer does not fit
            await engine.create(who, CreateSandbox(image="host", app=first, name="more"))
        await engine.stop(who, "box", 0.5)
        assert admission.totals(key).disk == 3 * MIB + layer + box.disk
        await volume(engine, "fills", 2048 * MIB - admission.totals(key).disk - 8 * MIB, who)
        with pytest.raises(CapacityExhausted):
            await engine.apps.put(who, second, pieces(large))
        assert not (settings.data_dir / "apps" / second).exists(), "what nobody may have is not kept"
    async with opened(settings) as engine:
        admission = engine._core.admission
        assert (admission.totals("local").disk, admission.totals(key).disk) == (3 * MIB, 2048 * MIB - 8 * MIB)
        report = await engine.upkeep.fsck(repair=True)
        assert [one.kind for one in report.differences if one.kind == "admission"] == []
        await clean(engine)
        await engine.volumes.remove(who, "fills")
        os.utime(settings.data_dir / "apps" / first / "facts.json", (1, 1))
        assert [item.name for item in (await engine.upkeep.gc(dry_run=False)).items if item.kind == "app"] == [first]
        assert admission.totals().disk == 0 and admission.holders() == []


async def test_unused_apps_are_garbage(settings: Settings) -> None:
    """One that a sandbox has, or that was asked for lately, is not."""
    async with opened(settings) as engine:
        digests = []
        for content in (b"a", b"b", b"c"):
            digest, data = app_of(content)
            digests.append(digest)
            await engine.apps.put(ADMIN, digests[-1], pieces(data))
        operation = await engine.create(ADMIN, CreateSandbox(image="host", name="box", app=digests[0]))
        assert (await engine.wait(ADMIN, operation.sandbox or "", SETTLED, 20)).app == digests[0]
        for digest in digests[:2]:
            os.utime(settings.data_dir / "apps" / digest / "facts.json", (1, 1))
        report = await engine.upkeep.gc(dry_run=False)
        assert [(item.kind, item.name, item.error) for item in report.items] == [("app", digests[1], "")]
        assert (await engine.apps.get(ADMIN, digests[0])).entries == 1
        with pytest.raises(NotFound):
            await engine.apps.get(ADMIN, digests[1])
        # Another owner does not know it, before it has uploaded it.
        other = Principal(owner="key-x", admin=False)
        with pytest.raises(NotFound):
            await engine.apps.get(other, digests[2])
        with pytest.raises(NotFound):
            await engine.create(other, CreateSandbox(image="host", app=digests[2]))
        await clean(engine)


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data
