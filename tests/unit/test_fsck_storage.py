"""The check of what is stored: pools, volumes, apps; what no book knows, and what is gone."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import tarfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine_host import HostBooter
from stoker.api.models import CreateSandbox, CreateVolume
from stoker.engine.engine import Engine
from stoker.errors import Conflict, NotFound
from stoker.settings import Settings
from upkeep_host import ADMIN, STRANGER, S, make, mends, opened, shim, told

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
MIB = 1 << 20


@pytest.fixture
def settings(short_dir: Path) -> Settings:
    return Settings(short_dir / "data", short_dir / "run", short_dir / "none.toml")


async def an_app(engine: Engine) -> str:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("f"))

    async def pieces() -> AsyncIterator[bytes]:
        yield out.getvalue()

    digest = hashlib.sha256(out.getvalue()).hexdigest()
    await engine.apps.put(ADMIN, digest, pieces())
    return digest


async def test_names_that_are_none_of_ours_are_told_and_left(settings: Settings) -> None:
    """In every directory; nothing else that works there minds them, also not the next daemon."""
    data = settings.data_dir
    async with Engine.open(settings, booter=HostBooter(), trace_kill="") as engine:
        await make(engine, "box", stopped=True)
        strange = {
            "pool": [data / "pool/notes", data / "pool/bases/notes", data / "pool/layers/notes", data / "pools/notes.txt"],
            "app": [data / "apps/notes"],
            "app-disk": [data / "apps/disks/notes.qcow2"],
            "clone": [data / "pool/clones/notes.txt"],
            "volume": [data / "volumes/notes"],
            "directory": [settings.run_dir / "helpers/notes"],
        }
        (data / "pools").mkdir(exist_ok=True)
        for paths in strange.values():
            for path in paths:
                path.write_text("mine")
        expected = sorted((kind, str(path)) for kind, paths in strange.items() for path in paths)
        for repair in (False, True):
            report = await engine.upkeep.fsck(repair=repair)
            assert sorted(told(report)) == expected and not report.clean
        await engine.upkeep.gc(dry_run=False)
    # A pool is put right when it is opened: what is somebody else's stays, directories too.
    for path in (data / "pool/layers/notes", data / "pool/bases/notes"):
        path.unlink()
        path.mkdir()
        (path / "in it").write_text("mine")
    async with Engine.open(settings, booter=HostBooter(), trace_kill="") as engine:
        assert sorted(told(await engine.upkeep.fsck(repair=True))) == expected
        for paths in strange.values():
            for path in paths:
                assert (path / "in it" if path.is_dir() else path).read_text() == "mine"


async def test_two_daemons_on_one_pool(settings: Settings, short_dir: Path) -> None:
    """Another data directory whose pool is the first one's: its daemon does not start, and says who is there."""
    second = replace(settings, data_dir=short_dir / "second", run_dir=short_dir / "other")
    second.data_dir.mkdir()
    async with opened(settings) as engine:
        await make(engine, "box")
        (second.data_dir / "pool").symlink_to(settings.data_dir / "pool")
        with pytest.raises(Conflict, match=f"process {os.getpid()}") as caught:
            async with Engine.open(second, booter=HostBooter(), trace_kill=""):
                pass
        assert caught.value.code == "pool_in_use"
        assert (await engine.get(ADMIN, "box")).state is S.RUNNING
    async with Engine.open(second, booter=HostBooter(), trace_kill="") as engine:
        assert (await engine.list(ADMIN)).items == []


async def test_what_a_crash_left_of_pools_and_helpers_goes(settings: Settings) -> None:
    """A pool's file that was being made, a directory without its file, a machine of a job that is over."""
    pools, job = settings.data_dir / "pools", settings.run_dir / "helpers" / f"job-{'q' * 20}"
    async with opened(settings) as engine:
        pools.mkdir(exist_ok=True)
        ours = pools / f".main.xfs.{os.getpid()}"
        for path in (ours, pools / ".main.xfs.4194305"):
            path.write_bytes(b"half")
        (pools / "gone").mkdir()
        with shim(job) as process:
            while not (job / "shim.json").exists():
                await asyncio.sleep(0.01)
            expected = [("pool", str(pools / ".main.xfs.4194305")), ("pool", str(pools / "gone")), ("directory", str(job))]
            await mends(engine, *expected)
            assert process.wait(5) in (0, -9)
        assert os.listdir(pools) == [ours.name] and not job.exists()
        # One with something in it is not what a crash leaves.
        (pools / "kept").mkdir()
        (pools / "kept" / "f").write_text("mine")
        [found] = (await engine.upkeep.fsck(repair=True)).differences
        assert found.name == str(pools / "kept") and not found.repaired and (pools / "kept" / "f").read_text() == "mine"
        (pools / "kept" / "f").unlink()
        await mends(engine, ("pool", str(pools / "kept")))


async def test_what_is_gone_or_too_small_is_told(settings: Settings) -> None:
    async with opened(settings) as engine:
        for name in ("gone", "cut", "good"):
            await engine.volumes.create(ADMIN, CreateVolume(name=name, size=16 * MIB))
        paths = {name: engine.volumes.path((await engine.volumes.get(ADMIN, name)).id) for name in ("gone", "cut")}
        paths["gone"].unlink()
        os.truncate(paths["cut"], MIB)
        for _ in range(2):
            report = await engine.upkeep.fsck(repair=True)
            found = {one.name: one.found for one in report.differences}
            assert found == {str(paths["gone"]): "no such file", str(paths["cut"]): "1048576 bytes"} and not report.clean
        for name in ("gone", "cut", "good"):
            await engine.volumes.remove(ADMIN, name)
        assert (await engine.upkeep.fsck(repair=True)).differences == []


async def test_apps_that_are_not_whole(settings: Settings) -> None:
    """One that a sandbox has is told; one that nobody has goes, and is made again when it is sent again."""
    async with opened(settings) as engine:
        digest = await an_app(engine)
        place = settings.data_dir / "apps" / digest
        (place / "app.ext4").unlink()
        mended = await mends(engine, ("app", str(place)))
        assert mended[0].found == "no app.ext4" and not place.exists()
        with pytest.raises(NotFound):
            await engine.apps.get(ADMIN, digest)
        assert await an_app(engine) == digest
        operation = await engine.create(ADMIN, CreateSandbox(image="host", name="box", app=digest))
        box = await engine.wait(ADMIN, operation.sandbox or "", frozenset({S.RUNNING}), 20)
        overlay = settings.data_dir / "apps" / "disks" / f"{box.id}.qcow2"
        # Host processes have no disks: what a boot makes is missing, and told.
        assert told(await engine.upkeep.fsck(repair=True)) == [("app-disk", str(overlay))]
        overlay.touch()
        (overlay.parent / f"{STRANGER}.qcow2").touch()
        (place / "facts.json").unlink()
        report = await engine.upkeep.fsck(repair=True)
        assert sorted((one.kind, one.name, one.repaired) for one in report.differences) == [
            ("app", str(place), False),
            ("app-disk", str(overlay.parent / f"{STRANGER}.qcow2"), True),
        ]
        await engine.destroy(ADMIN, "box")
        await mends(engine, ("app", str(place)))


async def test_the_apps_of_another_data_directory_are_left_alone(settings: Settings, short_dir: Path) -> None:
    theirs = short_dir / "theirs"
    for name in ("disks", "staging/dead", "locks"):
        (theirs / name).mkdir(parents=True)
    overlay = theirs / "disks" / f"{STRANGER}.qcow2"
    overlay.touch()
    async with opened(settings) as engine:
        (settings.data_dir / "apps").rename(settings.data_dir / "apps.aside")
        (settings.data_dir / "apps").symlink_to(theirs)
        assert (await engine.upkeep.fsck(repair=True)).differences == []
        assert overlay.exists() and (theirs / "staging/dead").exists()
