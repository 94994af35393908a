"""The frame parser: whole, torn, damaged and random input."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.errors import GuestError
from stoker.guest import frames
from stoker.guest.frames import DATA, MAX_PAYLOAD, PREAMBLE_SIZE, Frame, FrameParser, encode, find_preamble, preamble

VECTORS = Path(__file__).parents[2] / "agent" / "vectors"
NONCE = bytes(range(16))

some_frame = st.builds(Frame, st.integers(0, 255), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=200))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@given(st.lists(some_frame, max_size=20), st.lists(st.integers(0, 5000), max_size=20))
def test_what_was_encoded_comes_out_however_it_is_cut(sent: list[Frame], cuts: list[int]) -> None:
    parser = FrameParser()
    found: list[Frame] = []
    for piece in pieces(b"".join(encode(*frame) for frame in sent), cuts):
        found += parser.feed(piece)
    assert found == sent
    assert parser.buffered == 0


def test_every_single_byte_at_a_time() -> None:
    parser = FrameParser(expect=preamble(NONCE))
    sent = [Frame(DATA, 5, 7, b"x" * 300), Frame(frames.EOF, 5, 307, b""), Frame(frames.PONG, 0, 0, b"12345678")]
    stream = b"noise" + preamble(NONCE) + b"".join(encode(*frame) for frame in sent)
    found = [frame for i in range(len(stream)) for frame in parser.feed(stream[i : i + 1])]
    assert found == sent


@given(st.binary(max_size=3000), st.lists(st.integers(0, 3000), max_size=10))
def test_random_bytes_raise_nothing_but_a_guest_error(data: bytes, cuts: list[int]) -> None:
    for parser in (FrameParser(), FrameParser(expect=preamble(NONCE))):
        try:
            for piece in pieces(data, cuts):
                parser.feed(piece)
                assert parser.buffered <= frames.BUFFER
        except GuestError as e:
            assert e.code == "protocol_error"


@settings(max_examples=300)
@given(st.lists(some_frame, min_size=1, max_size=6), st.data())
def test_mutations_are_found_or_leave_whole_frames(sent: list[Frame], data: st.DataObject) -> None:
    """A changed header is always seen. A changed payload is not (it has no checksum), but then the length is right."""
    stream = bytearray(b"".join(encode(*frame) for frame in sent))
    where = data.draw(st.integers(0, len(stream) - 1))
    stream[where] ^= data.draw(st.integers(1, 255))
    parser = FrameParser()
    found: list[Frame] = []
    try:
        found = parser.feed(bytes(stream))
    except GuestError as e:
        assert e.code == "protocol_error"
        with pytest.raises(GuestError):
            parser.feed(encode(DATA, 1))
    else:
        assert [(f.type, f.channel, f.offset, len(f.payload)) for f in found] == [
            (f.type, f.channel, f.offset, len(f.payload)) for f in sent[: len(found)]
        ]
        assert len(found) == len(sent)


@given(st.binary(max_size=500), st.integers(0, 600))
def test_a_frame_torn_by_zeros_is_never_taken_for_whole(payload: bytes, cut: int) -> None:
    whole = encode(DATA, 9, 1234, payload)
    torn = whole[: min(cut, len(whole) - 1)] + bytes(frames.ZEROS)
    with pytest.raises(GuestError, match="protocol"):
        FrameParser().feed(torn)


def test_a_length_beyond_the_bound_is_refused_at_the_header() -> None:
    head = bytearray(encode(DATA, 1, 0, b"")[:20])
    head[16:20] = (MAX_PAYLOAD + 1).to_bytes(4, "little")
    with pytest.raises(GuestError, match="65537"):
        FrameParser().feed(bytes(head) + crc32(head).to_bytes(4, "little"))


def test_our_own_side_cannot_send_too_much() -> None:
    with pytest.raises(ValueError, match="65536"):
        encode(DATA, 1, 0, b"x" * (MAX_PAYLOAD + 1))


def test_a_trailer_is_never_zero() -> None:
    """A header CRC of a5a5a5a5 would make it zero, which is what follows a torn frame. This channel number has it."""
    header, trailer = frames.encode_parts(DATA, 0x50C449F2, 0, 0)
    assert header[20:] == b"\xa5" * 4
    assert trailer == b"\1\0\0\0"
    assert FrameParser().feed(header + trailer) == [Frame(DATA, 0x50C449F2, 0, b"")]
    with pytest.raises(GuestError, match="torn"):
        FrameParser().feed(header + bytes(4))


def test_the_hunt_ends_at_its_own_nonce_only() -> None:
    parser = FrameParser(expect=preamble(NONCE))
    other = preamble(os.urandom(16)) + encode(DATA, 1, 0, b"old")
    assert parser.feed(other) == []
    assert not parser.synchronised
    assert parser.feed(bytes(100_000) + preamble(NONCE)[:20]) == []
    assert parser.feed(preamble(NONCE)[20:] + encode(DATA, 1, 0, b"new")) == [Frame(DATA, 1, 0, b"new")]
    assert parser.synchronised


def test_the_hunt_keeps_next_to_nothing() -> None:
    parser = FrameParser(expect=preamble(NONCE))
    for _ in range(50):
        parser.feed(os.urandom(50_000))
        assert parser.buffered < PREAMBLE_SIZE


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_preamble_is_found_behind_anything(before: bytes, after: bytes) -> None:
    assert find_preamble(before + preamble(NONCE) + after) == len(before)
    damaged = bytearray(preamble(NONCE))
    damaged[20] ^= 1
    assert find_preamble(bytes(damaged)) == -1
    assert find_preamble(preamble(NONCE)[:-1]) == -1
    # One that is damaged does not hide the good one inside or behind it.
    assert find_preamble(bytes(damaged[:30]) + preamble(NONCE)) == 30


def test_the_buffer_never_grows_and_always_has_room() -> None:
    parser = FrameParser()
    rng = random.Random(1)
    big = encode(DATA, 1, 0, bytes(MAX_PAYLOAD))
    stream = big * 20
    at = found = 0
    while at < len(stream):
        room = parser.writable()
        assert len(room) >= 1
        count = min(len(room), rng.randint(1, 150_000), len(stream) - at)
        room[:count] = stream[at : at + count]
        at += count
        found += len(parser.advance(count))
        assert parser.buffered < frames.MAX_FRAME
    assert found == 20


def test_64_kib_frames_parse_at_300_mb_a_second() -> None:
    frame = encode(DATA, 5, 0, bytes(MAX_PAYLOAD))
    best = 0.0
    for _ in range(5):
        parser = FrameParser()
        begin = time.perf_counter()
        for _ in range(100):
            parser.feed(frame)
        best = max(best, 100 * MAX_PAYLOAD / 1e6 / (time.perf_counter() - begin))
    assert best >= 300


def vectors(name: str) -> list[dict[str, Any]]:
    """Test vectors, made from the document alone and shared with the agent. None at all is a failure, not a pass."""
    path = VECTORS / f"{name}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())[name] if path.exists() else []
    return found or [{"missing": str(path)}]


def by_name(vector: dict[str, Any]) -> str:
    return str(vector.get("name") or vector.get("text") or vector.get("type"))[:40]


@pytest.mark.parametrize("vector", vectors("frames"), ids=by_name)
def test_frame_vectors(vector: dict[str, Any]) -> None:
    frame = Frame(vector["type"], vector["channel"], vector["offset"], bytes.fromhex(vector["payload_hex"]))
    wire = bytes.fromhex(vector["wire_hex"])
    assert encode(*frame) == wire
    assert FrameParser().feed(wire) == [frame]


@pytest.mark.parametrize("vector", vectors("streams"), ids=by_name)
def test_stream_vectors(vector: dict[str, Any]) -> None:
    """What the host finds behind each nonce: the frames up to the damage, which ends its connection (an agent hunts on)."""
    wire = bytes.fromhex(vector["wire_hex"])
    events = vector["events"]
    starts = [i for i, event in enumerate(events) if event["event"] == "preamble"]
    assert starts
    for start in starts:
        behind = events[start + 1 :]
        ends = [i for i, event in enumerate(behind) if event["event"] != "frame"]
        expected = [
            Frame(event["type"], event["channel"], event["offset"], bytes.fromhex(event["payload_hex"]))
            for event in behind[: ends[0] if ends else None]
        ]
        for step in (1, 7, len(wire)):
            parser = FrameParser(expect=preamble(bytes.fromhex(events[start]["nonce_hex"])))
            found: list[Frame] = []
            for at in range(0, len(wire), step):
                piece = wire[at : at + step]
                parser.writable()[: len(piece)] = piece
                found += parser.advance(len(piece))
            assert found == expected
            assert (parser.failure is not None) == bool(ends)


def as_text(value: Any) -> str:
    match value:
        case None | bool():
            return {None: "nil", True: "true", False: "false"}[value]
        case int():
            return str(value)
        case str():
            return "s:" + value.encode().hex()
        case bytes():
            return "b:" + value.hex()
        case list():
            return f"[{','.join(map(as_text, value))}]"
        case dict():
            return "{" + ",".join(f"{as_text(key)}={as_text(item)}" for key, item in value.items()) + "}"
        case _:
            return "other"


@pytest.mark.parametrize("vector", vectors("msgpack"), ids=by_name)
def test_msgpack_vectors(vector: dict[str, Any]) -> None:
    """The same values on both sides. What the agent refuses must not hurt here (depth is no matter for us)."""
    data = bytes.fromhex(vector["hex"])
    try:
        text = as_text(msgspec.msgpack.decode(data))
    except (msgspec.DecodeError, ValueError, TypeError):
        text = "bad"
    if vector["text"] not in ("bad", "other"):
        assert text == vector["text"]
