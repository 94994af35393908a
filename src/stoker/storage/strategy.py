"""What every way of making clones offers, and the values it deals in.

A *base* is a read-only raw image. A *clone* is a disk of its own that begins as the base (zeros past its end) or as another clone,
and shares what it can. Strategies differ in what a virtual machine then opens and what is shared; the conformance corpus
(``tests/conformance``) holds them to the same behaviour. All functions block; call them from threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

__all__ = ["Base", "Clone", "CloneStrategy", "Strategy", "Thing", "Usage"]


class Strategy(StrEnum):
    QCOW2 = "qcow2"
    DM_SNAPSHOT = "dm-snapshot"
    REFLINK = "reflink"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class Base:
    """A raw image that nobody writes to. ``size`` is bytes, a multiple of 512."""

    path: Path
    size: int


@dataclass(frozen=True, slots=True)
class Clone:
    """What a virtual machine opens: ``path`` is a file or a block device, ``format`` ``raw`` or ``qcow2``.

    ``backing``: the read-only files below it, from top to bottom; the last is raw (the base), those above it are qcow2. ``size`` is
    the disk as the guest sees it, in bytes.
    """

    name: str
    strategy: Strategy
    path: Path
    format: str
    backing: tuple[Path, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes on the host's disk (blocks, not lengths): ``own`` is freed with the clone, ``shared`` belongs to others too.
    ``apparent`` is what the guest sees."""

    own: int
    shared: int
    apparent: int


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of the host that a clone consists of, by its exact name, in the order of removal.

    ``device``: the name of a device-mapper device. ``loop``: the *file* behind a loop device (its number changes). ``directory``:
    a path.
    """

    kind: str
    name: str


class CloneStrategy(Protocol):
    """One strategy over one pool's directory. Errors: ``clone_unknown`` (NotFound), ``clone_exists`` (Conflict), ``no_space``
    (CapacityExhausted), ``clone_corrupt``, ``base_missing``, ``base_changed`` (HostError)."""

    def clone(self, base: Base, name: str, size: int) -> Clone:
        """A new disk of at least the base's size. A failure leaves nothing."""
        ...

    def clone_of(self, name: str, new: str) -> Clone:
        """A new disk with the content of a clone as it is now. Nobody may write to that one meanwhile; both go on apart."""
        ...

    def open(self, name: str) -> Clone:
        """The clone, with everything that a reboot takes away made again. Any number of times."""
        ...

    def remove(self, name: str) -> None:
        """Whatever there is of it; nothing is fine too. Clones of it live on."""
        ...

    def flatten(self, name: str, target: Path) -> None:
        """Its content as a raw, sparse file of its own. ``target`` must not exist, and does not after a failure."""
        ...

    def grow(self, name: str, size: int) -> Clone:
        """A larger disk, zeros behind. A qcow2 clone that a virtual machine has open is grown by that machine instead."""
        ...

    def usage(self, name: str) -> Usage: ...

    def things(self, name: str) -> list[Thing]:
        """What the clone consists of on the host, also before it is made: for the ledger."""
        ...
