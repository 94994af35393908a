"""Control groups, version 2: one group per machine with limits, where the host lets us make groups.

Files of a group are the kernel's interface; a group is removed when nothing is in it any more. A host without a writable version 2
hierarchy (version 1 only, no delegation) has no base, and then there are no limits; nothing else changes.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Limits", "base", "create", "place", "remove", "usage"]

log = logging.getLogger(__name__)
ROOT = Path("/sys/fs/cgroup")
WANTED = ("memory", "pids", "cpu")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a group may use: bytes, processes and threads, CPUs, and its share (1 to 10000) when there are not enough."""

    memory: int = 0
    pids: int = 0
    cpus: int = 0
    weight: int = 100


def _own(root: Path, proc: Path) -> Path | None:
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("0::"):
            return root / line[3:].lstrip("/")
    return None


def base(name: str = "stoker", *, root: Path = ROOT, proc: Path = Path("/proc")) -> Path | None:
    """The group our groups are made in: ``name`` beside this process's own, with the controllers switched on. None: no limits here.

    Beside, not below: a group that has processes of its own cannot pass controllers on.
    """
    if not (root / "cgroup.controllers").exists():
        return None
    own = _own(root, proc)
    if own is None:
        return None
    parent = own.parent if own != root else root
    try:
        there = set((parent / "cgroup.controllers").read_text().split())
        missing = set(WANTED) - there
        if missing:
            log.info("no limits by control groups: %s lacks %s", parent, ", ".join(sorted(missing)))
            return None
        group = parent / name
        _enable(parent)
        group.mkdir(exist_ok=True)
        _enable(group)
    except OSError as e:
        log.info("no limits by control groups: %s: %s", parent, e.strerror)
        return None
    return group


def _enable(group: Path) -> None:
    on = set((group / "cgroup.subtree_control").read_text().split())
    if missing := [name for name in WANTED if name not in on]:
        (group / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in missing))


def files(limits: Limits) -> dict[str, str]:
    """What is written into a group's files."""
    values = {"cpu.weight": str(limits.weight)}
    if limits.memory:
        values["memory.max"] = str(limits.memory)
        values["memory.swap.max"] = "0"
    if limits.pids:
        values["pids.max"] = str(limits.pids)
    if limits.cpus:
        values["cpu.max"] = f"{limits.cpus * 100_000} 100000"
    return values


def create(group: Path, limits: Limits) -> None:
    """Makes the group, or sets the limits of one that is there."""
    group.mkdir(exist_ok=True)
    for name, value in files(limits).items():
        try:
            (group / name).write_text(value)
        except FileNotFoundError:
            if name != "memory.swap.max":
                raise


def place(group: Path, pid: int) -> None:
    """Moves a process, and what it starts from now on, into the group. No error when it is gone already."""
    try:
        (group / "cgroup.procs").write_text(str(pid))
    except ProcessLookupError:
        pass


def usage(group: Path) -> dict[str, int]:
    """``memory`` in bytes and ``cpu`` in microseconds, as far as the group has them."""
    found: dict[str, int] = {}
    try:
        found["memory"] = int((group / "memory.current").read_text())
        for line in (group / "cpu.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "usage_usec":
                found["cpu"] = int(value)
    except OSError:
        pass
    return found


def remove(group: Path, *, timeout: float = 5.0) -> None:
    """Ends what is in the group and removes it. No error when there is none. Blocks for a moment."""
    deadline = time.monotonic() + timeout
    try:
        (group / "cgroup.kill").write_text("1")
    except FileNotFoundError:
        pass
    while True:
        try:
            os.rmdir(group)
            return
        except FileNotFoundError:
            return
        except OSError as e:
            if e.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)
