"""DHCP for machines with an init of their own: a dnsmasq for each, started again when it ends.

Where machines have units of systemd's, one of the run plan is offered its addresses by an instance of ``dnsmasq-tap@.service``,
which systemd looks after; every other by a process of ours. Which there are follows from the ledger (``dhcp``, by the unit, or by
the machine's directory), so one that a crash left is found, or ended.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stoker.api.models import InitMode, NetworkMode
from stoker.errors import StokerError
from stoker.host.durable import write_atomically
from stoker.network.plan import RunPlan, parse_slot

if TYPE_CHECKING:
    from stoker.engine.state import Record
    from stoker.engine.units import Units
    from stoker.host.process import ProcessIdentity
    from stoker.network.dhcp import Dhcp
    from stoker.network.slot import Plan, Slot

__all__ = ["Leases", "lease_name", "lease_of"]

log = logging.getLogger(__name__)
UNIT: Final = ".service"


def lease_name(plan: Plan, directory: Path, units: Units) -> str:
    """What the ledger calls it."""
    from stoker.network import dhcp

    return dhcp.instance(plan) if isinstance(plan, RunPlan) and units.usable else str(directory)


def lease_of(record: Record, slot: str, directory: Path, units: Units) -> str:
    """The same of a sandbox whose machine has this slot; empty: it is offered nothing."""
    if record.request.init is not InitMode.IMAGE or record.request.network is not NetworkMode.NAT:
        return ""
    return lease_name(parse_slot(slot), directory, units)


@dataclass(slots=True)
class _Lease:
    offered: Dhcp
    slot: Slot
    process: ProcessIdentity | None


class Leases:
    """Of one engine. What waits is done in threads."""

    def __init__(self) -> None:
        self._leases: dict[Path, _Lease] = {}

    async def begin(self, name: str, slot: Slot, hostname: str, nameserver: str, units: Units, *, found: bool = False) -> None:
        """Offers a machine the addresses of its slot; ``name``: :func:`lease_name`; ``found``: what runs already does, if it does.
        Raises ``tool_missing``, ``dhcp_failed``, ``unit_not_started`` (HostError)."""
        from stoker.network import dhcp

        offered = dhcp.of_slot(slot.plan, hostname=hostname.partition(".")[0], nameservers=(IPv4Address(nameserver),))
        if name.endswith(UNIT):
            place, text = dhcp.unit_environment(offered)
            write_atomically(place, text.encode(), 0o644)
            await units.start(name, (dhcp.UNIT_NAME, dhcp.UNIT))
            return
        directory, lease = Path(name), _Lease(offered, slot, None)
        if found:
            lease.process = await asyncio.to_thread(lambda: next(iter(dhcp.find(directory)), None))
        if lease.process is None:
            await asyncio.to_thread(_start, lease, directory)
        self._leases[directory] = lease

    async def end(self, name: str, units: Units) -> None:
        """Twice is fine."""
        from stoker.network import dhcp

        if name.endswith(UNIT):
            await units.release(name)
            dhcp.unit_file(name).unlink(missing_ok=True)
            return
        directory = Path(name)
        lease = self._leases.pop(directory, None)
        await asyncio.to_thread(dhcp.end, directory, lease.process if lease is not None else None)

    async def look(self) -> None:
        """Starts again what ended by itself."""
        for directory, lease in list(self._leases.items()):
            if lease.process is None or lease.process.alive():
                continue
            log.warning("the DHCP service of %s ended; starting it again", directory.name)
            try:
                await asyncio.to_thread(_start, lease, directory)
            except StokerError as error:
                log.warning("the DHCP service of %s: %s", directory.name, error)


def _start(lease: _Lease, directory: Path) -> None:
    from stoker.host.namespaces import Namespace, own_namespace
    from stoker.network import dhcp

    with ExitStack() as undo:
        inside = lease.slot.namespace or undo.enter_context(Namespace(own_namespace()))
        lease.process = dhcp.start(lease.offered, directory, inside)
