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
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Final, Protocol

from stoker.api.models import CreateSandbox, NetworkMode
from stoker.errors import HostError, InvalidRequest, StokerError
from stoker.network.egress import ALL, NONE, Egress, parse_egress
from stoker.network.egress import Protocol as Transport
from stoker.network.plan import INSIDE, NAMESPACE_RANGE, NamespacePlan, RunPlan, Taken, number_of, parse_slot, plan_namespace
from stoker.network.rules import SERVICES, Machine, Publication

if TYPE_CHECKING:
    from stoker.engine.state import Record
    from stoker.network.firewall import Firewall
    from stoker.network.resolver import Resolver
    from stoker.network.slot import Plan, Slot, Slots
    from stoker.settings import Settings

__all__ = ["Networks", "Wire", "check_network"]

log = logging.getLogger(__name__)
RANGES: Final = (NAMESPACE_RANGE,)


@dataclass(frozen=True, slots=True)
class Wire:
    """A machine's end of its slot. ``tap`` is the VMM's; our copy is closed when that runs (:meth:`Networks.begun`)."""

    mac: str
    address: str
    gateway: str
    nameserver: str
    tap: int


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
        self._taken = Taken()
        self._promised: dict[str, Plan] = {}
        """Of every row that has one, and of those that are about to."""
        self._up: dict[str, Slot] = {}
        self._last = -1

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
                self._resolver = self._resolves()
            return self._slots

    def _opened(self) -> Slots:
        from stoker.network.firewall import Firewall
        from stoker.network.slot import Slots

        self._firewall = firewall = Firewall.open([one.network for one in RANGES], self._private())
        try:
            slots = Slots.open(firewall)
        except BaseException:
            firewall.close()
            raise
        self._taken = slots.taken()
        return slots

    def _resolves(self) -> Resolver:
        from stoker.network.resolver import Resolver

        assert self._firewall is not None
        return Resolver.open(self._firewall, private=self._private())

    def _private(self) -> list[IPv4Network]:
        """The operator's own networks, beside those that are private to everybody."""
        return []

    async def aclose(self) -> None:
        """Slots of machines that live stay."""
        slots, self._slots = self._slots, None
        firewall, self._firewall = self._firewall, None
        resolver, self._resolver = self._resolver, None
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

    async def promise(self) -> str:
        """A slot for a row that is about to be written: its id. To be taken back with :meth:`forget`."""
        await self.open()
        taken = Taken(self._taken.names, [*self._networks()])
        plan = plan_namespace(taken, after=self._last)
        self._last = number_of(plan, NAMESPACE_RANGE)
        self._promised[plan.id] = plan
        return plan.id

    def _networks(self) -> Iterable[IPv4Network]:
        for plan in self._promised.values():
            yield plan.network

    def keep(self, slot: str) -> None:
        """A row that was found has this one."""
        self._promised[slot] = parse_slot(slot)

    def forget(self, slot: str) -> None:
        self._promised.pop(slot, None)

    # -- machines -----------------------------------------------------------------------------------------------------

    async def up(self, record: Record) -> Wire:
        """Makes a sandbox's slot. Nothing of it is there when this fails."""
        slots = await self.open()
        if egress_of(record.request.egress) != NONE and not _forwards():
            raise HostError(
                "network_unprepared",
                "this host does not forward packets: machines would reach nothing",
                "stoker network check --fix",
            )
        plan = parse_slot(record.slot)
        machine = machine_of(record, plan)
        slot = await asyncio.to_thread(slots.up, plan, machine)
        self._up[record.slot] = slot
        await self._answer(machine, plan)
        inside = isinstance(plan, NamespacePlan)
        gateway = INSIDE.gateway.ip if inside else plan.host
        return Wire(plan.mac, f"{plan.guest}/30", str(gateway), self._settings.nameserver, slot.tap)

    async def _answer(self, machine: Machine, plan: RunPlan | NamespacePlan) -> None:
        """Serves names to a machine that has to use our resolver, and no longer to one that need not."""
        assert self._resolver is not None
        if machine.resolver is not None:
            await self._resolver.put(machine, plan.host)
        else:
            await self._resolver.remove(machine.interface)

    def begun(self, record: Record) -> None:
        """The VMM has its own copy of the TAP."""
        if (slot := self._up.get(record.slot)) is not None:
            slot.let_go()

    async def adopt(self, record: Record, machine: Found) -> None:
        """Of a machine that outlived its daemon."""
        slots = await self.open()
        plan, firewall = parse_slot(record.slot), self._firewall
        machine_there = machine_of(record, plan)
        assert firewall is not None

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
        await self._answer(machine_there, plan)

    async def change(self, record: Record) -> None:
        """Its policy, or its ports, are others now. Returns when nothing comes in any more that it may not have."""
        slots = await self.open()
        plan = parse_slot(record.slot)
        machine = machine_of(record, plan)
        assert self._resolver is not None
        known = self._resolver.known(machine.interface, machine.egress)
        if machine.resolver is not None and machine.interface not in self._resolver.counts():
            await self._resolver.put(machine, plan.host)  # it answers before questions are led there
        await asyncio.wrap_future(slots.change(machine, known))
        await self._answer(machine, plan)

    async def release(self, slot: str) -> None:
        """Gives a slot back, whatever of it is there; twice is fine. Its machine has ended."""
        try:
            slots = await self.open()
        except StokerError as error:
            log.warning("the slot %s stays: %s", slot, error)
            return
        plan = parse_slot(slot)
        assert self._resolver is not None
        await self._resolver.remove(plan.interface)
        await asyncio.wrap_future(slots.drop(plan, self._up.pop(slot, None)))
        self.forget(slot)

    async def prune(self, keep: Iterable[str]) -> None:
        """Takes out of the firewall what belongs to no sandbox any more."""
        if self._firewall is not None:
            interfaces = [parse_slot(slot).interface for slot in keep]
            await asyncio.to_thread(self._firewall.prune, interfaces)


def _forwards() -> bool:
    with open("/proc/sys/net/ipv4/ip_forward", encoding="ascii") as file:
        return file.read().strip() == "1"


def check_network(request: CreateSandbox) -> None:
    """Refuses what can never be: ``bad_network``, ``egress_invalid``, ``port_invalid`` (InvalidRequest)."""
    if request.network is not NetworkMode.NAT and (request.egress is not None or request.publish):
        raise InvalidRequest("bad_network", "a policy and ports are for the network nat", "--network nat")
    egress_of(request.egress)
    seen = [(one.protocol, one.host_port, one.host_address) for one in map(publication_of, request.publish)]
    if len(set(seen)) != len(seen):
        raise InvalidRequest("port_invalid", "a port of the host is published twice", "name each once")


def machine_of(record: Record, plan: RunPlan | NamespacePlan) -> Machine:
    """What the firewall knows of a sandbox."""
    egress = egress_of(record.request.egress)
    names = egress.has_domains
    return Machine(
        plan.interface,
        plan.source_mac,
        plan.address,
        egress,
        published=tuple(publication_of(text) for text in record.request.publish),
        host_services=SERVICES if names else (),
        resolver=plan.host if names else None,
    )


def egress_of(text: str | None) -> Egress:
    """Empty: everything public. Errors: ``egress_invalid`` (InvalidRequest)."""
    return parse_egress(text) if text else ALL


def publication_of(text: str) -> Publication:
    """``[IP:]HOST:GUEST[/udp]``. Errors: ``port_invalid`` (InvalidRequest)."""
    ports, _, protocol = text.partition("/")
    address, host, guest = ["", *ports.rsplit(":", 2)][-3:] if ":" in ports else ("", "", "")
    try:
        numbers = [int(port) for port in (host, guest) if port.isascii() and port.isdigit()]
        if len(numbers) != 2 or not all(0 < number < 65536 for number in numbers):
            raise ValueError
        where = IPv4Address(address) if address else None
        return Publication(Transport(protocol or "tcp"), numbers[0], numbers[1], where)
    except (ValueError, AddressValueError):
        raise InvalidRequest(
            "port_invalid", f"{text[:60]!r} is no port to publish", "8080:80, 127.0.0.1:8080:80, 5353:53/udp"
        ) from None
