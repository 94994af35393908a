"""Waiting for long work: to its end, with its progress, and never leaving it behind when the waiting ends early."""

from __future__ import annotations

import asyncio
import inspect
import secrets
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from stoker.api.codec import decode_answer
from stoker.api.models import CreateSandbox, Operation, OperationState, Progress, Sandbox, SandboxState
from stoker.client.api import Api, path
from stoker.client.attachment import failure_of
from stoker.client.feed import events_feed
from stoker.errors import Conflict, DeadlineExceeded, GuestError, HostError, InternalError, NotFound, StokerError

__all__ = ["OnProgress", "begin_create", "cancel_operation", "destroy_made", "finish_operation", "wait_for_state"]

OnProgress: TypeAlias = Callable[[Progress], object]
"""Called each time the step that is going on has moved; what it returns is awaited where it can be."""
Undo: TypeAlias = Callable[[Api, Operation], Coroutine[Any, Any, None]]

SLICE = 25.0
UNDO = 15.0
LOST = frozenset({"connection_lost", "daemon_unreachable", "daemon_silent", "answer_stalled"})


async def begin_create(api: Api, request: CreateSandbox) -> Operation:
    """Asks for a sandbox. Cancelled while it asks, it waits for the answer, to take back what was asked for."""
    # With the key the request can be sent again when a connection breaks: it makes one sandbox, not two.
    headers = [("Idempotency-Key", secrets.token_urlsafe(18))]
    asking = asyncio.ensure_future(
        api.call("POST", path("sandboxes"), Operation, query={"wait": False}, body=request, headers=headers)
    )
    try:
        return await asyncio.shield(asking)
    except asyncio.CancelledError:
        with suppress(StokerError, TimeoutError):
            async with asyncio.timeout(UNDO):
                await destroy_made(api, await asking)
        raise


async def finish_operation(
    api: Api, operation: Operation, timeout: float, on_progress: OnProgress | None, *, undo: Undo | None = None
) -> None:
    """Returns when it has succeeded, raises what it failed with. Cancelled or out of time, it is undone (else: cancelled)."""
    undo = undo or cancel_operation
    try:
        async with asyncio.timeout(timeout):
            await _finish(api, operation, on_progress)
    except TimeoutError:
        await undo(api, operation)
        raise DeadlineExceeded("operation_timeout", f"{operation.kind} has not ended within {timeout:g} s") from None
    except asyncio.CancelledError:
        await asyncio.shield(undo(api, operation))
        raise


async def cancel_operation(api: Api, operation: Operation) -> None:
    # What cannot be cancelled has ended, or its daemon is gone: then there is nothing to cancel.
    with suppress(StokerError):
        await api.send("POST", path("operations", operation.id, "cancel"), timeout=UNDO)


async def destroy_made(api: Api, operation: Operation) -> None:
    """Takes back a create: from ``creating`` on, a destroy ends what goes on and removes what there is."""
    with suppress(StokerError):
        await api.send("DELETE", path("sandboxes", str(operation.sandbox)), timeout=UNDO)


async def _finish(api: Api, operation: Operation, on_progress: OnProgress | None) -> None:
    now = operation
    while now.state == OperationState.RUNNING:
        try:
            now = await (_watch(api, now, on_progress) if on_progress else _wait(api, now))
        except NotFound:
            if operation.sandbox is None:
                raise
            # The daemon has been started anew and knows the operation no more; the sandbox says how it went.
            return await _settled(api, str(operation.sandbox))
        except HostError as e:
            if e.code not in LOST:
                raise
            await asyncio.sleep(0.2)
    if now.state == OperationState.FAILED:
        raise failure_of(now.error) if now.error else InternalError("operation_failed", f"{now.kind} failed without a reason")
    if now.state == OperationState.CANCELLED:
        raise Conflict("cancelled", f"{now.kind} was cancelled")


async def _wait(api: Api, operation: Operation) -> Operation:
    return await api.call("GET", path("operations", operation.id), Operation, query={"wait": SLICE}, timeout=SLICE + 30)


async def _watch(api: Api, operation: Operation, on_progress: OnProgress) -> Operation:
    target = path("operations", operation.id, "stream")
    async with await events_feed(api, target, lambda data: decode_answer(data, Operation)) as changes:
        async for operation in changes:
            result = on_progress(operation.progress)
            if inspect.isawaitable(result):
                await result
            if operation.state != OperationState.RUNNING:
                break
    return operation


async def _settled(api: Api, sandbox: str) -> None:
    states = (SandboxState.RUNNING, SandboxState.FAILED, SandboxState.STOPPED, SandboxState.LOST)
    info = await wait_for_state(api, sandbox, states, None)
    if info is not None and info.state != SandboxState.RUNNING:
        raise failure_of(info.error) if info.error else GuestError("sandbox_failed", f"{sandbox} is {info.state.value}")


async def wait_for_state(api: Api, sandbox: str, states: Sequence[str], timeout: float | None) -> Sandbox | None:
    """Until the sandbox is in one of the states; without any, until it is gone (None). Asks in slices: no silence for long."""
    loop = asyncio.get_running_loop()
    deadline = None if timeout is None else loop.time() + timeout
    while True:
        left = SLICE if deadline is None else min(SLICE, max(0.0, deadline - loop.time()))
        query: dict[str, object] = {"state": list(states), "timeout": left}
        try:
            answer = await api.send("GET", path("sandboxes", sandbox, "wait"), query=query, timeout=left + 30)
            return decode_answer(answer.body, Sandbox) if answer.body else None
        except DeadlineExceeded:
            if deadline is not None and loop.time() >= deadline:
                raise
        except NotFound:
            if states:
                raise
            return None
