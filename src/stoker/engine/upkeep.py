"""Looking after the whole host, for administrators: the check and the clean-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker.engine.core import Core

if TYPE_CHECKING:
    from stoker.api.models import FsckReport, GcReport

__all__ = ["Upkeep"]


class Upkeep:
    """Fits :class:`stoker.server.ports.Upkeep`. Work that was begun is finished, whoever goes."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def fsck(self, *, repair: bool) -> FsckReport:
        from stoker.engine.fsck.check import check

        return await self._core.shielded(check(self._core, repair=repair))

    async def gc(self, *, dry_run: bool) -> GcReport:
        from stoker.engine.gc import collect

        return await self._core.shielded(collect(self._core, dry_run=dry_run))
