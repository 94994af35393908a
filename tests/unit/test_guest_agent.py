"""The connection and its calls against a scripted peer: refusals, lies, silence and lost connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guest_peer import WELCOME, Peer, listening, peered
from stoker.errors import (
    CommandNotExecutable,
    CommandNotFound,
    Conflict,
    GuestError,
    InvalidRequest,
    NotFound,
    StokerError,
    TooLarge,
)
from stoker.guest import frames
from stoker.guest import messages as m
from stoker.guest.agent import Agent
from stoker.guest.channel import connect
from stoker.guest.frames import DATA, EOF, ZEROS
from stoker.guest.messages import Configuration, ExecRequest, ExitStatus

pytestmark = pytest.mark.anyio
EXIT = {"code": 0, "signal": None, "core": False, "out": 0, "err": 0, "user_us": 1, "sys_us": 1, "max_rss_kb": 1, "duration_us": 1}


@pytest.fixture
def path(short_dir: Path) -> Path:
    return short_dir / "agent"


async def test_connect_greets_and_leaves_zeros_out_on_a_fresh_machine(path: Path) -> None:
    seen: list[Any] = []

    async def script(peer: Peer) -> None:
        seen.append(
            await peer.synchronise(
                {**WELCOME, "processes": [{"id": 9, "pid": 4, "tag": "x", "running": True, "pty": False, "new": 1}]}
            )
        )
        seen.append(peer.nonce_at)
        await peer.reader.read()

    async with listening(path, script, script):
        for fresh in (True, False):
            async with await connect(path, fresh=fresh, timeout=5) as agent:
                assert agent.welcome.agent == "peer 1"
                assert agent.welcome.processes[0].id == 9
                assert await agent.new_id() > 9
    assert seen[0] == {"min": 1, "max": 1, "host": "stoker"}
    assert seen[1] == 0
    assert seen[3] == ZEROS


async def test_everything_before_the_own_nonce_is_dropped(path: Path) -> None:
    stale = frames.preamble(os.urandom(16)) + frames.encode(DATA, 5, 0, b"old") + os.urandom(70_000)

    async def script(peer: Peer) -> None:
        await peer.synchronise(WELCOME, before=stale)
        await peer.reader.read()

    async with listening(path, script):
        async with await connect(path, fresh=True, timeout=5) as agent:
            assert agent.welcome.version == 1


async def test_nobody_there(path: Path) -> None:
    for directory in (path, path.parent / ("x" * 60) / ("y" * 60) / "agent"):
        with pytest.raises(GuestError, match="does not answer") as info:
            await connect(directory, fresh=True, timeout=5)
        assert info.value.code == "agent_unreachable"


async def test_a_path_too_long_for_a_socket_address(path: Path) -> None:
    long = path.parent / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    short = path.parent / "s"
    short.symlink_to(long)

    async def script(peer: Peer) -> None:
        await peer.synchronise(WELCOME)
        await peer.reader.read()

    async with listening(short / "agent", script):
        async with await connect(long / "agent", fresh=True, timeout=5) as agent:
            assert agent.welcome.version == 1


async def test_silence_and_hanging_up_are_unreachable(path: Path) -> None:
    async def silent(peer: Peer) -> None:
        await peer.reader.read()

    async def hangs_up(peer: Peer) -> None:
        await peer.synchronise()

    async with listening(path, silent, hangs_up):
        for timeout in (0.1, 5.0):
            with pytest.raises(GuestError) as info:
                await connect(path, fresh=True, timeout=timeout)
            assert info.value.code == "agent_unreachable"


@pytest.mark.parametrize(
    ("welcome", "code"),
    [
        ({**WELCOME, "version": 0}, "agent_too_old"),
        ({**WELCOME, "version": 7}, "protocol_error"),
        ({**WELCOME, "version": "1"}, "protocol_error"),
        ({**WELCOME, "generation": -1}, "protocol_error"),
        ({**WELCOME, "processes": [{"id": 0}]}, "protocol_error"),
        ({}, "protocol_error"),
    ],
)
async def test_bad_welcomes(path: Path, welcome: dict[str, Any], code: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.synchronise(welcome)
        await peer.reader.read()

    async with listening(path, script):
        with pytest.raises(GuestError) as info:
            await connect(path, fresh=True, timeout=5)
    assert info.value.code == code


@pytest.mark.parametrize(
    ("code", "family"),
    [
        ("no_such_command", CommandNotFound),
        ("not_executable", CommandNotExecutable),
        ("no_such_directory", InvalidRequest),
        ("no_such_user", InvalidRequest),
        ("no_such_group", InvalidRequest),
        ("bad_request", InvalidRequest),
        ("not_found", NotFound),
        ("exists", Conflict),
        ("io", GuestError),
        ("something_new", GuestError),
    ],
)
async def test_errors_have_their_families(path: Path, code: str, family: type[StokerError]) -> None:
    async def script(peer: Peer) -> None:
        number, arguments = await peer.call()
        assert arguments["m"] == "exec"
        peer.reply(number, {"error": {"code": code, "message": "no \x1b[31m\nluck", "errno": 2}})

    async with peered(path, script) as agent:
        with pytest.raises(family) as info:
            await agent.exec(ExecRequest(["nope"]))
        assert type(info.value) is family
        assert info.value.code == code
        assert info.value.details == {"errno": 2}
        assert info.value.message.isprintable()
        assert agent.attached == []
        assert not agent.closed.is_set()


async def test_a_whole_exec_in_one_breath(path: Path) -> None:
    """Reply, output, ends and exit in one write, as a quick command has them."""

    async def script(peer: Peer) -> None:
        number, arguments = await peer.call()
        id = arguments["id"]
        assert (await peer.next(DATA)).payload == b"in"
        assert (await peer.next(EOF)).offset == 2
        peer.reply(number, {"pid": 77, "started": 5})
        peer.send(DATA, id * 4 + 1, 0, b"out")
        peer.send(DATA, id * 4 + 2, 0, b"error")
        peer.send(EOF, id * 4 + 1, 3)
        peer.send(EOF, id * 4 + 2, 5)
        peer.event(id, "exit", **{**EXIT, "code": 3})
        number, arguments = await peer.call()
        assert arguments == {"m": "forget", "id": id}

    async with peered(path, script) as agent:
        done = await agent.run(ExecRequest(["x"]), input=b"in")
    assert (done.status.code, done.stdout, done.stderr, done.timed_out) == (3, b"out", b"error", False)


@pytest.mark.parametrize(
    "lie",
    [
        lambda peer, id: peer.send(DATA, id * 4 + 1, 5, b"gap"),
        lambda peer, id: (peer.send(DATA, id * 4 + 1, 0, b"one"), peer.send(DATA, id * 4 + 1, 2, b"again")),
        lambda peer, id: (peer.send(EOF, id * 4 + 1, 0), peer.send(DATA, id * 4 + 1, 0, b"after")),
        lambda peer, id: peer.send(EOF, id * 4 + 1, 10),
        lambda peer, id: [peer.send(DATA, id * 4 + 1, i << 16, bytes(1 << 16)) for i in range(18)],
        lambda peer, id: peer.send(frames.ACK, id * 4, 1),
        lambda peer, id: peer.send(frames.WELCOME, 0, 0, WELCOME),
        lambda peer, id: peer.event(id, "exit", **{**EXIT, "code": 999}),
        lambda peer, id: peer.event(id, "exit", **{**EXIT, "out": "many"}),
        lambda peer, id: peer.send(frames.EVENT, id, 0, b"\xc1"),
        lambda peer, id: peer.send(frames.EVENT, id, 0, b"\x91" * 60000 + b"\xc0"),
        lambda peer, id: peer.writer.write(os.urandom(100)),
    ],
)
async def test_lies_end_the_connection(path: Path, lie: Any) -> None:
    async def script(peer: Peer) -> None:
        number, arguments = await peer.call()
        peer.reply(number, {"pid": 77, "started": 5})
        lie(peer, arguments["id"])

    async with peered(path, script) as agent:
        process = await agent.exec(ExecRequest(["x"], stdin=True))
        async with asyncio.timeout(5):
            assert (await agent.wait_closed()).code == "protocol_error"
        for waiting in (process.wait(), process.stdin.write(b"x"), agent.ping()):
            with pytest.raises(GuestError) as info:
                await waiting
            assert info.value.code == "protocol_error"


async def test_silence_ends_a_call_and_a_late_reply_hurts_nobody(path: Path) -> None:
    async def script(peer: Peer) -> None:
        late, _ = await peer.call()
        ping = await peer.next(frames.PING)
        peer.send(frames.PONG, 0, 0, ping.payload)
        number, _ = await peer.call()
        peer.reply(late, {})
        peer.send(frames.PONG, 0, 0, b"never asked")
        peer.send(0x77, 3, 4, b"a type from the future")
        peer.reply(number, {"uptime_ms": 3000, "load": [50, 100, 2], "memory": {"total": 5, "available": 3}, "new": 4})

    async with peered(path, script) as agent:
        with pytest.raises(GuestError) as info:
            await agent.sync(timeout=0.05)
        assert info.value.code == "agent_timeout"
        assert 0 < await agent.ping() < 5
        info = await agent.info()
        assert (info.memory.total, info.uptime) == (5, 3.0)


async def test_a_lost_connection_fails_everyone_who_waits(path: Path) -> None:
    async def script(peer: Peer) -> None:
        number, _ = await peer.call()
        peer.reply(number, {"pid": 77, "started": 5})
        for _ in range(3):
            await peer.next()
        peer.writer.close()

    async with peered(path, script) as agent:
        process = await agent.exec(ExecRequest(["x"], stdin=True))
        results = await asyncio.gather(
            process.wait(),
            process.stdout.read(),
            agent.sync(),
            agent.ping(),
            process.stdin.write(b"x"),
            process.stdin.drain(),
            return_exceptions=True,
        )
        assert results[4] is None
        errors = [result for result in results if isinstance(result, GuestError)]
        assert [e.code for e in errors] == ["agent_lost"] * 5
        assert len({id(e) for e in errors}) == 5
        with pytest.raises(GuestError, match="closed"):
            await agent.exec(ExecRequest(["y"]))


@pytest.mark.parametrize("started", [True, False])
async def test_a_cancelled_exec_leaves_nothing(path: Path, started: bool) -> None:
    """Whether it had started already or never would: killed, forgotten, and no trace of it here."""
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        number, arguments = await peer.call()
        id = arguments["id"]
        asked.set()
        _, kill = await peer.call()
        assert kill == {"m": "signal", "id": id, "signal": 9, "group": True}
        if started:
            peer.reply(number, {"pid": 5, "started": 1})
            peer.send(DATA, id * 4 + 1, 0, b"nobody wants this")
            peer.send(EOF, id * 4 + 1, 17)
            peer.event(id, "exit", **{**EXIT, "code": None, "signal": 9})
            assert (await peer.call())[1] == {"m": "forget", "id": id}
        else:
            peer.reply(number, {"error": {"code": "no_such_command"}})
        number, _ = await peer.call()
        peer.reply(number, {})

    async with peered(path, script) as agent:
        task = asyncio.create_task(agent.exec(ExecRequest(["x"])))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            while agent.attached:
                await asyncio.sleep(0.005)
        await agent.sync()


async def test_configure_says_what_it_was_given(path: Path) -> None:
    seen: dict[str, Any] = {}

    async def script(peer: Peer) -> None:
        number, arguments = await peer.call()
        seen.update(arguments)
        peer.reply(number, {"pid1": True})

    async with peered(path, script) as agent:
        assert await agent.configure(
            Configuration(
                root=m.RootMount("/dev/vda", grow=True),
                hosts=[("::1", "me")],
                env={"A": b"\xff"},
                mounts=[m.Mount("vol-a", "/data", flags=["ro"], options="noload"), m.Mount("app", "/app", grow=True)],
            )
        )
    assert seen == {
        "m": "configure",
        "root": {"device": "/dev/vda", "grow": True},
        "hosts": [["::1", "me"]],
        "env": {"A": b"\xff"},
        "mounts": [
            {"serial": "vol-a", "path": "/data", "flags": ["ro"], "options": "noload"},
            {"serial": "app", "path": "/app", "grow": True},
        ],
    }


async def test_attach_twice_gives_the_streams_to_the_second(path: Path) -> None:
    async def script(peer: Peer) -> None:
        for _ in range(2):
            number, arguments = await peer.call()
            assert arguments == {"m": "attach", "id": 7, "out": None, "err": None}
            # On its way before the call was seen: the second attachment must not get it.
            peer.send(DATA, 29, 999, b"stale")
            peer.reply(number, {"id": 7, "pid": 3, "running": True, "stdin": 4, "out": 10, "err": 0})
            peer.send(DATA, 29, 6, b"tail")

    async with peered(path, script) as agent:
        first = await agent.attach(7)
        second = await agent.attach(7)
        assert await second.stdout.read_at() == (6, b"tail")
        with pytest.raises(GuestError, match="attached again"):
            await first.wait()
        assert agent.attached == [second]


async def test_log_and_oom_events_reach_their_callbacks(path: Path) -> None:
    async def script(peer: Peer) -> None:
        number, _ = await peer.call()
        peer.reply(number, {})
        peer.event(0, "log", level="warning", text="low\x07 on\nluck", extra=[1])
        peer.event(5, "oom")
        peer.event(5, "from_the_future", code="x")
        await peer.next(frames.PING)

    heard: list[Any] = []
    async with peered(path, script) as agent:
        agent.on_log = lambda level, text: heard.append((level, text))
        agent.on_oom = heard.append
        await agent.sync()
        with pytest.raises(GuestError):
            await agent.ping(timeout=0.2)
    assert heard == [("warning", "low\N{REPLACEMENT CHARACTER} on\N{REPLACEMENT CHARACTER}luck"), 5]


async def test_processes_come_in_pages(path: Path) -> None:
    async def script(peer: Peer) -> None:
        for first in (1, 257, 513):
            number, arguments = await peer.call()
            assert arguments == {"m": "processes", "after": first - 1}
            page = [{"id": id, "pid": 5, "running": True} for id in range(first, min(first + 256, 601))]
            peer.reply(number, {"processes": page, "more": first < 513})
        number, _ = await peer.call()
        peer.reply(number, {"processes": [{"id": 1}], "more": True})
        number, _ = await peer.call()
        peer.reply(number, {"processes": [{"id": 1}], "more": True})

    async with peered(path, script) as agent:
        assert [info.id for info in await agent.processes()] == list(range(1, 601))
        with pytest.raises(GuestError, match="without an end"):
            await agent.processes()


async def test_an_exec_is_repeated_on_the_next_connection(path: Path) -> None:
    """The first try's reply was lost, and half of its input arrived."""

    async def lost(peer: Peer) -> None:
        await peer.synchronise(WELCOME)
        _, arguments = await peer.call()
        assert arguments["id"] == 9

    async def found(peer: Peer) -> None:
        await peer.synchronise(WELCOME)
        number, arguments = await peer.call()
        assert (arguments["m"], arguments["id"]) == ("exec", 9)
        peer.reply(number, {"pid": 77, "started": 5})
        number, arguments = await peer.call()
        assert arguments == {"m": "attach", "id": 9, "out": 0, "err": 0}
        peer.reply(number, {"id": 9, "pid": 77, "running": True, "stdin": 3})
        frame = await peer.next(DATA)
        assert (frame.offset, frame.payload) == (3, b"put")
        assert (await peer.next(EOF)).offset == 6
        peer.send(DATA, 37, 0, b"out")
        peer.send(EOF, 37, 3)
        await peer.reader.read()

    async with listening(path, lost, found):
        request = ExecRequest(["x"], id=9)
        async with await connect(path, fresh=True, timeout=5) as agent:
            with pytest.raises(GuestError):
                await agent.exec(request, input=b"in put")
        async with await connect(path, fresh=False, timeout=5) as agent:
            process = await agent.exec(request, input=b"in put", again=True)
            assert await process.stdout.read_all() == b"out"


def test_a_request_too_large_for_a_frame_is_refused_here() -> None:
    with pytest.raises(TooLarge, match="65,536"):
        m.encode_map(ExecRequest(["x" * 70_000]))


def test_names_that_are_not_unicode_travel_as_bytes() -> None:
    sent = msgspec.msgpack.decode(m.encode_map(ExecRequest(["ls", "caf\udce9", "café"], cwd="/\udcff", env={"A": "\udcfe"})))
    assert sent == {"m": "exec", "argv": ["ls", b"caf\xe9", "café"], "cwd": b"/\xff", "env": {"A": b"\xfe"}}


@pytest.mark.parametrize(("status", "code"), [(ExitStatus(code=3), 3), (ExitStatus(signal=9), 137), (ExitStatus(), 255)])
def test_shell_codes(status: ExitStatus, code: int) -> None:
    assert status.shell_code == code


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        st.binary(max_size=300),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**64 - 1)
            | st.text(max_size=5)
            | st.binary(max_size=5)
            | st.floats(),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(
                    st.sampled_from(["id", "pid", "error", "code", "e", "exit", "processes", "version", "load", "signal"])
                    | st.text(max_size=3),
                    inner,
                    max_size=6,
                )
            ),
            max_leaves=20,
        ).map(msgspec.msgpack.encode),
    )
)
def test_maps_of_any_kind_raise_nothing_but_our_errors(payload: bytes) -> None:
    for kind in (m.Welcome, m.ProcessInfo, m.Processes, m.GuestInfo, m.ExitStatus, m.Event, m.Started, m.Nothing):
        for read in (lambda kind: m.decode(kind, payload), lambda kind: m.reply(kind, payload, "call")):
            try:
                read(kind)
            except StokerError as e:
                assert e.message.isprintable()
                assert len(e.message) < 1000


def test_importing_the_client_is_cheap() -> None:
    script = "\n".join(
        (
            "import sys, asyncio, msgspec",
            "before = set(sys.modules)",
            "import stoker.guest.channel",
            "print(*sorted(set(sys.modules) - before))",
        )
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names == {"stoker"}


class Silent:
    """A channel that goes nowhere."""

    closed = False

    def __init__(self) -> None:
        self.sent = 0

    def send(self, type: int, channel: int, offset: int = 0, payload: bytes | memoryview = b"") -> None:
        self.sent += 1

    def send_ack(self, channel: int, offset: int) -> None:
        self.sent += 1

    async def drain(self) -> None: ...

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


maps = st.dictionaries(
    st.sampled_from(["e", "id", "pid", "code", "signal", "out", "error", "stdin", "exit", "level", "text", "processes"]),
    st.sampled_from(["exit", "stdin_closed", "log", "oom", "x", 0, 1, 2, 255, -1, 2**63, None, True, b"b", [], {}, {"code": "io"}]),
    max_size=8,
).map(msgspec.msgpack.encode)
any_frame = st.builds(
    frames.Frame,
    st.sampled_from([frames.WELCOME, frames.REPLY, frames.EVENT, DATA, frames.ACK, EOF, frames.PONG, 0x77, frames.CALL]),
    st.integers(0, 14),
    st.integers(0, 12) | st.sampled_from([2**31, 2**63, 2**64 - 1]),
    maps | st.binary(max_size=12),
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(any_frame, max_size=25))
def test_any_sequence_of_frames_is_understood_or_a_protocol_error(sequence: list[frames.Frame]) -> None:
    """Two processes and a ping are under way; whatever the guest says, it ends in order or in a GuestError."""

    async def scenario() -> None:
        agent = Agent(Silent())  # type: ignore[arg-type]
        agent.on_log = lambda level, text: None
        agent.on_frames([frames.Frame(frames.WELCOME, 0, 0, msgspec.msgpack.encode(WELCOME))])
        await agent.greeted()
        tasks = [
            asyncio.create_task(agent.exec(ExecRequest(["a"], id=1, stdin=True), input=b"input")),
            asyncio.create_task(agent.run(ExecRequest(["b"], id=2, mode="discard"))),
            asyncio.create_task(agent.attach(3)),
            asyncio.create_task(agent.ping()),
        ]
        await asyncio.sleep(0)
        for frame in sequence:
            try:
                agent.on_frames([frame])
            except GuestError as e:
                assert e.code == "protocol_error"
                break
            await asyncio.sleep(0)
        agent.on_lost(GuestError("agent_lost", "over"))
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert not isinstance(result, BaseException) or isinstance(result, StokerError), result

    asyncio.run(scenario())
