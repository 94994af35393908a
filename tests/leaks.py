"""Finds what tests left on the host: processes, mounts, loop devices, links, routes, namespaces, tables, control groups, files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

PATIENCE = 10.0
"""Seconds that what is on its way out may take (a namespace is dismantled in the background)."""


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    words: tuple[str, ...]
    zombie: bool

    def __str__(self) -> str:
        return f"process {self.pid}: {' '.join(self.words)[:300]}{' (zombie)' if self.zombie else ''}"


def _belongs(entry: Path, root: bytes) -> bool:
    """Whether a process names the directory: in its arguments, environment, working directory or open files."""
    for name in ("cmdline", "environ"):
        if root in (entry / name).read_bytes():
            return True
    for link in (entry / "cwd", *(entry / "fd").iterdir()):
        try:
            if os.readlink(link).encode().startswith(root):
                return True
        except FileNotFoundError:
            continue
    return False


def processes(root: Path) -> list[Process]:
    """Processes that have to do with the directory, but for this one, what started it and what it started to test with."""
    marker, mine, found = os.fsencode(root), _family(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in mine:
            continue
        try:
            if _belongs(entry, marker):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                zombie = ") Z " in (entry / "stat").read_text()
                found.append(Process(int(entry.name), tuple(words), zombie))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def _family() -> set[int]:
    """This process, its ancestors, and the test runner's own other processes (workers of xdist)."""
    family, pid = set(), os.getpid()
    while pid > 1:
        family.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            break
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if b"pytest" in words or b"from execnet" in words or b"import sys;exec(eval(sys.stdin.readline()))" in words:
                family.add(int(entry.name))
    return family


def _tool(*argv: str) -> str:
    if shutil.which(argv[0]) is None:
        return ""
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30).stdout


def _nft_tables() -> frozenset[str]:
    text = _tool("nft", "-j", "list", "tables")
    tables = [row["table"] for row in json.loads(text)["nftables"] if "table" in row] if text else []
    return frozenset(f"{table['family']} {table['name']}" for table in tables)


def _routes() -> frozenset[str]:
    """Of the main table: interface, destination, gateway."""
    rows = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    return frozenset(f"{row[0]} {row[1]}/{row[7]} {row[2]}" for row in rows if len(row) > 7)


def _loops() -> frozenset[str]:
    return frozenset(str(path.read_text().strip()) for path in Path("/sys/block").glob("loop*/loop/backing_file"))


def _mounts() -> frozenset[str]:
    return frozenset(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())


def _names(directory: str, prefix: str = "") -> frozenset[str]:
    try:
        return frozenset(name for name in os.listdir(directory) if name.startswith(prefix))
    except FileNotFoundError:
        return frozenset()


def _control_groups() -> frozenset[str]:
    # A slice of systemd's stays when the last unit in it is gone.
    return frozenset(str(path) for path in Path("/sys/fs/cgroup").glob("**/*stoker*") if path.name != "stoker.slice")


@dataclass(frozen=True, slots=True)
class HostObjects:
    """Kernel objects of the whole host, by name."""

    links: frozenset[str]
    routes: frozenset[str]
    namespaces: frozenset[str]
    tables: frozenset[str]
    loops: frozenset[str]
    mounts: frozenset[str]
    control_groups: frozenset[str]
    mapped: frozenset[str]

    @classmethod
    def now(cls) -> HostObjects:
        return cls(
            links=_names("/sys/class/net"),
            routes=_routes(),
            namespaces=_names("/run/netns"),
            tables=_nft_tables(),
            loops=_loops(),
            mounts=_mounts(),
            control_groups=_control_groups(),
            mapped=_names("/dev/mapper"),
        )

    def added(self, later: HostObjects) -> list[str]:
        return [
            f"{field.name}: {name}"
            for field in fields(self)
            for name in sorted(getattr(later, field.name) - getattr(self, field.name))
        ]


def wait_gone(find: Callable[[], list[str]], patience: float = PATIENCE) -> list[str]:
    """What is still found when time is up."""
    deadline = time.monotonic() + patience
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def end_left(root: Path) -> None:
    """Ends what a session left, which was told: a daemon without its directories would go on for ever."""
    for process in processes(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def assert_gone(root: Path, before: HostObjects) -> list[str]:
    """What a session left behind, in words; empty when all is well."""

    def find() -> list[str]:
        return [str(process) for process in processes(root)] + before.added(HostObjects.now())

    return wait_gone(find)
