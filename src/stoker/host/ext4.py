"""ext4 file systems in plain files: reading a superblock, sizing one for a tree, e2fsprogs' command lines. No mount, no root."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "BLOCK",
    "Ownership",
    "Plan",
    "Superblock",
    "empty_command",
    "measure",
    "mke2fs_command",
    "needs_recovery",
    "ownership_script",
    "plan_size",
    "read_superblock",
]

BLOCK = 4096
MIB = 1 << 20
JOURNAL = 16 * MIB
MAGIC = 0xEF53
INCOMPAT_RECOVER = 0x4
INCOMPAT_64BIT = 0x80
FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink"
)
"""Named one by one: mke2fs's own defaults differ between hosts, and newer ones cannot be mounted by older guests' kernels."""


@dataclass(frozen=True, slots=True)
class Superblock:
    """What the file says of itself. ``size`` is what the file system covers, in bytes."""

    block_size: int
    blocks: int
    inodes: int
    free_blocks: int
    uuid: str
    has_journal: bool
    has_extents: bool

    @property
    def size(self) -> int:
        return self.block_size * self.blocks


def read_superblock(fd: int) -> Superblock | None:
    """The superblock of an open file, or None if there is no ext2, ext3 or ext4 in it."""
    data = os.pread(fd, 1024, 1024)
    if len(data) < 1024 or struct.unpack_from("<H", data, 56)[0] != MAGIC:
        return None
    inodes, blocks, _, free = struct.unpack_from("<IIII", data, 0)
    shift = struct.unpack_from("<I", data, 24)[0]
    compat, incompat = struct.unpack_from("<II", data, 92)
    if shift > 6 or not blocks or not inodes:
        return None
    if incompat & INCOMPAT_64BIT:
        blocks |= struct.unpack_from("<I", data, 0x150)[0] << 32
        free |= struct.unpack_from("<I", data, 0x158)[0] << 32
    return Superblock(1024 << shift, blocks, inodes, free, data[104:120].hex(), bool(compat & 4), bool(incompat & 0x40))


@dataclass(frozen=True, slots=True)
class Plan:
    """How large a file system has to be: bytes and inodes."""

    size: int
    inodes: int


def measure(tree: Path) -> tuple[int, int]:
    """The blocks (of 4 KiB) and inodes that a tree takes in ext4. Hard links count once."""
    blocks, inodes, seen = 0, 0, set()
    pending = [str(tree)]
    while pending:
        directory = pending.pop()
        names = 24
        with os.scandir(directory) as items:
            for item in items:
                names += 8 + (len(os.fsencode(item.name)) + 3 & ~3)
                found = item.stat(follow_symlinks=False)
                if item.is_dir(follow_symlinks=False):
                    pending.append(item.path)
                    continue
                if found.st_nlink > 1:
                    if (found.st_dev, found.st_ino) in seen:
                        continue
                    seen.add((found.st_dev, found.st_ino))
                inodes += 1
                if item.is_symlink():
                    blocks += found.st_size >= 60
                elif item.is_file(follow_symlinks=False):
                    blocks += -(-found.st_size // BLOCK) + (found.st_size > 512 * MIB)
        inodes += 1
        # Entries do not cross blocks, so a directory's blocks are never quite full; a checksum tail takes 12 bytes of each.
        blocks += max(1, -(-names * 5 // (BLOCK * 4)))
    return blocks, inodes


def plan_size(blocks: int, inodes: int, free: int) -> Plan:
    """The size for a tree of so many blocks and inodes with ``free`` bytes left over, and inodes for what may fill them.

    On top of the data come the inode tables, the journal, and the descriptors kept for growing (about one block in 32 of a small
    file system's groups).
    """
    wanted_inodes = inodes + inodes // 10 + max(free // (16 << 10), 1024) + 16
    data = blocks * BLOCK + free + wanted_inodes * 256 + JOURNAL
    size = data + data // 24 + 8 * MIB
    return Plan(-(-size // MIB) * MIB, wanted_inodes)


def mke2fs_command(tree: Path, image: Path, plan: Plan, uuid: str, label: str = "", *, lazy: bool = False) -> list[str | Path]:
    """Makes ``image`` (a new file) with the content of ``tree``.

    Inode tables and the journal are written at once (as holes, in a file), or every guest would do it in the background, into its
    overlay. No blocks are kept for root: a guest's disk is not a server's. ``lazy``: they are not written, as every
    guest mounts this one with ``noinit_itable``.
    """
    number = int(lazy)
    extended = f"lazy_itable_init={number},lazy_journal_init={number},nodiscard,root_owner=0:0"
    argv: list[str | Path] = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-I", "256", "-m", "0", "-N", str(plan.inodes)]
    argv += ["-O", f"{FEATURES},extra_isize,metadata_csum", "-J", f"size={JOURNAL // MIB}", "-E", extended]
    argv += ["-U", uuid, "-L", label, "-e", "remount-ro", "-d", tree, image, f"{plan.size // 1024}k"]
    return argv


def empty_command(image: Path, size: int, uuid: str) -> list[str | Path]:
    """Makes ``image``, a new sparse file of ``size`` bytes (whole MiB), an empty file system.

    What reads as zeros anyway is not written: mounted with ``noinit_itable``, it stays so. The journal of a large one is larger.
    """
    journal = 4 if size < 256 * MIB else 16 if size < 8192 * MIB else 64
    argv: list[str | Path] = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-I", "256", "-m", "0", "-U", uuid]
    argv += ["-O", f"{FEATURES},extra_isize,metadata_csum", "-J", f"size={journal}", "-e", "remount-ro"]
    argv += ["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0", image, f"{size // 1024}k"]
    return argv


def needs_recovery(fd: int) -> bool:
    """Whether the journal holds what is not in place yet: nobody has unmounted the file system since it was last written."""
    data = os.pread(fd, 1024, 1024)
    return len(data) == 1024 and bool(struct.unpack_from("<I", data, 96)[0] & INCOMPAT_RECOVER)


@dataclass(frozen=True, slots=True)
class Ownership:
    """What an inode has to be: ``mode`` with the file type's bits."""

    path: str
    uid: int
    gid: int
    mode: int | None = None


def ownership_script(entries: Iterable[Ownership]) -> str:
    """Commands for ``debugfs -w`` that give inodes their owners (and modes): how a file system for root is made without being root.

    Raises :class:`ValueError` for a path that its command language cannot say.
    """
    lines = []
    for entry in entries:
        if "\n" in entry.path or "\r" in entry.path or "\0" in entry.path:
            raise ValueError(f"{entry.path!r}: a line break in a file name")
        name = '"/' + entry.path.strip("/").replace('"', '""') + '"'
        lines += [f"sif {name} uid {entry.uid}", f"sif {name} gid {entry.gid}"]
        if entry.mode is not None:
            lines.append(f"sif {name} mode 0{entry.mode:o}")
    return "".join(f"{line}\n" for line in lines)
