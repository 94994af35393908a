"""What long work looks like: bars on a terminal, plain lines elsewhere, nothing with ``--quiet``.

Nothing is drawn (and rich is not imported) until a step is reported, so a run that has everything pays nothing.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from stoker.images.progress import NullProgress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

__all__ = ["PlainProgress", "TerminalProgress", "progress_for"]

EVERY = 5.0


class PlainProgress:
    """A line when a step begins, every five seconds, and when it is done."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def step(self, name: str, done: float | None, total: float | None, detail: str = "") -> None:
        now = time.monotonic()
        ended = done is not None and total is not None and done >= total
        began = self._began.setdefault(name, now)
        if not ended and now - self._said.get(name, -EVERY) < EVERY:
            return
        if ended and name in self._said and now - began < 0.1:
            del self._began[name], self._said[name]  # over before anybody could have read more than its name
            return
        self._said[name] = now
        text = f"stoker: {name}"
        if ended:
            if now - began >= 0.1:
                text += f": done in {now - began:.1f} s"
            del self._began[name], self._said[name]
        elif done and total:
            text += f": {100 * done / total:.0f} %"
        elif began != now:
            text += f": {now - began:.0f} s"
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        return None


class TerminalProgress:
    """Bars that vanish when the work is done, leaving one line for each step that took a second."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._tasks: dict[str, tuple[TaskID, float]] = {}

    def _open(self) -> Bars:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[detail]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bars.start()
        return self._bars

    def step(self, name: str, done: float | None, total: float | None, detail: str = "") -> None:
        bars = self._open()
        if name not in self._tasks:
            self._tasks[name] = (bars.add_task(name, total=None, detail=""), time.monotonic())
        task, began = self._tasks[name]
        if done is not None and total is not None and done >= total:
            del self._tasks[name]
            bars.remove_task(task)
            if time.monotonic() - began >= 1.0:
                bars.console.print(f"[green]✓[/] {name} [dim]{time.monotonic() - began:.1f} s")
            if not self._tasks:
                self.close()
        else:
            bars.update(task, completed=done or 0, total=total, detail=detail[-60:])

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()


class _Quiet(NullProgress):
    def close(self) -> None:
        return None


def progress_for(quiet: bool) -> PlainProgress | TerminalProgress | _Quiet:
    """The progress that fits where standard error goes."""
    if quiet:
        return _Quiet()
    if os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb":
        return TerminalProgress()
    return PlainProgress()
