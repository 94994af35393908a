"""The real agent as an ordinary program of this host, and a proxy that loses bytes as a virtio port does."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from stoker.host.binaries import agent_path

Process = subprocess.Popen[bytes]


def agent_program() -> Path:
    """The agent as it was built, or another build (with sanitizers) that ``STOKER_TEST_AGENT`` names."""
    return Path(os.environ.get("STOKER_TEST_AGENT") or agent_path())


def children(pid: int) -> list[int]:
    """All descendants of a process, the nearest first."""
    try:
        found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return found + [deeper for child in found for deeper in children(child)]


def _listens(path: Path) -> bool:
    """Bound is not listening yet, and connecting to find out would make the test's own connection the second."""
    accepts = 0x10000  # __SO_ACCEPTCON
    for line in Path("/proc/thread-self/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if words[-1] == str(path) and int(words[3], 16) & accepts:
            return True
    return False


@asynccontextmanager
async def running_agent(path: Path, within: Callable[[Any], Any] = lambda work: work()) -> AsyncIterator[Process]:
    """``stoker-agent --socket PATH``; it and everything it started is gone afterwards. ``within`` does things where it is to be."""

    # Not asyncio's own: a test that is cut short by its time limit leaves no loop that could end this, only the interpreter's exit.
    def start() -> Process:
        return subprocess.Popen([agent_program(), "--socket", path], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    process: Process = within(start)

    def end() -> None:
        for pid in children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()

    atexit.register(end)
    try:
        async with asyncio.timeout(10):
            while not within(lambda: _listens(path)):
                assert process.poll() is None, "the agent ended at once"
                await asyncio.sleep(0.005)
        yield process
        assert process.poll() is None, f"the agent ended with {process.returncode}"
    finally:
        end()
        atexit.unregister(end)


class LossyProxy:
    """Between the host and the agent: cuts connections and loses what is on its way.

    With ``keep`` the agent's end stays open across the host's connections, as a virtio port does: the agent hears of a new host by
    its preamble only, behind whatever was left of a frame. Without, it sees a connection end and the next one begin.
    """

    def __init__(self, listen: Path, agent: Path, *, keep: bool, seed: int) -> None:
        self.listen, self.agent, self.keep = listen, agent, keep
        self.random = random.Random(seed)
        self.budget: int | None = None
        """Bytes until the next cut, both directions together; None: no cut."""
        self.cuts = 0
        self._upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._host: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(self._serve, self.listen, limit=1 << 18)
        try:
            yield
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for writer in (self._host, self._upstream[1] if self._upstream else None):
                if writer is not None:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
            await server.wait_closed()

    def cut(self) -> None:
        """The host's connection ends now."""
        if self._host is not None:
            self.cuts += 1
            host, self._host = self._host, None
            host.transport.abort()
            if not self.keep and self._upstream is not None:
                self._upstream[1].transport.abort()
                self._upstream = None

    def _passes(self, data: bytes) -> bytes:
        """What still gets through before the next cut."""
        if self.budget is None:
            return data
        passed = data[: self.budget]
        self.budget -= len(passed)
        return passed

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._upstream is None:
                self._upstream = await asyncio.open_unix_connection(self.agent, limit=1 << 18)
                pump = asyncio.create_task(self._out(self._upstream[0]))
                self._tasks.add(pump)
                pump.add_done_callback(self._tasks.discard)
            upstream = self._upstream[1]
            self._host = writer
            while data := await reader.read(1 << 17):
                passed = self._passes(data)
                upstream.write(passed)
                if len(passed) < len(data):
                    self.cut()
                    return
                await upstream.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            if self._host is writer:
                self._host = None
            writer.close()
            self._tasks.discard(task)

    async def _out(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 17):
                host = self._host
                if host is None:
                    continue  # lost: nobody is there
                passed = self._passes(data)
                host.write(passed)
                if len(passed) < len(data):
                    # Some of what the socket took is lost as well.
                    self.cut()
                else:
                    with contextlib.suppress(ConnectionError):
                        await host.drain()
