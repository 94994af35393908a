"""Connections by the agent's channel, with the real agent: streams, losses, the engine's door, and the proxy on top."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine_door import Door
from guest_host import LossyProxy, running_agent
from stoker.api.models import Principal
from stoker.engine import lines as engine_lines
from stoker.engine.lines import Connections, Lines
from stoker.errors import Conflict, GuestError
from stoker.guest.agent import Agent
from stoker.guest.channel import connect
from stoker.guest.connections import inet, unix
from stoker.guest.messages import ExecRequest
from stoker.server.proxy.router import Router
from stoker.server.proxy.service import Proxy

pytestmark = pytest.mark.anyio
PIECE = os.urandom(1 << 20)


@asynccontextmanager
async def serving(handler: Any, **where: Any) -> AsyncIterator[int]:
    async def careful(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(careful, **(where or {"host": "127.0.0.1", "port": 0}))
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@asynccontextmanager
async def agent_on(path: Path) -> AsyncIterator[Agent]:
    async with running_agent(path), await connect(path, fresh=True, timeout=10) as agent:
        yield agent


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write(b"the end")
    await writer.drain()


async def test_both_directions_and_their_ends(short_dir: Path) -> None:
    async with agent_on(short_dir / "a") as agent, serving(echo) as port:
        connection = await agent.connect(inet(port))
        got = bytearray()

        async def read() -> None:
            while data := await connection.read():
                got.extend(data)

        reading = asyncio.create_task(read())
        for _ in range(4):
            await connection.write(PIECE)
        connection.close_write()
        await reading
        assert bytes(got) == PIECE * 4 + b"the end"
        await connection.process.wait()
        assert connection.ended
        connection.abort()
        connection.abort()
        assert not agent.attached
        with pytest.raises(Conflict):
            await connection.write(b"more")


async def test_why_not(short_dir: Path) -> None:
    async with agent_on(short_dir / "a") as agent:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            with pytest.raises(GuestError) as refused:
                await agent.connect(inet(port))
            assert refused.value.code == "unreachable" and refused.value.details == {"errno": errno.ECONNREFUSED}
            probe.listen(0)
            # Its queue is full: nobody answers.
            full = [await asyncio.open_connection("127.0.0.1", port)]
            with pytest.raises(GuestError) as late:
                for _ in range(4):
                    await agent.connect(inet(port), timeout=0.3)
            assert late.value.code == "connect_timeout"
            for _, writer in full:
                writer.close()
        with pytest.raises(GuestError) as missing:
            await agent.connect(unix(str(short_dir / "nothing")))
        assert missing.value.details == {"errno": errno.ENOENT}
        with pytest.raises(ValueError):
            unix("x" * 200)


async def test_a_reset_is_told(short_dir: Path) -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    async with agent_on(short_dir / "a") as agent, serving(reset) as port:
        connection = await agent.connect(inet(port))
        await connection.write(b"x")
        with pytest.raises(GuestError) as broken:
            while await connection.read():
                pass
        assert broken.value.code == "connection_reset"
        connection.abort()


@pytest.mark.parametrize("keep", [True, False])
async def test_losses_lose_nothing(short_dir: Path, keep: bool) -> None:
    """The channel is cut again and again while megabytes go both ways; each time a new agent takes the connections over."""
    lossy = LossyProxy(short_dir / "p", short_dir / "a", keep=keep, seed=7)
    lines = Lines()
    async with running_agent(short_dir / "a"), lossy.running(), serving(echo) as port:
        agent = await connect(lossy.listen, fresh=False, timeout=10)
        core, box = Door(agent), SimpleNamespace(users=0, touch=lambda: None)
        line = engine_lines.Line(core, box, lines, await agent.connect(inet(port), persistent=True), brief=False)  # type: ignore[arg-type]
        got = bytearray()

        async def read() -> None:
            while data := await line.read():
                got.extend(data)

        async def write() -> None:
            for _ in range(6):
                await line.write(PIECE)
            line.close_write()

        tasks = [asyncio.create_task(read()), asyncio.create_task(write())]
        for _ in range(8):
            lossy.budget = lossy.random.randrange(1, 1_500_000)
            waiting = asyncio.ensure_future(agent.wait_closed())
            done, _ = await asyncio.wait({waiting, tasks[0]}, return_when=asyncio.FIRST_COMPLETED)
            if waiting not in done:
                waiting.cancel()
                break
            lossy.budget = None
            agent = await connect(lossy.listen, fresh=False, timeout=10)
            await lines.resynchronise(agent)
        lossy.budget = None
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks)
        assert lossy.cuts >= 4
        assert bytes(got) == PIECE * 6 + b"the end"
        line.drop()
        assert not box.users and not lines.all
        await agent.aclose()


async def test_the_door(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_lines, "DRAIN", 0.3)
    async with agent_on(short_dir / "a") as agent, serving(echo, host="::1", port=0) as port:
        core = Door(agent)
        door, lines, box = Connections(core), core.live.hub.lines, core.box  # type: ignore[arg-type]
        assert door.route("web") == door.route("sb-1") and door.route("nobody") is None
        # Nobody listens on 127.0.0.1: ::1 is tried.
        brief = await door.open(Principal(), "web", port, brief=True)
        lasting = await door.open(Principal(), "web", port)
        resting = await door.open(Principal(), "web", port, brief=True)
        resting.rest()
        assert box.users == 2
        assert resting.use() and box.users == 3
        resting.rest()
        with pytest.raises(GuestError) as refused:
            await door.open(Principal(), "web", port, address="127.0.0.1")
        assert refused.value.code == "port_refused"
        # A pause closes what rests, waits for what is brief, and lets nobody in.
        draining = asyncio.create_task(lines.drain())
        await asyncio.sleep(0)
        assert resting.ended and not brief.ended and not brief.connection.process.error
        assert not resting.use()
        before = core.woken
        late = asyncio.create_task(door.open(Principal(), "web", port))
        await asyncio.sleep(0.05)
        assert not late.done() and not draining.done()
        brief.rest()  # into a pool: it is closed, as those that lay there
        assert brief.ended
        async with asyncio.timeout(0.2):
            await draining
        lines.reopen()
        another = await late
        assert core.woken == before + 2  # it was asked for once more: the first machine may be gone
        # One that does not end holds up no pause for ever.
        stays = await door.open(Principal(), "web", port, brief=True)
        await lines.drain()
        assert not stays.ended
        lines.reopen()
        lines.close(GuestError("machine_died", "gone"))
        with pytest.raises(GuestError, match="gone"):
            await another.read()
        for line in (brief, lasting, resting, another, stays):
            line.drop()
        assert not box.users


async def test_the_proxy_by_the_channel(short_dir: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"PUT"):
                # It has seen enough, and says so.
                writer.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nno.")
                writer.get_extra_info("socket").shutdown(socket.SHUT_RD)
                await writer.drain()
                return
            if b"upgrade" in head:
                writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
                await echo(reader, writer)
                return
            size = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0)
            body = await reader.readexactly(size)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
            await writer.drain()

    connections = 0
    async with agent_on(short_dir / "a") as agent, serving(answer) as port:
        core = Door(agent)
        router = Router(Connections(core), "localhost", b"")  # type: ignore[arg-type]
        proxy = Proxy(router)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            await proxy.begin(sock)
            reader, writer = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])
            host = b"Host: %d-web.localhost\r\n" % port
            for size in (0, 10, 3 << 20):
                writer.write(b"POST / HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n" % (host, size) + bytes(size))
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                assert await reader.readexactly(size) == bytes(size)
            assert connections == 1 and core.box.users == 0
            enough, to_enough = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])
            to_enough.write(b"PUT / HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n" % (host, 64 << 20) + bytes(1 << 20))
            assert (await enough.readuntil(b"no.")).startswith(b"HTTP/1.1 413")
            assert await enough.read() == b""
            to_enough.close()
            writer.write(b"GET / HTTP/1.1\r\n%bConnection: upgrade\r\nUpgrade: echo\r\n\r\n" % host)
            await reader.readuntil(b"\r\n\r\n")
            (line,) = core.live.hub.lines.all
            assert core.box.users == 1 and not line.brief
            writer.write(PIECE)
            assert await reader.readexactly(len(PIECE)) == PIECE
            writer.write_eof()
            assert await reader.read() == b"the end"
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])
            writer.write(b"GET / HTTP/1.1\r\nHost: 1-web.localhost\r\nConnection: close\r\n\r\n")
            answer_ = await reader.read()
            assert b" 502 " in answer_ and b"nothing listens on port 1 of web" in answer_
            writer.close()
            await proxy.aclose()
        for _ in range(100):
            if not core.live.hub.lines.all:
                break
            await asyncio.sleep(0.01)
        assert not core.live.hub.lines.all and not core.box.users and not agent.attached


async def test_forgotten_in_the_round_that_something_came_for_it(short_dir: Path) -> None:
    """What was dropped is not worked on once more: it would be remembered as ended, and then freed."""
    async with serving(echo) as port, agent_on(short_dir / "agent") as agent:
        for _ in range(1200):  # more than it remembers of what has ended
            connection = await agent.connect(inet(port))
            with agent.link.batch():
                connection.process.stdin.write_now(b"x")
                connection.abort()
        assert (await agent.run(ExecRequest(["/bin/echo", "still there"]))).stdout == b"still there\n"
        assert await agent.processes() == []
