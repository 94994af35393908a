"""The client's transport: what is sent again and what is not, bounds, broken answers, early answers, WebSockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stoker.client.api import Api, path
from stoker.client.endpoint import Endpoint, parse_endpoint, query_string
from stoker.client.transport import Answer, Transport
from stoker.client.websocket import Closed
from stoker.errors import Conflict, DeadlineExceeded, HostError, InternalError, InvalidRequest, StokerError
from unit.client_stub import Wire, serve_json, stub

pytestmark = pytest.mark.anyio


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "s"


def transport(place: Path, **options: object) -> Transport:
    return Transport(Endpoint(socket=place), **options)  # type: ignore[arg-type]


async def test_connections_are_kept(place: Path) -> None:
    async with stub(place, serve_json) as server:
        client = transport(place)
        for _ in range(5):
            assert (await client.request("GET", "/v1/a")).body == b"{}"
        assert len(server.wires) == 1
        await asyncio.gather(*(client.request("GET", "/v1/a") for _ in range(4)))
        assert len(server.wires) == 4
        client.close()


async def once_then_close(wire: Wire) -> None:
    await wire.request()
    await wire.answer()


async def die_on_second(wire: Wire) -> None:
    await wire.request()
    await wire.answer()
    await wire.request()


async def test_a_server_that_closed_a_kept_connection_costs_nothing(place: Path) -> None:
    async with stub(place, once_then_close) as server:
        client = transport(place)
        for _ in range(3):
            await client.request("POST", "/v1/a", body=b"{}")
            await asyncio.sleep(0.02)
        assert len(server.wires) == 3
        server.wires[-1].writer.close()
        time.sleep(0.01)  # noqa: ASYNC251 - the loop has no time to notice, the kernel has
        await client.request("POST", "/v1/a", body=b"{}")
        client.close()


async def test_only_what_may_be_repeated_is_sent_again(place: Path) -> None:
    async with stub(place, die_on_second, serve_json) as server:
        client = transport(place)
        await client.request("GET", "/v1/a")
        await client.request("GET", "/v1/b")
        assert [r.target for r in server.requests] == ["/v1/a", "/v1/b", "/v1/b"]
        client.close()
    async with stub(place.with_name("t"), die_on_second, serve_json) as server:
        client = transport(place.with_name("t"))
        await client.request("GET", "/v1/a")
        with pytest.raises(HostError) as caught:
            await client.request("POST", "/v1/b", body=b"{}")
        assert caught.value.code == "connection_lost"
        assert [r.target for r in server.requests] == ["/v1/a", "/v1/b"]
        client.close()
    async with stub(place.with_name("u"), die_on_second, serve_json) as server:
        client = transport(place.with_name("u"))
        await client.request("GET", "/v1/a")
        await client.request("POST", "/v1/b", body=b"{}", headers=[("Idempotency-Key", "k")])
        assert [r.target for r in server.requests] == ["/v1/a", "/v1/b", "/v1/b"]
        client.close()


async def hang_up(wire: Wire) -> None:
    await wire.request()


async def test_a_fresh_connection_that_dies_is_not_tried_for_ever(place: Path) -> None:
    async with stub(place, hang_up) as server:
        client = transport(place)
        with pytest.raises(HostError, match="without an answer"):
            await client.request("GET", "/v1/a")
        assert len(server.wires) == 1
        client.close()


async def test_nobody_there(place: Path) -> None:
    started: list[int] = []

    async def start() -> None:
        started.append(1)

    with pytest.raises(HostError) as caught:
        await transport(place, start=start).request("GET", "/v1/a")
    assert caught.value.code == "daemon_unreachable" and started == [1]
    with pytest.raises(HostError) as caught:
        await Transport(parse_endpoint("http://127.0.0.1:1")).request("GET", "/v1/a")
    assert caught.value.code == "daemon_unreachable"


async def test_a_daemon_that_does_not_answer_is_given_up_in_time(place: Path) -> None:
    async def silent(wire: Wire) -> None:
        await wire.request()
        await asyncio.sleep(30)

    async with stub(place, silent):
        client = transport(place)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            await client.request("GET", "/v1/a", timeout=0.1)
        assert caught.value.code == "request_timeout" and time.monotonic() - began < 2
        client.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 X\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 X\r\ncontent-length: 100\r\n\r\nhello",
        b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello",
        b"HTTP/1.1 200 X\r\nx: " + b"y" * 2_000_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 X\r\n",
    ],
)
async def test_a_broken_answer_is_an_error_of_ours(place: Path, raw: bytes) -> None:
    async def broken(wire: Wire) -> None:
        await wire.request()
        await wire.send(raw)

    async with stub(place, broken):
        client = transport(place)
        with pytest.raises(StokerError) as caught:
            await client.request("GET", "/v1/a", timeout=5)
        assert caught.value.code in ("bad_answer", "connection_lost")
        client.close()


async def pieces(count: int, size: int = 1 << 16) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * size


async def test_a_streamed_upload_arrives_whole(place: Path) -> None:
    async with stub(place, serve_json) as server:
        client = transport(place)
        await client.request("PUT", "/v1/a", body=pieces(20))
        await client.request("GET", "/v1/b")
        assert len(server.requests[0].body) == 20 << 16 and len(server.wires) == 1
        client.close()


async def test_an_answer_before_the_end_of_an_upload_is_heard(place: Path) -> None:
    async def refuse(wire: Wire) -> None:
        await wire.reader.readuntil(b"\r\n\r\n")
        await wire.answer(b'{"code": "too_large", "message": "no", "family": "TooLarge"}', 413)
        await asyncio.sleep(0.2)

    async with stub(place, refuse):
        client = transport(place)
        answer = await client.request("PUT", "/v1/a", body=pieces(10_000), timeout=10)
        assert answer.status == 413
        client.close()


async def test_a_source_that_fails_ends_the_upload_with_its_error(place: Path) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield b"x"
        raise InvalidRequest("text_file", "wrong mode")

    async with stub(place, serve_json):
        client = transport(place)
        with pytest.raises(InvalidRequest):
            await client.request("PUT", "/v1/a", body=failing(), timeout=5)
        client.close()


async def test_a_stream_that_is_left_early_is_not_used_again(place: Path) -> None:
    async def endless(wire: Wire) -> None:
        await wire.request()
        await wire.send(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            await wire.send(b"4\r\nabcd\r\n")
            await asyncio.sleep(0.001)

    async with stub(place, endless, serve_json) as server:
        client = transport(place)
        async with client.stream("GET", "/v1/a") as stream:
            assert await stream.chunk() == b"abcd"
        assert (await client.request("GET", "/v1/b")).body == b"{}"
        assert len(server.wires) == 2
        client.close()


async def test_errors_come_out_as_their_family(place: Path) -> None:
    async def conflict(wire: Wire) -> None:
        while await wire.request() is not None:
            await wire.answer(
                b'{"code":"wrong_state","message":"it is frozen","hint":"thaw it","family":"Conflict","details":{"a":1}}', 409
            )

    async def proxy(wire: Wire) -> None:
        await wire.request()
        await wire.answer(b"<html>bad gateway", 502)

    async with stub(place, conflict, proxy):
        api = Api(transport(place))
        with pytest.raises(Conflict) as caught:
            await api.send("GET", "/v1/a")
        assert (caught.value.code, caught.value.hint, caught.value.details) == ("wrong_state", "thaw it", {"a": 1})
        api.transport.close()
        api = Api(transport(place))
        with pytest.raises(StokerError) as other:
            await api.send("GET", "/v1/a")
        assert other.value.code == "http_502"
        api.transport.close()


async def test_websocket_messages_pings_and_goodbye(place: Path) -> None:
    pongs: list[bytes] = []

    async def talk(wire: Wire) -> None:
        request = await wire.request()
        assert request is not None
        await wire.upgrade(request)
        assert await wire.read_frame() == (1, b"hello")
        opcode, data = await wire.read_frame()
        assert opcode == 2 and data == bytes(range(256)) * 400
        await wire.frame(9, b"are you there")
        await wire.frame(1, b"wor", final=False)
        await wire.frame(0, b"ld")
        await wire.frame(2, b"x" * 100_000)
        opcode, data = await wire.read_frame()
        assert opcode == 10
        pongs.append(data)
        await wire.frame(8, b"\x03\xe8bye")
        assert await wire.read_frame() == (8, b"\x03\xe8")

    async with stub(place, talk):
        client = transport(place)
        socket = await client.websocket("/v1/ws")
        assert not isinstance(socket, Answer)
        await socket.send("hello")
        await socket.send(bytes(range(256)) * 400)
        assert await socket.receive() == "world"
        assert await socket.receive() == b"x" * 100_000
        assert await socket.receive() == Closed(1000, "bye")
        with pytest.raises(HostError):
            await socket.send("more")
        await socket.close()
        client.close()
    assert pongs == [b"are you there"]


async def test_a_refused_websocket_gives_the_answer(place: Path) -> None:
    async def refuse(wire: Wire) -> None:
        await wire.request()
        await wire.answer(b'{"code":"sandbox_unknown","message":"no","family":"NotFound"}', 404)

    async with stub(place, refuse):
        api = Api(transport(place))
        with pytest.raises(StokerError) as caught:
            await api.websocket("/v1/ws")
        assert caught.value.code == "sandbox_unknown"
        api.transport.close()


async def test_a_silent_websocket_is_pinged_and_given_up(place: Path) -> None:
    seen: list[int] = []

    async def deaf(wire: Wire) -> None:
        request = await wire.request()
        assert request is not None
        await wire.upgrade(request)
        seen.append((await wire.read_frame())[0])
        await asyncio.sleep(5)

    async with stub(place, deaf):
        client = transport(place)
        socket = await client.websocket("/v1/ws")
        assert not isinstance(socket, Answer)
        socket._silence = 0.05
        with pytest.raises(DeadlineExceeded) as caught:
            await socket.receive()
        assert caught.value.code == "daemon_silent" and seen == [9]
        client.close()


def test_addresses() -> None:
    assert parse_endpoint("unix:/run/s.sock") == Endpoint(socket=Path("/run/s.sock")) == parse_endpoint("unix:///run/s.sock")
    assert parse_endpoint("http://[::1]:8000") == Endpoint(host="::1", port=8000)
    assert parse_endpoint("https://host/a/") == Endpoint(host="host", port=443, tls=True, prefix="/a")
    assert str(parse_endpoint("https://host/a/")) == "https://host/a"
    for wrong in ("host:80", "ftp://x", "http://", "unix:relative", "http://u@h", "http://h?q", "http://h:99999"):
        with pytest.raises(InvalidRequest):
            parse_endpoint(wrong)


def test_paths_and_queries_escape_everything() -> None:
    assert path("sandboxes", "../a?b#c", 3) == "/v1/sandboxes/..%2Fa%3Fb%23c/3"
    assert query_string({"a": None, "b": "", "c": False, "d": ["x", "y z"], "e": 0, "f": "\udcff&="}) == (
        "?c=false&d=x&d=y%20z&e=0&f=%FF%26%3D"
    )
    assert query_string({}) == ""


async def test_a_closed_client_says_so(place: Path) -> None:
    client = transport(place)
    client.close()
    with pytest.raises(HostError) as caught:
        await client.request("GET", "/")
    assert caught.value.code == "client_closed"


async def test_a_request_that_cannot_be_sent_is_refused_before_it_is(place: Path) -> None:
    async with stub(place, serve_json):
        client = transport(place)
        with pytest.raises(InternalError):
            await client.request("GET", "/v1/a b\r\nX: y")
        client.close()
