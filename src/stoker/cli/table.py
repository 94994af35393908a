"""How lists are shown: a table on a terminal, tab-separated lines in a pipe, JSON on demand.

Drawn by hand: importing rich costs half of what ``stoker ls`` may take altogether.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from stoker.cli.terminal import is_terminal, size

__all__ = ["Column", "ago", "clean", "render_plain", "render_table", "show", "show_json"]

T = TypeVar("T")
COLOURS = {
    "running": "32",
    "succeeded": "32",
    "creating": "33",
    "resuming": "33",
    "stopping": "33",
    "frozen": "36",
    "paused": "36",
    "failed": "31",
    "lost": "31",
    "revoked": "31",
}


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """A heading and what stands below it. ``right``: aligned like a number. ``full``: never cut to fit the terminal."""

    title: str
    value: Callable[[T], str]
    right: bool = False
    full: bool = False


def clean(text: str) -> str:
    """Without control characters: a guest's words go to a terminal, or into lines that a program takes apart."""
    return "".join(c if c.isprintable() else " " if c in "\t\n\r" else "\N{REPLACEMENT CHARACTER}" for c in text)


def render_plain(columns: Sequence[Column[T]], rows: Sequence[T]) -> str:
    """One line a row, tabs between the columns, no heading: for ``cut`` and ``while read``."""
    return "".join("\t".join(clean(column.value(row)) for column in columns) + "\n" for row in rows)


def render_table(columns: Sequence[Column[T]], rows: Sequence[T], width: int, colour: bool = False) -> str:
    """A table of at most ``width`` characters: the widest columns that may be cut are cut."""
    cells = [[clean(column.value(row)) for column in columns] for row in rows]
    widths = [max([len(column.title), *(len(line[i]) for line in cells)]) for i, column in enumerate(columns)]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        cuttable = [i for i, column in enumerate(columns) if not column.full and widths[i] > max(8, len(column.title))]
        if not cuttable:
            break
        widths[max(cuttable, key=lambda i: widths[i])] -= 1
    lines = [_line([column.title for column in columns], columns, widths)]
    if colour:
        lines[0] = f"\033[1m{lines[0]}\033[0m"
    lines += [_line(line, columns, widths, colour) for line in cells]
    return "\n".join(lines) + "\n"


def _line(cells: list[str], columns: Sequence[Column[T]], widths: list[int], colour: bool = False) -> str:
    parts = []
    for i, cell in enumerate(cells):
        text = cell if len(cell) <= widths[i] else cell[: widths[i] - 1] + "…"
        # The last column ends the line: spaces behind it would only wrap.
        last = i == len(cells) - 1
        text = text.rjust(widths[i]) if columns[i].right else text if last else text.ljust(widths[i])
        parts.append(f"\033[{COLOURS[cell]}m{text}\033[0m" if colour and cell in COLOURS else text)
    return "  ".join(parts)


def show(columns: Sequence[Column[T]], rows: Sequence[T], *, empty: str = "") -> None:
    """Writes a list to standard output in the form that fits where it goes. ``empty`` is said to a person only."""
    if not is_terminal(1):
        sys.stdout.write(render_plain(columns, rows))
    elif not rows:
        sys.stdout.write(f"{empty}\n" if empty else "")
    else:
        colour = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        sys.stdout.write(render_table(columns, rows, size()[1], colour))


def show_json(value: Any) -> None:
    """Writes models as JSON: indented for a person, in one line for a program."""
    import msgspec

    data = msgspec.json.encode(value)
    sys.stdout.write((msgspec.json.format(data, indent=2) if is_terminal(1) else data).decode() + "\n")


def ago(moment: float | None, now: float | None = None) -> str:
    """``3m20s`` since then; ``-`` for never."""
    from stoker.api.units import format_duration

    return "-" if moment is None else format_duration(max(0.0, (time.time() if now is None else now) - moment))
