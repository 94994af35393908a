"""The database: transactions, refusals of what is not ours to touch, migrations, one thread."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import threading
from pathlib import Path

import pytest

from stoker.engine.database import Database, lock_data, migrations
from stoker.errors import Conflict, HostError

pytestmark = pytest.mark.anyio
INSERT = "INSERT INTO numbers (name, value) VALUES (?, ?)"


def count(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT count(*) FROM numbers").fetchone()[0])


async def test_a_new_database_is_private_and_current(tmp_path: Path) -> None:
    path = tmp_path / "stoker.db"
    async with Database.open(path) as database:
        assert await database.read(lambda db: db.execute("PRAGMA user_version").fetchone()[0]) == max(migrations())
        assert await database.read(lambda db: db.execute("PRAGMA journal_mode").fetchone()[0]) == "wal"
        strict = await database.read(lambda db: db.execute("SELECT sql FROM sqlite_schema WHERE type = 'table'").fetchall())
        assert strict and all("STRICT" in row[0] for row in strict)
    assert path.stat().st_mode & 0o777 == 0o600
    assert not path.with_name("stoker.db.new").exists()


async def test_a_transaction_is_whole_or_nothing(tmp_path: Path) -> None:
    async with Database.open(tmp_path / "stoker.db") as database:

        def half(db: sqlite3.Connection) -> None:
            db.execute(INSERT, ("a", 1))
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await database.write(half)
        assert await database.read(count) == 0
        await database.write(lambda db: db.execute(INSERT, ("a", 1)))
        with pytest.raises(sqlite3.IntegrityError):
            await database.write(lambda db: db.execute(INSERT, ("a", 2)))
        assert await database.read(count) == 1


async def test_a_cancelled_writer_has_written_all_the_same(tmp_path: Path) -> None:
    async with Database.open(tmp_path / "stoker.db") as database:
        task = asyncio.create_task(database.write(lambda db: db.execute(INSERT, ("a", 1))))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await database.read(count) == 1


async def test_one_thread_and_not_the_loops(tmp_path: Path) -> None:
    async with Database.open(tmp_path / "stoker.db") as database:
        names = {await database.write(lambda db: threading.current_thread().name) for _ in range(5)}
        assert names == {"stoker-database"}
    assert "stoker-database" not in {thread.name for thread in threading.enumerate()}


async def test_durable_is_for_one_transaction(tmp_path: Path) -> None:
    async with Database.open(tmp_path / "stoker.db") as database:
        level = lambda db: db.execute("PRAGMA synchronous").fetchone()[0]  # noqa: E731
        assert await database.write(level, durable=True) == 2
        assert await database.write(level) == 1


async def test_a_newer_one_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "stoker.db"
    async with Database.open(path):
        pass
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {max(migrations()) + 1}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(HostError) as caught:
        async with Database.open(path):
            pass
    assert caught.value.code == "database_newer"
    assert path.read_bytes() == before


async def test_an_older_one_is_migrated_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "stoker.db"
    steps = migrations()
    async with Database.open(path, steps=steps) as database:
        await database.write(lambda db: db.execute(INSERT, ("kept", 7)))
    new = max(steps) + 1
    more = {**steps, new: "ALTER TABLE numbers ADD COLUMN note TEXT;\nCREATE TABLE extra (a INTEGER) STRICT;"}
    async with Database.open(path, steps=more) as database:
        assert await database.read(lambda db: db.execute("SELECT value, note FROM numbers").fetchall()) == [(7, None)]
        assert await database.read(lambda db: db.execute("PRAGMA user_version").fetchone()[0]) == new
    copy = path.with_name(f"stoker.db.v{max(steps)}.bak")
    async with Database.open(copy, steps=steps) as database:
        assert await database.read(count) == 1


async def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "stoker.db"
    steps = migrations()
    async with Database.open(path, steps=steps):
        pass
    bad = {**steps, max(steps) + 1: "CREATE TABLE extra (a INTEGER) STRICT;\nINSERT INTO nowhere VALUES (1);"}
    with pytest.raises(HostError):
        async with Database.open(path, steps=bad):
            pass
    async with Database.open(path, steps=steps) as database:
        tables = await database.read(lambda db: db.execute("SELECT name FROM sqlite_schema").fetchall())
        assert ("extra",) not in tables


@pytest.mark.parametrize(
    "content", [b"", b"not a database at all, but long enough for a header" * 50, b"SQLite format 3\0" + b"\xff" * 4096]
)
async def test_what_is_not_a_database_is_reported_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stoker.db"
    path.write_bytes(content)
    with pytest.raises(HostError) as caught:
        async with Database.open(path):
            pass
    assert caught.value.code == "database_corrupt" and str(path) in caught.value.hint
    assert path.read_bytes() == content


async def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "stoker.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE theirs (a)")
    db.close()
    with pytest.raises(HostError) as caught:
        async with Database.open(path):
            pass
    assert caught.value.code == "database_corrupt"


async def test_damage_is_seen_or_harmless_and_never_overwritten(tmp_path: Path) -> None:
    """Bytes of the file are changed at random: it opens whole, or it is reported; it is never made anew."""
    path = tmp_path / "stoker.db"
    async with Database.open(path) as database:
        for n in range(200):
            await database.write(lambda db, n=n: db.execute(INSERT, (f"n{n}", n)))  # type: ignore[misc]
    whole = path.read_bytes()
    randomly, reported = random.Random(7), 0
    for _ in range(150):
        damaged = bytearray(whole)
        start = randomly.randrange(len(damaged) - 600)
        damaged[start : start + 512] = randomly.randbytes(512)
        path.write_bytes(damaged)
        try:
            async with Database.open(path) as database:
                await database.read(count)
        except HostError as error:
            assert error.code in ("database_corrupt", "database_newer"), error
            assert path.read_bytes() == bytes(damaged)
            reported += 1
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    assert reported > 3


async def test_a_first_database_half_made_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "stoker.db"
    path.with_name("stoker.db.new").write_bytes(b"half")
    async with Database.open(path) as database:
        assert await database.read(count) == 0
    path.unlink()
    path.with_name("stoker.db-wal").write_bytes(b"its changes")
    with pytest.raises(HostError) as caught:
        async with Database.open(path):
            pass
    assert caught.value.code == "database_corrupt"


async def test_the_lock_is_one_engines(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with lock_data(data):
        with pytest.raises(Conflict) as caught:
            async with lock_data(data):
                pass
        assert caught.value.code == "engine_running"
    async with lock_data(data):
        pass
    assert data.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
async def test_a_directory_that_is_refused_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(HostError):
        async with lock_data(tmp_path / "data"):
            pass
