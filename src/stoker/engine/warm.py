"""Warm sets: how many machines of a kind wait for creates, as somebody asked for. The machines are :mod:`.waiting`'s."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct

from stoker.api.models import CreateSandbox, Principal, SetWarm, WarmSet
from stoker.engine.core import Core
from stoker.engine.create import check_host_paths
from stoker.engine.hidden import common
from stoker.engine.network_words import has_own_interfaces
from stoker.engine.state import new_id
from stoker.engine.waiting import Kind, Waiting
from stoker.errors import CapacityExhausted, InvalidRequest, NotFound

__all__ = ["WarmSets"]

MOST: Final = 64
"""Sets of one owner."""


class WarmRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A warm set as the database has it."""

    id: str
    owner: str
    request: CreateSandbox
    size: int
    created_at: float


class WarmSets:
    """Fits :class:`stoker.server.template_ports.Warm`. :meth:`begin` once."""

    def __init__(self, core: Core, waiting: Waiting) -> None:
        self._core = core
        self._waiting = waiting

    async def begin(self) -> None:
        rows = await self._core.database.read(lambda db: db.execute("SELECT record FROM warm ORDER BY created").fetchall())
        for (text,) in rows:
            row = msgspec.json.decode(text.encode(), type=WarmRecord)
            self._waiting.add(Kind(row.id, row.owner, row.request, row.size, row.created_at))

    async def set(self, who: Principal, request: SetWarm) -> WarmSet:
        """Changes how many machines wait; the set of a new kind is made, one of size 0 removed."""
        wanted = request.sandbox
        if wanted.volumes or wanted.app is not None or wanted.cold or wanted.initrd or has_own_interfaces(wanted):
            raise InvalidRequest(
                "warm_unfit",
                "a machine that waits has no volumes, no app, no initrd and no addresses of its own, and is not cold",
                "leave them out",
            )
        if wanted != common(wanted):
            own = "name, labels, host name, variables, user, directory, lease, start and timeout are each create's own"
            raise InvalidRequest("warm_unfit", own, "leave them out")
        check_host_paths(who, wanted)
        found = Kind(new_id("ws"), who.owner, wanted, request.size)
        self._waiting.settle(found)
        mine = [one for one in self._kinds() if one.owner == who.owner]
        for one in mine:
            self._waiting.look(one)
        if (known := next((one for one in mine if one.kind == found.kind), None)) is not None:
            found = known
        elif len(mine) >= MOST:
            raise CapacityExhausted("too_many_warm_sets", f"there are {MOST} warm sets already", "stoker warm lists them")
        await self._change(found, request.size)
        return _value(found)

    async def list(self, who: Principal) -> Sequence[WarmSet]:
        return [_value(one) for one in self._kinds() if who.admin or one.owner == who.owner]

    async def remove(self, who: Principal, warm: str) -> None:
        for one in self._kinds():
            if one.id == warm and (who.admin or one.owner == who.owner):
                await self._change(one, 0)
                return
        raise NotFound("warm_set_unknown", f"there is no warm set {warm}", "stoker warm")

    def _kinds(self) -> Sequence[Kind]:
        return [one for one in self._waiting.kinds.values() if not one.parked]

    async def _change(self, found: Kind, size: int) -> None:
        found.size, found.again_at = size, 0.0
        record = WarmRecord(id=found.id, owner=found.owner, request=found.request, size=size, created_at=found.created_at)
        if size:
            self._waiting.add(found)
        else:
            self._waiting.kinds.pop(found.id, None)

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM warm WHERE id = ?", (record.id,))
            if record.size:
                text = msgspec.json.encode(record).decode()
                values = (record.id, record.owner, record.created_at, text)
                db.execute("INSERT INTO warm (id, owner, created, record) VALUES (?, ?, ?, ?)", values)

        await self._core.database.write(work, durable=True)
        await self._waiting.shrink(found)


def _value(kind: Kind) -> WarmSet:
    return WarmSet(
        id=kind.id,
        owner=kind.owner,
        sandbox=kind.request,
        size=kind.size,
        ready=len(kind.ready),
        created_at=kind.created_at,
        making=kind.making,
        taken=kind.taken,
        problem=kind.problem,
    )
