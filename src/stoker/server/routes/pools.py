"""Pools: where the disks of sandboxes are. Over the Unix socket only."""

from __future__ import annotations

from typing import Any

from stoker.api.models import CreatePool, Pool, PoolList
from stoker.server.endpoint import Call, Routes
from stoker.server.replies import Reply, json_reply

__all__ = ["routes"]

routes: Routes[Any] = Routes("pools")


@routes.post("/v1/pools", answers={201: Pool}, errors=(403, 409, 429, 503), local=True)
async def create_pool(call: Call, body: CreatePool) -> Reply:
    """Make a pool with a file system of its own; new disks go there from then on."""
    return json_reply(await call.engine.pools.create(body), 201)


@routes.get("/v1/pools", answers={200: PoolList}, errors=(403,), local=True)
async def list_pools(call: Call) -> PoolList:
    """All pools, the data directory first."""
    return PoolList(items=list(await call.engine.pools.list()))


@routes.get("/v1/pools/{pool}", answers={200: Pool}, errors=(403, 404, 503), local=True)
async def get_pool(call: Call) -> Pool:
    """One pool, and what a clone costs there by each strategy."""
    return await call.engine.pools.get(call.path["pool"])


@routes.delete("/v1/pools/{pool}", answers={204: None}, errors=(403, 404, 409, 503), local=True)
async def remove_pool(call: Call) -> None:
    """Remove a pool that no disk is in."""
    await call.engine.pools.remove(call.path["pool"])
