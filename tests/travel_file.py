"""Snapshot files made by hand: whole ones, and ones with a single lie in them."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from stoker.engine.travel.format import DATA, END, MAGIC, ZEROS, record
from stoker.host.zstd import CompressionParameter, ZstdCompressor
from stoker.images.store import described
from stoker.storage.overlay import CLUSTER

MIB = 1 << 20
SIZE = 8 * MIB
MEMORY = 16 * MIB
KERNEL = "debian:12"
SANDBOX, SNAPSHOT = "sb-" + "a" * 20, "sn-" + "a" * 20
Records = list[tuple[int, int, int, bytes]]
"""Offset, length, kind and what comes behind."""


def an_image(path: Path) -> bytes:
    """A small ext4 file system, always the same size."""
    with open(path, "wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", path], check=True, capture_output=True)
    return path.read_bytes()


def data(offset: int, content: bytes) -> tuple[int, int, int, bytes]:
    return offset, len(content), DATA, content


def zeros(offset: int, length: int) -> tuple[int, int, int, bytes]:
    return offset, length, ZEROS, b""


def joined(records: Records, size: int) -> bytes:
    return b"".join(record(offset, length, kind) + behind for offset, length, kind, behind in [*records, (size, 0, END, b"")])


class Travel:
    """A whole file; a test changes a part, or a word of the manifest, before it is packed."""

    def __init__(self, image: bytes, *, memory: bool = False) -> None:
        sums = [("rootfs.ext4", hashlib.sha256(image).hexdigest())]
        _, entry, digest = described("images", "imported", {"size": SIZE, "fstype": "ext4"}, sums)
        self.content = os.urandom(3 * CLUSTER)
        self.parts: dict[str, tuple[Records, int]] = {
            "image": ([data(start, image[start : start + MIB]) for start in range(0, SIZE, MIB)], SIZE),
            "disk": ([data(0, self.content[:CLUSTER]), zeros(2 * CLUSTER, CLUSTER), data(MIB, self.content[CLUSTER:])], 2 * SIZE),
        }
        if memory:
            self.parts["memory"] = ([data(4096, b"m" * 8192)], MEMORY)
            self.parts["delta"] = ([data(0, self.delta())], len(self.delta()))
            self.parts["state"] = ([data(0, b"state")], 5)
        self.manifest: dict[str, Any] = {
            "id": SNAPSHOT,
            "created_at": 1.0,
            "name": "elsewhere",
            "tags": ["good"],
            "machine": {
                "id": SANDBOX,
                "request": {"image": "debian:12"},
                "cpus": 1,
                "memory": MEMORY,
                "disk": 2 * SIZE,
                "kernel": KERNEL,
            },
            "image": {"digest": digest, "size": SIZE, "entry": entry.decode(), "label": "debian:12"},
        }

    @staticmethod
    def delta() -> bytes:
        head = struct.pack("<8sIIQQQ", b"STKDELTA", 1, 4096, MEMORY, 1, 0) + struct.pack("<QQ", 8192, 4096)
        return head.ljust(4096, b"\0") + b"d" * 4096

    def plain(self, lie: Callable[[dict[str, Any]], None] | None = None) -> bytes:
        """What is packed. ``lie`` changes the manifest when all that is in it is right."""
        bodies = {name: joined(records, size) for name, (records, size) in self.parts.items()}
        parts = [
            {
                "name": name,
                "size": size,
                "bytes": sum(length for _, length, kind, _ in records if kind == DATA),
                "sha256": hashlib.sha256(bodies[name]).hexdigest(),
            }
            for name, (records, size) in self.parts.items()
        ]
        manifest = {**self.manifest, "parts": parts}
        if lie is not None:
            lie(manifest)
        head = msgspec.json.encode(manifest)
        return MAGIC + len(head).to_bytes(4, "little") + head + b"".join(bodies.values())

    def packed(self, lie: Callable[[dict[str, Any]], None] | None = None) -> bytes:
        return pack(self.plain(lie))


def pack(plain: bytes) -> bytes:
    whole = ZstdCompressor(options={CompressionParameter.checksum_flag: 1})
    return whole.compress(plain, ZstdCompressor.FLUSH_FRAME)
