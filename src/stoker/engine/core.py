"""What the parts of the engine share: the sandboxes in memory, the one way to change a row, and who starts machines.

Every sandbox is a :class:`Box`: its row as the database has it, its live machine if it has one, a lock that serialises the
operations on it. Memory is the truth for reading; each change is committed first and then seen.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec.structs import replace

from stoker.api.models import Principal, Quota, Sandbox, SandboxState, TimeoutAction, TimeoutMode
from stoker.engine.admission import Admission, BootQueue
from stoker.engine.consoles import Console
from stoker.engine.database import Database
from stoker.engine.events import Events
from stoker.engine.filling import Filling
from stoker.engine.host_keys import HostKeys
from stoker.engine.ledger import Entry, Kind, Ledger
from stoker.engine.metrics import Rings
from stoker.engine.networks import Networks, Wire
from stoker.engine.operations import Operations
from stoker.engine.places import Places
from stoker.engine.pools import Pools
from stoker.engine.release import release
from stoker.engine.state import ASLEEP, WITH_MACHINE, Record, SnapshotRecord, VolumeRecord, require, to_sandbox
from stoker.engine.units import Units, unit_name
from stoker.errors import CapacityExhausted, GuestError, HostError, NotFound
from stoker.storage.app import app_image
from stoker.storage.volume import size_of
from stoker.vmm.memory import Scratch

if TYPE_CHECKING:
    from stoker.engine.booter import Booter
    from stoker.engine.hub import Hub
    from stoker.engine.templates import TemplateRecord
    from stoker.engine.waiting import Waiting
    from stoker.guest.agent import Agent
    from stoker.settings import Settings
    from stoker.vmm.driver import Machine

__all__ = ["Box", "Core", "Live", "Places"]

log = logging.getLogger(__name__)
T = TypeVar("T")
Change = Callable[[sqlite3.Connection], None]


@dataclass(slots=True)
class Live:
    """A running machine. ``agent`` is None while it is being reached (again)."""

    machine: Machine
    hub: Hub
    agent: Agent | None = None
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    watch: asyncio.Task[None] | None = None


class Box:
    """One sandbox in memory."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.lock = asyncio.Lock()
        self.live: Live | None = None
        self.asleep: Hub | None = None
        """The processes of a paused machine, and who looks on at them."""
        self.waking: asyncio.Task[None] | None = None
        """The resume that everybody who wants to use it waits for."""
        self.work: asyncio.Task[None] | None = None
        """The create or start that is going on."""
        self.wire: Wire | None = None
        self.joined: tuple[Wire, ...] = ()
        """Its end of the slot that its machine has, if it has one."""
        self.golden_only = False
        """It is made out of golden memory, or not at all."""
        self.changed = asyncio.Event()
        self.gone = False
        self.holders = 0
        """Connections that hold its lease."""
        self.lease_until: float | None = None
        """Monotonic time by which somebody must hold the lease."""
        self.users = 0
        self.used = time.monotonic()
        self.rings = Rings()
        self.console = Console()

    @property
    def id(self) -> str:
        return self.record.id

    def touch(self) -> None:
        self.used = time.monotonic()

    @property
    def deadline(self) -> float | None:
        """When its timeout passes (wall clock), None: never, or not while it is used."""
        timeout = self.record.timeout
        if timeout is None:
            return None
        if timeout.action is TimeoutAction.PAUSE and self.record.state not in WITH_MACHINE:
            return None
        if timeout.mode is TimeoutMode.ABSOLUTE:
            return self.record.expires_at
        if self.users or self.record.state not in WITH_MACHINE:
            return None
        return time.time() + timeout.seconds - (time.monotonic() - self.used)

    @property
    def value(self) -> Sandbox:
        return to_sandbox(self.record, self.deadline)

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Core:
    """The shared parts. Built by :meth:`stoker.engine.engine.Engine.open`."""

    def __init__(
        self, settings: Settings, database: Database, booter: Booter, *, lease_grace: float, boots: int, units: Units | None = None
    ) -> None:
        self.settings = settings
        self.database = database
        self.booter = booter
        self.lease_grace = lease_grace
        self.ledger = Ledger(database)
        self.pools = Pools(settings)
        self.filling = Filling(self)
        self.host_keys = HostKeys(settings.data_dir)
        self.networks = Networks(settings)
        self.admission = Admission(settings)
        self.queue = BootQueue(boots)
        self.events = Events()
        self.operations = Operations()
        self.boxes: dict[str, Box] = {}
        self.names: dict[tuple[str, str], str] = {}
        self.units = units or Units()
        self.volumes: dict[str, VolumeRecord] = {}
        self.apps: set[str] = set()
        """What app archives hold of their owners' quotas (:mod:`.apps`)."""
        self.snapshots: dict[str, SnapshotRecord] = {}
        self.templates: dict[str, TemplateRecord] = {}
        self.jobs: set[str] = set()
        """Helper machines that run."""
        self.cgroups: Path | None = None
        self.closing = False
        self.alarm = asyncio.Event()
        """Set when a deadline may have come nearer."""
        self.bell = asyncio.Event()
        """Rung at every change of any sandbox: wait on the present one, the next is another."""
        self.problems: list[str] = []
        self.scratch = Scratch()
        self.copying = asyncio.Lock()
        """Held while the scratch holds a machine's memory."""
        self.waiting: Waiting | None = None
        self.wake: Callable[[Box], Awaitable[None]] | None = None
        """Resumes a sandbox that somebody wants to use."""
        self.upkeep = asyncio.Lock()
        """Held by whoever looks after the whole host: one at a time."""
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- finding ------------------------------------------------------------------------------------------------------

    def find(self, who: Principal, reference: str) -> Box:
        """By id or name. What belongs to others does not exist; an administrator's own names come first."""
        box = self.boxes.get(reference)
        if box is None:
            identity = self.names.get((who.owner, reference))
            if identity is None and who.admin:
                identity = next((i for (_, name), i in self.names.items() if name == reference), None)
            box = self.boxes.get(identity) if identity else None
        if box is None or box.record.warm or not (who.admin or box.record.owner == who.owner):
            raise NotFound("sandbox_unknown", f"there is no sandbox {reference}", "stoker ls")
        return box

    def places(self, sandbox: str, pool: str | None = None, *, app: bool = False) -> Places:
        """Of a sandbox, or of one that is about to be, in the named pool and with an app or without."""
        box = self.boxes.get(sandbox)
        app = app or (box is not None and box.record.request.app is not None)
        if pool is None:
            pool = box.record.pool if box is not None else self.pools.default
        return Places(
            self.settings.run_dir / "sandboxes" / sandbox,
            self.pools.directory(pool) / "clones" / sandbox,
            unit_name(sandbox) if self.units.usable else None,
            self.cgroups / sandbox if self.cgroups and not self.units.usable else None,
            self.settings.data_dir / "memory" / sandbox,
            partial(self.pools.things, pool, sandbox),
            self.settings.data_dir / "apps" / "disks" / f"{sandbox}.qcow2" if app else None,
        )

    async def release(self, entry: Entry, found: Collection[int] | None = None) -> None:
        """Takes away what an entry of the ledger names. ``found``: its shims, when they have been looked for already."""
        if entry.kind is Kind.UNIT:
            await self.units.release(entry.name)
        elif entry.kind is Kind.DHCP:
            await self.networks.leases.end(entry.name, self.units)
        elif entry.kind is Kind.SLOT:
            await self.networks.release(entry.name)
        else:
            await release(entry, self.pools, found)

    def owns(self, owner: str) -> bool:
        """Whether what the ledger, or the book of reservations, says of an owner is right to be there."""
        return owner in self.boxes or owner in self.volumes or owner in self.jobs or owner in self.snapshots or owner in self.apps

    def disk_of(self, record: Record) -> int:
        """Bytes that a sandbox's disks may come to take: its own, and its layer over its app."""
        app = record.request.app
        return record.resources.disk + (size_of(app_image(self.settings.data_dir, app)) if app is not None else 0)

    async def admit(self, box: Box, quota: Quota | None) -> None:
        """Reserves what a sandbox's machine and disks may come to take; machines that only wait give way to it.
        ``capacity_exhausted`` where there is not as much."""
        while True:
            try:
                self.admit_now(box, quota)
                return
            except CapacityExhausted as error:
                owner = box.record.owner if error.details.get("scope") == "key" else None
                if self.waiting is None or not await self.waiting.give_way(owner):
                    raise

    def admit_now(self, box: Box, quota: Quota | None) -> None:
        """The same, and nobody gives way."""
        record, has = box.record, box.record.resources
        self.admission.admit(
            record.id, owner=record.owner, memory=has.memory, cpus=has.cpus, disk=self.disk_of(record), quota=quota
        )

    def ring(self) -> None:
        """Something changed: deadlines, machines."""
        self.alarm.set()
        self.bell.set()
        self.bell = asyncio.Event()

    # -- changing -----------------------------------------------------------------------------------------------------

    def add(self, box: Box) -> None:
        self.boxes[box.id] = box
        if box.record.name is not None:
            self.names[box.record.owner, box.record.name] = box.id

    async def save(self, box: Box, *, event: str = "", also: Change | None = None, durable: bool = False, **values: Any) -> None:
        """Commits a changed row, with an event and whatever else belongs into the transaction.

        Memory changes at once, so that two changes at a time do not lose one; the event is told after the commit.
        """
        record = replace(box.record, **values)
        data: dict[str, Any] = {}
        if event == "sandbox.state":
            data = {"state": record.state.value, "before": box.record.state.value}
            if record.reason:
                data["reason"] = record.reason
            if record.error is not None and record.state in (SandboxState.FAILED, SandboxState.LOST):
                data["error"] = {"code": record.error.code, "message": record.error.message}
        happened = self.events.make(event, box.id, **data) if event and not record.warm else None
        box.record = record

        def work(db: sqlite3.Connection) -> None:
            put(db, record)
            if happened is not None:
                self.events.insert_in(db, happened)
            if also is not None:
                also(db)

        try:
            await self.database.write(work, durable=durable)
            if happened is not None:
                self.events.tell(record.owner, happened)
        finally:
            box.notify()
            self.ring()

    async def happen(self, box: Box, kind: str, **data: Any) -> None:
        """An event without a change of the row."""
        if box.record.warm:
            return
        event = self.events.make(kind, box.id, **data)
        await self.database.write(lambda db: self.events.insert_in(db, event))
        self.events.tell(box.record.owner, event)

    async def drop(self, box: Box) -> None:
        """The last of a sandbox: its row, its ledger, its history."""
        record = box.record
        event = self.events.make("sandbox.destroyed", record.id)

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM sandboxes WHERE id = ?", (record.id,))
            db.execute("DELETE FROM events WHERE sandbox = ?", (record.id,))
            db.execute("DELETE FROM idempotency WHERE sandbox = ?", (record.id,))
            db.execute("DELETE FROM processes WHERE sandbox = ?", (record.id,))
            released_in(db, record.id)
            db.execute("INSERT OR REPLACE INTO numbers (name, value) VALUES ('event', ?)", (event.id,))

        await self.database.write(work)
        self.boxes.pop(record.id, None)
        self.networks.unpin(record.id)
        if record.name is not None and self.names.get((record.owner, record.name)) == record.id:
            del self.names[record.owner, record.name]
        self.admission.release(record.id)
        box.gone = True
        box.console.close()
        if not record.warm:
            self.events.tell(record.owner, event)
        self.events.forget(record.id)
        box.notify()

    # -- using --------------------------------------------------------------------------------------------------------

    async def agent(self, box: Box, verb: str = "exec") -> tuple[Live, Agent]:
        """The sandbox's agent, now. While it is being reached again it is waited for a few seconds.

        A paused one is resumed to be used, by whoever comes first; the others wait with them.
        """
        if verb == "exec":
            await self.awake(box)
        require(box.record, verb)
        live = box.live
        if live is None:
            raise HostError("machine_missing", f"{box.record.label} has no machine", f"stoker inspect {box.id}")
        box.touch()
        if live.agent is None:
            try:
                async with asyncio.timeout(10.0):
                    await live.reached.wait()
            except TimeoutError:
                raise GuestError("agent_unreachable", f"the agent of {box.record.label} does not answer", "try again") from None
            require(box.record, verb)
        if live.agent is None:
            raise GuestError("agent_unreachable", f"the agent of {box.record.label} does not answer", "try again")
        return live, live.agent

    async def awake(self, box: Box) -> None:
        """Returns when the sandbox is not paused (any more); what went wrong with its resume is raised to all who wait."""
        while box.record.state in ASLEEP and not box.record.doomed and self.wake is not None:
            if box.waking is None:
                box.waking = asyncio.get_running_loop().create_task(self._wake(box, self.wake))
            await asyncio.shield(box.waking)

    async def _wake(self, box: Box, wake: Callable[[Box], Awaitable[None]]) -> None:
        try:
            await wake(box)
        finally:
            box.waking = None

    @asynccontextmanager
    async def used(self, box: Box) -> AsyncIterator[None]:
        """In use: its idle timeout does not run."""
        box.users += 1
        try:
            yield
        finally:
            box.users -= 1
            box.touch()
            self.alarm.set()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task of the engine's own. What it raises is logged: nobody else hears it."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)

    async def shielded(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs to its end even when the caller is cancelled: nothing is left half done."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The caller got it, unless it went away.
            log.debug("%s", error)

    async def end_tasks(self) -> None:
        """Cancels what goes on and waits for it; a create in progress unwinds."""
        self.closing = True
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(set(self._tasks))


def put(db: sqlite3.Connection, record: Record) -> None:
    """Writes a row as it is now."""
    db.execute(
        "INSERT INTO sandboxes (id, owner, name, state, created, record) VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET owner = excluded.owner, name = excluded.name, created = excluded.created,"
        " state = excluded.state, record = excluded.record",
        (record.id, record.owner, record.name, record.state.value, record.created_at, msgspec.json.encode(record).decode()),
    )


def released_in(db: sqlite3.Connection, sandbox: str) -> None:
    """Nothing on the host is the sandbox's any more, and no volume is used by it."""
    Ledger.released_in(db, sandbox)
    db.execute("DELETE FROM claims WHERE user = ?", (sandbox,))
