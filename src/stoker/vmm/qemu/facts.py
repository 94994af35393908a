"""Which QEMU there is, and what a guest must be told of the host's clock.

Asked of the binary and measured once per boot of the host, then kept in ``run_dir/qemu.json`` while the binary is the same.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import HostError
from stoker.host.binaries import shim_path
from stoker.host.process import boot_id
from stoker.host.run import run, tool_environment
from stoker.settings import Settings

__all__ = ["QemuFacts", "parse_version", "qemu_facts"]


@dataclass(frozen=True, slots=True)
class QemuFacts:
    path: str
    version: tuple[int, int, int]
    tsc_khz: int = 0
    """Frequency of the host's time stamp counter; 0: not known."""


def parse_version(text: str) -> tuple[int, int, int]:
    """``QEMU emulator version 7.2.22 (Debian ...)`` to (7, 2, 22)."""
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise HostError("qemu_unknown", f"this is not a version of QEMU: {text[:80]!r}", "apt-get install qemu-system-x86")
    return int(match[1]), int(match[2]), int(match[3] or 0)


async def qemu_facts(settings: Settings) -> QemuFacts:
    """Where QEMU is and which version. :class:`HostError` ``qemu_missing`` when it is not installed."""
    path = _find(settings.qemu)
    if path is None:
        raise HostError(
            "qemu_missing", f"{settings.qemu} is not installed", "apt-get install qemu-system-x86", details={"tool": settings.qemu}
        )
    stat = os.stat(path)
    key = [path, stat.st_mtime_ns, stat.st_size, boot_id()]
    cache = settings.run_dir / "qemu.json"
    facts = _cached(cache, key)
    if facts is None:
        version = parse_version((await run([path, "--version"], timeout=20)).stdout.decode(errors="replace"))
        facts = QemuFacts(path, version, int((await run([shim_path(), "--tsc-khz"], timeout=20)).stdout))
        _keep(cache, key, facts)
    return facts


def _find(name: str) -> str | None:
    """The program's absolute path. (``shutil.which`` would bring four compression libraries along.)"""
    directories = [""] if "/" in name else tool_environment()["PATH"].split(":")
    for path in (os.path.abspath(os.path.join(directory, name)) for directory in directories):
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def _cached(cache: Path, key: list[object]) -> QemuFacts | None:
    try:
        with open(cache, "rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            record = json.load(file)
        major, minor, patch = record["version"]
        return (
            QemuFacts(str(key[0]), (int(major), int(minor), int(patch)), int(record["tsc_khz"])) if record["key"] == key else None
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None  # a cache: whatever is wrong with it, the binary knows better


def _keep(cache: Path, key: list[object], facts: QemuFacts) -> None:
    beside = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside.write_text(json.dumps({"key": key, "version": facts.version, "tsc_khz": facts.tsc_khz}))
        beside.replace(cache)
    except OSError:
        beside.unlink(missing_ok=True)  # no cache then: 100 ms more, next time
