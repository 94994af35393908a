"""The networks of sandboxes that have an interface on the host: their slots, their policy, their published ports.

A sandbox's slot is chosen before its VMM starts (``Record.slot``; the ledger has it from then on), and given back when its machine
has ended: at a destroy, a stop, a pause. A copy has a slot of its own, in which it sees the same addresses as its original. The
firewall has the last word on what goes through; it is put up before a slot is, and taken down after.

Everything here is of root's: without it there is no slot, and :meth:`Networks.refused` says why.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Interface
from typing import TYPE_CHECKING, Final, Protocol

from stoker.engine.leases import Leases
from stoker.engine.network_words import (
    NAMESPACE,
    forwards,
    has_own_addresses,
    name_servers,
    planned,
    planned_interfaces,
    private_networks,
    ranges,
)
from stoker.errors import HostError, StokerError
from stoker.network.plan import (
    INSIDE,
    BridgePlan,
    NamespacePlan,
    RunPlan,
    Taken,
    check_ranges,
    number_of,
    parse_any_slot,
    parse_slot,
    plan_namespace,
    ula,
)

if TYPE_CHECKING:
    from stoker.engine.state import Record
    from stoker.engine.units import Units
    from stoker.host.namespaces import Namespace
    from stoker.network.denials import Denials
    from stoker.network.firewall import Firewall
    from stoker.network.resolver import Resolver
    from stoker.network.rules import Machine
    from stoker.network.slot import Joined, Plan, Slot, Slots
    from stoker.settings import Settings

__all__ = ["USUAL", "Networks", "Wire"]

log = logging.getLogger(__name__)
LOOK: Final = 20.0
"""Seconds between two looks at what others may have changed."""


@dataclass(frozen=True, slots=True)
class Wire:
    """A machine's end of its slot. ``tap`` is the VMM's; our copy is closed when that runs (:meth:`Networks.begun`)."""

    mac: str
    address: str
    gateway: str
    nameserver: str
    tap: int
    own: bool
    """Its addresses are those of no other machine: memory with them in it is for nobody else."""
    address6: str = ""
    gateway6: str = ""
    ipv6: bool = False
    """Whether its kernel may have addresses of IPv6; those on a bridge are that network's affair."""


USUAL: Final = Wire(INSIDE.guest_mac, str(INSIDE.guest), str(INSIDE.gateway.ip), "", -1, False)
"""That of any machine without addresses of its own."""


class Found(Protocol):
    """A machine that was running before this engine."""

    def tap(self) -> int | None: ...


class Networks:
    """Of one engine. What waits for the kernel is done in threads; promises are made in the engine's own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opening = asyncio.Lock()
        self._slots: Slots | None = None
        self._firewall: Firewall | None = None
        self._resolver: Resolver | None = None
        self._denials: Denials | None = None
        self._ranges = ranges(settings)
        self._foreign: list[IPv4Network] = []
        self._names: frozenset[str] = frozenset()
        self._promised: dict[str, Plan | BridgePlan] = {}
        """Of every row that has one, and of those that are about to."""
        self._pinned: dict[str, Plan | BridgePlan] = {}
        """By their sandboxes: slots that nobody else gets, with a machine in them or without."""
        self._joined: dict[str, list[BridgePlan]] = {}
        """By their sandboxes likewise: further interfaces."""
        self._up: dict[str, Slot | Joined] = {}
        self._last = -1
        self.leases = Leases()
        self._looks: asyncio.Task[None] | None = None

    @property
    def denials(self) -> Denials:
        """Imported with the first machine that has an interface on the host."""
        if self._denials is None:
            from stoker.network.denials import Denials

            self._denials = Denials()
        return self._denials

    # -- beginning and end --------------------------------------------------------------------------------------------

    def refused(self) -> str:
        """Why there can be no slots here; empty: there can."""
        if os.geteuid() != 0:
            return "an interface on the host is for root"
        return "" if os.path.exists("/dev/net/tun") else "there is no /dev/net/tun"

    async def open(self) -> Slots:
        """The firewall and the slots, when they are first wanted."""
        async with self._opening:
            if self._slots is None:
                if why := self.refused():
                    raise HostError("network_unavailable", why, "--network user")
                self._slots = await asyncio.to_thread(self._opened)
                self.denials.begin()
                self._resolver = self._resolves()
                self._looks = asyncio.create_task(self._look_after(), name="networks")
            return self._slots

    def _opened(self) -> Slots:
        from stoker.network.firewall import Firewall
        from stoker.network.slot import Slots

        ours = list(self._ranges.values())
        group = self.denials.open()
        networks = [one.network for one in ours]
        self._firewall = firewall = Firewall.open(networks, private_networks(self._settings), log_group=group)
        try:
            slots = Slots.open(firewall)
            self._look(slots)
        except BaseException:
            firewall.close()
            raise
        return slots

    def _look(self, slots: Slots) -> None:
        """What is on the host that is not ours. Raises ``range_taken`` (HostError)."""
        mine = {plan.interface for plan in self._ours()}
        found = slots.foreign(besides=mine)
        if problems := check_ranges(list(self._ranges.values()), found):
            raise HostError("range_taken", problems[0], "another network_range, run_range or ranges in the configuration")
        self._foreign = [one.network for one in found]
        self._names = slots.taken().names - mine

    def _resolves(self) -> Resolver:
        from stoker.network.resolver import Resolver

        assert self._firewall is not None
        return Resolver.open(self._firewall, name_servers(self._settings), private_networks(self._settings))

    async def aclose(self) -> None:
        """Slots of machines that live stay."""
        looks, self._looks = self._looks, None
        if looks is not None:
            looks.cancel()
            await asyncio.wait({looks})
        slots, self._slots = self._slots, None
        firewall, self._firewall = self._firewall, None
        resolver, self._resolver = self._resolver, None
        if self._denials is not None:
            self._denials.close()
        if resolver is not None:
            await resolver.aclose()
        if slots is not None:
            await asyncio.to_thread(slots.close)
        for slot in self._up.values():
            slot.close()
        self._up.clear()
        if firewall is not None:
            firewall.close()

    # -- promises -----------------------------------------------------------------------------------------------------

    async def promise(self, record: Record) -> str:
        """A slot for a row that is about to be written: its id. To be taken back with :meth:`forget`. Raises ``slots_exhausted``,
        ``tap_taken`` (CapacityExhausted), ``range_unknown`` (InvalidRequest)."""
        slots = await self.open()
        plan: Plan | BridgePlan
        if record.id in self._pinned:
            plan = self._pinned[record.id]
        elif has_own_addresses(record.request):
            await asyncio.to_thread(self._look, slots)  # as it is by now: a collision moves on to what is free
            plan = self._pinned[record.id] = planned(record, self._ranges, self._taken())
        else:
            within = self._ranges[NAMESPACE]
            plan = plan_namespace(self._taken(), within, after=self._last)
            self._last = number_of(plan, within)
        self._promised[plan.id] = plan
        return plan.id

    async def promise_joined(self, record: Record) -> list[str]:
        """The slots of its further interfaces, which are its own from now on. Raises ``tap_taken`` (CapacityExhausted)."""
        if record.id not in self._joined:
            await asyncio.to_thread(self._look, await self.open())
            self._joined[record.id] = planned_interfaces(record, self._taken())
        return [plan.id for plan in self._joined[record.id]]

    def _ours(self) -> list[Plan | BridgePlan]:
        joined = [plan for plans in self._joined.values() for plan in plans]
        return [*self._promised.values(), *self._pinned.values(), *joined]

    def _taken(self) -> Taken:
        ours = self._ours()
        return Taken(
            self._names | {plan.interface for plan in ours},
            [*self._foreign, *{plan.network for plan in ours if not isinstance(plan, BridgePlan)}],
        )

    def keep(self, record: Record) -> None:
        """A row that was found has these."""
        if record.slot:
            self._promised[record.slot] = parse_any_slot(record.slot)
        if record.pinned:
            self._pinned[record.id] = parse_any_slot(record.pinned)
        if record.joined:
            self._joined[record.id] = _bridged(record)

    def forget(self, slot: str) -> None:
        self._promised.pop(slot, None)

    def unpin(self, sandbox: str) -> None:
        """The sandbox is gone: its addresses are anybody's."""
        self._pinned.pop(sandbox, None)
        self._joined.pop(sandbox, None)
        if self._denials is not None:
            self._denials.forget(sandbox)

    # -- machines -----------------------------------------------------------------------------------------------------

    async def up(self, record: Record) -> Wire:
        """Makes a sandbox's slot. Nothing of it is there when this fails."""
        from stoker.engine.judged import egress_of, machine_of, port_of
        from stoker.network.egress import NONE

        slots = await self.open()
        plan = parse_any_slot(record.slot)
        if isinstance(plan, BridgePlan):
            joined = await asyncio.to_thread(slots.join, plan, port_of(record, plan))
            self._up[record.slot] = joined
            request = record.request
            return Wire(
                plan.mac, request.address or "", request.gateway or "", self._settings.nameserver, joined.tap, True, ipv6=True
            )
        if egress_of(record.request.egress) != NONE and not forwards():
            raise HostError(
                "network_unprepared",
                "this host does not forward packets: machines would reach nothing",
                "stoker network check --fix",
            )
        machine = machine_of(record, plan)
        slot = await asyncio.to_thread(slots.up, plan, machine)
        self._up[record.slot] = slot
        self.denials.watch(record.id, machine)
        await self._answer(machine, plan)
        inside = isinstance(plan, NamespacePlan)
        gateway = INSIDE.gateway.ip if inside else plan.host
        wire = Wire(plan.mac, f"{plan.guest}/30", str(gateway), self._settings.nameserver, slot.tap, not inside)
        if not machine.ipv6:
            return wire
        guest, host = (INSIDE.guest6, INSIDE.gateway6.ip) if inside else (IPv6Interface((ula(plan.guest), 126)), ula(plan.host))
        return replace(wire, address6=str(guest), gateway6=str(host), ipv6=True)

    async def join(self, record: Record) -> tuple[Wire, ...]:
        """Makes the slots of its further interfaces."""
        from stoker.engine.judged import port_of

        slots, wires = await self.open(), []
        for plan, asked in zip(_bridged(record), record.request.interfaces, strict=True):
            joined = await asyncio.to_thread(slots.join, plan, port_of(record, plan))
            self._up[plan.id] = joined
            wires.append(Wire(plan.mac, asked.address or "", "", "", joined.tap, True, ipv6=True))
        return tuple(wires)

    async def lease(self, record: Record, name: str, units: Units, *, found: bool = False) -> None:
        """Offers its addresses by DHCP to a machine with an init of its own; ``found``: it may be offered them already."""
        slot = self._up[record.slot]
        assert not isinstance(slot.plan, BridgePlan)
        await self.leases.begin(name, slot, record.hostname, self._settings.nameserver, units, found=found)

    async def _look_after(self) -> None:
        """The tables are as they should be, whoever flushed them; DHCP is served."""
        while True:
            await asyncio.sleep(LOOK)
            try:
                if self._firewall is not None and await asyncio.to_thread(self._firewall.restore):
                    log.warning("the firewall's tables were not what they should be; they were made anew")
                await self.leases.look()
            except (StokerError, OSError) as error:
                log.warning("the machines' networks could not be looked after: %s", error)

    async def _answer(self, machine: Machine, plan: RunPlan | NamespacePlan) -> None:
        """Serves names to a machine that has to use our resolver, and no longer to one that need not."""
        assert self._resolver is not None
        if machine.resolver is not None:
            await self._resolver.put(machine, plan.host, self.denials.learning(machine.interface))
        else:
            await self._resolver.remove(machine.interface)

    def begun(self, record: Record) -> None:
        """The VMM has its own copy of the TAP."""
        for name in (record.slot, *record.joined):
            if (slot := self._up.get(name)) is not None:
                slot.let_go()

    async def adopt(self, record: Record, machine: Found) -> None:
        """Of a machine that outlived its daemon."""
        from stoker.engine.judged import machine_of, port_of

        slots, firewall = await self.open(), self._firewall
        assert firewall is not None
        for joined in _bridged(record):
            await asyncio.to_thread(firewall.put, port_of(record, joined))
            self._up[joined.id] = slots.rejoin(joined)
        if not record.slot:
            return
        plan = parse_any_slot(record.slot)
        if isinstance(plan, BridgePlan):
            await asyncio.to_thread(firewall.put, port_of(record, plan))
            self._up[record.slot] = slots.rejoin(plan)
            return
        machine_there = machine_of(record, plan)

        def work() -> Slot:
            tap = machine.tap()
            try:
                found = slots.adopt(plan, tap)
            finally:
                if tap is not None:
                    os.close(tap)
            firewall.put(machine_there)
            return found

        self._up[record.slot] = await asyncio.to_thread(work)
        self.denials.watch(record.id, machine_there)
        await self._answer(machine_there, plan)

    async def change(self, record: Record, *, wait: bool = True) -> None:
        """Its policy, or its ports, are others now: what it sends is judged by them when this returns. With ``wait``, nothing comes
        in any more either that it may not have; else that is seen to behind."""
        from stoker.engine.judged import machine_of, port_of

        slots = await self.open()
        for joined in _bridged(record):
            if joined.id in self._up:
                await asyncio.to_thread(slots.firewall.put, port_of(record, joined))
        if not record.slot:
            return
        plan = parse_any_slot(record.slot)
        if isinstance(plan, BridgePlan):
            await asyncio.to_thread(slots.firewall.put, port_of(record, plan))
            return
        machine = machine_of(record, plan)
        assert self._resolver is not None
        self.denials.watch(record.id, machine)
        known = self._resolver.known(machine.interface, machine.egress)
        if machine.resolver is not None and machine.interface not in self._resolver.counts():
            await self._answer(machine, plan)  # it answers before questions are led there
        cutting = await asyncio.to_thread(slots.change, machine, known)
        await self._answer(machine, plan)
        if wait:
            await asyncio.wrap_future(cutting)
        else:
            cutting.add_done_callback(_behind)

    async def release(self, slot: str) -> None:
        """Gives a slot back, whatever of it is there; twice is fine. Its machine has ended."""
        try:
            slots = await self.open()
        except StokerError as error:
            log.warning("the slot %s stays: %s", slot, error)
            return
        plan = parse_any_slot(slot)
        assert self._resolver is not None
        await self._resolver.remove(plan.interface)
        self.denials.leave(plan.interface)
        await asyncio.wrap_future(slots.drop(plan, self._up.pop(slot, None)))
        self.forget(slot)

    async def seen(self, record: Record) -> tuple[Firewall, Machine, Plan, Namespace | None]:
        """What is known of a sandbox that has a slot: to be looked at."""
        from stoker.engine.judged import machine_of

        await self.open()
        assert self._firewall is not None
        plan, slot = parse_slot(record.slot), self._up.get(record.slot)
        return self._firewall, machine_of(record, plan), plan, slot.namespace if slot is not None else None

    async def prune(self, keep: Iterable[str]) -> None:
        """Takes out of the firewall what belongs to no sandbox any more."""
        if self._firewall is not None:
            interfaces = [parse_any_slot(slot).interface for slot in keep]
            await asyncio.to_thread(self._firewall.prune, interfaces)


def _bridged(record: Record) -> list[BridgePlan]:
    return [plan for plan in map(parse_any_slot, record.joined) if isinstance(plan, BridgePlan)]


def _behind(cutting: Future[None]) -> None:
    if (error := cutting.exception()) is not None:
        log.warning("connections that a machine may not have any more were not cut: %s", error)
