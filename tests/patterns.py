"""Patterns in a guest's memory and on its disk whose every page says which it is, and a look at what an engine holds on its host.

A seed other than 0 fills each page with the seed and the page's number; 0 clears: pages of zeros, in place. Perl is part of every
Debian, and goes through 64 MiB of an emulated guest in a second.
"""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from crashing import quiet
from leaks import processes
from stoker.engine.engine import Engine
from stoker.settings import Settings

__all__ = ["DISK", "MEMORY", "Holdings", "check", "fill", "holdings"]

MIB = 1 << 20
MEMORY, DISK = "/dev/shm/pattern", "/root/pattern"
_PAGE = '$s ? pack("NN", $s, $_) x 512 : "\\0" x 4096'
_FILL = (
    '($p, $s, $n) = @ARGV; open F, -e $p ? "+<" : "+>", $p or die $!; '
    f"for (0..$n-1) {{ print F {_PAGE} or die $! }} close F or die $!"
)
_CHECK = (
    "($p, $s, $n) = @ARGV; open F, '<', $p or die $!; die 'its size is '.(-s F) if -s F != $n * 4096; "
    f"for (0..$n-1) {{ read(F, $x, 4096) == 4096 or die $!; die \"page $_ is another: \".unpack('H32', $x) if $x ne ({_PAGE}) }}"
)


def _perl(script: str, path: str, seed: int, size: int) -> str:
    return "perl -e '" + script.replace("'", "'\\''") + f"' {path} {seed} {size // 4096}"


def fill(path: str, seed: int, size: int) -> str:
    """The shell's words that write a pattern of so many bytes, over what is there."""
    return _perl(_FILL, path, seed, size)


def check(path: str, seed: int, size: int) -> str:
    """The shell's words that fail, and say where, unless this very pattern is there."""
    return _perl(_CHECK, path, seed, size)


@dataclass(frozen=True)
class Holdings:
    """How much an engine holds of what could leak. ``files`` and ``rows`` by where they are."""

    processes: int
    descriptors: int
    tasks: int
    loops: int
    mounts: int
    files: dict[str, int]
    rows: dict[str, int]


def _count(root: Path) -> dict[str, int]:
    """Files and directories below each of a directory's own; what is linked to elsewhere is not its own."""
    found = {}
    for part in sorted(root.iterdir()):
        if part.is_dir() and not part.is_symlink():
            found[part.name] = sum(len(names) + len(files) for _, names, files in os.walk(part))
    return found


async def holdings(engine: Engine, settings: Settings) -> Holdings:
    """When nothing is being done any more in the background."""
    await quiet(engine)
    home = settings.run_dir.parent

    def rows(db: sqlite3.Connection) -> dict[str, int]:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()]
        # Events are kept up to a number for each sandbox.
        return {name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in names if name != "events"}

    loops = [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    return Holdings(
        processes=len(processes(home)),
        descriptors=len(os.listdir("/proc/self/fd")),
        tasks=len(engine._core._tasks),
        loops=sum(str(home) in text for text in loops),
        mounts=Path("/proc/self/mountinfo").read_text().count(str(home)),
        files={f"{place.name}/{name}": n for place in (settings.data_dir, settings.run_dir) for name, n in _count(place).items()},
        rows=await engine._core.database.read(rows),
    )
