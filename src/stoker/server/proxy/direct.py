"""The short way to a service: the machine's own address on this host, where it has one and the service listens there.

The agent's channel is the other way: to what listens on the guest's localhost only, and for whatever is to outlive a pause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Final

from stoker.errors import StokerError
from stoker.server.line_ports import Connections, Way
from stoker.server.proxy.backend import ANYBODY, ChannelBackend, Wire

__all__ = ["DirectBackend"]

PATIENCE: Final = 0.5
"""Seconds for a connection to the address. A machine's kernel answers at once, unless a firewall of its own drops what comes."""
AGAIN: Final = 30.0
"""Seconds until the address is tried again, when the service was found by the channel only."""


class DirectBackend(ChannelBackend):
    """A port at the sandbox's address, else by its agent."""

    def __init__(self, connections: Connections, sandbox: str, port: int) -> None:
        super().__init__(connections, sandbox, port)
        self._channel_until = 0.0

    @property
    def key(self) -> Hashable:
        return *self._place, "direct"

    async def connect(self, protocol: asyncio.Protocol) -> Wire:
        now = asyncio.get_running_loop().time
        if now() >= self._channel_until:
            wire = await self._direct(protocol)
            if wire is not None:
                return wire
        by_channel = await super().connect(protocol)
        if now() >= self._channel_until:
            self._channel_until = now() + AGAIN
        return by_channel

    async def _direct(self, protocol: asyncio.Protocol) -> AddressWire | None:
        way = await self._connections.way(ANYBODY, self._place[0])
        if way is None:
            return None
        wire = AddressWire(way, protocol)
        try:
            async with asyncio.timeout(PATIENCE):
                await asyncio.get_running_loop().create_connection(lambda: wire, way.address, self._place[1])
        except OSError:
            way.drop()
            return None
        except BaseException:
            way.drop()
            raise
        if way.ended:  # the machine was put away meanwhile
            return None
        wire.begin()
        return wire


class AddressWire(asyncio.Protocol):
    """A transport whose use of the sandbox is counted: for the transport a protocol, for ``protocol`` the transport."""

    def __init__(self, way: Way, protocol: asyncio.Protocol) -> None:
        self.line = way
        self._protocol = protocol
        self._transport: asyncio.Transport | None = None
        self._over = False
        self._begun = False
        way.watch(self._cut)

    def begin(self) -> None:
        """It is good: its protocol hears of it."""
        self._begun = True
        self._protocol.connection_made(self)  # type: ignore[arg-type]

    def _cut(self, error: StokerError | None) -> None:
        """The sandbox has this address no more."""
        if self._over:
            return
        self._over = True
        if self._transport is not None:
            self._transport.abort()
        if self._begun:
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, error)

    # -- as asyncio's protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._over:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self._begun:
            self.abort()  # nobody asked
        elif not self._over:
            self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        if self._over:
            return
        self._over = True
        self.line.drop()
        if self._begun:
            self._protocol.connection_lost(error)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    # -- as a transport -----------------------------------------------------------------------------------------------

    @property
    def _to(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    def write(self, data: bytes) -> None:
        self._to.write(data)

    def write_eof(self) -> None:
        if not self._to.is_closing():
            self._to.write_eof()

    def pause_reading(self) -> None:
        self._to.pause_reading()

    def resume_reading(self) -> None:
        self._to.resume_reading()

    def close(self) -> None:
        self._to.close()

    def abort(self) -> None:
        self._to.abort()

    def is_closing(self) -> bool:
        return self._over or self._to.is_closing()
