"""The ledger: everything on the host that exists because of the engine, written down before it is made.

An entry is (kind, exact name, owner). Its row is committed and on disk as *intent* before the thing is made, becomes *live*
afterwards (with what identifies it), and goes when the thing is gone. So after a crash every thing is in the ledger, and an
entry may name a thing that was never made: every release works on both, and twice. Nothing is ever found by a pattern.

==========  =============================================  =====================================================
kind        name                                           released by
==========  =============================================  =====================================================
process     the machine's directory (``shim --dir DIR``)   killing the recorded identities, and a shim with
                                                           exactly that argument (engine.release)
unit        the machine's scope: ``stoker-ID.scope``       stopping it (engine.units)
cgroup      the cgroup's directory                         killing what is in it, rmdir
dhcp        the machine's directory, or a unit              ending the dnsmasq with its lease file, or stopping
                                                           the unit (engine.leases)
slot        ``ns:VETH:ADDRESS/31``, ``run:TAP:ADDR/30``    its links and what the firewall knows of them
                                                           (:mod:`.networks`)
directory   ``RUN_DIR/sandboxes/ID``                       removing the tree: sockets, logs, records of the shim
device      a device-mapper device                         removing it; while it is busy it stays
loop        the file behind a loop device                  detaching whatever has exactly this file behind it
clone       the disk's directory, ``POOL/clones/ID``       the pool (:mod:`stoker.storage.pool`)
app-disk    ``DATA_DIR/apps/disks/ID.qcow2``               unlinking it
memory      ``DATA_DIR/memory/ID``                         unlinking this name of its base's file
saved       ``DATA_DIR/snapshots/NAME``                    removing the tree, and what was only being written
volume      ``DATA_DIR/volumes/ID.ext4`` (owner: ID)       unlinking it, when there is no volume of that ID
lease       the sandbox                                    nothing on the host; its sandbox goes with its holder
==========  =============================================  =====================================================

The order of this table is the order of release.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec

from stoker.engine.database import Database

__all__ = ["OF_A_MACHINE", "Entry", "Kind", "Ledger"]


class Kind(StrEnum):
    """In the order of release."""

    PROCESS = "process"
    UNIT = "unit"
    CGROUP = "cgroup"
    DHCP = "dhcp"
    SLOT = "slot"
    DIRECTORY = "directory"
    DEVICE = "device"
    LOOP = "loop"
    CLONE = "clone"
    APP_DISK = "app-disk"
    MEMORY = "memory"
    SAVED = "saved"
    VOLUME = "volume"
    LEASE = "lease"


OF_A_MACHINE: Final = (Kind.PROCESS, Kind.UNIT, Kind.CGROUP, Kind.DHCP, Kind.SLOT, Kind.MEMORY)
"""What goes with a machine; the rest stays while its sandbox does."""
_ORDER = {kind: position for position, kind in enumerate(Kind)}


@dataclass(frozen=True, slots=True)
class Entry:
    """One owned thing. ``owner`` is a sandbox's id."""

    kind: Kind
    name: str
    owner: str
    live: bool
    detail: dict[str, Any]


def _entry(row: tuple[str, str, str, str, str]) -> Entry:
    kind, name, owner, state, detail = row
    return Entry(Kind(kind), name, owner, state == "live", msgspec.json.decode(detail.encode(), type=dict[str, Any]))


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: _ORDER[entry.kind])


class Ledger:
    """Reads and writes entries. The functions that take a connection are parts of somebody's larger transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @staticmethod
    def intend_in(db: sqlite3.Connection, owner: str, things: Iterable[tuple[Kind, str]]) -> None:
        # A thing that is in the ledger already stays as it is when it is the same owner's (start after stop).
        db.executemany(
            "INSERT INTO owned (kind, name, owner, state) VALUES (?, ?, ?, 'intent')"
            " ON CONFLICT (kind, name) DO UPDATE SET state = state WHERE owner = excluded.owner",
            [(kind.value, name, owner) for kind, name in things],
        )
        for kind, name in things:
            (found,) = db.execute("SELECT owner FROM owned WHERE kind = ? AND name = ?", (kind.value, name)).fetchone()
            if found != owner:
                raise sqlite3.IntegrityError(f"{kind.value} {name} belongs to {found}, not to {owner}")

    @staticmethod
    def live_in(db: sqlite3.Connection, owner: str, kind: Kind, name: str, detail: dict[str, Any] | None = None) -> None:
        db.execute(
            "UPDATE owned SET state = 'live', detail = ? WHERE kind = ? AND name = ? AND owner = ?",
            (msgspec.json.encode(detail or {}).decode(), kind.value, name, owner),
        )

    @staticmethod
    def kinds_live_in(db: sqlite3.Connection, owner: str, kinds: Iterable[Kind]) -> None:
        """Whatever an owner has of these kinds: their names are not known beforehand."""
        db.executemany("UPDATE owned SET state = 'live' WHERE owner = ? AND kind = ?", [(owner, kind.value) for kind in kinds])

    @staticmethod
    def released_in(db: sqlite3.Connection, owner: str, kinds: Iterable[Kind] | None = None) -> None:
        for kind in kinds if kinds is not None else Kind:
            db.execute("DELETE FROM owned WHERE owner = ? AND kind = ?", (owner, kind.value))

    @staticmethod
    def dropped_in(db: sqlite3.Connection, kind: Kind, name: str) -> None:
        db.execute("DELETE FROM owned WHERE kind = ? AND name = ?", (kind.value, name))

    async def dropped(self, kind: Kind, name: str) -> None:
        """One thing is gone."""
        await self._database.write(lambda db: self.dropped_in(db, kind, name))

    async def intend(self, owner: str, kind: Kind, name: str) -> None:
        things = [(kind, name)]
        await self._database.write(lambda db: self.intend_in(db, owner, things), durable=True)

    async def live(self, owner: str, kind: Kind, name: str, detail: dict[str, Any] | None = None) -> None:
        await self._database.write(lambda db: self.live_in(db, owner, kind, name, detail))

    async def released(self, owner: str, kind: Kind) -> None:
        await self._database.write(lambda db: self.released_in(db, owner, [kind]))

    async def of(self, owner: str) -> list[Entry]:
        """What a sandbox owns, in the order of release."""
        rows = await self._database.read(
            lambda db: db.execute("SELECT kind, name, owner, state, detail FROM owned WHERE owner = ?", (owner,)).fetchall()
        )
        return in_order(_entry(row) for row in rows)

    async def all(self) -> list[Entry]:
        rows = await self._database.read(
            lambda db: db.execute("SELECT kind, name, owner, state, detail FROM owned ORDER BY number").fetchall()
        )
        return in_order(_entry(row) for row in rows)
