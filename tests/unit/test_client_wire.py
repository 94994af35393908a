"""The client's parsers against other implementations and against noise: WebSocket frames, server-sent events, leases, progress."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, TextMessage

from stoker.cli.remote import Following
from stoker.client.api import Api
from stoker.client.endpoint import Endpoint
from stoker.client.feed import Message as Sent
from stoker.client.feed import Parser
from stoker.client.lease import Lease
from stoker.client.transport import Transport
from stoker.client.websocket import BINARY, CLOSE, PING, TEXT, Codec, encode
from stoker.errors import InternalError, NotFound, StokerError
from unit.client_stub import Wire, stub

sizes = st.one_of(st.integers(0, 300), st.sampled_from([125, 126, 127, 65535, 65536, 70000]))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([TEXT, BINARY, PING]), sizes), max_size=6), st.integers(50, 5000))
def test_what_another_server_sends_is_understood(messages: list[tuple[int, int]], cut: int) -> None:
    server = Connection(ConnectionType.SERVER)
    stream, expected = b"", []
    for opcode, size in messages:
        if opcode == PING:
            data = b"p" * min(size, 125)
            stream += server.send(Ping(data))
        else:
            data = b"x" * size
            stream += server.send(TextMessage(data.decode()) if opcode == TEXT else BytesMessage(data))
        expected.append((opcode, data))
    stream += server.send(CloseConnection(1000, "bye"))
    codec = Codec()
    seen = [frame for start in range(0, len(stream), cut) for frame in codec.feed(stream[start : start + cut])]
    assert [(frame.opcode, frame.data) for frame in seen[:-1]] == expected
    assert (seen[-1].opcode, seen[-1].data) == (CLOSE, b"\x03\xe8bye")


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=2000), st.one_of(st.none(), st.binary(min_size=4, max_size=4)))
def test_what_we_send_is_understood_by_another_server(data: bytes, key: bytes | None) -> None:
    server = Connection(ConnectionType.SERVER)
    header, payload = encode(BINARY, data, key)
    server.receive_data(header + bytes(payload))
    received = b"".join(bytes(event.data) for event in server.events() if isinstance(event, Message))
    assert received == data


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(max_size=60), max_size=8))
def test_noise_is_an_error_or_nothing(pieces: list[bytes]) -> None:
    codec = Codec(limit=1000)
    try:
        for piece in pieces:
            for frame in codec.feed(piece):
                assert len(frame.data) <= 1000
    except InternalError as e:
        assert e.code == "bad_websocket"


@pytest.mark.parametrize(
    "frame",
    [
        b"\xf2\x00",  # a reserved bit
        b"\x82\x80\0\0\0\0",  # masked
        b"\x00\x00",  # a continuation of nothing
        b"\x02\x00\x82\x00",  # a message within a message
        b"\x89\x7e\x00\x7e" + b"x" * 126,  # a long ping
        b"\x09\x00",  # a ping in parts
        b"\x83\x00",  # an opcode that is none
        b"\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff",  # more than anybody has
    ],
)
def test_broken_frames(frame: bytes) -> None:
    with pytest.raises(InternalError):
        Codec().feed(frame)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.dictionaries(st.text(max_size=8), st.text(max_size=30), max_size=3), max_size=5), st.integers(1, 40))
def test_events_in_any_pieces(values: list[dict[str, str]], cut: int) -> None:
    lines = [f": beat\r\n\r\nid: {i}\r\ndata: {json.dumps(value)}\r\n\r\n" for i, value in enumerate(values)]
    stream = "".join(lines).encode()
    parser = Parser()
    seen = [message for start in range(0, len(stream), cut) for message in parser.feed(stream[start : start + cut])]
    assert [json.loads(message.data) for message in seen] == values
    assert [message.id for message in seen] == [str(i) for i in range(len(values))]


def test_events_in_several_lines() -> None:
    assert Parser().feed(b"event: error\ndata: a\ndata:b\n\n") == [Sent("error", "a\nb")]
    parser = Parser()
    with pytest.raises(InternalError):
        for _ in range(10):
            parser.feed(b"x" * (1 << 20))


@pytest.mark.anyio
async def test_a_lease_is_taken_up_again_at_the_next_daemon(tmp_path: Path) -> None:
    holders: list[int] = []

    async def hold(wire: Wire) -> None:
        request = await wire.request()
        assert request is not None and request.target == "/v1/sandboxes/sb/lease"
        await wire.upgrade(request)
        await wire.frame(TEXT, b'{"type":"leased","sandbox":"sb"}')
        holders.append(wire.number)
        if wire.number == 0:
            return  # the daemon dies
        await wire.reader.read()
        holders.remove(wire.number)

    async with stub(tmp_path / "s", hold):
        transport = Transport(Endpoint(socket=tmp_path / "s"))
        lease = await Lease.hold(Api(transport), "sb")
        while 1 not in holders:
            await asyncio.sleep(0.01)
        lease.release()
        while 1 in holders:
            await asyncio.sleep(0.01)
        transport.close()


@pytest.mark.anyio
async def test_a_lease_on_nothing(tmp_path: Path) -> None:
    async def refuse(wire: Wire) -> None:
        request = await wire.request()
        assert request is not None
        await wire.upgrade(request)
        error = {"code": "sandbox_unknown", "message": "no", "family": "NotFound"}
        await wire.frame(TEXT, json.dumps({"type": "error", "error": error}).encode())

    async with stub(tmp_path / "s", refuse):
        transport = Transport(Endpoint(socket=tmp_path / "s"))
        with pytest.raises(NotFound):
            await Lease.hold(Api(transport), "sb")
        transport.close()


@pytest.mark.anyio
async def test_an_attachment_that_begins_with_nonsense(tmp_path: Path) -> None:
    from stoker.client.attachment import Attachment, Offsets

    async def nonsense(wire: Wire) -> None:
        request = await wire.request()
        assert request is not None
        await wire.upgrade(request)
        await wire.read_frame()
        await wire.frame(TEXT, [b"{}", b"[", b'{"type":"exit"}', b'{"type":"ack","bytes":1}'][wire.number % 4])

    async with stub(tmp_path / "s", nonsense):
        transport = Transport(Endpoint(socket=tmp_path / "s"))
        for _ in range(4):
            with pytest.raises(StokerError) as caught:
                await Attachment.attach(Api(transport), "/v1/a", Offsets())
            assert caught.value.code == "bad_websocket"
        transport.close()


def test_progress_is_silent_for_a_second(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from stoker.api.models import Progress

    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Following(quiet=False) as following:
        following.step(Progress(step="building the image", done=1, total=10))
        assert capsys.readouterr().err == ""
        now[0] += 1.5
        following.step(Progress(step="building the image", done=5, total=10))
        following.step(Progress(step="booting"))
    assert "building the image" in capsys.readouterr().err
