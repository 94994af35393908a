"""The store in itself: staging directories without an owner, names that lead nowhere, entries that are not as they were made."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path

from stoker.engine.fsck.finding import Finding, Scene
from stoker.engine.images import is_used, users
from stoker.errors import Conflict, HostError, NotFound
from stoker.host.lock import hold_directory
from stoker.images import inventory
from stoker.images.inventory import KINDS, WORD
from stoker.images.store import Store

__all__ = ["content", "names", "staging"]


async def staging(scene: Scene) -> list[Finding]:
    """What is being made has an owner that lives."""
    settings = scene.core.settings
    if inventory.shared_elsewhere(settings, "staging"):
        return []
    store = Store(settings)
    found = []
    for path in store.staged():
        scene.count("staging")
        fd = hold_directory(path)
        if fd is not None:
            os.close(fd)
            found.append(
                Finding(
                    "staging", str(path), "somebody who is making it", "nobody", None, "remove it", partial(_discard, path, store)
                )
            )
    return found


async def _discard(path: Path, store: Store) -> None:
    if not await store.discard(path):
        raise HostError("staging_not_removed", f"{path} is still there", f"ls -la {path}")


async def names(scene: Scene) -> list[Finding]:
    """Every name leads to an entry."""
    store = Store(scene.core.settings)
    found = []
    for kind in KINDS:
        shared = inventory.shared_elsewhere(scene.core.settings, kind)
        for name, digest in store.names(kind).items():
            scene.count(f"{WORD[kind]}-name")
            if store.entry(kind, digest).is_dir():
                continue
            mend = partial(asyncio.to_thread, inventory.forget_name, store, kind, name, digest)
            path = str(store.root / kind / "names" / name)
            what = f"{digest[:80]}, which is not there"
            repair = "" if shared else "remove the name"
            found.append(Finding(f"{WORD[kind]}-name", path, "an entry", what, None, repair, None if shared else mend))
    return found


async def content(scene: Scene) -> list[Finding]:
    """Every entry is as it was made. Its bytes are read only when its main file was touched since that was last known."""
    store = Store(scene.core.settings)
    found = []
    for kind in KINDS:
        for item in await asyncio.to_thread(inventory.items, store, kind):
            scene.count(WORD[kind])
            if store.untouched(kind, item.digest):
                continue
            try:
                damage = await asyncio.to_thread(store.verify, kind, item.digest)
            except NotFound:
                continue  # removed meanwhile
            if damage:
                found.append(_damaged(scene, store, item, damage))
    return found


def _damaged(scene: Scene, store: Store, item: inventory.Item, damage: list[str]) -> Finding:
    core, word = scene.core, WORD[item.kind]
    place, what = str(store.entry(item.kind, item.digest)), "; ".join(damage[:5])
    used = sorted(user.label for user in users(core, item.kind, item.digest))
    if is_used(core, item.kind, item.digest) or inventory.shared_elsewhere(core.settings, item.kind):
        return Finding(word, place, "what was made", what + (f"; in use by {', '.join(used[:10])}" if used else ""))

    async def mend() -> None:
        if not await inventory.remove(store, item, refused=lambda: is_used(core, item.kind, item.digest)):
            raise Conflict(f"{word}_in_use", f"{place} is in use by now", "stoker fsck")

    return Finding(word, place, "what was made", what, None, "remove it; it is made again when it is needed", mend)
