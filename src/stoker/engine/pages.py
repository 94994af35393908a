"""Pages of a sorted list.

A cursor names the last element seen, not a position: what comes and goes between two pages moves nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from stoker.errors import InvalidRequest

__all__ = ["page_after"]

T = TypeVar("T")
Key = tuple[float, str]


def page_after(values: Sequence[T], limit: int, cursor: str | None, key: Callable[[T], Key]) -> tuple[list[T], str | None]:
    """The first ``limit`` of ``values`` (descending by ``key``) behind the cursor, and the cursor for the next page."""
    if cursor is not None:
        after = _decode(cursor)
        values = [value for value in values if key(value) < after]
    page = list(values[: max(1, limit)])
    return page, _encode(key(page[-1])) if len(values) > len(page) else None


def _encode(key: Key) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def _decode(cursor: str) -> Key:
    try:
        padded = cursor.encode() + b"=" * (-len(cursor) % 4)
        key: Key = msgspec.json.decode(base64.b64decode(padded, altchars=b"-_", validate=True), type=Key)
        return key
    except (binascii.Error, ValueError, msgspec.DecodeError):
        raise InvalidRequest("bad_cursor", f"{cursor[:80]!r} is not a cursor", "pass on what `next` held, unchanged") from None
