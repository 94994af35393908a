"""The client against the real agent, which runs on this host as an ordinary program."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from guest_host import LossyProxy, children, running_agent
from stoker.errors import CommandNotExecutable, CommandNotFound, Conflict, GuestError, InvalidRequest, NotFound, StokerError
from stoker.guest.agent import Agent, Process
from stoker.guest.channel import connect
from stoker.guest.messages import STDIN_WINDOW, ExecRequest

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
MIB = 1 << 20


@pytest.fixture
async def path(short_dir: Path) -> AsyncIterator[Path]:
    path = short_dir / "agent"
    async with running_agent(path):
        yield path


@pytest.fixture
async def agent(path: Path) -> AsyncIterator[Agent]:
    async with await connect(path, fresh=True, timeout=10) as agent:
        yield agent


def shell(script: str, *words: str) -> list[str]:
    return ["/bin/sh", "-c", script, "sh", *words]


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_command_its_outputs_and_its_code(agent: Agent) -> None:
    assert (agent.welcome.version, agent.welcome.generation) == (1, 1)
    done = await agent.run(ExecRequest(shell("echo out; echo err >&2; exit 7")))
    assert (done.status.code, done.status.signal, done.stdout, done.stderr) == (7, None, b"out\n", b"err\n")
    assert (done.status.out, done.status.err) == (4, 4)
    assert done.status.duration_us > 0
    assert agent.attached == []
    assert await agent.processes() == []


async def test_environment_directory_umask_and_arguments_that_are_not_text(agent: Agent, short_dir: Path) -> None:
    script = 'printf "%s|" "$@" "$A" "$B"; pwd; umask'
    odd = "\udcff\udcfe"
    done = await agent.run(
        ExecRequest(shell(script, odd, "caf\u00e9", ""), env={"A": b"\xfd", "B": "x=y"}, cwd=str(short_dir), umask=0o27)
    )
    assert done.stdout == b"\xff\xfe|caf\xc3\xa9||\xfd|x=y|" + os.fsencode(short_dir) + b"\n0027\n"


@pytest.mark.parametrize(
    ("request_", "family", "code"),
    [
        (ExecRequest(["/nonexistent"]), CommandNotFound, "no_such_command"),
        (ExecRequest(["nonexistent"]), CommandNotFound, "no_such_command"),
        (ExecRequest(["/etc/passwd"]), CommandNotExecutable, "not_executable"),
        (ExecRequest(["/etc"]), CommandNotExecutable, "not_executable"),
        (ExecRequest(["true"], cwd="/nonexistent"), InvalidRequest, "no_such_directory"),
        (ExecRequest(["true"], user="nobody-of-that-name"), InvalidRequest, "no_such_user"),
        (ExecRequest([]), InvalidRequest, "bad_request"),
        (ExecRequest(["true"], ring=5000), InvalidRequest, "bad_request"),
    ],
)
async def test_what_cannot_start(agent: Agent, request_: ExecRequest, family: type[StokerError], code: str) -> None:
    with pytest.raises(family) as info:
        await agent.exec(request_)
    assert (type(info.value), info.value.code) == (family, code)
    assert agent.attached == []


async def test_calls_about_nothing(agent: Agent) -> None:
    with pytest.raises(NotFound):
        await agent.attach(12345)
    process = await agent.exec(ExecRequest(["sleep", "100"]))
    with pytest.raises(InvalidRequest, match="running"):
        await process.forget()
    with pytest.raises(InvalidRequest):
        await process.resize(10, 10)
    with pytest.raises(InvalidRequest):
        await process.signal(99)
    await process.kill()
    assert (await process.wait()).signal == signal.SIGKILL
    await process.kill()
    await process.forget()
    with pytest.raises(NotFound):
        await process.forget()


async def test_signals_go_to_the_whole_group(agent: Agent) -> None:
    script = "trap 'echo term; exit 3' TERM; sleep 100 & echo ready; wait"
    process = await agent.exec(ExecRequest(shell(script)))
    assert await process.stdout.read() == b"ready\n"
    await process.signal(signal.SIGTERM)
    assert await process.stdout.read_all() == b"term\n"
    assert (await process.wait()).code == 3


async def test_stdin_and_stdout_64_mib_each_way_at_once(agent: Agent) -> None:
    process = await agent.exec(ExecRequest(["cat"], stdin=True))
    block = random.Random(1).randbytes(MIB)
    sent, received, most = hashlib.sha256(), hashlib.sha256(), 0

    async def feed() -> None:
        for i in range(64):
            data = i.to_bytes(4, "big") + block
            sent.update(data)
            await process.stdin.write(data)
            assert process.stdin.unacknowledged <= STDIN_WINDOW
        process.stdin.close()

    feeding = asyncio.create_task(feed())
    begin = time.perf_counter()
    async for data in process.stdout:
        received.update(data)
        most = max(most, process.stdout.buffered)
    await feeding
    print(f"cat: {64 / (time.perf_counter() - begin):.0f} MiB/s each way")
    assert received.digest() == sent.digest()
    assert process.stdout.offset == 64 * (MIB + 4)
    assert most <= MIB
    assert (await process.wait()).code == 0


async def test_input_with_the_call_and_input_larger_than_its_window(agent: Agent) -> None:
    for size in (0, 1, STDIN_WINDOW, STDIN_WINDOW + 1, 3 * MIB):
        data = os.urandom(size)
        done = await agent.run(ExecRequest(["cat"]), input=data)
        assert (done.stdout == data, done.out_size) == (True, size)


async def test_a_reader_that_waits_makes_the_process_wait(agent: Agent) -> None:
    process = await agent.exec(ExecRequest(shell("head -c 30000000 /dev/zero; echo done >&2"), ring=1 << 16), window=1 << 15)
    await until(lambda: process.stdout.buffered == 1 << 15)
    await asyncio.sleep(0.2)
    assert process.stdout.buffered == 1 << 15
    info = (await agent.processes())[0]
    assert info.running
    assert process.stderr.buffered == 0
    assert len(await process.stdout.read_all()) == 30_000_000
    assert await process.stderr.read_all() == b"done\n"


async def test_output_limits_keep_the_first_bytes_and_never_block(agent: Agent) -> None:
    done = await agent.run(ExecRequest(shell("seq 1 1000000; seq 1 9 >&2")), limit=10)
    assert (done.stdout, done.stderr) == (b"1\n2\n3\n4\n5\n", b"1\n2\n3\n4\n5\n")
    assert (done.out_size, done.err_size, done.status.code) == (6888896, 18, 0)


async def test_a_timeout_kills_the_group(agent: Agent) -> None:
    begin = time.monotonic()
    done = await agent.run(ExecRequest(shell("echo begun; sleep 100 | cat")), timeout=0.3)
    assert done.timed_out
    assert done.status.signal == signal.SIGKILL
    assert done.stdout == b"begun\n"
    assert time.monotonic() - begin < 5


async def test_a_process_that_does_not_read(agent: Agent) -> None:
    process = await agent.exec(ExecRequest(shell("exec <&-; echo closed; sleep 100"), stdin=True))
    assert await process.stdout.read() == b"closed\n"
    with pytest.raises(Conflict, match="does not read"):
        for _ in range(100):
            await process.stdin.write(bytes(100_000))
            await asyncio.sleep(0.01)
    await process.kill()
    done = await agent.run(ExecRequest(["head", "-c", "5"]), input=bytes(5 * MIB))
    assert done.stdout == bytes(5)


async def test_a_terminal(agent: Agent) -> None:
    script = "trap 'stty size' WINCH; stty size; tty; echo ready; while :; do sleep 0.05; done"
    process = await agent.exec(ExecRequest(shell(script), tty=True, rows=11, cols=33))
    text = b""

    async def see(words: bytes) -> None:
        nonlocal text
        async with asyncio.timeout(10):
            while words not in text:
                text += await process.stdout.read()

    await see(b"ready")
    assert text.startswith(b"11 33\r\n/dev/pts/")
    await process.resize(50, 120)
    await see(b"50 120\r\n")
    await process.stdin.write(b"\x03")
    status = await process.wait()
    assert status.signal == signal.SIGINT
    assert process.pty
    assert await process.stderr.read_all() == b""


async def test_the_end_of_a_terminals_input(agent: Agent) -> None:
    process = await agent.exec(ExecRequest(shell("stty -echo; echo ready; cat"), tty=True, stdin=True))
    assert await process.stdout.read() == b"ready\r\n"
    await process.stdin.write(b"line\n")
    process.stdin.close()
    assert await process.stdout.read_all() == b"line\r\n"
    assert (await process.wait()).code == 0


async def test_200_at_once_keep_their_streams_apart(agent: Agent) -> None:
    async def one(i: int) -> None:
        data = f"{i} ".encode() * 3000
        done = await agent.run(ExecRequest(shell("cat; echo $1 >&2", str(i))), input=data)
        assert done.stdout == data
        assert done.stderr == f"{i}\n".encode()

    begin = time.perf_counter()
    await asyncio.gather(*(one(i) for i in range(200)))
    print(f"200 commands: {time.perf_counter() - begin:.2f} s")
    assert await agent.processes() == []


async def test_200_streams_held_at_once_do_not_block_each_other(agent: Agent) -> None:
    """None of 199 is read, and the last one still runs at full speed."""
    held = [
        await agent.exec(ExecRequest(shell("head -c 200000 /dev/zero; sleep 0.1"), ring=1 << 14), window=1 << 13)
        for _ in range(199)
    ]
    done = await agent.run(ExecRequest(["head", "-c", "20000000", "/dev/zero"]))
    assert len(done.stdout) == 20_000_000
    assert all(process.stdout.buffered <= 1 << 13 for process in held)
    results = await asyncio.gather(*(process.communicate() for process in held))
    assert all(len(result.stdout) == 200_000 for result in results)


async def test_discard_shows_its_gaps(agent: Agent) -> None:
    """Numbers of eight bytes each: the offset says which one has to be there."""
    script = "seq 1000000 1999999"
    process = await agent.exec(ExecRequest(shell(script), mode="discard", ring=1 << 14), window=1 << 12)
    # Nobody reads, and it writes on all the same.
    await asyncio.sleep(1)
    total = 0
    while True:
        at, data = await process.stdout.read_at()
        if not data:
            break
        total += len(data)
        text = b"".join(b"%d\n" % (1_000_000 + n) for n in range(at // 8, (at + len(data)) // 8 + 1))
        assert data == text[at % 8 : at % 8 + len(data)]
    assert at == 8_000_000
    assert process.stdout.lost + total == 8_000_000
    assert process.stdout.lost > 7_000_000
    assert (await process.wait()).out == 8_000_000


async def test_detach_attach_and_the_ring_of_an_ended_process(path: Path) -> None:
    async with await connect(path, fresh=True, timeout=10) as agent:
        process = await agent.exec(ExecRequest(shell("seq 1 5; read x; seq 6 10; echo $x"), stdin=True, tag="job"))
        await until(lambda: process.stdout.received == 10)
        await process.stdin.write(b"word\n")
        await process.stdin.drain()  # what a connection that ends takes along is its owner's to send again
        await process.detach()
        id = process.id
    async with await connect(path, fresh=False, timeout=10) as agent:
        assert [(info.id, info.tag) for info in agent.welcome.processes] == [(id, "job")]
        process = await agent.attach(id)
        assert (process.tag, process.pid > 0) == ("job", True)
        assert await process.stdout.read_all() == b"1\n2\n3\n4\n5\n6\n7\n8\n9\n10\nword\n"
        assert (await process.wait()).code == 0
        tail = await agent.attach(id, out=8, err=0)
        assert await tail.stdout.read_at() == (8, b"5\n6\n7\n8\n9\n10\nword\n")
        assert (await tail.wait()).code == 0
        await tail.forget()
        assert await agent.new_id() > id


async def test_an_exec_repeated_after_a_lost_connection_starts_nothing_twice(path: Path, short_dir: Path) -> None:
    request = ExecRequest(shell(f"echo $$ >> {short_dir}/pids; cat"), id=77)
    async with await connect(path, fresh=True, timeout=10) as agent:
        first = await agent.exec(request, input=b"in")
    async with await connect(path, fresh=False, timeout=10) as agent:
        second = await agent.exec(request, input=b"in", again=True)
        assert second.pid == first.pid
        assert await second.stdout.read_all() == b"in"
        assert (await second.wait()).code == 0
    assert (short_dir / "pids").read_text() == f"{first.pid}\n"


async def survive(proxy: LossyProxy, process: Process, done: asyncio.Event, cut_after: tuple[int, int]) -> int:
    """Cuts the connection again and again at random points, until the process has ended; how often."""
    agent = process.agent
    while not done.is_set():
        proxy.budget = proxy.random.randint(*cut_after)
        ended = asyncio.create_task(done.wait())
        lost = asyncio.create_task(agent.wait_closed())
        await asyncio.wait({ended, lost}, return_when=asyncio.FIRST_COMPLETED)
        for task in (ended, lost):
            task.cancel()
        if done.is_set():
            break
        while True:
            # Connecting may be cut as well.
            proxy.budget = proxy.random.randint(60_000, 400_000)
            try:
                former, agent = agent, await connect(proxy.listen, fresh=False, timeout=10)
                await agent.take_over(former)
            except GuestError as e:
                assert e.code in ("agent_unreachable", "agent_lost"), e
                continue
            break
    proxy.budget = None
    await agent.aclose()
    return proxy.cuts


@pytest.mark.parametrize("keep", [True, False], ids=["port", "socket"])
@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_lost_or_repeated_however_the_connection_is_cut(
    path: Path, short_dir: Path, keep: bool, seed: int
) -> None:
    proxy = LossyProxy(short_dir / "proxy", path, keep=keep, seed=seed)
    async with proxy.running():
        agent = await connect(proxy.listen, fresh=False, timeout=10)
        process = await agent.exec(ExecRequest(shell("tee /dev/stderr"), stdin=True), persistent=True)
        block = random.Random(seed).randbytes(1_000_003)
        sent = hashlib.sha256()
        done = asyncio.Event()

        async def feed() -> None:
            for i in range(12):
                data = i.to_bytes(4, "big") + block
                sent.update(data)
                await process.stdin.write(data)
            process.stdin.close()

        async def take(stream: AsyncIterator[bytes]) -> bytes:
            received = hashlib.sha256()
            async for data in stream:
                received.update(data)
                if proxy.random.random() < 0.05:
                    await asyncio.sleep(0.001)
            return received.digest()

        async def whole() -> None:
            try:
                out, err, _ = await asyncio.gather(take(process.stdout), take(process.stderr), feed())
                assert out == sent.digest()
                assert err == sent.digest()
                assert (await process.wait()).code == 0
            finally:
                done.set()

        async with asyncio.timeout(100):
            cutting = asyncio.create_task(survive(proxy, process, done, (1, 2_000_000)))
            await whole()
            cuts = await cutting
    print(f"{cuts} cuts")
    assert cuts >= 5


async def test_a_second_connection_takes_the_place_of_the_first(path: Path) -> None:
    async with await connect(path, fresh=True, timeout=10) as first:
        process = await first.exec(ExecRequest(["cat"], stdin=True), persistent=True)
        await process.stdin.write(b"one")
        async with await connect(path, fresh=False, timeout=10) as second:
            assert (await first.wait_closed()).code == "agent_lost"
            assert second.welcome.generation == 2
            await second.take_over(first)
            await process.stdin.write(b"two")
            process.stdin.close()
            assert await process.stdout.read_all() == b"onetwo"


async def test_an_agent_that_dies_fails_everyone(short_dir: Path) -> None:
    path = short_dir / "agent"
    async with running_agent(path) as program, await connect(path, fresh=True, timeout=10) as agent:
        process = await agent.exec(ExecRequest(["sleep", "100"], stdin=True))
        left = children(program.pid)
        os.kill(program.pid, signal.SIGSTOP)
        with pytest.raises(GuestError, match="did not answer"):
            await agent.ping(timeout=0.1)
        waiting = asyncio.create_task(process.wait())
        await asyncio.sleep(0)
        await agent.aclose()
        with pytest.raises(GuestError, match="closed by this side"):
            await waiting
        with pytest.raises(GuestError) as info:
            await connect(path, fresh=False, timeout=0.3)
        assert info.value.code == "agent_unreachable"
        os.kill(program.pid, signal.SIGCONT)
        assert left == [process.pid]


async def test_info_ping_sync_and_the_agents_own_size(agent: Agent) -> None:
    info = await agent.info()
    assert info.memory.total > info.memory.available > 0
    assert info.uptime > 0
    assert info.cpu.cpus == os.cpu_count()
    assert 0 < info.agent.resident < 4 * MIB
    await agent.sync()
    await agent.ping()


async def test_ping_and_exec_cost_little(agent: Agent) -> None:
    """Bounds with room for a busy host; the figures themselves are printed."""
    pings = sorted([await agent.ping() for _ in range(500)])
    times = []
    for _ in range(100):
        begin = time.perf_counter()
        await agent.run(ExecRequest(["/bin/true"]))
        times.append(time.perf_counter() - begin)
    times.sort()
    print(f"ping p50 {pings[250] * 1e6:.0f} us, exec p50 {times[50] * 1e3:.2f} ms")


async def test_much_out_of_a_command(agent: Agent) -> None:
    best = 0.0
    for _ in range(3):
        process = await agent.exec(ExecRequest(["head", "-c", str(64 * MIB), "/dev/zero"]))
        begin = time.perf_counter()
        total = 0
        async for data in process.stdout:
            total += len(data)
        best = max(best, total / MIB / (time.perf_counter() - begin))
        assert total == 64 * MIB
    print(f"stdout: {best:.0f} MiB/s")
