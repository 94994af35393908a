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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Final, Protocol

from stoker.api.models import CreateSandbox, NetworkMode
from stoker.engine.leases import Leases
from stoker.errors import HostError, InvalidRequest, StokerError
from stoker.network.denials import Denials
from stoker.network.egress import ALL, NONE, Egress, parse_egress
from stoker.network.egress import Protocol as Transport
from stoker.network.plan import (
    INSIDE,
    NAMESPACE_RANGE,
    RUN_RANGE,
    NamespacePlan,
    Range,
    RunPlan,
    Taken,
    check_ranges,
    first_guess,
    number_of,
    parse_slot,
    plan_namespace,
    plan_run,
    plan_tap,
)
from stoker.network.rules import SERVICES, Machine, Publication

if TYPE_CHECKING:
    from stoker.engine.state import Record
    from stoker.engine.units import Units
    from stoker.host.namespaces import Namespace
    from stoker.network.dns_upstream import Server
    from stoker.network.firewall import Firewall
    from stoker.network.resolver import Resolver
    from stoker.network.slot import Plan, Slot, Slots
    from stoker.settings import Settings

__all__ = ["Networks", "Wire", "check_network", "default_network", "has_own_addresses", "planned", "range_of", "ranges"]

log = logging.getLogger(__name__)
NAMESPACE: Final = NAMESPACE_RANGE.name
DEFAULT: Final = RUN_RANGE.name
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
        self.denials = Denials()
        self._ranges = ranges(settings)
        self._foreign: list[IPv4Network] = []
        self._names: frozenset[str] = frozenset()
        self._promised: dict[str, Plan] = {}
        """Of every row that has one, and of those that are about to."""
        self._pinned: dict[str, Plan] = {}
        """By their sandboxes: slots that nobody else gets, with a machine in them or without."""
        self._up: dict[str, Slot] = {}
        self._last = -1
        self.leases = Leases()
        self._looks: asyncio.Task[None] | None = None

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
        mine = {plan.interface for plan in (*self._promised.values(), *self._pinned.values())}
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
        self.denials.close()
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
        plan: Plan
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

    def _taken(self) -> Taken:
        ours = [*self._promised.values(), *self._pinned.values()]
        return Taken(
            self._names | {plan.interface for plan in ours}, [*self._foreign, *dict.fromkeys(plan.network for plan in ours)]
        )

    def keep(self, record: Record) -> None:
        """A row that was found has these."""
        if record.slot:
            self._promised[record.slot] = parse_slot(record.slot)
        if record.pinned:
            self._pinned[record.id] = parse_slot(record.pinned)

    def forget(self, slot: str) -> None:
        self._promised.pop(slot, None)

    def unpin(self, sandbox: str) -> None:
        """The sandbox is gone: its addresses are anybody's."""
        self._pinned.pop(sandbox, None)
        self.denials.forget(sandbox)

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
        self.denials.watch(record.id, machine)
        await self._answer(machine, plan)
        inside = isinstance(plan, NamespacePlan)
        gateway = INSIDE.gateway.ip if inside else plan.host
        return Wire(plan.mac, f"{plan.guest}/30", str(gateway), self._settings.nameserver, slot.tap, not inside)

    async def lease(self, record: Record, name: str, units: Units, *, found: bool = False) -> None:
        """Offers its addresses by DHCP to a machine with an init of its own; ``found``: it may be offered them already."""
        slot = self._up[record.slot]
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
        self.denials.watch(record.id, machine_there)
        await self._answer(machine_there, plan)

    async def change(self, record: Record) -> None:
        """Its policy, or its ports, are others now. Returns when nothing comes in any more that it may not have."""
        slots = await self.open()
        plan = parse_slot(record.slot)
        machine = machine_of(record, plan)
        assert self._resolver is not None
        self.denials.watch(record.id, machine)
        known = self._resolver.known(machine.interface, machine.egress)
        if machine.resolver is not None and machine.interface not in self._resolver.counts():
            await self._answer(machine, plan)  # it answers before questions are led there
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
        self.denials.leave(plan.interface)
        await asyncio.wrap_future(slots.drop(plan, self._up.pop(slot, None)))
        self.forget(slot)

    async def seen(self, record: Record) -> tuple[Firewall, Machine, Plan, Namespace | None]:
        """What is known of a sandbox that has a slot: to be looked at."""
        await self.open()
        assert self._firewall is not None
        plan, slot = parse_slot(record.slot), self._up.get(record.slot)
        return self._firewall, machine_of(record, plan), plan, slot.namespace if slot is not None else None

    async def prune(self, keep: Iterable[str]) -> None:
        """Takes out of the firewall what belongs to no sandbox any more."""
        if self._firewall is not None:
            interfaces = [parse_slot(slot).interface for slot in keep]
            await asyncio.to_thread(self._firewall.prune, interfaces)


def _forwards() -> bool:
    with open("/proc/sys/net/ipv4/ip_forward", encoding="ascii") as file:
        return file.read().strip() == "1"


def default_network(settings: Settings) -> NetworkMode:
    """What a machine gets that asks for nothing."""
    if settings.network != "auto":
        try:
            return NetworkMode(settings.network)
        except ValueError:
            hint = "auto, nat, user or none"
            raise InvalidRequest("bad_setting", f"there is no network {settings.network!r}", hint) from None
    usable = os.geteuid() == 0 and os.path.exists("/dev/net/tun") and _forwards()
    return NetworkMode.NAT if usable else NetworkMode.USER


def ranges(settings: Settings) -> dict[str, Range]:
    """By their names. Raises ``range_invalid`` (InvalidRequest)."""
    found = [Range.parse(NAMESPACE, settings.network_range), Range.parse(DEFAULT, settings.run_range)]
    for text in filter(None, (one.strip() for one in settings.ranges.split(","))):
        name, _, network = text.partition("=")
        found.append(Range.parse(name.strip(), network.strip()))
    if len({one.name for one in found}) != len(found):
        raise InvalidRequest("range_invalid", "two ranges have one name", f"{NAMESPACE} and {DEFAULT} are those of the settings")
    return {one.name: one for one in found}


def private_networks(settings: Settings) -> list[IPv4Network]:
    """Raises ``bad_setting`` (InvalidRequest)."""
    try:
        return [IPv4Network(one.strip()) for one in settings.private_networks.split(",") if one.strip()]
    except ValueError as error:
        raise InvalidRequest("bad_setting", f"private_networks: {error}", 'private_networks = "192.0.2.0/24"') from None


def name_servers(settings: Settings) -> list[Server]:
    """Raises ``bad_setting`` (InvalidRequest)."""
    from stoker.network.dns_upstream import Server

    try:
        return [Server.parse(one.strip()) for one in settings.resolvers.split(",") if one.strip()]
    except ValueError as error:
        raise InvalidRequest("bad_setting", f"resolvers: {error}", 'resolvers = "9.9.9.9, 192.0.2.1:5353"') from None


def has_own_addresses(request: CreateSandbox) -> bool:
    """Whether it is of the run plan: with an interface and addresses on the host that are its own."""
    return any(one is not None for one in (request.run_id, request.address_range, request.tap))


def range_of(known: Mapping[str, Range], name: str | None) -> Range:
    """Raises ``range_unknown`` (InvalidRequest)."""
    within = known.get(name or DEFAULT)
    if within is None or within.name == NAMESPACE:
        there = ", ".join(name for name in known if name != NAMESPACE)
        raise InvalidRequest("range_unknown", f"there is no range {name}", f"there are: {there}")
    return within


def planned(record: Record, known: Mapping[str, Range], taken: Taken) -> RunPlan:
    """The slot of a sandbox with addresses of its own."""
    request = record.request
    within = range_of(known, request.address_range)
    if request.run_id is not None:
        return plan_run(request.run_id, [record.name or ""], taken, within)[record.name or ""]
    tap = request.tap or first_guess("", record.id)[0]
    return plan_tap(record.label, tap, taken, within)


def check_network(request: CreateSandbox) -> None:
    """Refuses what can never be: ``bad_network``, ``egress_invalid``, ``port_invalid`` (InvalidRequest)."""
    if request.network is not NetworkMode.NAT:
        if request.egress is not None or request.publish or request.host_access or request.learn:
            raise InvalidRequest("bad_network", "a policy and ports are for the network nat", "--network nat")
        if has_own_addresses(request):
            raise InvalidRequest("bad_network", "addresses of one's own are for the network nat", "--network nat")
    if request.run_id is not None and (request.name is None or request.tap is not None):
        raise InvalidRequest(
            "run_unnamed", "with a run id the interface and addresses follow from it and a name", "--run-id ID --name NAME"
        )
    egress_of(request.egress)
    seen = [(one.protocol, one.host_port, one.host_address) for one in map(publication_of, request.publish)]
    if len(set(seen)) != len(seen):
        raise InvalidRequest("port_invalid", "a port of the host is published twice", "name each once")


def machine_of(record: Record, plan: RunPlan | NamespacePlan) -> Machine:
    """What the firewall knows of a sandbox."""
    egress = replace(egress_of(record.request.egress), learn=record.request.learn)
    names = egress.has_domains or egress.learn
    return Machine(
        plan.interface,
        plan.source_mac,
        plan.address,
        egress,
        published=tuple(publication_of(text) for text in record.request.publish),
        host_services=SERVICES if names else (),
        host_access=record.request.host_access,
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
        transport = Transport(protocol or "tcp")
        if transport is Transport.ICMP:
            raise ValueError
        return Publication(transport, numbers[0], numbers[1], where)
    except (ValueError, AddressValueError):
        raise InvalidRequest(
            "port_invalid", f"{text[:60]!r} is no port to publish", "8080:80, 127.0.0.1:8080:80, 5353:53/udp"
        ) from None
