"""Takes away what the ledger names. Every function works on what is there, on what never was, and twice.

A machine is ended by the identities its shim wrote down (``shim.json``), and, because a shim may have been started and not have got
that far, by looking for the process whose arguments are exactly ``--dir DIRECTORY`` of exactly this machine. Killing the shim takes
its VMM along (PDEATHSIG); both are waited for before anything of theirs is removed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import shutil
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import msgspec

from stoker.engine.ledger import Entry, Kind
from stoker.engine.pools import Pools
from stoker.errors import HostError
from stoker.host import devicemapper, loop
from stoker.host.process import ProcessIdentity, boot_id
from stoker.vmm.kept import staging

__all__ = ["CONSOLE", "clear_directory", "end_process", "end_processes", "release", "shims", "shims_below"]

log = logging.getLogger(__name__)
CONSOLE: Final = ("console.log", "console.log.1")
"""What is kept of a stopped machine's directory."""
SHIM: Final = b"stoker-shim"


class _Identity(msgspec.Struct):
    pid: int
    start: int


class _Shim(msgspec.Struct):
    boot: str
    shim: _Identity
    vmm: _Identity | None = None


def _start_of(pid: int) -> int | None:
    """When a process started (field 22 of its stat); None when there is none, or only its zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == b"Z" else int(fields[19])


def _recorded(directory: Path) -> list[_Identity]:
    try:
        data = (directory / "shim.json").read_bytes()
        shim = msgspec.json.decode(data, type=_Shim)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except msgspec.DecodeError:
        log.warning("%s/shim.json is not readable; its processes are looked for by their arguments", directory)
        return []
    if shim.boot != boot_id():
        return []
    return [identity for identity in (shim.vmm, shim.shim) if identity is not None]


def _all_shims() -> Iterator[tuple[str, int]]:
    """The directory and the number of every shim on this host. One pass over /proc."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            with open(f"/proc/{entry.name}/cmdline", "rb") as f:
                words = f.read(8192).split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if words[0].endswith(SHIM) and b"--dir" in words[:-1]:
            yield os.fsdecode(words[words.index(b"--dir") + 1]), int(entry.name)


def shims(directories: Collection[str]) -> dict[str, list[int]]:
    """Which processes are the shims of exactly these directories."""
    found: dict[str, list[int]] = {}
    for directory, pid in _all_shims():
        if directory in directories:
            found.setdefault(directory, []).append(pid)
    return found


def shims_below(parent: Path) -> dict[str, list[ProcessIdentity]]:
    """The shims of every directory right below ``parent``."""
    found: dict[str, list[ProcessIdentity]] = {}
    for directory, pid in _all_shims():
        if os.path.dirname(directory) == str(parent):
            try:
                found.setdefault(directory, []).append(ProcessIdentity.of(pid))
            except ProcessLookupError:
                continue
    return found


def _kill(pid: int, start: int | None, deadline: float) -> None:
    """Kills exactly this process and waits until it is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # The descriptor holds the process: what is compared now is what is killed.
        now = _start_of(pid)
        if now is None or (start is not None and now != start):
            return
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        except ProcessLookupError:
            return
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise HostError(
                "process_stuck", f"process {pid} does not end although it was killed", "it may wait for a disk: see dmesg"
            )
    finally:
        os.close(descriptor)


def end_process(identity: ProcessIdentity, *, timeout: float = 10.0) -> None:
    """Ends exactly this process, if it still runs, and waits until it is gone."""
    _kill(identity.pid, identity.start, time.monotonic() + timeout)


def end_processes(directory: Path, found: Collection[int] | None = None, *, timeout: float = 10.0) -> None:
    """Ends the machine of a directory, however far its start got. ``found``: its shims, when they have been looked for already."""
    deadline = time.monotonic() + timeout
    for identity in _recorded(directory):
        _kill(identity.pid, identity.start, deadline)
    for pid in shims([str(directory)]).get(str(directory), []) if found is None else found:
        start = _start_of(pid)
        if start is not None:
            _kill(pid, start, deadline)
            # It may have written its record between the first look and its end.
            for identity in _recorded(directory):
                _kill(identity.pid, identity.start, deadline)


def _remove_tree(path: Path, keep: Collection[str] = ()) -> None:
    if not keep:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            pass
        return
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.name in keep:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            Path(entry.path).unlink(missing_ok=True)


def _remove_cgroup(path: Path) -> None:
    from stoker.host.cgroups import remove

    remove(path)


def _release(entry: Entry, pools: Pools, found: Collection[int] | None) -> None:
    path = Path(entry.name)
    if entry.kind is Kind.PROCESS:
        end_processes(path, found)
    elif entry.kind is Kind.CGROUP:
        _remove_cgroup(path)
    elif entry.kind is Kind.DIRECTORY:
        _remove_tree(path)
    elif entry.kind is Kind.DEVICE:
        devicemapper.remove(entry.name)
    elif entry.kind is Kind.LOOP:
        for found_loop in loop.find(path):
            loop.detach(found_loop)
    elif entry.kind is Kind.CLONE:
        pools.remove(path)
    elif entry.kind is Kind.SAVED:
        _remove_tree(path)
        _remove_tree(staging(path))
    elif entry.kind in (Kind.APP_DISK, Kind.VOLUME, Kind.MEMORY):
        path.unlink(missing_ok=True)


async def release(entry: Entry, pools: Pools, found: Collection[int] | None = None) -> None:
    """Takes one owned thing away."""
    await asyncio.to_thread(_release, entry, pools, found)


async def clear_directory(directory: Path) -> None:
    """Of a machine that stopped, only its console is kept."""
    await asyncio.to_thread(_remove_tree, directory, CONSOLE)
