"""Processes for many clients, over the real agent as a program of this host: offsets, rewinding, slow readers, lost connections."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from guest_host import LossyProxy, running_agent
from stoker.api.models import OutputMode, StartProcess, Terminal
from stoker.engine.feed import NOW, Client
from stoker.engine.hub import Hub, Started
from stoker.errors import Conflict, GuestError, InvalidRequest, NotFound
from stoker.guest.agent import Agent
from stoker.guest.channel import connect

pytestmark = pytest.mark.anyio
MIB = 1 << 20


class Kept:
    """What a hub tells and keeps."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self.rows: dict[int, Started] = {}

    def tell(self, kind: str, **data: object) -> None:
        self.events.append((kind, data))

    def keep(self, number: int, started: Started | None) -> None:
        if started is None:
            self.rows.pop(number, None)
        else:
            self.rows[number] = started


@asynccontextmanager
async def hub_on(path: Path, kept: Kept | None = None, *, fresh: bool = True) -> AsyncIterator[tuple[Hub, Agent]]:
    kept = kept or Kept()
    while True:
        try:
            agent = await connect(path, fresh=fresh, timeout=10)
            break
        except GuestError:
            # The socket is bound a moment before it listens.
            await asyncio.sleep(0.01)
    hub = Hub("box", kept.tell, kept.keep)
    try:
        yield hub, agent
    finally:
        await hub.close(GuestError("over", "the test is over"))
        await agent.aclose()


@pytest.fixture
async def path(short_dir: Path) -> AsyncIterator[Path]:
    socket = short_dir / "agent.sock"
    async with running_agent(socket):
        yield socket


def sh(script: str, **values: object) -> StartProcess:
    return StartProcess(argv=["sh", "-c", script], **values)  # type: ignore[arg-type]


async def read_all(client: Client, stream: int = 1) -> bytes:
    """Everything of one stream, checking that the offsets have no gap."""
    data = bytearray()
    start: int | None = None
    async with asyncio.timeout(20):
        while (piece := await client.read()) is not None:
            assert len(piece.data) <= 256 << 10
            if piece.stream == stream:
                start = piece.offset if start is None else start
                assert piece.offset == start + len(data), "a gap"
                data += piece.data
    return bytes(data)


async def test_open_gives_everything_and_the_end(path: Path) -> None:
    async with hub_on(path) as (hub, agent):
        client = await hub.open(agent, sh("echo out; echo err >&2; exit 3"))
        pieces = []
        while (piece := await client.read()) is not None:
            pieces.append((piece.stream, piece.offset, piece.data))
        assert sorted(pieces) == [(1, 0, b"out\n"), (2, 0, b"err\n")]
        ended = await client.wait()
        assert (ended.exit_code, ended.running, ended.stdout_bytes, ended.stderr_bytes) == (3, False, 4, 4)
        await client.aclose()


async def test_one_megabyte_through_block_mode(path: Path) -> None:
    script = "head -c 8388608 /dev/zero | tr '\\0' x"
    async with hub_on(path) as (hub, agent):
        client = await hub.open(agent, sh(script, mode=OutputMode.BLOCK))
        data = await read_all(client)
        assert data == b"x" * (8 * MIB)
        await client.aclose()


async def test_attach_again_from_any_offset(path: Path) -> None:
    async with hub_on(path) as (hub, agent):
        info = await hub.start(agent, sh("seq 1 20000"))
        expected = "".join(f"{n}\n" for n in range(1, 20001)).encode()
        for start in (None, 0, 5, 60000, len(expected)):
            client = await hub.attach(info.id, start, start)
            assert await read_all(client) == expected[start or 0 :]
            ended = await client.wait()
            assert ended.exit_code == 0 and ended.stdout_bytes == len(expected)
            await client.aclose()


async def test_many_clients_see_the_same(path: Path) -> None:
    script = "for i in $(seq 1 200); do echo line $i; done; sleep 0.3; for i in $(seq 201 400); do echo line $i; done"
    expected = "".join(f"line {n}\n" for n in range(1, 401)).encode()
    async with hub_on(path) as (hub, agent):
        info = await hub.start(agent, sh(script))

        async def look(delay: float, start: int | None) -> bytes:
            await asyncio.sleep(delay)
            client = await hub.attach(info.id, start, None)
            try:
                return await read_all(client)
            finally:
                await client.aclose()

        seen = await asyncio.gather(*(look(n * 0.05, None if n % 2 else 7) for n in range(10)))
        assert [hashlib.sha256(data).digest() for data in seen] == [
            hashlib.sha256(expected if n % 2 else expected[7:]).digest() for n in range(10)
        ]


async def test_from_now_on(path: Path) -> None:
    async with hub_on(path) as (hub, agent):
        info = await hub.start(agent, sh("echo before; read line; echo after $line", stdin=True))
        await asyncio.sleep(0.2)
        first = await hub.attach(info.id, NOW, NOW)
        assert first.stdout == 7
        second = await hub.attach(info.id, None, None)
        third = await hub.attach(info.id, NOW, NOW)
        await hub.write(info.id, b"now\n", close=True)
        assert await read_all(first) == b"after now\n"
        assert await read_all(second) == b"before\nafter now\n"
        assert await read_all(third) == b"after now\n"
        for client in (first, second, third):
            await client.aclose()


async def test_the_slowest_holds_a_blocking_process_back(path: Path) -> None:
    script = "for i in 1 2 3 4 5 6 7 8; do head -c 1048576 /dev/zero; done; echo done >&2"
    async with hub_on(path) as (hub, agent):
        info = await hub.start(agent, sh(script, mode=OutputMode.BLOCK))
        slow, fast = await hub.attach(info.id, 0, 0), await hub.attach(info.id, 0, 0)

        async def slowly() -> int:
            size = 0
            while (piece := await slow.read()) is not None:
                size += len(piece.data) if piece.stream == 1 else 0
                await asyncio.sleep(0.001)
            return size

        quick, late = await asyncio.gather(read_all(fast), slowly())
        assert len(quick) == late == 8 * MIB
        await slow.aclose()
        await fast.aclose()


async def test_one_that_never_reads_holds_nobody_back_in_discard_mode(path: Path) -> None:
    script = "for i in 1 2 3 4 5 6 7 8; do head -c 262144 /dev/zero; sleep 0.05; done"
    async with hub_on(path) as (hub, agent):
        info = await hub.start(agent, sh(script))
        stuck, fast = await hub.attach(info.id, 0, 0), await hub.attach(info.id, 0, 0)
        assert len(await read_all(fast)) == 2 * MIB
        # What it did not read is in its queue and in the ring, up to the ring's megabyte; the rest is a gap in its offsets.
        total, last = 0, 0
        while (piece := await stuck.read()) is not None:
            assert piece.offset >= last
            total, last = total + len(piece.data), piece.offset + len(piece.data)
        assert last == 2 * MIB and MIB <= total <= 2 * MIB
        await stuck.aclose()
        await fast.aclose()


async def test_nobody_looks_on_and_the_ring_keeps_the_last(path: Path) -> None:
    async with hub_on(path) as (hub, agent):
        info = await hub.start(agent, sh("head -c 3000000 /dev/zero | tr '\\0' a; echo the end", ring=64 << 10))
        await asyncio.sleep(0.5)
        now = await hub.get(agent, info.id)
        assert not now.running and now.stdout_bytes == 3000008
        client = await hub.attach(info.id, 0, 0)
        assert client.stdout == 3000008 - (64 << 10)
        data = await read_all(client)
        assert len(data) == 64 << 10 and data.endswith(b"the end\n")
        await client.aclose()


async def test_tags_signals_stdin_and_the_unknown(path: Path) -> None:
    kept = Kept()
    async with hub_on(path, kept) as (hub, agent):
        info = await hub.start(agent, sh("sleep 100", tag="job"))
        assert hub.find("job").started.id == info.id
        with pytest.raises(Conflict):
            await hub.write("job", b"x", close=False)
        await hub.signal("job", 15, group=True)
        client = await hub.attach("job", None, None)
        assert await client.read() is None
        ended = await client.wait()
        assert ended.signal == 15 and ended.exit_code is None
        with pytest.raises(Conflict) as caught:
            await hub.signal("job", 15, group=True)
        assert caught.value.code == "process_ended"
        for which in (999, "nobody"):
            with pytest.raises(NotFound):
                hub.find(which)
        await client.aclose()
        hub.forget("job")
        assert await hub.list(agent, None) == []
        assert [kind for kind, _ in kept.events] == ["process.started", "process.ended"]
        assert kept.rows == {}


async def test_a_timeout_kills_the_group(path: Path) -> None:
    async with hub_on(path) as (hub, agent):
        client = await hub.open(agent, sh("sleep 100 & sleep 100; wait", timeout=0.3))
        async with asyncio.timeout(5):
            assert await client.read() is None
            ended = await client.wait()
        assert ended.timed_out and ended.signal == 9
        await client.aclose()


async def test_a_terminal(path: Path) -> None:
    async with hub_on(path) as (hub, agent):
        client = await hub.open(agent, sh("stty size; read x; stty size", terminal=Terminal(rows=30, cols=100)))
        data = b""
        while b"30 100" not in data:
            piece = await client.read()
            assert piece is not None
            data += piece.data
        await client.resize(50, 120)
        await client.write(b"\n")
        assert b"50 120" in await read_all(client)
        await client.aclose()


async def test_bad_limits_are_named(path: Path) -> None:
    async with hub_on(path) as (hub, agent):
        with pytest.raises(InvalidRequest) as caught:
            await hub.start(agent, sh("true", rlimits={"BOGUS": (1, 1)}))
        assert "NOFILE" in caught.value.hint
        client = await hub.open(agent, sh("ulimit -n; ulimit -t", rlimits={"NOFILE": (64, 128), "CPU": (-1, -1)}))
        assert await read_all(client) == b"64\nunlimited\n"
        await client.aclose()


async def test_ended_ones_are_forgotten_in_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.engine.hub.ENDED_KEPT", 3)
    async with hub_on(path) as (hub, agent):
        for _ in range(8):
            client = await hub.open(agent, sh("true"))
            await client.wait()
            await client.aclose()
        await asyncio.sleep(0.05)
        assert len(await hub.list(agent, None)) <= 4
        assert len(await agent.processes()) <= 4


async def test_another_connection_finds_everything(path: Path) -> None:
    """What a new daemon does: other hub, other connection, the rows of the first."""
    kept = Kept()
    async with hub_on(path, kept) as (hub, agent):
        info = await hub.start(agent, sh("echo one; sleep 0.7; echo two; sleep 100", tag="job"))
        ended = await hub.start(agent, sh("echo gone; exit 7"))
        looking = await hub.attach(info.id, None, None)
        await (await hub.attach(ended.id, None, None)).wait()
        assert (await looking.read()) is not None
    async with hub_on(path, kept, fresh=False) as (hub, agent):
        await hub.adopt(agent, kept.rows)
        again = {process.id: process for process in await hub.list(agent, None)}
        assert again[info.id].running and again[info.id].argv == info.argv and again[info.id].tag == "job"
        assert again[ended.id].exit_code == 7 and not again[ended.id].running
        client = await hub.attach("job", None, None)
        data = b""
        while b"two" not in data:
            piece = await client.read()
            assert piece is not None
            data += piece.data
        assert data == b"one\ntwo\n"
        await client.aclose()
        await hub.signal("job", 9, group=True)


@pytest.mark.parametrize("keep", [True, False])
async def test_a_lost_connection_loses_nothing(short_dir: Path, keep: bool) -> None:
    """The proxy cuts the connection again and again; block-mode output and stdin arrive whole and once."""
    async with running_agent(short_dir / "a.sock"):
        proxy = LossyProxy(short_dir / "p.sock", short_dir / "a.sock", keep=keep, seed=5)
        async with proxy.running():
            kept = Kept()
            hub = Hub("box", kept.tell, kept.keep)
            agent = await connect(short_dir / "p.sock", fresh=not keep, timeout=10)
            stop = asyncio.Event()

            async def follow() -> None:
                nonlocal agent
                while not stop.is_set():
                    await agent.wait_closed()
                    if stop.is_set():
                        return
                    while True:
                        try:
                            if proxy.budget is not None:
                                proxy.budget = proxy.random.randint(60_000, 900_000)
                            agent = await connect(short_dir / "p.sock", fresh=False, timeout=5)
                            await hub.resynchronise(agent)
                            break
                        except GuestError:
                            await asyncio.sleep(0.01)

            following = asyncio.create_task(follow())
            client = await hub.open(agent, sh("cat", stdin=True, mode=OutputMode.BLOCK))
            quiet = await hub.start(agent, sh("sleep 0.5; exit 5"))
            proxy.budget = 200_000
            payload = hashlib.shake_128(b"seed").digest(3 * MIB)

            async def feed() -> None:
                for start in range(0, len(payload), 30000):
                    await client.write(payload[start : start + 30000])
                await client.close_stdin()

            feeding = asyncio.create_task(feed())
            data = await read_all(client)
            await feeding
            assert data == payload and proxy.cuts > 2
            proxy.budget = None
            async with asyncio.timeout(10):
                while hub.find(quiet.id).process.status is None:
                    await asyncio.sleep(0.05)
            assert hub.find(quiet.id).info.exit_code == 5
            stop.set()
            await agent.aclose()
            await following
            await hub.close(GuestError("over", "over"))
