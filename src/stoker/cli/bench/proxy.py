"""``stoker bench proxy``: the reverse proxy alone, between clients and a service of this host, each a process of its own.

No sandbox is needed: the service is a plain address, as a guest with a network is. The same clients ask the service without the
proxy, in the same run.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import time
from typing import TYPE_CHECKING, Any

import click

from stoker.cli.bench.api import resident
from stoker.cli.bench.report import Report

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

__all__ = ["proxy"]

HOST = b"bench.localhost"
REQUEST = b"GET /hello?x=1 HTTP/1.1\r\nHost: %b\r\nUser-Agent: stoker-bench\r\nAccept: */*\r\n\r\n" % HOST
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n\r\nHello, world!"
BODY = b"Hello, world!"


class _Service(asyncio.Protocol):
    """Answers every head. It knows that a head ends where its bytes do, unless several come at once."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        count = data.count(b"\r\n\r\n")
        self._buffer = b"" if data.endswith(b"\r\n\r\n") else data[data.rfind(b"\r\n\r\n") + 4 :] if count else data
        self.transport.write(ANSWER * count)


class _Client(asyncio.Protocol):
    """Asks again as soon as it is answered, until ``stop``."""

    transport: asyncio.Transport

    def __init__(self, seconds: list[float], counter: list[int]) -> None:
        self._seconds, self._counter = seconds, counter
        self._buffer = b""
        self._asked = 0.0
        self.stop = False
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._ask()

    def _ask(self) -> None:
        self._counter[0] += 1
        self._asked = time.perf_counter()
        self.transport.write(REQUEST)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._buffer.endswith(BODY):
            return
        self._seconds.append(time.perf_counter() - self._asked)
        assert self._buffer.startswith(b"HTTP/1.1 200"), self._buffer
        self._buffer = b""
        if self.stop:
            self.transport.close()
        else:
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(self.stop and error is None)


def _listening() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def _serve(pipe: Connection) -> None:
    async def run() -> None:
        with _listening() as sock:
            server = await asyncio.get_running_loop().create_server(_Service, sock=sock, backlog=1024)
            pipe.send(sock.getsockname()[1])
            await asyncio.get_running_loop().run_in_executor(None, _until_closed, pipe)
            server.close()

    asyncio.run(run())


def _proxy(pipe: Connection, service: int) -> None:
    from stoker.server.proxy.backend import AddressBackend
    from stoker.server.proxy.router import Router
    from stoker.server.proxy.service import Proxy

    async def run() -> None:
        backend = AddressBackend("127.0.0.1", service)
        served = Proxy(Router(_Nobody(), "localhost", b"", {HOST.decode(): lambda: backend}))
        with _listening() as sock:
            await served.begin(sock)
            pipe.send(sock.getsockname()[1])
            await asyncio.get_running_loop().run_in_executor(None, _until_closed, pipe)
            await served.aclose()

    asyncio.run(run())


class _Nobody:
    """There are no sandboxes."""

    def route(self, label: str) -> None:
        return None

    async def open(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    async def way(self, *_: Any) -> None:
        return None


def _until_closed(pipe: Connection) -> None:
    try:
        pipe.recv()
    except EOFError:
        pass


async def _load(port: int, clients: int, seconds: float, requests: int) -> tuple[list[float], float, int]:
    """The times of all requests, how long it took altogether, failures."""
    loop = asyncio.get_running_loop()
    times: list[float] = []
    counter = [0]
    began = time.perf_counter()
    made = [await loop.create_connection(lambda: _Client(times, counter), "127.0.0.1", port) for _ in range(clients)]
    while (counter[0] < requests) if requests else (time.perf_counter() - began < seconds):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    for _, client in made:
        client.stop = True
    ends = await asyncio.gather(*(client.ended for _, client in made))
    return times, time.perf_counter() - began, sum(not end for end in ends)


def _start(context: Any, work: Any, *arguments: Any) -> tuple[Any, Connection, int]:
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours, ours.recv()


def _held(pid: int) -> tuple[int, int]:
    """Resident KiB and descriptors, once the ends of connections have come through."""
    descriptors: list[int] = []
    for _ in range(10):
        descriptors.append(len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.05)
    return resident(pid), min(descriptors)


@click.command()
@click.option("--clients", default=32, show_default=True, help="Connections at a time.")
@click.option("--seconds", default=5.0, show_default=True, help="For each of the two measurements.")
@click.option("--requests", default=0, help="So many requests through the proxy, in place of --seconds.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def proxy(clients: int, seconds: float, requests: int, as_json: bool) -> None:
    """Requests per second over kept connections, against a service of this host, and what the proxy's process holds then."""
    context = multiprocessing.get_context("spawn")
    started: list[tuple[Any, Connection, int]] = []
    try:
        started.append(_start(context, _serve))
        started.append(_start(context, _proxy, started[0][2]))
        pid = started[1][0].pid
        asyncio.run(_load(started[1][2], clients, 0.5, 0))
        before = _held(pid)
        times, took, failed = asyncio.run(_load(started[1][2], clients, seconds, requests))
        after = _held(pid)
        direct, took_direct, _ = asyncio.run(_load(started[0][2], clients, min(seconds, 3.0), 0))
    finally:
        for process, pipe, _ in reversed(started):
            pipe.close()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    _report(times, took, failed, direct, took_direct, clients, before, after).print(as_json)


def _report(
    times: Sequence[float],
    took: float,
    failed: int,
    direct: Sequence[float],
    took_direct: float,
    clients: int,
    before: tuple[int, int],
    after: tuple[int, int],
) -> Report:
    rate, without = len(times) / took, len(direct) / took_direct
    more = {
        "clients": clients,
        "requests_per_second": round(rate),
        "direct_per_second": round(without),
        "resident_kib": {"before": before[0], "after": after[0]},
        "descriptors": {"before": before[1], "after": after[1]},
    }
    return Report("proxy", times, ["a connection was lost"] * failed, {"of the direct rate": rate / without}, more)
