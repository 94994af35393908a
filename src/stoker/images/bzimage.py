"""Kernel files: telling them apart, taking the ELF out of a bzImage, and checking that a VMM can start it.

A bzImage is a setup header (Documentation/arch/x86/boot.rst), a decompressor and the compressed ELF. We decompress once, on the
host: a VMM starts the ELF through its PVH note at once, where the guest would spend part of its boot unpacking.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import InvalidRequest

__all__ = ["KernelFile", "bzimage_release", "inspect_vmlinux", "read_kernel", "unpack_bzimage"]

MAX_FILE = 2 << 30
MAX_VMLINUX = 1 << 30
PVH_HINT = "give a 64-bit x86 vmlinux or bzImage built with CONFIG_PVH=y"
XEN_ELFNOTE_PHYS32_ENTRY = 18
DRIVERS = {
    "virtio_mmio": b"\0virtio-mmio\0",
    "virtio_pci": b"\0virtio-pci\0",
    "virtio_blk": b"\0virtio_blk\0",
    "virtio_console": b"\0virtio_console\0",
    "virtio_net": b"\0virtio_net\0",
}
"""The names that built-in drivers register with, as they stand in the kernel's read-only data."""


@dataclass(frozen=True, slots=True)
class KernelFile:
    """A kernel's ELF, its release and the virtio drivers whose names are in it."""

    vmlinux: bytes
    release: str
    drivers: tuple[str, ...]


def _invalid(path: object, why: str, hint: str = PVH_HINT) -> InvalidRequest:
    return InvalidRequest("kernel_invalid", f"{path}: {why}", hint)


def read_kernel(path: Path) -> KernelFile:
    """Reads a vmlinux or bzImage. Whatever is wrong with it is ``kernel_invalid``."""
    try:
        if not path.is_file():
            raise _invalid(path, "not a regular file" if path.exists() else "there is no such file", "give a vmlinux or bzImage")
        if path.stat().st_size > MAX_FILE:
            raise _invalid(path, f"larger than {MAX_FILE >> 30} GiB: no kernel")
        data = path.read_bytes()
    except PermissionError as e:
        raise _invalid(path, f"cannot be read: {e.strerror}", f"ls -l {path}") from None
    release = ""
    if data[0x202:0x206] == b"HdrS":
        release = bzimage_release(data)
        data = unpack_bzimage(data, str(path))
    return inspect_vmlinux(data, str(path), release)


def bzimage_release(data: bytes) -> str:
    """The release in a bzImage's header (``6.1.0-56-cloud-amd64``), or an empty string."""
    pointer = struct.unpack_from("<H", data, 0x20E)[0]
    text = data[pointer + 0x200 : pointer + 0x200 + 256].split(b"\0")[0] if pointer else b""
    return text.decode(errors="replace").split(" ")[0]


def unpack_bzimage(data: bytes, name: str = "the kernel") -> bytes:
    """The ELF in a bzImage, at most :data:`MAX_VMLINUX` bytes of it."""
    if len(data) < 0x260 or data[0x202:0x206] != b"HdrS":
        raise _invalid(name, "not a bzImage")
    version = struct.unpack_from("<H", data, 0x206)[0]
    if version < 0x208:
        raise _invalid(name, f"boot protocol {version >> 8}.{version & 255:02} is too old")
    setup = (data[0x1F1] or 4) + 1
    offset, length = struct.unpack_from("<II", data, 0x248)
    payload = memoryview(data)[setup * 512 + offset : setup * 512 + offset + length]
    if not length or len(payload) != length:
        raise _invalid(name, "truncated: the compressed kernel is not all there", "copy or build it again")
    if bytes(payload[:4]) == b"\x7fELF":
        return bytes(payload)
    expected = struct.unpack("<I", payload[-4:])[0]
    if expected > MAX_VMLINUX:
        raise _invalid(name, f"unpacks to {expected} bytes: no kernel")
    vmlinux = _decompress(payload, expected, name)
    if len(vmlinux) != expected:
        raise _invalid(name, f"damaged: {len(vmlinux)} bytes unpacked instead of {expected}", "copy or build it again")
    return vmlinux


def _decompress(payload: memoryview, expected: int, name: str) -> bytes:
    head = bytes(payload[:6])
    try:
        if head[:4] == b"\x02\x21\x4c\x18":
            return _lz4_legacy(payload, expected)
        if head[:4] == b"\x28\xb5\x2f\xfd":
            from stoker.host.zstd import ZstdDecompressor

            return ZstdDecompressor().decompress(payload, expected + 1)
        if head[:2] == b"\x1f\x8b":
            import zlib

            return zlib.decompressobj(31).decompress(payload, expected + 1)
        if head == b"\xfd7zXZ\0" or head[:3] == b"\x5d\0\0":
            import lzma

            return lzma.LZMADecompressor().decompress(payload, expected + 1)
        if head[:3] == b"BZh":
            import bz2

            return bz2.BZ2Decompressor().decompress(payload, expected + 1)
    except Exception as e:  # each codec has its own error class; all of them mean the same here
        raise _invalid(name, f"damaged: {e}", "copy or build it again") from e
    raise _invalid(
        name, f"compressed in a way Stoker does not know (it begins with {head.hex(' ')})", "build it with lz4, zstd, xz or gzip"
    )


def _lz4_legacy(payload: memoryview, expected: int) -> bytes:
    """The legacy frame that the kernel uses: blocks of 8 MiB, each behind its compressed length; the last 4 bytes are ours."""
    from lz4 import block  # type: ignore[import-untyped]

    out, at, end = bytearray(), 4, len(payload) - 4
    while at < end and len(out) <= expected:
        size = struct.unpack_from("<I", payload, at)[0]
        if size > end - at - 4:
            raise ValueError("an lz4 block is longer than the file")
        out += block.decompress(payload[at + 4 : at + 4 + size], uncompressed_size=8 << 20)
        at += 4 + size
    return bytes(out)


def inspect_vmlinux(data: bytes, name: str = "the kernel", release: str = "") -> KernelFile:
    """Checks that ``data`` is an x86-64 ELF with a PVH entry and finds its release."""
    if data[:4] != b"\x7fELF":
        raise _invalid(name, "neither a vmlinux (ELF) nor a bzImage")
    if len(data) < 64 or data[4] != 2 or struct.unpack_from("<H", data, 18)[0] != 62:
        raise _invalid(name, "an ELF file, but not for 64-bit x86")
    if not _has_pvh_note(data, name):
        raise _invalid(name, "has no PVH entry: a VMM cannot start it directly")
    if not release:
        found = re.search(rb"Linux version (\d+\.\d+[^\s\0]*) ", data)
        if found is None:
            raise _invalid(name, "an ELF file, but no Linux kernel (no version in it)")
        release = found[1].decode(errors="replace")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,127}", release):
        raise _invalid(name, f"its release {release!r} is none")
    return KernelFile(data, release, tuple(driver for driver, text in DRIVERS.items() if text in data))


def _has_pvh_note(data: bytes, name: str) -> bool:
    offset, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    if size < 56 or offset + size * count > len(data):
        raise _invalid(name, "damaged: its program headers lie outside the file", "copy or build it again")
    loaded_end = 0
    found = False
    for index in range(count):
        kind, _, start, _, _, length = struct.unpack_from("<IIQQQQ", data, offset + index * size)
        loaded_end = max(loaded_end, start + length)
        if kind == 4:
            found = found or _note_in(data[start : start + length])
    if loaded_end > len(data):
        raise _invalid(name, "truncated: its segments lie outside the file", "copy or build it again")
    return found


def _note_in(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name_size, value_size, kind = struct.unpack_from("<III", notes, at)
        if kind == XEN_ELFNOTE_PHYS32_ENTRY and notes[at + 12 : at + 12 + name_size] == b"Xen\0":
            return True
        at += 12 + (name_size + 3 & ~3) + (value_size + 3 & ~3)
    return False
