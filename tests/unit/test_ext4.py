"""ext4 without e2fsprogs: superblocks, sizes and scripts."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.host.ext4 import BLOCK, JOURNAL, Ownership, measure, mke2fs_command, ownership_script, plan_size, read_superblock


def superblock(path: Path, *, blocks: int, high: int = 0, incompat: int = 0x40, shift: int = 2) -> int:
    data = bytearray(1024)
    struct.pack_into("<IIII", data, 0, 128, blocks, 0, 7)
    struct.pack_into("<I", data, 24, shift)
    struct.pack_into("<H", data, 56, 0xEF53)
    struct.pack_into("<II", data, 92, 4, incompat)
    struct.pack_into("<I", data, 0x150, high)
    path.write_bytes(b"\0" * 1024 + data)
    return os.open(path, os.O_RDONLY)


def test_a_superblock_in_32_and_64_bits(tmp_path: Path) -> None:
    fd = superblock(tmp_path / "a", blocks=1000, high=1)
    found = read_superblock(fd)
    os.close(fd)
    assert found is not None
    assert (found.size, found.inodes, found.free_blocks, found.has_journal, found.has_extents) == (4096000, 128, 7, True, True)
    fd = superblock(tmp_path / "b", blocks=1000, high=1, incompat=0xC0)
    found = read_superblock(fd)
    os.close(fd)
    assert found is not None and found.blocks == (1 << 32) + 1000


@pytest.mark.parametrize("kind", ["empty", "short", "zeros", "no blocks", "silly block size"])
def test_no_superblock(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind in ("no blocks", "silly block size"):
        fd = superblock(path, blocks=0 if kind == "no blocks" else 5, shift=2 if kind == "no blocks" else 20)
    else:
        path.write_bytes(b"\0" * {"empty": 0, "short": 1500, "zeros": 4096}[kind])
        fd = os.open(path, os.O_RDONLY)
    assert read_superblock(fd) is None
    os.close(fd)


def test_a_tree_is_measured_with_hard_links_once_and_symbolic_links_in_their_inodes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "dir").mkdir(parents=True)
    (tree / "file").write_bytes(b"x" * (BLOCK + 1))
    os.link(tree / "file", tree / "dir" / "same")
    (tree / "short").symlink_to("a")
    (tree / "long").symlink_to("b" * 100)
    (tree / "empty").touch()
    os.mkfifo(tree / "fifo")
    blocks, inodes = measure(tree)
    assert inodes == 2 + 1 + 1 + 1 + 1 + 1  # two directories, file, two links, empty, fifo
    assert blocks == 2 + 2 + 1  # two directories, two blocks of the file, the long link


def test_a_directory_with_many_names_takes_many_blocks(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i:03}-{'n' * 60}").touch()
    blocks, inodes = measure(tmp_path)
    assert inodes == 301
    assert blocks >= 300 * 72 / BLOCK


@given(st.integers(0, 1 << 22), st.integers(1, 1 << 20), st.integers(0, 1 << 36))
def test_a_plan_holds_what_it_is_made_for(blocks: int, inodes: int, free: int) -> None:
    plan = plan_size(blocks, inodes, free)
    assert plan.size % (1 << 20) == 0
    assert plan.inodes > inodes
    assert plan.size - JOURNAL - plan.inodes * 256 >= blocks * BLOCK + free


def test_the_command_names_every_feature_and_no_kernel_has_to_guess(tmp_path: Path) -> None:
    words = [str(word) for word in mke2fs_command(tmp_path, tmp_path / "image", plan_size(1000, 100, 0), "u-u-i-d")]
    assert words[words.index("-O") + 1].startswith("none,")
    assert "orphan_file" not in " ".join(words) and "metadata_csum_seed" not in " ".join(words)
    assert words[-3:-1] == [str(tmp_path), str(tmp_path / "image")]
    assert "lazy_itable_init=0" in words[words.index("-E") + 1]


def test_owners_are_written_for_debugfs() -> None:
    script = ownership_script([Ownership("/etc/shadow", 0, 42), Ownership('/a "b" c', 100000, 1, 0o104755)])
    assert script.splitlines() == [
        'sif "/etc/shadow" uid 0',
        'sif "/etc/shadow" gid 42',
        'sif "/a ""b"" c" uid 100000',
        'sif "/a ""b"" c" gid 1',
        'sif "/a ""b"" c" mode 0104755',
    ]
    with pytest.raises(ValueError, match="line break"):
        ownership_script([Ownership("/a\nrm /etc", 0, 0)])
