"""``stoker bench proxy``: the reverse proxy alone, between clients and a service of this host, each a process of its own.

No sandbox is needed: the service is at an address of this host, to which the proxy goes as it goes to that of a machine with a
network. The same clients ask the service without the proxy, in the same run.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import time
from typing import TYPE_CHECKING, Any

import click

from stoker.cli.bench.api import processor, resident
from stoker.cli.bench.report import Report
from stoker.errors import GuestError, StokerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

__all__ = ["proxy"]

REQUEST = b"GET /hello?x=1 HTTP/1.1\r\nHost: %d-bench.localhost\r\nUser-Agent: stoker-bench\r\nAccept: */*\r\n\r\n"
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

    def __init__(self, request: bytes, seconds: list[float], counter: list[int]) -> None:
        self._request, self._seconds, self._counter = request, seconds, counter
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
        self.transport.write(self._request)

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


def _proxy(pipe: Connection) -> None:
    from stoker.server.proxy.router import Router
    from stoker.server.proxy.service import Proxy

    async def run() -> None:
        served = Proxy(Router(_Sandboxes(), "localhost", b""))
        with _listening() as sock:
            await served.begin(sock)
            pipe.send(sock.getsockname()[1])
            await asyncio.get_running_loop().run_in_executor(None, _until_closed, pipe)
            await served.aclose()

    asyncio.run(run())


class _Way:
    """To this host itself, which is always there."""

    address = "127.0.0.1"
    ended = False

    def watch(self, cut: Callable[[StokerError | None], None]) -> None: ...
    def lasting(self) -> None: ...
    def rest(self) -> None: ...
    def drop(self) -> None: ...

    def use(self) -> bool:
        return True


class _Route:
    sandbox, local, policy, direct = "bench", True, "", True


class _Sandboxes:
    """There is one."""

    def route(self, label: str) -> _Route:
        return _Route()

    async def open(self, *_: Any, **__: Any) -> Any:
        raise GuestError("port_refused", "the service does not answer")

    async def way(self, *_: Any) -> _Way:
        return _Way()


def _until_closed(pipe: Connection) -> None:
    try:
        pipe.recv()
    except EOFError:
        pass


async def _load(port: int, service: int, clients: int, seconds: float, requests: int) -> tuple[list[float], float, int]:
    """The times of all requests, how long it took altogether, failures."""
    loop = asyncio.get_running_loop()
    request = REQUEST % service
    times: list[float] = []
    counter = [0]
    began = time.perf_counter()
    made = [await loop.create_connection(lambda: _Client(request, times, counter), "127.0.0.1", port) for _ in range(clients)]
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


def _held(pid: int) -> tuple[int, int, float]:
    """Resident KiB and descriptors, once the ends of connections have come through; seconds of processor time so far."""
    descriptors: list[int] = []
    for _ in range(10):
        descriptors.append(len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.05)
    return resident(pid), min(descriptors), processor(pid)


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
        started.append(_start(context, _proxy))
        (_, _, service), (process, _, port) = started
        asyncio.run(_load(port, service, clients, 0.5, 0))
        before = _held(process.pid)
        times, took, failed = asyncio.run(_load(port, service, clients, seconds, requests))
        after = _held(process.pid)
        direct, took_direct, _ = asyncio.run(_load(service, service, clients, min(seconds, 3.0), 0))
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
    before: tuple[int, int, float],
    after: tuple[int, int, float],
) -> Report:
    rate, without = len(times) / took, len(direct) / took_direct
    more = {
        "clients": clients,
        "requests_per_second": round(rate),
        "direct_per_second": round(without),
        "processor_us_per_request": round(1e6 * (after[2] - before[2]) / max(1, len(times)), 1),
        "resident_kib": {"before": before[0], "after": after[0]},
        "descriptors": {"before": before[1], "after": after[1]},
    }
    return Report("proxy", times, ["a connection was lost"] * failed, {"of the direct rate": rate / without}, more)
