"""Who uses which volume: the table ``claims``, changed in the transactions that it belongs to.

A writable claim is alone; read-only ones are any number. A sandbox's claims are there from its first row to its last: also while it
is stopped, for its disk may rely on what it left there. A job's (export, import) end with it, or with the daemon.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from stoker.api.models import VolumeUser
from stoker.engine.state import Mounted
from stoker.errors import Conflict, NotFound

__all__ = ["claim_in", "in_use", "unclaim_in", "users_in"]


def users_in(db: sqlite3.Connection, volume: str) -> list[VolumeUser]:
    rows: list[tuple[Any, ...]] = db.execute(
        "SELECT user, label, read_only FROM claims WHERE volume = ? ORDER BY label", (volume,)
    ).fetchall()
    return [VolumeUser(id=user, name=label, read_only=bool(read_only)) for user, label, read_only in rows]


def in_use(name: str, users: Sequence[VolumeUser], what: str) -> Conflict:
    """The refusal, with the names of the users."""
    names = ", ".join(user.name for user in users[:8]) + (f" and {len(users) - 8} more" if len(users) > 8 else "")
    sandbox = next((user.name for user in users if user.id.startswith("sb-")), None)
    hint = f"stoker rm {sandbox}; a stopped sandbox keeps its volumes" if sandbox else "wait until it has ended"
    details = {"volume": name, "users": [{"id": user.id, "name": user.name, "read_only": user.read_only} for user in users[:100]]}
    return Conflict("volume_in_use", f"volume {name} {what}: it is in use by {names}", hint, details=details)


def claim_in(db: sqlite3.Connection, user: str, label: str, wanted: Iterable[Mounted], *, refused: str = "") -> None:
    """Claims volumes for a user, or raises ``volume_in_use`` with the names of those that have one of them.

    ``refused`` is what cannot be done then.
    """
    for one in wanted:
        users = users_in(db, one.id)
        if users and not one.read_only:
            raise in_use(one.name, users, refused or "cannot be written to by two")
        if any(not other.read_only for other in users):
            raise in_use(one.name, users, refused or "cannot be read while it is written to")
        try:
            db.execute(
                "INSERT INTO claims (volume, user, label, read_only) VALUES (?, ?, ?, ?)", (one.id, user, label, one.read_only)
            )
        except sqlite3.IntegrityError:
            # It was removed between the look at its name and now.
            raise NotFound("volume_unknown", f"there is no volume {one.name}", "stoker volume ls") from None


def unclaim_in(db: sqlite3.Connection, user: str) -> None:
    db.execute("DELETE FROM claims WHERE user = ?", (user,))
