"""Leases: a sandbox that lives as long as somebody's connection does."""

from __future__ import annotations

from stoker.api import websocket as wire
from stoker.api.models import Principal
from stoker.errors import InvalidRequest
from stoker.server.channel import Channel

__all__ = ["hold_lease"]


async def hold_lease(channel: Channel, who: Principal, sandbox: str) -> None:
    """Until the client's end closes, however it does: the kernel tells of a killed client at once."""
    async with channel.services.engine.lease(who, sandbox):
        await channel.say(wire.Leased(sandbox=sandbox))
        await channel.receive()
        raise InvalidRequest("unexpected_message", "a lease's connection carries nothing")
