"""Processes: run and wait, start in the background, list, signal, write, resize. Streams are in server/attach.py."""

from __future__ import annotations

import signal as signals
from typing import Annotated, Any

from msgspec import Meta

from stoker.api.models import (
    ExecRequest,
    ExecResult,
    ProcessInfo,
    ProcessList,
    ResizeRequest,
    SignalRequest,
    StartProcess,
    WriteStdin,
)
from stoker.api.processes import MAX_INLINE
from stoker.api.types import Tag
from stoker.errors import InvalidRequest
from stoker.server.bytes import inline_bytes
from stoker.server.endpoint import GUEST, Call, Routes
from stoker.server.exec import run_and_wait
from stoker.server.query import Query
from stoker.server.replies import Reply, json_reply

__all__ = ["routes", "signal_number"]

routes: Routes[Any] = Routes("processes")
COMMAND = (*GUEST, 422)
BIG = MAX_INLINE * 4 // 3 + (8 << 20)


class ListQuery(Query, frozen=True):
    tag: Annotated[Tag, Meta(description="Only those with this tag.")] | None = None


def signal_number(value: int | str) -> int:
    """15, ``TERM`` and ``SIGTERM`` are the same. Numbers are Linux's, here and in the guest."""
    if isinstance(value, int):
        return value
    name = value if value.startswith("SIG") else f"SIG{value}"
    try:
        return int(signals.Signals[name])
    except KeyError:
        raise InvalidRequest("bad_signal", f"there is no signal {value}", "such as TERM, KILL, INT or a number") from None


@routes.post("/v1/sandboxes/{sandbox}/exec", answers={200: ExecResult}, errors=(*COMMAND, 413), bound=BIG, abort=True)
async def exec_command(call: Call, body: ExecRequest) -> ExecResult:
    """Run a command and wait for its end.

    A client that goes away kills it. Streams and commands that outlive their client are processes.
    """
    return await run_and_wait(call.engine, call.principal, call.sandbox, body)


@routes.post("/v1/sandboxes/{sandbox}/processes", answers={201: ProcessInfo}, errors=(*COMMAND, 413), bound=8 << 20)
async def start_process(call: Call, body: StartProcess) -> Reply:
    """Start a process in the background. It goes on when the client goes."""
    return json_reply(await call.engine.processes.start(call.principal, call.sandbox, body), 201)


@routes.get("/v1/sandboxes/{sandbox}/processes", answers={200: ProcessList}, errors=GUEST)
async def list_processes(call: Call, query: ListQuery) -> ProcessList:
    """List what runs, and what has ended and is still remembered."""
    return ProcessList(items=list(await call.engine.processes.list(call.principal, call.sandbox, tag=query.tag)))


@routes.get("/v1/sandboxes/{sandbox}/processes/{process}", answers={200: ProcessInfo}, errors=GUEST)
async def get_process(call: Call) -> ProcessInfo:
    """One process, by id or tag."""
    return await call.engine.processes.get(call.principal, call.sandbox, call.process)


@routes.delete("/v1/sandboxes/{sandbox}/processes/{process}", answers={204: None}, errors=GUEST)
async def forget_process(call: Call) -> None:
    """Forget a process that has ended, and free its output."""
    await call.engine.processes.forget(call.principal, call.sandbox, call.process)


@routes.post("/v1/sandboxes/{sandbox}/processes/{process}/signal", answers={204: None}, errors=GUEST)
async def signal_process(call: Call, body: SignalRequest) -> None:
    """Send a signal."""
    number = signal_number(body.signal)
    await call.engine.processes.signal(call.principal, call.sandbox, call.process, number, group=body.group)


@routes.post("/v1/sandboxes/{sandbox}/processes/{process}/stdin", answers={204: None}, errors=(*GUEST, 413), bound=BIG, abort=True)
async def write_stdin(call: Call, body: WriteStdin) -> Reply:
    """Write to a process's stdin, and close it if asked to. Answers when the guest has taken it."""
    data = await inline_bytes(body.data, body.base64)
    await call.engine.processes.write_stdin(call.principal, call.sandbox, call.process, data, close=body.close)
    return Reply(204)


@routes.post("/v1/sandboxes/{sandbox}/processes/{process}/resize", answers={204: None}, errors=GUEST)
async def resize_process(call: Call, body: ResizeRequest) -> None:
    """Set the size of a process's terminal."""
    await call.engine.processes.resize(call.principal, call.sandbox, call.process, body.rows, body.cols)
