"""The user's terminal: its size, and raw mode that is undone however the block is left."""

from __future__ import annotations

import os
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_terminal", "raw", "size"]


def is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def size() -> tuple[int, int]:
    """Rows and columns of the terminal we write to (or read from); 24 and 80 where there is none."""
    for fd in (1, 0, 2):
        try:
            columns, rows = os.get_terminal_size(fd)
        except OSError:
            continue
        if rows and columns:
            return rows, columns
    return 24, 80


@contextmanager
def raw(fd: int) -> Iterator[None]:
    """Raw mode for the block. What was typed ahead is kept; the old mode comes back on every way out but SIGKILL."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        try:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
        except termios.error:
            pass  # hung up: there is no terminal to restore
