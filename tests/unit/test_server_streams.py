"""Processes, WebSockets, leases and files through a real server, with programs and a directory of this host as the guest's."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import formatdate
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
    async with running(short_dir) as found:
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


# -- files ----------------------------------------------------------------------------------------------------------------------

FILES = "/v1/sandboxes/box/files"


async def test_write_and_read(daemon: Running) -> None:
    body = bytes(range(256)) * 40
    put = await daemon.http.put(FILES, params={"path": "/srv/a.bin"}, content=body)
    assert put.status_code == 200 and put.json()["size"] == len(body)
    get = await daemon.http.get(FILES, params={"path": "/srv/a.bin"}, headers={"Accept-Encoding": "identity"})
    assert get.content == body and get.headers["content-length"] == str(len(body))
    assert get.headers["content-type"] == "application/octet-stream" and "attachment" in get.headers["content-disposition"]
    more = await daemon.http.put(FILES, params={"path": "/srv/a.bin", "append": "true"}, content=b"more")
    assert more.json()["size"] == len(body) + 4
    assert (await daemon.http.get(FILES, params={"path": "/srv"})).json()["code"] == "is_directory"
    assert (await daemon.http.get(FILES, params={"path": "/none"})).json()["code"] == "file_not_found"
    for params in (
        {},
        {"path": ""},
        {"path": "a\0b"},
        {"path": "x" * 5000},
        {"path": "/x", "user": "a b"},
        {"path": "/x", "typo": "1"},
    ):
        assert (await daemon.http.get(FILES, params=params)).status_code == 400


async def test_ranges_and_conditions(daemon: Running) -> None:
    await daemon.http.put(FILES, params={"path": "/r"}, content=b"0123456789")

    async def get(**headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await daemon.http.get(FILES, params={"path": "/r"}, headers=named)

    for value, content, described in (
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=0-99", b"0123456789", "bytes 0-9/10"),
    ):
        part = await get(Range=value)
        assert (part.status_code, part.content, part.headers["content-range"]) == (206, content, described)
    outside = await get(Range="bytes=10-")
    assert outside.status_code == 416 and outside.headers["content-range"] == "bytes */10"
    assert outside.json()["code"] == "range_not_satisfiable"
    for odd in ("bytes=4-2", "bytes=1-2,4-5", "lines=1-2", "bytes=-", "bytes=٣-"):
        whole = await daemon.http.get(FILES, params={"path": "/r"}, headers={"Range": odd.encode()})  # type: ignore[dict-item]
        assert whole.status_code == 200, odd
    full = await get()
    tag, changed = full.headers["etag"], full.headers["last-modified"]
    assert (await get(If_None_Match=tag)).status_code == 304
    assert (await get(If_None_Match="*")).status_code == 304
    assert (await get(If_None_Match='"other"', If_Modified_Since=changed)).status_code == 200
    assert (await get(If_Modified_Since=changed)).status_code == 304
    assert (await get(If_Modified_Since=formatdate(0, usegmt=True))).status_code == 200
    assert (await get(If_Modified_Since="garbage")).status_code == 200
    assert (await get(Range="bytes=0-1", If_Range=tag)).status_code == 206
    assert (await get(Range="bytes=0-1", If_Range='"old"')).status_code == 200
    head = await daemon.http.head(FILES, params={"path": "/r"})
    assert head.headers["etag"] == tag and head.headers["content-length"] == "10" and head.content == b""


async def test_gzip_both_ways(daemon: Running) -> None:
    text = b"the same again and again\n" * 40_000
    put = await daemon.http.put(FILES, params={"path": "/z"}, content=gzip.compress(text), headers={"Content-Encoding": "gzip"})
    assert put.json()["size"] == len(text)
    async with daemon.http.stream("GET", FILES, params={"path": "/z"}, headers={"Accept-Encoding": "gzip"}) as packed:
        raw = b"".join([piece async for piece in packed.aiter_raw()])
        assert packed.headers["content-encoding"] == "gzip" and packed.headers["etag"].endswith('-gzip"')
    assert len(raw) < len(text) / 10 and gzip.decompress(raw) == text
    plain = await daemon.http.get(FILES, params={"path": "/z"}, headers={"Accept-Encoding": "gzip;q=0"})
    assert "content-encoding" not in plain.headers and plain.content == text
    for damaged in (b"no gzip", gzip.compress(text)[:-20]):
        bad = await daemon.http.put(FILES, params={"path": "/y"}, content=damaged, headers={"Content-Encoding": "gzip"})
        assert (bad.status_code, bad.json()["code"]) == (400, "bad_encoding")
    assert (await daemon.http.get(FILES, params={"path": "/y"})).status_code == 404  # whole or not at all
    unknown = await daemon.http.put(FILES, params={"path": "/y"}, content=b"x", headers={"Content-Encoding": "br"})
    assert unknown.json()["code"] == "bad_encoding"


async def test_an_upload_is_streamed(daemon: Running) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for number in range(64):
            yield bytes([number]) * 65536

    put = await daemon.http.put(FILES, params={"path": "/big"}, content=pieces())
    assert put.json()["size"] == 64 * 65536


async def test_directories_and_names(daemon: Running) -> None:
    post = daemon.http.post
    many = {"files": [{"path": "/d/a", "data": "A"}, {"path": "/d/e/b", "data": "Qg==", "base64": True}]}
    assert len((await post(FILES, json=many)).json()["items"]) == 2
    listed = (await daemon.http.get(f"{FILES}/list", params={"path": "/d", "depth": 2})).json()
    assert [entry["path"] for entry in listed["items"]] == ["/d/a", "/d/e", "/d/e/b"] and not listed["truncated"]
    assert (await daemon.http.get(f"{FILES}/list", params={"path": "/d", "limit": 1})).json()["truncated"]
    assert (await post(f"{FILES}/mkdir", json={"path": "/n/m"})).json()["type"] == "directory"
    assert (await post(f"{FILES}/move", json={"source": "/d/a", "destination": "/n/a"})).json()["path"] == "/n/a"
    assert (await daemon.http.get(f"{FILES}/exists", params={"path": "/d/a"})).json() == {"exists": False, "type": None}
    assert (await daemon.http.get(f"{FILES}/exists", params={"path": "/n/a"})).json()["type"] == "file"
    assert (await post(f"{FILES}/symlink", json={"path": "/l", "target": "n/a"})).json()["type"] == "symlink"
    assert (await daemon.http.get(f"{FILES}/stat", params={"path": "/l", "follow": "true"})).json()["type"] == "file"
    assert (await post(f"{FILES}/chmod", json={"path": "/n/a", "mode": 0o600})).json()["mode"] == 0o600
    assert (await post(f"{FILES}/chown", json={"path": "/n/a", "owner": "root:root"})).status_code == 200
    assert (await post(f"{FILES}/chmod", json={"path": "/n/a", "mode": 99999})).status_code == 400
    assert (await daemon.http.delete(FILES, params={"path": "/d"})).json()["code"] == "directory_not_empty"
    assert (await daemon.http.delete(FILES, params={"path": "/d", "recursive": "true"})).status_code == 204
    tar = await daemon.http.get(f"{FILES}/tar", params={"path": "/n"})
    assert tar.headers["content-type"] == "application/x-tar" and len(tar.content) == 10240
    assert (await daemon.http.put(f"{FILES}/tar", params={"path": "/n"}, content=b"\0" * 10240)).status_code == 204


async def test_a_watch_tells_of_changes_and_lets_go(daemon: Running) -> None:
    assert (await daemon.http.get(f"{FILES}/watch", params={"path": "/none"})).status_code == 404
    async with daemon.http.stream("GET", f"{FILES}/watch", params={"path": "/", "recursive": "true"}) as stream:
        lines = stream.aiter_lines()
        await daemon.http.put(FILES, params={"path": "/new"}, content=b"")
        async with asyncio.timeout(5):
            async for line in lines:
                if line.startswith("data: "):
                    assert json.loads(line[6:])["kind"] == "created"
                    break
        assert len(daemon.engine.files.watches) == 1

    async def released() -> bool:
        return not daemon.engine.files.watches

    await _until(released)


async def test_signed_urls(daemon: Running) -> None:
    await daemon.http.put(FILES, params={"path": "/s"}, content=b"signed")
    signed = (await daemon.http.post(f"{FILES}/sign", json={"path": "/s", "expires_in": 60})).json()
    assert signed["method"] == "GET"
    assert (await daemon.tcp.get(signed["url"])).content == b"signed"
    assert (await daemon.tcp.get(signed["url"], headers={"Range": "bytes=0-1"})).content == b"si"
    assert (await daemon.tcp.put(signed["url"], content=b"x")).json()["code"] == "wrong_operation"
    forged = signed["url"][:-2] + ("aa" if not signed["url"].endswith("aa") else "bb")
    assert (await daemon.tcp.get(forged)).json()["code"] == "bad_signature"
    writable = (await daemon.http.post(f"{FILES}/sign", json={"path": "/t", "operation": "write"})).json()
    assert (await daemon.tcp.put(writable["url"], content=b"up")).status_code == 200
    assert (await daemon.http.get(FILES, params={"path": "/t"})).content == b"up"
    made = (await daemon.http.post("/v1/keys", json={})).json()
    headers = {"X-API-Key": made["secret"]}
    assert (await daemon.tcp.post(f"{FILES}/sign", json={"path": "/s"}, headers=headers)).status_code == 404
    await daemon.tcp.post("/v1/sandboxes", json={"image": "x", "name": "own"}, headers=headers)
    theirs = (await daemon.tcp.post("/v1/sandboxes/own/files/sign", json={"path": "/s"}, headers=headers)).json()
    assert (await daemon.tcp.get(theirs["url"])).content == b"signed"
    await daemon.http.delete(f"/v1/keys/{made['key']['id']}")
    assert (await daemon.tcp.get(theirs["url"])).json()["code"] == "url_revoked"
