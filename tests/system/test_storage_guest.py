"""Disks under real guests: grown while they run, freed when files go, and a pool that runs full."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import io
import os
import struct
import subprocess
import tarfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from crashing import ADMIN
from engine_fixtures import own_data
from engine_guests import make, opened, run
from stoker.api.models import CreateVolume, Event, Sandbox, SandboxState, VolumeMount
from stoker.engine.engine import Engine
from stoker.engine.filling import Filling
from stoker.errors import CapacityExhausted, Conflict, InvalidRequest, StokerError
from stoker.host.mounts import mounted_at, umount
from stoker.settings import Settings
from stoker.storage import filesystem
from stoker.storage.pool import Space
from storage_places import file_system

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]
S = SandboxState
MIB = 1 << 20
GIB = 1 << 30


def held(settings: Settings, box: Sandbox) -> int:
    """Bytes that its disk takes on the host."""
    return sum(path.stat().st_blocks * 512 for path in (settings.data_dir / "pool" / "clones" / box.id).glob("disk.*"))


@pytest.mark.parametrize("strategy", ["qcow2", "copy"])
async def test_a_disk_grows_under_its_guest_and_gives_back_what_is_deleted(
    settings: Settings, short_dir: Path, strategy: str
) -> None:
    settings = replace(own_data(settings, short_dir), pool_strategy=strategy)
    async with opened(settings) as engine:
        box = await make(engine, name="box")
        before = box.resources.disk
        code, text = await run(engine, "box", "df -B1 --output=size / | tail -1")
        assert code == 0
        with pytest.raises(InvalidRequest, match="smaller"):
            await engine.resize(ADMIN, "box", before - MIB)
        grown = await engine.resize(ADMIN, "box", before + 2 * GIB)
        assert grown.resources.disk == before + 2 * GIB
        code, now = await run(engine, "box", "df -B1 --output=size / | tail -1; cat /sys/block/vda/size")
        size, sectors = map(int, now.split())
        assert size > int(text) + 1900 * MIB and sectors * 512 == before + 2 * GIB
        empty = held(settings, box)
        write = "head -c 150000000 /dev/urandom > /root/big && sync && sha256sum < /root/big"
        code, _ = await run(engine, "box", write)
        full = held(settings, box)
        assert code == 0 and full - empty > 140 * MIB
        assert (await run(engine, "box", "rm /root/big && sync"))[0] == 0
        async with asyncio.timeout(60):
            while held(settings, box) > empty + 32 * MIB:
                await asyncio.sleep(0.5)
        await engine.stop(ADMIN, "box", 2.0)
        assert (await engine.resize(ADMIN, "box", before + 3 * GIB)).resources.disk == before + 3 * GIB
        operation = await engine.start(ADMIN, "box")
        await engine.wait_operation(ADMIN, operation.id, 200)
        code, now = await run(engine, "box", "df -B1 --output=size / | tail -1")
        assert code == 0 and int(now) > int(text) + 2900 * MIB


async def wait_reason(engine: Engine, reason: str, timeout: float) -> Sandbox:
    async with asyncio.timeout(timeout):
        while (box := await engine.get(ADMIN, "box")).reason != reason:
            await asyncio.sleep(0.05)
    return box


async def until_told(events: AsyncIterator[Event], last: str) -> list[Event]:
    """What is told up to that event."""
    seen: list[Event] = []
    async with asyncio.timeout(60):
        async for event in events:
            seen.append(event)
            if event.kind == last:
                break
    return seen


NUMBERS = "".join(f"{n}\n" for n in range(1, 16_000_000)).encode()[:120_000_000]
WRITE = "(seq 1 20000000 | head -c 120000000) > /d/big && sync && sha256sum < /d/big"


async def test_a_guest_that_fills_the_place_of_its_volume_waits_and_goes_on(settings: Settings, short_dir: Path) -> None:
    """A small XFS with the volumes, the disks elsewhere: who writes to a volume is paused before a write fails, others go on."""
    settings = own_data(settings, short_dir)
    point = settings.data_dir / "volumes"
    with file_system(short_dir / "small.img", point, 0, "xfs"):
        filler = point / "filler"
        async with opened(settings) as engine:
            made = await engine.volumes.create(ADMIN, CreateVolume(name="data", size=400 * MIB))
            await make(engine, name="box", volumes=[VolumeMount(name="data", path="/d")])
            await make(engine, name="other")
            found = os.statvfs(point)
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - 80 * MIB)
            async with engine.events(ADMIN) as events:
                work = asyncio.create_task(run(engine, "box", WRITE))
                box = await wait_reason(engine, "pool_full", 120)
                assert box.state is S.FROZEN and not work.done()
                assert os.statvfs(point).f_bavail > 0, "it was paused before a write failed"
                told = {event.kind: event.data for event in await until_told(events, "pool.full")}
                assert told["pool.full"]["path"] == told["pool.filling"]["path"] == str(point)
                assert (await run(engine, "other", "echo goes on > /root/f && cat /root/f")) == (0, b"goes on\n")
                with pytest.raises(CapacityExhausted, match="volumes is full"):
                    await make(engine, name="third", volumes=[VolumeMount(name="data", path="/d", read_only=True)])
                with pytest.raises(Conflict, match="waits for space"):
                    await engine.thaw(ADMIN, "box")
                filler.unlink()
                await until_told(events, "pool.free")
            assert (await wait_reason(engine, "", 60)).state is S.RUNNING
            code, text = await work
            assert code == 0 and text.split()[0].decode() == hashlib.sha256(NUMBERS).hexdigest()
            again = await run(engine, "box", "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /d/big")
            assert again == (0, text), "as it is on the disk"
            await engine.destroy(ADMIN, "box")
            checked = await asyncio.to_thread(
                subprocess.run, ["e2fsck", "-fn", engine.volumes.path(made.id)], stdin=subprocess.DEVNULL, capture_output=True
            )
            assert checked.returncode == 0, checked.stdout


async def test_a_disk_of_the_hosts_that_fails(settings: Settings, short_dir: Path) -> None:
    """Every write to the volume's file system fails: the guest is stopped at it and nothing is told to it; others go on."""
    settings = own_data(settings, short_dir)
    point, image = settings.data_dir / "volumes", short_dir / "dies.img"
    with file_system(image, point, 0, "xfs"):
        async with opened(settings) as engine:
            await engine.volumes.create(ADMIN, CreateVolume(name="data", size=64 * MIB))
            await make(engine, name="box", volumes=[VolumeMount(name="data", path="/d")])
            await make(engine, name="other")
            assert (await run(engine, "box", "echo kept > /d/kept && sync"))[0] == 0
            with_shutdown(point)
            work = asyncio.create_task(run(engine, "box", "echo lost > /d/lost && sync && echo done"))
            box = await wait_reason(engine, "disk_error", 60)
            assert box.state is S.FROZEN and not work.done()
            # It may be tried again, which fails again.
            async with engine.events(ADMIN) as events:
                await engine.thaw(ADMIN, "box")
                seen = []
                async with asyncio.timeout(60):
                    async for event in events:
                        seen.append((event.data.get("state"), event.data.get("reason")))
                        if seen[-2:] == [("running", None), ("frozen", "disk_error")]:
                            break
            assert not work.done()
            assert (await run(engine, "other", "echo goes on > /root/f && sync && cat /root/f")) == (0, b"goes on\n")
            await engine.destroy(ADMIN, "box")
            with contextlib.suppress(StokerError):
                await work
        umount(point)
        filesystem.attach(image, point)
        async with opened(settings) as engine:
            await make(engine, name="box", volumes=[VolumeMount(name="data", path="/d")])
            assert (await run(engine, "box", "cat /d/kept")) == (0, b"kept\n")


def with_shutdown(point: Path) -> None:
    """From here on every write to this XFS fails, as when its disk is gone."""
    fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 1))  # XFS_IOC_GOINGDOWN, the log flushed
    finally:
        os.close(fd)


async def test_an_import_that_there_is_no_room_for(settings: Settings, short_dir: Path) -> None:
    """It does not wait for room: it fails, and nothing is left."""
    settings = own_data(settings, short_dir)
    point = settings.data_dir / "volumes"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("big")
        info.size = 120 * MIB
        archive.addfile(info, io.BytesIO(os.urandom(info.size)))

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(out.getvalue()), MIB):
            yield out.getvalue()[at : at + MIB]

    with file_system(short_dir / "small.img", point, 0, "xfs"):
        filler, found = point.parent / "volumes" / "filler", os.statvfs(point)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - 60 * MIB)
        async with opened(settings) as engine:
            with pytest.raises(CapacityExhausted) as caught:
                await engine.volumes.import_tar(ADMIN, "data", 400 * MIB, pieces())
            assert caught.value.code == "no_space" and str(point) in caught.value.message
            assert [path.name for path in point.iterdir()] == ["filler"]
            assert list((settings.run_dir / "helpers").iterdir()) == []


async def look_away(filling: Filling, name: str, space: Space) -> None:
    """In place of the watch's judgement."""


@pytest.mark.parametrize("watched", [True, False], ids=["paused", "stopped by its VMM"])
async def test_a_guest_in_a_full_pool_waits_and_goes_on(
    settings: Settings, short_dir: Path, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes more than there is: no write fails, nothing is lost, and when there is space again it goes on by itself."""
    settings = own_data(settings, short_dir)
    point = settings.data_dir / "pool"
    if not watched:
        # The net beneath: the watch looks the other way until QEMU has stopped the guest itself.
        monkeypatch.setattr(Filling, "_judge", look_away)
        monkeypatch.setattr("stoker.engine.filling.LOOK", 0.2)
    with file_system(short_dir / "small.img", point, 256 * MIB, "ext4"):
        filler = point / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 130 * MIB)
        async with opened(settings) as engine:
            await make(engine, name="box")
            async with engine.events(ADMIN) as events:
                work = asyncio.create_task(run(engine, "box", WRITE.replace("/d/", "/root/")))
                box = await wait_reason(engine, "pool_full", 120)
                assert box.state is S.FROZEN and not work.done()
                if watched:
                    found = os.statvfs(point)
                    assert found.f_bavail > 0, "it was paused before a write failed"
                    assert "pool.filling" in [event.kind for event in await until_told(events, "pool.full")]
                    with pytest.raises(CapacityExhausted):
                        await make(engine, name="another")
                    with pytest.raises(Conflict, match="waits for space"):
                        await engine.thaw(ADMIN, "box")
                    assert any("full" in problem for problem in (await engine.health()).problems)
                if not watched:
                    monkeypatch.undo()
                filler.unlink()
                box = await wait_reason(engine, "", 60)
                assert box.state is S.RUNNING
                code, told = await work
                assert code == 0 and told.split()[0].decode() == hashlib.sha256(NUMBERS).hexdigest()
        assert mounted_at(point) is not None
    assert mounted_at(point) is None or umount(point) is None
