"""API keys. Over the Unix socket only: who reaches it owns the daemon, and a key cannot make keys."""

from __future__ import annotations

from typing import Any

from stoker.api.models import ApiKey, ApiKeyPage, CreatedKey, CreateKey
from stoker.server.endpoint import Call, Routes
from stoker.server.query import Query
from stoker.server.replies import Reply, json_reply
from stoker.server.routes.sandboxes import Cursor, Limit

__all__ = ["routes"]

routes: Routes[Any] = Routes("keys")


class KeysQuery(Query, frozen=True):
    limit: Limit = 100
    cursor: Cursor | None = None


@routes.post("/v1/keys", answers={201: CreatedKey}, errors=(403, 409), local=True)
async def create_key(call: Call, body: CreateKey) -> Reply:
    """Make an API key. The secret is shown this once."""
    return json_reply(await call.engine.create_key(body), 201)


@routes.get("/v1/keys", answers={200: ApiKeyPage}, errors=(403,), local=True)
async def list_keys(call: Call, query: KeysQuery) -> ApiKeyPage:
    """List API keys, revoked ones too, without their secrets."""
    return await call.engine.keys(limit=query.limit, cursor=query.cursor)


@routes.delete("/v1/keys/{key}", answers={200: ApiKey}, errors=(403, 404, 409), local=True)
async def revoke_key(call: Call) -> ApiKey:
    """Revoke an API key, at once. Its sandboxes stay, for the administrator."""
    return await call.engine.revoke_key(call.path["key"])
