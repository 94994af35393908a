"""What HTTP knows about sending a file: validators, ranges, compression. Pure functions, and one stream wrapper."""

from __future__ import annotations

import re
import zlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from urllib.parse import quote

import anyio

from stoker.api.models import FileInfo

__all__ = [
    "Range",
    "Unsatisfiable",
    "accepts_gzip",
    "disposition",
    "entity_tag",
    "fresh",
    "gzipped",
    "last_modified",
    "requested_range",
]

PIECE = 256 << 10
_RANGE = re.compile(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII)
_UNSAFE = re.compile(r"[^!#-\[\]-~]")


@dataclass(frozen=True, slots=True)
class Range:
    """``length`` bytes from ``offset`` on."""

    offset: int
    length: int


class Unsatisfiable(Exception):
    """The range lies outside the file (416)."""


def entity_tag(info: FileInfo) -> str:
    """Quoted, and safe in a header whatever the guest said."""
    tag = _UNSAFE.sub("", info.etag)[:128] or f"{info.modified_at:.9f}-{info.size}"
    return f'"{tag}"'


def last_modified(info: FileInfo) -> str:
    return formatdate(min(max(info.modified_at, 0.0), 253402300799.0), usegmt=True)


def _tags(value: str) -> set[str]:
    return {tag.strip().removeprefix("W/") for tag in value.split(",")}


def fresh(info: FileInfo, none_match: str | None, modified_since: str | None) -> bool:
    """Whether what the client has is still right (304). An entity tag that is given counts alone."""
    if none_match is not None:
        tags = _tags(none_match)
        tag = entity_tag(info)
        return "*" in tags or tag in tags or f'{tag[:-1]}-gzip"' in tags
    if modified_since is None:
        return False
    try:
        return int(info.modified_at) <= parsedate_to_datetime(modified_since).timestamp()
    except (ValueError, TypeError, OverflowError):
        return False


def requested_range(info: FileInfo, value: str | None, if_range: str | None) -> Range | None:
    """The one range that is asked for; None: all of it. Several ranges, or another unit, are answered with all of it."""
    if value is None or (if_range is not None and if_range not in (entity_tag(info), last_modified(info))):
        return None
    match = _RANGE.fullmatch(value.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        length = min(int(match[2]), info.size)
        if length == 0:
            raise Unsatisfiable
        return Range(info.size - length, length)
    first = int(match[1])
    last = int(match[2]) if match[2] else info.size - 1
    if match[2] and last < first:
        return None
    if first >= info.size:
        raise Unsatisfiable
    return Range(first, min(last, info.size - 1) - first + 1)


def accepts_gzip(value: str | None) -> bool:
    for part in (value or "").lower().split(","):
        name, _, rest = part.strip().partition(";")
        if name.strip() in ("gzip", "x-gzip"):
            quality = re.search(r"q\s*=\s*([\d.]+)", rest)
            return quality is None or float(quality[1].strip(".") or 0) > 0
    return False


def disposition(name: str) -> bytes:
    """Always a download: a file of a guest never becomes a page of ours."""
    return f"attachment; filename*=UTF-8''{quote(name, safe='')}".encode()


@asynccontextmanager
async def gzipped(source: AbstractAsyncContextManager[AsyncIterator[bytes]]) -> AsyncIterator[AsyncIterator[bytes]]:
    """The same, compressed off the loop."""

    async def pieces(plain: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        pack = zlib.compressobj(level=1, wbits=31)
        async for piece in plain:
            packed = await anyio.to_thread.run_sync(pack.compress, piece)
            if packed:
                yield packed
        yield pack.flush()

    async with source as plain:
        yield pieces(plain)
