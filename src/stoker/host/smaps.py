"""What a process costs its host in memory, as the kernel counts it. Source: Documentation/filesystems/proc.rst (smaps_rollup)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Footprint", "footprint"]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes. ``pss``: its own pages, and of each shared one its part; ``private``: what would come free with it."""

    pss: int = 0
    private: int = 0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(self.pss + other.pss, self.private + other.private)


def footprint(pid: int) -> Footprint:
    """Of a process that may be looked at: ``OSError`` where it is gone or somebody else's. What is swapped out counts."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) << 10
    private = found["Private_Clean"] + found["Private_Dirty"] + found["Private_Hugetlb"]
    return Footprint(found["Pss"] + found["SwapPss"], private + found["Swap"])
