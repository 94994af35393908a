"""The proxy to machines with a slot: by their own address where it can be, by their agent where it cannot.

A "machine" is a namespace behind a real slot, with the real agent in it; the proxy runs in the namespace that is the host.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine_door import Door
from guest_host import running_agent
from network_world import Guest, World, world
from stoker.engine import lines as engine_lines
from stoker.engine.lines import Connections, Way
from stoker.errors import GuestError
from stoker.guest.channel import connect
from stoker.host.nftables import Nftables
from stoker.network.egress import NONE
from stoker.server.proxy import direct
from stoker.server.proxy.router import Router
from stoker.server.proxy.service import Proxy

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
KINDS = pytest.mark.parametrize("kind", ["run", "ns"])
PORT = 8000


@pytest.fixture
def made() -> Iterator[World]:
    with world() as one:
        yield one


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy host, too, the address answers in time."""
    monkeypatch.setattr(direct, "PATIENCE", 8.0)


class Counting(Connections):
    """How often each way was gone."""

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        self.ways = self.opened = 0

    async def way(self, *arguments: Any) -> Way | None:
        self.ways += 1
        return await super().way(*arguments)

    async def open(self, *arguments: Any, **more: Any) -> Any:
        self.opened += 1
        return await super().open(*arguments, **more)


class Running:
    """A proxy, and the machine ``web``."""

    def __init__(self, guest: Guest, core: Door, door: Counting, port: int) -> None:
        self.guest, self.core, self.door, self.port = guest, core, door, port
        self.lines = core.live.hub.lines
        self.held: list[asyncio.Event] = []
        """Set when a request that asks for it is let go on."""
        self.ends = 0

    @asynccontextmanager
    async def serving(self, address: str) -> AsyncIterator[None]:
        """A service of the machine's that answers with who asked it."""
        sock = self.guest.run(lambda: socket.create_server((address, PORT)))
        server = await asyncio.start_server(self._answer, sock=sock)
        try:
            yield
        finally:
            server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")[0].encode()
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"upgrade" in head:
                    writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" + peer)
                    await reader.read()
                    return
                if b"/held" in head:
                    self.held.append(go_on := asyncio.Event())
                    await go_on.wait()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(peer), peer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.ends += 1
            writer.close()

    async def ask(self, path: str = "/", *more: str) -> str:
        """The status, and what is said."""
        lines = "".join(
            f"{line}\r\n" for line in (f"GET {path} HTTP/1.1", f"Host: {PORT}-web.localhost", "Connection: close", *more)
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"{lines}\r\n".encode())
        async with asyncio.timeout(20):
            answer = (await reader.read()).decode()
        writer.close()
        _, _, body = answer.partition("\r\n\r\n")
        return f"{answer[9:12]} {body}"

    async def calm(self) -> None:
        """As before a pause, and after the resume: what rests is closed."""
        await self.lines.drain()
        self.lines.reopen()

    async def eventually(self, look: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not look():
                await asyncio.sleep(0.01)


def run(made: World, guest: Guest, short_dir: Path, body: Callable[[Running], Awaitable[None]]) -> None:
    """``body`` in an event loop of the world's host."""

    async def main() -> None:
        async with running_agent(short_dir / "a", guest.run), await connect(short_dir / "a", fresh=True, timeout=10) as agent:
            core = Door(agent, guest.slot.plan.id)
            door = Counting(core)
            router = Router(door, "localhost", b"")
            proxy = Proxy(router)
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                await proxy.begin(sock)
                running = Running(guest, core, door, sock.getsockname()[1])
                await body(running)
                await proxy.aclose()
            await running.eventually(lambda: not running.lines.all and not any(pool.count for pool in router.pools.values()))
            assert core.box.users == 0 and not agent.attached

    made.host.run(lambda: asyncio.run(main()))


@KINDS
def test_by_the_address(made: World, short_dir: Path, kind: str) -> None:
    guest = made.machine(kind, egress=NONE)

    async def body(r: Running) -> None:
        async with r.serving("0.0.0.0"):
            for _ in range(3):
                assert await r.ask() == f"200 {guest.slot.plan.host}"
            assert (r.door.ways, r.door.opened) == (1, 0), "the connection is kept"
            assert r.core.box.users == 0 and len(r.lines.all) == 1
            await r.calm()
            await r.eventually(lambda: r.ends == 1)
            assert await r.ask() == f"200 {guest.slot.plan.host}" and r.door.ways == 2

    run(made, guest, short_dir, body)


@KINDS
def test_what_only_localhost_reaches_goes_by_the_agent(
    made: World, short_dir: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = made.machine(kind)

    async def body(r: Running) -> None:
        assert (await r.ask()).startswith("502 ") and (r.door.ways, r.door.opened) == (1, 1)
        async with r.serving("127.0.0.1"):
            assert await r.ask() == "200 127.0.0.1" and r.door.ways == 2, "a refusal of both is not remembered"
            await r.calm()
            assert await r.ask() == "200 127.0.0.1" and (r.door.ways, r.door.opened) == (2, 3), "but this is"
            await r.calm()
        async with r.serving("0.0.0.0"):
            assert await r.ask() == "200 127.0.0.1"
            await r.calm()
            await asyncio.sleep(0.3)
            assert await r.ask() == f"200 {guest.slot.plan.host}", "for a while"

    monkeypatch.setattr(direct, "AGAIN", 0.3)
    run(made, guest, short_dir, body)


def test_a_firewall_of_the_machines_own(made: World, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It drops what comes by its interface, so that nobody says that nobody listens."""
    monkeypatch.setattr(direct, "PATIENCE", 0.2)
    guest = made.machine("ns")

    def close() -> None:
        with Nftables() as nft:
            nft.apply(
                [
                    "add table ip own",
                    "add chain ip own input { type filter hook input priority 0; }",
                    f"add rule ip own input iifname eth0 tcp dport {PORT} drop",
                ]
            )

    async def body(r: Running) -> None:
        async with r.serving("0.0.0.0"):
            assert await r.ask() == "200 127.0.0.1" and (r.door.ways, r.door.opened) == (1, 1)
            await r.calm()
            assert await r.ask() == "200 127.0.0.1" and r.door.ways == 1

    guest.run(close)
    run(made, guest, short_dir, body)


def test_what_is_to_outlive_a_pause_goes_by_the_agent(made: World, short_dir: Path) -> None:
    guest = made.machine("ns")

    async def body(r: Running) -> None:
        async with r.serving("0.0.0.0"):
            assert await r.ask("/", "Accept: application/json, text/event-stream") == "200 127.0.0.1"
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            writer.write(f"GET / HTTP/1.1\r\nHost: {PORT}-web.localhost\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n".encode())
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
            assert await reader.readexactly(9) == b"127.0.0.1" and r.door.ways == 0
            await r.calm()
            assert len(r.lines.all) == 1, "it goes on after a pause"
            writer.close()
            assert await r.ask() == f"200 {guest.slot.plan.host}"

    run(made, guest, short_dir, body)


def test_a_pause_waits_for_requests_and_then_cuts_them(made: World, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = made.machine("ns")

    async def body(r: Running) -> None:
        async with r.serving("0.0.0.0"):
            first = asyncio.create_task(r.ask("/held"))
            await r.eventually(lambda: len(r.held) == 1)
            pause = asyncio.create_task(r.lines.drain())
            await asyncio.sleep(0.1)
            late = asyncio.create_task(r.ask())
            await asyncio.sleep(0.1)
            assert not pause.done() and not first.done() and not late.done()
            r.held[0].set()
            assert await first == f"200 {guest.slot.plan.host}"
            await pause
            assert not r.lines.all and not late.done()
            r.lines.reopen()
            assert await late == f"200 {guest.slot.plan.host}"
            # One that takes longer is told so. (The connection is new, so nobody asks again by himself.)
            await r.calm()
            monkeypatch.setattr(engine_lines, "DRAIN", 0.2)
            second = asyncio.create_task(r.ask("/held"))
            await r.eventually(lambda: len(r.held) == 2)
            await r.calm()
            assert "paused_meanwhile" in (said := await second) and said.startswith("503 ")
            # Over one that was kept, it is asked again, which wakes the machine.
            assert await r.ask() == f"200 {guest.slot.plan.host}"
            third = asyncio.create_task(r.ask("/held"))
            await r.eventually(lambda: len(r.held) == 3)
            await r.calm()
            await r.eventually(lambda: len(r.held) == 4)
            r.held[3].set()
            assert await third == f"200 {guest.slot.plan.host}"

    run(made, guest, short_dir, body)


def test_a_machine_that_dies(made: World, short_dir: Path) -> None:
    guest = made.machine("ns")

    async def body(r: Running) -> None:
        async with r.serving("0.0.0.0"):
            asked = asyncio.create_task(r.ask("/held"))
            await r.eventually(lambda: len(r.held) == 1)
            r.lines.close(GuestError("machine_died", "the machine is gone"))
            assert "machine_died" in await asked
            r.held[0].set()
            await r.eventually(lambda: r.ends == 1)

    run(made, guest, short_dir, body)
