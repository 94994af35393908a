"""How much memory a kernel takes before it has said a word: the end of a vmlinux in guest memory."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from stoker.errors import InvalidRequest

__all__ = ["check_memory", "kernel_end"]

MIB = 1 << 20
WORKING_ROOM = 12 * MIB
"""What a stock kernel needs besides itself and the initramfs to get as far as init, or at least to saying that it cannot."""


def kernel_end(path: Path) -> int:
    """The highest physical address the image occupies; 0 for what is no 64-bit ELF file (a bzImage unpacks itself)."""
    with open(path, "rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01" or len(header) < 64:
            return 0
        (offset,) = struct.unpack_from("<Q", header, 32)
        size, count = struct.unpack_from("<HH", header, 54)
        if size < 56 or count > 64 or offset > 1 << 20:
            return 0
        file.seek(offset)
        table = file.read(size * count)
    end = 0
    for at in range(0, len(table) - 55, size):
        (kind,) = struct.unpack_from("<I", table, at)
        physical, _, memory = struct.unpack_from("<QQQ", table, at + 24)
        if kind == 1:
            end = max(end, physical + memory)
    return end


def check_memory(kernel: Path, initrd: Path, memory: int) -> None:
    """Refuses what cannot start: with less, QEMU lays the initramfs over the kernel, and the guest dies or hangs without a word."""
    needed = kernel_end(kernel) + os.stat(initrd).st_size + WORKING_ROOM
    if memory < needed:
        least = (needed + MIB - 1) // MIB
        raise InvalidRequest(
            "memory_too_small",
            f"{memory // MIB} MiB of memory cannot hold this kernel and its initramfs, which take {least} MiB",
            f"--memory {max(128, least)}M",
        )
