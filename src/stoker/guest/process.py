"""A process in the guest, as its three streams, its end, and the calls about it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from stoker.errors import Conflict, GuestError, StokerError
from stoker.guest import messages as m
from stoker.guest.messages import ExecRequest, ExitStatus, ProcessInfo
from stoker.guest.streams import Link, OutputStream, Stdin, gone, sleep_in, wake

if TYPE_CHECKING:
    from stoker.guest.agent import Agent

__all__ = ["Completed", "Process"]

SIGKILL = 9
NOW = -1
FROM_NOW = 1 << 62
"""More than any process writes: the agent begins at what comes next."""
Mode = Literal["block", "discard"]


class Completed(Struct, frozen=True):
    """A command that ran to its end. ``out_size`` and ``err_size`` count what it wrote, kept or not."""

    status: ExitStatus
    stdout: bytes
    stderr: bytes
    out_size: int
    err_size: int
    timed_out: bool = False


class Process:
    """Made by :meth:`Agent.exec` and :meth:`Agent.attach`.

    ``persistent``: when the connection is lost, readers, writers and waiters wait for :meth:`reattach` instead of failing.
    """

    agent: Agent

    def __init__(
        self,
        link: Link,
        request: ExecRequest | None,
        *,
        id: int = 0,
        out: int | None = None,
        err: int | None = None,
        window: int | None = None,
        persistent: bool = False,
    ) -> None:
        self.id = request.id if request is not None else id
        self.pid = 0
        self.tag = request.tag if request is not None else ""
        self.pty = request is not None and request.tty
        self.persistent = persistent
        self.window = window
        self.mode: Mode = request.mode if request is not None else "block"
        self.status: ExitStatus | None = None
        self.error: StokerError | None = None
        # Without a request nobody said how large the ring is: the largest there can be bounds what a guest may send.
        bound = window or (request.ring if request is not None else m.MAX_RING)
        strict = request is not None and request.mode == "block"
        starts = (0, 0) if request is not None else (out, err)
        self.stdin = Stdin(self.id * 4, link, closed=request is not None and not (request.stdin or request.tty))
        self.stdout = OutputStream(self.id * 4 + 1, link, window=bound, start=starts[0], strict=strict)
        self.stderr = OutputStream(self.id * 4 + 2, link, window=bound, start=starts[1], strict=strict)
        self._fresh = request is None
        self._disposed = False
        self._rewound = False
        self.info: ProcessInfo | None = None
        """What the guest said when it was attached last."""
        self._waiters: deque[asyncio.Future[None]] = deque()

    def __repr__(self) -> str:
        state = "running" if self.status is None else f"ended {self.status.shell_code}"
        return f"<Process {self.id} pid {self.pid} {state}>"

    async def wait(self) -> ExitStatus:
        """How the process ended. The agent tells it behind the last byte of output, so somebody has to read that."""
        while self.status is None:
            if self.error is not None:
                raise gone(self.error)
            await sleep_in(self._waiters)
        return self.status

    async def communicate(self, input: bytes | None = None, *, limit: int | None = None, timeout: float | None = None) -> Completed:
        """Feeds ``input`` and closes stdin, reads both outputs (keeping ``limit`` bytes of each), waits for the end.

        After ``timeout`` seconds the process group is killed, and ``timed_out`` is set.
        """
        out, err = self.stdout.collect(limit), self.stderr.collect(limit)
        feeding = asyncio.ensure_future(self._feed(input)) if input is not None else None
        timed_out = False
        try:
            try:
                async with asyncio.timeout(timeout):
                    status = await self.wait()
            except TimeoutError:
                timed_out = True
                await self.kill()
                status = await self.wait()
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
        return Completed(status, bytes(out), bytes(err), self.stdout.received, self.stderr.received, timed_out)

    async def _feed(self, input: bytes) -> None:
        try:
            await self.stdin.write(input)
            self.stdin.close()
        except (Conflict, GuestError):
            # The process does not want it, or the connection is gone, which wait() reports.
            pass

    async def signal(self, number: int, *, group: bool = True) -> None:
        """Sends a signal, to the whole process group by default. ``NotFound`` when it has ended."""
        await self.agent.call(m.Nothing, "signal", id=self.id, signal=int(number), group=group)

    async def kill(self) -> None:
        """SIGKILL to the process group; no error when it has ended."""
        try:
            await self.signal(SIGKILL)
        except StokerError as e:
            if e.code not in ("not_found", "bad_request"):
                raise

    async def resize(self, rows: int, cols: int) -> None:
        """Sets the terminal's size."""
        await self.agent.call(m.Nothing, "resize", id=self.id, rows=rows, cols=cols)

    async def set_stream(self, mode: Mode, window: int | None = None) -> None:
        """What happens when nobody reads (``block``: the process waits, ``discard``: the ring keeps the last bytes); the window."""
        if mode == "discard":
            self.stdout.strict = self.stderr.strict = False
        size = window or self.window or self.stdout.window
        await self.agent.call(m.Nothing, "stream", id=self.id, mode=mode, window=size)
        self.mode = mode
        if window is not None:
            self.window = window
            # What was on its way under a larger window may still come: the bound here only grows.
            self.stdout.window = self.stderr.window = max(window, self.stdout.window)

    async def detach(self) -> None:
        """No more output is sent here; the process goes on. Attach again with :meth:`reattach`, from where the streams are."""
        self.agent.release(self)
        await self.agent.call(m.Nothing, "detach", id=self.id)

    async def forget(self) -> None:
        """Frees what the guest keeps of an ended process."""
        await self.agent.call(m.Nothing, "forget", id=self.id)
        self.agent.release(self)

    def dismiss(self) -> None:
        """:meth:`forget` for one that ended, without waiting for the answer."""
        self.agent.dismiss(self)

    async def reattach(self, agent: Agent) -> None:
        """Goes on over ``agent``'s connection: output from the first byte not received, input from the first one not taken."""
        if self.status is not None and self.stdout.final is not None and self.stderr.final is not None:
            self.agent.release(self)
            agent._adopt(self)
            return
        await agent.resume(self)

    async def rewind(self, out: int | None, err: int | None) -> None:
        """Output once more from these offsets (None: the oldest byte held, -1: from what comes next).

        What was received and not read is dropped. ``stdout`` and ``stderr`` are new objects, whose ``offset`` says where they begin
        (the guest may not hold what was asked for). Stdin goes on as it is.
        """
        self._restart(out, err)
        await self.agent.resume(self)

    async def follow(self, agent: Agent) -> None:
        """Over another connection, without output: only the end is told. :meth:`rewind` brings the output back."""
        if self.status is not None:
            self.agent = agent
            return
        self._restart(NOW, NOW)
        await agent.resume(self)
        self.mute()

    def mute(self) -> None:
        """No more output is sent here, but the end is still told. Nothing is waited for."""
        self.agent.mute(self)

    def _restart(self, out: int | None, err: int | None) -> None:
        link = self.agent.link
        first, second = (FROM_NOW if offset == NOW else offset for offset in (out, err))
        self.stdout = OutputStream(self.stdout.number, link, window=self.stdout.window, start=first, strict=False)
        self.stderr = OutputStream(self.stderr.number, link, window=self.stderr.window, start=second, strict=False)
        self._rewound = True

    def dispose(self) -> None:
        """Ends it, if it has not ended, and forgets it once it has: without anyone waiting, output and all. For cleaning up."""
        if self._disposed:
            return
        self._disposed = True
        self.persistent = False
        for stream in (self.stdout, self.stderr):
            stream.collect(0)
        if self.status is not None:
            self._forget_now()
        else:
            self.agent.post("signal", id=self.id, signal=SIGKILL, group=True)

    def _forget_now(self) -> None:
        self.agent.release(self)
        self.agent.post("forget", id=self.id)

    def abandon(self, error: StokerError) -> None:
        """Gives a process up whose machine is gone: everyone who waits gets ``error``."""
        self.persistent = False
        self._fail(error)

    # -- called by the Agent ----------------------------------------------------------------------------------------------------

    def start_over(self) -> None:
        """Another connection may have written to stdin: the agent's answer to ``attach`` says from where on."""
        self._fresh = True

    def on_started(self, started: m.Started) -> None:
        self.pid = started.pid

    def on_attached(self, link: Link, info: ProcessInfo) -> None:
        self.pid, self.tag, self.pty = info.pid, m.printable(info.tag), info.pty
        self.error = None
        self.info = info
        if self._fresh:
            self._fresh = False
            self.stdin = Stdin(self.id * 4, link, start=info.stdin, closed=self.stdin.closed)
        else:
            self.stdin.on_link(link, info.stdin)
        if self._rewound:
            self._rewound = False
            self.stdout.begin(info.out_oldest, info.out)
            self.stderr.begin(info.err_oldest, info.err)
        self.stdout.on_link(link)
        self.stderr.on_link(link)
        if info.exit is not None:
            self.on_exit(info.exit)

    def on_exit(self, status: ExitStatus) -> None:
        self.status = status
        self.stdin.on_refused()
        wake(self._waiters)
        if self._disposed:
            self._forget_now()

    def on_lost(self, reason: GuestError) -> None:
        self._fail(None if self.persistent else reason)

    def _fail(self, error: StokerError | None) -> None:
        if self.status is None:
            self.error = error
        for stream in (self.stdin, self.stdout, self.stderr):
            stream.on_lost(error)
        if error is not None:
            wake(self._waiters)
