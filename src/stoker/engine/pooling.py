"""Making, looking at and removing pools, and the one that a daemon makes by itself."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from typing import TYPE_CHECKING, Final

from stoker.api.models import CreatePool
from stoker.api.models import Pool as PoolInfo
from stoker.engine.pools import MAIN
from stoker.engine.trace import trace
from stoker.errors import Conflict, InvalidRequest, NotFound, StokerError
from stoker.host import loop
from stoker.host.reflink import shares
from stoker.host.run import tool_environment
from stoker.storage import filesystem
from stoker.storage.strategy import Strategy

if TYPE_CHECKING:
    from stoker.engine.core import Core

__all__ = ["Pooling"]

log = logging.getLogger(__name__)
MIB: Final = 1 << 20
SHARE: Final = 0.8
"""Of the free space: what the pool that is made by itself can hold."""


class Pooling:
    """Fits :class:`stoker.server.ports.Pools`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._lock = asyncio.Lock()

    async def begin(self) -> None:
        """Opens (and mounts) what there is. A pool that cannot be is a problem told, not a reason to end."""
        pools, wanted = self._core.pools, self._core.settings.pool
        for name in pools.names():
            try:
                await asyncio.to_thread(pools.open, name)
            except (StokerError, OSError) as error:
                log.exception("the pool %s cannot be used", name)
                self._core.problems.append(f"the pool {name} cannot be used: {error}")
        chosen = {"auto": MAIN, "directory": ""}.get(wanted, wanted)
        if chosen in pools.opened():
            pools.default = chosen
        elif wanted not in ("auto", "directory"):
            self._core.problems.append(f"there is no pool {wanted}: new disks go to the data directory")

    async def make_by_itself(self) -> None:
        """A pool whose files share blocks, where those of the data directory cannot: root's only, once, and never in the way."""
        core = self._core
        settings = core.settings
        try:
            there = core.pools.names()
            if settings.pool != "auto" or os.geteuid() != 0 or there or not os.access(loop.CONTROL, os.W_OK):
                return
            tools = shutil.which("mkfs.xfs", path=tool_environment()["PATH"])
            if tools is None or await asyncio.to_thread(shares, settings.data_dir):
                return
            found = os.statvfs(settings.data_dir)
            size = int(found.f_bavail * found.f_frsize * SHARE) // MIB * MIB
            if size >= filesystem.LEAST:
                await self.create(CreatePool(size=size, name=MAIN))
        except (StokerError, OSError) as error:
            log.warning("no pool was made: %s", error)

    async def create(self, request: CreatePool) -> PoolInfo:
        pools = self._core.pools
        if os.geteuid() != 0:
            raise InvalidRequest("needs_root", "a pool with a file system of its own is mounted, which needs root", "sudo stoker")
        async with self._lock:
            image = pools.image(request.name)
            image.parent.mkdir(mode=0o711, exist_ok=True)
            await filesystem.make(image, request.size // 4096 * 4096)
            try:
                await asyncio.to_thread(pools.open, request.name)
            except BaseException:
                await asyncio.to_thread(filesystem.detach, pools.directory(request.name))
                image.unlink()
                raise
            if self._core.settings.pool in ("auto", request.name):
                pools.default = request.name
            self._core.ring()
            return await asyncio.to_thread(self._look, request.name)

    async def list(self) -> list[PoolInfo]:
        return [await asyncio.to_thread(self._look, name) for name in ("", *self._core.pools.names())]

    async def get(self, name: str) -> PoolInfo:
        name = self._known(name)
        return await asyncio.to_thread(self._look, name, True)

    def _known(self, name: str) -> str:
        """``directory`` is the word for the pool without a name."""
        if name != "directory" and name not in self._core.pools.names():
            raise NotFound("pool_unknown", f"there is no pool {name}", "stoker pool ls")
        return "" if name == "directory" else name

    def _look(self, name: str, trials: bool = False) -> PoolInfo:
        pools = self._core.pools
        path = pools.directory(name)
        info = PoolInfo(name=name, path=str(path), default=name == pools.default)
        try:
            pool = pools.open(name)
            disks = len(pool.names())
            space = pools.space(name)
            allocated = os.stat(pools.image(name)).st_blocks * 512 if name else 0
            tried = [pool.trial(strategy) for strategy in Strategy] if trials else []
        except (StokerError, OSError) as error:
            return PoolInfo(name=name, path=str(path), default=info.default, mounted=False, error=str(error))
        return PoolInfo(
            name=name,
            path=str(path),
            default=info.default,
            strategy=pool.strategy.value,
            total=space.total,
            free=space.free,
            allocated=allocated,
            disks=disks,
            trials={trial.strategy.value: trial.error or round(trial.seconds * 1000, 3) for trial in tried},
        )

    async def remove(self, name: str) -> None:
        """Errors: ``pool_in_use`` (Conflict) with the sandboxes, ``pool_busy`` (HostError)."""
        name = self._known(name)
        core = self._core
        if not name:
            raise Conflict("pool_needed", "the data directory is always a pool", "stoker pool ls")
        async with self._lock:
            users = sorted(box.record.label for box in core.boxes.values() if box.record.pool == name)
            if not users:
                # From here on nothing new is made in it.
                before, core.pools.default = core.pools.default, "" if core.pools.default == name else core.pools.default
                try:
                    users = await asyncio.to_thread(lambda: core.pools.open(name).names())
                    if not users:
                        await asyncio.to_thread(core.pools.forget, name)
                        trace("pool.after_unmount")
                        core.pools.image(name).unlink()
                        trace("pool.after_unlink")
                        core.pools.directory(name).rmdir()
                        return
                except BaseException:
                    core.pools.default = before
                    raise
                core.pools.default = before
            raise Conflict(
                "pool_in_use",
                f"the pool {name} holds the disks of {', '.join(users[:10])}",
                "stoker rm them first",
                details={"users": users},
            )
