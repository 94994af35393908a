"""What is done in the machine of a template: steps, the command that stays, and waiting until it is ready; and what they say."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from stoker.api.models import OperationLog, ProcessInfo, StartProcess
from stoker.errors import Conflict, DeadlineExceeded, GuestError, StokerError
from stoker.guest.messages import printable

if TYPE_CHECKING:
    from stoker.engine.core import Box, Core
    from stoker.engine.feed import Client

__all__ = ["START", "Log", "begin_start", "run_step", "wait_ready"]

START: Final = "start"
"""The tag of the command that stays."""
LINE: Final = 2000
MOST: Final = 500
"""Lines of a piece of output that are held: who writes so fast is read by nobody."""
LINES: Final = 4000
SIZE: Final = 256 << 10
"""Characters of a log that are held: its end."""
KEPT: Final = 64 << 10
"""Characters that stay with the template."""
TAIL: Final = 12
"""Last lines that an error shows."""
POLL: Final = 0.2
POLL_MOST: Final = 1.0
SETTLE: Final = 1.0
"""Seconds that a command which stays has to fail at once, where nothing says when it is ready."""
LATE: Final = 10.0
"""Seconds after its time is up until a step that does not end is given up: what it left behind may hold its output open."""


class Log:
    """Lines, the last of them held. What a guest says is made harmless for terminals."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._size = 0
        self.first = 0
        self.closed = False
        self._changed = asyncio.Event()

    @property
    def next(self) -> int:
        return self.first + len(self._lines)

    def line(self, text: str) -> None:
        text = printable(text.expandtabs(4), LINE)
        self._lines.append(text)
        self._size += len(text) + 1
        while self._size > SIZE or len(self._lines) > LINES:
            self._size -= len(self._lines.popleft()) + 1
            self.first += 1
        self._wake()

    def close(self) -> None:
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def read(self, number: int, most: int = 200) -> tuple[list[str], int]:
        """Lines from a number on, or the oldest held, and the number behind them."""
        start = max(number, self.first) - self.first
        found = [self._lines[at] for at in range(start, min(len(self._lines), start + most))]
        return found, self.first + start + len(found) if found else max(number, self.first)

    async def more(self, number: int) -> bool:
        """Waits for a line of that number; False: there will be none."""
        while self.next <= number and not self.closed:
            await self._changed.wait()
        return self.next > number

    async def follow(self, number: int) -> AsyncIterator[OperationLog]:
        """Lines from a number on (or the oldest held) as they come, until the last."""
        while await self.more(number):
            lines, number = self.read(number)
            yield OperationLog(lines=lines, next=number, oldest=self.first)

    def tail(self, size: int = KEPT) -> list[str]:
        """The last lines of so many characters."""
        found: list[str] = []
        for text in reversed(self._lines):
            size -= len(text) + 1
            if size < 0:
                break
            found.append(text)
        return found[::-1]


class _Lines:
    """Bytes of one stream, as lines of a log."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def write(self, data: bytes) -> None:
        *whole, self._rest = (self._rest + self._decoder.decode(data)).split("\n")
        if len(whole) > MOST:
            self._log.line(f"({len(whole) - MOST} lines more)")
            whole = whole[-MOST:]
        for text in whole:
            # What a carriage return begins writes over what was there.
            self._log.line(text.rstrip("\r").rpartition("\r")[2])
        if len(self._rest) > 4 * LINE:
            self._log.line(self._rest)
            self._rest = ""

    def end(self) -> None:
        if self._rest:
            self._log.line(self._rest.rstrip("\r"))
            self._rest = ""


async def _finish(client: Client, log: Log) -> ProcessInfo:
    streams = {1: _Lines(log), 2: _Lines(log)}
    try:
        while (piece := await client.read()) is not None:
            streams[piece.stream].write(piece.data)
        return await client.wait()
    finally:
        for lines in streams.values():
            lines.end()


def _ended(info: ProcessInfo) -> str:
    return f"signal {info.signal} ended it" if info.signal else f"it ended with status {info.exit_code}"


async def run_step(
    core: Core, box: Box, what: str, script: str, log: Log, timeout: float, *, user: str | None = None, cwd: str | None = None
) -> None:
    """Runs one step. Errors: ``template_step_failed`` (Conflict) with its last lines, ``template_step_timeout``."""
    words = StartProcess(argv=["/bin/sh", "-c", script], user=user, cwd=cwd, timeout=timeout)
    before = log.next
    async with core.used(box):
        live, agent = await core.agent(box)
        client = await live.hub.open(agent, words, lossless=True)
        try:
            async with asyncio.timeout(timeout + LATE):
                info = await _finish(client, log)
        except TimeoutError:
            info = None
        finally:
            await client.aclose()
        if info is not None:
            with suppress(StokerError):  # else every sandbox of the template would remember it
                live.hub.forget(info.id)
    if info is not None and info.exit_code == 0 and not info.timed_out:
        return
    lines, _ = log.read(max(before, log.next - TAIL))
    short = printable(script.strip().splitlines()[0] if script.strip() else script, 120)
    said = f"; its last words: {lines[-1]}" if lines else ""
    if info is None or info.timed_out:
        raise DeadlineExceeded(
            "template_step_timeout",
            f"{what} ({short}) had not ended after {timeout:g} s{said}",
            "a longer step_timeout (--step-timeout)",
            console=tuple(lines),
        )
    raise Conflict(
        "template_step_failed",
        f"{what} ({short}) failed, {_ended(info)}{said}",
        "nothing of the template is left; try the step by hand: stoker run IMAGE -it -- sh",
        details={"step": what, "exit_code": info.exit_code, "signal": info.signal},
        console=tuple(lines),
    )


async def begin_start(core: Core, box: Box, script: str, *, user: str | None = None, cwd: str | None = None) -> None:
    """Starts the command that stays."""
    words = StartProcess(argv=["/bin/sh", "-c", script], tag=START, stdin=True, user=user, cwd=cwd)
    live, agent = await core.agent(box)
    await live.hub.start(agent, words)


async def _failed_start(core: Core, box: Box) -> StokerError | None:
    """Why there is no point in waiting for what was started."""
    live, agent = await core.agent(box)
    info = await live.hub.get(agent, START)
    if info.running or info.exit_code == 0:  # one that ended well may have left a service behind
        return None
    lines: list[str] = []
    try:
        client = await live.hub.attach(START, None, None)
        log = Log()
        try:
            async with asyncio.timeout(LATE):
                await _finish(client, log)
        finally:
            await client.aclose()
        lines = log.read(max(0, log.next - TAIL))[0]
    except (StokerError, TimeoutError):
        pass  # then without its words
    said = f"; its last words: {lines[-1]}" if lines else ""
    return GuestError("template_start_failed", f"the start command does not stay: {_ended(info)}{said}", console=tuple(lines))


async def wait_ready(
    core: Core, box: Box, ready: str, timeout: float, *, started: bool, user: str | None = None, cwd: str | None = None
) -> None:
    """Until ``ready`` ends with 0. Errors: ``template_start_failed`` (GuestError), ``template_not_ready`` (DeadlineExceeded)."""
    deadline, pause = time.monotonic() + (timeout if ready else SETTLE), POLL
    log, said = Log(), ""
    async with core.used(box):
        while True:
            if ready:
                try:
                    left = max(POLL, deadline - time.monotonic())
                    return await run_step(core, box, "ready", ready, log, left, user=user, cwd=cwd)
                except (Conflict, DeadlineExceeded) as error:
                    if error.code not in ("template_step_failed", "template_step_timeout"):
                        raise
                    said = error.message
            if started and (failure := await _failed_start(core, box)) is not None:
                raise failure
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(POLL_MOST, pause * 1.5)
    if ready:
        raise DeadlineExceeded(
            "template_not_ready",
            f"it was not ready after {timeout:g} s: {said}",
            "a longer ready_timeout (--ready-timeout)",
            console=tuple(log.tail()[-TAIL:]),
        )
