"""Sizes and durations as people write them. The wire has bytes and seconds only."""

from __future__ import annotations

import re

from stoker.errors import InvalidRequest

__all__ = ["format_duration", "format_size", "parse_duration", "parse_size"]

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgtp])(?:i?b)?|b)?\s*", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_size(text: str | int) -> int:
    """``512M``, ``1.5G``, ``2GiB`` or bytes; K, M, G are powers of 1024."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidRequest("bad_size", f"{text!r} is not a size", "write bytes or a number with K, M, G or T, such as 512M")
    exponent = "bkmgtp".index((match[2] or "b").lower())
    return int(float(match[1]) * 1024**exponent) if "." in match[1] else int(match[1]) * 1024**exponent


def parse_duration(text: str | float) -> float:
    """``90``, ``90s``, ``1h30m`` or ``250ms``, in seconds."""
    if isinstance(text, (int, float)):
        return float(text)
    stripped = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", stripped, re.ASCII):
        return float(stripped)
    parts = _DURATION.findall(stripped)
    if not parts or "".join(number + unit for number, unit in parts) != stripped:
        raise InvalidRequest("bad_duration", f"{text!r} is not a duration", "write seconds or such as 90s, 30m, 1h30m, 2d")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def format_size(value: int) -> str:
    """Three figures and a unit: ``512M``, ``1.5G``."""
    size, unit = float(value), ""
    for unit in ("", "K", "M", "G", "T", "P"):
        if size < 1024 or unit == "P":
            break
        size /= 1024
    return f"{size:.0f}{unit}" if size >= 100 or size == int(size) else f"{size:.1f}{unit}"


def format_duration(seconds: float) -> str:
    """The two largest units: ``1h30m``, ``45s``."""
    left = int(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= length or (unit == "s" and not parts):
            parts.append(f"{left // length}{unit}")
            left %= length
    return "".join(parts[:2])
