"""DHCP for machines with an init of their own: a dnsmasq for each, started again when it ends.

Which there are follows from the ledger (``dhcp``, by the machine's directory), so one that a crash left is found, or ended.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.errors import StokerError

if TYPE_CHECKING:
    from stoker.host.process import ProcessIdentity
    from stoker.network.dhcp import Dhcp
    from stoker.network.slot import Slot

__all__ = ["Leases"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Lease:
    offered: Dhcp
    slot: Slot
    process: ProcessIdentity | None


class Leases:
    """Of one engine. What waits is done in threads."""

    def __init__(self) -> None:
        self._leases: dict[Path, _Lease] = {}

    async def begin(self, slot: Slot, directory: Path, hostname: str, nameserver: str, *, found: bool = False) -> None:
        """Offers a machine the addresses of its slot; with ``found``, by what runs already, if it does. Raises ``tool_missing``,
        ``dhcp_failed`` (HostError)."""
        from stoker.network import dhcp

        name = hostname.partition(".")[0]
        lease = _Lease(dhcp.of_slot(slot.plan, hostname=name, nameservers=(IPv4Address(nameserver),)), slot, None)
        if found:
            lease.process = await asyncio.to_thread(lambda: next(iter(dhcp.find(directory)), None))
        if lease.process is None:
            await asyncio.to_thread(_start, lease, directory)
        self._leases[directory] = lease

    async def end(self, directory: Path) -> None:
        """Twice is fine."""
        from stoker.network import dhcp

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
