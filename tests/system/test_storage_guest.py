"""Disks under real guests: grown while they run, freed when files go, and a pool that runs full."""

from __future__ import annotations

import asyncio
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from crashing import ADMIN
from engine_fixtures import own_data
from engine_guests import make, opened, run
from stoker.api.models import Sandbox, SandboxState
from stoker.engine.engine import Engine
from stoker.engine.filling import Filling
from stoker.errors import CapacityExhausted, Conflict, InvalidRequest
from stoker.host.mounts import mounted_at, umount
from stoker.settings import Settings
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
                seed = "seq 1 20000000 | head -c 120000000"
                script = f"({seed}) > /root/big && sync && sha256sum < /root/big"
                work = asyncio.create_task(run(engine, "box", script))
                box = await wait_reason(engine, "pool_full", 120)
                assert box.state is S.FROZEN and not work.done()
                if watched:
                    found = os.statvfs(point)
                    assert found.f_bavail > 0, "it was paused before a write failed"
                    seen = []
                    async with asyncio.timeout(10):
                        async for event in events:
                            seen.append(event.kind)
                            if event.kind == "pool.full":
                                break
                    assert "pool.filling" in seen
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
                sums = hashlib.sha256("".join(f"{n}\n" for n in range(1, 16_000_000)).encode()[:120_000_000]).hexdigest()
                assert code == 0 and told.split()[0].decode() == sums
        assert mounted_at(point) is not None
    assert mounted_at(point) is None or umount(point) is None
