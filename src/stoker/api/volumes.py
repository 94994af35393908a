"""Volumes and app archives on the wire."""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias

from msgspec import Meta, field

from stoker.api.types import END, MIB, TIB, Model, Name, UnixTime
from stoker.errors import InvalidRequest

__all__ = ["AppInfo", "CreateVolume", "ResizeVolume", "Volume", "VolumeMount", "VolumePage", "VolumeUser", "parse_mount"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

VolumeId: TypeAlias = Annotated[
    str, Meta(pattern=r"^vol-[a-z2-7]{16}" + END, description="A volume: `vol-` and 16 base32 characters.")
]
VolumeSize: TypeAlias = Annotated[
    int, Meta(ge=16 * MIB, le=16 * TIB, description="Bytes; rounded up to whole MiB. A volume takes the room of what is in it.")
]
MountPath: TypeAlias = Annotated[
    str, Meta(min_length=2, max_length=1024, pattern=r"^/[^\x00]+" + END, description="Absolute, in the guest; made where missing.")
]
Digest: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}" + END, description="A SHA-256 in hexadecimal digits.")]


class VolumeMount(Model, frozen=True):
    """A volume by name (or id) and where in the sandbox it is. Writable, it has no other user."""

    name: Name
    path: MountPath
    read_only: bool = False


def parse_mount(text: str) -> VolumeMount:
    """``NAME:/path`` or ``NAME:/path:ro``, as on a command line."""
    name, _, rest = text.partition(":")
    path, colon, word = rest.rpartition(":")
    if word in ("ro", "rw") and colon and path.startswith("/"):
        rest, read_only = path, word == "ro"
    else:
        read_only = False
    if NAME.fullmatch(name) is None or not rest.startswith("/") or rest == "/" or "\0" in rest:
        raise InvalidRequest("bad_mount", f"{text[:200]!r} is not NAME:/path", "-v NAME:/path, or -v NAME:/path:ro to read only")
    return VolumeMount(name=name, path=rest, read_only=read_only)


class VolumeUser(Model, frozen=True):
    """Who uses a volume: a sandbox (``id`` and ``name``), or an import or export that is going on."""

    id: str
    name: str
    read_only: bool = False


class Volume(Model, frozen=True):
    """One volume. ``size`` is what a guest sees, ``used`` what it takes on the host's disk, both in bytes."""

    id: VolumeId
    name: Name
    size: int
    created_at: UnixTime
    owner: str = ""
    used: int = 0
    users: list[VolumeUser] = field(default_factory=list)


class VolumePage(Model, frozen=True):
    """One page of volumes."""

    items: list[Volume]
    next: str | None = None


class CreateVolume(Model, frozen=True):
    """An empty volume: an ext4 file system."""

    name: Name
    size: VolumeSize = 1024 * MIB


class ResizeVolume(Model, frozen=True):
    """Its new, larger size."""

    size: VolumeSize


class AppInfo(Model, frozen=True):
    """An app archive that is ready to be used: the SHA-256 of the archive, and what is in it."""

    digest: Digest
    entries: int = 0
    bytes: int = 0
    """Of the files' contents."""
