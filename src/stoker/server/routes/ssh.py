"""ssh into sandboxes. What speaks it is in server/ssh."""

from __future__ import annotations

import asyncio
from typing import Any

from stoker.api.models import SshAccess
from stoker.server.endpoint import Call, Routes
from stoker.server.ssh.keys import public_key

__all__ = ["routes"]

routes: Routes[Any] = Routes("sandboxes")


@routes.get("/v1/sandboxes/{sandbox}/ssh", answers={200: SshAccess}, errors=(404,))
async def ssh_access(call: Call) -> SshAccess:
    """What an ssh client has to know: the sandbox's host key, and the user name that stands for its own user.

    The connection itself is the WebSocket of the same path.
    """
    sandbox = await call.engine.get(call.principal, call.sandbox)
    key = await asyncio.to_thread(public_key, call.services.secret, sandbox.id)
    return SshAccess(sandbox=sandbox.id, host_key=key)
