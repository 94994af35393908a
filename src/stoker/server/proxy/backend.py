"""The ways to a service: a plain address of the host's, or the agent's channel into a guest. (:mod:`.direct` is the third.)

All give what asyncio gives: a transport for a protocol. The rest of the proxy does not know which it is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from typing import Final, Protocol

from stoker.api.models import Principal
from stoker.errors import Conflict, DeadlineExceeded, GuestError, StokerError
from stoker.server.line_ports import Connections, Line, Use

__all__ = ["ANYBODY", "AddressBackend", "Backend", "ChannelBackend", "Wire"]

HIGH_WATER: Final = 64 << 10
CONNECT: Final = 10.0
ANYBODY: Final = Principal()


class Wire(Protocol):
    """What the proxy needs of a transport, of what :class:`asyncio.Transport` has."""

    def write(self, data: bytes) -> None: ...
    def write_eof(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def is_closing(self) -> bool: ...


class Backend(Protocol):
    """One service. ``key`` tells whether two are the same, so that connections are kept for the next request."""

    @property
    def key(self) -> Hashable: ...

    async def connect(self, protocol: asyncio.Protocol) -> Wire:
        """A new connection, whose events ``protocol`` gets. Raises :class:`StokerError`: why not, and how to mend it."""

    def rest(self, wire: Wire) -> None:
        """Nobody uses the connection for now."""

    def use(self, wire: Wire) -> bool:
        """Somebody does again. False: it must not be used any more."""

    def lasting(self, wire: Wire) -> None:
        """It became a tunnel: it may stay for long, and a pause of the machine does not wait for it."""


class AddressBackend:
    """A TCP address that this host reaches."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port

    @property
    def key(self) -> Hashable:
        return self._host, self._port

    async def connect(self, protocol: asyncio.Protocol) -> Wire:
        where = f"{self._host}:{self._port}"
        try:
            async with asyncio.timeout(CONNECT):
                transport, _ = await asyncio.get_running_loop().create_connection(lambda: protocol, self._host, self._port)
        except TimeoutError:
            raise DeadlineExceeded("port_timeout", f"{where} does not answer") from None
        except ConnectionRefusedError:
            raise GuestError("port_refused", f"nothing listens on {where}", "start the service") from None
        except OSError as error:
            raise GuestError("port_unreachable", f"{where}: {error.strerror or error}") from None
        return transport

    def rest(self, wire: Wire) -> None:
        pass

    def use(self, wire: Wire) -> bool:
        return not wire.is_closing()

    def lasting(self, wire: Wire) -> None:
        pass


class ChannelBackend:
    """A port inside a sandbox, by its agent's channel: also where the sandbox has no network, or only localhost listens."""

    def __init__(self, connections: Connections, sandbox: str, port: int) -> None:
        self._connections = connections
        self._place = sandbox, port

    @property
    def key(self) -> Hashable:
        return self._place

    async def connect(self, protocol: asyncio.Protocol) -> Wire:
        sandbox, port = self._place
        line = await self._connections.open(ANYBODY, sandbox, port, brief=True)
        return ChannelWire(line, protocol)

    def rest(self, wire: Wire) -> None:
        _use_of(wire).rest()

    def use(self, wire: Wire) -> bool:
        return not wire.is_closing() and _use_of(wire).use()

    def lasting(self, wire: Wire) -> None:
        _use_of(wire).lasting()


def _use_of(wire: Wire) -> Use:
    line: Use = wire.line  # type: ignore[attr-defined]
    return line


class ChannelWire:
    """A line into a guest as a transport: one task reads, one writes."""

    def __init__(self, line: Line, protocol: asyncio.Protocol) -> None:
        loop = asyncio.get_running_loop()
        self.line = line
        self._protocol = protocol
        self._queue: deque[bytes | None] = deque()
        self._size = 0
        self._full = False
        self._closing = False
        self._over = False
        self._more = asyncio.Event()
        self._may_read = asyncio.Event()
        self._may_read.set()
        protocol.connection_made(self)  # type: ignore[arg-type]
        self._tasks = (loop.create_task(self._read()), loop.create_task(self._write()))

    def write(self, data: bytes) -> None:
        if self._closing or not data:
            return
        self._queue.append(data)
        self._size += len(data)
        self._more.set()
        if self._size > HIGH_WATER and not self._full:
            self._full = True
            self._protocol.pause_writing()

    def write_eof(self) -> None:
        if not self._closing:
            self._queue.append(None)
            self._more.set()

    def pause_reading(self) -> None:
        self._may_read.clear()

    def resume_reading(self) -> None:
        self._may_read.set()

    def is_closing(self) -> bool:
        return self._closing or self.line.ended

    def close(self) -> None:
        """Behind what was written."""
        if not self._closing:
            self._closing = True
            self._more.set()

    def abort(self) -> None:
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._over:
            return
        self._over = self._closing = True
        for task in self._tasks:
            task.cancel()
        self.line.drop()
        asyncio.get_running_loop().call_soon(self._protocol.connection_lost, error)

    async def _read(self) -> None:
        try:
            while True:
                await self._may_read.wait()
                data = await self.line.read()
                if not data:
                    break
                # What was asked for before the pause is handed over after it.
                await self._may_read.wait()
                self._protocol.data_received(data)
            if not self._protocol.eof_received():
                self.close()
        except StokerError as error:
            self._end(error)

    async def _write(self) -> None:
        refused = False
        try:
            while True:
                while not self._queue:
                    if self._closing:
                        await self.line.aclose()
                        self._end(None)
                        return
                    self._more.clear()
                    await self._more.wait()
                data = self._queue.popleft()
                try:
                    if data is None:
                        self.line.close_write()
                    elif not refused:
                        await self.line.write(data)
                except Conflict:
                    # The service takes no more, and may still have something to say: the reader tells its end.
                    refused = True
                self._size -= len(data or b"")
                if self._full and self._size <= HIGH_WATER // 2:
                    self._full = False
                    self._protocol.resume_writing()
        except StokerError as error:
            self._end(error)
