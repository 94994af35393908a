"""The pure parts of storage: tables, stores, composing layers, the choice of a strategy, the reserve of the fill watch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.engine.filling import period, reserve
from stoker.errors import HostError
from stoker.storage.compose import Piece, compose
from stoker.storage.exceptions import CHUNK, capacity, check_store, pieces, render_header
from stoker.storage.pool import Space, Trial, prefer
from stoker.storage.snapshot_device import origin_table, snapshot_table
from stoker.storage.strategy import Strategy

MIB, GIB = 1 << 20, 1 << 30


def test_tables() -> None:
    [line] = snapshot_table(GIB, "7:3", "7:4", discards=False)
    assert str(line) == "0 2097152 snapshot 7:3 7:4 P 8"
    [line] = snapshot_table(GIB, "7:3", "7:4", discards=True)
    assert str(line) == "0 2097152 snapshot 7:3 7:4 P 8 1 discard_zeroes_cow"
    assert [str(line) for line in origin_table(2 * GIB, "7:3", GIB)] == ["0 2097152 linear 7:3 0", "2097152 2097152 zero"]


@given(st.integers(1, 1 << 24).map(lambda chunks: chunks * CHUNK))
def test_a_store_has_room_for_every_chunk_and_its_metadata(size: int) -> None:
    chunks = size // CHUNK
    assert capacity(size) >= size + CHUNK * (1 + -(-chunks // 256))
    assert capacity(size) <= size * 1.005 + 4 * CHUNK


def test_what_a_store_says(tmp_path: Path) -> None:
    path = tmp_path / "cow"
    entries = [(5, 2), (6, 3), (1, 4)]
    table = b"".join(old.to_bytes(8, "little") + new.to_bytes(8, "little") for old, new in entries)
    path.write_bytes(render_header().ljust(CHUNK, b"\0") + table.ljust(CHUNK, b"\0") + bytes(3 * CHUNK))
    fd = os.open(path, os.O_RDONLY)
    try:
        found = list(pieces(fd, path))
        assert found == [Piece(CHUNK, CHUNK, 4 * CHUNK), Piece(5 * CHUNK, 2 * CHUNK, 2 * CHUNK)]
        os.truncate(path, 4 * CHUNK)
        with pytest.raises(HostError, match="not in it"):
            list(pieces(fd, path))
        path.write_bytes(b"\0" * 100)
        with pytest.raises(HostError, match="no copy-on-write store"):
            check_store(fd, path)
    finally:
        os.close(fd)


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.booleans()), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(RANGES, min_size=1, max_size=4))
def test_the_uppermost_layer_wins(tmp_path_factory: pytest.TempPathFactory, drawn: list[list[tuple[int, int, bool]]]) -> None:
    """Against the obvious way: paint from the bottom to the top."""
    directory, unit, size = tmp_path_factory.mktemp("layers"), 512, 64 * 512
    expected, layers, opened = bytearray(size), [], []
    try:
        for number, ranges in enumerate(drawn):
            fd = os.open(directory / str(number), os.O_RDWR | os.O_CREAT)
            opened.append(fd)
            os.pwrite(fd, bytes([number + 1]) * size, 0)
            end, own = 0, []
            for start, length, data in sorted(ranges):
                if start >= end:
                    own.append(Piece(start * unit, length * unit, start * unit if data else None))
                    end = start + length
            layers.append((fd, own))
        for number, (_, own) in reversed(list(enumerate(layers))):
            for piece in own:
                stop = min(size, piece.start + piece.length)
                if piece.start < stop:
                    value = 0 if piece.at is None else number + 1
                    expected[piece.start : stop] = bytes([value]) * (stop - piece.start)
        out = os.open(directory / "out", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        opened.append(out)
        os.ftruncate(out, size)
        compose(layers, size, out)
        assert os.pread(out, size, 0) == expected
    finally:
        for fd in opened:
            os.close(fd)


def test_the_first_that_works_and_is_not_far_slower() -> None:
    dm, reflink, copy = Strategy.DM_SNAPSHOT, Strategy.REFLINK, Strategy.COPY
    assert prefer([Trial(dm, 0.05), Trial(reflink, 0.004), Trial(copy, 0.01)]) is dm
    assert prefer([Trial(dm, 0.0, "no"), Trial(reflink, 0.004), Trial(copy, 0.01)]) is reflink
    assert prefer([Trial(dm, 1.0), Trial(reflink, 0.004), Trial(copy, 0.01)]) is reflink
    with pytest.raises(HostError, match="dm-snapshot: no"):
        prefer([Trial(dm, 0.0, "no")])


def test_the_watch_looks_again_before_the_reserve_is_used_up() -> None:
    assert [reserve(size) for size in (100 * MIB, 10 * GIB, 1000 * GIB)] == [16 * MIB, 10 * GIB // 100, 256 * MIB]
    for free in range(0, 64 * GIB, 97 * MIB):
        space = Space(1000 * GIB, free)
        assert 0.05 <= period(space) <= 2.0
        assert period(space) * 4096 * MIB <= max(free - reserve(space.total), 0.05 * 4096 * MIB)
