"""Snapshots that leave one daemon in a file and come into another, which has nothing of the first: memory and disk go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import CommandLine
from crashing import ADMIN
from engine_fixtures import own_data
from engine_guests import make, opened, run
from stoker.api.models import CopySandbox, CreateSnapshot, ForkSandbox, OperationState, Principal, Sandbox, Snapshot, StartProcess
from stoker.engine.engine import Engine
from stoker.engine.travel.format import MAGIC
from stoker.errors import Conflict, NotFound
from stoker.host.run import run as run_here
from stoker.host.zstd import ZstdCompressor, ZstdDecompressor
from stoker.settings import Settings
from stoker.vmm.qemu.facts import qemu_facts

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]
COUNTER = "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/new; mv /dev/shm/new /dev/shm/i; sleep 0.1; done"
SHARED = ("kernels", "cache")


async def said(engine: Engine, name: str, script: str) -> str:
    code, data = await run(engine, name, script)
    assert code == 0, data
    return data.decode()


def another_host(settings: Settings, short_dir: Path, name: str) -> Settings:
    """A data directory that has the kernels and nothing else."""
    data, run_dir = short_dir / name, short_dir / f"{name}.run"
    data.mkdir(mode=0o700)
    run_dir.mkdir(mode=0o755)
    for part in SHARED:
        (data / part).symlink_to(settings.data_dir / part)
    return replace(settings, data_dir=data, run_dir=run_dir)


async def exported(engine: Engine, snapshot: str, path: Path, *, image: bool = True) -> None:
    with open(path, "wb") as file:
        async with engine.snapshots.export_file(ADMIN, snapshot, image=image) as pieces:
            async for piece in pieces:
                file.write(piece)


async def imported(engine: Engine, data: bytes | Path, name: str | None = None, who: Principal = ADMIN) -> Snapshot:
    whole = data if isinstance(data, bytes) else data.read_bytes()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(whole), 100_000):
            yield whole[start : start + 100_000]

    return await engine.snapshots.import_file(who, pieces(), name)


async def started(engine: Engine, snapshot: str, **words: object) -> Sandbox:
    operation = await engine.start_snapshot(ADMIN, snapshot, CopySandbox(**words))  # type: ignore[arg-type]
    ended = await engine.wait_operation(ADMIN, operation.id, 300)
    assert ended.state is OperationState.SUCCEEDED, ended.error
    return await engine.get(ADMIN, ended.sandbox or "")


def changed(path: Path, **words: object) -> bytes:
    """The same file with another word in its manifest."""
    plain = ZstdDecompressor().decompress(path.read_bytes())
    size = int.from_bytes(plain[8:12], "little")
    manifest = json.dumps({**json.loads(plain[12 : 12 + size]), **words}).encode()
    return ZstdCompressor().compress(MAGIC + len(manifest).to_bytes(4, "little") + manifest + plain[12 + size :], 2)


async def test_to_another_host(settings: Settings, short_dir: Path, tmp_path: Path) -> None:
    own, other, third = own_data(settings, short_dir), *(another_host(settings, short_dir, name) for name in ("b", "c"))
    whole, bare, disk = (tmp_path / name for name in ("whole", "bare", "disk"))
    async with opened(own) as engine:
        await make(engine, name="box", env={"A": "b"})
        await engine.processes.start(ADMIN, "box", StartProcess(argv=["sh", "-c", COUNTER], tag="job"))
        # In several layers, the upper of which hide some of what the lower have.
        for number in range(3):
            await said(engine, "box", f"yes {number} | head -c 3M > /root/p{number}; yes {number} | head -c 1M > /root/all; sync")
            await engine.fork(ADMIN, "box", ForkSandbox(name=f"copy-{number}"))
            await engine.destroy(ADMIN, f"copy-{number}")
        wanted = await said(
            engine, "box", "head -c 20M /dev/urandom > /dev/shm/p; cat /dev/shm/p /root/p? /root/all /etc/passwd | md5sum"
        )
        first = await engine.snapshot(ADMIN, "box", CreateSnapshot(name="one", tags=["good"]))
        await said(engine, "box", "rm /root/p0; echo later > /root/later; sync")
        last = await engine.snapshot(ADMIN, "box", CreateSnapshot(memory=False))
        await exported(engine, "one", whole)
        await exported(engine, first.id, bare, image=False)
        await exported(engine, last.id, disk)
        assert bare.stat().st_size < whole.stat().st_size
        # Back where it came from: the image is there.
        again = await imported(engine, bare, "again")
        assert (
            await said(engine, (await started(engine, "again")).id, "cat /dev/shm/p /root/p? /root/all /etc/passwd | md5sum")
            == wanted
        )
        for one in (again.id, first.id, last.id):
            await engine.snapshots.remove(ADMIN, one)
    async with opened(other) as engine:
        with pytest.raises(NotFound, match="without its image, debian:12") as caught:
            await imported(engine, bare)
        assert caught.value.code == "image_missing" and list(await engine.snapshots.list(ADMIN)) == []
        found = await imported(engine, whole, "one")
        assert (found.name, found.tags, found.memory, found.unfit, found.image) == ("one", ["good"], True, "", "debian:12")
        assert found.own and found.id != first.id
        with pytest.raises(Conflict, match="there is a snapshot one"):
            await imported(engine, whole, "one")
        for name in ("a", "b"):
            box = await started(engine, "one", name=name)
            assert box.origin == "snapshot"
            assert await said(engine, name, "cat /dev/shm/p /root/p? /root/all /etc/passwd | md5sum") == wanted
            assert (
                await said(engine, name, "a=$(cat /dev/shm/i); sleep 1; b=$(cat /dev/shm/i); test $b -gt $a; hostname; echo $A")
                == f"{name}\nb\n"
            )
        layers = list((other.data_dir / "pool" / "layers").glob("*/disk.0"))
        assert layers
        for layer in layers:
            await run_here(["qemu-img", "check", "-f", "qcow2", layer])
        only = await imported(engine, disk, "disk")
        assert (only.memory, only.unfit) == (False, "")
        await started(engine, "disk", name="d")
        assert await said(engine, "d", "cat /root/later; ls /root/p?") == "later\n/root/p1\n/root/p2\n"
        qemu = hashlib.sha256(Path((await qemu_facts(other)).path).read_bytes()).hexdigest()
        # What does not fit is told, and its disk boots.
        strange = await imported(engine, changed(whole, program={"sha256": "0" * 64}), "strange")
        assert "another" in strange.unfit
        with pytest.raises(Conflict, match="of no use here") as refused:
            await engine.start_snapshot(ADMIN, "strange", CopySandbox())
        assert "--cold" in refused.value.hint
        await started(engine, "strange", name="cold", cold=True)
        assert await said(engine, "cold", "cat /root/p? /root/all | md5sum; ls /dev/shm") == await said(
            engine, "a", "cat /root/p? /root/all | md5sum"
        )
        slow = await imported(engine, changed(whole, program={"sha256": qemu, "tsc_khz": 1000}))
        assert "clock" in slow.unfit
        for one in await engine.snapshots.list(ADMIN):
            await engine.snapshots.remove(ADMIN, one.id)
        for name in ("a", "b", "d", "cold"):
            await engine.destroy(ADMIN, name)
        # The image came without a name: nothing needs it any more.
        assert [image.names for image in (await engine.images.images(ADMIN)).items] == [[]]
        await engine.upkeep.gc(dry_run=False)
        assert (await engine.images.images(ADMIN)).items == []
        assert (await engine.upkeep.fsck(repair=False)).clean
    async with opened(third) as engine:
        guest = await imported(engine, whole, who=Principal(owner="key-guest", admin=False))
        assert "administrators" in guest.unfit
        assert list(await engine.snapshots.list(Principal(owner="other", admin=False))) == []
        await engine.snapshots.remove(ADMIN, guest.id)


def test_by_the_command_line(stoker: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "one.stoker"
    assert stoker("create", "--name", "box", "--memory", "256M", "debian:12").code == 0
    assert stoker("exec", "box", "sh", "-c", "echo kept > /root/kept; sync").code == 0
    assert stoker("snapshot", "create", "--name", "one", "--disk-only", "box").code == 0
    assert stoker("snapshot", "export", "--no-image", "one", str(file)).code == 0
    assert file.stat().st_mode & 0o777 == 0o600
    assert stoker("snapshot", "export", "--no-image", "one", "-").out[:4] == file.read_bytes()[:4] == b"\x28\xb5\x2f\xfd"
    assert "there is a snapshot one" in stoker("snapshot", "import", "--name", "one", str(file)).error
    assert stoker("rm", "box").code == 0 and stoker("snapshot", "rm", "one").code == 0
    assert stoker("snapshot", "import", "--name", "two", "-", input=file.read_bytes()).text == "two\n"
    assert stoker("create", "--name", "copy", "--from", "two").code == 0
    assert stoker("exec", "copy", "cat", "/root/kept").text == "kept\n"
    file.write_bytes(file.read_bytes()[:-10])
    damaged = stoker("snapshot", "import", str(file))
    assert damaged.code == 125 and "not a whole snapshot file" in damaged.error
    assert stoker("snapshot", "import", str(tmp_path / "none")).code == 125
