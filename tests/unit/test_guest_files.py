"""Applets that lie, fall silent or crash."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guest_peer import Peer, peered
from stoker.errors import GuestError, NotFound, StokerError
from stoker.guest.files import Files
from stoker.guest.frames import CALL, DATA, EOF

pytestmark = pytest.mark.anyio
ENTRY = {"path": b"/a", "name": b"a", "type": "file", "size": 1, "mode": 0o644, "mtime": -5, "new": []}


@pytest.fixture
def path(short_dir: Path) -> Path:
    return short_dir / "agent"


def record(value: Any) -> bytes:
    data = value if isinstance(value, bytes) else msgspec.msgpack.encode(value)
    return struct.pack("<I", len(data)) + data


def applet(out: bytes, *, err: bytes = b"", code: int | None = 0, signal: int | None = None) -> Callable[[Peer], Awaitable[None]]:
    """Answers every exec with these bytes and this end."""

    async def script(peer: Peer) -> None:
        while True:
            frame = await peer.next()
            if frame.type != CALL:
                continue  # standard input
            number, arguments = frame.channel, msgspec.msgpack.decode(frame.payload)
            if arguments["m"] != "exec":
                continue
            assert arguments["builtin"] is True
            id = arguments["id"]
            peer.reply(number, {"pid": 7, "started": 1})
            for at in range(0, len(out), 60000):
                peer.send(DATA, id * 4 + 1, at, out[at : at + 60000])
            peer.send(DATA, id * 4 + 2, 0, err)
            peer.send(EOF, id * 4 + 1, len(out))
            peer.send(EOF, id * 4 + 2, len(err))
            peer.event(id, "exit", code=code, signal=signal)

    return script


async def whole(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([data async for data in pieces])


async def read(files: Files) -> bytes:
    async with files.open("/a") as pieces:
        return await whole(pieces)


@pytest.mark.parametrize(
    "out",
    [
        b"",
        b"\x01",
        record(ENTRY)[:-1],
        record(ENTRY) + b"x",
        record({**ENTRY, "type": "imaginary"}),
        record({**ENTRY, "mode": 0o100644}),
        record({**ENTRY, "path": None}),
        record(b"\xc1"),
        record([1]),
        struct.pack("<I", 2**32 - 1) + b"x" * 100_000,
    ],
)
async def test_answers_that_are_none(path: Path, out: bytes) -> None:
    async with peered(path, applet(out)) as agent:
        with pytest.raises(GuestError) as info:
            await Files(agent).stat("/a")
        assert info.value.code == "protocol_error"
        with pytest.raises(GuestError):
            await Files(agent).list("/a")
        with pytest.raises(GuestError):
            async with Files(agent).watch("/a"):
                pass


@pytest.mark.parametrize(
    "out",
    [
        record(ENTRY),
        record({"end": True}) + record(ENTRY),
        record(ENTRY) * 4 + record({"end": True}),
        struct.pack("<I", 65537),
    ],
)
async def test_listings_that_do_not_end_or_do_not_stop(path: Path, out: bytes) -> None:
    async with peered(path, applet(out)) as agent:
        with pytest.raises(GuestError) as info:
            await Files(agent).list("/a", limit=2)
        assert info.value.code == "protocol_error"


async def test_a_good_listing(path: Path) -> None:
    async with peered(path, applet(record(ENTRY) * 3000 + record({"end": True, "truncated": True, "unreadable": 2}))) as agent:
        listing = await Files(agent).list("/a")
    assert (len(listing.entries), listing.truncated, listing.unreadable) == (3000, True, 2)
    assert listing.entries[0].mtime == -5


@pytest.mark.parametrize(
    ("err", "code", "signal", "family", "expected"),
    [
        (
            msgspec.msgpack.encode({"code": "file_not_found", "message": "no \x1b[2J", "path": b"/\xff"}),
            1,
            None,
            NotFound,
            "file_not_found",
        ),
        (msgspec.msgpack.encode({"code": "brand_new", "message": "x"}), 1, None, GuestError, "brand_new"),
        (msgspec.msgpack.encode({"code": "../../x", "message": "x"}), 1, None, GuestError, "io"),
        (b"Segmentation \x07fault", 1, None, GuestError, "applet_failed"),
        (b"", None, 11, GuestError, "applet_failed"),
        (b"\x81" * 40000, 1, None, GuestError, "applet_failed"),
    ],
)
async def test_failures(
    path: Path, err: bytes, code: int | None, signal: int | None, family: type[StokerError], expected: str
) -> None:
    async with peered(path, applet(b"", err=err, code=code, signal=signal)) as agent:
        files = Files(agent)
        for operation in (files.stat("/a"), read(files), files.list("/a"), files.write("/a", b"x"), files.tar_in("/a", b"x")):
            with pytest.raises(family) as info:
                await operation
            assert type(info.value) is family
            assert info.value.code == expected
            assert info.value.message.isprintable()


async def test_a_read_that_fails_in_the_middle_is_not_a_short_file(path: Path) -> None:
    error = msgspec.msgpack.encode({"code": "io", "message": "a bad sector"})
    async with peered(path, applet(b"half", err=error, code=1)) as agent:
        with pytest.raises(GuestError, match="bad sector"):
            await read(Files(agent))


async def test_a_writer_whose_applet_has_died_learns_why(path: Path) -> None:
    error = msgspec.msgpack.encode({"code": "no_space", "message": "the disk is full"})

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(100_000)
            await asyncio.sleep(0)

    async with peered(path, applet(b"", err=error, code=1)) as agent:
        with pytest.raises(StokerError, match="disk is full"):
            await Files(agent).write("/a", endless())
