"""Warm sets: machines that are up and stand still until a create takes one."""

from __future__ import annotations

from typing import Any

from stoker.api.models import SetWarm, WarmSet, WarmSetList
from stoker.server.endpoint import Call, Routes

__all__ = ["routes"]

routes: Routes[Any] = Routes("warm")


@routes.put("/v1/warm", answers={200: WarmSet}, errors=(403, 404, 409, 429))
async def set_warm(call: Call, body: SetWarm) -> WarmSet:
    """Say how many machines wait for a kind of create.

    They are made in the background, one at a time, and count as sandboxes of the key. A create that asks for the same image (or
    template), kernel, CPUs, memory, disk and network takes one over instead of making it. Size 0 ends the set.
    """
    return await call.engine.warm.set(call.principal, body)


@routes.get("/v1/warm", answers={200: WarmSetList})
async def list_warm(call: Call) -> WarmSetList:
    """All warm sets."""
    return WarmSetList(items=list(await call.engine.warm.list(call.principal)))


@routes.delete("/v1/warm/{warm}", answers={204: None}, errors=(404,))
async def remove_warm(call: Call) -> None:
    """End a warm set. Sandboxes that were served from it stay."""
    await call.engine.warm.remove(call.principal, call.path["warm"])
