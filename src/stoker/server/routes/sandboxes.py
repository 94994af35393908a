"""Sandboxes: create, look, wait, end, and the states between."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from stoker.api.codec import encode
from stoker.api.models import (
    Certificate,
    ConsoleLog,
    CreateSandbox,
    Event,
    ForkResult,
    ForkSandbox,
    Metrics,
    Operation,
    OperationState,
    PingResult,
    Principal,
    ResizeSandbox,
    Sandbox,
    SandboxPage,
    SandboxState,
    SetTimeout,
    StopSandbox,
)
from stoker.api.types import IdempotencyKey, Name
from stoker.errors import DeadlineExceeded, Forbidden, InternalError, InvalidRequest, NotFound, error_from_wire
from stoker.server.console import follow_console, read_console
from stoker.server.endpoint import SANDBOX, Call, Content, Routes
from stoker.server.query import Query
from stoker.server.replies import EventStream, Reply, ServerEvent, error_reply, json_reply

__all__ = ["CreateQuery", "finished", "routes"]

routes: Routes[Any] = Routes("sandboxes")

LOCAL_TRANSPORTS = ("ext4:", "dir:", "oci:", "tar:", "docker-archive:")
CREATE_WAIT = 3600.0
Limit = Annotated[int, Meta(ge=1, le=1000, description="Most items of one page.")]
Cursor = Annotated[str, Meta(max_length=512, description="`next` of the page before.")]
WaitSeconds = Annotated[float, Meta(ge=0.0, le=600.0)]


class CreateQuery(Query, frozen=True):
    wait: bool = True


class ListQuery(Query, frozen=True):
    state: Annotated[list[SandboxState], Meta(max_length=16)] = []
    label: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=320, pattern=r"^[A-Za-z0-9][^\x00]*$")]],
        Meta(max_length=16, description="`KEY=VALUE`, or `KEY` for any value."),
    ] = []
    name: Name | None = None
    limit: Limit = 100
    cursor: Cursor | None = None


class WaitQuery(Query, frozen=True):
    state: Annotated[list[SandboxState], Meta(max_length=16, description="None: until it is gone.")] = []
    timeout: WaitSeconds = 60.0


class ConsoleQuery(Query, frozen=True):
    offset: Annotated[int, Meta(ge=0, le=1 << 53)] | None = None
    limit: Annotated[int, Meta(ge=1, le=1 << 20)] = 65536


class FollowQuery(Query, frozen=True):
    offset: Annotated[int, Meta(ge=0, le=1 << 53)] | None = None


class EventsQuery(Query, frozen=True):
    after: Annotated[int, Meta(ge=0, le=1 << 53, description="An event's id: first what is kept after it.")] | None = None


class MetricsQuery(Query, frozen=True):
    window: Annotated[float, Meta(gt=0.0, le=86400.0, description="Seconds; the finest ring that covers them.")] = 600.0
    since: Annotated[float, Meta(ge=0.0, le=1e12, description="Only samples after this moment.")] | None = None


def refuse_local_paths(principal: Principal, request: CreateSandbox) -> None:
    """A key's owner may be anywhere: paths on this host are for those who came through its socket."""
    if principal.admin:
        return
    local = request.image.startswith(LOCAL_TRANSPORTS) or request.initrd or "/" in request.kernel or request.kernel.startswith(".")
    if local:
        raise Forbidden("local_path", "paths on the daemon's host are taken over its Unix socket only", "name an image or a kernel")


def _idempotency_key(call: Call) -> str | None:
    value = call.header(b"idempotency-key")
    if value is None:
        return None
    try:
        return msgspec.convert(value, IdempotencyKey)
    except msgspec.ValidationError:
        raise InvalidRequest("bad_idempotency_key", "Idempotency-Key must be 1 to 128 printable ASCII characters") from None


async def finished(call: Call, operation: Operation) -> Sandbox:
    """The sandbox at the end of its operation; what went wrong is raised."""
    done = await call.engine.wait_operation(call.principal, operation.id, CREATE_WAIT)
    if done.error is not None:
        raise error_from_wire(500, {**msgspec.to_builtins(done.error), "details": {**done.error.details, "sandbox": done.sandbox}})
    if done.sandbox is None or done.state is OperationState.RUNNING:
        raise InternalError("operation_stuck", f"operation {done.id} is {done.state.value}")
    return await call.engine.get(call.principal, done.sandbox)


@routes.post(
    "/v1/sandboxes",
    answers={201: Sandbox, 202: Operation},
    errors=(403, 404, 409, 422, 429, 502, 504),
    headers={"Idempotency-Key": "The same key and body within a day: the same sandbox again."},
    bound=4 << 20,
)
async def create_sandbox(call: Call, query: CreateQuery, body: CreateSandbox) -> Reply:
    """Create a sandbox.

    Answers when it runs, or with `wait=false` at once with an operation. The work goes on when the client goes away.
    """
    refuse_local_paths(call.principal, body)
    operation = await call.engine.create(call.principal, body, idempotency_key=_idempotency_key(call))
    if not query.wait:
        return json_reply(operation, 202, [(b"location", f"/v1/operations/{operation.id}".encode())])
    sandbox = await finished(call, operation)
    return json_reply(sandbox, 201, [(b"location", f"/v1/sandboxes/{sandbox.id}".encode())])


@routes.get("/v1/sandboxes", answers={200: SandboxPage})
async def list_sandboxes(call: Call, query: ListQuery) -> SandboxPage:
    """List sandboxes, newest first."""
    labels = {key: value if found else None for key, found, value in (text.partition("=") for text in query.label)}
    if query.name is not None:
        return await _by_name(call, query, labels)
    return await call.engine.list(
        call.principal, states=frozenset(query.state), labels=labels, limit=query.limit, cursor=query.cursor
    )


async def _by_name(call: Call, query: ListQuery, labels: dict[str, str | None]) -> SandboxPage:
    """All of that name: one, but for an administrator, for whom several owners may have used it."""
    items: list[Sandbox] = []
    cursor: str | None = None
    while True:
        page = await call.engine.list(call.principal, states=frozenset(query.state), labels=labels, limit=1000, cursor=cursor)
        items += [sandbox for sandbox in page.items if sandbox.name == query.name]
        cursor = page.next
        if cursor is None or len(items) >= query.limit:
            return SandboxPage(items=items[: query.limit])


@routes.get("/v1/sandboxes/{sandbox}", answers={200: Sandbox}, errors=(404,))
async def get_sandbox(call: Call) -> Sandbox:
    """One sandbox."""
    return await call.engine.get(call.principal, call.sandbox)


@routes.delete("/v1/sandboxes/{sandbox}", answers={204: None}, errors=(*SANDBOX, 502, 504))
async def destroy_sandbox(call: Call) -> None:
    """Destroy a sandbox, from any state. Answers when nothing of it is left."""
    await call.engine.destroy(call.principal, call.sandbox)


@routes.post("/v1/sandboxes/{sandbox}/ping", answers={200: PingResult}, errors=(*SANDBOX, 502, 504))
async def ping_sandbox(call: Call) -> PingResult:
    """Ask the agent in the guest whether it is there."""
    return PingResult(ms=await call.engine.ping(call.principal, call.sandbox))


@routes.put("/v1/sandboxes/{sandbox}/timeout", answers={200: Sandbox}, errors=SANDBOX)
async def set_timeout(call: Call, body: SetTimeout) -> Sandbox:
    """Set the timeout, counted from now, or take it away."""
    return await call.engine.set_timeout(call.principal, call.sandbox, body.timeout)


@routes.get("/v1/sandboxes/{sandbox}/wait", answers={200: Sandbox, 204: None}, errors=(*SANDBOX, 408), abort=True)
async def wait_sandbox(call: Call, query: WaitQuery) -> Sandbox | Reply:
    """Wait until the sandbox is in one of the states.

    Without a state: until it is gone (204). After `timeout` seconds: 408, and the client may ask again.
    """
    sandbox = await call.engine.get(call.principal, call.sandbox)
    try:
        found = await call.engine.wait(call.principal, sandbox.id, frozenset(query.state), query.timeout)
        return found if query.state else Reply(204)
    except DeadlineExceeded as e:
        return error_reply(e, 408)
    except NotFound:
        if query.state:
            raise
        return Reply(204)


@routes.post("/v1/sandboxes/{sandbox}/resize", answers={200: Sandbox}, errors=(*SANDBOX, 429, 502, 503, 504))
async def resize_sandbox(call: Call, body: ResizeSandbox) -> Sandbox:
    """Enlarge the root disk. A running guest's file system grows with it; a stopped one's when it starts."""
    return await call.engine.resize(call.principal, call.sandbox, body.disk)


@routes.post("/v1/sandboxes/{sandbox}/freeze", answers={200: Sandbox}, errors=(*SANDBOX, 502, 504))
async def freeze_sandbox(call: Call) -> Sandbox:
    """Stop the virtual CPUs."""
    return await call.engine.freeze(call.principal, call.sandbox)


@routes.post("/v1/sandboxes/{sandbox}/thaw", answers={200: Sandbox}, errors=(*SANDBOX, 502, 504))
async def thaw_sandbox(call: Call) -> Sandbox:
    """Let the virtual CPUs run again."""
    return await call.engine.thaw(call.principal, call.sandbox)


@routes.post("/v1/sandboxes/{sandbox}/stop", answers={200: Sandbox}, errors=(*SANDBOX, 502, 504))
async def stop_sandbox(call: Call, body: StopSandbox) -> Sandbox:
    """Shut the machine down and keep its disk."""
    return await call.engine.stop(call.principal, call.sandbox, body.grace)


@routes.post("/v1/sandboxes/{sandbox}/start", answers={200: Sandbox, 202: Operation}, errors=(403, *SANDBOX, 422, 429, 502, 504))
async def start_sandbox(call: Call, query: CreateQuery) -> Sandbox | Reply:
    """Boot a stopped sandbox from its disk again."""
    operation = await call.engine.start(call.principal, call.sandbox)
    if query.wait:
        return await finished(call, operation)
    return json_reply(operation, 202, [(b"location", f"/v1/operations/{operation.id}".encode())])


@routes.post("/v1/sandboxes/{sandbox}/pause", answers={200: Sandbox}, errors=(*SANDBOX, 429, 502, 503, 504))
async def pause_sandbox(call: Call) -> Sandbox:
    """Put the machine away.

    Memory, devices and processes go into files and come back at the resume; until then the sandbox takes nothing but disk. Answers
    when they are on the host's disk. `operation` says how long each part took.
    """
    return await call.engine.pause(call.principal, call.sandbox)


@routes.post("/v1/sandboxes/{sandbox}/resume", answers={200: Sandbox}, errors=(403, *SANDBOX, 429, 502, 503, 504))
async def resume_sandbox(call: Call) -> Sandbox:
    """Take a paused machine up again where it was. Whatever uses processes or files of one does so, too."""
    return await call.engine.resume(call.principal, call.sandbox)


@routes.post("/v1/sandboxes/{sandbox}/fork", answers={200: ForkResult}, errors=(403, *SANDBOX, 429, 502, 503, 504))
async def fork_sandbox(call: Call, body: ForkSandbox) -> ForkResult:
    """Copy a running machine.

    Memory, disk, processes and open files go on in each copy; the original stands for milliseconds. Each copy is another machine:
    name, ids, keys, random numbers and clock are its own before it answers. Refused where a copy would share what both write to.
    """
    return await call.engine.fork(call.principal, call.sandbox, body)


@routes.get("/v1/sandboxes/{sandbox}/identity", answers={200: Certificate}, errors=(404,))
async def get_identity(call: Call) -> Certificate:
    """What was done when the machine last came back from memory.

    Each thing that would have made it a twin of another (random state, clock, ids, keys, connections), whether it was handled, and
    when. A copy with one that should have been handled and was not is never made.
    """
    return await call.engine.identity(call.principal, call.sandbox)


@routes.get("/v1/sandboxes/{sandbox}/console", answers={200: ConsoleLog}, errors=SANDBOX)
async def get_console(call: Call, query: ConsoleQuery) -> ConsoleLog:
    """A part of the serial console; without an offset its last bytes."""
    return await read_console(call.engine, call.principal, call.sandbox, query.offset, query.limit)


def _last_event_id(call: Call, otherwise: int | None) -> int | None:
    value = call.header(b"last-event-id")
    if value is None or not (value.isascii() and value.isdigit()) or len(value) > 16:
        return otherwise
    return int(value)


CONSOLE_EVENTS = Content(("text/event-stream",), "Parts of the console as they come.", ConsoleLog)
EVENTS = Content(("text/event-stream",), "Events as they happen.", Event)


@routes.get("/v1/sandboxes/{sandbox}/console/stream", answers={200: CONSOLE_EVENTS}, errors=SANDBOX)
async def stream_console(call: Call, query: FollowQuery) -> EventStream:
    """Follow the serial console until the sandbox has no machine any more."""
    sandbox = await call.engine.get(call.principal, call.sandbox)
    offset = _last_event_id(call, query.offset)
    return EventStream(follow_console(call.engine, call.principal, sandbox.id, offset))


@asynccontextmanager
async def _events(call: Call, sandbox: str | None, after: int | None) -> AsyncIterator[AsyncIterator[ServerEvent]]:
    async def events(source: AsyncIterator[Event]) -> AsyncIterator[ServerEvent]:
        async for event in source:
            yield ServerEvent(encode(event), "", str(event.id))

    async with call.engine.events(call.principal, sandbox=sandbox, after=after) as source:
        yield events(source)


@routes.get("/v1/sandboxes/{sandbox}/events/stream", answers={200: EVENTS}, errors=(404,))
async def stream_sandbox_events(call: Call, query: EventsQuery) -> EventStream:
    """What happens to a sandbox."""
    sandbox = await call.engine.get(call.principal, call.sandbox)
    return EventStream(_events(call, sandbox.id, _last_event_id(call, query.after)))


@routes.get("/v1/events/stream", answers={200: EVENTS})
async def stream_events(call: Call, query: EventsQuery) -> EventStream:
    """What happens to all one's sandboxes."""
    return EventStream(_events(call, None, _last_event_id(call, query.after)))


@routes.get("/v1/sandboxes/{sandbox}/metrics", answers={200: Metrics}, errors=SANDBOX)
async def get_metrics(call: Call, query: MetricsQuery) -> Metrics:
    """How much the sandbox used: every 0.5 s for 10 min, 30 s for 2 h, or 5 min for 24 h."""
    return await call.engine.metrics(call.principal, call.sandbox, window=query.window, since=query.since)
