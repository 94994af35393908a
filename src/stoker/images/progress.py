"""How long work tells where it is: one method, nothing to set up, nothing to close."""

from __future__ import annotations

from typing import Protocol

__all__ = ["NullProgress", "Progress"]


class Progress(Protocol):
    """Told about each step of a fetch or build.

    ``name`` is a short phrase (``fetching the kernel package``), the same for every report of one step. ``done`` of ``total`` is
    any unit, ``None`` where it is not known; ``done == total`` ends the step. ``detail`` is what is being worked on right now.
    """

    def step(self, name: str, done: float | None, total: float | None, detail: str = "") -> None: ...


class NullProgress:
    """Says nothing."""

    def step(self, name: str, done: float | None, total: float | None, detail: str = "") -> None:
        return None
