"""Pools with a file system of their own, from the command line: made, used, mounted again, removed; and the one by itself."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import CommandLine
from crashing import ADMIN, daemon
from engine_daemon import put_app
from engine_daemon import settings as settings_of
from engine_fixtures import own_data
from engine_host import HostBooter
from stoker.api.models import CreatePool, CreateVolume
from stoker.engine.engine import Engine
from stoker.engine.trace import POOLS
from stoker.errors import CapacityExhausted, HostError, StokerError
from stoker.host import loop
from stoker.host.mounts import mount, mounted_at, umount
from stoker.settings import Settings
from stoker.storage import filesystem
from storage_places import file_system, fill

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")]
IMAGE = "debian:12"


@pytest.fixture
def own(settings: Settings, short_dir: Path) -> Iterator[Settings]:
    found = own_data(settings, short_dir)
    yield found
    for point in (found.data_dir / "pools").glob("*/"):
        if mounted_at(point) is not None:
            umount(point, lazily=True)


def command_line(own: Settings, pool: str) -> CommandLine:
    words = {"STOKER_DATA_DIR": str(own.data_dir), "STOKER_RUN_DIR": str(own.run_dir), "STOKER_CONFIG": str(own.config_file)}
    return CommandLine(own, {**words, "STOKER_ACCEL": own.accel, "STOKER_POOL": pool})


def test_a_pool_from_its_making_to_its_end(own: Settings) -> None:
    stoker = command_line(own, "main")
    small = stoker("pool", "create", "--size", "1M")
    assert small.code == 125, small.error
    made = stoker("pool", "create", "--size", "2G")
    assert (made.code, made.text) == (0, "main\n"), made.error
    assert stoker("pool", "create", "--size", "2G").code == 125
    point, image = own.data_dir / "pools/main", own.data_dir / "pools/main.xfs"
    assert mounted_at(point) is not None and image.stat().st_blocks * 512 < 200 << 20
    box = stoker("create", IMAGE, "--name", "box", "--memory", "256M")
    assert box.code == 0, box.error
    assert stoker("exec", "box", "--", "sh", "-c", "echo kept > /root/kept; sync").code == 0
    [clone] = (point / "clones").iterdir()
    [info] = json.loads(stoker("inspect", "box").out)
    assert info["pool"] == "main" and clone.name == info["id"]
    told = json.loads(stoker("pool", "inspect").out)
    assert told["disks"] == 1 and told["default"] and told["strategy"] == "qcow2" and isinstance(told["trials"]["reflink"], float)
    refused = stoker("pool", "rm", "main")
    assert refused.code == 125 and b"box" in refused.error.encode(), refused.error
    # Everything goes but the files, as when the host is started anew.
    assert stoker("stop", "box").code == 0
    assert stoker("daemon", "stop").code == 0
    assert mounted_at(point) is None and loop.find(image) == []
    assert stoker("start", "box").code == 0
    assert mounted_at(point) is not None
    assert stoker("exec", "box", "--", "cat", "/root/kept").text == "kept\n"
    assert stoker("rm", "box").code == 0
    assert stoker("pool", "rm", "main").code == 0
    assert mounted_at(point) is None and not image.exists() and not point.exists()
    assert [row["name"] for row in json.loads(stoker("pool", "ls", "--json").out)] == [""]
    assert stoker("daemon", "stop").code == 0


def test_a_daemon_makes_a_pool_by_itself(own: Settings) -> None:
    stoker = command_line(own, "auto")
    deadline = time.monotonic() + 60
    while [row["name"] for row in json.loads(stoker("pool", "ls", "--json").out)] != ["", "main"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    point = own.data_dir / "pools/main"
    assert mounted_at(point) is not None
    # Unmounted underneath: told, and nothing is written below.
    umount(point, lazily=True)
    lost = stoker("create", IMAGE, "--memory", "256M")
    assert lost.code == 125 and "unmounted" in lost.error, lost.error
    assert list(point.iterdir()) == []
    assert "unmounted" in stoker("rm", "--all").error, "what cannot be removed now is not forgotten"
    assert stoker("daemon", "stop").code == 0
    assert [row["mounted"] for row in json.loads(stoker("pool", "ls", "--json").out)] == [True, True]
    assert json.loads(stoker("ls", "--json").out) == []
    assert stoker("pool", "rm", "main").code == 0
    assert stoker("daemon", "stop").code == 0


MIB = 1 << 20
KIB = 1 << 10


@pytest.mark.anyio
@pytest.mark.parametrize("point", [*filesystem.MAKE, *filesystem.ATTACH, *POOLS])
async def test_kill_9_while_a_pool_is_made_or_removed(short_dir: Path, point: str) -> None:
    """It is there and works, or nothing of it is left; and what it was about can be done again."""
    data, run = short_dir / "data", short_dir / "run"
    async with daemon(data, run, "host") as first:
        if point in POOLS:
            await first.sure(do="pool", name="main")
        await first.sure(do="arm", point=point)
        assert await first.ask(do="remove_pool" if point in POOLS else "pool", name="main") is None, "it was never reached"
    async with Engine.open(settings_of(data, run), booter=HostBooter(), trace_kill="") as engine:
        assert (await engine.upkeep.fsck(repair=True)).clean
        whole = point not in ("pool.after_file", "pool.after_mkfs", "pool.after_unlink")
        assert [(one.name, one.mounted, one.error) for one in await engine.pools.list()][1:] == [("main", True, "")] * whole
        assert [path.name for path in (data / "pools").iterdir() if path.name.startswith(".")] == []
        if not whole:
            await engine.pools.create(CreatePool(name="main", size=filesystem.LEAST))
        assert (data / "pools/main/clones").is_dir()
        await engine.pools.remove("main")
        assert (await engine.upkeep.fsck(repair=False)).differences == []
    assert list((data / "pools").iterdir()) == [] and loop.find(data / "pools/main.xfs") == []


@pytest.mark.anyio
async def test_a_pool_that_cannot_be_mounted(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged, foreign, hidden, or no loop device left: said, nothing written, everything else works; and then it is mounted."""
    settings = settings_of(short_dir / "data", short_dir / "run")
    pools = settings.data_dir / "pools"
    async with Engine.open(settings, booter=HostBooter(), trace_kill="") as engine:
        await engine.pools.create(CreatePool(name="main", size=filesystem.LEAST))
    image, point = pools / "main.xfs", pools / "main"
    assert mounted_at(point) is None
    with open(image, "r+b") as file:
        whole = file.read(4096)
        file.seek(0)
        file.write(b"JUNK" * 1024)

    async def told(code: str) -> None:
        with pytest.raises(StokerError) as caught:
            filesystem.attach(image, point)
        assert caught.value.code == code
        async with Engine.open(settings, booter=HostBooter(), trace_kill="") as engine:
            [main] = [one for one in await engine.pools.list() if one.name == "main"]
            assert not main.mounted and main.error and any("main" in problem for problem in (await engine.health()).problems)
            await engine.volumes.create(ADMIN, CreateVolume(name="data", size=16 * MIB))
            await engine.volumes.remove(ADMIN, "data")
        assert loop.find(image) == []

    await told("pool_damaged")
    with open(image, "r+b") as file:
        file.write(whole)
    mount(Path("none"), point, "tmpfs")
    await told("pool_foreign")
    umount(point)
    (point / "mine").write_text("mine")
    await told("pool_not_empty")
    assert (point / "mine").read_text() == "mine"
    (point / "mine").unlink()

    def none_left(control: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loop, "_free_number", none_left)
    await told("loops_exhausted")
    monkeypatch.undo()
    async with Engine.open(settings, booter=HostBooter(), trace_kill="") as engine:
        assert [one.mounted for one in await engine.pools.list()] == [True, True]
        await engine.pools.remove("main")


async def check(image: Path) -> None:
    await asyncio.to_thread(subprocess.run, ["e2fsck", "-fn", image], check=True, stdin=subprocess.DEVNULL, capture_output=True)


@pytest.mark.anyio
@pytest.mark.parametrize("what", ["volume", "app", "pool"])
async def test_no_space_at_any_write_of_volumes_apps_and_pools(short_dir: Path, what: str) -> None:
    """With a little more space each time, up to where all goes well: ``no_space``, and nothing of it left."""
    settings = settings_of(short_dir / "data", short_dir / "run")
    settings.data_dir.mkdir()
    place = settings.data_dir / f"{what}s"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("f")
        info.size = MIB
        archive.addfile(info, io.BytesIO(os.urandom(MIB)))
    outcomes = []
    with file_system(short_dir / "small.img", place, 96 * MIB, "ext4"):
        (place / "lost+found").rmdir()
        async with Engine.open(settings, booter=HostBooter(), trace_kill="") as engine:
            before = sorted(path for path in place.rglob("*"))
            for kib in (0, 4, 16, 64, 128, 256, 512, 1024, 1200, 1400, 2200, 2600, 4096, 8192, 32768, 81920):
                fill(place, kib * KIB)
                try:
                    if what == "volume":
                        made = await engine.volumes.create(ADMIN, CreateVolume(name="victim", size=64 * MIB))
                        await check(engine.volumes.path(made.id))
                        await engine.volumes.remove(ADMIN, "victim")
                    elif what == "app":
                        await put_app(engine, out.getvalue())
                        [app] = place.glob("*/app.ext4")
                        await check(app)
                        shutil.rmtree(app.parent)
                    else:
                        await engine.pools.create(CreatePool(name="victim", size=filesystem.LEAST))
                        await engine.pools.remove("victim")
                    outcomes.append("made")
                except (CapacityExhausted, HostError) as error:
                    assert error.code == "no_space", (kib, error)
                    outcomes.append("full")
                (place / "filler").unlink()
                left = [path for path in sorted(place.rglob("*")) if path.parent.name != "locks"]
                assert left == before, (kib, left)
        assert outcomes[0] == "full" and outcomes[-1] == "made", outcomes
        assert sorted(outcomes) == outcomes, "once there is enough, more is enough too"
