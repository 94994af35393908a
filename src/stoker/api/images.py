"""Images and kernels on the wire: what the store holds, and who uses it."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta, field

from stoker.api.types import END, ByteCount, Model, UnixTime

__all__ = ["Image", "ImageList", "Kernel", "KernelList"]

Digest: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}" + END, description="Stands for every byte of it.")]


class Image(Model, frozen=True):
    """A root file system in the store. ``size`` is the guest's view of it, ``disk`` what it takes on the host (blocks).

    ``names`` lead to it; without one it was superseded. ``used_by`` are the sandboxes whose disks stand on it, by name or id: one's
    own, for the administrator all. ``damaged``: its description cannot be read.
    """

    digest: Digest
    reference: str
    names: list[str]
    size: ByteCount
    disk: ByteCount
    created_at: UnixTime
    fstype: str = ""
    used_by: list[str] = field(default_factory=list)
    damaged: bool = False


class ImageList(Model, frozen=True):
    """All of them, the newest first."""

    items: list[Image]


class Kernel(Model, frozen=True):
    """A kernel in the store. ``size`` is its vmlinux's length, ``disk`` what it takes with its modules (blocks).

    ``names``, ``used_by`` and ``damaged`` as of an image. ``modules``: it has modules of its own in the store.
    """

    digest: Digest
    reference: str
    names: list[str]
    size: ByteCount
    disk: ByteCount
    created_at: UnixTime
    release: str = ""
    modules: bool = False
    used_by: list[str] = field(default_factory=list)
    damaged: bool = False


class KernelList(Model, frozen=True):
    """All of them, the newest first."""

    items: list[Kernel]
