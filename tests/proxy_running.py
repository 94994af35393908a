"""The reverse proxy of a test: over real sockets, to a service that says exactly what the test wants."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from stoker.errors import StokerError
from stoker.server.proxy.backend import AddressBackend
from stoker.server.proxy.router import Router
from stoker.server.proxy.service import Proxy

SECRET = b"s" * 32
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Place:
    sandbox: str
    local: bool = True
    policy: str = ""
    direct: bool = False


@dataclass
class Sandboxes:
    """The engine's door, with services of this host."""

    known: dict[str, Place] = field(default_factory=dict)
    error: StokerError | None = None

    def route(self, label: str) -> Place | None:
        return self.known.get(label)

    async def open(self, who: Any, sandbox: str, port: int, **_: Any) -> Any:
        assert self.error is not None
        raise self.error

    async def way(self, who: Any, sandbox: str) -> None:
        return None


class Service:
    """Answers by ``handler``; ``requests`` are the heads it got, ``connections`` how many there were."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections = 0
        self.heads: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self.handler(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@dataclass
class Running:
    proxy: Proxy
    router: Router
    service: Service
    sandboxes: Sandboxes
    port: int

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, data: bytes, *, end: bool = False) -> bytes:
        """Everything that is answered, until the proxy closes."""
        reader, writer = await self.dial()
        writer.write(data)
        if end:
            writer.write_eof()
        async with asyncio.timeout(20):
            answer = await reader.read()
        writer.close()
        return answer


@asynccontextmanager
async def running(
    handler: Handler, *, trusted: frozenset[str] = frozenset(), domain: str = "localhost", port: int = 0
) -> AsyncIterator[Running]:
    """The proxy, and a service that it has as ``svc.DOMAIN``. Nothing may be left of either."""
    service = Service(handler)
    server = await asyncio.start_server(service, "127.0.0.1", 0)
    where = server.sockets[0].getsockname()[1]
    sandboxes = Sandboxes()
    router = Router(sandboxes, domain, SECRET, {f"svc.{domain}": lambda: AddressBackend("127.0.0.1", where)})
    proxy = Proxy(router, trusted=trusted)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        await proxy.begin(sock)
        yield Running(proxy, router, service, sandboxes, sock.getsockname()[1])
        await proxy.aclose(1.0)
    server.close()
    for _ in range(100):
        if not any(pool.count for pool in router.pools.values()):
            break
        await asyncio.sleep(0.01)
    assert not any(pool.count for pool in router.pools.values())
    assert not proxy.fronts


async def head_of(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the head it got."""
    while True:
        head = await head_of(reader)
        body = b""
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                body = await reader.readexactly(int(line[15:]))
        answer = head + body
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Is: here\r\n\r\n%b" % (len(answer), answer))
