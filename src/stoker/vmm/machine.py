"""What a machine is made from, in the words every driver understands.

A driver gets file paths, sizes and addresses; it knows nothing of images, kernels' names, slots or sandboxes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

__all__ = [
    "Accelerator",
    "Channel",
    "Disk",
    "Gate",
    "GuestMemory",
    "MachineExit",
    "MachineSpec",
    "TapNetwork",
    "UserNetwork",
    "translated_code",
]


Gate = Callable[[int], Awaitable[None]]


class Accelerator(StrEnum):
    KVM = "kvm"
    TCG = "tcg"


class Channel(StrEnum):
    """How the host reaches the agent. vsock needs ``/dev/vhost-vsock`` and a context id (``vsock_cid``)."""

    VIRTIO_SERIAL = "virtio-serial"
    VSOCK = "vsock"


@dataclass(frozen=True, slots=True)
class Disk:
    """A block device of the guest, ``vda``, ``vdb``... in the order given; ``name`` is its serial number in the guest
    (letters, digits, ``-`` and ``_``, at most 20).

    ``format`` is ``raw`` (a file or a block device) or ``qcow2``. ``backing`` names what lies below a qcow2 disk outright, from
    top to bottom (a header's own word is never trusted): the last has ``backing_format``, those above it are qcow2.
    ``flush``: the guest's flushes reach the host's disk. False is right for a throw-away overlay, and makes it fast; the
    content survives the VMM's death all the same, only not the host's.
    """

    name: str
    path: Path
    format: str
    read_only: bool = False
    backing: tuple[Path, ...] = ()
    backing_format: str = "raw"
    flush: bool = False


class UserNetwork(Protocol):
    """User-mode network, filtered so that the host's own and private networks cannot be reached.

    Addresses are the guest's view (``address`` with its prefix length); ``denied`` are IPv4 networks (CIDR) whose packets are
    dropped, but for the nameserver's port 53.
    """

    @property
    def mac(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def gateway(self) -> str: ...
    @property
    def nameserver(self) -> str: ...
    @property
    def denied(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class TapNetwork:
    """A TAP of the caller's: its descriptor (with a vnet header), which stays the caller's to close once the machine runs."""

    mac: str
    tap: int


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """A memory file (see :mod:`stoker.vmm.memory`) of exactly the machine's size, by a descriptor that the caller keeps open until
    the machine runs. ``shared``: the machine writes into the file, which is then a base in the making; else it has a copy-on-write
    view of a base."""

    fd: int
    shared: bool = False


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
    network: UserNetwork | TapNetwork | None
    accelerator: Accelerator
    taps: tuple[TapNetwork, ...] = ()
    """Its further interfaces: those after ``network``, in their order."""
    console_bytes: int = 4 << 20
    detached: bool = False
    """True: the machine outlives the process that started it. False: it ends when that process does, however it ends."""
    cpu: str = ""
    """The VMM's word for the CPU model; empty: what suits accelerator and version."""
    channel: Channel = Channel.VIRTIO_SERIAL
    vsock_cid: int = 0
    cgroup: Path | None = None
    """A cgroup v2 directory the VMM starts in."""
    gate: Gate | None = None
    """Awaited with the number of the VMM's supervisor before it starts the VMM: whatever that is put into, the VMM is born in."""
    journal: str = ""
    """What the machine's lines in the host's journal are marked with; empty: none go there."""
    guest_memory: GuestMemory | None = None
    restore: bool = False
    """True: the machine does not boot, it waits for memory and device state of another that was made from the same values."""


@dataclass(frozen=True, slots=True)
class MachineExit:
    """How a VMM ended: its exit code, or the signal; ``requested`` when we (or its owner's end) asked for it.

    ``out_of_memory``: the host's kernel killed it for lack of memory. Both ``None``: it is gone and nobody saw how.
    """

    code: int | None
    signal: int | None
    requested: bool = False
    out_of_memory: bool = False


def translated_code(memory: int) -> int:
    """Bytes of the host's memory that software emulation may fill with translated code, for a guest with so many bytes.

    A full buffer is thrown away as a whole and everything is translated again: a large guest with systemd and Python in it
    overflows 128 MiB within a minute, and then spends more than half of its time there. A stock kernel's boot fills 20 MiB.
    """
    return min(max(128 << 20, memory // 8 & -(1 << 20)), 1 << 30)
