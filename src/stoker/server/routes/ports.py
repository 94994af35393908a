"""Ports inside sandboxes. The stream of one is in server/port_stream.py."""

from __future__ import annotations

from typing import Any

from stoker.api.models import PortAccess
from stoker.server.endpoint import Call, Routes
from stoker.server.port_stream import port_number
from stoker.server.proxy.router import proxy_token

__all__ = ["routes"]

routes: Routes[Any] = Routes("sandboxes")


@routes.get("/v1/sandboxes/{sandbox}/ports/{port}", answers={200: PortAccess}, errors=(400, 404))
async def port_access(call: Call) -> PortAccess:
    """Where the proxy serves a port, and the token for it.

    A connection of one's own, by the daemon, is the WebSocket `/v1/sandboxes/{sandbox}/ports/{port}/stream`.
    """
    port = port_number(call.path["port"])
    sandbox = await call.engine.get(call.principal, call.sandbox)
    route = call.engine.connections.route(sandbox.id)
    address = call.services.proxy
    if route is None or route.policy == "none" or address is None:
        return PortAccess(port=port)
    # A name that is another's too, for the proxy, is not this one's.
    named = call.engine.connections.route(sandbox.name.lower()) if sandbox.name else None
    label = sandbox.name.lower() if sandbox.name and named is not None and named.sandbox == sandbox.id else sandbox.id
    needed = route.policy == "token" or not (route.local or route.policy == "open")
    token = proxy_token(call.services.secret, sandbox.id)
    return PortAccess(port=port, url=f"http://{port}-{label}.{address}/", token=token, token_needed=needed)
