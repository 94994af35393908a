"""Where the disks of sandboxes are: the pool in the data directory, and those with a file system of their own.

=============================  ==============================================================
``DATA_DIR/pool``              the pool named "": a plain directory, always there
``DATA_DIR/pools/NAME.xfs``    a file system (:mod:`stoker.storage.filesystem`), mounted on
``DATA_DIR/pools/NAME``        the pool of this name
=============================  ==============================================================

A pool is opened (and mounted) when it is first wanted, and held until the engine ends: a second one finds it taken.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stoker.engine.ledger import Kind
from stoker.errors import HostError, InvalidRequest, NotFound
from stoker.storage import filesystem
from stoker.storage.pool import Pool, Space
from stoker.storage.strategy import Base, Clone, Strategy

if TYPE_CHECKING:
    from stoker.settings import Settings

__all__ = ["MAIN", "MakeDisk", "Pools"]

MAIN: Final = "main"
"""The pool that a daemon makes by itself, and that new disks go to where it is there."""
MakeDisk = Callable[[Base, int], Awaitable[Clone]]
"""Makes (or opens) a machine's disk upon an image, of so many bytes."""
_KINDS: Final = {"device": Kind.DEVICE, "loop": Kind.LOOP, "directory": Kind.CLONE}


class Pools:
    """All pools of one data directory. :meth:`open` and what follows it block; :attr:`default` and names do not."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._open: dict[str, Pool] = {}
        self.default = ""
        """The pool of new disks."""

    # -- names --------------------------------------------------------------------------------------------------------

    def directory(self, pool: str) -> Path:
        return self._settings.data_dir / "pools" / pool if pool else self._settings.data_dir / "pool"

    def image(self, pool: str) -> Path:
        return self._settings.data_dir / "pools" / f"{pool}.xfs"

    def names(self) -> list[str]:
        """Those with a file system of their own."""
        try:
            files = os.listdir(self._settings.data_dir / "pools")
        except FileNotFoundError:
            return []
        return sorted(name.removesuffix(".xfs") for name in files if name.endswith(".xfs") and not name.startswith("."))

    def directories(self) -> list[Path]:
        return [self.directory(name) for name in ("", *self.names())]

    # -- opening ------------------------------------------------------------------------------------------------------

    def strategy(self) -> Strategy | None:
        """What the settings say; None: what works best."""
        wanted = self._settings.pool_strategy
        if wanted in ("", "auto"):
            return None
        try:
            return Strategy(wanted)
        except ValueError:
            words = ", ".join(["auto", *Strategy])
            raise InvalidRequest("bad_setting", f"pool_strategy: there is no {wanted!r}", words) from None

    def open(self, pool: str) -> Pool:
        """The pool, opened when it is first wanted. Errors: ``pool_unknown`` (NotFound), and those of opening."""
        with self._lock:
            found = self._open.get(pool)
            if found is None:
                found = self._open[pool] = self._opened(pool)
            return found

    def _opened(self, pool: str) -> Pool:
        place = self.directory(pool)
        if pool:
            image = self.image(pool)
            if not image.exists():
                raise NotFound("pool_unknown", f"there is no pool {pool}", "stoker pool ls")
            filesystem.attach(image, place)
        else:
            place.mkdir(mode=0o711, parents=True, exist_ok=True)
        return Pool.open(place, self.strategy(), who="stoker serve")

    def opened(self) -> dict[str, Pool]:
        """The pools that are open now, by name."""
        with self._lock:
            return dict(self._open)

    def space(self, pool: str) -> Space:
        """What guests can still write. Of a file system in a file the file's own counts too, less what is still to reach it."""
        found = self.open(pool)
        found.check()
        space = found.space()
        if not pool:
            return space
        outside = os.statvfs(self.image(pool).parent)
        coming = 0
        with open("/proc/meminfo", encoding="ascii") as f:
            for line in f:
                if line.startswith(("Dirty:", "Writeback:")):
                    coming += int(line.split()[1]) * 1024
        return Space(space.total, max(0, min(space.free, outside.f_bavail * outside.f_frsize - coming)))

    def forget(self, pool: str) -> None:
        """Closes one pool and unmounts its file system; ``pool_busy`` (HostError) when something of it is in use."""
        with self._lock:
            found = self._open.pop(pool, None)
            if found is not None:
                found.close()
            if not filesystem.detach(self.directory(pool)):
                self._open[pool] = self._opened(pool)
                raise HostError("pool_busy", f"the pool {pool} is in use", f"fuser -vm {self.directory(pool)} says by whom")

    def close(self) -> None:
        """Lets go of all. File systems that nobody uses are unmounted; the others stay, and are found again."""
        with self._lock:
            for name, pool in self._open.items():
                pool.close()
                if name:
                    filesystem.detach(self.directory(name))
            self._open.clear()

    # -- disks --------------------------------------------------------------------------------------------------------

    def things(self, pool: str, name: str) -> list[tuple[Kind, str]]:
        """What a disk consists of, in the ledger's words."""
        return [(_KINDS[thing.kind], thing.name) for thing in self.open(pool).things(name)]

    def maker(self, pool: str, name: str) -> MakeDisk:
        async def make(base: Base, size: int) -> Clone:
            return await asyncio.to_thread(lambda: self.open(pool).clone(base, name, size))

        return make

    def copier(self, pool: str, source: str, name: str) -> MakeDisk:
        """Makes a disk with what another one stands on: a frozen layer."""

        async def make(base: Base, size: int) -> Clone:
            return await asyncio.to_thread(lambda: self.open(pool).beside(source, name))

        return make

    async def freeze(self, pool: str, name: str) -> Clone:
        """What a disk has so far becomes a layer, see :meth:`stoker.storage.pool.Pool.freeze`."""
        return await asyncio.to_thread(lambda: self.open(pool).freeze(name))

    def sync_layers(self, pool: str, name: str) -> None:
        """Puts the layers that a disk stands on onto the host's disk."""
        for path in self.open(pool).open_clone(name).backing[:-1]:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def opener(self, pool: str, name: str) -> MakeDisk:
        async def find(base: Base, size: int) -> Clone:
            return await asyncio.to_thread(lambda: self.open(pool).open_clone(name))

        return find

    def sync(self, pool: str, name: str) -> None:
        """Puts on the host's disk what a machine wrote that is gone now: while it ran, its flushes did not go so far."""
        fd = os.open(self.open(pool).open_clone(name).path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        """Removes the disk whose directory this is (``POOL/clones/NAME``). There may be none; its pool may be gone for good."""
        for pool in ("", *self.names()):
            if path.parent == self.directory(pool) / "clones":
                self.open(pool).remove(path.name)
