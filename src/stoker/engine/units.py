"""Machines as units of systemd's: ``stoker-ID.scope`` in ``stoker.slice``, with the machine's limits, known to machined.

A scope and not a service: a machine's shim inherits sockets, disks and pipes, which a service started by PID 1 cannot, and a scope
is one call around a process that is there already. The shim is put into it while it waits (:data:`stoker.vmm.machine.Gate`), so
the VMM is born there and every page of it is charged there. So a stop, a restart or an upgrade of the daemon, whatever its unit's
KillMode, has nothing to do with machines. ``systemctl stop`` of a machine's unit, or ``machinectl terminate``, ends that machine,
and its sandbox is stopped with that as the reason.

The ledger has a unit by its exact name (kind ``unit``) before it is made. systemd forgets it with its last process.
Where systemd is not PID 1, cannot be reached or refuses, machines get plain control groups, as far as the host lets us make some.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from stoker.errors import HostError
from stoker.host import systemd

if TYPE_CHECKING:
    from stoker.host.cgroups import Limits
    from stoker.host.systemd import Property, Systemd

__all__ = ["SLICE", "Units", "properties", "unit_name"]

log = logging.getLogger(__name__)
SLICE: Final = "stoker.slice"
STOP_SECONDS: Final = 10


def unit_name(sandbox: str) -> str:
    return f"stoker-{sandbox}.scope"


def properties(description: str, limits: Limits) -> dict[str, Property]:
    """A machine's scope as systemd has it: D-Bus signatures and values."""
    wanted: dict[str, Property] = {
        "Description": ("s", description),
        "Slice": ("s", SLICE),
        "Delegate": ("b", True),
        "CollectMode": ("s", "inactive-or-failed"),
        "TimeoutStopUSec": ("t", STOP_SECONDS * 1_000_000),
        "CPUAccounting": ("b", True),
        "MemoryAccounting": ("b", True),
        "TasksAccounting": ("b", True),
        "CPUWeight": ("t", limits.weight),
    }
    if limits.memory:
        wanted["MemoryMax"] = ("t", limits.memory)
        wanted["MemorySwapMax"] = ("t", 0)
    if limits.pids:
        wanted["TasksMax"] = ("t", limits.pids)
    if limits.cpus:
        wanted["CPUQuotaPerSecUSec"] = ("t", limits.cpus * 1_000_000)
    return wanted


class Units:
    """The engine's one connection to systemd, made again when it broke. ``problem`` says why there are no units (any more)."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._systemd: Systemd | None = None
        self._lock = asyncio.Lock()
        self.problem = "it was not tried"

    async def __aenter__(self) -> Units:
        try:
            await self._connected()
        except HostError:
            log.info("no units for machines: %s", self.problem)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def usable(self) -> bool:
        return not self.problem

    async def _connected(self) -> Systemd:
        async with self._lock:
            if self._systemd is None or not self._systemd.connected:
                await self._stack.aclose()
                self._systemd = None
                try:
                    self._systemd = await self._stack.enter_async_context(systemd.connect())
                except HostError as error:
                    self.problem = error.message
                    raise
                self.problem = ""
            return self._systemd

    async def enter(self, sandbox: str, pids: list[int], description: str, limits: Limits) -> None:
        """Puts processes into the sandbox's unit. Raises :class:`HostError` when systemd does not do it."""
        found = await self._connected()
        await found.start_scope(unit_name(sandbox), pids, properties(description, limits))

    async def register(self, sandbox: str, leader: int) -> None:
        """Makes the machine known to machined. That there is none, or that it refuses, costs ``machinectl`` only."""
        identity = hashlib.sha256(sandbox.encode()).digest()[:16]
        try:
            await (await self._connected()).register_machine(sandbox, leader, identity, "stoker")
        except HostError as error:
            log.info("%s is not known to machined: %s", sandbox, error)

    async def start(self, name: str, template: tuple[str, str]) -> None:
        """Starts an instance of a template unit of ours. Raises :class:`HostError`."""
        await (await self._connected()).start_unit(name, template)

    async def release(self, name: str) -> None:
        """Ends what is in a unit, and with it the unit. Without systemd there is none: its processes are released by themselves."""
        try:
            await (await self._connected()).stop_unit(name)
        except HostError as error:
            if error.code != "systemd_unreachable":
                raise
            log.info("%s is left to systemd: %s", name, error)
