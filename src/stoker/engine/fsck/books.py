"""The database in itself: sound, its columns fit its records, nothing in it belongs to a sandbox that is gone."""

from __future__ import annotations

import sqlite3
from functools import partial

import msgspec

from stoker.engine.core import put
from stoker.engine.fsck.finding import Finding, Scene
from stoker.engine.state import Record

__all__ = ["reservations", "rows", "soundness"]

TABLES = ("events", "idempotency", "processes")
"""Their ``sandbox`` is a row of ``sandboxes``."""


async def soundness(scene: Scene) -> list[Finding]:
    """SQLite's own check of every page and index."""
    core = scene.core
    scene.count("database")
    problems = await core.database.read(lambda db: [str(row[0]) for row in db.execute("PRAGMA integrity_check(20)")])
    if problems == ["ok"]:
        return []
    name = str(core.settings.database)
    return [Finding("database", name, "a sound database", problem[:300]) for problem in problems]


def _read(db: sqlite3.Connection) -> tuple[list[tuple[str, str, str | None, str, str]], list[tuple[str, str, int]]]:
    found = db.execute("SELECT id, owner, name, state, record FROM sandboxes").fetchall()
    strays = []
    for table in TABLES:
        query = f"SELECT sandbox, count(*) FROM {table} WHERE sandbox NOT IN (SELECT id FROM sandboxes) GROUP BY sandbox"
        strays += [(table, str(sandbox), int(number)) for sandbox, number in db.execute(query)]
    return found, strays


def _delete(table: str, sandbox: str, db: sqlite3.Connection) -> None:
    db.execute(f"DELETE FROM {table} WHERE sandbox = ? AND sandbox NOT IN (SELECT id FROM sandboxes)", (sandbox,))


async def rows(scene: Scene) -> list[Finding]:
    """Each row says in its columns what its record says, and memory says the same."""
    core = scene.core
    found = []
    there, strays = await core.database.read(_read)
    for sandbox, owner, name, state, text in there:
        scene.count("row")
        box = core.boxes.get(sandbox)
        if box is None or box.work is not None or box.lock.locked():
            continue
        try:
            record = msgspec.json.decode(text.encode(), type=Record)
            columns = (record.owner, record.name, record.state.value)
            wrong = (owner, name, state) != columns or record != box.record
        except msgspec.MsgspecError:
            wrong = True
        if wrong and core.boxes.get(sandbox) is box:

            async def mend(record: Record = box.record) -> None:
                await core.database.write(lambda db: put(db, record), durable=True)

            label = f"{box.record.state.value}, as in memory"
            found.append(Finding("row", sandbox, label, f"{state} in its row, or another record", sandbox, "write it anew", mend))
    for table, sandbox, number in strays:
        if sandbox not in core.boxes:
            mend_stray = partial(core.database.write, partial(_delete, table, sandbox))
            what = f"{number} in {table}"
            found.append(
                Finding("row", f"{table} of {sandbox}", "nothing: no such sandbox", what, sandbox, "remove them", mend_stray)
            )
    return found


async def reservations(scene: Scene) -> list[Finding]:
    """Nothing is reserved for a sandbox that is gone."""
    if not scene.online:
        return []
    core = scene.core
    found = []
    for sandbox in core.admission.holders():
        if core.owns(sandbox) or core.operations.working_on(sandbox):
            continue

        async def mend(sandbox: str = sandbox) -> None:
            core.admission.release(sandbox)

        found.append(Finding("admission", sandbox, "nothing: no such sandbox", "a reservation", sandbox, "release it", mend))
    return found
