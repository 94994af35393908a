"""One difference, and what a check knows while it looks."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from stoker.engine.core import Core

__all__ = ["SANDBOX", "Checker", "Finding", "Mend", "Scene"]

SANDBOX: Final = re.compile(r"sb-[a-z2-7]{20}")
Mend = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Finding:
    """See :class:`stoker.api.models.Difference`; ``mend`` does what ``repair`` says."""

    kind: str
    name: str
    expected: str
    found: str
    sandbox: str | None = None
    repair: str = ""
    mend: Mend | None = None


@dataclass(slots=True)
class Scene:
    """One check. ``online``: the engine serves, so a machine that lives is watched and a reservation is held."""

    core: Core
    online: bool
    checked: dict[str, int] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)

    def count(self, kind: str, number: int = 1) -> None:
        self.checked[kind] = self.checked.get(kind, 0) + number


Checker = Callable[[Scene], Awaitable[list[Finding]]]
"""Looks at one kind of thing that belongs to no sandbox. A checker per kind; the table is in :mod:`.check`."""
