"""Request bodies: whole ones with a bound, streamed ones with a bound, and neither waits for ever."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio

from stoker.errors import DeadlineExceeded, HostError, InvalidRequest, TooLarge

__all__ = ["header", "read_body", "stream_body"]

Receive = Callable[[], Awaitable[Any]]
IDLE = 60.0
"""A client that sends nothing for so long in the middle of a body is given up."""
PIECE = 256 << 10


def header(headers: list[tuple[bytes, bytes]], name: bytes) -> str | None:
    """The first header of this (lower case) name."""
    return next((value.decode("latin-1") for key, value in headers if key == name), None)


def _declared(headers: list[tuple[bytes, bytes]], bound: int) -> None:
    length = header(headers, b"content-length")
    if length is not None and length.isascii() and length.isdigit() and int(length) > bound:
        raise TooLarge("body_too_large", f"the body has {length} bytes, more than {bound}", "send less, or upload it as a file")


async def _receive(receive: Receive) -> tuple[bytes, bool]:
    try:
        with anyio.fail_after(IDLE):
            message = await receive()
    except TimeoutError:
        raise DeadlineExceeded("body_timeout", f"nothing of the body came for {IDLE:.0f} s") from None
    if message["type"] == "http.disconnect":
        raise HostError("client_gone", "the client went away in the middle of the body")
    return message.get("body", b""), message.get("more_body", False)


async def read_body(headers: list[tuple[bytes, bytes]], receive: Receive, bound: int) -> bytes:
    """The whole body, at most ``bound`` bytes."""
    _declared(headers, bound)
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        data, more = await _receive(receive)
        size += len(data)
        if size > bound:
            raise TooLarge("body_too_large", f"the body has more than {bound} bytes", "send less, or upload it as a file")
        parts.append(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def stream_body(headers: list[tuple[bytes, bytes]], receive: Receive, bound: int) -> AsyncIterator[bytes]:
    """The body as it comes, at most ``bound`` bytes (after ``Content-Encoding: gzip`` was undone)."""
    encoding = (header(headers, b"content-encoding") or "identity").lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise InvalidRequest("bad_encoding", f"the body's encoding {encoding!r} is not known", "send identity or gzip")
    _declared(headers, bound)
    size = 0
    pieces = _plain(receive) if encoding == "identity" else _gunzip(_plain(receive))
    async for data in pieces:
        size += len(data)
        if size > bound:
            raise TooLarge("body_too_large", f"the body has more than {bound} bytes")
        yield data


async def _plain(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        data, more = await _receive(receive)
        if data:
            yield data


async def _gunzip(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Undone a piece at a time and off the loop: a small body may unpack to a large one."""
    unpack = zlib.decompressobj(wbits=31)
    async for data in pieces:
        rest = data
        while rest:
            if unpack.eof:
                unpack = zlib.decompressobj(wbits=31)
            try:
                plain = await anyio.to_thread.run_sync(unpack.decompress, rest, PIECE)
            except zlib.error as e:
                raise InvalidRequest("bad_encoding", f"the body is not gzip: {e}") from None
            if plain:
                yield plain
            rest = unpack.unused_data if unpack.eof else unpack.unconsumed_tail
    while not unpack.eof:
        plain = await anyio.to_thread.run_sync(unpack.decompress, b"", PIECE)
        if not plain:
            raise InvalidRequest("bad_encoding", "the gzip body ends too early")
        yield plain
