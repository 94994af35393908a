"""What can be uploaded, as pieces: text, bytes, open files, iterables. Files are read in a thread: a disk or pipe may be slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import cast

from stoker.client.results import Data
from stoker.errors import InvalidRequest

__all__ = ["as_bytes", "chunks"]

PIECE = 256 << 10


def as_bytes(data: Data) -> bytes | None:
    """The whole of it where it is in memory already."""
    if isinstance(data, str):
        return data.encode("utf-8", "surrogateescape")
    return bytes(data) if isinstance(data, bytes | bytearray | memoryview) else None


async def chunks(data: Data) -> AsyncIterator[bytes]:
    """Pieces of at most 256 KiB where we cut them; an iterable's own pieces otherwise."""
    whole = as_bytes(data)
    if whole is not None:
        for start in range(0, len(whole), PIECE):
            yield whole[start : start + PIECE]
    elif isinstance(data, AsyncIterable):
        async for piece in data:
            yield piece
    elif hasattr(data, "read"):
        while piece := await asyncio.to_thread(data.read, PIECE):
            if not isinstance(piece, bytes):
                raise InvalidRequest("text_file", "the file was opened as text", "open it with mode 'rb'")
            yield piece
    else:
        iterator = iter(cast(Iterable[bytes], data))
        while part := await asyncio.to_thread(_next, iterator):
            yield part


def _next(iterator: Iterator[bytes]) -> bytes:
    for piece in iterator:
        if piece:
            return piece
    return b""
