"""Networks of sandboxes: what is seen of them, and why a port is reached or not."""

from __future__ import annotations

from typing import Any

from stoker.api.models import ExplainNetwork, Explanation, LearnedNetwork, NetworkStatus, Sandbox, SetNetwork
from stoker.server.endpoint import SANDBOX, Call, Routes

__all__ = ["routes"]

routes: Routes[Any] = Routes("sandboxes")


@routes.get("/v1/sandboxes/{sandbox}/network", answers={200: NetworkStatus}, errors=SANDBOX)
async def show_network(call: Call) -> NetworkStatus:
    """Its address, policy and ports, what was counted, and what its firewall denied of late."""
    return await call.engine.networks.show(call.principal, call.sandbox)


@routes.put("/v1/sandboxes/{sandbox}/network", answers={200: Sandbox}, errors=SANDBOX)
async def set_network(call: Call, body: SetNetwork) -> Sandbox:
    """Change where it may connect to, and which ports of the host lead into it, while it runs or for when it does."""
    return await call.engine.set_network(call.principal, call.sandbox, body)


@routes.post("/v1/sandboxes/{sandbox}/network/explain", answers={200: Explanation}, errors=(*SANDBOX, 502, 504))
async def explain_network(call: Call, body: ExplainNetwork) -> Explanation:
    """Walk the way to a port for real, and say of each step whether it passes, and the command that mends it. 10 s at most."""
    return await call.engine.networks.explain(call.principal, call.sandbox, body)


@routes.get("/v1/sandboxes/{sandbox}/network/learned", answers={200: LearnedNetwork}, errors=SANDBOX)
async def learned_network(call: Call) -> LearnedNetwork:
    """What it needed beyond its policy while that let everything public through (`learn`)."""
    return await call.engine.networks.learned(call.principal, call.sandbox)
