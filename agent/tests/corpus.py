#!/usr/bin/env python3
"""Makes the small corpus the fuzzers start from: agent/fuzz/corpus. usage: corpus.py DIR"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from wire import ACK, CALL, DATA, EOF, PING, frame, pack, preamble


def record(kind: int, channel: int = 0, offset: int = 0, payload: bytes = b"") -> bytes:
    return bytes([kind, channel]) + offset.to_bytes(2, "little") + len(payload).to_bytes(2, "little") + payload


def main(where: Path) -> None:
    def put(target: str, name: str, data: bytes) -> None:
        (where / target).mkdir(parents=True, exist_ok=True)
        (where / target / name).write_bytes(data)

    n = bytes(range(16))
    put("parser", "frames", b"\x05" + preamble(n) + frame(DATA, 5, 0, b"hello") + frame(EOF, 5, 5))
    put("parser", "torn", b"\xff" + preamble(n) + frame(DATA, 5, 0, b"x" * 200)[:99] + bytes(200) + preamble(n) + frame(ACK, 5, 9))
    vectors = json.loads((Path(__file__).parent.parent / "vectors" / "msgpack.json").read_text())["msgpack"]
    for i in (11, 17, 31, 33, 34, 35, 40, 50):
        put("msgpack", f"vector{i}", bytes.fromhex(vectors[i]["hex"]))
    exec_map = {
        "m": "exec",
        "id": 1,
        "argv": ["sh", b"-c", "x"],
        "env": {"A": "b", "PATH": b"/bin"},
        "clear_env": False,
        "cwd": "~/x",
        "user": "root:0",
        "groups": [1, 2],
        "tty": False,
        "stdin": True,
        "mode": "discard",
        "ring": 4096,
        "tag": "t",
        "rlimits": [[7, 1, -1]],
        "umask": 18,
        "attach": True,
        "builtin": False,
        "args": {"path": "/"},
    }
    calls = [
        {"m": "configure", "env": {"C": "d"}, "user": "root", "workdir": "/w", "hostname": "h", "init": "image"},
        exec_map,
        {"m": "attach", "id": 1, "out": 3, "err": None},
        {"m": "stream", "id": 1, "mode": "block", "window": 10},
        {"m": "signal", "id": 1, "signal": 9},
        {"m": "resize", "id": 1, "rows": 3, "cols": 4},
        {"m": "processes", "after": 0},
        {"m": "detach", "id": 1},
        {"m": "info"},
        {"m": "sync"},
        {"m": "grow", "device": "/dev/nothing", "path": "/nowhere"},
        {"m": "time", "realtime": 1},
        {"m": "reseed", "entropy": b"1234"},
        {"m": "shutdown", "how": "poweroff", "grace": 1},
        {"m": "forget", "id": 1},
    ]
    everything = b""
    for i, call in enumerate(calls):
        put("stream", f"call{i}", record(CALL, i, 0, pack(call)))
        everything += record(CALL, i, 0, pack(call))
        if call["m"] == "exec":
            everything += (
                record(DATA, 4, 0, b"input")
                + record(DATA, 4, 3, b"utmore")
                + record(ACK, 5, 4)
                + record(EOF, 4, 9)
                + record(PING, 0, 0, b"p")
                + record(0xFD)
            )
    put("stream", "everything", everything + record(0xFF, 0, 0, b"junk") + record(0xFE) + everything)
    put("stream", "terminal", record(CALL, 1, 0, pack({**exec_map, "tty": True, "rows": 5})) + record(DATA, 4, 0, b"x"))
    connect = {"m": "connect", "id": 1 << 27, "to": bytes([2, 0, 0, 80, 127, 0, 0, 1]) + bytes(8)}
    put(
        "stream",
        "connection",
        record(CALL, 1, 0, pack(connect))
        + record(DATA, 0xC0, 0, b"question")
        + record(ACK, 0xC1, 3)
        + record(0xFE)
        + record(CALL, 2, 0, pack({"m": "attach", "id": 1 << 27, "out": 0, "err": None}))
        + record(EOF, 0xC0, 8)
        + record(CALL, 3, 0, pack({**connect, "id": (1 << 27) + 1}))
        + record(CALL, 4, 0, pack({"m": "forget", "id": 1 << 27})),
    )
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        out = io.BytesIO()
        with tarfile.open(
            fileobj=out, mode="w", format=kind, pax_headers={"comment": "x"} if kind == tarfile.PAX_FORMAT else None
        ) as tar:
            for name, size in (("a/b", 3), ("long" * 50, 0), ("é", 600)):
                m = tarfile.TarInfo(name)
                m.size, m.mtime = size, 12345
                tar.addfile(m, io.BytesIO(b"x" * size))
        put("tar", f"format{kind}", out.getvalue()[:8192])
    put("tar", "users", b"uroot:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:\n\nbad\ng:x:7:bob,alice\n")

    def word(text: bytes) -> bytes:
        return len(text).to_bytes(4) + text

    def packet(kind: int, body: bytes) -> bytes:
        return word(bytes([kind]) + bytes(4) + body)

    path, none, handle = word(b"a/b"), bytes(4), word(b"\0")
    attributes = b"\x80\0\0\x0f" + bytes(range(28)) + (1).to_bytes(4) + word(b"name") + word(b"value")
    requests = [
        (1, b""),
        (3, path + b"\0\0\0\x1b" + attributes),
        (11, path),
        *((kind, handle) for kind in (4, 8, 12)),
        (5, handle + bytes(8) + b"\0\0\x10\0"),
        (6, handle + bytes(8) + word(b"data")),
        (10, handle + attributes),
        *((kind, path + attributes) for kind in (9, 14)),
        *((kind, path) for kind in (7, 13, 15, 16, 17, 19)),
        *((kind, path + path) for kind in (18, 20)),
        *((200, word(name + b"@openssh.com") + path + path) for name in (b"posix-rename", b"hardlink", b"statvfs", b"expand-path")),
        *((200, word(name + b"@openssh.com") + handle + none) for name in (b"fstatvfs", b"fsync", b"limits")),
        (200, word(b"lsetstat@openssh.com") + path + attributes),
        (200, word(b"expand-path@openssh.com") + word(b"~user/x")),
    ]
    for i, (kind, body) in enumerate(requests):
        put("sftp", f"request{i}", packet(3, path + b"\0\0\0\x02" + none) + packet(11, path) + packet(kind, body))
    put("sftp", "all", b"".join(packet(kind, body) for kind, body in requests))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
