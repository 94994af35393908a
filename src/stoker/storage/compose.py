"""One disk out of several layers: for each piece of it the uppermost layer that has it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from stoker.host.reflink import copy_range

__all__ = ["Piece", "compose", "visible"]


@dataclass(frozen=True, slots=True)
class Piece:
    """``length`` bytes of the disk from ``start``, which the layer has at ``at`` of its file; None: they read as zeros."""

    start: int
    length: int
    at: int | None


def compose(layers: Sequence[tuple[int, Iterable[Piece]]], size: int, out: int) -> None:
    """Writes a disk of ``size`` bytes into an empty file. ``layers``: open files with what they have, ascending, from the top."""
    for number, piece in visible([pieces for _, pieces in layers], size):
        if piece.at is not None:
            copy_range(layers[number][0], piece.at, piece.length, out, piece.start)


def visible(layers: Sequence[Iterable[Piece]], size: int) -> Iterator[tuple[int, Piece]]:
    """What shows of layers in a disk of ``size`` bytes, each piece with its layer's number: layer by layer, ascending in each."""
    covered: list[tuple[int, int]] = []
    for number, pieces in enumerate(layers):
        own: list[tuple[int, int]] = []
        for piece in pieces:
            length = min(piece.length, size - piece.start)
            if length <= 0:
                continue
            if number + 1 < len(layers):
                own.append((piece.start, length))
            for begin, there in _uncovered(piece.start, length, covered):
                yield number, Piece(begin, there, None if piece.at is None else piece.at + begin - piece.start)
        covered = _joined(covered + own)


def _uncovered(start: int, length: int, covered: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of a piece that lie in none of ``covered`` (ascending, apart)."""
    end, found = start + length, []
    index = max(0, bisect_right(covered, (start, 1 << 63)) - 1)
    while start < end and index < len(covered):
        begin, size = covered[index]
        if begin >= end:
            break
        if begin > start:
            found.append((start, begin - start))
        start = max(start, begin + size)
        index += 1
    if start < end:
        found.append((start, end - start))
    return found


def _joined(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, length in sorted(pieces):
        if found and start <= found[-1][0] + found[-1][1]:
            begin, size = found[-1]
            found[-1] = (begin, max(size, start + length - begin))
        else:
            found.append((start, length))
    return found
