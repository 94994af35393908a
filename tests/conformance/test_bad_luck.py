"""What may go wrong, goes wrong, on each strategy: a clear error or a clean recovery, no other disk touched, nothing left."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from stoker.errors import CapacityExhausted, Conflict, HostError, NotFound, StokerError
from stoker.host import loop
from stoker.host.mounts import umount
from stoker.storage import layout, overlay, reflink, snapshot_device, target
from stoker.storage.layout import no_space
from stoker.storage.pool import Pool
from stoker.storage.strategy import Strategy
from storage_disks import KIB, MIB, check_pattern, content, size, write
from storage_places import Place, file_system, fill, left, make_base
from storage_worker import main as work

pytestmark = pytest.mark.timeout(300)
WORKER = Path(__file__).parent.parent / "storage_worker.py"


@contextmanager
def worker(place: Place, point: str, verb: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, str(WORKER), str(place.directory), place.strategy.value, str(place.base.path), str(place.base.size)]
    process = subprocess.Popen([*argv, point, verb, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def killed(place: Place, point: str, verb: str, *words: str) -> bool:
    """Does it in a process of its own, a copy of this one; True when that died at the point."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(str(place.directory), place.strategy.value, str(place.base.path), str(place.base.size), point, verb, *words)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def points(strategy: Strategy, verb: str) -> tuple[str, ...]:
    """The points that a verb passes with a strategy."""
    device = strategy is Strategy.DM_SNAPSHOT
    match verb:
        case "clone":
            copies = reflink.IMPORT if strategy is Strategy.REFLINK else ()
            return (*layout.MAKE, *copies, *(snapshot_device.ACTIVATE if device else ()))
        case "clone_of":
            freezes = layout.FREEZE if strategy is Strategy.QCOW2 else ()
            return (*layout.MAKE, *freezes, *((*snapshot_device.ACTIVATE, *snapshot_device.SUSPENDED) if device else ()))
        case "grow":
            return snapshot_device.GROW if device else overlay.GROW if strategy is Strategy.QCOW2 else ()
        case "flatten":
            return (*target.FLATTEN, *(snapshot_device.SUSPENDED if device else ()))
        case "remove":
            return (*layout.REMOVE, *(snapshot_device.DEACTIVATE if device else ()))
        case "remove_last":
            return layout.DROP if strategy is Strategy.QCOW2 else ()
    raise AssertionError(verb)


@pytest.mark.parametrize("verb", ["clone", "clone_of", "remove", "remove_last"])
def test_kill_9_between_any_two_steps(place: Place, verb: str) -> None:
    for point in points(place.strategy, verb):
        with place.pool() as pool:
            write(pool.clone(place.base, "bystander", 6 * MIB), 0, MIB, 1)
            pool.clone(place.base, "source")
            write(pool.open_clone("source"), MIB, MIB, 2)
            if verb.startswith("remove"):
                pool.clone_of("source", "victim")
            if verb == "remove_last":
                pool.remove("source")
            before = {name: content(pool.open_clone(name), place.scratch) for name in pool.names()}
        words = {"clone": ("victim", str(8 * MIB)), "clone_of": ("source", "victim")}.get(verb, ("victim",))
        # A base is copied in with its first clone.
        base = make_base(place.scratch / "another.img") if point in reflink.IMPORT else place.base
        assert killed(replace(place, base=base), point, verb.removesuffix("_last"), *words), f"{point} was never reached"
        with place.pool() as pool:
            for name in pool.names():
                if name in before:
                    assert content(pool.open_clone(name), place.scratch) == before[name], f"{name} changed at {point}"
                else:
                    assert name == "victim"
                    whole = place.base.path.read_bytes() if verb == "clone" else before["source"]
                    assert content(pool.open_clone(name), place.scratch)[: 4 * MIB] == whole[: 4 * MIB], point
            assert before.keys() - {"victim"} <= set(pool.names()), point
            # What the engine does with a create or destroy that was not finished.
            pool.remove("victim")
            assert pool.clone(place.base, "victim").size == place.base.size, "the name is free"
            for name in pool.names():
                pool.remove(name)
            pool.collect()
        assert left(place) == [], point


def test_kill_9_while_a_disk_grows(place: Place) -> None:
    """It has the one size or the other, its content and zeros behind; growing it again is all there is to do."""
    for point in points(place.strategy, "grow"):
        with place.pool() as pool:
            write(pool.clone(place.base, "victim"), 0, MIB, 1)
            before = content(pool.open_clone("victim"), place.scratch)
        assert killed(place, point, "grow", "victim", str(1024 * MIB)), f"{point} was never reached"
        with place.pool() as pool:
            found = pool.open_clone("victim").size
            assert found in (len(before), 1024 * MIB) and size(pool.open_clone("victim")) == found, point
            assert pool.grow("victim", 1024 * MIB).size == size(pool.open_clone("victim")) == 1024 * MIB
            pool.flatten("victim", place.scratch / "flat")
            with open(place.scratch / "flat", "rb") as file:
                assert file.read(len(before)) == before
                assert file.read(MIB) == bytes(MIB)
            (place.scratch / "flat").unlink()
            check_pattern(pool.open_clone("victim"), len(before), MIB, 0)
            write(pool.open_clone("victim"), 1023 * MIB, MIB, 2)
            pool.remove("victim")


def test_kill_9_while_a_disk_is_flattened(place: Place) -> None:
    """The file is there whole or not at all, and the disk can be used."""
    flat = place.scratch / "flat"
    for point in points(place.strategy, "flatten"):
        with place.pool() as pool:
            write(pool.clone(place.base, "victim"), 0, MIB, 1)
            before = content(pool.open_clone("victim"), place.scratch)
        there = set(os.listdir(place.scratch))
        assert killed(place, point, "flatten", "victim", str(flat)), f"{point} was never reached"
        assert set(os.listdir(place.scratch)) - there == ({"flat"} if point == "file.after_link" else set()), point
        assert not flat.exists() or flat.read_bytes() == before
        flat.unlink(missing_ok=True)
        with place.pool() as pool:
            assert content(pool.open_clone("victim"), place.scratch) == before
            pool.flatten("victim", flat)
            # It stands on nothing: not on the disk, not on what that stood on.
            pool.remove("victim")
            pool.collect()
            assert flat.read_bytes() == before
            flat.unlink()


def test_a_clean_up_that_is_killed_is_done_again(place: Place) -> None:
    with place.pool() as pool:
        pool.clone(place.base, "victim")
    for point in points(place.strategy, "remove"):
        killed(place, point, "remove", "victim")
    with place.pool() as pool:
        assert pool.names() == []
        pool.remove("victim")
    assert [thing for thing in left(place) if "refs" not in thing] == []


@pytest.fixture
def narrow(place: Place) -> Iterator[Place]:
    """The same strategy in a small file system of its own."""
    point, kind = place.scratch / "narrow", "xfs" if place.strategy is Strategy.REFLINK else "ext4"
    with file_system(place.scratch / "narrow.img", point, 24 * MIB, kind):
        (point / "pool").mkdir()
        found = Place(place.strategy, point / "pool", make_base(place.scratch / "narrow-base", MIB), place.scratch)
        yield found
        with found.pool() as pool:
            for name in pool.names():
                pool.remove(name)
            pool.collect()
        assert left(found) == []


def test_no_space_at_any_write(narrow: Place) -> None:
    """With a little more space each time, up to where all goes well: an error in our words, and nothing of it left."""
    outcomes = []
    with narrow.pool() as pool:
        write(pool.clone(narrow.base, "bystander", 2 * MIB), 0, 128 * KIB, 1)
        before = content(pool.open_clone("bystander"), narrow.scratch)
        for blocks in (*range(0, 12), 16, 24, 32, 48, 64, 96, 128, 192, 256, 512):
            fill(narrow.directory.parent, blocks * 4 * KIB)
            for make in ("clone", "clone_of", "flatten", "open"):
                flat, other = narrow.directory.parent / "flat", narrow.directory.parent / "other"
                try:
                    if make == "clone":
                        pool.clone(narrow.base, "victim")
                    elif make == "clone_of":
                        pool.clone_of("bystander", "victim")
                    elif make == "flatten":
                        pool.flatten("bystander", flat)
                    else:
                        with no_space():
                            other.mkdir(exist_ok=True)
                        Pool.open(other, narrow.strategy).close()
                    outcomes.append((make, "made"))
                except CapacityExhausted as error:
                    assert error.code == "no_space"
                    outcomes.append((make, "full"))
                    assert not flat.exists()
                    assert pool.names() == ["bystander"]
                pool.remove("victim")
                flat.unlink(missing_ok=True)
                shutil.rmtree(other, ignore_errors=True)
            assert content(pool.open_clone("bystander"), narrow.scratch) == before
    (narrow.directory.parent / "filler").unlink()
    for make in ("clone", "clone_of", "flatten", "open"):
        assert (make, "made") in outcomes, "with enough space it works again"
    assert {("flatten", "full"), ("open", "full")} <= set(outcomes)
    if narrow.strategy is Strategy.COPY:
        assert {("clone", "full"), ("clone_of", "full")} <= set(outcomes)


def test_two_daemons_on_one_pool(place: Place) -> None:
    with worker(place, "", "hold") as first:
        with pytest.raises(Conflict) as caught:
            Pool.open(place.directory, place.strategy)
        assert caught.value.code == "pool_in_use"
        assert f"stoker serve (process {first.pid})" in caught.value.message
        first.kill()
        first.wait()
        Pool.open(place.directory, place.strategy).close()


def test_a_pool_that_is_unmounted_underneath(place: Place) -> None:
    point = place.scratch / "mounted"
    kind = "xfs" if place.strategy is Strategy.REFLINK else "ext4"
    with file_system(place.scratch / "mounted.img", point, 64 * MIB, kind):
        with closing(Pool.open(point, place.strategy)) as pool:
            pool.clone(place.base, "a")
            if place.strategy is Strategy.DM_SNAPSHOT:
                pool.remove("a")  # its loop device would hold the file system
            umount(point, lazily=True)
            for use in (
                lambda: pool.clone(place.base, "b"),
                lambda: pool.clone_of("a", "b"),
                lambda: pool.remove("a"),
                lambda: pool.names(),
                lambda: pool.collect(),
                lambda: pool.open_clone("a"),
                lambda: pool.usage("a"),
                lambda: pool.grow("a", 8 * MIB),
                lambda: pool.flatten("a", place.scratch / "flat"),
                lambda: pool.check(),
            ):
                with pytest.raises(HostError) as caught:
                    use()
                assert caught.value.code == "pool_unmounted"
            assert list(point.iterdir()) == [], "nothing is written below"


def _spoil(data: bytes, where: int, with_what: bytes) -> bytes:
    return data[:where] + with_what + data[where + len(with_what) :]


def test_a_corrupt_or_foreign_disk_is_refused(place: Place) -> None:
    with place.pool() as pool:
        pool.clone(place.base, "good")
        pool.clone(place.base, "bad")
        good = content(pool.open_clone("good"), place.scratch)
        path = place.directory / "clones" / "bad" / "disk.0"
        if place.strategy is Strategy.DM_SNAPSHOT:
            pool._by_strategy[place.strategy].close("bad")  # type: ignore[attr-defined]
        with open(path, "rb") as file:
            whole = file.read(1 << 20)
        spoiled = [b"", b"x" * 100]
        if place.strategy is Strategy.QCOW2:
            name = b"/etc/shadow"
            spoiled += [
                _spoil(whole, 0, b"JUNK"),
                _spoil(whole, 4, b"\0\0\0\2"),
                _spoil(_spoil(whole, 8, (600).to_bytes(8, "big") + len(name).to_bytes(4, "big")), 600, name),
                _spoil(whole, 72, (4).to_bytes(8, "big")),
                _spoil(whole, 24, b"\xff" * 8),
                _spoil(whole, 40, (1 << 50).to_bytes(8, "big")),
                whole[:100],
            ]
        elif place.strategy is Strategy.DM_SNAPSHOT:
            spoiled += [_spoil(whole, 0, b"JUNK"), _spoil(whole, 4, bytes(4)), _spoil(whole, 12, b"\x10\0\0\0")]
        for data in spoiled:
            path.write_bytes(data)
            for use in (pool.open_clone, pool.usage, lambda name: pool.flatten(name, place.scratch / "flat")):
                if use == pool.usage and place.strategy is Strategy.DM_SNAPSHOT:
                    continue  # it counts blocks and does not look inside
                with pytest.raises(HostError) as caught:
                    use("bad")
                assert caught.value.code == "clone_corrupt"
            assert not (place.scratch / "flat").exists()
        (path.parent / "record").unlink()
        (path.parent / "record").symlink_to("../../../etc/passwd")
        with pytest.raises(HostError) as caught:
            pool.open_clone("bad")
        assert caught.value.code == "clone_corrupt"
        (path.parent / "record").unlink()
        with pytest.raises(NotFound):
            pool.open_clone("bad")
        pool.remove("bad")
        assert content(pool.open_clone("good"), place.scratch) == good


def test_a_base_that_changed_or_went_away(place: Place) -> None:
    aside = place.scratch / "aside"
    with place.pool() as pool:
        pool.clone(place.base, "a")
        before = content(pool.open_clone("a"), place.scratch)
        if place.strategy is Strategy.DM_SNAPSHOT:
            pool._by_strategy[place.strategy].close("a")  # type: ignore[attr-defined]
        place.base.path.rename(aside)
        stands = place.strategy in (Strategy.QCOW2, Strategy.DM_SNAPSHOT)
        if stands:
            with pytest.raises(HostError) as caught:
                pool.open_clone("a")
            assert caught.value.code == "base_missing"
            make_base(place.base.path)
            with pytest.raises(HostError) as caught:
                pool.open_clone("a")
            assert caught.value.code == "base_changed"
        with pytest.raises(HostError) as caught:
            place.base.path.unlink(missing_ok=True)
            pool.clone(place.base, "b")
        assert caught.value.code == "base_missing"
        aside.rename(place.base.path)
        assert content(pool.open_clone("a"), place.scratch) == before


def test_a_disk_in_use(place: Place) -> None:
    """A file goes with its last user; a device stays whole until nobody has it open, and says who has."""
    with place.pool() as pool:
        clone = pool.clone(place.base, "a")
        with open(clone.path, "rb") as held:
            if place.strategy is Strategy.DM_SNAPSHOT:
                with pytest.raises(HostError) as caught:
                    pool.remove("a")
                assert caught.value.code == "device_busy"
                assert f"process {os.getpid()} " in caught.value.message
                assert pool.users(place.base.path) == ["a"], "a failed removal keeps its reference"
                assert content(pool.open_clone("a"), place.scratch) == place.base.path.read_bytes()
            else:
                pool.remove("a")
                assert os.fstat(held.fileno()).st_nlink == 0
        pool.remove("a")
        assert pool.names() == []


def test_loop_devices_are_exhausted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(control: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loop, "_free_number", none_left)
    with pytest.raises(CapacityExhausted) as caught:
        loop.attach(place.base.path)
    assert caught.value.code == "loops_exhausted"
    if place.strategy is not Strategy.DM_SNAPSHOT:
        with place.pool() as pool:
            pool.clone(place.base, "a")  # needs none
        return
    monkeypatch.undo()
    with place.pool() as pool:
        monkeypatch.setattr(loop, "_free_number", none_left)
        with pytest.raises(CapacityExhausted):
            pool.clone(place.base, "a")
        assert pool.names() == []
        monkeypatch.undo()
        pool.clone(place.base, "a")


def test_a_strategy_that_does_not_work_here_is_refused_in_words(short_dir: Path) -> None:
    (short_dir / "pool").mkdir()
    with pytest.raises(StokerError) as caught:
        Pool.open(short_dir / "pool", Strategy.REFLINK)
    assert caught.value.code == "strategy_unsupported" and "share blocks" in caught.value.message
    with closing(Pool.open(short_dir / "pool")) as pool:
        assert pool.strategy is Strategy.QCOW2
    with pytest.raises(HostError) as missing:
        Pool.open(short_dir / "nowhere")
    assert missing.value.code == "pool_missing"
