"""Watches the space that guests' writes need: a pool that nears full pauses its writers before any write of theirs fails.

Below :func:`reserve` bytes every running machine of the pool is frozen (``reason`` of its row: ``pool_full``); it goes on when
half as much again is free. How long the watch sleeps follows from what is free: even at :data:`FASTEST` bytes a second the reserve
is not used up in between. Beneath this lies QEMU's own stop at a write that failed, seen here within :data:`LOOK` seconds: such a
guest is frozen too, and goes on with that very write. With room left it was the host's disk (``disk_error``): ``thaw`` tries again.

A machine writes to its pool, and, with volumes or an app, to the data directory's own files: it waits while either is full.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from typing import TYPE_CHECKING, Final

from stoker.api.models import SandboxState
from stoker.errors import CapacityExhausted, Conflict, GuestError, HostError, StokerError
from stoker.storage.pool import Space

if TYPE_CHECKING:
    from pathlib import Path

    from stoker.engine.core import Box, Core

__all__ = ["POOL_FULL", "Filling", "period", "reserve"]

log = logging.getLogger(__name__)
S = SandboxState
MIB: Final = 1 << 20
FASTEST: Final = 4096 * MIB
LOOK: Final = 5.0
POOL_FULL: Final = "pool_full"
DISK_ERROR: Final = "disk_error"
VOLUMES: Final = ":volumes"
"""Where volumes and the layers over apps are; no pool has such a name. Of its own only where it is another file system."""


def reserve(total: int) -> int:
    """Bytes that are kept free of a file system of this size."""
    return min(max(total // 100, 16 * MIB), 256 * MIB)


def period(space: Space) -> float:
    """Seconds that may pass until it is looked at again."""
    return min(max((space.free - reserve(space.total)) / FASTEST, 0.05), 2.0)


class Filling:
    """One watch over all pools of an engine."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._full: set[str] = set()
        self._warned: set[str] = set()
        self._looked = 0.0
        self._volumes = VOLUMES

    def check(self, pool: str, *, further: bool = False) -> None:
        """Raises ``pool_full`` (CapacityExhausted): nothing new may begin to write there. ``further``: volumes, an app too."""
        for name in (pool, self._volumes) if further else (pool,):
            if name in self._full:
                raise CapacityExhausted(POOL_FULL, f"{self._called(name)} is full", "stoker rm what is not needed, stoker gc")

    def _places(self, box: Box) -> set[str]:
        """Where its machine's writes go."""
        record = box.record
        further = record.request.app is not None or any(not volume.read_only for volume in record.volumes)
        return {record.pool, self._volumes} if further else {record.pool}

    def _directory(self, name: str) -> Path:
        return self._core.settings.data_dir / "volumes" if name == VOLUMES else self._core.pools.directory(name)

    def _called(self, name: str) -> str:
        return f"the file system of {self._directory(name)}" if name == VOLUMES else f"the pool {name or self._directory(name)}"

    def _space(self, name: str) -> Space:
        if name != VOLUMES:
            return self._core.pools.space(name)
        found = os.statvfs(self._directory(name))
        return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    def _look_where(self) -> list[str]:
        """The places to be watched: the pools that are open, and the volumes' where no pool is in the same file system."""
        names = list(self._core.pools.opened())
        try:
            same = "" in names and os.stat(self._directory("")).st_dev == os.stat(self._directory(VOLUMES)).st_dev
        except OSError:
            same = False  # told when it is looked at
        self._volumes = "" if same else VOLUMES
        if same:
            self._full.discard(VOLUMES)
        elif VOLUMES in self._full or any(VOLUMES in self._places(box) for box in self._core.boxes.values() if box.live):
            names.append(VOLUMES)
        return names

    def check_thaw(self, box: Box) -> None:
        """Refuses to let a machine go on that waits for space which is not there."""
        if box.record.reason and self._places(box) & self._full:
            raise Conflict(
                POOL_FULL,
                f"{box.record.label} waits for space in its pool",
                "stoker rm what is not needed, stoker gc: it goes on by itself",
            )

    def problems(self) -> list[str]:
        return [f"{self._called(name)} is full: its sandboxes wait" for name in sorted(self._full)]

    async def watch(self) -> None:
        """For as long as the engine serves."""
        core = self._core
        while True:
            pause = 2.0
            for name in self._look_where():
                try:
                    space = await asyncio.to_thread(self._space, name)
                    await self._judge(name, space)
                except (StokerError, OSError) as error:
                    await self._missing(name, error)
                else:
                    pause = min(pause, period(space))
            if time.monotonic() - self._looked > LOOK:
                self._looked = time.monotonic()
                await self._stopped_by_themselves()
            if self._full or any(box.live is not None for box in core.boxes.values()):
                await asyncio.sleep(pause)
            else:
                # Nobody writes, and nobody is refused.
                bell = core.bell
                await bell.wait()

    async def _judge(self, name: str, space: Space) -> None:
        low = reserve(space.total)
        if space.free < 2 * low and name not in self._warned:
            self._warned.add(name)
            await self._tell("pool.filling", name, space)
        elif space.free > 4 * low:
            self._warned.discard(name)
        if space.free < low:
            if name not in self._full:
                log.warning("%s is full (%d bytes left): its sandboxes are paused", self._called(name), space.free)
                self._full.add(name)
                await self._tell("pool.full", name, space)
            await self._each(name, S.RUNNING, self._pause)
        elif space.free > low + low // 2:
            if name in self._full:
                self._full.discard(name)
                await self._tell("pool.free", name, space)
            await self._each(name, S.FROZEN, self._go_on)

    async def _missing(self, name: str, error: Exception) -> None:
        """A pool that was unmounted underneath: what is open goes on; it is told once."""
        words = f"{self._called(name)}: {getattr(error, 'message', error)}"
        if words not in self._core.problems:
            log.error("%s", words)
            self._core.problems.append(words)

    async def _each(self, place: str, state: SandboxState, act: object) -> None:
        boxes = [box for box in self._core.boxes.values() if box.record.state is state and box.live and place in self._places(box)]
        if state is S.FROZEN:
            boxes = [box for box in boxes if box.record.reason == POOL_FULL and not self._places(box) & self._full]
        await asyncio.gather(*(act(box) for box in boxes))  # type: ignore[operator]

    async def _pause(self, box: Box, reason: str = POOL_FULL) -> None:
        async with box.lock:
            if box.record.state is not S.RUNNING or box.live is None or box.record.doomed:
                return
            # The row first: found paused after a crash, it would be nobody's to let go on.
            await self._core.save(box, event="sandbox.state", state=S.FROZEN, reason=reason)
            try:
                await box.live.machine.freeze()
            except GuestError as error:
                log.warning("%s could not be paused: %s", box.id, error)
                await self._core.save(box, event="sandbox.state", state=S.RUNNING, reason="")

    async def _go_on(self, box: Box) -> None:
        async with box.lock:
            if box.record.state is not S.FROZEN or box.record.reason != POOL_FULL or box.live is None or box.record.doomed:
                return
            try:
                await box.live.machine.thaw()
            except GuestError as error:
                log.warning("%s could not go on: %s", box.id, error)
                return
            await self._core.save(box, event="sandbox.state", state=S.RUNNING, reason="")
            if box.live.agent is not None:
                try:
                    await box.live.agent.set_time()
                except StokerError as error:
                    log.warning("the clock of %s could not be set: %s", box.id, error)

    async def _stopped_by_themselves(self) -> None:
        """Machines whose VMM stopped them at a write that failed."""
        for box in list(self._core.boxes.values()):
            if box.record.state is not S.RUNNING or box.live is None:
                continue
            try:
                async with asyncio.timeout(1.0):
                    status = await box.live.machine.status()
            except (GuestError, HostError, TimeoutError):
                continue
            if status == "io-error":
                try:
                    spaces = [await asyncio.to_thread(self._space, name) for name in self._places(box)]
                    full = any(space.free < 2 * reserve(space.total) for space in spaces)
                except (StokerError, OSError):
                    full = False
                log.warning("%s was stopped by its VMM: a write failed", box.id)
                await self._pause(box, POOL_FULL if full else DISK_ERROR)

    async def _tell(self, kind: str, name: str, space: Space) -> None:
        """An event of the host's, for its administrators. ``pool`` is "" for the data directory's, and for volumes."""
        pool, path = "" if name == VOLUMES else name, str(self._directory(name))
        event = self._core.events.make(kind, None, pool=pool, path=path, free=space.free, total=space.total)

        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO numbers (name, value) VALUES ('event', ?)", (event.id,))

        await self._core.database.write(work)
        self._core.events.tell("", event)
