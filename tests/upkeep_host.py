"""A data directory with a small store of its own, and the differences that checks are to find."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stoker.host.binaries import shim_path
from stoker.images.store import MAIN, Store
from stoker.settings import Settings

STRANGER = "sb-" + "q" * 20
"""A sandbox that no book knows."""


async def entry(settings: Settings, kind: str, content: str, name: str = "") -> str:
    """An entry of the store with a name, or superseded; its digest."""
    store = Store(settings)
    async with store.stage() as stage:
        tree = stage.path / "tree"
        tree.mkdir()
        (tree / MAIN[kind]).write_text(content * 1000)
        facts = {"size": 1, "release": content, "modules": False, "drivers": [], "signed_modules_only": False}
        digest = store.publish(stage, tree, kind, content, facts)
    if name:
        store.point(kind, name, digest)
    return digest


@contextmanager
def shim(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real shim of that directory; what it supervises sleeps."""
    directory.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [shim_path(), "--dir", directory, "--", "/bin/sleep", "1000"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def tree(*roots: Path) -> dict[str, str]:
    """Every file below the roots, but for the database's own, with its content as far as it is text."""
    found = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.name.startswith("stoker.db"):
                found[str(path)] = path.read_text(errors="replace")[:100]
            elif not path.is_file():
                found[str(path)] = ""
    return found
