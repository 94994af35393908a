"""What ``stoker run`` does behind its options: a sandbox of the daemon's on a lease, one command in it, our standard streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.api.codec import decode_answer
from stoker.api.models import Operation
from stoker.cli.attach import Signals, attach
from stoker.cli.exec import process_request, reads_input
from stoker.cli.remote import Following
from stoker.cli.streamed import Streamed
from stoker.client.client import AsyncClient
from stoker.client.sandbox import AsyncSandbox, created
from stoker.errors import InvalidRequest

if TYPE_CHECKING:
    from stoker.api.models import Sandbox
    from stoker.cli.early import Early
    from stoker.client.operations import OnProgress

__all__ = ["Marks", "Session", "run_leased"]


@dataclass(slots=True)
class Marks:
    """Seconds of CLOCK_MONOTONIC at which things happened: what ``stoker bench`` puts together."""

    at: dict[str, float] = field(default_factory=dict)

    def now(self, name: str) -> None:
        self.at.setdefault(name, time.monotonic())


@dataclass(frozen=True, slots=True)
class Session:
    """A command, and how it meets the user's terminal and files. No words: the image's own command."""

    words: tuple[str, ...]
    interactive: bool
    tty: bool
    timeout: float | None
    quiet: bool
    timings: Path | None = None


def _write_timings(path: Path, info: Sandbox, marks: Marks) -> None:
    import json

    laps = {name: milliseconds / 1000 for name, milliseconds in info.timings.items()}
    guest = {"started": laps.pop("agent_started", 0.0), "ready": laps.pop("agent_ready", 0.0)}
    path.write_text(json.dumps({"marks": marks.at, "laps": laps, "guest": guest}))


async def _marked(stream: AsyncIterator[bytes], marks: Marks) -> AsyncIterator[bytes]:
    async for data in stream:
        marks.now("first_byte")
        yield data


async def _command(client: AsyncClient, info: Sandbox, session: Session, signals: Signals, marks: Marks) -> int:
    argv = session.words or tuple(info.command)
    if not argv:
        raise InvalidRequest("no_command", f"{info.image} has no command of its own", f"stoker run {info.image} -- sh")
    stdin = reads_input(session.interactive)
    marks.now("exec")
    process = await client.open_process(info.id, process_request(argv, stdin=stdin, tty=session.tty))
    marks.now("started")
    async with Streamed(process) as streamed:
        if session.timings is not None:
            streamed.stdout = _marked(streamed.stdout, marks)
        code = await attach(streamed, signals, stdin=stdin, tty=session.tty, timeout=session.timeout)
    if session.timings is not None:
        _write_timings(session.timings, info, marks)
    return code


async def _box(client: AsyncClient, sandbox: dict[str, Any], early: Early | None, on_progress: OnProgress) -> AsyncSandbox:
    """The sandbox: the one that is being made already, or a new one."""
    if early is None:
        return await AsyncSandbox.create(client=client, lease=True, on_progress=on_progress, **sandbox)
    with early:
        operation = decode_answer(early.operation, Operation)
        return await created(client, operation, lease=True, on_progress=on_progress)


async def run_leased(sandbox: dict[str, Any], session: Session, marks: Marks, begun: Early | None = None) -> int:
    """``sandbox`` are the words of :meth:`AsyncSandbox.create`. However this ends, the daemon destroys the sandbox after it."""
    task = asyncio.current_task()
    caught: list[int] = []
    assert task is not None

    def early(number: int) -> None:
        if not caught:
            caught.append(number)
            task.cancel()

    marks.now("imported")
    with Signals(early) as signals:
        try:
            async with AsyncClient() as client:
                with Following(session.quiet) as following:
                    box = await _box(client, sandbox, begun, following.step)
                marks.now("booted")
                try:
                    return await _command(client, box.info, session, signals, marks)
                finally:
                    await box.release()
        except asyncio.CancelledError:
            if not caught:
                raise
            return 128 + caught[0]
