"""The ledger: intent before the thing, exact names, an order of release; and what release does to processes and files."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stoker.engine.database import Database
from stoker.engine.ledger import Entry, Kind, Ledger
from stoker.engine.pools import Pools
from stoker.engine.release import clear_directory, end_processes, release, shims
from stoker.host.process import ProcessIdentity, boot_id
from stoker.settings import Settings

pytestmark = pytest.mark.anyio
FAKE_SHIM = Path("/tmp")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with Database.open(tmp_path / "stoker.db") as opened:
        yield opened


def entry(kind: Kind, name: Path | str) -> Entry:
    return Entry(kind, str(name), "sb-a", False, {})


def pools(directory: Path) -> Pools:
    return Pools(Settings(directory / "data", directory / "run", directory / "none.toml"))


async def test_what_is_owned(database: Database) -> None:
    ledger = Ledger(database)
    for kind, name in ((Kind.CLONE, "c"), (Kind.DIRECTORY, "d"), (Kind.PROCESS, "d")):
        await ledger.intend("sb-a", kind, name)
    await ledger.live("sb-a", Kind.PROCESS, "d", {"pid": 7})
    assert [(e.kind, e.live) for e in await ledger.of("sb-a")] == [
        (Kind.PROCESS, True),
        (Kind.DIRECTORY, False),
        (Kind.CLONE, False),
    ]
    assert (await ledger.of("sb-a"))[0].detail == {"pid": 7}
    await ledger.intend("sb-a", Kind.CLONE, "c")
    with pytest.raises(sqlite3.IntegrityError):
        await ledger.intend("sb-b", Kind.CLONE, "c")
    await ledger.released("sb-a", Kind.CLONE)
    await ledger.released("sb-a", Kind.CLONE)
    await ledger.intend("sb-b", Kind.CLONE, "c")
    assert [e.owner for e in await ledger.all()] == ["sb-a", "sb-a", "sb-b"]


async def test_releasing_what_never_was(tmp_path: Path) -> None:
    for kind in Kind:
        await release(entry(kind, tmp_path / "nothing"), pools(tmp_path))


async def test_releasing_files_twice(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    directory = tmp_path / "sb"
    (directory / "deep").mkdir(parents=True)
    (directory / "deep" / "link").symlink_to(outside)
    for _ in range(2):
        await release(entry(Kind.DIRECTORY, directory), pools(tmp_path))
    assert not directory.exists()
    assert (outside / "precious").exists()


async def test_a_stopped_machine_keeps_its_console(tmp_path: Path) -> None:
    for name in ("console.log", "console.log.1", "agent.sock", "shim.json"):
        (tmp_path / name).touch()
    (tmp_path / "deep").mkdir()
    await clear_directory(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["console.log", "console.log.1"]


async def _sleeper(*words: str | Path, program: Path | None = None) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(program or "/bin/sleep", *words)


async def test_processes_are_ended_by_identity(tmp_path: Path) -> None:
    process, other = await _sleeper("100"), await _sleeper("100")
    identity, kept = ProcessIdentity.of(process.pid), ProcessIdentity.of(other.pid)
    record = {
        "boot": boot_id(),
        "shim": {"pid": identity.pid, "start": identity.start},
        # The number of a living process, but another start: somebody else's by now.
        "vmm": {"pid": kept.pid, "start": kept.start - 1},
    }
    (tmp_path / "shim.json").write_text(json.dumps(record))
    await asyncio.to_thread(end_processes, tmp_path, [])
    assert await process.wait() == -signal.SIGKILL
    assert kept.alive()
    (tmp_path / "shim.json").write_text(json.dumps({**record, "boot": "another", "vmm": {"pid": kept.pid, "start": kept.start}}))
    await asyncio.to_thread(end_processes, tmp_path, [])
    assert kept.alive()
    other.kill()
    await other.wait()


async def test_a_shim_without_its_record_is_found_by_its_argument(tmp_path: Path) -> None:
    """Only by exactly this directory's name: one that begins the same is another's."""
    program = tmp_path / "stoker-shim"
    program.write_text("#!/bin/sh\nsleep 100 &\nwait\n")
    program.chmod(0o755)
    # A script's first word is its interpreter: what counts is that the name is there, so a real program is used.
    os.symlink("/bin/sleep", tmp_path / "sleep")
    mine = await asyncio.create_subprocess_exec("python3", "-c", "import time; time.sleep(100)", "--dir", tmp_path / "a")
    assert shims([str(tmp_path / "a")]) == {}
    mine.kill()
    await mine.wait()
    argv = ["stoker-shim", "-c", "import time; time.sleep(100)", "--dir"]
    ours = await asyncio.create_subprocess_exec(*argv, str(tmp_path / "a"), executable="/usr/bin/python3")
    longer = await asyncio.create_subprocess_exec(*argv, str(tmp_path / "ab"), executable="/usr/bin/python3")
    try:
        async with asyncio.timeout(10):
            while len(shims([str(tmp_path / "a"), str(tmp_path / "ab")])) < 2:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(end_processes, tmp_path / "a")
        assert await ours.wait() == -signal.SIGKILL
        assert longer.returncode is None and ProcessIdentity.of(longer.pid).alive()
    finally:
        for process in (ours, longer):
            if process.returncode is None:
                process.kill()
                await process.wait()
