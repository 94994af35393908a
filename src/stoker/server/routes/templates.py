"""Templates: names that sandboxes are created from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from stoker.api.codec import encode
from stoker.api.models import BuildTemplate, Operation, OperationLog, OperationState, Template, TemplateList
from stoker.errors import Forbidden, InternalError, error_from_wire
from stoker.server.endpoint import Call, Content, Routes
from stoker.server.query import Query
from stoker.server.replies import EventStream, Reply, ServerEvent, json_reply
from stoker.server.routes.sandboxes import CREATE_WAIT, LOCAL_TRANSPORTS

__all__ = ["routes"]

routes: Routes[Any] = Routes("templates")
LOG = Content(("text/event-stream",), "What it says, line by line, until it has ended.", OperationLog)


class BuildQuery(Query, frozen=True):
    wait: Annotated[bool, Meta(description="Answer when it is whole.")] = True


class LogQuery(Query, frozen=True):
    start: Annotated[int, Meta(ge=0, le=1 << 53, description="The number of the first line.")] = 0


@routes.post(
    "/v1/templates",
    answers={201: Template, 202: Operation},
    errors=(403, 404, 409, 422, 429, 502, 503, 504),
    bound=16 << 20,
)
async def build_template(call: Call, query: BuildQuery, body: BuildTemplate) -> Reply:
    """Make a template.

    Of an image: a machine is created, the steps of `setup` run in it, then `start` in the background until `ready` ends with 0;
    then its disk, memory and processes are kept. Of what is there already: `from`. Answers when it is whole, or with `wait=false`
    at once with an operation, whose `/log/stream` is what the build says. A template of the same name is replaced at the end.
    """
    local = (body.image or "").startswith(LOCAL_TRANSPORTS) or "/" in body.kernel or body.kernel.startswith(".")
    if local and not call.principal.admin:
        raise Forbidden("local_path", "paths on the daemon's host are taken over its Unix socket only", "name an image or a kernel")
    operation = await call.engine.build_template(call.principal, body)
    if not query.wait:
        return json_reply(operation, 202, [(b"location", f"/v1/operations/{operation.id}".encode())])
    done = await call.engine.wait_operation(call.principal, operation.id, CREATE_WAIT)
    if done.error is not None:
        raise error_from_wire(500, msgspec.to_builtins(done.error))
    if done.template is None or done.state is OperationState.RUNNING:
        raise InternalError("operation_stuck", f"operation {done.id} is {done.state.value}")
    made = await call.engine.templates.get(call.principal, done.template)
    return json_reply(made, 201, [(b"location", f"/v1/templates/{made.id}".encode())])


@routes.get("/v1/templates", answers={200: TemplateList})
async def list_templates(call: Call) -> TemplateList:
    """All templates, newest first."""
    return TemplateList(items=list(await call.engine.templates.list(call.principal)))


@routes.get("/v1/templates/{template}", answers={200: Template}, errors=(404,))
async def get_template(call: Call) -> Template:
    """One template, by id or name, with the end of its build's log."""
    return await call.engine.templates.get(call.principal, call.path["template"])


@routes.delete("/v1/templates/{template}", answers={204: None}, errors=(404, 503))
async def remove_template(call: Call) -> None:
    """Remove a template. Sandboxes that were made from it stay."""
    await call.engine.templates.remove(call.principal, call.path["template"])


@asynccontextmanager
async def _lines(call: Call, operation: str, start: int) -> AsyncIterator[AsyncIterator[ServerEvent]]:
    async def parts(source: AsyncIterator[OperationLog]) -> AsyncIterator[ServerEvent]:
        async for part in source:
            yield ServerEvent(encode(part), "", str(part.next))

    async with call.engine.operation_log(call.principal, operation, start) as source:
        yield parts(source)


@routes.get("/v1/operations/{operation}/log/stream", answers={200: LOG}, errors=(404,))
async def stream_log(call: Call, query: LogQuery) -> EventStream:
    """Follow what an operation says: the build of a template."""
    last = call.header(b"last-event-id")
    start = int(last) if last is not None and last.isascii() and last.isdigit() and len(last) <= 16 else query.start
    return EventStream(_lines(call, call.path["operation"], start))
