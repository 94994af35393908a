"""One process's output for any number of clients, each with offsets of its own.

The guest's ring is the buffer; here only a little is on its way. A *pump* per stream takes the next bytes when every client has
room for them and gives each what it has not seen yet. A client that wants older bytes makes the feed ask the guest from there
again, and the others skip what they have seen. Nobody's bytes reach another process's client: a feed knows one process only.

Who holds back whom: in ``block`` mode every client (nothing is lost, the slowest decides). A *lossless* client makes a process of
``discard`` mode one of ``block`` mode for as long as it looks on, and no longer: what it leaves goes on freely. In ``discard``
mode a client that took nothing for :data:`PATIENCE` seconds is *left behind*; when it reads again, the guest is asked from its
offset, and what the ring no longer has is a gap in its offsets. With no client the guest is told to send nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from stoker.api.models import ProcessInfo
from stoker.engine.output import Output
from stoker.errors import GuestError, StokerError

if TYPE_CHECKING:
    from stoker.guest.agent import Agent
    from stoker.guest.process import Mode, Process
    from stoker.guest.streams import OutputStream

__all__ = ["NOW", "Client", "Feed"]

log = logging.getLogger(__name__)
NOW: Final = -1
"""The offset that means: from what comes next on."""
PIECE: Final = 65536
QUEUE: Final = 256 << 10
"""Bytes that may wait for one client."""
PATIENCE: Final = 0.05
STREAMS: Final = (1, 2)


class Client:
    """One client's own view; the engine's half of ``server.ports.Attachment``. ``aclose`` leaves the process as it is."""

    def __init__(self, feed: Feed, describe: Callable[[], ProcessInfo], release: Callable[[Client], Awaitable[None]]) -> None:
        self._feed = feed
        self._describe = describe
        self._release = release
        self.info = describe()
        self.stdout = self.stderr = 0
        self.cursor: dict[int, int | None] = {1: None, 2: None}
        self.ended: set[int] = set()
        self.behind = False
        self.lossless = False
        self.closed = False
        self._queue: deque[Output] = deque()
        self._size = 0
        self._ready = asyncio.Event()
        self._told = False

    # -- for the feed -------------------------------------------------------------------------------------------------

    @property
    def room(self) -> bool:
        return self._size < QUEUE

    def give(self, stream: int, offset: int, data: bytes) -> None:
        """The next bytes of a stream; those before the cursor have been seen."""
        at = self.cursor[stream]
        if at is not None and offset < at:
            data, offset = data[at - offset :], at
        if not data:
            return
        self._queue.append(Output(stream, offset, data))
        self._size += len(data)
        self.cursor[stream] = offset + len(data)
        self._ready.set()

    def end(self, stream: int) -> None:
        self.ended.add(stream)
        self._ready.set()

    def wake(self) -> None:
        self._ready.set()

    # -- for its owner ------------------------------------------------------------------------------------------------

    async def read(self) -> Output | None:
        """The next piece; None once both streams have ended. What ended the machine is raised."""
        while not self._queue:
            if len(self.ended) == len(STREAMS):
                return None
            if self.closed:
                raise GuestError("attachment_closed", "the attachment was closed")
            if self._feed.error is not None:
                raise self._feed.error
            if self.behind:
                await self._feed.catch_up(self)
                continue
            self._ready.clear()
            await self._ready.wait()
        piece = self._queue.popleft()
        full = not self.room
        self._size -= len(piece.data)
        if full and self.room:
            self._feed.wake()
        return piece

    async def wait(self) -> ProcessInfo:
        """Until the process has ended. It counts as ended when its output has been read, by whomever."""
        await self._feed.process.wait()
        return self._describe()

    async def write(self, data: bytes) -> None:
        await self._feed.process.stdin.write(data)

    async def close_stdin(self) -> None:
        self._feed.process.stdin.close()

    async def resize(self, rows: int, cols: int) -> None:
        await self._feed.process.resize(rows, cols)

    async def signal(self, number: int, *, group: bool = True) -> None:
        await self._feed.process.signal(number, group=group)

    async def aclose(self) -> None:
        if not self.closed:
            self.closed = True
            self._ready.set()
            await self._release(self)


class Feed:
    """See the module. ``process`` is persistent: a lost connection makes its streams wait, not fail."""

    def __init__(self, process: Process, *, block: bool) -> None:
        self.process = process
        self.block = block
        self.clients: set[Client] = set()
        self.error: StokerError | None = None
        self._pumps: list[asyncio.Task[None]] = []
        self._room = asyncio.Event()
        self._turn = asyncio.Lock()
        self._quiet = True

    def wake(self) -> None:
        self._room.set()

    def _stream(self, number: int) -> OutputStream:
        return self.process.stdout if number == 1 else self.process.stderr

    def _head(self, number: int) -> int:
        """As far as this side knows that the process has written."""
        known = self.process.info
        received = self._stream(number).received
        return received if known is None else max(received, known.out if number == 1 else known.err)

    async def _settle(self) -> None:
        """Whether the process waits for its readers, as those who look on now want it."""
        mode: Mode = "block" if self.block or any(client.lossless for client in self.clients) else "discard"
        if mode != self.process.mode and self.process.status is None:
            try:
                await self.process.set_stream(mode)
            except StokerError as error:  # it has just ended, or its connection has: then there is nothing to hold back
                log.debug("process %d keeps its mode: %s", self.process.id, error)

    async def join(self, client: Client, out: int | None, err: int | None, *, flowing: bool = False) -> None:
        """Takes a client in, from these offsets. ``flowing``: the guest sends already, from the beginning (just started)."""
        async with self._turn:
            if client.lossless and not flowing:
                self.clients.add(client)
                try:
                    await self._settle()
                finally:
                    self.clients.discard(client)
            wanted = {1: out, 2: err}
            for number in STREAMS:
                start = wanted[number]
                client.cursor[number] = self._head(number) if start == NOW and not self._quiet else None if start == NOW else start
            if flowing:
                self._quiet = False
                self._start()
            elif self._quiet:
                await self._ask(out, err)
            else:
                starts = {n: self._start_for(n, client.cursor[n]) for n in STREAMS}
                if any(starts[n] != self._stream(n).offset for n in STREAMS):
                    await self._ask(starts[1], starts[2])
            self.clients.add(client)
            begins = {}
            for number in STREAMS:
                stream, cursor = self._stream(number), client.cursor[number]
                begins[number] = client.cursor[number] = stream.offset if cursor is None else max(cursor, stream.offset)
                if stream.at_eof:
                    client.end(number)
            client.stdout, client.stderr = begins[1], begins[2]
            self._room.set()

    def _start_for(self, number: int, wanted: int | None) -> int | None:
        """Where a stream has to be asked from, so that a newcomer gets what it wants and nobody loses anything."""
        return None if wanted is None else min(wanted, self._stream(number).offset)

    async def leave(self, client: Client) -> None:
        async with self._turn:
            self.clients.discard(client)
            if not self.clients:
                await self._stop()
                self._quiet = True
                self.process.mute()
            if client.lossless:
                await self._settle()
            self._room.set()

    async def catch_up(self, client: Client) -> None:
        """A client that was left behind reads again: the guest is asked from its offset."""
        async with self._turn:
            if not client.behind:
                return
            client.behind = False
            starts = {n: self._start_for(n, client.cursor[n]) for n in STREAMS}
            await self._ask(starts[1], starts[2])

    async def _ask(self, out: int | None, err: int | None) -> None:
        await self._stop()
        try:
            await self.process.rewind(out, err)
        except GuestError as error:
            # The connection went in this moment: the streams know where to go on when the next one is there.
            if self.process.status is None and self.process.error is None and error.code in ("agent_lost", "agent_closed"):
                log.debug("process %d: %s; its streams wait", self.process.id, error)
            else:
                self.fail(error)
                raise
        except StokerError as error:
            self.fail(error)
            raise
        self._quiet = False
        self._start()

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._pumps = [loop.create_task(self._pump(n), name=f"pump {self.process.id}.{n}") for n in STREAMS]

    async def _stop(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        if self._pumps:
            await asyncio.wait(self._pumps)
        self._pumps = []

    async def _pump(self, number: int) -> None:
        stream = self._stream(number)
        try:
            while True:
                await self._wait_for_room()
                offset, data = await stream.read_at(PIECE)
                if not data:
                    for client in self.clients:
                        if not client.behind:
                            client.end(number)
                    return
                for client in self.clients:
                    if not client.behind:
                        client.give(number, offset, data)
        except StokerError as error:
            self.fail(error)

    async def _wait_for_room(self) -> None:
        while full := [client for client in self.clients if not client.room and not client.behind]:
            self._room.clear()
            try:
                patient = self.block or len(full) == len(self.clients) or all(client.lossless for client in full)
                async with asyncio.timeout(None if patient else PATIENCE):
                    await self._room.wait()
            except TimeoutError:
                for client in full:
                    if not client.room and len(self.clients) > 1 and not client.lossless:
                        client.behind = True

    def fail(self, error: StokerError) -> None:
        """The machine is gone, or the guest no longer knows the process."""
        self.error = error
        for client in self.clients:
            client.wake()

    async def resynchronise(self, agent: Agent) -> None:
        """Goes on over another connection."""
        async with self._turn:
            if self._quiet:
                await self.process.follow(agent)
            else:
                await self.process.reattach(agent)

    async def refresh(self, agent: Agent) -> None:
        """Asks the guest about a process nobody looks at: how much it wrote, whether it ended."""
        async with self._turn:
            if self._quiet:
                await self.process.follow(agent)

    async def close(self) -> None:
        await self._stop()
