"""The serial console: a part of it, or all of it as it grows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from stoker.api.codec import encode
from stoker.api.models import ConsoleLog, Principal, SandboxState
from stoker.errors import NotFound
from stoker.server.ports import EngineProtocol
from stoker.server.replies import ServerEvent

__all__ = ["follow_console", "read_console"]

PART = 65536
POLL = 0.2
"""The console is a file that another process writes; between two looks at it so many seconds pass."""
ENDED = frozenset({SandboxState.STOPPED, SandboxState.FAILED, SandboxState.LOST, SandboxState.PAUSED})


async def read_console(engine: EngineProtocol, who: Principal, sandbox: str, offset: int | None, limit: int) -> ConsoleLog:
    """Text; what is not UTF-8 in it shows as U+FFFD, and ``next`` counts bytes all the same."""
    start, data, oldest = await engine.console(who, sandbox, offset=offset, limit=limit)
    return ConsoleLog(text=data.decode("utf-8", "replace"), offset=start, next=start + len(data), oldest=oldest)


@asynccontextmanager
async def follow_console(
    engine: EngineProtocol, who: Principal, sandbox: str, offset: int | None
) -> AsyncIterator[AsyncIterator[ServerEvent]]:
    """Begins with the last part there is (or at ``offset``), ends when the machine has and all was sent."""
    first = await read_console(engine, who, sandbox, offset, PART)

    async def parts() -> AsyncIterator[ServerEvent]:
        part = first
        while True:
            if part.text:
                yield ServerEvent(encode(part), "", str(part.next))
            try:
                ended = (await engine.get(who, sandbox)).state in ENDED
                part = await read_console(engine, who, sandbox, part.next, PART)
            except NotFound:
                return
            if not part.text:
                if ended:
                    return
                await anyio.sleep(POLL)

    yield parts()
