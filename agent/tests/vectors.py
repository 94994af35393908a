#!/usr/bin/env python3
"""Test vectors of the agent protocol, for the C side and the Python side alike.

usage: vectors.py generate DIR | check DIR PROGRAM

They are made here from the document alone (wire.py), with neither implementation. frames.json: what a frame looks like;
streams.json: what a receiver (an agent: damage makes it hunt) finds in a stream of bytes, however it is cut; msgpack.json: values
as text (`s:` and `b:` with hexadecimal bytes, {key=value}), or `bad` for what must be refused.
"""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from wire import ACK, CALL, DATA, EOF, EVENT, HELLO, PING, REPLY, WELCOME, frame, pack, preamble

random.seed(20261121)
N1, N2 = bytes(range(16)), bytes(range(200, 216))


def frame_vectors() -> list[dict[str, Any]]:
    found = []
    cases = [
        (HELLO, 0, 0, pack({"min": 1, "max": 1, "host": "stoker"})),
        (WELCOME, 0, 0, pack({"version": 1})),
        (CALL, 1, 0, pack({"m": "processes"})),
        (REPLY, 0xFFFFFFFF, 0, pack({})),
        (CALL, 2, 0, pack({"m": "connect", "id": 1 << 27, "to": bytes([2, 0, 0, 80, 127, 0, 0, 1]) + bytes(8)})),
        (DATA, 1 << 29, 0, b"GET / HTTP/1.1\r\n\r\n"),
        (EVENT, (1 << 28) - 1, 0, pack({"e": "stdin_closed"})),
        (DATA, 5, 0, b"hello\n"),
        (DATA, 4 * ((1 << 28) - 1) + 2, 2**64 - 1, b"\0" * 9),
        (ACK, 5, 6, b""),
        (EOF, 5, 1 << 40, b""),
        (PING, 0, 0, bytes(range(256))),
        (0xFF, 0, 0, b"SK" * 20),
    ]
    for kind, channel, offset, payload in cases:
        found.append(
            {
                "type": kind,
                "channel": channel,
                "offset": offset,
                "payload_hex": payload.hex(),
                "wire_hex": frame(kind, channel, offset, payload).hex(),
            }
        )
    return found


def event(kind: int, channel: int, offset: int, payload: bytes) -> dict[str, Any]:
    return {"event": "frame", "type": kind, "channel": channel, "offset": offset, "payload_hex": payload.hex()}


def stream_vectors() -> list[dict[str, Any]]:
    def preamble_event(nonce: bytes) -> dict[str, Any]:
        return {"event": "preamble", "nonce_hex": nonce.hex()}

    damage = {"event": "damage"}
    one, two = (DATA, 5, 10, b"one"), (EOF, 6, 3, b"")
    f1, f2 = frame(*one), frame(*two)
    flipped = bytearray(frame(CALL, 3, 0, b"x" * 40))
    flipped[9] ^= 1
    trailer = bytearray(frame(CALL, 3, 0, b"x" * 40))
    trailer[-2] ^= 0x80
    torn = frame(DATA, 9, 0, b"y" * 300)[:150]
    too_long = struct.pack("<2sBBIQI", b"SK", DATA, 0, 5, 0, 65537)
    import zlib

    too_long += struct.pack("<I", zlib.crc32(too_long))
    inside = frame(DATA, 5, 0, preamble(N2) + b"rest")
    bad_nonce = bytearray(preamble(N2))
    bad_nonce[20] ^= 1
    cases = [
        ("frames before any preamble are not seen", f1 + preamble(N1) + f2, [preamble_event(N1), event(*two)]),
        (
            "noise and zeros before it",
            bytes(500) + b"\xf5STOKER\xf5" + preamble(N1) + f1 + f2,
            [preamble_event(N1), event(*one), event(*two)],
        ),
        (
            "a preamble that is cut short, then a whole one",
            preamble(N2)[:20] + preamble(N1) + f1,
            [preamble_event(N1), event(*one)],
        ),
        ("a preamble with a bad checksum", bytes(bad_nonce) + f1 + preamble(N1) + f2, [preamble_event(N1), event(*two)]),
        (
            "a header with a flipped bit",
            preamble(N1) + f1 + bytes(flipped) + f2 + preamble(N2) + f1,
            [preamble_event(N1), event(*one), damage, preamble_event(N2), event(*one)],
        ),
        (
            "a wrong trailer",
            preamble(N1) + bytes(trailer) + f2 + preamble(N2) + f1,
            [preamble_event(N1), damage, preamble_event(N2), event(*one)],
        ),
        (
            "a torn frame, zeros, a new preamble",
            preamble(N1) + torn + bytes(400) + preamble(N2) + f2,
            [preamble_event(N1), damage, preamble_event(N2), event(*two)],
        ),
        (
            "a payload longer than allowed",
            preamble(N1) + too_long + bytes(100) + preamble(N2) + f1,
            [preamble_event(N1), damage, preamble_event(N2), event(*one)],
        ),
        (
            "a preamble where a header should be",
            preamble(N1) + f1 + preamble(N2) + f2,
            [preamble_event(N1), event(*one), damage, preamble_event(N2), event(*two)],
        ),
        (
            "a preamble inside a good frame is payload",
            preamble(N1) + inside + f1,
            [preamble_event(N1), event(DATA, 5, 0, preamble(N2) + b"rest"), event(*one)],
        ),
        (
            "a preamble inside a frame with a bad trailer",
            preamble(N1) + inside[:-1] + bytes([inside[-1] ^ 0xFF]) + f1,
            [preamble_event(N1), damage, preamble_event(N2), damage],
        ),
        (
            "zeros where a header should be",
            preamble(N1) + f1 + bytes(30) + preamble(N2),
            [preamble_event(N1), event(*one), damage, preamble_event(N2)],
        ),
        (
            "an unknown type is a frame",
            preamble(N1) + frame(0x99, 1, 2, b"?") + f1,
            [preamble_event(N1), event(0x99, 1, 2, b"?"), event(*one)],
        ),
        ("an incomplete frame at the end", preamble(N1) + f1 + f2[:-1], [preamble_event(N1), event(*one)]),
    ]
    return [{"name": name, "wire_hex": wire.hex(), "events": events} for name, wire, events in cases]


def text(v: Any) -> str:
    if v is None:
        return "nil"
    if isinstance(v, bool):
        return "true" if v else "false"
    if isinstance(v, int):
        return str(v)
    if isinstance(v, str):
        return "s:" + v.encode().hex()
    if isinstance(v, bytes):
        return "b:" + v.hex()
    if isinstance(v, list):
        return "[" + ",".join(map(text, v)) + "]"
    return "{" + ",".join(f"{text(k)}={text(x)}" for k, x in v.items()) + "}"


def msgpack_vectors() -> list[dict[str, str]]:
    values: list[Any] = [
        None,
        True,
        False,
        0,
        1,
        127,
        128,
        255,
        256,
        65535,
        65536,
        2**32 - 1,
        2**32,
        2**63 - 1,
        2**64 - 1,
        -1,
        -32,
        -33,
        -128,
        -(2**31),
        -(2**63),
        "",
        "a",
        "é",
        "x" * 31,
        "x" * 32,
        "x" * 255,
        "x" * 256,
        b"",
        b"\0\xff",
        b"z" * 300,
        [],
        [1, [2, [3]]],
        list(range(20)),
        {},
        {"m": "exec", "argv": ["sh", b"-c"], "env": {"A": "b"}, "tty": False, "ring": 1 << 20},
        {f"k{i}": i for i in range(40)},
    ]
    deep: Any = 1
    for _ in range(8):
        deep = [deep]
    values.append(deep)
    found = [{"hex": pack(v).hex(), "text": text(v)} for v in values]
    # Other encodings of the same, which a reader accepts.
    for wire, shown in (
        (b"\xd0\x05", "5"),
        (b"\xd1\xff\xff", "-1"),
        (b"\xd2\x00\x00\x00\x07", "7"),
        (b"\xd3" + b"\xff" * 8, "-1"),
        (b"\xcf" + bytes(7) + b"\x01", "1"),
        (b"\xdb\x00\x00\x00\x01a", "s:61"),
        (b"\xc6\x00\x00\x00\x01a", "b:61"),
        (b"\xdd\x00\x00\x00\x01\xc0", "[nil]"),
        (b"\xdf\x00\x00\x00\x01\xa1a\x01", "{s:61=1}"),
        (b"\xca\x00\x00\x00\x00", "other"),
        (b"\xcb" + bytes(8), "other"),
        (b"\xd4\x01\x02", "other"),
        (b"\xc7\x02\x01ab", "other"),
        (b"\xd8" + bytes(17), "other"),
    ):
        found.append({"hex": wire.hex(), "text": shown})
    bad = [
        b"",
        b"\xc1",
        b"\xa1",
        b"\xd9\x05abcd",
        b"\xda\xff\xff",
        b"\xdb\xff\xff\xff\xffabc",
        b"\xc4\x01",
        b"\xc6\x7f\xff\xff\xff",
        b"\x91",
        b"\x81\xa1a",
        b"\xdc\xff\xff\xc0",
        b"\xdd\xff\xff\xff\xff\xc0\xc0",
        b"\xdf\xff\xff\xff\xff\xc0\xc0",
        b"\xcf\x00",
        b"\xd4\x01",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\x01\x01",
        b"\x90\x90",
        b"\x91" * 9 + b"\x01",
        b"\x81\xa1a" * 9 + b"\x01",
        pack({"m": "x" * 40})[:-1],
    ]
    return found + [{"hex": wire.hex(), "text": "bad"} for wire in bad]


def generate(directory: Path) -> None:
    files = {
        "frames.json": {
            "frames": frame_vectors(),
            "preambles": [{"nonce_hex": n.hex(), "wire_hex": preamble(n).hex()} for n in (N1, N2, bytes(16))],
        },
        "streams.json": {"streams": stream_vectors()},
        "msgpack.json": {"msgpack": msgpack_vectors()},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=1) + "\n")


def check(directory: Path, program: str) -> None:
    questions: list[tuple[str, str]] = []
    frames = json.loads((directory / "frames.json").read_text())
    questions += [(f"frame {v['type']} {v['channel']} {v['offset']} {v['payload_hex']}", v["wire_hex"]) for v in frames["frames"]]
    questions += [(f"stream 7 {v['wire_hex']}", f"preamble {v['wire_hex']};") for v in frames["preambles"]]
    for v in json.loads((directory / "streams.json").read_text())["streams"]:
        wanted = ""
        for e in v["events"]:
            if e["event"] == "frame":
                wanted += f"frame {e['type']} {e['channel']} {e['offset']} {e['payload_hex']};"
            elif e["event"] == "preamble":
                wanted += f"preamble {preamble(bytes.fromhex(e['nonce_hex'])).hex()};"
            else:
                wanted += "damage;"
        questions += [(f"stream {cut} {v['wire_hex']}", wanted) for cut in (1, 2, 3, 7, 25, 100, 1 << 20)]
    questions += [(f"msgpack {v['hex']}", v["text"]) for v in json.loads((directory / "msgpack.json").read_text())["msgpack"]]
    lines = "".join(q + "\n" for q, _ in questions)
    answers = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.split("\n")
    for (question, wanted), answer in zip(questions, answers, strict=False):
        if answer != wanted:
            sys.exit(f"vector {question[:300]}\n  wanted {wanted[:500]}\n  got    {answer[:500]}")
    print(f"ok      {len(questions)} vectors")


if __name__ == "__main__":
    if sys.argv[1] == "generate":
        generate(Path(sys.argv[2]))
    else:
        check(Path(sys.argv[2]), sys.argv[3])
