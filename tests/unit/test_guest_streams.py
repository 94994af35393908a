"""Offsets, windows, acknowledgements and what survives a lost connection, without one."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.errors import Conflict, GuestError
from stoker.guest.frames import DATA, EOF, MAX_PAYLOAD
from stoker.guest.messages import STDIN_WINDOW
from stoker.guest.streams import OutputStream, Stdin

pytestmark = pytest.mark.anyio
WINDOW = 1 << 20


class Recorder:
    """A link that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, int, bytes]] = []
        self.acks: list[int] = []

    def send(self, type: int, channel: int, offset: int = 0, payload: bytes | memoryview = b"") -> None:
        self.sent.append((type, channel, offset, bytes(payload)))

    def send_ack(self, channel: int, offset: int) -> None:
        self.acks.append(offset)

    async def drain(self) -> None:
        pass


def output(link: Recorder | None = None, *, window: int = WINDOW, start: int | None = 0, strict: bool = True) -> OutputStream:
    return OutputStream(5, link or Recorder(), window=window, start=start, strict=strict)


async def test_a_consumer_that_waits_is_woken_by_data_and_by_the_end() -> None:
    stream = output()
    reading = asyncio.create_task(stream.read_all())
    await asyncio.sleep(0)
    stream.on_data(0, b"ab")
    stream.on_data(2, b"cd")
    stream.on_eof(4)
    assert await reading == b"abcd"
    assert stream.at_eof
    assert await stream.read() == b""


async def test_small_pieces_are_joined_and_reads_are_bounded() -> None:
    stream = output()
    for i in range(1000):
        stream.on_data(i, b"x")
    assert len(await stream.read(10)) == 10
    assert stream.offset == 10
    assert len(await stream.read()) == 990


async def test_taking_is_what_acknowledges_a_quarter_window_at_a_time() -> None:
    link = Recorder()
    stream = output(link)
    for i in range(16):
        stream.on_data(i * MAX_PAYLOAD, bytes(MAX_PAYLOAD))
    assert link.acks == []
    for _ in range(16):
        await stream.read()
    assert link.acks == [WINDOW // 4, WINDOW // 2, WINDOW // 4 * 3, WINDOW]


async def test_a_window_is_a_bound() -> None:
    stream = output(window=MAX_PAYLOAD)
    stream.on_data(0, bytes(MAX_PAYLOAD))
    with pytest.raises(GuestError, match="more than its window"):
        for i in range(1, 4):
            stream.on_data(i * MAX_PAYLOAD, bytes(MAX_PAYLOAD))


def test_byte_by_byte_takes_no_more_memory_than_the_window() -> None:
    window = 128 << 10
    stream = output(window=window)
    tracemalloc.start()
    try:
        for i in range(window):
            stream.on_data(i, b"x")
        assert tracemalloc.get_traced_memory()[1] < 2 * window
    finally:
        tracemalloc.stop()


def test_empty_frames_and_gaps_take_no_memory_without_bound() -> None:
    stream = output(strict=False)
    tracemalloc.start()
    try:
        for _ in range(100_000):
            stream.on_data(0, b"")
        with pytest.raises(GuestError, match="gaps"):
            for i in range(100_000):
                stream.on_data(i * 10, b"x")
        assert tracemalloc.get_traced_memory()[1] < WINDOW
    finally:
        tracemalloc.stop()


async def test_gaps_are_counted_and_their_offsets_told() -> None:
    stream = output(strict=False, start=None)
    stream.on_data(100, b"a" * 5000)
    stream.on_data(9000, b"b" * 5000)
    stream.on_data(14000, b"c")
    stream.on_eof(14001)
    assert stream.lost == 3900
    assert await stream.read_at() == (100, b"a" * 5000)
    assert await stream.read_at(1) == (9000, b"b")
    at, data = await stream.read_at()
    assert (at, data[:5]) == (9001, b"b" * 5)
    rest = data[4999:] or await stream.read()
    assert rest == b"c"
    assert await stream.read_at() == (14001, b"")


@given(st.lists(st.tuples(st.integers(0, 50), st.binary(max_size=30)), max_size=30))
def test_whatever_comes_is_in_order_or_an_error(frames: list[tuple[int, bytes]]) -> None:
    stream = output(window=200, strict=False)
    expected = 0
    for offset, data in frames:
        try:
            stream.on_data(offset, data)
        except GuestError as e:
            assert e.code == "protocol_error"
            assert offset < expected
            return
        if data:
            assert offset >= expected
            expected = offset + len(data)
        assert stream.buffered <= 200 + MAX_PAYLOAD


async def test_an_output_goes_on_over_the_next_connection() -> None:
    stream = output()
    stream.on_data(0, b"one")
    stream.on_lost(None)
    assert await stream.read() == b"one"
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    assert not reading.done()
    link = Recorder()
    assert stream.resume_at == 3
    stream.on_link(link)
    assert link.acks == [3]
    stream.on_data(3, b"two")
    assert await reading == b"two"


async def test_what_lies_here_at_a_reconnection_comes_on_top_of_the_window_once() -> None:
    stream = output()
    position = 0
    for round in range(2):
        while stream.buffered < WINDOW * (round + 1):
            stream.on_data(position, bytes(MAX_PAYLOAD))
            position += MAX_PAYLOAD
        stream.on_lost(None)
        stream.on_link(Recorder())
    with pytest.raises(GuestError, match="window"):
        for _ in range(20):
            stream.on_data(position, bytes(MAX_PAYLOAD))
            position += MAX_PAYLOAD


async def test_a_lost_output_gives_its_buffer_first() -> None:
    stream = output()
    stream.on_data(0, b"one")
    stream.on_lost(GuestError("agent_lost", "gone"))
    assert await stream.read() == b"one"
    with pytest.raises(GuestError, match="gone"):
        await stream.read()


async def test_collecting_keeps_the_first_bytes_and_acknowledges_all() -> None:
    link = Recorder()
    stream = output(link)
    stream.on_data(0, b"before")
    kept = stream.collect(10)
    for i in range(20):
        stream.on_data(6 + i * MAX_PAYLOAD, b"y" * MAX_PAYLOAD)
    stream.on_eof(6 + 20 * MAX_PAYLOAD)
    assert bytes(kept) == b"beforeyyyy"
    assert link.acks[-1] > WINDOW
    assert stream.buffered == 0


async def test_stdin_waits_for_its_window() -> None:
    link = Recorder()
    stdin = Stdin(4, link)
    data = bytes(range(256)) * 4096
    writing = asyncio.create_task(stdin.write(data))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not writing.done()
    assert stdin.unacknowledged == STDIN_WINDOW
    acked = 0
    while not writing.done():
        acked += 50_000
        stdin.on_ack(min(acked, sum(len(frame[3]) for frame in link.sent)))
        for _ in range(5):
            await asyncio.sleep(0)
        assert stdin.unacknowledged <= STDIN_WINDOW
    assert b"".join(frame[3] for frame in link.sent) == data
    stdin.close()
    stdin.close()
    assert link.sent[-1] == (EOF, 4, len(data), b"")
    assert [frame[0] for frame in link.sent].count(EOF) == 1
    with pytest.raises(Conflict, match="closed"):
        await stdin.write(b"x")


@given(st.lists(st.binary(min_size=1, max_size=100), min_size=1, max_size=10), st.data())
def test_stdin_is_sent_again_from_what_the_agent_wants(parts: list[bytes], data: st.DataObject) -> None:
    link, total = Recorder(), b"".join(parts)
    stdin = Stdin(4, link)
    for part in parts:
        stdin.write_now(part)
    closed = data.draw(st.booleans())
    if closed:
        stdin.close()
    acked = data.draw(st.integers(0, len(total)))
    stdin.on_ack(acked)
    wanted = data.draw(st.integers(acked, len(total)))
    stdin.on_lost(None)
    again = Recorder()
    stdin.on_link(again, wanted)
    frames = [frame for frame in again.sent if frame[0] == DATA]
    if wanted > acked:
        # A byte the agent has, to hear how far the process is.
        assert frames.pop(0) == (DATA, 4, acked, total[acked : acked + 1])
    assert b"".join(frame[3] for frame in frames) == total[wanted:]
    position = wanted
    for frame in frames:
        assert frame[2] == position
        position += len(frame[3])
    assert [frame[2] for frame in again.sent if frame[0] == EOF] == ([len(total)] if closed else [])
    for wrong in (acked - 1, len(total) + 1):
        with pytest.raises(GuestError, match="wants"):
            stdin.on_link(Recorder(), wrong)


async def test_a_writer_waits_through_a_lost_connection() -> None:
    stdin = Stdin(4, Recorder())
    stdin.on_lost(None)
    writing = asyncio.create_task(stdin.write(b"data"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not writing.done()
    link = Recorder()
    stdin.on_link(link, 0)
    await writing
    assert link.sent == [(DATA, 4, 0, b"data")]


async def test_nobody_reads_stdin() -> None:
    stdin = Stdin(4, Recorder())
    writing = asyncio.create_task(stdin.write(bytes(STDIN_WINDOW + 1)))
    for _ in range(10):
        await asyncio.sleep(0)
    stdin.on_refused()
    with pytest.raises(Conflict, match="does not read"):
        await writing
    await stdin.drain()
    assert stdin.unacknowledged == 0
