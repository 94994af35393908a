"""App archives: taken in once by their checksum, then named by it. Who has not uploaded one cannot name it.

What is in an archive counts against the disk of each owner that has uploaded it, until it is freed (:mod:`.gc`).
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from stoker.api.models import AppInfo, Principal, Quota
from stoker.errors import CapacityExhausted, NotFound
from stoker.storage.app import AppFacts, discard_app, find_app, make_app, use_app

if TYPE_CHECKING:
    from stoker.engine.core import Core

__all__ = ["Apps", "forget_app"]


def _info(digest: str, facts: AppFacts) -> AppInfo:
    return AppInfo(digest=digest, entries=facts.entries, bytes=facts.bytes)


def _holder(owner: str, digest: str) -> str:
    """Under which name the book of reservations has it."""
    return f"app {digest} of {owner}"


class Apps:
    """The images are everybody's; the table says who may know of them."""

    def __init__(self, core: Core, quota: Callable[[str], Quota | None]) -> None:
        self._core = core
        self._quota = quota

    async def begin(self) -> None:
        """What is there is reserved."""
        core = self._core
        rows: list[tuple[str, str]] = await core.database.read(lambda db: db.execute("SELECT owner, digest FROM apps").fetchall())
        for owner, digest in rows:
            facts = await asyncio.to_thread(find_app, core.settings.data_dir, digest)
            if facts is not None:
                core.apps.add(_holder(owner, digest))
                core.admission.hold_volume(_holder(owner, digest), owner=owner, disk=facts.bytes)

    async def get(self, who: Principal, digest: str) -> AppInfo:
        data_dir = self._core.settings.data_dir
        query = "SELECT 1 FROM apps WHERE digest = ? AND (owner = ? OR ?)"
        known = await self._core.database.read(lambda db: db.execute(query, (digest, who.owner, who.admin)).fetchone())
        facts = await asyncio.to_thread(use_app, data_dir, digest) if known else None
        if facts is None:
            raise NotFound("app_unknown", f"there is no app {digest}", "upload its archive first")
        return _info(digest, facts)

    async def put(self, who: Principal, digest: str, source: AsyncIterator[bytes]) -> AppInfo:
        """Errors: those of :func:`make_app`, ``capacity_exhausted``."""
        core = self._core
        facts = await make_app(core.settings.data_dir, digest, source)
        holder = _holder(who.owner, digest)
        try:
            core.admission.admit_volume(holder, owner=who.owner, disk=facts.bytes, quota=self._quota(who.owner))
        except CapacityExhausted:
            if not await core.database.read(lambda db: db.execute("SELECT 1 FROM apps WHERE digest = ?", (digest,)).fetchone()):
                await asyncio.to_thread(discard_app, core.settings.data_dir, digest)
            raise
        core.apps.add(holder)

        def work(db: sqlite3.Connection) -> None:
            values = (who.owner, digest, time.time(), facts.bytes)
            db.execute("INSERT OR IGNORE INTO apps (owner, digest, created, size) VALUES (?, ?, ?, ?)", values)

        await core.database.write(work)
        return _info(digest, facts)


async def forget_app(core: Core, digest: str) -> None:
    """An image that is gone is nobody's."""

    def work(db: sqlite3.Connection) -> list[str]:
        return [owner for (owner,) in db.execute("DELETE FROM apps WHERE digest = ? RETURNING owner", (digest,)).fetchall()]

    for owner in await core.database.write(work):
        core.apps.discard(_holder(owner, digest))
        core.admission.release(_holder(owner, digest))
