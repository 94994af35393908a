"""What a machine is made from, in the words every driver understands.

A driver gets file paths, sizes and addresses; it knows nothing of images, kernels' names, slots or sandboxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

__all__ = ["Accelerator", "Disk", "MachineExit", "MachineSpec", "UserNetwork"]


class Accelerator(StrEnum):
    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, slots=True)
class Disk:
    """A block device of the guest. ``backing`` is named outright: a qcow2 header's own word is never trusted."""

    name: str
    path: Path
    format: str
    read_only: bool = False
    backing: Path | None = None
    backing_format: str = "raw"


@dataclass(frozen=True, slots=True)
class UserNetwork:
    """User-mode network, filtered so that the host's own and private networks cannot be reached.

    Addresses are the guest's view; ``denied`` are IPv4 networks (CIDR) whose packets are dropped.
    """

    mac: str
    address: str
    gateway: str
    nameserver: str
    denied: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """One machine. ``memory`` is bytes (whole MiB); ``directory`` is the machine's own, made by the caller, mode 0700."""

    name: str
    directory: Path
    kernel: Path
    initrd: Path
    cmdline: tuple[str, ...]
    cpus: int
    memory: int
    disks: tuple[Disk, ...]
    network: UserNetwork | None
    accelerator: Accelerator
    console_bytes: int = 4 << 20
    detached: bool = False
    """True: the machine outlives the process that started it. False: it ends when that process does, however it ends."""


@dataclass(frozen=True, slots=True)
class MachineExit:
    """How a VMM ended: its exit code, or the signal; ``requested`` when we asked for it."""

    code: int | None
    signal: int | None
    requested: bool = False
