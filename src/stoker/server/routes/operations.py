"""Operations: long work, its progress and its end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from msgspec import Meta

from stoker.api.codec import encode
from stoker.api.models import Operation, OperationPage, OperationState
from stoker.api.types import Name
from stoker.server.endpoint import Call, Content, Routes
from stoker.server.query import Query
from stoker.server.replies import EventStream, ServerEvent
from stoker.server.routes.sandboxes import Cursor, Limit, WaitSeconds

__all__ = ["routes"]

routes: Routes[Any] = Routes("operations")
PROGRESS = Content(("text/event-stream",), "The operation, each time it changes, until it has ended.", Operation)
STREAM_STEP = 600.0


class OperationsQuery(Query, frozen=True):
    sandbox: Name | None = None
    limit: Limit = 100
    cursor: Cursor | None = None


class OperationQuery(Query, frozen=True):
    wait: Annotated[WaitSeconds, Meta(description="So many seconds for its end.")] = 0.0


@routes.get("/v1/operations", answers={200: OperationPage}, errors=(404,))
async def list_operations(call: Call, query: OperationsQuery) -> OperationPage:
    """List operations, newest first."""
    return await call.engine.operations(call.principal, sandbox=query.sandbox, limit=query.limit, cursor=query.cursor)


@routes.get("/v1/operations/{operation}", answers={200: Operation}, errors=(404,), abort=True)
async def get_operation(call: Call, query: OperationQuery) -> Operation:
    """One operation; with `wait` it answers at its end, or after so many seconds as it is."""
    if query.wait:
        return await call.engine.wait_operation(call.principal, call.path["operation"], query.wait)
    return await call.engine.operation(call.principal, call.path["operation"])


@asynccontextmanager
async def _progress(call: Call, operation: str) -> AsyncIterator[AsyncIterator[ServerEvent]]:
    first = await call.engine.operation(call.principal, operation)

    async def changes() -> AsyncIterator[ServerEvent]:
        seen = first
        yield ServerEvent(encode(seen))
        while seen.state is OperationState.RUNNING:
            now = await call.engine.wait_operation(call.principal, operation, STREAM_STEP, seen=seen)
            if now != seen:
                yield ServerEvent(encode(now))
            seen = now

    yield changes()


@routes.get("/v1/operations/{operation}/stream", answers={200: PROGRESS}, errors=(404,))
async def stream_operation(call: Call) -> EventStream:
    """Follow an operation."""
    return EventStream(_progress(call, call.path["operation"]))


@routes.post("/v1/operations/{operation}/cancel", answers={200: Operation}, errors=(404, 409, 502, 504))
async def cancel_operation(call: Call) -> Operation:
    """Cancel an operation. Answers when it has ended; one that had ended stays as it is."""
    return await call.engine.cancel_operation(call.principal, call.path["operation"])
