"""Snapshot files that come from anybody: whole ones are taken in exactly, and of all others nothing is left."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from crashing import ADMIN, daemon, whole
from engine_daemon import settings as settings_of
from engine_host import HostBooter
from stoker.api.models import Principal, Snapshot
from stoker.engine import trace
from stoker.engine.engine import Engine
from stoker.engine.travel import looking
from stoker.engine.travel.pull import Pull
from stoker.errors import CapacityExhausted, Conflict, InvalidRequest, NotFound, StokerError
from stoker.host.run import run
from stoker.host.zstd import CompressionParameter, ZstdCompressor
from stoker.images.store import Store
from stoker.settings import Settings
from stoker.storage.overlay import CLUSTER
from stoker.storage.overlay_writer import OverlayWriter
from travel_file import MEMORY, MIB, SIZE, Travel, an_image, data, pack, zeros

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]
Change = Callable[[Travel], bytes]


@pytest.fixture
def image(tmp_path: Path) -> bytes:
    return an_image(tmp_path / "image")


async def has_kernel(settings: Settings) -> None:
    """An entry that stands for Debian's kernel; nothing boots here."""
    settings.data_dir.mkdir(mode=0o700, exist_ok=True)
    store = Store(settings)
    async with store.stage() as stage:
        tree = stage.path / "kernel"
        tree.mkdir()
        (tree / "vmlinux").write_bytes(b"kernel")
        store.point("kernels", "debian-bookworm", store.publish(stage, tree, "kernels", "debian:bookworm", {}))


@pytest.fixture
async def settings(short_dir: Path) -> Settings:
    found = settings_of(short_dir / "data", short_dir / "run")
    await has_kernel(found)
    return found


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Engine]:
    async with Engine.open(settings, booter=HostBooter(), trace_kill="") as engine:
        yield engine


async def come(engine: Engine, packed: bytes, name: str | None = None, who: Principal = ADMIN) -> Snapshot:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(packed), 50_000):
            yield packed[start : start + 50_000]

    return await engine.snapshots.import_file(who, pieces(), name)


async def nothing(engine: Engine, settings: Settings) -> None:
    assert await whole(engine, settings.data_dir, settings.run_dir) == {}
    assert list(await engine.snapshots.list(ADMIN)) == []
    for place in ("snapshots", "staging", "pool/clones", "pool/layers"):
        assert not list((settings.data_dir / place).iterdir()), place
    assert (await engine.images.images(ADMIN)).items == []


async def test_a_whole_file(settings: Settings, image: bytes, tmp_path: Path) -> None:
    travel = Travel(image, memory=True)
    async with opened(settings) as engine:
        made = await come(engine, travel.packed(), "came")
        assert (made.name, made.tags, made.memory, made.sandbox) == ("came", ["good"], True, travel.manifest["machine"]["id"])
        assert "another build" in made.unfit and made.image_digest == travel.manifest["image"]["digest"]
        with pytest.raises(Conflict, match="there is a snapshot came"):
            await come(engine, travel.packed(), "came")
        # The image is here now.
        del travel.parts["image"]
        again = await come(engine, travel.packed())
        [entry] = (await engine.images.images(ADMIN)).items
        assert entry.names == [] and (settings.data_dir / "images" / entry.digest / "rootfs.ext4").read_bytes() == image
        flat = tmp_path / "flat"
        await asyncio.to_thread(engine._core.pools.open("").flatten, again.id, flat)
        wanted = bytearray(image + bytes(SIZE))
        wanted[:CLUSTER] = travel.content[:CLUSTER]
        wanted[2 * CLUSTER : 3 * CLUSTER] = bytes(CLUSTER)
        wanted[MIB : MIB + 2 * CLUSTER] = travel.content[CLUSTER:]
        assert flat.read_bytes() == wanted
        for layer in (settings.data_dir / "pool" / "layers").glob("*/disk.0"):
            await run(["qemu-img", "check", "-f", "qcow2", layer])
        # And it leaves as it came.
        async with engine.snapshots.export_file(ADMIN, made.id, image=True) as pieces:
            packed = b"".join([piece async for piece in pieces])
        third = await come(engine, packed)
        other = tmp_path / "other"
        await asyncio.to_thread(engine._core.pools.open("").flatten, third.id, other)
        assert other.read_bytes() == wanted
        places = [settings.data_dir / "snapshots" / one.id for one in (made, third)]
        for name in ("memory", "delta", "state"):
            assert (places[0] / name).read_bytes() == (places[1] / name).read_bytes()
        assert (places[0] / "memory").read_bytes() == bytes(4096) + b"m" * 8192 + bytes(MEMORY - 12288)
        for one in (made, again, third):
            await engine.snapshots.remove(ADMIN, one.id)
        await engine.upkeep.gc(dry_run=False)
        await nothing(engine, settings)


def lie(**words: object) -> Change:
    return lambda travel: travel.packed(lambda manifest: manifest.update(words))


def of_part(part_name: str, **words: object) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        next(part for part in manifest["parts"] if part["name"] == part_name).update(words)

    return lambda travel: travel.packed(change)


def records(name: str, *found: tuple[int, int, int, bytes], size: int | None = None) -> Change:
    def change(travel: Travel) -> bytes:
        travel.parts[name] = (list(found), travel.parts[name][1] if size is None else size)
        return travel.packed()

    return change


def of_image(**words: object) -> Change:
    return lambda travel: travel.packed(lambda manifest: manifest["image"].update(words))


def of_machine(**words: object) -> Change:
    return lambda travel: travel.packed(lambda manifest: manifest["machine"].update(words))


def reordered(*names: str) -> Change:
    def change(travel: Travel) -> bytes:
        travel.parts = {name: travel.parts[name] for name in names}
        return travel.packed()

    return change


def not_ext4(travel: Travel) -> bytes:
    other = Travel(bytes(SIZE))
    return other.packed()


def another_image(travel: Travel) -> bytes:
    travel.parts["image"][0][3] = data(3 * MIB, b"x" * MIB)
    return travel.packed()


def bomb(travel: Travel) -> bytes:
    """A GiB of zeros where a byte should be: refused before it is written."""
    travel.parts["disk"] = ([data(start, bytes(MIB)) for start in range(0, 1 << 28, MIB)], 1 << 28)
    travel.manifest["machine"]["disk"] = 1 << 28
    return travel.packed(lambda manifest: manifest["parts"][1].update(bytes=1 << 20))


def wide(travel: Travel) -> bytes:
    """It would have its reader remember more than it may."""
    packer = ZstdCompressor(options={CompressionParameter.window_log: 27})
    return packer.compress(travel.plain() + bytes(1 << 28), ZstdCompressor.FLUSH_FRAME)


P = CLUSTER
LIES: dict[str, Change] = {
    "nothing": lambda travel: b"",
    "no zstd": lambda travel: b"STKSNAP\x01" * 100,
    "no snapshot": lambda travel: pack(b"something else, and long enough for a head"),
    "another version": lambda travel: pack(travel.plain().replace(b"STKSNAP\x01", b"STKSNAP\x02", 1)),
    "a long manifest": lambda travel: pack(travel.plain()[:8] + b"\xff\xff\xff\xff" + bytes(MIB)),
    "no manifest": lambda travel: pack(travel.plain()[:8] + (5).to_bytes(4, "little") + b"{]{]{"),
    "a deep manifest": lambda travel: pack(travel.plain()[:8] + (200_000).to_bytes(4, "little") + b"[" * 200_000),
    "an unknown word": lie(surprise=1),
    "a control character": lie(tags=["a\x1b[31m"]),
    "a wrong id": lie(id="../../etc"),
    "behind its end": lambda travel: pack(travel.plain() + b"x"),
    "another frame": lambda travel: travel.packed() + pack(b"x"),
    "behind the frame": lambda travel: travel.packed() + b"x",
    "a wide window": wide,
    "a bomb": bomb,
    "no disk": reordered("image"),
    "parts in another order": reordered("disk", "image", "memory", "delta", "state"),
    "memory without state": reordered("image", "disk", "memory"),
    "state without memory": reordered("image", "disk", "state"),
    "a delta alone": reordered("image", "disk", "delta"),
    "a part twice": lambda travel: travel.packed(lambda manifest: manifest["parts"].insert(0, manifest["parts"][0])),
    "a part unknown": of_part("image", name="../image"),
    "a digest": of_part("disk", sha256="0" * 64),
    "a digest of memory": of_part("memory", sha256="0" * 64),
    "more than said": of_part("disk", bytes=CLUSTER),
    "less than said": of_part("disk", bytes=4 * CLUSTER),
    "more bytes than size": of_part("disk", bytes=3 * SIZE),
    "more than there is room for": lambda travel: of_machine(disk=1 << 45)(_sized(travel, 1 << 45)),
    "a negative size": of_part("disk", size=-1),
    "another size": of_part("disk", size=4 * SIZE),
    "an odd disk": records("disk", data(0, b"x" * 512), size=2 * SIZE + 1),
    "a disk smaller than its image": records("disk", size=SIZE // 2),
    "not at a cluster": records("disk", data(512, b"x" * P)),
    "half a cluster": records("disk", data(0, b"x" * 512)),
    "back again": records("disk", data(P, b"x" * P), data(0, b"x" * P)),
    "twice the same": records("disk", data(0, b"x" * P), zeros(0, P)),
    "past the end": records("disk", data(2 * SIZE, b"x" * P)),
    "zeros past the end": records("disk", zeros(P, 4 * SIZE)),
    "nothing at all": records("disk", data(0, b"")),
    "of no kind": records("disk", (0, P, 9, b"x" * P)),
    "too long": records("disk", data(0, b"x" * 2 * MIB)),
    "an image without its entry": of_image(entry="{}"),
    "an image of another digest": of_image(digest="0" * 64),
    "an image of another size": of_image(size=SIZE // 2),
    "an image that is none": not_ext4,
    "another image": another_image,
    "a foreign word": of_machine(surprise=1),
    "memory of another size": records("memory", data(0, b"m" * 4096), size=MEMORY // 2),
    "a delta that is none": records("delta", data(0, b"x" * 8192), size=8192),
    "a state without end": records("state", size=65 * MIB),
    "another program's name": of_machine(request={"image": "debian:12", "memory": MEMORY, "surprise": 1}),
}


CODES = {
    "another version": "snapshot_format",
    "more than there is room for": "no_space",
    "another image": "digest_mismatch",
}


def _sized(travel: Travel, size: int) -> Travel:
    travel.parts["disk"] = ([data(start, b"x" * MIB) for start in range(0, 4 * MIB, MIB)], size)
    former = travel.packed

    def packed(change: Callable[[dict[str, Any]], None] | None = None) -> bytes:
        def both(manifest: dict[str, Any]) -> None:
            manifest["parts"][1]["bytes"] = size
            if change is not None:
                change(manifest)

        return former(both)

    travel.packed = packed  # type: ignore[method-assign]
    return travel


async def test_lies(settings: Settings, image: bytes) -> None:
    async with opened(settings) as engine:
        for what, change in LIES.items():
            with pytest.raises(StokerError) as caught:
                await come(engine, change(Travel(image, memory=True)))
            assert caught.value.code == CODES.get(what, "bad_snapshot_file"), (what, caught.value)
            await nothing(engine, settings)
        bare = Travel(image)
        del bare.parts["image"]
        with pytest.raises(NotFound, match="without its image, debian:12"):
            await come(engine, bare.packed())
        bare = Travel(image)
        bare.manifest["machine"]["kernel"] = "debian:99"
        with pytest.raises(NotFound, match="kernel, debian:99"):
            await come(engine, bare.packed())
        await nothing(engine, settings)
        assert (await engine.upkeep.fsck(repair=False)).clean


async def test_damage(settings: Settings, image: bytes) -> None:
    """Cut off anywhere, or with a byte changed anywhere."""
    chance = random.Random(5)
    packed = Travel(image, memory=True).packed()
    async with opened(settings) as engine:
        for _ in range(30):
            at = chance.randrange(len(packed))
            with pytest.raises(InvalidRequest):
                await come(engine, packed[:at])
            with pytest.raises(InvalidRequest):
                await come(engine, packed[:at] + bytes([packed[at] ^ (1 << chance.randrange(8))]) + packed[at + 1 :])
        await nothing(engine, settings)


async def test_names_of_this_host_mean_nothing(settings: Settings, image: bytes) -> None:
    travel = Travel(image)
    travel.manifest["machine"]["request"] |= {
        "image": "ext4:/etc/shadow",
        "kernel": "/etc/shadow",
        "initrd": "/etc/shadow",
        "volumes": [{"name": "data", "path": "/d"}],
        "app": "0" * 64,
        "lease": True,
        "start": True,
    }
    async with opened(settings) as engine:
        made = await come(engine, travel.packed())
        text = str(engine._core.snapshots[made.id])
        assert "shadow" not in text and made.image == "imported"
        request = engine._core.snapshots[made.id].box.request
        assert (request.volumes, request.app, request.lease, request.start) == ([], None, False, False)
        guest = await come(engine, Travel(image, memory=True).packed(), who=Principal(owner="key-guest", admin=False))
        assert guest.owner == "key-guest" and "administrators" in guest.unfit


async def test_the_client_goes_away(settings: Settings, image: bytes) -> None:
    packed = Travel(image, memory=True).packed()
    seen = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield packed[: len(packed) // 2]
        seen.set()
        await asyncio.Event().wait()

    async with opened(settings) as engine:
        task = asyncio.create_task(engine.snapshots.import_file(ADMIN, pieces(), None))
        await seen.wait()
        [making] = await engine.snapshots.list(ADMIN)
        assert making.state == "making"
        with pytest.raises(Conflict, match="not whole"):
            async with engine.snapshots.export_file(ADMIN, making.id, image=True):
                pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await nothing(engine, settings)


@pytest.mark.parametrize("point", trace.IMPORT)
async def test_a_daemon_that_dies_here(settings: Settings, image: bytes, tmp_path: Path, point: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(Travel(image, memory=True).packed())
    data_dir, run_dir = settings.data_dir, settings.run_dir
    async with daemon(data_dir, run_dir, "host") as first:
        await first.sure(do="arm", point=point)
        assert await first.ask(do="import_snapshot", file=str(file)) is None, "the point was never reached"
    async with opened(settings) as engine:
        await whole(engine, data_dir, run_dir)
        assert [one.name for one in await engine.snapshots.list(ADMIN)] == (["came"] if point == "import.after_ready" else [])
        if point == "import.after_ready":
            await engine.snapshots.remove(ADMIN, "came")
            await engine.upkeep.gc(dry_run=False)
        await Store(settings).sweep()  # as every fetch and build begins with
        await nothing(engine, settings)


async def test_a_disk_that_fills_up_meanwhile(settings: Settings, image: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OverlayWriter, "zeros", full)
    async with opened(settings) as engine:
        with pytest.raises(CapacityExhausted, match="filled up"):
            await come(engine, Travel(image, memory=True).packed())
        await nothing(engine, settings)


async def test_room(settings: Settings, image: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "ROOM", 1 << 60)
    async with opened(settings) as engine:
        with pytest.raises(CapacityExhausted):
            await come(engine, Travel(image).packed())
        await nothing(engine, settings)


async def test_who_is_given_up_reads_no_more() -> None:
    """Whenever it happens: the thread may be about to ask, asking, or between two pieces."""
    for number in range(300):
        seen = asyncio.Event()

        async def pieces(seen: asyncio.Event = seen) -> AsyncIterator[bytes]:
            yield b"x"
            seen.set()
            await asyncio.Event().wait()

        pull = Pull(pieces())

        def read(pull: Pull = pull) -> None:
            while pull.more():
                pass

        task = asyncio.create_task(pull.run(read))
        if number % 2:
            await seen.wait()
        else:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
