"""The proxy with real guests: by the channel to one that has no network and a service that listens on localhost only; by its own
address to one that has a slot."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from crashing import ADMIN
from engine_fixtures import own_data
from engine_guests import make, opened, run
from network_world import Place
from stoker.api.models import ForkSandbox, NetworkMode, OutputMode, SandboxState, StartProcess, Timeout, TimeoutMode
from stoker.engine.lines import Way
from stoker.errors import GuestError
from stoker.network.plan import parse_slot
from stoker.server.proxy import direct
from stoker.server.proxy.direct import DirectBackend
from stoker.server.proxy.router import Router
from stoker.server.proxy.service import Proxy
from stoker.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]
SERVER = r"""
use IO::Socket::INET; $| = 1; $SIG{CHLD} = 'IGNORE';
my $s = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => 8000, Listen => 64, ReuseAddr => 1) or die;
print "ready\n";
while (1) {
    my $c = $s->accept or next;
    if (fork) { close $c; next }
    $c->autoflush(1);
    while (1) {
        my ($head, $length) = ('', 0);
        while (my $line = <$c>) { last if $line =~ /^\r?\n$/; $length = $1 if $line =~ /^content-length: (\d+)/i; $head .= $line }
        last if $head eq '';
        if ($head =~ /^upgrade/im) {
            print $c "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
            while (sysread($c, my $data, 65536)) { syswrite($c, uc $data) }
            open my $f, '>>', '/run/closed'; print $f "closed\n"; close $f;
            exit;
        }
        sleep 2 if $head =~ m{^GET /slow};
        my $body = ''; read($c, $body, $length) if $length;
        $body = "hello" unless $length;
        print $c "HTTP/1.1 200 OK\r\nContent-Length: ", length $body, "\r\n\r\n", $body;
    }
    exit;
}
"""


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str = "/", body: bytes = b"") -> tuple[int, bytes]:
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    writer.write(f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: 8000-box.localhost\r\n{length}\r\n".encode() + body)
    head = await reader.readuntil(b"\r\n\r\n")
    size = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    return int(head[9:12]), await reader.readexactly(size)


async def test_a_service_on_a_guests_localhost(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        await make(engine, name="box", timeout=Timeout(seconds=600, mode=TimeoutMode.IDLE))
        server = await engine.processes.open(ADMIN, "box", StartProcess(argv=["perl", "-e", SERVER], mode=OutputMode.BLOCK))
        piece = await server.read()
        assert piece is not None and piece.data == b"ready\n"
        proxy = Proxy(Router(engine.connections, "localhost", b""))
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            await proxy.begin(sock)
            port = sock.getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await ask(reader, writer) == (200, b"hello")
            began = time.perf_counter()
            for _ in range(100):
                assert await ask(reader, writer) == (200, b"hello")
            each = (time.perf_counter() - began) / 100
            big = bytes(range(256)) * 8192
            began = time.perf_counter()
            assert await ask(reader, writer, "/", big) == (200, big)
            print(f"a request takes {1000 * each:.2f} ms, 2 MiB there and back {time.perf_counter() - began:.2f} s")
            # Nobody there.
            with pytest.raises(GuestError) as refused:
                await engine.connections.open(ADMIN, "box", 81)
            assert refused.value.code == "port_refused"

            # A tunnel, and a pause while a request is answered: that is waited for, the tunnel goes on afterwards.
            down, up = await asyncio.open_connection("127.0.0.1", port)
            up.write(b"GET / HTTP/1.1\r\nHost: 8000-box.localhost\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
            assert (await down.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
            up.write(b"before")
            assert await down.readexactly(6) == b"BEFORE"
            slow = asyncio.create_task(ask(reader, writer, "/slow"))
            await asyncio.sleep(0.5)
            paused = await engine.pause(ADMIN, "box")
            assert paused.state is SandboxState.PAUSED and slow.done() and slow.result() == (200, b"hello")
            # A new request waits for the machine, which it wakes.
            assert await ask(reader, writer) == (200, b"hello")
            assert (await engine.get(ADMIN, "box")).state is SandboxState.RUNNING
            up.write(b"after")
            assert await down.readexactly(5) == b"AFTER"
            # So does a tunnel that is written to.
            await engine.pause(ADMIN, "box")
            up.write(big)
            assert await down.readexactly(len(big)) == big.upper()

            # A copy has none of its original's connections: its end of them is closed.
            await engine.fork(ADMIN, "box", ForkSandbox(name="copy"))
            async with asyncio.timeout(60):
                while (await run(engine, "copy", "cat /run/closed"))[1] != b"closed\n":
                    await asyncio.sleep(0.2)
            assert (await run(engine, "box", "cat /run/closed"))[0] == 1
            up.write(b"still")
            assert await down.readexactly(5) == b"STILL"
            other, to_other = await asyncio.open_connection("127.0.0.1", port)
            to_other.write(b"GET / HTTP/1.1\r\nHost: 8000-copy.localhost\r\nConnection: close\r\n\r\n")
            assert (await other.read()).endswith(b"hello")
            to_other.close()
            # A machine that is stopped: why, and how to mend it.
            await engine.stop(ADMIN, "copy", grace=1.0)
            other, to_other = await asyncio.open_connection("127.0.0.1", port)
            to_other.write(b"GET / HTTP/1.1\r\nHost: 8000-copy.localhost\r\nConnection: close\r\n\r\n")
            answer = await other.read()
            assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after" in answer and b"stopped" in answer, answer
            up.write_eof()
            assert await down.read() == b""
            for w in (writer, up, to_other):
                w.close()
            await proxy.aclose()
        await server.aclose()
        assert all(not box.users for box in engine._core.boxes.values())


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_a_service_at_a_guests_own_address(settings: Settings, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "PATIENCE", 8.0)  # on a busy host, too, it answers in time
    with ExitStack() as stack:
        Place(stack).run(lambda: asyncio.run(_at_its_own_address(own_data(settings, short_dir))))


async def _at_its_own_address(own: Settings) -> None:
    async with opened(own) as engine:
        box = await make(engine, name="box", network=NetworkMode.NAT, egress="none")
        words = ["perl", "-e", SERVER.replace("127.0.0.1", "0.0.0.0")]
        server = await engine.processes.open(ADMIN, "box", StartProcess(argv=words, mode=OutputMode.BLOCK))
        piece = await server.read()
        assert piece is not None and piece.data == b"ready\n"
        router = Router(engine.connections, "localhost", b"")
        proxy = Proxy(router)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            await proxy.begin(sock)
            port = sock.getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            lines = engine._core.boxes[box.id].live.hub.lines  # type: ignore[union-attr]

            async def timed() -> float:
                began = time.perf_counter()
                for _ in range(200):
                    assert await ask(reader, writer) == (200, b"hello")
                return 1000 * (time.perf_counter() - began) / 200

            assert await ask(reader, writer) == (200, b"hello")
            (way,) = lines.all
            assert isinstance(way, Way) and way.address == str(parse_slot(engine._core.boxes[box.id].record.slot).address)
            directly = await timed()
            (pool,) = router.pools.values()
            assert isinstance(pool.backend, DirectBackend)
            router.sweep(float("inf"))
            pool.backend._channel_until = float("inf")
            by_channel = await timed()
            assert not any(isinstance(line, Way) for line in lines.all)
            pool.backend._channel_until = 0.0
            print(f"a request takes {directly:.2f} ms by the address, {by_channel:.2f} ms by the channel")

            # A tunnel goes on after a pause, in which the address is given back; the next request has the new one.
            down, up = await asyncio.open_connection("127.0.0.1", port)
            up.write(b"GET / HTTP/1.1\r\nHost: 8000-box.localhost\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
            assert (await down.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
            assert (await engine.pause(ADMIN, "box")).state is SandboxState.PAUSED
            assert await ask(reader, writer) == (200, b"hello")
            live = engine._core.boxes[box.id].live
            assert live is not None and any(isinstance(line, Way) for line in live.hub.lines.all)
            up.write(b"after")
            assert await down.readexactly(5) == b"AFTER"
            for w in (writer, up):
                w.close()
            await proxy.aclose()
        await server.aclose()
        assert all(not box.users for box in engine._core.boxes.values())
