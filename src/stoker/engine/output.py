"""A piece of a process's output, as attachments hand it out."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Output"]


@dataclass(frozen=True, slots=True)
class Output:
    """``stream`` is 1 or 2, ``offset`` the position of the first byte in all that the process ever wrote there."""

    stream: int
    offset: int
    data: bytes
