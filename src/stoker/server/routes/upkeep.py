"""Looking after the host. Over the Unix socket only."""

from __future__ import annotations

from typing import Any

from stoker.api.models import Fsck, FsckReport, Gc, GcReport
from stoker.server.endpoint import Call, Routes

__all__ = ["routes"]

routes: Routes[Any] = Routes("host")


@routes.post("/v1/host/fsck", answers={200: FsckReport}, errors=(403,), local=True)
async def check_host(call: Call, body: Fsck) -> FsckReport:
    """Compare the books with the host and name every difference; with `repair`, mend them."""
    return await call.engine.upkeep.fsck(repair=body.repair)


@routes.post("/v1/host/gc", answers={200: GcReport}, errors=(403,), local=True)
async def free_host(call: Call, body: Gc) -> GcReport:
    """Free what nothing refers to, and say how much that was; with `dry_run`, only say it."""
    return await call.engine.upkeep.gc(dry_run=body.dry_run)
