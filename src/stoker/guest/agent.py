"""A connected agent: calls and their replies, events, and the processes whose streams run over this connection.

An :class:`Agent` lives exactly as long as its connection. When that is gone (``closed`` is set, ``reason`` says why) every pending
call fails with the reason, and so do its processes' streams, except those of a ``persistent`` process: they wait for
:meth:`Process.reattach` on the next connection's agent (:meth:`Agent.take_over` does it for all of them) and go on without losing
or repeating a byte.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from stoker.errors import GuestError, NotFound
from stoker.guest import messages as m
from stoker.guest.calls import CALL_TIMEOUT, Caller
from stoker.guest.connections import FIRST_CONNECTION, RING, Connection
from stoker.guest.copies import AfterRestore, BeforeSnapshot, Report
from stoker.guest.frames import ACK, DATA, EOF, EVENT, PONG, REPLY, WELCOME, Frame, protocol_error
from stoker.guest.messages import Configuration, ExecRequest, GuestInfo, ProcessInfo, Welcome
from stoker.guest.process import Completed, Process
from stoker.guest.streams import OutputStream, gone

if TYPE_CHECKING:
    from stoker.guest.channel import Channel

__all__ = ["Agent", "Completed", "MakeKeys", "Process"]

log = logging.getLogger(__name__)
MakeKeys = Callable[[Sequence[str]], Awaitable[Sequence[tuple[str, int, m.Text]]]]
"""Makes ssh host keys in place of those at these paths, which a guest has named: path, mode and content of each file."""
MAX_LISTED: Final = 16384
CLOCK_SLACK: Final = 0.01
"""Seconds that a message with the time may take; after that the clock is set again."""


class Agent(Caller):
    """Made by :func:`stoker.guest.channel.connect`."""

    welcome: Welcome

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._greeting: asyncio.Future[Welcome] | None = self._loop.create_future()
        self._next_id = 0
        self._processes: dict[int, Process] = {}
        self._outputs: dict[int, OutputStream] = {}
        self.on_log: Callable[[str, str], None] | None = None
        """Called with level and text of what the agent logs; by default it goes to this module's logger."""
        self.on_oom: Callable[[int], None] | None = None
        """Called with a process id, or 0, when the guest ran out of memory."""

    # -- the connection ---------------------------------------------------------------------------------------------------------

    async def greeted(self) -> None:
        """Waits for WELCOME and checks the version. Part of ``connect``."""
        assert self._greeting is not None
        self.welcome = await self._greeting
        self._greeting = None
        if self.welcome.version == 0:
            raise GuestError(
                "agent_too_old",
                f"the guest's agent ({m.printable(self.welcome.agent, 60)}) speaks no protocol version this Stoker knows",
                "restart the sandbox: the agent comes with the machine's initramfs",
            )
        if not m.VERSION_MIN <= self.welcome.version <= m.VERSION_MAX:
            raise protocol_error(f"it chose version {self.welcome.version}")

    async def wait_closed(self) -> GuestError:
        """Waits for the end of the connection; the reason."""
        await self.closed.wait()
        assert self.reason is not None
        return self.reason

    async def aclose(self) -> None:
        """Closes the connection. What runs in the guest goes on."""
        self._channel.close(GuestError("agent_closed", "the connection to the guest's agent was closed by this side"))

    async def __aenter__(self) -> Agent:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def on_lost(self, reason: GuestError) -> None:
        """The channel is over."""
        self._fail_waiting(reason)
        if self._greeting is not None and not self._greeting.done():
            self._greeting.set_exception(gone(reason))
            self._greeting.exception()
        for process in self._processes.values():
            process.on_lost(reason)

    # -- what comes in ----------------------------------------------------------------------------------------------------------

    def on_frames(self, frames: list[Frame]) -> None:
        """What one read brought. Raises ``GuestError`` for what cannot be; the channel closes then."""
        for type, channel, offset, payload in frames:
            if self._greeting is not None and not self._greeting.done():
                if type != WELCOME:
                    raise protocol_error(f"frame type {type:#04x} before its welcome")
                self._greeting.set_result(m.decode(Welcome, payload))
            elif type == DATA:
                stream = self._outputs.get(channel)
                if stream is not None:
                    stream.on_data(offset, payload)
            elif type == ACK:
                process = self._processes.get(channel >> 2)
                if process is not None and not channel & 3:
                    process.stdin.on_ack(offset)
            elif type == EOF:
                stream = self._outputs.get(channel)
                if stream is not None:
                    stream.on_eof(offset)
            elif type == REPLY:
                self._on_reply(channel, payload)
            elif type == EVENT:
                self._on_event(channel, payload)
            elif type == PONG:
                self._on_pong(payload)
            elif type == WELCOME:
                raise protocol_error("a second welcome")

    def _on_event(self, channel: int, payload: bytes) -> None:
        event = m.decode(m.Event, payload)
        if event.e == "exit":
            process = self._processes.get(channel)
            if process is not None:
                process.on_exit(m.decode(m.ExitStatus, payload))
        elif event.e == "stdin_closed":
            process = self._processes.get(channel)
            if process is not None:
                process.stdin.on_refused()
        elif event.e == "log":
            level, text = m.printable(event.level, 16), m.printable(event.text, 2000)
            if self.on_log is not None:
                self.on_log(level, text)
            else:
                log.info("agent: %s: %s", level, text)
        elif event.e == "oom" and self.on_oom is not None:
            self.on_oom(channel)

    # -- calls ------------------------------------------------------------------------------------------------------------------

    async def configure(self, configuration: Configuration, *, keys: MakeKeys | None = None, timeout: float = 60.0) -> bool:
        """Makes the fresh guest this machine (root, name, network, time). True when the agent is the guest's init.

        With ``keys`` its disk is another machine's: the ssh host keys on it are replaced by those that this makes.
        """
        if configuration.realtime:
            configuration = msgspec.structs.replace(configuration, realtime=time.time_ns())
        configuration = msgspec.structs.replace(configuration, ask_keys=keys is not None)
        began = time.monotonic()
        configured: m.Configured = await self._finish(self._begin("configure", m.encode_map(configuration), m.Configured), timeout)
        if keys is not None and configured.ssh_host_keys is not None:
            configuration = msgspec.structs.replace(configuration, ssh_host_keys=await keys(configured.ssh_host_keys))
            number = self._begin("configure", m.encode_map(configuration), m.Configured)
            configured = await self._finish(number, timeout)
            if configured.ssh_host_keys is not None:
                raise protocol_error("it wants host keys again")
        if configuration.realtime and time.monotonic() - began > CLOCK_SLACK:
            self.post("time", realtime=time.time_ns())
        return configured.pid1

    async def prepare(self, preparation: m.Preparation, *, timeout: float = 60.0) -> None:
        """Mounts the root of a machine that is to be copied before it is told who it is."""
        number = self._begin("prepare", m.encode_map(preparation), m.Nothing)
        await self._finish(number, timeout)

    async def before_snapshot(self, words: BeforeSnapshot, *, timeout: float = 300.0) -> Report:
        """Makes the guest ready for its memory to be taken. The vCPUs are to be stopped after the answer."""
        number = self._begin("before_snapshot", words.wire(), Report)
        report: Report = await self._finish(number, timeout)
        return report.clean()

    async def after_snapshot(self) -> Report:
        """Thaws the file systems of the machine that goes on. (In its copies ``after_restore`` does.)"""
        return (await self.call(Report, "after_snapshot")).clean()

    async def after_restore(self, words: AfterRestore, *, keys: MakeKeys | None = None, timeout: float = 300.0) -> Report:
        """Tells a machine that came back from memory who it is; to be called before anything else on the first connection.

        ``keys`` makes new ssh host keys where the machine has some. The agent answers nothing else before this is done. When the
        connection is lost meanwhile, the same ``words`` may be sent again on the next one: what was done is not done twice.
        """
        if not words.realtime:
            words = msgspec.structs.replace(words, realtime=time.time_ns())
        words = msgspec.structs.replace(words, ask_keys=keys is not None)
        began = time.monotonic()
        report: Report = await self._finish(self._begin("after_restore", words.wire(), Report), timeout)
        if keys is not None and report.ssh_host_keys is not None:
            made = await keys(report.ssh_host_keys)
            # No random number of the kernel's is drawn from the same words twice.
            words = msgspec.structs.replace(words, ssh_host_keys=made, entropy=os.urandom(64))
            report = await self._finish(self._begin("after_restore", words.wire(), Report), timeout)
            if report.ssh_host_keys is not None:
                raise protocol_error("it wants host keys again")
        if time.monotonic() - began > CLOCK_SLACK:
            # The message was on its way for a while, in memory that was cold. What is asked from now on comes behind this.
            self.post("time", realtime=time.time_ns())
        return report.clean()

    async def processes(self) -> list[ProcessInfo]:
        """Every process of the agent's that runs, or ended and is remembered."""
        found: list[ProcessInfo] = []
        while True:
            after = found[-1].id if found else 0
            page = await self.call(m.Processes, "processes", after=after)
            if any(info.id <= after for info in page.processes) or len(found) > MAX_LISTED:
                raise protocol_error("a list of processes without an end")
            found += page.processes
            if not page.more or not page.processes:
                return found

    async def info(self) -> GuestInfo:
        """Counters for metrics."""
        return await self.call(GuestInfo, "info")

    async def sync(self, timeout: float = 120.0) -> None:
        """Writes the guest's file systems out."""
        await self.call(m.Nothing, "sync", timeout)

    async def shutdown(self, how: str = "poweroff", grace: float = 5.0) -> None:
        """Begins to power off: SIGTERM to all, ``grace`` seconds, SIGKILL, unmount. Wait for the machine to see it done."""
        await self.call(m.Nothing, "shutdown", how=how, grace=round(grace * 1000))

    async def set_time(self, realtime: int | None = None) -> int:
        """Sets the guest's clock (nanoseconds of the epoch; the host's now by default); what it said before."""
        return (await self.call(m.Clock, "time", realtime=time.time_ns() if realtime is None else realtime)).realtime

    async def get_time(self) -> int:
        """What the guest's clock says: nanoseconds of the epoch."""
        return (await self.call(m.Clock, "time")).realtime

    async def grow(self, serial: str, path: str = "/", timeout: float = 60.0) -> int:
        """Enlarges the file system mounted at ``path`` to its disk, whose size in bytes it had by then is the answer. ext4 only."""
        return (await self.call(m.Grown, "grow", timeout, serial=serial, path=path)).device

    async def reseed(self, entropy: bytes) -> None:
        """Gives the guest's random generator fresh entropy: after every restore and fork."""
        await self.call(m.Nothing, "reseed", entropy=entropy)

    # -- processes --------------------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> list[Process]:
        """The processes whose streams run over this connection."""
        return list(self._processes.values())

    async def exec(
        self,
        request: ExecRequest,
        *,
        input: bytes | None = None,
        window: int | None = None,
        persistent: bool = False,
        again: bool = False,
        timeout: float = CALL_TIMEOUT,
    ) -> Process:
        """Starts a process. ``input`` (at most 256 KiB) is its whole stdin, sent with the call in one write.

        ``window`` is how many bytes of each output stream may wait on this side: the ring's size by default. Raises
        ``CommandNotFound``, ``CommandNotExecutable``, ``InvalidRequest`` (directory, user) and what a lost connection raises. After
        that the same request (with an ``id`` from :meth:`new_id`) may be repeated with ``again`` on the next connection: it starts
        nothing twice, and attaches to what the first try started.
        """
        self._check()
        if input is not None and not request.stdin:
            request = msgspec.structs.replace(request, stdin=True)
        if request.id == 0:
            request = msgspec.structs.replace(request, id=await self.new_id())
        process = Process(self._channel, request, window=window, persistent=persistent)
        payload = m.encode_map(request)
        with self._channel.batch():
            number = self._begin(f"exec of {m.printable(str(request.argv[:1]), 100)}", payload, m.Started, process.on_started)
            pending = self._pending[number]
            self._adopt(process)
            if window is not None:
                self.post("stream", id=request.id, mode=request.mode, window=window)
            if input is not None and not again:
                process.stdin.write_now(input)
                process.stdin.close()
        try:
            await self._finish(number, timeout)
            if again:
                process.start_over()
                await self.resume(process)
                if input is not None and not process.stdin.closed:
                    process.stdin.write_now(input[process.stdin.sent :])
                    process.stdin.close()
        except asyncio.CancelledError:
            # It may have started, or be about to. Nobody will ever ask for it.
            process.dispose()
            if not pending.future.done() or pending.future.cancelled():
                self._give_up(number, pending, lambda: self.release(process))
            raise
        except BaseException:
            self.release(process)
            raise
        return process

    async def connect(self, to: bytes, *, persistent: bool = False, timeout: float = CALL_TIMEOUT) -> Connection:
        """Connects inside the guest to an address (:func:`~stoker.guest.connections.inet`, ``unix``).

        ``GuestError("unreachable")`` says why not, with the guest's ``errno`` in its details; ``connect_timeout``: nobody answered.
        """
        self._check()
        number = FIRST_CONNECTION | secrets.randbits(27)
        while number in self._processes:
            number = FIRST_CONNECTION | secrets.randbits(27)
        request = ExecRequest([], id=number, stdin=True, ring=RING)
        process = Process(self._channel, request, persistent=persistent)
        call = self._begin("a connection", m.call("connect", id=number, to=to), m.Nothing)
        self._adopt(process)
        try:
            await self._finish(call, timeout)
        except BaseException as error:
            self.dismiss(process)
            if isinstance(error, GuestError) and error.code == "agent_timeout":
                raise GuestError("connect_timeout", f"nobody answered in the guest within {timeout:g} s") from None
            raise
        return Connection(process)

    async def run(
        self, request: ExecRequest, *, input: bytes | None = None, limit: int | None = None, timeout: float | None = None
    ) -> Completed:
        """Starts a process, waits for its end and forgets it.

        ``limit`` is how many bytes of each output are kept (the rest is read and dropped). After ``timeout`` seconds the process
        group is killed and ``timed_out`` set.
        """
        small = input is None or len(input) <= m.STDIN_WINDOW
        if not small:
            request = msgspec.structs.replace(request, stdin=True)
        process = await self.exec(request, input=input if small else None)
        try:
            return await process.communicate(None if small else input, limit=limit, timeout=timeout)
        finally:
            process.dispose()

    async def attach(
        self, id: int, out: int | None = None, err: int | None = None, *, window: int | None = None, persistent: bool = False
    ) -> Process:
        """The streams of a process that runs or is remembered, from these offsets on (None: from the oldest byte there is).

        A process that was attached on this connection already loses its streams to the new one.
        """
        process = Process(self._channel, None, id=id, out=out, err=err, window=window, persistent=persistent)
        await self.resume(process)
        return process

    async def observe(self, id: int) -> Process:
        """A process that runs or is remembered, without its output (see :meth:`Process.rewind`): its end is told. Persistent."""
        process = Process(self._channel, None, id=id, persistent=True)
        process.agent = self
        await process.follow(self)
        return process

    def mute(self, process: Process) -> None:
        """See :meth:`Process.mute`."""
        for stream in (process.stdout, process.stderr):
            if self._outputs.get(stream.number) is stream:
                del self._outputs[stream.number]
        if self._processes.get(process.id) is process:
            self.post("detach", id=process.id)

    def dismiss(self, process: Process) -> None:
        """See :meth:`Process.dismiss`."""
        self.release(process)
        self.post("forget", id=process.id)

    @property
    def link(self) -> Channel:
        """The connection, for streams that are made anew."""
        return self._channel

    async def resume(self, process: Process) -> None:
        """Attaches ``process`` here from where its streams are. Use :meth:`Process.reattach`."""
        self._check()
        previous = self._processes.get(process.id)
        if previous is not None and previous is not process:
            self.release(previous)
            previous.on_lost(GuestError("superseded", f"process {process.id} was attached again"))
        # What is on its way from before the call was seen belongs to nobody.
        for stream in (process.stdout, process.stderr):
            self._outputs.pop(stream.number, None)

        def attached(info: ProcessInfo) -> None:
            if info.id != process.id:
                raise protocol_error(f"it attached process {info.id} instead of {process.id}")
            self._adopt(process)
            process.on_attached(self._channel, info)

        with self._channel.batch():
            if process.window is not None:
                self.post("stream", id=process.id, mode=process.mode, window=process.window)
            arguments = {"id": process.id, "out": process.stdout.resume_at, "err": process.stderr.resume_at}
            number = self._begin(f"attach to process {process.id}", m.call("attach", **arguments), ProcessInfo, attached)
        try:
            await self._finish(number)
        except NotFound:
            self.release(process)
            raise

    async def take_over(self, former: Agent) -> None:
        """Goes on here with every process of a connection that is gone. One the guest no longer knows ends with ``NotFound``.

        They are this agent's from the first moment: should this connection be lost meanwhile, the next one takes over from here.
        """
        moving = former.attached
        for process in moving:
            former.release(process)
            self._processes.setdefault(process.id, process)
        for process in moving:
            try:
                await process.reattach(self)
            except NotFound as e:
                process.abandon(e)

    def _adopt(self, process: Process) -> None:
        self._processes[process.id] = process
        process.agent = self
        for stream in (process.stdout, process.stderr):
            self._outputs[stream.number] = stream

    def release(self, process: Process) -> None:
        """Frames for ``process`` are dropped from now on."""
        if self._processes.get(process.id) is process:
            del self._processes[process.id]
            for stream in (process.stdout, process.stderr):
                self._outputs.pop(stream.number, None)

    async def new_id(self) -> int:
        """An id this boot has not seen: above every one the agent remembers, in a range of this connection's own."""
        if self._next_id == 0:
            known = self.welcome.processes
            if self.welcome.more:
                known = await self.processes()
            highest = max((info.id for info in known), default=0)
            self._next_id = max(highest + 1, (self.welcome.generation & 0xFFF) << 16, 1)
        self._next_id = max(self._next_id, 1)
        while self._next_id in self._processes:
            self._next_id += 1
        chosen, self._next_id = self._next_id, self._next_id + 1
        if chosen >= FIRST_CONNECTION:
            raise GuestError("too_many", "this boot of the guest has used up its process numbers")
        return chosen
