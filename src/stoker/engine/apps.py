"""App archives: taken in once by their checksum, then named by it. Who has not uploaded one cannot name it."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from stoker.api.models import AppInfo, Principal
from stoker.errors import NotFound
from stoker.storage.app import AppFacts, make_app, use_app

if TYPE_CHECKING:
    from stoker.engine.core import Core

__all__ = ["Apps"]


def _info(digest: str, facts: AppFacts) -> AppInfo:
    return AppInfo(digest=digest, entries=facts.entries, bytes=facts.bytes)


class Apps:
    """The images are everybody's; the table says who may know of them."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def get(self, who: Principal, digest: str) -> AppInfo:
        data_dir = self._core.settings.data_dir
        query = "SELECT 1 FROM apps WHERE digest = ? AND (owner = ? OR ?)"
        known = await self._core.database.read(lambda db: db.execute(query, (digest, who.owner, who.admin)).fetchone())
        facts = await asyncio.to_thread(use_app, data_dir, digest) if known else None
        if facts is None:
            raise NotFound("app_unknown", f"there is no app {digest}", "upload its archive first")
        return _info(digest, facts)

    async def put(self, who: Principal, digest: str, source: AsyncIterator[bytes]) -> AppInfo:
        facts = await make_app(self._core.settings.data_dir, digest, source)

        def work(db: sqlite3.Connection) -> None:
            values = (who.owner, digest, time.time(), facts.bytes)
            db.execute("INSERT OR IGNORE INTO apps (owner, digest, created, size) VALUES (?, ?, ?, ?)", values)

        await self._core.database.write(work)
        return _info(digest, facts)
