"""Where the things of one sandbox are on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from stoker.engine.ledger import Kind

__all__ = ["Places"]


@dataclass(frozen=True, slots=True)
class Places:
    """Where the things of one sandbox are. The names are the ledger's."""

    directory: Path
    clone: Path
    """The directory of its disk in the pool."""
    unit: str | None
    cgroup: Path | None
    """Where machines are no units."""
    memory: Path
    """Its own name for the file of its memory's base."""
    disk: Callable[[], Iterable[tuple[Kind, str]]]
    """What its disk consists of."""
    app: Path | None = None
    """The overlay over its app's file system."""

    def things(self, *, lease: bool, sandbox: str) -> list[tuple[Kind, str]]:
        found = [(Kind.PROCESS, str(self.directory)), (Kind.DIRECTORY, str(self.directory)), *self.disk()]
        if self.app is not None:
            found.append((Kind.APP_DISK, str(self.app)))
        found.append((Kind.MEMORY, str(self.memory)))
        if self.unit is not None:
            found.append((Kind.UNIT, self.unit))
        if self.cgroup is not None:
            found.append((Kind.CGROUP, str(self.cgroup)))
        if lease:
            found.append((Kind.LEASE, sandbox))
        return found
