"""Snapshots on the wire: what a sandbox was at one moment, to start others from."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, TypeAlias

from msgspec import Meta, field

from stoker.api.sandboxes import Resources
from stoker.api.types import END, Model, Name, OperationId, UnixTime

__all__ = ["CreateSnapshot", "Snapshot", "SnapshotId", "SnapshotList", "SnapshotState"]

SnapshotId: TypeAlias = Annotated[
    str, Meta(pattern=r"^sn-[a-z2-7]{20}" + END, description="A snapshot: `sn-` and 20 base32 characters.")
]
Tags: TypeAlias = Annotated[
    list[Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f]+" + END)]], Meta(max_length=32)
]


class SnapshotState(StrEnum):
    """``making``: not whole yet."""

    MAKING = "making"
    READY = "ready"


class CreateSnapshot(Model, frozen=True):
    """What is taken. ``memory``: devices and processes, too; without, the disk alone, which a copy then boots from."""

    name: Name | None = None
    tags: Tags = field(default_factory=list)
    memory: bool = True
    compact: bool = False
    """Leave out what the guest does not use: its caches are dropped and its free memory cleared first, which takes it a moment."""


class Snapshot(Model, frozen=True):
    """One snapshot. ``own`` bytes are freed with it, ``shared`` ones belong to other snapshots or sandboxes, too."""

    id: SnapshotId
    state: SnapshotState
    created_at: UnixTime
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    owner: str = ""
    parent: SnapshotId | None = None
    """The snapshot that its sandbox was made from, or that was made of it before."""
    sandbox: str = ""
    image: str = ""
    image_digest: str = ""
    kernel: str = ""
    memory: bool = True
    resources: Resources = field(default_factory=Resources)
    unfit: str = ""
    """Why its memory is of no use on this host; its disk boots (`cold`). Only of one that was imported."""
    own: int = 0
    shared: int = 0
    operation: OperationId | None = None
    steps: dict[str, float] = field(default_factory=dict)
    """Milliseconds that the parts of making it took; ``stopped``: how long the guest stood."""


class SnapshotList(Model, frozen=True):
    """Snapshots, newest first."""

    items: list[Snapshot]
