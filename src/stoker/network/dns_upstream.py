"""Asks the host's resolvers, so that an answer can hardly be forged: number, port and letter case of a question are by chance.

Over UDP from a connected socket of its own for each question; over TCP where an answer is truncated, does not repeat the question
letter by letter, or where too much came that was no answer.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final

from stoker.host.namespaces import Namespace
from stoker.network.dns_wire import Malformed, Rcode, Reply, ask, mixed_case, parse_reply

__all__ = ["Server", "Unanswered", "Upstreams", "exactly", "nameservers"]

MOST_SERVERS: Final = 3
FORGERIES: Final = 8
"""Packets to a question's port that do not answer it, after which it is asked over TCP."""
RESOLV_CONF: Final = Path("/etc/resolv.conf")


class Unanswered(Exception):
    """No resolver answered in time."""


@dataclass(frozen=True, slots=True)
class Server:
    """A resolver that is asked."""

    address: IPv4Address | IPv6Address
    port: int = 53

    @classmethod
    def parse(cls, text: str) -> Server:
        """An address, with ``:PORT`` behind it where that is not 53 (IPv6 in brackets then). Raises ValueError."""
        host, _, port = text.rpartition(":") if text.startswith("[") or text.count(":") == 1 else (text, "", "53")
        number = int(port)
        if not 0 < number < 65536:
            raise ValueError(f"{text} has no port")
        return cls(ip_address(host.strip("[]")), number)

    @property
    def family(self) -> int:
        return socket.AF_INET if self.address.version == 4 else socket.AF_INET6

    @property
    def name(self) -> tuple[str, int] | tuple[str, int, int, int]:
        """As sockets take it."""
        if isinstance(self.address, IPv6Address):
            scope = self.address.scope_id or "0"
            index = int(scope) if scope.isdigit() else socket.if_nametoindex(scope)
            return str(self.address).partition("%")[0], self.port, 0, index
        return str(self.address), self.port


def nameservers(text: str, without: Collection[IPv4Address] = ()) -> list[Server]:
    """The resolvers of a resolv.conf; ``without``: addresses of ours, which would ask us again."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                server = Server(ip_address(words[1]))
            except (AddressValueError, ValueError):
                continue
            if server.address not in without and server not in found:
                found.append(server)
    return found[:MOST_SERVERS] or [Server(IPv4Address("127.0.0.1"))]


@dataclass(slots=True)
class Upstreams:
    """``servers`` empty: those of resolv.conf, read again when it changed. ``ours``: addresses that are never asked."""

    home: Namespace
    servers: Sequence[Server] = ()
    timeout: float = 1.5
    rounds: int = 2
    ours: Callable[[], Collection[IPv4Address]] = tuple
    resolv_conf: Path = RESOLV_CONF
    _read: tuple[object, list[Server]] = field(default=(None, []))

    def current(self) -> list[Server]:
        """Whom to ask, in order."""
        ours = self.ours()
        if self.servers:
            return [server for server in self.servers if server.address not in ours]
        try:
            status = os.stat(self.resolv_conf)
            mark: object = (status.st_mtime_ns, status.st_ino, status.st_size)
        except OSError:
            mark = ()
        if mark != self._read[0]:
            try:
                text = self.resolv_conf.read_text(errors="replace")
            except OSError:
                text = ""
            self._read = mark, nameservers(text)
        return [server for server in self._read[1] if server.address not in ours]

    async def ask(self, name: bytes, type_: int) -> Reply:
        """What the first that answers says. Raises :class:`Unanswered`."""
        why = "there is no resolver to ask"
        for _ in range(self.rounds):
            for server in self.current():
                try:
                    async with asyncio.timeout(self.timeout):
                        reply = await self._ask(server, name, type_)
                except (OSError, Malformed, TimeoutError, EOFError) as error:
                    why = f"{server.address}: {str(error) or 'no answer'}"
                    continue
                if reply.rcode in (Rcode.NOERROR, Rcode.NXDOMAIN):
                    return reply
                why = f"{server.address}: code {reply.rcode}"
        raise Unanswered(why)

    async def _ask(self, server: Server, name: bytes, type_: int) -> Reply:
        reply = await self._by_udp(server, name, type_, edns=True)
        if reply is not None and reply.rcode in (Rcode.FORMERR, Rcode.NOTIMP):
            reply = await self._by_udp(server, name, type_, edns=False)
        if reply is None or reply.truncated or not reply.exact:
            reply = await self._by_tcp(server, name, type_)
            if reply.truncated:
                raise Malformed("truncated over TCP")
        return reply

    def _socket(self, server: Server, kind: int) -> socket.socket:
        sock = self.home.run(lambda: socket.socket(server.family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC))
        return sock

    async def _by_udp(self, server: Server, name: bytes, type_: int, *, edns: bool) -> Reply | None:
        """None: what comes is not what was asked for."""
        loop = asyncio.get_running_loop()
        asked, number = mixed_case(name), secrets.randbits(16)
        with self._socket(server, socket.SOCK_DGRAM) as sock:
            sock.connect(server.name)  # of a datagram socket: nothing to wait for; its port is the kernel's choice by chance
            await loop.sock_sendall(sock, ask(number, asked, type_, edns=edns))
            for _ in range(FORGERIES):
                data = await loop.sock_recv(sock, 65535)
                try:
                    return parse_reply(data, number, asked, type_)
                except Malformed:
                    continue
        return None

    async def _by_tcp(self, server: Server, name: bytes, type_: int) -> Reply:
        loop = asyncio.get_running_loop()
        number = secrets.randbits(16)
        with self._socket(server, socket.SOCK_STREAM) as sock:
            await loop.sock_connect(sock, server.name)
            question = ask(number, name, type_)
            await loop.sock_sendall(sock, struct.pack("!H", len(question)) + question)
            size = int.from_bytes(await exactly(sock, 2), "big")
            return parse_reply(await exactly(sock, size), number, name, type_)


async def exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes of a connection; EOFError when it ends before."""
    data = bytearray()
    while len(data) < size:
        part = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not part:
            raise EOFError("the connection ended")
        data += part
    return bytes(data)
