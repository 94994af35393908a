"""The engine's state on disk: one SQLite database in WAL mode, one thread that uses it, one hop per transaction.

Layout of ``DATA_DIR``: ``stoker.db`` (with ``-wal`` and ``-shm``), ``stoker.db.new`` while the very first one is made (a crash
leaves it; it is removed), ``stoker.db.vN.bak`` the copy made before a migration from version N, ``stoker.lock`` held by the one
engine.

A commit is in the file when :meth:`Database.write` returns; with ``durable=True`` it has also reached the disk, together with
every commit before it. A process killed between two transactions loses neither. The database is never made anew over a file
that exists: an empty, damaged, foreign or newer one is an error that names it.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from stoker.errors import Conflict, HostError, StokerError

__all__ = ["Database", "lock_data", "migrations"]

log = logging.getLogger(__name__)
T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
APPLICATION = 0x53544F4B
_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def migrations() -> dict[int, str]:
    """Version to the SQL that leads to it."""
    found = {}
    for entry in resources.files("stoker.engine.migrations").iterdir():
        if entry.name.endswith(".sql"):
            found[int(entry.name.partition("_")[0])] = entry.read_text("utf-8")
    if sorted(found) != list(range(1, len(found) + 1)):
        raise HostError("installation_damaged", f"migrations {sorted(found)} are not 1, 2, 3, ...", "install Stoker again")
    return dict(sorted(found.items()))


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _translate(error: sqlite3.Error, path: Path) -> StokerError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in _CORRUPT:
        return _corrupt(path, str(error))
    if code == sqlite3.SQLITE_FULL:
        return HostError("no_space", f"{path}: the file system is full", f"make room on the file system of {path.parent}")
    return HostError("database_failed", f"{path}: {error}", f"check the file system of {path.parent}, then start the daemon again")


def _corrupt(path: Path, why: str) -> HostError:
    return HostError(
        "database_corrupt",
        f"{path} is damaged: {why}",
        f"nothing was changed; put a backup in its place ({path}.v*.bak) or move {path} and its -wal and -shm files away",
    )


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(f"file:{path}?mode=rw", uri=True, isolation_level=None, check_same_thread=False, timeout=10)
    db.execute("PRAGMA busy_timeout = 10000")
    db.execute("PRAGMA foreign_keys = ON")
    return db


def _migrate(db: sqlite3.Connection, have: int, steps: dict[int, str]) -> None:
    db.execute("PRAGMA synchronous = FULL")
    db.execute("BEGIN EXCLUSIVE")
    try:
        for version, script in steps.items():
            if version > have:
                for statement in _statements(script):
                    db.execute(statement)
        db.execute(f"PRAGMA user_version = {max(steps)}")
        db.execute("COMMIT")
    except sqlite3.Error:
        db.execute("ROLLBACK")
        raise


def _create(path: Path, steps: dict[int, str]) -> None:
    new = path.with_name(path.name + ".new")
    for leftover in (new, new.with_name(new.name + "-wal"), new.with_name(new.name + "-shm"), new.with_name(new.name + "-journal")):
        leftover.unlink(missing_ok=True)
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    db = _connect(new)
    try:
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        _migrate(db, 0, steps)
    finally:
        db.close()
    os.rename(new, path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _backup(db: sqlite3.Connection, path: Path, have: int) -> None:
    target = path.with_name(f"{path.name}.v{have}.bak")
    partial = target.with_name(target.name + ".new")
    partial.unlink(missing_ok=True)
    copy = sqlite3.connect(partial)
    try:
        db.backup(copy)
    finally:
        copy.close()
    os.chmod(partial, 0o600)
    with partial.open("rb") as f:
        os.fsync(f.fileno())
    os.rename(partial, target)
    log.info("kept a copy of version %d as %s", have, target)


def _check(db: sqlite3.Connection, path: Path, steps: dict[int, str]) -> int:
    """The version of a database that may be used, or the error that says why it may not."""
    if path.stat().st_size == 0:
        raise _corrupt(path, "it is empty")
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        raise _corrupt(path, "it is a database of another program")
    if version > max(steps):
        raise HostError(
            "database_newer",
            f"{path} has version {version}; this Stoker knows versions up to {max(steps)}",
            "install the newer Stoker again, or restore the copy it made before its migration (stoker.db.v*.bak)",
        )
    try:
        problems = [str(row[0]) for row in db.execute("PRAGMA quick_check(5)")]
    except UnicodeDecodeError:
        # SQLite's message quotes what is damaged.
        raise _corrupt(path, "a part of it is no text that could be quoted") from None
    if problems != ["ok"]:
        raise _corrupt(path, "; ".join(problems)[:500])
    return int(version)


def _open(path: Path, steps: dict[int, str]) -> sqlite3.Connection:
    if not path.exists():
        wal = path.with_name(path.name + "-wal")
        if wal.exists():
            raise _corrupt(path, f"{wal.name} is there, but the database itself is gone")
        _create(path, steps)
    db: sqlite3.Connection | None = None
    try:
        db = _connect(path)
        version = _check(db, path, steps)
        if version < max(steps):
            _backup(db, path, version)
            _migrate(db, version, steps)
            log.info("migrated %s from version %d to %d", path, version, max(steps))
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA wal_autocheckpoint = 500")
    except BaseException as error:
        if db is not None:
            db.close()
        if isinstance(error, sqlite3.Error):
            raise _translate(error, path) from error
        raise
    return db


@asynccontextmanager
async def lock_data(directory: Path) -> AsyncIterator[None]:
    """Makes the data directory and holds it: one engine at a time. The lock ends with the process, however it ends."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not inherited: a machine's shim must not keep the next engine out.
        descriptor = os.open(directory / "stoker.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        raise HostError("directory_refused", f"{directory}: {e.strerror}", "set STOKER_DATA_DIR to a directory of yours") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                "engine_running", f"another daemon uses {directory}", "stoker daemon status; or set another STOKER_DATA_DIR"
            ) from None
        yield
    finally:
        os.close(descriptor)


class Database:
    """The open database. Methods are for the event loop; ``work`` runs in the database's thread, inside one transaction."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._db: sqlite3.Connection | None = None
        self._closed = False

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path, *, steps: dict[int, str] | None = None) -> AsyncIterator[Database]:
        self = cls(path)
        thread = threading.Thread(target=self._work, name="stoker-database", daemon=True)
        thread.start()

        def opened() -> None:
            self._db = _open(path, steps or migrations())

        try:
            await self._hop(opened)
            yield self
        finally:
            self._closed = True
            self._jobs.put(None)
            await asyncio.to_thread(thread.join)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        if self._db is not None:
            self._db.close()

    async def _hop(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise HostError("database_closed", "the daemon is shutting down", "start it again")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def job() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as e:
                # Carried to the caller, who raises it; the thread must go on.
                error = e
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:
                log.warning("a transaction ended after the event loop did")

        self._jobs.put(job)
        return await future

    def _transact(self, work: Work[T], begin: str, durable: bool) -> T:
        db = self._db
        if db is None:
            raise HostError("database_closed", f"{self.path} is not open", "start the daemon again")
        try:
            if durable:
                db.execute("PRAGMA synchronous = FULL")
            db.execute(begin)
            try:
                result = work(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            finally:
                if durable:
                    db.execute("PRAGMA synchronous = NORMAL")
            return result
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise _translate(error, self.path) from error

    async def write(self, work: Work[T], *, durable: bool = False) -> T:
        """One transaction. Once called it happens, even when the caller is cancelled while it waits."""
        return await self._hop(lambda: self._transact(work, "BEGIN IMMEDIATE", durable))

    async def read(self, work: Work[T]) -> T:
        """One consistent reading."""
        return await self._hop(lambda: self._transact(work, "BEGIN", False))
