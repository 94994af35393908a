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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.errors import CapacityExhausted

if TYPE_CHECKING:
    from stoker.settings import Settings

__all__ = ["Admission", "BootQueue", "HostFacts", "Quota", "Reservation", "host_facts"]

MIB = 1 << 20
VMM_OVERHEAD = 64 * MIB
"""A VMM's own memory besides the guest's: 15-50 MiB measured, more under TCG while it translates."""
OVERCOMMIT = 1.5
FIRST_TOUCH = 160 * MIB
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
class Quota:
    """What one key may hold at once; 0 is without a limit."""

    memory: int = 0
    cpus: int = 0
    disk: int = 0
    sandboxes: int = 0


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one sandbox holds. ``settled``: its machine has touched what it first touches."""

    owner: str
    memory: int = 0
    cpus: int = 0
    disk: int = 0
    settled: bool = False


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

    def __init__(self, settings: Settings, facts: Any = None) -> None:
        self._settings = settings
        self._facts = facts or (lambda: host_facts(settings.data_dir))
        self._held: dict[str, Reservation] = {}

    def totals(self, owner: str | None = None) -> Quota:
        """What is held together, by one owner or by all."""
        held = [r for r in self._held.values() if owner is None or r.owner == owner]
        return Quota(sum(r.memory for r in held), sum(r.cpus for r in held), sum(r.disk for r in held), len(held))

    def budget(self, facts: HostFacts | None = None) -> Quota:
        """The host's limits; derived where the settings leave them 0."""
        facts = facts or self._facts()
        settings = self._settings
        return Quota(
            settings.budget_memory or int(facts.memory_total * 0.9 * OVERCOMMIT),
            settings.budget_cpus or facts.cpus * CPUS_PER_CORE,
            settings.budget_disk,
            settings.max_sandboxes,
        )

    def admit(self, sandbox: str, *, owner: str, memory: int, cpus: int, disk: int, quota: Quota | None = None) -> None:
        """Reserves, or raises :class:`CapacityExhausted` with what would fit. A sandbox that holds something already exchanges it."""
        before = self._held.pop(sandbox, None)
        try:
            wanted = Quota(memory + VMM_OVERHEAD, cpus, disk, 1)
            if quota is not None:
                _refuse(wanted, self.totals(owner), quota, "this key")
            facts = self._facts()
            _refuse(wanted, self.totals(), self.budget(facts), "this host")
            self._refuse_now(wanted, facts)
        except CapacityExhausted:
            if before is not None:
                self._held[sandbox] = before
            raise
        self._held[sandbox] = Reservation(owner, wanted.memory, cpus, disk)

    def _refuse_now(self, wanted: Quota, facts: HostFacts) -> None:
        """What the budget allows may still be impossible at this moment."""
        if not self._settings.budget_memory:
            largest = int(facts.memory_total * 0.9)
            coming = sum(min(r.memory, FIRST_TOUCH) for r in self._held.values() if r.memory and not r.settled)
            room = facts.memory_available - coming - MEMORY_RESERVE
            if wanted.memory > largest or room < min(wanted.memory, FIRST_TOUCH):
                fits = max(0, min(largest, room) - VMM_OVERHEAD)
                raise _exhausted("memory", "this host", _mib(wanted.memory - VMM_OVERHEAD), _mib(fits), fits)
        if not self._settings.budget_disk and (wanted.disk > facts.disk_free or facts.disk_free < DISK_RESERVE):
            fits = max(0, facts.disk_free - DISK_RESERVE)
            raise _exhausted("disk", "this host", _mib(wanted.disk), _mib(fits), fits)

    def hold(self, sandbox: str, *, owner: str, memory: int, cpus: int, disk: int) -> None:
        """Reserves without asking: a machine that exists already is adopted, whatever the budgets say now."""
        self._held[sandbox] = Reservation(owner, memory + VMM_OVERHEAD if memory else 0, cpus, disk, settled=True)

    def settle(self, sandbox: str) -> None:
        """The machine is up: what it first touches is now in the host's own figures."""
        if (r := self._held.get(sandbox)) is not None:
            self._held[sandbox] = Reservation(r.owner, r.memory, r.cpus, r.disk, settled=True)

    def rest(self, sandbox: str) -> None:
        """The machine is gone, the sandbox and its disk remain."""
        if (r := self._held.get(sandbox)) is not None:
            self._held[sandbox] = Reservation(r.owner, 0, 0, r.disk, settled=True)

    def release(self, sandbox: str) -> None:
        self._held.pop(sandbox, None)


def _refuse(wanted: Quota, held: Quota, limit: Quota, whose: str) -> None:
    for what, words in (("sandboxes", str), ("memory", _mib), ("cpus", str), ("disk", _mib)):
        ceiling = getattr(limit, what)
        if ceiling and getattr(held, what) + getattr(wanted, what) > ceiling:
            fits = max(0, ceiling - getattr(held, what))
            asked = getattr(wanted, what)
            if what == "memory":
                fits, asked = max(0, fits - VMM_OVERHEAD), asked - VMM_OVERHEAD
            raise _exhausted(what, whose, words(asked), words(fits), fits)


def _exhausted(what: str, whose: str, asked: str, fits: str, amount: int) -> CapacityExhausted:
    noun = {"sandboxes": "more sandboxes", "cpus": "CPUs"}.get(what, f"of {what}")
    return CapacityExhausted(
        "capacity_exhausted",
        f"{whose} has no room for {asked} {noun}; {fits} would fit",
        "destroy a sandbox you no longer need (stoker ls, stoker rm), or ask for less",
        details={"resource": what, "scope": "key" if whose == "this key" else "host", "fits": amount},
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
