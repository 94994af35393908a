"""The processes of one sandbox, as clients of the API see them.

What the guest knows (that it runs, its output, its end) stays in the guest; here is what it was started with, who looks on, and
when an ended one is forgotten. What was started in the background is also a row, so that it is the same process after a restart.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from stoker.api.models import OutputMode, ProcessInfo, StartProcess
from stoker.engine.feed import Client, Feed
from stoker.engine.lines import Lines
from stoker.errors import Conflict, GuestError, InvalidRequest, NotFound, StokerError

if TYPE_CHECKING:
    from stoker.guest.agent import Agent
    from stoker.guest.messages import ExecRequest
    from stoker.guest.process import Process

__all__ = ["Hub", "Started"]

log = logging.getLogger(__name__)
ENDED_KEPT: Final = 64
ENDED_SECONDS: Final = 300.0
WINDOW: Final = 256 << 10
REFRESHED: Final = 32
STARTING: Final = 16
"""Starts that are asked of the guest at a time. It makes one after the other anyway, and each has only so long to be answered."""


class Started(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a process was started with; the row of one in the background."""

    id: int
    argv: list[str] = field(default_factory=list)
    tag: str | None = None
    cwd: str | None = None
    user: str | None = None
    terminal: bool = False
    stdin: bool = False
    block: bool = False
    background: bool = False
    started_at: float | None = None
    ends_by: float | None = None


class _Tracked:
    """One process."""

    def __init__(self, started: Started, process: Process) -> None:
        self.started = started
        self.process = process
        self.feed = Feed(process, block=started.block)
        self.ended_at: float | None = None
        self.timed_out = False
        self.reaper: asyncio.Task[None] | None = None

    @property
    def info(self) -> ProcessInfo:
        started, process = self.started, self.process
        status, known = process.status, process.info
        out, err = process.stdout, process.stderr
        info = ProcessInfo(
            id=started.id,
            pid=process.pid,
            running=status is None,
            argv=started.argv,
            tag=started.tag,
            cwd=started.cwd,
            user=started.user,
            terminal=started.terminal,
            stdin=started.stdin or started.terminal,
            started_at=started.started_at,
            ended_at=self.ended_at,
            timed_out=self.timed_out,
            stdout_bytes=max(out.received if out.received < 1 << 61 else 0, known.out if known else 0),
            stderr_bytes=max(err.received if err.received < 1 << 61 else 0, known.err if known else 0),
            stdout_oldest=known.out_oldest if known else 0,
            stderr_oldest=known.err_oldest if known else 0,
        )
        if status is None:
            return info
        return replace(
            info,
            exit_code=status.code,
            signal=status.signal,
            stdout_bytes=status.out,
            stderr_bytes=status.err,
            cpu_seconds=(status.user_us + status.sys_us) / 1e6,
            max_rss=status.max_rss_kb * 1024,
            duration_ms=status.duration_us / 1e3,
        )


def _limits(wanted: dict[str, tuple[int, int]]) -> list[tuple[int, int, int]]:
    limits = []
    for name, (soft, hard) in wanted.items():
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None:
            known = ", ".join(sorted(n[7:] for n in dir(resource) if n.startswith("RLIMIT_")))
            raise InvalidRequest("bad_rlimit", f"there is no resource limit {name}", f"limits: {known}")
        limits.append((number, *((1 << 64) - 1 if value < 0 else value for value in (soft, hard))))
    return limits


def translate(request: StartProcess, number: int, *, attach: bool, builtin: bool = False) -> ExecRequest:
    """The agent's request for one of the API's. ``builtin``: it names one of the agent's applets."""
    from stoker.guest.messages import ExecRequest

    return ExecRequest(
        argv=request.argv,
        id=number,
        env=request.env,
        clear_env=request.clear_env,
        cwd=request.cwd,
        user=request.user,
        tty=request.terminal is not None,
        rows=request.terminal.rows if request.terminal else 0,
        cols=request.terminal.cols if request.terminal else 0,
        stdin=request.stdin,
        mode="block" if request.mode is OutputMode.BLOCK else "discard",
        ring=1 << (request.ring - 1).bit_length(),
        tag=request.tag or "",
        rlimits=_limits(request.rlimits),
        umask=request.umask,
        attach=attach,
        builtin=builtin,
        args={} if builtin else None,
    )


class Hub:
    """All processes of one machine. ``tell`` is called with a kind and data when a background process starts or ends,
    ``keep`` with the row of one that must be remembered (or an id that need not be any more)."""

    def __init__(self, label: str, tell: Callable[..., None], keep: Callable[[int, Started | None], None]) -> None:
        self._label = label
        self._tell = tell
        self._keep = keep
        self._all: dict[int, _Tracked] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting = asyncio.Semaphore(STARTING)
        self.lines = Lines()
        self.error: StokerError | None = None

    # -- starting -----------------------------------------------------------------------------------------------------

    async def start(self, agent: Agent, request: StartProcess) -> ProcessInfo:
        """In the background."""
        tracked = await self._exec(agent, request, attach=False)
        tracked.process.mute()
        self._keep(tracked.started.id, tracked.started)
        self._tell("process.started", process=tracked.started.id, argv=tracked.started.argv[:16], tag=tracked.started.tag)
        return tracked.info

    async def open(self, agent: Agent, request: StartProcess, *, lossless: bool = False, builtin: bool = False) -> Client:
        """Started and attached in one round trip."""
        tracked = await self._exec(agent, request, attach=True, lossless=lossless, builtin=builtin)
        client = self._client(tracked)
        client.lossless = lossless
        await tracked.feed.join(client, 0, 0, flowing=True)
        return client

    async def _exec(
        self, agent: Agent, request: StartProcess, *, attach: bool, lossless: bool = False, builtin: bool = False
    ) -> _Tracked:
        number = await agent.new_id()
        wire = translate(replace(request, mode=OutputMode.BLOCK) if lossless else request, number, attach=attach, builtin=builtin)
        async with self._starting:
            process = await agent.exec(wire, window=WINDOW if wire.ring > WINDOW else None, persistent=True)
        started = Started(
            id=number,
            argv=request.argv,
            tag=request.tag,
            cwd=request.cwd,
            user=request.user,
            terminal=request.terminal is not None,
            stdin=request.stdin,
            block=request.mode is OutputMode.BLOCK,
            background=not attach,
            started_at=time.time(),
            ends_by=time.time() + request.timeout if request.timeout else None,
        )
        return self._track(started, process)

    def _track(self, started: Started, process: Process) -> _Tracked:
        tracked = self._all[started.id] = _Tracked(started, process)
        tracked.reaper = self._spawn(self._reap(tracked), f"{self._label} process {started.id}")
        return tracked

    def _spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _reap(self, tracked: _Tracked) -> None:
        process, ends_by = tracked.process, tracked.started.ends_by
        try:
            try:
                async with asyncio.timeout(None if ends_by is None else max(0.0, ends_by - time.time())):
                    await process.wait()
            except TimeoutError:
                tracked.timed_out = True
                await process.kill()
                await process.wait()
        except StokerError as error:
            log.debug("%s: process %d: %s", self._label, process.id, error)
            tracked.feed.fail(error)
            return
        tracked.ended_at = time.time()
        if tracked.started.background:
            status = process.status
            self._tell(
                "process.ended",
                process=process.id,
                tag=tracked.started.tag,
                exit_code=status.code if status else None,
                signal=status.signal if status else None,
                timed_out=tracked.timed_out,
            )
        self._retire()

    def _retire(self) -> None:
        """Forgets ended ones that nobody looks at: the oldest beyond the bound, and those past their time."""
        ended = sorted(
            (t for t in self._all.values() if t.ended_at is not None and not t.feed.clients), key=lambda t: t.ended_at or 0
        )
        too_old = time.time() - ENDED_SECONDS
        for position, tracked in enumerate(ended):
            if len(ended) - position > ENDED_KEPT or (tracked.ended_at or 0) < too_old:
                self._drop(tracked)

    def _drop(self, tracked: _Tracked) -> None:
        self._all.pop(tracked.started.id, None)
        tracked.process.dismiss()
        if tracked.started.background:
            self._keep(tracked.started.id, None)

    # -- finding ------------------------------------------------------------------------------------------------------

    def find(self, which: int | str) -> _Tracked:
        """By id, or the newest with a tag: a running one first."""
        if isinstance(which, int):
            tracked = self._all.get(which)
        else:
            tagged = [t for t in self._all.values() if t.started.tag == which]
            tracked = max(tagged, key=lambda t: (t.process.status is None, t.started.id), default=None)
        if tracked is None:
            raise NotFound("process_unknown", f"{self._label} has no process {which}", f"stoker ps {self._label}")
        return tracked

    async def get(self, agent: Agent, which: int | str) -> ProcessInfo:
        tracked = self.find(which)
        await self._refresh(agent, tracked)
        return tracked.info

    async def list(self, agent: Agent, tag: str | None) -> list[ProcessInfo]:
        self._retire()
        found = [t for t in self._all.values() if tag in (None, t.started.tag)]
        for tracked in [t for t in found if t.process.status is None][:REFRESHED]:
            await self._refresh(agent, tracked)
        return [t.info for t in found]

    async def _refresh(self, agent: Agent, tracked: _Tracked) -> None:
        """Of a process that nobody looks at, the guest alone knows how much it wrote."""
        try:
            await tracked.feed.refresh(agent)
        except (GuestError, NotFound) as error:
            log.debug("%s: process %d: %s", self._label, tracked.started.id, error)

    # -- using --------------------------------------------------------------------------------------------------------

    def _client(self, tracked: _Tracked) -> Client:
        return Client(tracked.feed, lambda: tracked.info, tracked.feed.leave)

    async def attach(self, which: int | str, out: int | None, err: int | None, *, lossless: bool = False) -> Client:
        tracked = self.find(which)
        client = self._client(tracked)
        client.lossless = lossless
        await tracked.feed.join(client, out, err)
        client.info = tracked.info
        return client

    def _running(self, which: int | str) -> _Tracked:
        tracked = self.find(which)
        if tracked.process.status is not None:
            raise Conflict("process_ended", f"process {which} of {self._label} has ended", f"stoker ps {self._label}")
        return tracked

    async def signal(self, which: int | str, number: int, *, group: bool) -> None:
        tracked = self._running(which)
        try:
            await tracked.process.signal(number, group=group)
        except NotFound:
            raise Conflict("process_ended", f"process {which} of {self._label} has ended", f"stoker ps {self._label}") from None

    async def write(self, which: int | str, data: bytes, *, close: bool) -> None:
        tracked = self._running(which)
        if not (tracked.started.stdin or tracked.started.terminal):
            raise Conflict(
                "stdin_closed", f"process {which} of {self._label} was started without standard input", "start it with stdin"
            )
        if data:
            await tracked.process.stdin.write(data)
        if close:
            tracked.process.stdin.close()

    async def resize(self, which: int | str, rows: int, cols: int) -> None:
        await self._running(which).process.resize(rows, cols)

    def forget(self, which: int | str) -> None:
        tracked = self.find(which)
        if tracked.process.status is None:
            raise Conflict("process_running", f"process {which} of {self._label} runs", f"stoker kill {self._label} {which}")
        self._drop(tracked)

    # -- the connection -----------------------------------------------------------------------------------------------

    async def adopt(self, agent: Agent, rows: dict[int, Started]) -> None:
        """After a restart: every process the guest knows is followed again."""
        # A connection begins with their list.
        welcome = agent.welcome
        for known in await agent.processes() if welcome.more else welcome.processes:
            if known.id in self._all:
                continue
            started = rows.get(known.id) or Started(id=known.id, tag=known.tag or None, terminal=known.pty)
            try:
                process = await agent.observe(known.id)
            except NotFound:
                continue
            self._track(started, process)
        # A connection that an earlier daemon made is nobody's: the agent closes those at the next word about connections.
        agent.post("connect")

    async def resynchronise(self, agent: Agent) -> None:
        """After the connection was lost, over the next one."""
        for tracked in list(self._all.values()):
            try:
                await tracked.feed.resynchronise(agent)
            except NotFound as error:
                tracked.process.abandon(error)
                tracked.feed.fail(error)
                self._all.pop(tracked.started.id, None)
        await self.lines.resynchronise(agent)

    async def close(self, error: StokerError) -> None:
        """The machine is gone, or is let go of: everyone who looks on gets ``error``."""
        self.error = error
        self.lines.close(error)
        for tracked in self._all.values():
            tracked.process.abandon(error)
            tracked.feed.fail(error)
            await tracked.feed.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))


def decode_started(text: str) -> Started:
    return msgspec.json.decode(text.encode(), type=Started)
