"""The two sockets on which one machine is answered: packets and connections, bounded in number and time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from ipaddress import IPv4Address
from typing import Any, Final

from stoker.network.dns_upstream import exactly
from stoker.network.dns_wire import MAX_QUERY, Query

__all__ = ["Listener", "bound"]

log = logging.getLogger(__name__)
MOST_CONNECTIONS: Final = 8
MOST_QUESTIONS: Final = 100
"""Over one connection."""
PATIENCE: Final = 10.0
"""Seconds that a connection may be silent, or not take its answer."""

Admit = Callable[[IPv4Address, bytes, bool], Query | None]
"""Whether a message from there (True: over TCP) is a question that gets an answer."""
Answer = Callable[[Query], Coroutine[Any, Any, bytes]]


class Listener(asyncio.DatagramProtocol):
    """Made by :meth:`open`."""

    def __init__(self, address: IPv4Address, listening: socket.socket, admit: Admit, answer: Answer) -> None:
        self.address = address
        self._listening, self._admit, self._answer = listening, admit, answer
        self._udp: asyncio.DatagramTransport | None = None
        self._full = False
        self._later: asyncio.TimerHandle | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls, sockets: tuple[socket.socket, socket.socket], address: IPv4Address, admit: Admit, answer: Answer
    ) -> Listener:
        """Takes over the sockets: one for packets, one that listens."""
        one = cls(address, sockets[1], admit, answer)
        try:
            one._udp, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: one, sock=sockets[0])
        except BaseException:
            for sock in sockets:
                sock.close()
            raise
        one._listen()
        return one

    async def aclose(self) -> None:
        if self._udp is not None:
            self._udp.abort()
        if self._later is not None:
            self._later.cancel()
        asyncio.get_running_loop().remove_reader(self._listening)
        self._listening.close()
        ending = [*self._tasks, *self._connections]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await asyncio.sleep(0)  # the loop closes what was aborted in its next round

    def pause_writing(self) -> None:
        """The kernel takes no more answers: what comes now is not answered."""
        self._full = True

    def resume_writing(self) -> None:
        self._full = False

    def error_received(self, exc: Exception) -> None:
        """A machine that does not hear its answers; nothing to do."""

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if not self._full and (query := self._admit(IPv4Address(addr[0]), data, False)) is not None:
            self._start(self._send(query, addr))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, query: Query, to: tuple[str, int]) -> None:
        answer = await self._answer(query)
        if self._udp is not None and not self._udp.is_closing():
            self._udp.sendto(answer, to)

    def _accept(self) -> None:
        """Takes a connection. (The loop's own way loses one when it is cancelled at the wrong moment.)"""
        try:
            connection, (source, _) = self._listening.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptors left, perhaps
            log.warning("questions over TCP at %s: %s", self.address, error)
            self._pause()
            return
        connection.setblocking(False)
        if len(self._connections) >= MOST_CONNECTIONS:
            connection.close()
            return
        task = asyncio.create_task(self._converse(connection, IPv4Address(source)))
        self._connections.add(task)
        task.add_done_callback(partial(self._ended, connection))

    def _listen(self) -> None:
        asyncio.get_running_loop().add_reader(self._listening, self._accept)

    def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listening)
        self._later = loop.call_later(1, self._listen)

    def _ended(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        connection.close()
        self._connections.discard(task)

    async def _converse(self, connection: socket.socket, source: IPv4Address) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError, EOFError, OSError):
            for _ in range(MOST_QUESTIONS):
                async with asyncio.timeout(PATIENCE):
                    size = int.from_bytes(await exactly(connection, 2), "big")
                    if size > MAX_QUERY:
                        return
                    data = await exactly(connection, size)
                query = self._admit(source, data, True)
                if query is None:
                    return
                answer = await self._answer(query)
                async with asyncio.timeout(PATIENCE):
                    await loop.sock_sendall(connection, len(answer).to_bytes(2, "big") + answer)


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
