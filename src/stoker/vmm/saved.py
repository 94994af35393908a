"""A machine that was put away: its memory, its device state, and the manifest that says what can take it up again.

A directory with ``memory`` (sparse, the guest's memory), ``state`` (the VMM's devices), ``disk`` (if there is one: what the machine
wrote, as an overlay's file) and ``manifest.json``, written under another name, synced and renamed: it is whole or not there. The
manifest's ``made_by`` is whatever must be the same for the state to load (:func:`fingerprint`); loading checks it first, and then
the files against their digests. All functions block.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from stoker.errors import HostError, StokerError
from stoker.host.durable import whole_directory, write_synced
from stoker.host.reflink import data_ranges
from stoker.vmm.machine import Accelerator, MachineSpec, TapNetwork
from stoker.vmm.memory import new_memory, sealed
from stoker.vmm.memory_base import digest_of_memory
from stoker.vmm.memory_file import copy_memory
from stoker.vmm.qemu.command import DiskHandles, Handles, command
from stoker.vmm.qemu.facts import QemuFacts

__all__ = ["ANY_MAC", "Saved", "fingerprint", "load", "orphaned", "portable", "program", "save"]

FORMAT: Final = 3
AGAIN: Final = "it is made anew by itself"
ANY_MAC: Final = "02:fc:00:00:00:05"
"""Stands for whichever a machine on a TAP has: its guest is told."""
_MOST_STATE: Final = 64 << 20
_MOST_DISK: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Saved:
    """A base (a descriptor, see :mod:`stoker.vmm.memory`; its owner closes it) and the devices that go with it."""

    memory: int
    size: int
    state: bytes
    digest: str
    file: tuple[int, int]
    """The device and inode of what it was loaded from."""
    disk: tuple[tuple[int, bytes], ...] = ()
    """What the file of its disk's overlay has where it has anything."""
    disk_length: int = 0


def _identity(path: Path) -> list[Any]:
    """A file of the store, which is never changed, only replaced by another. (Its times tell when it was last used.)"""
    status = os.stat(path)
    return [os.path.realpath(path), status.st_ino, status.st_size]


def fingerprint(spec: MachineSpec, qemu: QemuFacts) -> dict[str, Any]:
    """Everything that a machine's state depends on: the VMM's program, its whole command line but for names and descriptors, and
    the files it is made from. Two machines with equal ones can take up each other's state."""
    handles = Handles(
        monitor=0,
        console=0,
        kernel="kernel",
        initrd="initrd",
        agent=0,
        disks=tuple(DiskHandles(0, (0,) * len(disk.backing)) for disk in spec.disks),
        net_out=0,
        net_in=0,
        tap=0,
        taps=(0,) * len(spec.taps),
        memory=0,
    )
    network = replace(spec.network, mac=ANY_MAC) if isinstance(spec.network, TapNetwork) else spec.network
    spec = replace(spec, network=network, taps=tuple(replace(port, mac=ANY_MAC) for port in spec.taps))
    disks = [[disk.name, disk.format, [_identity(path) for path in disk.backing]] for disk in spec.disks]
    return {
        "vmm": ".".join(map(str, qemu.version)),
        "program": program(qemu),
        # The clock's frequency is measured anew in each run directory; the guest keeps the one it was told.
        "command": [word for word in command(spec, replace(qemu, tsc_khz=0), handles) if word != spec.name],
        "kernel": _identity(spec.kernel),
        "initrd": _identity(spec.initrd),
        "disks": disks,
        "memory": spec.memory,
        "host": os.uname().release,
    }


def program(qemu: QemuFacts) -> list[Any]:
    """Which VMM's program it is, without reading it."""
    return [*_identity(Path(qemu.path)), os.stat(qemu.path).st_mtime_ns]


def portable(spec: MachineSpec, qemu: QemuFacts) -> dict[str, Any]:
    """What has to be the same for a machine to be taken up where it was left: not the files it began with, which it has read,
    nor how many layers its disks have."""
    disks = tuple(replace(disk, backing=disk.backing[-1:]) for disk in spec.disks)
    found = fingerprint(replace(spec, disks=disks), qemu)
    wanted = {name: found[name] for name in ("vmm", "program", "command", "memory")}
    if spec.accelerator is Accelerator.KVM:
        wanted["cpu"] = _cpu()
    return wanted


@cache
def _cpu() -> str:
    """The host's processor, as far as a guest of KVM sees it. The kernel asks each CPU as this is read: the first will do."""
    found = []
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if not line.strip():
                break
            if line.startswith(("vendor_id", "cpu family", "model", "stepping", "flags")):
                found.append(line.rstrip())
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def orphaned(directory: Path) -> str:
    """Why nothing can ever take this up again: a file that it was made from is gone. Empty: nothing is known against it."""
    try:
        made_by = _manifest(directory / "manifest.json")["made_by"]
        files = [
            made_by["program"],
            made_by["kernel"],
            made_by["initrd"],
            *(file for disk in made_by["disks"] for file in disk[2]),
        ]
        for path, inode, *_ in files:
            try:
                if os.stat(path).st_ino != inode:
                    return f"{path} is another file by now"
            except FileNotFoundError:
                return f"{path} is gone"
    except (StokerError, ValueError, TypeError, KeyError, FileNotFoundError):
        return "it is damaged"
    return ""


def save(directory: Path, memory: int, state: bytes, made_by: Mapping[str, Any], disk: Path | None = None) -> None:
    """Puts a stopped machine away. ``directory`` must not exist; a failure leaves nothing.

    ``disk`` is the overlay that the machine wrote, of a few MiB.
    """
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with whole_directory(directory, staging) as place:
        size = os.fstat(memory).st_size
        with open(place / "memory", "wb") as file:
            copy_memory(memory, file.fileno())
            os.fsync(file.fileno())
        manifest = {
            "format": FORMAT,
            "made_by": made_by,
            "memory": {"size": size, "sha256": digest_of_memory(memory)},
            "state": {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()},
            "disk": _save_disk(disk, place / "disk") if disk is not None else None,
        }
        write_synced(place / "state", state)
        write_synced(place / "manifest.json", json.dumps(manifest, indent=1).encode())


def _save_disk(source: Path, target: Path) -> dict[str, Any]:
    with open(source, "rb") as original, open(target, "w+b") as file:
        length = os.fstat(original.fileno()).st_size
        os.ftruncate(file.fileno(), length)
        copy_memory(original.fileno(), file.fileno())
        os.fsync(file.fileno())
        return {"size": length, "sha256": digest_of_memory(file.fileno())}


def _load_disk(path: Path, wanted: Mapping[str, Any]) -> tuple[tuple[int, bytes], ...]:
    with open(path, "rb") as file:
        fd = file.fileno()
        ranges = list(data_ranges(fd))
        whole = os.fstat(fd).st_size == wanted["size"] and sum(length for _, length in ranges) <= _MOST_DISK
        if not whole or digest_of_memory(fd) != wanted["sha256"]:
            raise HostError("saved_damaged", f"{path} is damaged", AGAIN)
        return tuple((offset, os.pread(fd, length, offset)) for offset, length in ranges)


def load(directory: Path, made_by: Mapping[str, Any]) -> Saved:
    """Takes a saved machine's memory and state out again.

    Errors: :class:`HostError` ``saved_unusable`` (made by something else, and by what), ``saved_damaged``. FileNotFoundError: none.
    """
    manifest = _manifest(directory / "manifest.json")
    mine = json.loads(json.dumps(made_by))
    different = " and ".join(key for key in mine if manifest["made_by"].get(key) != mine[key])
    if different:
        raise HostError("saved_unusable", f"{directory} was made with another {different}", AGAIN)
    state = (directory / "state").read_bytes()
    if len(state) > _MOST_STATE or hashlib.sha256(state).hexdigest() != manifest["state"]["sha256"]:
        raise HostError("saved_damaged", f"{directory}/state is damaged", AGAIN)
    disk = manifest.get("disk")
    pieces = _load_disk(directory / "disk", disk) if disk else ()
    with open(directory / "memory", "rb") as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        if size != manifest["memory"]["size"]:
            raise HostError("saved_damaged", f"{directory}/memory is damaged", AGAIN)
        memory = new_memory("base", size)
        try:
            copy_memory(file.fileno(), memory)
            if digest_of_memory(memory) != manifest["memory"]["sha256"]:
                raise HostError("saved_damaged", f"{directory}/memory is damaged", AGAIN)
            sealed(memory)
        except BaseException:
            os.close(memory)
            raise
    found = (status.st_dev, status.st_ino)
    return Saved(memory, size, state, manifest["memory"]["sha256"], found, pieces, disk["size"] if disk else 0)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise HostError("saved_unusable", f"{path} is of format {manifest['format']}", AGAIN)
        if not isinstance(manifest["made_by"], dict) or not isinstance(manifest["memory"]["size"], int):
            raise TypeError
        str(manifest["memory"]["sha256"]), str(manifest["state"]["sha256"])
    except (ValueError, TypeError, KeyError):
        raise HostError("saved_damaged", f"{path} is damaged", AGAIN) from None
    return dict(manifest)
