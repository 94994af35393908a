"""The empty overlay, field by field."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.errors import InvalidRequest
from stoker.storage.overlay import CLUSTER, L2_COVERS, REFCOUNTS_PER_BLOCK, allocated, create_overlay, render_overlay
from stoker.storage.overlay_writer import OverlayWriter

GIB = 1 << 30


def image(size: int) -> bytes:
    length, pieces = render_overlay(size)
    data = bytearray(length)
    for offset, piece in pieces:
        data[offset : offset + len(piece)] = piece
    return bytes(data)


@settings(max_examples=50)
@given(st.integers(1, 64 << 31).map(lambda sectors: sectors * 512))
def test_every_cluster_of_the_file_is_counted_and_the_tables_do_not_overlap(size: int) -> None:
    data = image(size)
    fields = struct.unpack_from(">4sIQIIQIIQQIIQQQQII", data)
    magic, version, backing, backing_size, bits, virtual, crypt, l1_entries, l1, table, table_clusters, snapshots, _, *rest = fields
    assert (magic, version, backing, backing_size, bits, virtual, crypt) == (b"QFI\xfb", 3, 0, 0, 16, size, 0)
    assert (table_clusters, snapshots, rest) == (1, 0, [0, 0, 0, 4, 104])
    assert l1_entries * 512 * (1 << 20) >= size > (l1_entries - 1) * 512 * (1 << 20)
    block = struct.unpack_from(">Q", data, table)[0]
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    used = [0, table, block, *(l1 + i * CLUSTER for i in range(l1_clusters))]
    assert len(set(used)) == len(used) == len(data) // CLUSTER
    counts = struct.unpack_from(f">{CLUSTER // 2}H", data, block)
    assert counts == (1,) * len(used) + (0,) * (CLUSTER // 2 - len(used))
    assert not any(data[l1 : l1 + l1_clusters * CLUSTER]), "nothing is allocated in an empty overlay"


def test_a_disk_is_never_smaller_than_what_it_covers(tmp_path: Path) -> None:
    backing = tmp_path / "base"
    backing.touch()
    os.truncate(backing, 3 * GIB + 100)
    create_overlay(tmp_path / "a", backing, GIB)
    assert struct.unpack_from(">Q", (tmp_path / "a").read_bytes(), 24)[0] == 3 * GIB + 512
    create_overlay(tmp_path / "b", backing, 8 * GIB)
    assert struct.unpack_from(">Q", (tmp_path / "b").read_bytes(), 24)[0] == 8 * GIB


def test_the_file_is_new_private_small_and_without_the_name_of_its_backing_file(tmp_path: Path) -> None:
    backing = tmp_path / "the-base"
    backing.write_bytes(b"x" * 4096)
    path = tmp_path / "overlay"
    create_overlay(path, backing, 0)
    found = path.stat()
    assert found.st_mode & 0o777 == 0o600
    assert found.st_blocks * 512 <= 64 << 10
    assert b"the-base" not in path.read_bytes()
    with pytest.raises(FileExistsError):
        create_overlay(path, backing, 0)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        create_overlay(link, backing, 0)


@pytest.mark.parametrize("size", [0, -512, 513, (64 << 40) + 512])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(InvalidRequest, match="cannot be made"):
        render_overlay(size)


def test_a_disk_that_comes_from_elsewhere(tmp_path: Path) -> None:
    """Data, zeros across tables, holes; QEMU's own tools find nothing wrong, and the same content."""
    size, path, content = 3 * L2_COVERS + 5 * CLUSTER + 512, tmp_path / "disk", os.urandom(3 * CLUSTER)
    with open(path, "xb+") as file:
        writer = OverlayWriter(file.fileno(), size)
        writer.data(CLUSTER, content)
        writer.zeros(L2_COVERS - 2 * CLUSTER, L2_COVERS + 3 * CLUSTER)
        writer.data(2 * L2_COVERS + CLUSTER, content[: CLUSTER + 512])
        writer.zeros(3 * L2_COVERS, 5 * CLUSTER + 512)
        writer.finish()
        pieces = list(allocated(file.fileno(), path))
    data, zero, partial, last = pieces
    assert (data.start, data.length) == (CLUSTER, len(content)) and path.read_bytes()[data.at or 0 :][: len(content)] == content
    assert (zero.start, zero.length, zero.at) == (L2_COVERS - 2 * CLUSTER, L2_COVERS + 3 * CLUSTER, None)
    assert (partial.start, partial.length) == (2 * L2_COVERS + CLUSTER, 2 * CLUSTER)
    assert (last.start, last.length, last.at) == (3 * L2_COVERS, 5 * CLUSTER + 512, None)
    subprocess.run(["qemu-img", "check", "-f", "qcow2", path], check=True, capture_output=True)


def test_one_with_more_than_a_block_of_counts(tmp_path: Path) -> None:
    """More than 2 GiB of content: a second block counts what the first cannot."""
    path = tmp_path / "disk"
    with open(path, "xb+") as file:
        writer = OverlayWriter(file.fileno(), 1 << 33)
        writer._next += REFCOUNTS_PER_BLOCK - 5  # as if as much had been written
        writer.data(0, b"x" * CLUSTER * 8)
        writer.finish()
        table = struct.unpack(">4Q", os.pread(file.fileno(), 32, CLUSTER))
        assert table[0] == 2 * CLUSTER and table[1] and not table[2]
        second = struct.unpack(f">{CLUSTER // 2}H", os.pread(file.fileno(), CLUSTER, table[1]))
        assert sum(second) == os.fstat(file.fileno()).st_size // CLUSTER - REFCOUNTS_PER_BLOCK
