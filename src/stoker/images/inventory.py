"""What the store holds, entry by entry; holding one while it is used; and taking one away.

Whoever uses an entry holds a *shared* lock on its directory from the moment it was found until somebody who is asked before a
removal knows of the use (:func:`hold`). A removal (:func:`remove`) takes the exclusive one or gives up, and then goes: names first,
then the entry's directory in one rename into a staging directory, then its content. So whoever crashes leaves the whole entry,
an entry without a name (for the next clean-up), or a staging directory without an owner (for the next sweep).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stoker.errors import HostError, NotFound, StokerError
from stoker.host.durable import sync_directory
from stoker.host.files import allocated
from stoker.host.lock import hold_directory
from stoker.host.trace import declare, trace
from stoker.images.kernel import resolve_kernel
from stoker.images.rootfs import resolve_image
from stoker.images.store import MAIN, Store
from stoker.images.suites import SUITES

if TYPE_CHECKING:
    from stoker.images.kernel import Kernel
    from stoker.images.progress import Progress
    from stoker.images.rootfs import RootFilesystem
    from stoker.images.store import Manifest
    from stoker.settings import Settings

__all__ = ["KINDS", "Item", "find", "forget_name", "hold", "held_image", "held_kernel", "items", "remove", "shared_elsewhere"]

KINDS: Final = ("images", "kernels")
WORD: Final = {"images": "image", "kernels": "kernel"}
BEING_REMOVED: Final = 0.02
"""Seconds between two looks at an entry that is just being taken away."""
POINTS: Final = declare("remove.after_names", "remove.after_rename")
SHORTEST: Final = 6
"""Characters of a digest that may stand for all of it."""


@dataclass(frozen=True, slots=True)
class Item:
    """One entry. ``size`` is its main file's length, ``disk`` what all of it takes (bytes). No ``manifest``: it cannot be read."""

    kind: str
    digest: str
    names: tuple[str, ...]
    manifest: Manifest | None
    size: int
    disk: int
    created_at: float


def shared_elsewhere(settings: Settings, kind: str) -> bool:
    """Whether a directory of the store is a link to another data directory's: then others use what is in it, unseen by us."""
    root = settings.data_dir.absolute()
    return os.path.realpath(root / kind) != os.path.join(os.path.realpath(root), kind)


def _item(store: Store, kind: str, digest: str, names: tuple[str, ...]) -> Item | None:
    place = store.entry(kind, digest)
    try:
        created = place.stat().st_mtime
        size = (place / MAIN[kind]).stat().st_size
    except FileNotFoundError:
        if not place.is_dir():
            return None
        created, size = place.stat().st_mtime, 0
    try:
        found = store.lookup(kind, digest)
    except StokerError:
        found = None
    return Item(kind, digest, names, found[1] if found else None, size, allocated(place), created)


def items(store: Store, kind: str) -> list[Item]:
    """Every entry of a kind, the newest first. Reads the size of everything in it: a thread's work."""
    named: dict[str, list[str]] = {}
    for name, digest in store.names(kind).items():
        named.setdefault(digest, []).append(name)
    try:
        digests = [entry.name for entry in os.scandir(store.root / kind) if len(entry.name) == 64 and entry.is_dir()]
    except FileNotFoundError:
        return []
    found = (_item(store, kind, digest, tuple(named.get(digest, ()))) for digest in digests)
    return sorted((item for item in found if item is not None), key=lambda item: (-item.created_at, item.digest))


def pointer(reference: str) -> str:
    """The name in the store for what a user calls it: ``debian:12`` is ``debian-bookworm``."""
    base = reference.removeprefix("base:")
    if base.startswith("debian:"):
        version = base.removeprefix("debian:")
        return f"debian-{SUITES.get(version, version)}"
    return base


def find(store: Store, kind: str, reference: str) -> tuple[Item, str | None]:
    """The entry a reference means, and the name when it was one: a name, ``debian:12``, a digest or the beginning of one."""
    word = WORD[kind]
    name = pointer(reference)
    names = store.names(kind)
    digest = names.get(name)
    if digest is None and len(reference) >= SHORTEST and all(c in "0123456789abcdef" for c in reference):
        name = ""
        matching = [item.digest for item in items(store, kind) if item.digest.startswith(reference)]
        if len(matching) > 1:
            raise NotFound(f"{word}_ambiguous", f"{len(matching)} {kind} begin with {reference}", f"stoker {word} ls")
        digest = matching[0] if matching else None
    item = None
    if digest is not None:
        item = _item(store, kind, digest, tuple(other for other, to in names.items() if to == digest))
    if item is None:
        raise NotFound(f"{word}_unknown", f"there is no {word} {reference} in the store", f"stoker {word} ls")
    return item, name or None


def hold(store: Store, kind: str, digest: str) -> int | None:
    """A descriptor that keeps an entry from being removed until it is closed; None when the entry is going, or gone."""
    place = store.entry(kind, digest)
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == os.lstat(place).st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


async def held_kernel(name: str, settings: Settings, progress: Progress, held: ExitStack) -> Kernel:
    """:func:`~stoker.images.kernel.resolve_kernel`, safe from removal until ``held`` closes."""
    while True:
        kernel = await resolve_kernel(name, settings, progress)
        if await _held(settings, "kernels", kernel.digest, held):
            return kernel


async def held_image(reference: str, settings: Settings, progress: Progress, held: ExitStack) -> RootFilesystem:
    """:func:`~stoker.images.rootfs.resolve_image`, likewise. A file that is not the store's is its owner's to look after."""
    while True:
        image = await resolve_image(reference, settings, progress)
        store = (settings.data_dir.absolute() / "images").resolve()
        digest = image.path.parent.name if image.path.resolve().parent.parent == store else ""
        if not digest or await _held(settings, "images", digest, held):
            return image


async def _held(settings: Settings, kind: str, digest: str, held: ExitStack) -> bool:
    fd = hold(Store(settings), kind, digest)
    if fd is None:
        await asyncio.sleep(BEING_REMOVED)
        return False
    held.callback(os.close, fd)
    return True


async def remove(store: Store, item: Item, *, refused: Callable[[], bool]) -> bool:
    """Takes an entry and all its names away. False, and nothing is changed, when somebody holds it or ``refused`` (asked when
    nobody can begin to use it any more) says so."""
    place = store.entry(item.kind, item.digest)
    fd = hold_directory(place)
    if fd is None:
        return False
    try:
        if refused():
            return False
        for name, digest in store.names(item.kind).items():
            if digest == item.digest:
                forget_name(store, item.kind, name, item.digest)
        trace("remove.after_names")
        try:
            async with store.stage() as stage:
                os.rename(place, stage.path / "entry")
                sync_directory(place.parent)
                trace("remove.after_rename")
        except FileNotFoundError:
            pass
    finally:
        os.close(fd)
    if os.path.lexists(place):
        raise HostError("image_not_removed", f"{place} is still there", f"ls -la {place}")
    return True


def forget_name(store: Store, kind: str, name: str, digest: str) -> None:
    """Takes a name away, if it stands for this digest."""
    path = store.root / kind / "names" / name
    try:
        if path.read_text().strip() == digest:
            path.unlink()
            sync_directory(path.parent)
    except FileNotFoundError:
        pass
