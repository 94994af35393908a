"""Disks as a virtual machine sees them: read and written through QEMU's own block layer, whatever the strategy."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from stoker.storage.strategy import Clone

KIB, MIB = 1 << 10, 1 << 20


def block_device(clone: Clone) -> str:
    """What ``qemu-img`` and ``qemu-io`` open."""

    def node(path: Path, kind: str) -> dict[str, Any]:
        driver = "host_device" if path.is_block_device() else "file"
        return {"driver": kind, "discard": "unmap", "file": {"driver": driver, "filename": str(path), "discard": "unmap"}}

    top = node(clone.path, clone.format)
    below = top
    for index, path in enumerate(clone.backing):
        below["backing"] = node(path, "raw" if index + 1 == len(clone.backing) else "qcow2")
        below["backing"]["read-only"] = True
        below = below["backing"]
    if below["driver"] == "qcow2":
        below["backing"] = None
    return "json:" + json.dumps(top)


def _tool(*argv: str | Path, check: bool = True) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def qemu_io(clone: Clone, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    # It ends with 0 whatever a command did.
    said = _tool("qemu-io", *words, block_device(clone))
    assert "failed" not in said and "rror" not in said, said
    return said


def write(clone: Clone, offset: int, length: int, pattern: int) -> None:
    if clone.format == "raw":
        fd = os.open(clone.path, os.O_RDWR)
        try:
            assert os.pwrite(fd, bytes([pattern]) * length, offset) == length
            os.fsync(fd)
        finally:
            os.close(fd)
        return
    qemu_io(clone, f"write -P {pattern} {offset} {length}", "flush")


def discard(clone: Clone, offset: int, length: int) -> None:
    qemu_io(clone, f"discard {offset} {length}", "flush")


def check_pattern(clone: Clone, offset: int, length: int, pattern: int) -> None:
    qemu_io(clone, f"read -P {pattern} {offset} {length}")


def content(clone: Clone, scratch: Path) -> bytes:
    """All of it, as a virtual machine reads it."""
    if clone.format == "raw":
        with open(clone.path, "rb") as file:
            data = file.read()
        assert len(data) == clone.size
        return data
    out = scratch / f"content-{clone.name}"
    _tool("qemu-img", "convert", "-O", "raw", block_device(clone), out)
    data = out.read_bytes()
    out.unlink()
    assert len(data) == clone.size
    return data


def size(clone: Clone) -> int:
    data = qemu_io(clone, "length")
    return _bytes(data)


def _bytes(text: str) -> int:
    number, unit = text.split()
    return int(float(number) * {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit])
