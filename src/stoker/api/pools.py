"""Pools on the wire: where the disks of sandboxes are."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from stoker.api.types import ByteCount, Model, Name

__all__ = ["CreatePool", "Pool", "PoolList"]


class CreatePool(Model, frozen=True):
    """A pool to be: a file system in a file that takes the room of what is in it. ``size`` is what it can hold, in bytes."""

    size: Annotated[int, Meta(ge=320 << 20, le=64 << 40)]
    name: Name = "main"


class Pool(Model, frozen=True):
    """A pool. ``name`` is empty for the data directory itself. ``default``: new disks go there. ``allocated``: what its file takes
    of the host. ``trials``: milliseconds that a small clone took by each strategy, or why there is none (of one pool only)."""

    name: str
    path: str
    default: bool = False
    mounted: bool = True
    strategy: str = ""
    total: ByteCount = 0
    free: ByteCount = 0
    allocated: ByteCount = 0
    disks: int = 0
    error: str = ""
    trials: dict[str, float | str] = field(default_factory=dict)


class PoolList(Model, frozen=True):
    """All of them."""

    items: list[Pool]
