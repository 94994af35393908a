"""The two sockets on which one machine is answered: packets and connections, bounded in number and time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address
from typing import Any, Final

from stoker.network.dns_wire import MAX_QUERY

__all__ = ["Listener", "bound"]

MOST_CONNECTIONS: Final = 8
MOST_QUESTIONS: Final = 100
"""Over one connection."""
PATIENCE: Final = 10.0
"""Seconds that a connection may be silent, or not take its answer."""

Heard = Callable[[IPv4Address, bytes, bool], Coroutine[Any, Any, bytes] | None]
"""What makes the answer to a question from there; True: it came over TCP. None: it gets no answer."""


class Listener(asyncio.DatagramProtocol):
    """Made by :meth:`open`."""

    def __init__(self, address: IPv4Address, heard: Heard) -> None:
        self.address = address
        self._heard = heard
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None
        self._full = False
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, sockets: tuple[socket.socket, socket.socket], address: IPv4Address, heard: Heard) -> Listener:
        """Takes over the sockets: one for packets, one that listens."""
        one = cls(address, heard)
        loop = asyncio.get_running_loop()
        try:
            one._udp, _ = await loop.create_datagram_endpoint(lambda: one, sock=sockets[0])
            one._tcp = await asyncio.start_server(one._connected, sock=sockets[1], limit=4096)
        except BaseException:
            for sock in sockets:
                sock.close()
            raise
        return one

    async def aclose(self) -> None:
        if self._udp is not None:
            self._udp.abort()
        if self._tcp is not None:
            self._tcp.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the loop closes what was aborted in its next round

    def pause_writing(self) -> None:
        """The kernel takes no more answers: what comes now is not answered."""
        self._full = True

    def resume_writing(self) -> None:
        self._full = False

    def error_received(self, exc: Exception) -> None:
        """A machine that does not hear its answers; nothing to do."""

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if self._full:
            return
        making = self._heard(IPv4Address(addr[0]), data, False)
        if making is not None:
            self._start(self._send(making, addr))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, making: Coroutine[Any, Any, bytes], to: tuple[str, int]) -> None:
        answer = await making
        if self._udp is not None and not self._udp.is_closing():
            self._udp.sendto(answer, to)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._connections += 1
        try:
            if self._connections <= MOST_CONNECTIONS:
                await self._converse(reader, writer)
        except (TimeoutError, EOFError, OSError, asyncio.CancelledError):
            pass  # it is over
        finally:
            self._connections -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source = IPv4Address(writer.get_extra_info("peername")[0])
        for _ in range(MOST_QUESTIONS):
            async with asyncio.timeout(PATIENCE):
                size = int.from_bytes(await reader.readexactly(2), "big")
                if size > MAX_QUERY:
                    return
                data = await reader.readexactly(size)
            making = self._heard(source, data, True)
            if making is None:
                return
            answer = await making
            writer.write(len(answer).to_bytes(2, "big") + answer)
            async with asyncio.timeout(PATIENCE):
                await writer.drain()


def bound(interface: str, address: str, port: int) -> tuple[socket.socket, socket.socket]:
    """A socket for packets and a listening one, for what comes in by that interface only. Raises OSError."""
    with contextlib.ExitStack() as undo:
        made = []
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            sock = undo.enter_context(socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            made.append(sock)
        made[1].listen(16)
        undo.pop_all()
    return made[0], made[1]
