"""Health, version, metrics of the host, and the API's own description."""

from __future__ import annotations

import os
import time
from typing import Any

import stoker
from stoker.api.models import Health, Version
from stoker.errors import StokerError
from stoker.server.endpoint import Call, Content, Routes, principal_of
from stoker.server.prometheus import CONTENT_TYPE, render_metrics
from stoker.server.replies import Reply

__all__ = ["routes"]

routes: Routes[Any] = Routes("system")
AGENT_PROTOCOL = 1


@routes.get("/v1/health", answers={200: Health}, public=True)
async def get_health(call: Call) -> Health:
    """Whether the daemon is well. Needs no key; the administrator also sees what is wrong."""
    health = await call.engine.health()
    try:
        who = await principal_of(call.services, call.request.scope)
    except StokerError:
        return Health(status=health.status)
    return health if who.admin else Health(status=health.status)


@routes.get("/v1/version", answers={200: Version})
async def get_version(call: Call) -> Version:
    """Versions, and facts about this daemon."""
    facts = dict(call.engine.facts())
    sandboxes = facts.pop("sandboxes", 0)
    return Version(
        version=stoker.__version__,
        agent_protocol=AGENT_PROTOCOL,
        pid=os.getpid(),
        started_at=call.services.started_at,
        uptime=time.time() - call.services.started_at,
        auto_started=call.services.auto_started,
        sandboxes=sandboxes if isinstance(sandboxes, int) else 0,
        facts=facts if call.principal.admin else {},
    )


@routes.get("/metrics", answers={200: Content((CONTENT_TYPE,), "Prometheus exposition.")})
async def get_prometheus(call: Call) -> Reply:
    """Figures for Prometheus: of the host for the administrator, of one's own sandboxes for a key."""
    return Reply(200, await render_metrics(call.engine, call.principal), CONTENT_TYPE.encode())


@routes.get("/v1/openapi.json", answers={200: Content(("application/json",), "OpenAPI 3.1.")}, public=True)
async def get_openapi(call: Call) -> Reply:
    """This document."""
    return Reply(200, call.services.documents["openapi"])


@routes.get("/docs", answers={200: Content(("text/html",), "The API's description for people.")}, public=True)
async def get_docs(call: Call) -> Reply:
    """This description, as a page."""
    policy = b"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
    return Reply(200, call.services.documents["docs"], b"text/html; charset=utf-8", [(b"content-security-policy", policy)])
