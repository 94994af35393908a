"""A data directory with a small store of its own, and the differences that checks are to find."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from engine_host import Faults, HostBooter
from stoker.api.models import CreateSandbox, Difference, FsckReport, Principal, SandboxState
from stoker.engine.engine import Engine
from stoker.host.binaries import shim_path
from stoker.images.store import MAIN, Store
from stoker.settings import Settings

ADMIN = Principal()
S = SandboxState
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


@asynccontextmanager
async def opened(settings: Settings, faults: Faults | None = None) -> AsyncIterator[Engine]:
    async with Engine.open(settings, booter=HostBooter(faults), trace_kill="") as engine:
        yield engine
        for box in (await engine.list(ADMIN)).items:
            await engine.destroy(ADMIN, box.id)
        assert (await engine.upkeep.fsck(repair=False)).clean, "destroying left something"


async def make(engine: Engine, name: str, *, stopped: bool = False) -> str:
    operation = await engine.create(ADMIN, CreateSandbox(image="host", name=name))
    box = await engine.wait(ADMIN, operation.sandbox or "", frozenset({S.RUNNING}), 20)
    if stopped:
        await engine.stop(ADMIN, name, 0.5)
    return box.id


def told(report: FsckReport) -> list[tuple[str, str]]:
    return [(one.kind, one.name) for one in report.differences]


async def mends(engine: Engine, *expected: tuple[str, str]) -> list[Difference]:
    """The check names exactly these, changes nothing unless it is asked to, mends all of them, and then finds nothing."""
    settings = engine._core.settings
    before = tree(settings.data_dir, settings.run_dir)
    seen = await engine.upkeep.fsck(repair=False)
    assert sorted(told(seen)) == sorted(expected) and not seen.clean
    assert not any(one.repaired for one in seen.differences) and all(one.expected != one.found for one in seen.differences)
    assert tree(settings.data_dir, settings.run_dir) == before, "looking changed something"
    mended = await engine.upkeep.fsck(repair=True)
    assert sorted(told(mended)) == sorted(expected) and mended.clean, mended.differences
    after = tree(settings.data_dir, settings.run_dir)
    again = await engine.upkeep.fsck(repair=True)
    assert again.clean and again.differences == []
    assert tree(settings.data_dir, settings.run_dir) == after, "twice is not the same as once"
    return mended.differences
