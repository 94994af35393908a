"""The one place that words an error for a person: one line, a hint, and the console's last lines where they help."""

from __future__ import annotations

import sys

from stoker.errors import StokerError

__all__ = ["EXIT_FAILED", "report", "report_line"]

EXIT_FAILED = 125
CONSOLE_LINES = 20


def _clean(text: str) -> str:
    """Without control characters: part of it may come from a guest, and goes to a terminal."""
    return "".join(c if c.isprintable() else " " if c in "\t\n\r" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _write(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # nobody is left to tell; the exit code still says it


def report_line(message: str, code: str, hint: str = "", console: tuple[str, ...] = ()) -> None:
    """Writes ``stoker: MESSAGE [CODE]``, the console's tail and the hint to standard error."""
    text = f"stoker: {_clean(message)} [{code}]\n"
    if console:
        lines = [f"  | {_clean(line)[:200]}\n" for line in console[-CONSOLE_LINES:] if line.strip()]
        text += "  the guest's console ended with:\n" + "".join(lines) if lines else ""
    if hint:
        text += f"  hint: {_clean(hint)}\n"
    _write(text)


def report(error: StokerError) -> None:
    """Writes an error to standard error."""
    report_line(error.message, error.code, error.hint, error.console)
