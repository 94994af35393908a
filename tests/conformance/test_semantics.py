"""What a clone is: the same for every strategy."""

from __future__ import annotations

import os
import random
import threading

import pytest

from stoker.errors import Conflict, InvalidRequest, NotFound
from stoker.storage.strategy import Clone, Strategy
from storage_disks import KIB, MIB, check_pattern, content, discard, size, write
from storage_places import Place

pytestmark = pytest.mark.timeout(300)


def test_a_clone_begins_as_its_base_and_keeps_to_itself(place: Place) -> None:
    original = place.base.path.read_bytes()
    with place.pool() as pool:
        assert pool.strategy is place.strategy
        one, two = pool.clone(place.base, "one"), pool.clone(place.base, "two", 8 * MIB)
        assert (one.size, two.size, size(one), size(two)) == (4 * MIB, 8 * MIB, 4 * MIB, 8 * MIB)
        assert content(one, place.scratch) == original
        assert content(two, place.scratch) == original + bytes(4 * MIB), "past the base's end there are zeros"
        write(one, 64 * KIB, 256 * KIB, 0x11)
        write(two, 0, 64 * KIB, 0x22)
        write(two, 7 * MIB, MIB, 0x33)
        mine = bytearray(original)
        mine[64 * KIB : 320 * KIB] = b"\x11" * (256 * KIB)
        assert content(one, place.scratch) == mine
        assert content(two, place.scratch) == b"\x22" * (64 * KIB) + original[64 * KIB :] + bytes(3 * MIB) + b"\x33" * MIB
        assert place.base.path.read_bytes() == original
        assert pool.names() == ["one", "two"]
        assert pool.users(place.base.path) == ["one", "two"]


def test_it_is_the_same_after_a_restart(place: Place) -> None:
    with place.pool() as pool:
        clone = pool.clone(place.base, "one", 8 * MIB)
        write(clone, 5 * MIB, MIB, 0x44)
        before = content(clone, place.scratch)
    with place.pool() as pool:
        again = pool.open_clone("one")
        assert again == pool.open_clone("one")
        assert (again.size, again.strategy) == (8 * MIB, place.strategy)
        assert content(again, place.scratch) == before


def test_clones_of_clones(place: Place) -> None:
    with place.pool() as pool:
        write(pool.clone(place.base, "a", 6 * MIB), 0, MIB, 1)
        write(pool.clone_of("a", "b"), MIB, MIB, 2)
        write(pool.clone_of("b", "c"), 2 * MIB, MIB, 3)
        write(pool.open_clone("a"), 5 * MIB, MIB, 9)
        a, b, c = (content(pool.open_clone(name), place.scratch) for name in "abc")
        base = place.base.path.read_bytes() + bytes(2 * MIB)
        ones, twos, threes = (bytes([n]) * MIB for n in (1, 2, 3))
        assert a == ones + base[MIB : 5 * MIB] + b"\x09" * MIB
        assert b == ones + twos + base[2 * MIB :]
        assert c == ones + twos + threes + base[3 * MIB :]
        pool.remove("b")
        pool.remove("a")
        assert content(pool.open_clone("c"), place.scratch) == c, "what it stands on stays as long as it does"
        assert pool.clone_of("c", "a").size == 6 * MIB, "a name is free again"


@pytest.mark.parametrize("order", ["abcd", "dcba", "cadb", "bdac"])
def test_removal_in_any_order_and_twice(place: Place, order: str) -> None:
    with place.pool() as pool:
        pool.clone(place.base, "a")
        pool.clone_of("a", "b")
        pool.clone_of("b", "c")
        write(pool.clone_of("a", "d"), 0, 64 * KIB, 7)
        expected = {name: content(pool.open_clone(name), place.scratch) for name in order}
        for position, name in enumerate(order):
            pool.remove(name)
            pool.remove(name)
            with pytest.raises(NotFound, match="no disk") as caught:
                pool.open_clone(name)
            assert caught.value.code == "clone_unknown"
            for rest in order[position + 1 :]:
                assert content(pool.open_clone(rest), place.scratch) == expected[rest]
        assert pool.names() == [] and pool.users(place.base.path) == []


def test_flatten_is_the_content_byte_for_byte(place: Place) -> None:
    """Random writes and discards through three generations; the flat file is what QEMU reads, and sparse."""
    chance = random.Random(4)
    with place.pool() as pool:
        names = ["a", "b", "c"]
        clone = pool.clone(place.base, "a", 16 * MIB)
        for before, name in zip([None, *names], names, strict=False):
            clone = pool.clone_of(before, name) if before else clone
            for _ in range(12):
                offset, length = chance.randrange(0, 15 * MIB, 4096), chance.randrange(4096, MIB, 4096)
                if chance.random() < 0.3:
                    discard(clone, offset, length)
                else:
                    write(clone, offset, length, chance.randrange(1, 256))
        for name in names:
            flat = place.scratch / f"flat-{name}"
            pool.flatten(name, flat)
            assert flat.read_bytes() == content(pool.open_clone(name), place.scratch)
            with pytest.raises(Conflict):
                pool.flatten(name, flat)
            flat.unlink()
        empty = pool.clone(place.base, "empty", 512 * MIB)
        pool.flatten("empty", place.scratch / "flat")
        found = os.stat(place.scratch / "flat")
        assert found.st_size == empty.size == 512 * MIB and found.st_blocks * 512 <= place.base.size, "holes stay holes"
        (place.scratch / "flat").unlink()


def test_growing(place: Place) -> None:
    with place.pool() as pool:
        pool.clone(place.base, "a")
        write(pool.open_clone("a"), 0, MIB, 5)
        before = content(pool.open_clone("a"), place.scratch)
        pool.clone_of("a", "b")
        for grown in (5 * MIB, 600 * MIB, 600 * MIB, 2048 * MIB):
            assert pool.grow("a", grown).size == grown
            assert size(pool.open_clone("a")) == grown
        write(pool.open_clone("a"), 2047 * MIB, MIB, 6)
        check_pattern(pool.open_clone("a"), 4 * MIB, 8 * MIB, 0)
        with place.scratch.joinpath("flat").open("wb"):
            pass
        (place.scratch / "flat").unlink()
        pool.flatten("a", place.scratch / "flat")
        with open(place.scratch / "flat", "rb") as flat:
            assert flat.read(4 * MIB) == before
        (place.scratch / "flat").unlink()
        assert pool.usage("a").own < 16 * MIB, "what was not written takes no space"
        assert size(pool.open_clone("b")) == 4 * MIB
        with pytest.raises(InvalidRequest, match="smaller"):
            pool.grow("a", 4 * MIB)
        with pytest.raises(InvalidRequest):
            pool.grow("a", 2048 * MIB + 100)


def test_what_is_deleted_is_given_back(place: Place) -> None:
    with place.pool() as pool:
        clone = pool.clone(place.base, "a", 64 * MIB)
        before = pool.usage("a").own
        write(clone, 8 * MIB, 32 * MIB, 0xAA)
        full = pool.usage("a").own
        assert full - before >= 32 * MIB
        discard(clone, 8 * MIB, 32 * MIB)
        os.sync()
        assert pool.usage("a").own - before <= 2 * MIB
        check_pattern(clone, 8 * MIB, 32 * MIB, 0)


def test_usage_counts_blocks(place: Place) -> None:
    data = place.base.path.stat().st_blocks * 512
    with place.pool() as pool:
        clone = pool.clone(place.base, "a", 1024 * MIB)
        fresh = pool.usage("a")
        assert fresh.apparent == 1024 * MIB
        shares = place.strategy != "copy"
        assert fresh.own <= 64 * KIB if shares else fresh.own == pytest.approx(data, abs=64 * KIB)
        assert fresh.shared == pytest.approx(data if shares else 0, abs=64 * KIB)
        write(clone, 100 * MIB, 3 * MIB, 1)
        os.sync()
        used = pool.usage("a")
        assert used.own - fresh.own == pytest.approx(3 * MIB, abs=512 * KIB)


def test_usage_of_clones_of_clones(place: Place) -> None:
    """What two of them have in common is nobody's own, where the strategy shares it; and it becomes the last one's."""
    data = place.base.path.stat().st_blocks * 512
    with place.pool() as pool:
        write(pool.clone(place.base, "a", 64 * MIB), 16 * MIB, 8 * MIB, 1)
        pool.clone_of("a", "b")
        write(pool.clone_of("b", "c"), 32 * MIB, 2 * MIB, 2)
        os.sync()
        a, b, c = (pool.usage(name) for name in "abc")
        assert {a.apparent, b.apparent, c.apparent} == {64 * MIB}
        assert c.own - b.own == pytest.approx(2 * MIB, abs=512 * KIB)
        assert b.own + b.shared == pytest.approx(data + 8 * MIB, abs=512 * KIB)
        if place.strategy in (Strategy.QCOW2, Strategy.REFLINK):
            assert a.own <= 512 * KIB and b.own <= 512 * KIB
        before = sum(usage.own for usage in (a, b, c))
        pool.remove("a")
        pool.remove("b")
        os.sync()
        left = pool.usage("c")
        assert left.own + left.shared == pytest.approx(data + 10 * MIB, abs=512 * KIB)
        assert left.own <= before or place.strategy is Strategy.REFLINK


def test_bases_are_forgotten_while_clones_are_made(place: Place) -> None:
    """By a clean-up at any moment: what stands on a base, or is about to, is never left without it. What is freed is counted."""
    ended = threading.Event()
    with place.pool() as pool:

        def clean() -> None:
            while not ended.is_set():
                pool.collect()

        cleaner = threading.Thread(target=clean)
        cleaner.start()
        try:
            for number in range(30):
                clone = pool.clone(place.base, f"c{number}")
                assert content(clone, place.scratch) == place.base.path.read_bytes()
                if number % 3 == 0:
                    pool.remove(f"c{number}")
        finally:
            ended.set()
            cleaner.join()
        assert pool.collect() == 0 and pool.unused() == []
        for name in pool.names():
            pool.remove(name)
        copied = [base.bytes for base in pool.unused()]
        assert len(copied) == (place.strategy is Strategy.REFLINK), "only a copy of a base takes room"
        assert not copied or copied[0] >= place.base.path.stat().st_blocks * 512
        freed = pool.collect()
        assert freed >= sum(copied) and os.listdir(place.directory / "bases") == []
        place.base.path.rename(place.scratch / "aside")
        assert pool.unused() == []


def test_names_and_sizes_are_checked(place: Place) -> None:
    with place.pool() as pool:
        for name in ("", ".", "..", "a/b", "-a", "a" * 65, "a\n"):
            with pytest.raises(InvalidRequest):
                pool.clone(place.base, name)
        with pytest.raises(InvalidRequest, match="smaller"):
            pool.clone(place.base, "a", MIB)
        pool.clone(place.base, "a")
        with pytest.raises(Conflict, match="already") as caught:
            pool.clone(place.base, "a")
        assert caught.value.code == "clone_exists"
        pool.clone(place.base, "b")
        with pytest.raises(Conflict):
            pool.clone_of("a", "b")
        with pytest.raises(NotFound):
            pool.clone_of("nobody", "c")
        assert pool.names() == ["a", "b"]


def test_the_things_of_a_disk_are_known_before_it_is_made(place: Place) -> None:
    with place.pool() as pool:
        before = pool.things("a")
        clone: Clone = pool.clone(place.base, "a", 8 * MIB)
        assert pool.things("a") == before
        assert before[-1].kind == "directory" and os.path.isdir(before[-1].name)
        if clone.path.is_relative_to(place.directory):
            assert clone.path.is_relative_to(before[-1].name)
