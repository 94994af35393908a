"""Bytes in JSON: text where they are UTF-8, base64 where not. Large ones are converted off the loop."""

from __future__ import annotations

import base64
import binascii

import anyio

from stoker.errors import InvalidRequest

__all__ = ["inline_bytes", "inline_text"]

LARGE = 256 << 10


def _bytes(text: str, is_base64: bool) -> bytes:
    if not is_base64:
        return text.encode()
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("bad_base64", "the data is not base64") from None


def _text(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return base64.b64encode(data).decode(), True


async def inline_bytes(text: str, is_base64: bool) -> bytes:
    return await anyio.to_thread.run_sync(_bytes, text, is_base64) if len(text) > LARGE else _bytes(text, is_base64)


async def inline_text(data: bytes) -> tuple[str, bool]:
    """The text, and whether it is base64."""
    return await anyio.to_thread.run_sync(_text, data) if len(data) > LARGE else _text(data)
