"""Images and kernels removed, and what nothing refers to freed: never what somebody uses, and whole or not at all after a crash."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as changed

from crashing import daemon
from engine_host import HostBooter
from stoker.api.models import CreateSandbox, GcReport, Principal, SandboxState
from stoker.engine.engine import Engine
from stoker.errors import Conflict, NotFound
from stoker.host.lock import locked
from stoker.images.inventory import held_image, hold, items
from stoker.images.kernel import file_pointer
from stoker.images.progress import NullProgress
from stoker.images.store import Store
from stoker.settings import Settings
from stoker.vmm.memory import new_memory
from stoker.vmm.saved import save
from upkeep_host import entry

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
ADMIN = Principal()
GUEST = Principal(owner="key-a", admin=False)
S = SandboxState


@pytest.fixture
def settings(short_dir: Path) -> Settings:
    return Settings(short_dir / "data", short_dir / "run", short_dir / "none.toml")


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Engine]:
    async with Engine.open(settings, booter=HostBooter(), trace_kill="") as engine:
        yield engine
        for box in (await engine.list(ADMIN)).items:
            await engine.destroy(ADMIN, box.id)


async def use(engine: Engine, name: str, *, image: str = "", kernel: str = "") -> str:
    """A sandbox whose row says that it stands on them; stopped, as a disk outlives the machine."""
    operation = await engine.create(ADMIN, CreateSandbox(image="host", name=name))
    await engine.wait(ADMIN, operation.sandbox or "", frozenset({S.RUNNING}), 20)
    box = engine._core.find(ADMIN, name)
    path = str(Store(engine._core.settings).entry("images", image) / "rootfs.ext4") if image else ""
    await engine._core.save(box, image_digest=image, image_path=path, kernel_path=kernel)
    await engine.stop(ADMIN, name, 0.5)
    return box.id


def digests(settings: Settings, kind: str) -> set[str]:
    return {item.digest for item in items(Store(settings), kind)}


async def test_lists_say_names_users_and_blocks(settings: Settings) -> None:
    async with opened(settings) as engine:
        image, other = await entry(settings, "images", "one", "debian-bookworm"), await entry(settings, "images", "two")
        kernel = await entry(settings, "kernels", "6.1", "debian-bookworm")
        await use(engine, "web", image=image, kernel=kernel)
        found = {one.digest: one for one in (await engine.images.images(ADMIN)).items}
        assert set(found) == {image, other}
        assert (found[image].names, found[image].used_by, found[other].used_by) == (["debian-bookworm"], ["web"], [])
        place = settings.data_dir / "images" / image
        whole = sum(path.lstat().st_blocks * 512 for path in [*place.rglob("*"), place])
        assert found[image].disk == whole and found[image].size == 3000
        assert (await engine.images.image(ADMIN, "debian:12")).digest == image
        assert (await engine.images.image(ADMIN, "base:debian:bookworm")).digest == image
        assert (await engine.images.image(ADMIN, other[:8])).digest == other
        assert (await engine.images.image(GUEST, image)).used_by == []
        assert [(one.release, one.used_by) for one in (await engine.images.kernels(ADMIN)).items] == [("6.1", ["web"])]
        for unknown in ("debian:13", "nothing", "0" * 64, "../images", ""):
            with pytest.raises(NotFound):
                await engine.images.image(ADMIN, unknown)


async def test_one_that_cannot_be_read_is_listed_and_removed(settings: Settings) -> None:
    async with opened(settings) as engine:
        image = await entry(settings, "images", "one", "debian-bookworm")
        (settings.data_dir / "images" / image / "manifest.json").write_text("{")
        [found] = (await engine.images.images(ADMIN)).items
        assert found.damaged
        await engine.images.remove("images", image)
        assert digests(settings, "images") == set()


async def test_a_removal_is_refused_with_the_names_of_the_users(settings: Settings) -> None:
    async with opened(settings) as engine:
        image, kernel = (
            await entry(settings, "images", "one", "debian-bookworm"),
            await entry(settings, "kernels", "6.1", "debian-bookworm"),
        )
        await use(engine, "web", image=image, kernel=kernel)
        for kind, reference in (("images", "debian:12"), ("images", image), ("kernels", "debian:12")):
            with pytest.raises(Conflict) as refused:
                await engine.images.remove(kind, reference)
            assert refused.value.code == f"{kind[:-1]}_in_use" and "web" in refused.value.message
            assert refused.value.details["used_by"] == ["web"]
        assert digests(settings, "images") == {image}
        await engine.destroy(ADMIN, "web")
        await engine.images.remove("images", "debian:12")
        await engine.images.remove("kernels", kernel)
        assert not digests(settings, "images") and not digests(settings, "kernels")
        assert Store(settings).names("images") == {} and list((settings.data_dir / "staging").iterdir()) == []


async def test_a_name_goes_before_the_content(settings: Settings) -> None:
    async with opened(settings) as engine:
        image = await entry(settings, "images", "one", "debian-bookworm")
        Store(settings).point("images", "mine", image)
        await use(engine, "web", image=image)
        await engine.images.remove("images", "mine")
        assert Store(settings).names("images") == {"debian-bookworm": image}


async def test_a_create_that_is_at_it_keeps_it(settings: Settings) -> None:
    """From the moment it is resolved until a row names it."""
    async with opened(settings) as engine:
        image = await entry(settings, "images", "one", "debian-bookworm")
        with ExitStack() as held:
            assert (await held_image("debian:12", settings, NullProgress(), held)).digest == image
            with pytest.raises(Conflict) as refused:
                await engine.images.remove("images", image)
            assert refused.value.code == "image_in_use"
            (settings.data_dir / "images/names/debian-bookworm").unlink()
            assert (await engine.upkeep.gc(dry_run=False)).items == []
        assert [freed.name for freed in (await engine.upkeep.gc(dry_run=False)).items] == [image]


async def test_users_and_removals_at_once(settings: Settings) -> None:
    """Whoever holds an entry finds every byte of it, however many removals there are; each removal is whole."""
    async with opened(settings) as engine:
        store = Store(settings)
        digest = await entry(settings, "images", "one")
        ended = asyncio.Event()
        held = refused = removed = 0

        async def use_often() -> None:
            nonlocal held
            while not ended.is_set():
                fd = hold(store, "images", digest)
                if fd is not None:
                    for _ in range(3):
                        await asyncio.sleep(0.001)
                        assert store.verify("images", digest) == []
                    os.close(fd)
                    held += 1
                await asyncio.sleep(0.002)

        workers = [asyncio.create_task(use_often()) for _ in range(2)]
        while not (held > 20 and refused > 5 and removed > 20):
            try:
                await engine.images.remove("images", digest)
                removed += 1
                assert await entry(settings, "images", "one") == digest
            except Conflict as conflict:
                assert conflict.code == "image_in_use"
                refused += 1
            await asyncio.sleep(0.001)
        ended.set()
        await asyncio.gather(*workers)


def by_kind(report: GcReport) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for item in report.items:
        assert not item.error
        found.setdefault(item.kind, []).append(item.name)
    return found


async def litter(settings: Settings, engine: Engine) -> dict[str, list[str]]:
    """Some of everything that may go, beside what may not; what is expected to go."""
    kept = await entry(settings, "images", "named", "debian-bookworm")
    used = await entry(settings, "images", "used")
    await use(engine, "web", image=used)
    old = await entry(settings, "images", "superseded")
    kernel = await entry(settings, "kernels", "6.1", "debian-bookworm")
    spare = await entry(settings, "kernels", "6.0")
    assert {kept, used, old} == digests(settings, "images") and {kernel, spare} == digests(settings, "kernels")
    data = settings.data_dir
    (data / "staging" / "dead").mkdir()
    (data / "staging" / "dead" / "half").write_bytes(b"x" * 9000)
    caches = Store(settings).directory("cache", "initramfs")
    month = time.time() - 31 * 86400
    for name, when in (("old.cpio", month), ("new.cpio", time.time()), ("gone.tmp7", month)):
        (caches / name).write_bytes(b"x" * 5000)
        os.utime(caches / name, (when, when))
    for number, age in ((1, 300), (2, 200), (3, 100)):
        (data / f"stoker.db.v{number}.bak").write_bytes(b"backup" * 1000)
        os.utime(data / f"stoker.db.v{number}.bak", (time.time() - age,) * 2)
    return {
        "image": [old],
        "kernel": [spare],
        "staging": ["dead"],
        "initramfs": ["gone.tmp7", "old.cpio"],
        "backup": ["stoker.db.v1.bak", "stoker.db.v2.bak"],
    }


async def test_what_nothing_refers_to_goes_and_nothing_else(settings: Settings) -> None:
    async with opened(settings) as engine:
        expected = await litter(settings, engine)
        before = {kind: digests(settings, kind) for kind in ("images", "kernels")}
        dry = await engine.upkeep.gc(dry_run=True)
        found = by_kind(dry)
        assert {kind: sorted(names) for kind, names in found.items()} == expected
        assert before == {kind: digests(settings, kind) for kind in ("images", "kernels")}
        free = os.statvfs(settings.data_dir)
        report = await engine.upkeep.gc(dry_run=False)
        assert replace_dry(report) == dry
        assert report.freed == sum(report.by_kind.values()) > 0 and os.statvfs(settings.data_dir).f_bfree >= free.f_bfree - 4096
        assert digests(settings, "images") == before["images"] - set(expected["image"])
        assert (settings.data_dir / "cache/initramfs/new.cpio").exists() and (settings.data_dir / "stoker.db.v3.bak").exists()
        again = await engine.upkeep.gc(dry_run=False)
        assert again.items == [] and again.freed == 0


async def test_bases_that_no_disk_stands_on(settings: Settings) -> None:
    """A pool's own copy of an image goes (it is made again), and what is known of an image that is gone; nothing that is used."""
    async with opened(settings) as engine:
        await use(engine, "box")
        bases = settings.data_dir / "pool" / "bases"
        [key] = os.listdir(bases)
        (bases / key / "image").write_bytes(b"copy" * 100_000)
        assert (await engine.upkeep.gc(dry_run=False)).items == []
        await engine.destroy(ADMIN, "box")
        dry, whole = await engine.upkeep.gc(dry_run=True), (bases / key / "image").stat().st_blocks * 512
        assert by_kind(dry) == {"base": [str(bases / key)]} and dry.freed >= whole >= 400_000
        pool = engine._core.pools.open("")
        pool._coming = 1  # a disk that is being made may be about to stand on it
        [busy] = (await engine.upkeep.gc(dry_run=False)).items
        assert busy.error == "it is in use again" and (bases / key / "image").exists()
        pool._coming = 0
        report = await engine.upkeep.gc(dry_run=False)
        assert report.by_kind == {"base": dry.freed} and os.listdir(bases) == []
        # Known again with the next disk; without a copy it takes no room, and stays as long as its image does.
        await use(engine, "box")
        await engine.destroy(ADMIN, "box")
        assert (await engine.upkeep.gc(dry_run=False)).items == [] and os.listdir(bases) == [key]
        image = Path(os.readlink(bases / key / "path"))
        image.unlink()
        assert by_kind(await engine.upkeep.gc(dry_run=False)) == {"base": [str(bases / key)]} and os.listdir(bases) == []


def replace_dry(report: GcReport) -> GcReport:
    return changed(report, dry_run=True)


async def test_a_kernel_file_that_changed_is_superseded(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "vmlinux"
    file.write_text("kernel")
    async with opened(settings) as engine:
        store = Store(settings)
        kernel = await entry(settings, "kernels", str(file), file_pointer(file))
        assert (await engine.upkeep.gc(dry_run=False)).items == []
        file.write_text("kernel, built anew")
        assert [item.name for item in (await engine.upkeep.gc(dry_run=False)).items] == [kernel]
        assert store.names("kernels") == {}


async def test_packages_beyond_the_bound(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.engine.gc.PACKAGES_BOUND", 20000)
    monkeypatch.setattr("stoker.images.initramfs.USED_LATELY", 50)
    monkeypatch.setattr("stoker.engine.gc.INITRAMFS_BOUND", 20000)
    async with opened(settings) as engine:
        store = Store(settings)
        for age, suite in ((300, "bullseye"), (100, "bookworm")):
            place = store.directory("cache", "apt", suite)
            (place / "list").write_bytes(b"x" * 9000)
            os.utime(place, (time.time() - age,) * 2)
            cpio = store.directory("cache", "initramfs") / f"{suite}.cpio"
            cpio.write_bytes(b"x" * 15000)
            os.utime(cpio, (time.time() - age,) * 2)
        async with store.lock("kernel-bullseye"):
            [first, busy] = (await engine.upkeep.gc(dry_run=False)).items
            assert (first.kind, first.name, first.error) == ("initramfs", "bullseye.cpio", "")
            assert (busy.kind, busy.name) == ("packages", "bullseye") and busy.error
        assert by_kind(await engine.upkeep.gc(dry_run=False)) == {"packages": ["bullseye"]}


async def test_the_store_of_another_data_directory_is_left_alone(settings: Settings, short_dir: Path) -> None:
    """A link in place of a directory: who else uses what is in it is not known here."""
    theirs = replace(settings, data_dir=short_dir / "theirs", run_dir=short_dir / "other")
    spare = await entry(theirs, "images", "superseded there", "tag")
    (theirs.data_dir / "images/names/tag").unlink()
    settings.data_dir.mkdir()
    for name in ("images", "staging"):
        (settings.data_dir / name).symlink_to(theirs.data_dir / name)
    (theirs.data_dir / "staging/dead").mkdir()
    async with opened(settings) as engine:
        report = await engine.upkeep.gc(dry_run=False)
        assert report.items == [] and len(report.skipped) == 2
        with pytest.raises(Conflict) as refused:
            await engine.images.remove("images", spare)
        assert refused.value.code == "image_shared" and str(theirs.data_dir) in refused.value.hint
    assert digests(theirs, "images") == {spare} and (theirs.data_dir / "staging/dead").exists()


@pytest.mark.parametrize("point", ["remove.after_names", "remove.after_rename"])
async def test_killed_while_it_removes(settings: Settings, point: str) -> None:
    image = await entry(settings, "images", "one", "debian-bookworm")
    kept = await entry(settings, "images", "two", "mine")
    async with daemon(settings.data_dir, settings.run_dir, "host", point) as dying:
        assert await dying.ask(do="image_rm", name="debian:12") is None
    assert Store(settings).lookup("images", "debian-bookworm") is None, "the name leads somewhere"
    place = Store(settings).entry("images", image)
    assert not place.exists() or Store(settings).verify("images", image) == [], "half of an entry is left"
    async with opened(settings) as engine:
        assert (await engine.upkeep.gc(dry_run=False)).items
        assert (await engine.upkeep.fsck(repair=False)).clean
        assert digests(settings, "images") == {kept} and list((settings.data_dir / "staging").iterdir()) == []


@pytest.mark.parametrize("point", [f"gc.{when}_item:{number}" for when in ("before", "after") for number in (1, 3, 5)])
async def test_killed_while_it_frees(settings: Settings, point: str) -> None:
    async with Engine.open(settings, booter=HostBooter(), trace_kill="") as engine:
        expected = await litter(settings, engine)
    async with daemon(settings.data_dir, settings.run_dir, "host", point) as dying:
        assert await dying.ask(do="gc") is None
    async with opened(settings) as engine:
        await engine.upkeep.gc(dry_run=False)
        assert (await engine.upkeep.gc(dry_run=False)).items == []
        assert (await engine.upkeep.fsck(repair=False)).clean
        assert len(digests(settings, "images")) == 2 and not digests(settings, "images") & set(expected["image"])
        assert (await engine.get(ADMIN, "web")).state is S.STOPPED


async def test_golden_memory_whose_files_are_gone(settings: Settings, tmp_path: Path) -> None:
    def file(name: str) -> list[object]:
        (tmp_path / name).write_text(name)
        return [str(tmp_path / name), os.stat(tmp_path / name).st_ino, 4]

    memory = new_memory("golden", 1 << 20)
    place = settings.data_dir / "golden"
    async with opened(settings) as engine:
        place.mkdir()
        made_by = {
            "program": file("qemu"),
            "kernel": file("kernel"),
            "initrd": file("initrd"),
            "disks": [["root", "qcow2", [file("root")]]],
        }
        save(place / "good", memory, b"state", made_by)
        save(place / "orphan", memory, b"state", {**made_by, "kernel": file("old")})
        os.close(memory)
        (tmp_path / "old").unlink()
        (place / ".half.12.abcd").mkdir()
        assert by_kind(await engine.upkeep.gc(dry_run=True)) == {"golden": [".half.12.abcd", "orphan"]}
        async with locked(place / "half.lock"):  # somebody is just making it
            assert by_kind(await engine.upkeep.gc(dry_run=False)) == {"golden": ["orphan"]}
        assert by_kind(await engine.upkeep.gc(dry_run=False)) == {"golden": [".half.12.abcd"]}
        assert sorted(path.name for path in place.iterdir() if path.is_dir()) == ["good"]
