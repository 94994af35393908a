"""The store: whole or not there, verified by digest, shared by processes that may be killed."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from stoker.errors import HostError, NotFound
from stoker.host.files import remove_tree
from stoker.host.lock import hold_directory, locked
from stoker.images.store import Stage, Store
from stoker.settings import Settings, load_settings

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    environment = {"STOKER_DATA_DIR": str(tmp_path / "data"), "STOKER_CONFIG": str(tmp_path / "none.toml")}
    return load_settings(environment, root=False)


@pytest.fixture
def store(settings: Settings) -> Store:
    return Store(settings)


def fill(stage: Stage, content: bytes = b"content") -> Path:
    tree = stage.path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "rootfs.ext4").write_bytes(content)
    (tree / "sub" / "other").write_bytes(b"other")
    return tree


def sha256sum(place: Path) -> list[str]:
    done = subprocess.run(["sha256sum", "--check", "--strict", "SUMS"], cwd=place, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


async def publish(store: Store, content: bytes = b"content", name: str = "a name") -> str:
    async with store.stage() as stage:
        digest = store.publish(stage, fill(stage, content), "images", name, {"size": len(content)})
    store.point("images", "pointer", digest)
    return digest


async def test_an_entry_is_found_by_name_and_by_digest_and_checks_with_sha256sum(store: Store) -> None:
    assert store.lookup("images", "pointer") is None
    digest = await publish(store)
    for name in ("pointer", digest):
        found = store.lookup("images", name)
        assert found is not None
        assert (found[0], found[1].name, found[1].facts) == (digest, "a name", {"size": 7})
    assert store.names("images") == {"pointer": digest}
    place = store.entry("images", digest)
    assert sha256sum(place) == ["rootfs.ext4: OK", "sub/other: OK"]
    assert list((store.root / "staging").iterdir()) == []


async def test_the_same_content_is_one_entry(store: Store) -> None:
    first = await publish(store)
    before = store.entry("images", first).stat().st_ino
    assert await publish(store) == first
    assert store.entry("images", first).stat().st_ino == before
    assert await publish(store, b"different") != first


@pytest.mark.parametrize("harm", ["change", "remove", "add", "manifest", "sums", "garble"])
async def test_damage_is_named_and_a_new_build_replaces_the_entry(store: Store, harm: str) -> None:
    digest = await publish(store)
    place = store.entry("images", digest)
    await store.require_intact("images", digest)
    match harm:
        case "change":
            (place / "sub" / "other").write_bytes(b"0ther")
        case "remove":
            (place / "rootfs.ext4").unlink()
        case "add":
            (place / "sub" / "more").write_bytes(b"")
        case "manifest":
            (place / "manifest.json").write_bytes((place / "manifest.json").read_bytes().replace(b"a name", b"b name"))
        case "sums":
            (place / "SUMS").write_bytes((place / "SUMS").read_bytes().replace(b"rootfs", b"footrs"))
        case "garble":
            (place / "manifest.json").write_bytes(b"{")
            with pytest.raises(HostError, match="manifest.json cannot be read"):
                store.lookup("images", "pointer")
    damage = store.verify("images", digest)
    assert len(damage) == 1
    assert {"change": "other", "remove": "rootfs", "add": "more"}.get(harm, "") in damage[0]
    (place / "SEAL").unlink()
    with pytest.raises(HostError) as caught:
        await store.require_intact("images", digest)
    assert caught.value.code == "image_corrupt"
    assert damage[0] in caught.value.message
    assert await publish(store) == digest
    assert store.verify("images", digest) == []
    with pytest.raises(NotFound):
        store.verify("images", "0" * 64)


async def test_what_has_been_touched_is_hashed_once_more_and_sealed_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = await publish(store)
    path = store.entry("images", digest) / "rootfs.ext4"
    hashed: list[str] = []
    monkeypatch.setattr(Store, "verify", lambda self, kind, digest: hashed.append(digest) or [])
    await store.require_intact("images", digest)
    assert hashed == []
    os.utime(path, (1, 1))
    await store.require_intact("images", digest)
    await store.require_intact("images", digest)
    assert hashed == [digest]
    monkeypatch.undo()
    path.write_bytes(b"CONTENT")  # as long as before
    with pytest.raises(HostError, match="rootfs.ext4 has changed"):
        await store.require_intact("images", digest)


async def test_a_failed_build_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError):
        async with store.stage() as stage:
            tree = fill(stage)
            (tree / "sub").chmod(0)
            raise RuntimeError
    assert list((store.root / "staging").iterdir()) == []
    assert not (store.root / "images").exists()


async def test_a_cancelled_build_leaves_nothing(store: Store) -> None:
    started = asyncio.Event()

    async def build() -> None:
        async with store.stage() as stage:
            fill(stage)
            started.set()
            await asyncio.sleep(60)

    task = asyncio.ensure_future(build())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((store.root / "staging").iterdir()) == []


KILLED = """
import asyncio, os, sys
from pathlib import Path
from stoker.images.store import Store
from stoker.settings import load_settings

async def main():
    store = Store(load_settings({"STOKER_DATA_DIR": sys.argv[1], "STOKER_CONFIG": "/nonexistent"}, root=False))
    async with store.lock("thing"), store.stage() as stage:
        outside = Path(sys.argv[2])
        stage.elsewhere(outside)
        outside.mkdir()
        (outside / "file").write_text("x")
        (stage.path / "partial").write_text("x")
        if len(sys.argv) > 3:
            os.set_inheritable(stage.lock_fd, True)
            if os.fork() == 0:
                os.execvp("sleep", ["sleep", "60"])
        print("ready", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def start_builder(*words: object) -> subprocess.Popen[bytes]:
    """A process in the middle of a build, to be killed."""
    argv = [sys.executable, "-c", KILLED, *map(str, words)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


async def test_what_a_killed_run_left_is_swept_and_what_lives_is_not(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    with start_builder(store.root, outside) as process:
        await store.sweep()
        assert len(list((store.root / "staging").iterdir())) == 1
        assert outside.exists()
        process.kill()
        process.wait()
    await store.sweep()
    assert list((store.root / "staging").iterdir()) == []
    assert not outside.exists()
    async with asyncio.timeout(1), store.lock("thing"):
        pass  # its lock went with it


async def test_a_stage_is_kept_while_a_tool_of_the_killed_run_still_writes_there(store: Store, tmp_path: Path) -> None:
    with start_builder(store.root, tmp_path / "outside", "fork") as process:
        process.kill()
        process.wait()
        await store.sweep()
        assert len(list((store.root / "staging").iterdir())) == 1
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while list((store.root / "staging").iterdir()) and time.monotonic() < deadline:
        await store.sweep()
        await asyncio.sleep(0.02)
    assert list((store.root / "staging").iterdir()) == []


async def test_whoever_waits_is_told_once(store: Store) -> None:
    class Told:
        steps: list[str] = []

        def step(self, name: str, done: float | None, total: float | None, detail: str = "") -> None:
            self.steps.append(name)

    order: list[str] = []

    async def second() -> None:
        async with store.lock("thing", Told(), "another run is at it"):
            order.append("second")

    async with store.lock("thing", Told(), "never said"):
        task = asyncio.ensure_future(second())
        await asyncio.sleep(0.2)
        order.append("first")
    await task
    assert order == ["first", "second"]
    assert Told.steps == ["another run is at it"]


async def test_waiting_can_be_cancelled_and_does_not_keep_the_lock(tmp_path: Path) -> None:
    async def wait() -> None:
        async with locked(tmp_path / "lock"):
            pass

    async with locked(tmp_path / "lock"):
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with asyncio.timeout(1):
        await wait()


def test_a_directory_that_is_gone_cannot_be_held(tmp_path: Path) -> None:
    assert hold_directory(tmp_path / "none") is None
    (tmp_path / "file").touch()
    assert hold_directory(tmp_path / "file") is None
    (tmp_path / "dir").mkdir()
    fd = hold_directory(tmp_path / "dir")
    assert fd is not None
    assert hold_directory(tmp_path / "dir") is None
    os.close(fd)


def test_too_little_space_is_said_beforehand(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Space = namedtuple("Space", "f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda _: Space(1000, 4096))
    store.require_space(4096 * 1000, "it")
    with pytest.raises(HostError, match="it needs 400 MiB and 3 MiB are free") as caught:
        store.require_space(400 << 20, "it")
    assert caught.value.code == "no_space"


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (OSError(errno.ENOSPC, "full"), "no_space"),
        (OSError(errno.EDQUOT, "quota"), "no_space"),
        (
            HostError("tool_failed", "tar exited with 2: write error", details={"stderr": ["tar: No space left on device"]}),
            "no_space",
        ),
        (HostError("tool_failed", "tar exited with 2: bad archive"), "tool_failed"),
        (PermissionError(errno.EACCES, "refused", "/x"), "data_dir_refused"),
    ],
)
def test_a_full_disk_has_one_name(store: Store, raised: Exception, code: str) -> None:
    with pytest.raises(HostError) as caught, store.writing("it"):
        raise raised
    assert caught.value.code == code


def test_a_data_directory_that_cannot_be_made(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"in the way")
    with pytest.raises(HostError) as caught:
        Store(settings).directory("cache")
    assert caught.value.code == "data_dir_refused"


async def test_the_store_can_be_read_by_others_whatever_the_umask(store: Store) -> None:
    before = os.umask(0o077)
    try:
        digest = await publish(store)
    finally:
        os.umask(before)
    assert store.root.stat().st_mode & 0o777 == 0o711
    assert (store.root / "images").stat().st_mode & 0o777 == 0o755
    assert store.entry("images", digest).stat().st_mode & 0o777 == 0o755


def test_a_tree_with_closed_directories_is_removed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").touch()
    (tree / "link").symlink_to(tmp_path)
    (tree / "a" / "b").chmod(0)
    (tree / "a").chmod(0o500)
    (tmp_path / "kept").touch()
    remove_tree(tree)
    assert not tree.exists()
    assert (tmp_path / "kept").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
async def test_removal_stops_at_mounts_and_the_sweep_takes_them_away(store: Store, tmp_path: Path) -> None:
    kept, garbage = tmp_path / "kept", store.directory("staging") / "0123"
    for directory in (kept, garbage / "a b" / "inner"):
        directory.mkdir(parents=True)
    (kept / "precious").touch()
    mount(kept, garbage / "a b" / "inner")  # of the same file system: its device number tells nothing
    with pytest.raises(OSError, match="mounted") as caught:
        remove_tree(garbage)
    assert caught.value.errno == errno.EBUSY
    assert (garbage / "a b" / "inner" / "precious").exists()
    await store.sweep()
    assert not garbage.exists()
    assert (kept / "precious").exists()


def mount(source: Path, target: Path) -> None:
    if subprocess.run(["mount", "--bind", source, target], capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
