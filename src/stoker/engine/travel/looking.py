"""Whether a snapshot's file can become one here, by what its manifest says: nothing is made for one that cannot."""

from __future__ import annotations

import hashlib
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import msgspec

from stoker.engine.travel.format import MOST_IMAGE, Image, Manifest, damaged
from stoker.engine.travel.outward import FACTS
from stoker.errors import CapacityExhausted, HostError, NotFound
from stoker.images import inventory
from stoker.images.store import MAIN, Store
from stoker.images.store import Manifest as Entry
from stoker.storage.overlay import CLUSTER, L2_COVERS, MAX_SIZE

if TYPE_CHECKING:
    from stoker.engine.core import Core

__all__ = ["check", "image_here", "kernel_here"]

ORDER: Final = ("image", "disk", "memory", "delta", "state")
ROOM: Final = 64 << 20
"""Bytes that stay free besides what the file says it unpacks to."""


def check(core: Core, manifest: Manifest) -> None:
    """What the parts are, and whether there is room for them."""
    names = [part.name for part in manifest.parts]
    if names != [name for name in ORDER if name in names] or "disk" not in names:
        raise damaged("its parts are " + ", ".join(names))
    memory, state, delta = manifest.part("memory"), manifest.part("state"), manifest.part("delta")
    if (memory is None) != (state is None) or (delta is not None and memory is None):
        raise damaged("it has a part of a machine's memory")
    disk, image = manifest.part("disk"), manifest.part("image")
    if disk is None or disk.size % 512 or not manifest.image.size <= disk.size <= MAX_SIZE or disk.size != manifest.machine.disk:
        raise damaged("the size of its disk")
    if manifest.image.size % 512 or manifest.image.size > MOST_IMAGE or (image is not None and image.size != manifest.image.size):
        raise damaged("the size of its image")
    _check_image(manifest.image)
    if memory is not None and memory.size != manifest.machine.memory:
        raise damaged("the size of its memory")
    for part in manifest.parts:
        if part.bytes > part.size:
            raise damaged(f"the size of its {part.name}")
    # Zeros cost nothing in the file, and tables here.
    wanted = sum(part.bytes for part in manifest.parts) + disk.size // L2_COVERS * CLUSTER + ROOM
    status = os.statvfs(core.settings.data_dir)
    free = min(status.f_bavail * status.f_frsize, core.pools.space(core.pools.default).free)
    if wanted > free:
        raise CapacityExhausted(
            "no_space", f"the snapshot unpacks to {wanted >> 20} MiB and {free >> 20} MiB are free", "stoker rm, stoker gc"
        )


def _check_image(image: Image) -> None:
    """Its entry is of the kind that the store makes of a root file system, and has the digest that it says."""
    data = image.entry.encode()
    try:
        entry = msgspec.json.decode(data, type=Entry)
    except msgspec.DecodeError:
        raise damaged("its image's entry") from None
    facts = entry.facts
    known = facts.keys() <= FACTS and facts.get("size") == image.size and facts.get("fstype") == "ext4"
    named = isinstance(facts.get("suite", ""), str) and len(entry.name) <= 1024
    if entry.kind != "images" or not known or not named or hashlib.sha256(data).hexdigest() != image.digest:
        raise damaged("its image's entry")


async def image_here(store: Store, manifest: Manifest, stack: AsyncExitStack) -> bool:
    """Whether its image is in the store; it stays there until the stack is closed."""
    digest = manifest.image.digest
    if store.lookup("images", digest) is None:
        if manifest.part("image") is None:
            label = manifest.image.label or digest
            raise NotFound(
                "image_missing", f"the file is without its image, {label} ({digest}), which is not here", "export it with its image"
            )
        return False
    fd = inventory.hold(store, "images", digest)
    if fd is None:
        raise HostError("image_going", f"the image {digest} is just being removed", "try again")
    stack.callback(os.close, fd)
    await store.require_intact("images", digest)
    if os.stat(store.entry("images", digest) / MAIN["images"]).st_size != manifest.image.size:
        raise damaged("the size of its image")
    return True


def kernel_here(store: Store, manifest: Manifest) -> str:
    """The kernel it boots with: its own, or else what its name stands for here. (Memory brings its kernel along.)"""
    machine = manifest.machine
    for name in (machine.kernel_digest, inventory.pointer(machine.kernel)):
        if name and "/" not in name and (found := store.lookup("kernels", name)) is not None:
            return found[0]
    raise NotFound(
        "kernel_missing",
        f"the snapshot's kernel, {machine.kernel} ({machine.kernel_digest}), is not here, nor any of that name",
        f"stoker run --kernel {machine.kernel or 'NAME'} {manifest.image.label or 'IMAGE'} true gets it",
    )
