"""The yardstick: a QEMU command line as a person writes it, with the least guest there can be.

Its initramfs is an uncompressed archive with one static program that writes a line and resets the machine. The program is assembled
here, byte by byte, so that the yardstick needs no compiler.
"""

from __future__ import annotations

import struct
from pathlib import Path

from stoker.images.cpio import Archive

__all__ = ["LINE", "bare_command", "idle_command", "write_bare_initramfs"]

LINE = b"bare-guest-speaks\n"
LOAD = 0x400000
HEADERS = 64 + 56


def _move(register: int, value: int) -> bytes:
    """``mov r32, imm32``."""
    return bytes([0xB8 + register]) + struct.pack("<I", value & 0xFFFFFFFF)


def _program() -> bytes:
    """A static x86-64 ELF file: write(1, LINE), reboot(RESTART), and should that return, a loop."""
    eax, edx, esi, edi, syscall = 0, 2, 6, 7, b"\x0f\x05"
    tail = _move(edx, len(LINE)) + syscall
    tail += _move(eax, 169) + _move(edi, 0xFEE1DEAD) + _move(esi, 672274793) + _move(edx, 0x01234567) + syscall + b"\xeb\xfe"
    # lea rsi, [rip + distance to the text behind the code]
    code = _move(eax, 1) + _move(edi, 1) + b"\x48\x8d\x35" + struct.pack("<i", len(tail)) + tail + LINE
    size = HEADERS + len(code)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, LOAD + HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, LOAD, LOAD, size, size, 0x1000)
    return header + segment + code


def write_bare_initramfs(path: Path) -> None:
    """Writes the archive: ``/init`` and the console it writes to."""
    archive = Archive()
    archive.directory("dev")
    archive.character_device("dev/console", 5, 1)
    archive.file("init", _program(), 0o755)
    path.write_bytes(archive.finish())


def bare_command(qemu: str, kernel: Path, initrd: Path, memory: int, accelerator: str, cpu: str) -> list[str]:
    """``-M microvm`` with the same kernel, memory and accelerator that Stoker's own machine gets, and nothing else.

    Without ACPI: with it, on a busy host, a stock kernel in software emulation finds no clock to calibrate by and stands still.
    """
    # fmt: off
    return [
        qemu, "-M", "microvm,acpi=off", "-accel", accelerator, "-cpu", cpu, "-m", f"{memory >> 20}M",
        "-kernel", str(kernel), "-initrd", str(initrd),
        "-append", "console=ttyS0 quiet loglevel=1 reboot=t panic=-1",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
    ]
    # fmt: on


def idle_command(bare: list[str]) -> list[str]:
    """The same machine, which never runs: its monitor speaks when the guest's first instruction would be due."""
    return [*bare[: bare.index("-serial")], "-S", "-qmp", "stdio"]
