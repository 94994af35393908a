"""One process of a guest on the user's standard streams: pumps, signals, terminal, time limit, exit code.

Works with whatever speaks of processes like :class:`RemoteProcess`: the agent's own, or the HTTP client's.

* With a terminal (``tty``), every key goes to the guest, Ctrl-C too. Without, SIGINT, SIGTERM, SIGQUIT, SIGHUP, SIGUSR1 and SIGUSR2
  are passed on as signals. The third SIGINT, SIGTERM or SIGQUIT within three seconds gives the machine up.
* Output is written as fast as our reader takes it, and the guest waits meanwhile. When the reader is gone, the command
  gets SIGPIPE, and two seconds to go.
* The exit code is the command's, 128 and the signal's number, or 124 when its time was up.
"""

from __future__ import annotations

import asyncio
import errno
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from stoker.cli import terminal
from stoker.cli.streams import Reader, Writer
from stoker.errors import HostError, StokerError

__all__ = ["RemoteProcess", "Signals", "attach"]

GRACE = 2.0
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
INSISTENT = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
ENDING = (*INSISTENT, signal.SIGHUP)
EXIT_TIMEOUT = 124
READER_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)
"""A closed pipe, a terminal that was hung up, a socket whose other side went."""


class Status(Protocol):
    @property
    def code(self) -> int | None: ...

    @property
    def signal(self) -> int | None: ...


class Sink(Protocol):
    async def write(self, data: bytes, /) -> None: ...

    def close(self) -> Awaitable[None] | None: ...


class RemoteProcess(Protocol):
    """A started process of a guest."""

    @property
    def stdin(self) -> Sink: ...

    @property
    def stdout(self) -> AsyncIterator[bytes]: ...

    @property
    def stderr(self) -> AsyncIterator[bytes]: ...

    async def wait(self) -> Status: ...

    async def signal(self, number: int, /) -> None: ...

    async def resize(self, rows: int, cols: int, /) -> None: ...


class Signals:
    """Who gets the signals that this program gets: first whoever waits for the machine, then the command.

    Until :meth:`attach` runs, a signal calls ``early`` (which ends the set-up). SIGHUP that was ignored stays ignored (nohup).
    """

    def __init__(self, early: Callable[[int], object]) -> None:
        self.handler: Callable[[int], object] = early
        self.on_resize: Callable[[], None] = lambda: None
        self._installed: list[int] = []

    def __enter__(self) -> Signals:
        loop = asyncio.get_running_loop()
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._pass, number)
                self._installed.append(number)
        loop.add_signal_handler(signal.SIGWINCH, lambda: self.on_resize())
        self._installed.append(signal.SIGWINCH)
        return self

    def _pass(self, number: int) -> None:
        self.handler(number)

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in self._installed:
            loop.remove_signal_handler(number)


class _Session:
    def __init__(self, process: RemoteProcess) -> None:
        self.process = process
        self.given_up: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.hurried = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._presses: deque[float] = deque(maxlen=3)

    def give_up(self, code: int) -> None:
        if not self.given_up.done():
            self.given_up.set_result(code)

    def fail(self, error: StokerError) -> None:
        if not self.given_up.done():
            self.given_up.set_exception(error)

    def soon(self, work: Awaitable[None]) -> None:
        """Asks the guest for something whose failure says no more than that the process is gone."""

        async def asked() -> None:
            try:
                await work
            except StokerError:
                pass  # the end of the process or of the machine is reported by what waits for it

        task = asyncio.ensure_future(asked())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def on_signal(self, number: int) -> None:
        if number in INSISTENT:
            now = time.monotonic()
            self._presses.append(now)
            if len(self._presses) == 3 and now - self._presses[0] < 3.0:
                self.give_up(128 + number)
                return
        if number in ENDING:
            self.hurried.set()
        self.soon(self.process.signal(number))

    def end(self, number: int, code: int) -> None:
        """Asks the command to end; gives it up when it does not."""
        self.soon(self.process.signal(number))
        asyncio.get_running_loop().call_later(GRACE, self.give_up, code)

    async def pump_in(self, reader: Reader) -> None:
        try:
            while data := await reader.read():
                await self.process.stdin.write(data)
            closing = self.process.stdin.close()
            if closing is not None:
                await closing
        except OSError as e:
            self.fail(HostError("input_failed", f"standard input cannot be read: {e.strerror}"))
        except StokerError:
            return  # the process reads no more, or the machine is gone: what waits for it says so

    async def pump_out(self, stream: AsyncIterator[bytes], writer: Writer, main: bool) -> None:
        writing = True
        async for data in stream:
            if not writing:
                continue
            try:
                await writer.write(data)
            except OSError as e:
                writing = False
                if e.errno not in READER_GONE:
                    self.soon(self.process.signal(signal.SIGTERM))
                    self.fail(HostError("output_failed", f"the command's output cannot be written: {e.strerror}", "df -h"))
                elif main:
                    self.end(signal.SIGPIPE, 128 + signal.SIGPIPE)

    async def finish(self, waiting: asyncio.Future[Status], outputs: Sequence[asyncio.Future[None]]) -> Status:
        """The status once everything has been written.

        Our reader may take its time, but not when the machine died or when the user asked for an end.
        """
        try:
            status = await asyncio.shield(waiting)
        except StokerError:
            await asyncio.wait(outputs, timeout=GRACE)
            raise
        hurry = asyncio.ensure_future(self.hurried.wait())
        written = asyncio.ensure_future(asyncio.wait(outputs))
        first: list[asyncio.Future[Any]] = [hurry, written]
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not written.done():
                await asyncio.wait([written], timeout=GRACE)
        finally:
            hurry.cancel()
            written.cancel()
        for output in outputs:
            if output.done():
                output.result()
        return status


async def attach(process: RemoteProcess, signals: Signals, *, stdin: bool, tty: bool = False, timeout: float | None = None) -> int:
    """Joins the process with fds 0, 1 and 2 until it ends; the result is the exit code for our own caller."""
    session = _Session(process)
    with ExitStack() as stack:
        if tty and stdin and terminal.is_terminal(0):
            stack.enter_context(terminal.raw(0))
        out, err = stack.enter_context(Writer(1)), stack.enter_context(Writer(2))
        waiting = asyncio.ensure_future(process.wait())
        outputs = [asyncio.ensure_future(session.pump_out(process.stdout, out, True))]
        if not tty:
            outputs.append(asyncio.ensure_future(session.pump_out(process.stderr, err, False)))
        tasks: list[asyncio.Future[Any]] = [waiting, *outputs, session.given_up]
        if stdin:
            tasks.append(asyncio.ensure_future(session.pump_in(stack.enter_context(Reader(0)))))
        signals.handler = session.on_signal
        if tty:
            signals.on_resize = lambda: session.soon(process.resize(*terminal.size()))
            signals.on_resize()  # it may have changed since the process was asked for
        done = asyncio.ensure_future(session.finish(waiting, outputs))
        tasks.append(done)
        first: set[asyncio.Future[Any]] = {done, session.given_up}
        try:
            await asyncio.wait(first, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            late = not done.done() and not session.given_up.done()
            if late:
                session.end(signal.SIGTERM, EXIT_TIMEOUT)
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                return session.given_up.result()
            status = done.result()
        finally:
            session.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    if late:
        return EXIT_TIMEOUT
    if status.signal is not None:
        return 128 + status.signal
    return status.code if status.code is not None else 255
