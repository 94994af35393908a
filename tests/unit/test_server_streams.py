"""Processes, WebSockets, leases and files through a real server, with programs and a directory of this host as the guest's."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from server_running import LOCAL, ClientConnection, Running, running
from stoker.api import websocket as wire
from stoker.api.models import CreateKey, StartProcess

pytestmark = pytest.mark.anyio


@pytest.fixture
async def daemon(short_dir: Path) -> AsyncIterator[Running]:
    async with running(short_dir, guarded=True) as found:
        await found.sandbox(name="box")
        yield found


# -- processes ------------------------------------------------------------------------------------------------------------------


async def _exec(daemon: Running, *argv: str, **rest: Any) -> dict[str, Any]:
    answer = await daemon.http.post("/v1/sandboxes/box/exec", json={"argv": list(argv), **rest})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_run_and_wait(daemon: Running) -> None:
    result = await _exec(daemon, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (result["exit_code"], result["signal"], result["stdout"], result["stderr"]) == (3, None, "out\n", "err\n")
    assert result["duration_ms"] > 0 and not result["stdout_base64"]
    assert (await _exec(daemon, "sh", "-c", "kill -9 $$"))["signal"] == 9
    assert (await _exec(daemon, "cat", stdin="näh"))["stdout"] == "näh"
    raw = await _exec(daemon, "cat", stdin=base64.b64encode(b"\xff\0").decode(), stdin_base64=True)
    assert raw["stdout_base64"] and base64.b64decode(raw["stdout"]) == b"\xff\0"
    assert (await _exec(daemon, "true", stdin="x" * 200_000))["exit_code"] == 0


async def test_output_beyond_the_bound_is_cut_and_said_so(daemon: Running) -> None:
    result = await _exec(daemon, "sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x", max_output=1000)
    assert result["stdout"] == "x" * 1000 and result["stdout_truncated"] and not result["stderr_truncated"]
    assert result["exit_code"] == 0


async def test_run_and_wait_ends_at_its_timeout(daemon: Running) -> None:
    began = time.monotonic()
    result = await _exec(daemon, "sleep", "60", timeout=0.2)
    assert result["timed_out"] and result["signal"] == 9 and time.monotonic() - began < 10


async def test_a_client_that_goes_away_ends_what_it_waited_for(daemon: Running) -> None:
    request = asyncio.create_task(_exec(daemon, "sleep", "61"))
    processes = daemon.engine.processes

    async def started() -> bool:
        return bool(await processes.list(LOCAL, "box"))

    async def ended() -> bool:
        return not (await processes.list(LOCAL, "box"))[0].running

    await _until(started)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await _until(ended)


async def test_commands_that_cannot_be(daemon: Running) -> None:
    missing = await daemon.http.post("/v1/sandboxes/box/exec", json={"argv": ["no-such-command"]})
    assert (missing.status_code, missing.json()["family"]) == (422, "CommandNotFound")
    assert (await daemon.http.post("/v1/sandboxes/box/exec", json={"argv": []})).status_code == 400
    assert (await daemon.http.post("/v1/sandboxes/nope/exec", json={"argv": ["true"]})).status_code == 404
    bad = {"argv": ["true"], "stdin": "@@@", "stdin_base64": True}
    assert (await daemon.http.post("/v1/sandboxes/box/exec", json=bad)).json()["code"] == "bad_base64"


async def test_background_processes(daemon: Running) -> None:
    base = "/v1/sandboxes/box/processes"
    started = await daemon.http.post(base, json={"argv": ["cat"], "tag": "echo", "stdin": True})
    assert started.status_code == 201 and started.json()["running"]
    number = started.json()["id"]
    assert [p["tag"] for p in (await daemon.http.get(base)).json()["items"]] == ["echo"]
    assert (await daemon.http.get(base, params={"tag": "other"})).json()["items"] == []
    assert (await daemon.http.post(f"{base}/echo/stdin", json={"data": "hello"})).status_code == 204
    assert (await daemon.http.post(f"{base}/{number}/resize", json={"rows": 5, "cols": 6})).status_code == 409
    for name in ("NOPE", "KILL\n"):
        assert (await daemon.http.post(f"{base}/echo/signal", json={"signal": name})).status_code == 400
    assert (await daemon.http.post(f"{base}/echo/signal", json={"signal": "TERM"})).status_code == 204

    async def ended() -> bool:
        return not (await daemon.http.get(f"{base}/{number}")).json()["running"]

    await _until(ended)
    assert (await daemon.http.get(f"{base}/echo")).json()["signal"] == 15
    assert (await daemon.http.post(f"{base}/echo/signal", json={"signal": 9})).status_code == 409
    assert (await daemon.http.delete(f"{base}/{number}")).status_code == 204
    assert (await daemon.http.get(f"{base}/{number}")).status_code == 404


# -- WebSockets -----------------------------------------------------------------------------------------------------------------


async def _say(socket: ClientConnection, message: Any) -> None:
    await socket.send(wire.encode_message(message))


async def _hear(socket: ClientConnection) -> wire.DaemonMessage:
    async with asyncio.timeout(10):
        text = await socket.recv()
    assert isinstance(text, str)
    return wire.decode_daemon(text)


async def _ack(socket: ClientConnection, size: int) -> None:
    with contextlib.suppress(ConnectionClosed):  # the daemon closes after the exit, whether or not all was acknowledged
        await _say(socket, wire.Ack(bytes=size))


async def _until(condition: Callable[[], Awaitable[bool]], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


async def _all(socket: ClientConnection) -> tuple[bytes, bytes, Any]:
    """Everything until the exit: stdout, stderr, the last message."""
    parts: dict[int, list[bytes]] = {1: [], 2: []}
    offsets = {1: None, 2: None}
    while True:
        async with asyncio.timeout(20):
            frame = await socket.recv()
        if isinstance(frame, str):
            message = wire.decode_daemon(frame)
            if isinstance(message, (wire.Exit, wire.Failure)):
                return b"".join(parts[1]), b"".join(parts[2]), message
            continue
        stream, offset, data = wire.decode_data(frame)
        assert offsets[stream] in (None, offset), "a gap"
        offsets[stream] = offset + len(data)
        parts[stream].append(bytes(data))
        await _ack(socket, len(data))


STREAM = "/v1/sandboxes/box/processes/stream"


async def test_start_and_stream(daemon: Running) -> None:
    async with daemon.websocket(STREAM) as socket:
        await _say(socket, wire.Start(process=StartProcess(argv=["sh", "-c", "cat; echo e >&2; exit 4"], stdin=True)))
        attached = await _hear(socket)
        assert isinstance(attached, wire.Attached) and attached.process.running
        await socket.send(wire.encode_data(wire.STDIN, 0, b"abc"))
        await _say(socket, wire.CloseStdin())
        out, err, end = await _all(socket)
        assert (out, err, end.process.exit_code) == (b"abc", b"e\n", 4)
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1000


async def test_any_number_attach_and_none_disturbs_another(daemon: Running) -> None:
    info = await daemon.engine.processes.start(
        LOCAL, "box", StartProcess(argv=["sh", "-c", "echo one; read x; echo two"], stdin=True)
    )
    path = f"/v1/sandboxes/box/processes/{info.id}/attach"
    async with daemon.websocket(path) as first, daemon.websocket(path) as second:
        for socket in (first, second):
            await _say(socket, wire.Attach())
            assert isinstance(await _hear(socket), wire.Attached)
        await first.close()  # leaves the process as it is
        await second.send(wire.encode_data(wire.STDIN, 0, b"\n"))
        assert (await _all(second))[0] == b"one\ntwo\n"
    async with daemon.websocket(path) as late:
        await _say(late, wire.Attach(stdout=4))
        assert isinstance(await _hear(late), wire.Attached)
        assert (await _all(late))[0] == b"two\n"


async def test_output_stops_at_the_clients_window(daemon: Running) -> None:
    async with daemon.websocket(STREAM, max_queue=None) as socket:
        start = wire.Start(process=StartProcess(argv=["head", "-c", "1000000", "/dev/zero"]), window=64 << 10)
        await _say(socket, start)
        assert isinstance(await _hear(socket), wire.Attached)
        received = 0
        with pytest.raises(TimeoutError):
            while True:
                async with asyncio.timeout(0.5):
                    frame = await socket.recv()
                assert isinstance(frame, bytes)
                received += len(frame) - wire.HEADER.size
        assert 64 << 10 <= received <= (64 << 10) + wire.MAX_PAYLOAD
        await _say(socket, wire.Ack(bytes=received))
        out, _, end = await _all(socket)
        assert received + len(out) == 1_000_000 and end.process.exit_code == 0


async def test_much_flows_both_ways(daemon: Running) -> None:
    total = 24 << 20
    piece = os.urandom(64 << 10)
    credit = asyncio.Semaphore(0)
    async with daemon.websocket(STREAM, max_size=None) as socket:
        await _say(socket, wire.Start(process=StartProcess(argv=["cat"], stdin=True)))
        attached = await _hear(socket)
        assert isinstance(attached, wire.Attached)

        async def send() -> None:
            room = attached.stdin_window
            for _ in range(total // len(piece)):
                while room < len(piece):
                    await credit.acquire()
                    room += 65536
                room -= len(piece)
                await socket.send(wire.encode_data(wire.STDIN, 0, piece))
            await _say(socket, wire.CloseStdin())

        sender = asyncio.create_task(send())
        digest, size = hashlib.sha256(), 0
        while True:
            frame = await asyncio.wait_for(socket.recv(), 20)
            if isinstance(frame, bytes):
                data = wire.decode_data(frame)[2]
                digest.update(data)
                size += len(data)
                await _ack(socket, len(data))
                continue
            message = wire.decode_daemon(frame)
            if isinstance(message, wire.Ack):
                for _ in range(message.bytes // 65536):
                    credit.release()
            elif isinstance(message, wire.Exit):
                break
        await sender
    assert size == total and digest.hexdigest() == hashlib.sha256(piece * (total // len(piece))).hexdigest()


async def test_input_that_nobody_reads_is_told_and_dropped(daemon: Running) -> None:
    async with daemon.websocket(STREAM) as socket:
        await _say(socket, wire.Start(process=StartProcess(argv=["sh", "-c", "exec <&-; sleep 1"], stdin=True)))
        assert isinstance(await _hear(socket), wire.Attached)
        acked, told = 0, False
        for _ in range(8):
            await socket.send(wire.encode_data(wire.STDIN, 0, b"x" * 65536))
        while acked < 8 * 65536:
            message = await _hear(socket)
            told = told or isinstance(message, wire.StdinClosed)
            acked += message.bytes if isinstance(message, wire.Ack) else 0
        assert told


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (["{"], 4400),
        ([b"\0" * 9], 4400),
        (['{"type":"attach"}'], 4400),
        (['{"type":"start","process":{"argv":["no-such-command"]}}'], 4422),
        (['{"type":"start","process":{"argv":["cat"],"stdin":true}}', b"\0"], 4400),
        (['{"type":"start","process":{"argv":["cat"],"stdin":true}}', wire.encode_data(1, 0, b"x")], 4400),
        (['{"type":"start","process":{"argv":["cat"],"stdin":true}}', '{"type":"auth","key":"x"}'], 4400),
        (
            ['{"type":"start","process":{"argv":["sleep","5"],"stdin":true}}', *[wire.encode_data(0, 0, b"x" * (256 << 10))] * 4],
            4400,
        ),
    ],
)
async def test_what_a_websocket_refuses(daemon: Running, frames: list[str | bytes], code: int) -> None:
    async with daemon.websocket(STREAM) as socket:
        for frame in frames:
            await socket.send(frame)
        failure = None
        with pytest.raises(ConnectionClosed) as closed:
            async with asyncio.timeout(10):
                while True:
                    frame = await socket.recv()
                    message = wire.decode_daemon(frame) if isinstance(frame, str) else None
                    failure = message if isinstance(message, wire.Failure) else failure
        assert closed.value.rcvd is not None and closed.value.rcvd.code == code
        assert failure is not None and failure.fatal and failure.error.code


async def test_signals_and_their_errors_over_a_websocket(daemon: Running) -> None:
    async with daemon.websocket(STREAM) as socket:
        await _say(socket, wire.Start(process=StartProcess(argv=["sleep", "60"])))
        assert isinstance(await _hear(socket), wire.Attached)
        await _say(socket, wire.Resize(rows=2, cols=3))
        refused = await _hear(socket)
        assert isinstance(refused, wire.Failure) and not refused.fatal
        await _say(socket, wire.SendSignal(signal="INT"))
        assert (await _all(socket))[2].process.signal == 2


async def test_a_websocket_over_tcp_wants_a_key(daemon: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await daemon.engine.create_key(CreateKey(name="ws"))
    own = await daemon.tcp.post("/v1/sandboxes", json={"image": "x", "name": "own"}, headers={"X-API-Key": made.secret})
    path = f"/v1/sandboxes/{own.json()['id']}/processes/stream"
    start = wire.Start(process=StartProcess(argv=["true"]))
    async with daemon.tcp_websocket(path, additional_headers={"X-API-Key": made.secret}) as socket:
        await _say(socket, start)
        assert isinstance(await _hear(socket), wire.Attached)
    async with daemon.tcp_websocket(path) as socket:  # a browser
        await _say(socket, wire.Auth(key=made.secret))
        await _say(socket, start)
        assert isinstance(await _hear(socket), wire.Attached)
    monkeypatch.setattr(wire, "AUTH_TIMEOUT", 0.2)
    for first, code in ((wire.Auth(key="wrong"), "bad_key"), (start, "key_required"), (None, "auth_timeout")):
        async with daemon.tcp_websocket(path) as socket:
            if first is not None:
                await _say(socket, first)
            failure = await _hear(socket)
            assert isinstance(failure, wire.Failure) and failure.error.code == code
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 4401
    async with daemon.tcp_websocket("/v1/sandboxes/box/processes/stream", additional_headers={"X-API-Key": made.secret}) as socket:
        await _say(socket, start)
        failure = await _hear(socket)
        assert isinstance(failure, wire.Failure) and failure.error.family == "NotFound"  # another's


# -- leases ---------------------------------------------------------------------------------------------------------------------


async def test_a_sandbox_ends_with_its_lease(daemon: Running) -> None:
    box = await daemon.sandbox(name="leased", lease=True)
    socket = await daemon.websocket(f"/v1/sandboxes/{box.id}/lease")
    assert isinstance(await _hear(socket), wire.Leased)
    socket.transport.abort()  # as a killed client does

    async def gone() -> bool:
        return box.id not in daemon.engine.boxes

    await _until(gone, 1)
    async with daemon.websocket("/v1/sandboxes/box/lease") as socket:
        failure = await _hear(socket)
        assert isinstance(failure, wire.Failure) and failure.error.code == "no_lease"


async def test_the_daemons_own_end_does_not_end_a_lease(short_dir: Path) -> None:
    async with running(short_dir) as daemon:
        box = await daemon.sandbox(name="leased", lease=True)
        socket = await daemon.websocket(f"/v1/sandboxes/{box.id}/lease")
        assert isinstance(await _hear(socket), wire.Leased)
        engine = daemon.engine
    assert box.id in engine.boxes
    await socket.close()
