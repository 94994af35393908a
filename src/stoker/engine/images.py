"""Images and kernels as their users see them: listed, looked at, removed. Who uses one is in the sandboxes' rows."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final, NamedTuple

from stoker.api.models import Image, ImageList, Kernel, KernelList, Principal, SandboxState
from stoker.engine.core import Core
from stoker.engine.state import Record
from stoker.errors import Conflict
from stoker.images import inventory
from stoker.images.inventory import WORD, Item
from stoker.images.store import Store

__all__ = ["Images", "is_used", "users"]

NAMED: Final = 20
"""Users that an error names."""


class User(NamedTuple):
    """A sandbox or template that needs an image or a kernel, and the words of ``stoker`` that remove it."""

    owner: str
    label: str
    removed_by: str


def users(core: Core, kind: str, digest: str) -> list[User]:
    """The sandboxes whose disk, or next boot, needs an entry (one that never ran has none), and the templates that do."""

    def needs(record: Record) -> bool:
        return digest in (
            (record.kernel_path,) if kind == "kernels" else (record.image_digest, Path(record.image_path).parent.name)
        )

    boxes = [box.record for box in core.boxes.values() if box.record.state is not SandboxState.FAILED or box.record.boots]
    found = {
        User(record.owner, f"warm set {record.warm}", "warm IMAGE --size 0")
        if record.warm
        else User(record.owner, record.label, f"rm {record.label}")
        for record in boxes
        if needs(record)
    }
    templates = [one for one in core.templates.values() if needs(core.snapshots[one.snapshot].box)]
    return [*found] + [User(one.owner, f"template {one.name}", f"template rm {one.name}") for one in templates]


def is_used(core: Core, kind: str, digest: str) -> bool:
    """Whether an entry must stay: for a sandbox's sake, or for a frozen disk in a pool."""
    if users(core, kind, digest):
        return True
    if kind == "kernels" and any(one.box.kernel_path == digest for one in core.snapshots.values()):
        return True
    path = core.settings.data_dir.absolute() / kind / digest / "rootfs.ext4"
    return kind == "images" and any(pool.needs(path) for pool in core.pools.opened().values())


def _image(item: Item, used_by: list[str]) -> Image:
    manifest = item.manifest
    return Image(
        digest=item.digest,
        reference=manifest.name if manifest else "",
        names=list(item.names),
        size=item.size,
        disk=item.disk,
        created_at=item.created_at,
        fstype=str(manifest.facts.get("fstype", "")) if manifest else "",
        used_by=used_by,
        damaged=manifest is None,
    )


def _kernel(item: Item, used_by: list[str]) -> Kernel:
    manifest = item.manifest
    return Kernel(
        digest=item.digest,
        reference=manifest.name if manifest else "",
        names=list(item.names),
        size=item.size,
        disk=item.disk,
        created_at=item.created_at,
        release=str(manifest.facts.get("release", "")) if manifest else "",
        modules=bool(manifest and manifest.facts.get("modules")),
        used_by=used_by,
        damaged=manifest is None,
    )


class Images:
    """Fits :class:`stoker.server.ports.Images`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._store = Store(core.settings)

    def _labels(self, who: Principal, item: Item) -> list[str]:
        found = users(self._core, item.kind, item.digest)
        return sorted(user.label for user in found if who.admin or user.owner == who.owner)

    async def images(self, who: Principal) -> ImageList:
        found = await asyncio.to_thread(inventory.items, self._store, "images")
        return ImageList(items=[_image(item, self._labels(who, item)) for item in found])

    async def kernels(self, who: Principal) -> KernelList:
        found = await asyncio.to_thread(inventory.items, self._store, "kernels")
        return KernelList(items=[_kernel(item, self._labels(who, item)) for item in found])

    async def image(self, who: Principal, reference: str) -> Image:
        item, _ = await asyncio.to_thread(inventory.find, self._store, "images", reference)
        return _image(item, self._labels(who, item))

    async def kernel(self, who: Principal, reference: str) -> Kernel:
        item, _ = await asyncio.to_thread(inventory.find, self._store, "kernels", reference)
        return _kernel(item, self._labels(who, item))

    async def remove(self, kind: str, reference: str) -> None:
        """By name: that name, and the content with its last name. By digest: all of it."""
        await self._core.shielded(self._remove(kind, reference))

    async def _remove(self, kind: str, reference: str) -> None:
        core = self._core
        async with core.upkeep:
            item, name = await asyncio.to_thread(inventory.find, self._store, kind, reference)
            if inventory.shared_elsewhere(core.settings, kind):
                raise self._shared(kind, reference)
            if name is not None and len(item.names) > 1:
                inventory.forget_name(self._store, kind, name, item.digest)
                return
            if core.waiting is not None:
                await core.waiting.clear_parked()
            if not await inventory.remove(self._store, item, refused=lambda: is_used(core, kind, item.digest)):
                raise self._in_use(kind, reference, item)

    def _shared(self, kind: str, reference: str) -> Conflict:
        place = self._core.settings.data_dir / kind
        return Conflict(
            f"{WORD[kind]}_shared",
            f"{place} is another data directory's: who uses what is in it is not known here",
            f"remove it there: STOKER_DATA_DIR={place.resolve().parent} stoker {WORD[kind]} rm {reference}",
        )

    def _in_use(self, kind: str, reference: str, item: Item) -> Conflict:
        word = WORD[kind]
        found = sorted(users(self._core, kind, item.digest), key=lambda user: user.label)
        labels = [user.label for user in found]
        shown = ", ".join(labels[:NAMED]) + (f" and {len(labels) - NAMED} more" if len(labels) > NAMED else "")
        by = shown or "a sandbox that is just being made, or a disk in a pool"
        return Conflict(
            f"{word}_in_use",
            f"the {word} {reference} is in use by {by}",
            "; ".join(f"stoker {user.removed_by}" for user in found[:NAMED]) if found else "try again in a moment",
            details={"digest": item.digest, "used_by": labels},
        )
