"""May this sandbox be made? Budgets of the host, quotas of a key, and a fair queue for the boots themselves.

A *reservation* is what a sandbox holds from the moment it is admitted until its machine is gone: memory with the VMM's overhead,
CPUs, disk, one of the count. Stopped sandboxes hold disk and count only.

Budgets that are set are exact. Derived ones know that a guest touches a part of its memory: reservations may add up to
:data:`OVERCOMMIT` times what the host has, while a create also needs room that is there *now*: what the kernel calls available,
less what admitted machines are still going to touch.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.api.models import Quota
from stoker.errors import CapacityExhausted

if TYPE_CHECKING:
    from stoker.settings import Settings

__all__ = ["Admission", "BootQueue", "HostFacts", "Reservation", "host_facts"]

MIB = 1 << 20
VMM_OVERHEAD = 96 * MIB
"""A VMM's own memory besides the guest's: 15-50 MiB measured, and up to 128 MiB of translations under TCG."""
USABLE = 0.9
OVERCOMMIT = 1.5
FIRST_TOUCH = 256 * MIB
"""What a machine just booted has touched of its memory, at most, with its VMM (512 MiB guest, Debian 12)."""
MEMORY_RESERVE = 256 * MIB
DISK_RESERVE = 256 * MIB
CPUS_PER_CORE = 64


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the host has. Bytes."""

    memory_total: int
    memory_available: int
    cpus: int
    disk_free: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one sandbox holds; ``memory`` is the guest's. ``settled``: its machine has touched what it first touches."""

    owner: str
    memory: int = 0
    cpus: int = 0
    disk: int = 0
    settled: bool = False
    count: int = 1
    """0: a volume or a job of our own, no sandbox."""


def host_facts(data_dir: Path) -> HostFacts:
    """Reads what the host has now: two files of /proc and one statvfs."""
    values: dict[str, int] = {}
    with open("/proc/meminfo", encoding="ascii") as f:
        for line in f:
            name, _, rest = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                values[name] = int(rest.split()[0]) * 1024
    there = os.statvfs(data_dir)
    return HostFacts(values["MemTotal"], values["MemAvailable"], os.cpu_count() or 1, there.f_bavail * there.f_frsize)


def _mib(size: int) -> str:
    return f"{size // MIB} MiB"


class Admission:
    """The book of reservations. Not locked: it is used from one event loop and never awaits."""

    def __init__(self, settings: Settings, facts: Callable[[], HostFacts] | None = None) -> None:
        self._settings = settings
        self._facts = facts or (lambda: host_facts(settings.data_dir))
        self._held: dict[str, Reservation] = {}

    def held(self, sandbox: str) -> Reservation | None:
        """What one sandbox holds."""
        return self._held.get(sandbox)

    def holders(self) -> list[str]:
        """Every sandbox that holds something."""
        return list(self._held)

    def totals(self, owner: str | None = None) -> Quota:
        """What is held together, by one owner (guests' memory alone) or by all (with the overhead of their VMMs)."""
        held = [r for r in self._held.values() if owner is None or r.owner == owner]
        overhead = 0 if owner is not None else sum(VMM_OVERHEAD for r in held if r.memory)
        return Quota(
            sandboxes=sum(r.count for r in held),
            memory=sum(r.memory for r in held) + overhead,
            cpus=sum(r.cpus for r in held),
            disk=sum(r.disk for r in held),
        )

    def budget(self, facts: HostFacts | None = None) -> Quota:
        """The host's limits; derived where the settings leave them 0."""
        facts = facts or self._facts()
        settings = self._settings
        return Quota(
            sandboxes=settings.max_sandboxes,
            memory=settings.budget_memory or int(facts.memory_total * USABLE * OVERCOMMIT),
            cpus=settings.budget_cpus or facts.cpus * CPUS_PER_CORE,
            disk=settings.budget_disk,
        )

    def admit(self, sandbox: str, *, owner: str, memory: int, cpus: int, disk: int, quota: Quota | None = None) -> None:
        """Reserves, or raises :class:`CapacityExhausted` with what would fit. What the sandbox held before is exchanged."""
        before = self._held.pop(sandbox, None)
        try:
            if quota is not None:
                _refuse(Quota(sandboxes=1, memory=memory, cpus=cpus, disk=disk), self.totals(owner), quota, "key", 0)
            facts = self._facts()
            wanted = Quota(sandboxes=1, memory=memory + VMM_OVERHEAD, cpus=cpus, disk=disk)
            _refuse(wanted, self.totals(), self.budget(facts), "host", VMM_OVERHEAD)
            self._refuse_now(wanted, facts)
        except CapacityExhausted:
            if before is not None:
                self._held[sandbox] = before
            raise
        self._held[sandbox] = Reservation(owner, memory, cpus, disk)

    def _refuse_now(self, wanted: Quota, facts: HostFacts) -> None:
        """What the budget allows may still be impossible at this moment."""
        if not self._settings.budget_memory:
            largest = int(facts.memory_total * USABLE)
            coming = sum(min(r.memory + VMM_OVERHEAD, FIRST_TOUCH) for r in self._held.values() if r.memory and not r.settled)
            room = facts.memory_available - coming - MEMORY_RESERVE
            if wanted.memory > largest or room < min(wanted.memory, FIRST_TOUCH):
                fits = largest if room >= FIRST_TOUCH else min(largest, room)
                raise _exhausted("memory", "host", wanted.memory - VMM_OVERHEAD, fits - VMM_OVERHEAD)
        if not self._settings.budget_disk and (wanted.disk > facts.disk_free or facts.disk_free < DISK_RESERVE):
            raise _exhausted("disk", "host", wanted.disk, facts.disk_free - DISK_RESERVE)

    def hold(self, sandbox: str, *, owner: str, memory: int, cpus: int, disk: int) -> None:
        """Reserves without asking: a machine that exists already is adopted, whatever the budgets say now."""
        self._held[sandbox] = Reservation(owner, memory, cpus, disk, settled=True)

    def admit_volume(self, volume: str, *, owner: str, disk: int, quota: Quota | None = None) -> None:
        """The same for a volume, which has nothing but disk; again with another size: exchanged."""
        before = self._held.pop(volume, None)
        try:
            wanted = Quota(disk=disk)
            if quota is not None:
                _refuse(wanted, self.totals(owner), quota, "key", 0)
            facts = self._facts()
            _refuse(wanted, self.totals(), self.budget(facts), "host", 0)
            if not self._settings.budget_disk and facts.disk_free < DISK_RESERVE:
                raise _exhausted("disk", "host", disk, facts.disk_free - DISK_RESERVE)
        except CapacityExhausted:
            if before is not None:
                self._held[volume] = before
            raise
        self.hold_volume(volume, owner=owner, disk=disk)

    def hold_volume(self, volume: str, *, owner: str, disk: int) -> None:
        self._held[volume] = Reservation(owner, disk=disk, settled=True, count=0)

    def grow(self, sandbox: str, disk: int, quota: Quota | None) -> None:
        """Exchanges the disk that a sandbox holds, or raises :class:`CapacityExhausted`."""
        held = self._held[sandbox]
        more = disk - held.disk
        if more > 0:
            wanted = Quota(disk=more)
            if quota is not None:
                _refuse(wanted, self.totals(held.owner), Quota(disk=quota.disk), "key", 0)
            facts = self._facts()
            _refuse(wanted, self.totals(), Quota(disk=self.budget(facts).disk), "host", 0)
            if not self._settings.budget_disk and more > facts.disk_free:
                raise _exhausted("disk", "host", more, facts.disk_free - DISK_RESERVE)
        self._held[sandbox] = replace(held, disk=disk)

    def settle(self, sandbox: str) -> None:
        """The machine is up: what it first touches is now in the host's own figures."""
        if (held := self._held.get(sandbox)) is not None:
            self._held[sandbox] = replace(held, settled=True)

    def rest(self, sandbox: str) -> None:
        """The machine is gone, the sandbox and its disk remain."""
        if (held := self._held.get(sandbox)) is not None:
            self._held[sandbox] = replace(held, memory=0, cpus=0, settled=True)

    def release(self, sandbox: str) -> None:
        """Nothing is left of it."""
        self._held.pop(sandbox, None)


def _refuse(wanted: Quota, held: Quota, limit: Quota, scope: str, overhead: int) -> None:
    for what in ("sandboxes", "memory", "cpus", "disk"):
        ceiling, used, asked = getattr(limit, what), getattr(held, what), getattr(wanted, what)
        if ceiling and used + asked > ceiling:
            extra = overhead if what == "memory" else 0
            raise _exhausted(what, scope, asked - extra, ceiling - used - extra)


def _exhausted(what: str, scope: str, asked: int, fits: int) -> CapacityExhausted:
    fits = max(0, fits)
    if what in ("memory", "disk"):
        words = f"{_mib(asked)} of {what}; {_mib(fits)} would fit"
    else:
        words = f"{asked} more {'CPUs' if what == 'cpus' else what}; {fits} would fit"
    return CapacityExhausted(
        "capacity_exhausted",
        f"this {scope} has no room for {words}",
        "destroy a sandbox you no longer need (stoker ls, stoker rm), or ask for less",
        details={"resource": what, "scope": scope, "asked": asked, "fits": fits},
    )


class BootQueue:
    """At most ``width`` boots at once; between owners the turns go round, so that one's fifty do not hold up another's one."""

    def __init__(self, width: int) -> None:
        self._free = width
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def _next(self) -> None:
        while self._free > 0 and self._waiting:
            owner, line = self._waiting.popitem(last=False)
            future = line.popleft()
            if line:
                self._waiting[owner] = line
            if not future.done():
                self._free -= 1
                future.set_result(None)

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(future)
        self._next()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._free += 1
                self._next()
            raise
        try:
            yield
        finally:
            self._free += 1
            self._next()
