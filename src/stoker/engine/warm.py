"""Warm sets: machines that are up, have run a command, and stand still until a create takes one.

A waiting machine is a sandbox that nobody sees: a row whose ``warm`` names its set, what the ledger says it consists of, its
reservation. It is made the way every sandbox is, told who it is once and asked to run a command (so that software emulation has
translated what both take), and frozen. A create that asks for such a machine takes the row over, lets it go on, and tells it who
it is now, as a copy is told. What cannot be taken over is thrown away, and the create makes a machine of its own.

They are filled up again one at a time, when no create is going on; they give way to sandboxes that find no room; they end with
the daemon, and what a crash leaves of them goes at the next start.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from stoker.api.models import CreateSandbox, ErrorBody, Principal, Quota, SandboxState, SetWarm, WarmSet
from stoker.engine.core import Box, Core
from stoker.engine.create import Source, begin_from, check_host_paths, first_row
from stoker.engine.hidden import common, discard, first_of, hide, kind_of
from stoker.engine.state import Record, new_id, to_body
from stoker.engine.trace import trace
from stoker.engine.wake import Identity, introduce
from stoker.errors import CapacityExhausted, HostError, InvalidRequest, NotFound, StokerError
from stoker.guest.messages import ExecRequest

__all__ = ["WarmSets"]

log = logging.getLogger(__name__)
S = SandboxState
CALM: Final = 0.3
"""Seconds without a create after which machines are made."""
RETRY: Final = 10.0
"""Seconds until it is tried again after a machine could not be made."""
FIRST: Final = (("/bin/true",), ("/bin/sh", "-c", ":"))
"""What a machine runs before it is frozen."""
MOST: Final = 64
"""Sets of one owner."""


class WarmRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A warm set as the database has it."""

    id: str
    owner: str
    request: CreateSandbox
    size: int
    created_at: float


@dataclass(slots=True)
class _Set:
    record: WarmRecord
    kind: bytes = b""
    key: str | None = None
    """Its source's, when that was last looked at."""
    ready: deque[Box] = field(default_factory=deque)
    making: bool = False
    taken: int = 0
    problem: ErrorBody | None = None
    again_at: float = 0.0


Find = Callable[[Principal, CreateSandbox], Source | None]
"""What a request's image argument means, where that is more than an image."""


class WarmSets:
    """Fits :class:`stoker.server.template_ports.Warm`. :meth:`begin` once; :meth:`aclose` ends the machines that wait."""

    def __init__(self, core: Core, quota: Callable[[str], Quota | None], find: Find) -> None:
        self._core = core
        self._quota = quota
        self._find = find
        self._sets: dict[str, _Set] = {}
        self._wanted = asyncio.Event()
        self._used = 0.0

    async def begin(self) -> None:
        rows = await self._core.database.read(lambda db: db.execute("SELECT record FROM warm ORDER BY created").fetchall())
        for (text,) in rows:
            record = msgspec.json.decode(text.encode(), type=WarmRecord)
            self._sets[record.id] = _Set(record)
        self._core.spawn(self._keep(), "warm sets")

    # -- what is wanted -----------------------------------------------------------------------------------------------

    async def set(self, who: Principal, request: SetWarm) -> WarmSet:
        """Changes how many machines wait; the set of a new kind is made, one of size 0 removed."""
        wanted = request.sandbox
        if wanted.volumes or wanted.app is not None or wanted.cold or wanted.initrd:
            raise InvalidRequest(
                "warm_unfit", "a machine that waits has no volumes, no app, no initrd of its own, and is not cold", "leave them out"
            )
        if wanted != common(wanted):
            own = "name, labels, host name, variables, user, directory, lease, start and timeout are each create's own"
            raise InvalidRequest("warm_unfit", own, "leave them out")
        check_host_paths(who, wanted)
        source = self._find(who, wanted)
        kind = kind_of(first_row(self._core, who.owner, wanted, [], source), source)
        for one in self._sets.values():
            self._look(one)
        found = next((one for one in self._sets.values() if one.record.owner == who.owner and one.kind == kind), None)
        if found is None:
            if sum(one.record.owner == who.owner for one in self._sets.values()) >= MOST:
                raise CapacityExhausted("too_many_warm_sets", f"there are {MOST} warm sets already", "stoker warm lists them")
            record = WarmRecord(id=new_id("ws"), owner=who.owner, request=wanted, size=request.size, created_at=time.time())
            found = _Set(record)
            self._look(found)
        await self._change(found, request.size)
        return _value(found)

    async def _change(self, found: _Set, size: int) -> None:
        record = found.record = replace(found.record, size=size)
        found.again_at = 0.0
        if size:
            self._sets[record.id] = found
        else:
            self._sets.pop(record.id, None)

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM warm WHERE id = ?", (record.id,))
            if record.size:
                text = msgspec.json.encode(record).decode()
                values = (record.id, record.owner, record.created_at, text)
                db.execute("INSERT INTO warm (id, owner, created, record) VALUES (?, ?, ?, ?)", values)

        await self._core.database.write(work, durable=True)
        await self._shrink(found)
        self._wanted.set()

    async def list(self, who: Principal) -> Sequence[WarmSet]:
        return [_value(one) for one in self._sets.values() if who.admin or one.record.owner == who.owner]

    async def remove(self, who: Principal, warm: str) -> None:
        for one in self._sets.values():
            if one.record.id == warm and (who.admin or one.record.owner == who.owner):
                await self._change(one, 0)
                return
        raise NotFound("warm_set_unknown", f"there is no warm set {warm}", "stoker warm")

    async def aclose(self) -> None:
        """Nobody could take them without a daemon."""
        for one in self._sets.values():
            await self._shrink(one, 0)

    # -- taking -------------------------------------------------------------------------------------------------------

    def take(self, record: Record, source: Source | None) -> Box | None:
        """A machine for the create that begins with this row, if one waits."""
        self._used = time.monotonic()
        if not self._sets or record.volumes or record.builds:
            return None
        kind = kind_of(record, source)
        for one in self._sets.values():
            while one.record.owner == record.owner and one.kind == kind and one.ready:
                box = one.ready.popleft()
                self._wanted.set()
                if _waits(box):
                    one.taken += 1
                    return box
                self._core.spawn(discard(self._core, box), f"warm {box.id}")
        return None

    def put_back(self, box: Box) -> None:
        """The create was refused after all."""
        found = self._sets.get(box.record.warm)
        if found is None:
            self._core.spawn(discard(self._core, box), f"warm {box.id}")
        else:
            found.taken -= 1
            found.ready.appendleft(box)

    async def give_way(self, owner: str | None) -> bool:
        """Ends one machine that waits (of this owner's), so that somebody else's has room. False: there is none."""
        for one in self._sets.values():
            if one.ready and owner in (None, one.record.owner):
                box = one.ready.pop()
                one.again_at = time.monotonic() + RETRY
                await discard(self._core, box)
                return True
        return False

    # -- filling ------------------------------------------------------------------------------------------------------

    def _look(self, one: _Set) -> bool:
        """Whether what a set is of has become another: a template that was built anew."""
        record = one.record
        try:
            source = self._find(Principal(owner=record.owner, admin=False), record.request)
        except StokerError as error:
            one.problem = to_body(error)
            changed, one.key, one.kind = bool(one.kind), None, b""
            return changed
        key = source.key if source is not None else ""
        if key == one.key:
            return False
        changed, one.key = bool(one.kind), key
        one.kind = kind_of(first_row(self._core, record.owner, record.request, [], source), source)
        return changed

    async def _keep(self) -> None:
        """Fills up what is missing, for as long as the engine is open."""
        while True:
            self._wanted.clear()
            bell, wait = self._core.bell, None
            for one in list(self._sets.values()):
                if self._look(one):
                    await self._shrink(one, 0)
                for box in [box for box in one.ready if not _waits(box)]:
                    one.ready.remove(box)
                    self._core.spawn(discard(self._core, box), f"warm {box.id}")
                if len(one.ready) >= one.record.size:
                    continue
                now = time.monotonic()
                ripe = max(one.again_at, self._used + CALM) - now
                if ripe <= 0 and not self._core.operations.running:
                    await self._fill(one)
                    self._wanted.set()
                else:
                    wait = min(wait or RETRY, max(ripe, 0.05))
            await first_of((bell, self._wanted), wait)

    async def _fill(self, one: _Set) -> None:
        one.making = True
        box: Box | None = None
        try:
            box = await self._made(one.record)
            one.problem = None
            if self._sets.get(one.record.id) is one and len(one.ready) < one.record.size:
                one.ready.append(box)
                box = None
        except (StokerError, TimeoutError, OSError) as error:
            problem = error if isinstance(error, StokerError) else HostError("warm_failed", str(error) or "out of time")
            log.warning("no machine for the warm set %s: %s", one.record.id, problem)
            one.problem = to_body(problem)
            one.again_at = time.monotonic() + RETRY
        finally:
            one.making = False
            if box is not None:
                await discard(self._core, box)

    async def _made(self, record: WarmRecord) -> Box:
        core = self._core
        who = Principal(owner=record.owner, admin=False)
        source = self._find(who, record.request)
        row = first_row(core, record.owner, record.request, [], source, warm=record.id)
        box = Box(row)
        await hide(core, box, self._quota(record.owner))
        operation = core.operations.begin("warm", record.owner, box.id)
        trace("warm.after_intent")
        try:
            begin_from(core, box, operation, source, "warm")
            if box.work is not None:
                await asyncio.wait({box.work})
            await self._prepare(box)
        except BaseException:
            await core.shielded(discard(self._core, box))
            raise
        trace("warm.after_frozen")
        return box

    async def _prepare(self, box: Box) -> None:
        live, error = box.live, box.record.error
        if box.record.state is not S.RUNNING or live is None or live.agent is None:
            said = error.message if error is not None else f"it is {box.record.state.value}"
            raise HostError(error.code if error is not None else "warm_failed", said, error.hint if error is not None else "")
        async with box.lock, asyncio.timeout(60.0):
            await introduce(live.agent, Identity(box.record.generation, copy=True, hostname=box.id), self._core.host_keys.take)
            for argv in FIRST:
                await live.agent.run(ExecRequest(list(argv)), timeout=30.0)
            await live.machine.freeze()
            await self._core.save(box, state=S.FROZEN)

    async def _shrink(self, one: _Set, size: int | None = None) -> None:
        while len(one.ready) > (one.record.size if size is None else size):
            await discard(self._core, one.ready.pop())


def _waits(box: Box) -> bool:
    return not box.gone and box.record.state is S.FROZEN and box.live is not None and box.live.agent is not None


def _value(one: _Set) -> WarmSet:
    record = one.record
    return WarmSet(
        id=record.id,
        owner=record.owner,
        sandbox=record.request,
        size=record.size,
        ready=len(one.ready),
        created_at=record.created_at,
        making=one.making,
        taken=one.taken,
        problem=one.problem,
    )
