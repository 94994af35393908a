"""A sandbox's slots: written down, made, and offered by DHCP where its own init asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stoker.engine.core import Box, Core
from stoker.engine.leases import lease_of
from stoker.engine.ledger import Kind, Ledger
from stoker.engine.network_words import ON_THE_HOST, has_own_addresses
from stoker.engine.trace import trace
from stoker.errors import Conflict
from stoker.network.plan import parse_any_slot

__all__ = ["make_slots", "whose_port"]


@contextmanager
def whose_port(core: Core, box: Box) -> Iterator[None]:
    """Whoever is refused a port of the host's is told which sandbox has it, if it is theirs."""
    try:
        yield
    except Conflict as error:
        interface = error.details.get("interface")
        for other in core.boxes.values() if interface else ():
            record = other.record
            if record.owner == box.record.owner and record.slot and parse_any_slot(record.slot).interface == interface:
                error.message = error.message.replace(f"another machine ({interface})", record.label)
                error.hint = f"another port; or take it from that one: stoker network set {record.label} --no-ports"
        raise


async def make_slots(core: Core, box: Box, directory: Path) -> None:
    request = box.record.request
    slot = await core.networks.promise(box.record) if request.network in ON_THE_HOST else ""
    try:
        pinned = slot if has_own_addresses(request) else ""
        joined = await core.networks.promise_joined(box.record) if request.interfaces else []
        lease = lease_of(box.record, slot, directory, core.units)
        things = [*((Kind.SLOT, one) for one in (slot, *joined) if one), *([(Kind.DHCP, lease)] if lease else [])]
        await core.save(
            box, slot=slot, pinned=pinned, joined=joined, durable=True, also=lambda db: Ledger.intend_in(db, box.id, things)
        )
    except BaseException:
        core.networks.forget(slot)
        raise
    trace("slot.after_intent")
    with whose_port(core, box):
        box.wire = await core.networks.up(box.record) if slot else None
    box.joined = await core.networks.join(box.record) if joined else ()
    if lease:
        await core.networks.lease(box.record, lease, core.units)
