"""Address plans: which interface, network, addresses and MACs a machine gets. Pure: what is taken comes in, a plan comes out.

**The run plan** (``--run-id ID``): everything follows from ``md5(ID-NAME)``. The TAP is ``tap`` and the first 12 digits; the number
of its /30 is the last four digits & 0x3FFF, in a range (172.16.0.0/16 unless said). The first address is the TAP's, the second
the guest's. That is a first guess: where it is taken, the next free /30 is used. Anybody can compute the plan before anything runs.

**The namespace plan**: inside a namespace of its own each machine has the same addresses (:data:`INSIDE`), so a snapshot or a fork
moves without a change. Out of it leads a veth pair with a /31 of a range: the even address is the host's end, the odd one is the
machine's, by which the host reaches it.

Of each IPv4 address of a slot follows its IPv6 address (:func:`ula`), for machines that have any.

**A bridge** of the operator's: a TAP that is one of its ports, and no address of ours.

A slot's id says all that is needed to remove it: ``run:TAP:ADDRESS/30`` (the guest's), ``ns:VETH:ADDRESS/31`` (the machine's) or
``bridge:TAP:BRIDGE``.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network, collapse_addresses
from typing import Any, Final

from stoker.errors import CapacityExhausted, InvalidRequest

__all__ = [
    "INSIDE",
    "NAMESPACE_RANGE",
    "RUN_RANGE",
    "ULA",
    "BridgePlan",
    "Foreign",
    "Inside",
    "NamespacePlan",
    "Range",
    "RunPlan",
    "Taken",
    "check_ranges",
    "first_guess",
    "parse_any_slot",
    "parse_slot",
    "number_of",
    "plan_bridge",
    "plan_namespace",
    "plan_run",
    "plan_tap",
    "ula",
    "ula_beside",
]

_INTERFACE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
_NAME: Final = re.compile(r"[A-Za-z0-9][a-z0-9-]{0,31}")
VETH: Final = "stk"
PORT: Final = "stkb"


def mac_of(address: IPv4Address, first: int = 0x02FC) -> str:
    """A locally administered MAC that follows from an address."""
    return ":".join(f"{byte:02x}" for byte in first.to_bytes(2, "big") + address.packed)


ULA: Final = IPv6Network("fd73:746f:6b65::/48")
"""Unique local addresses of machines: the same on every host, since snapshots remember theirs."""


def ula(address: IPv4Address) -> IPv6Address:
    """The IPv6 address beside an IPv4 address of a slot: that is its last 32 bits, and a /30 becomes a /126."""
    return ULA[int(address)]


def ula_beside(interface: IPv4Interface) -> IPv6Interface:
    return IPv6Interface((ula(interface.ip), 96 + interface.network.prefixlen))


def check_interface(name: str) -> str:
    """The name, if the kernel and nftables take it for exactly one interface. Raises ``interface_invalid``."""
    if not _INTERFACE.fullmatch(name):
        raise InvalidRequest(
            "interface_invalid", f"“{name[:40]}” is no name for an interface", "at most 15 letters, digits, '_', '-' and '.'"
        )
    return name


@dataclass(frozen=True, slots=True)
class Range:
    """A named network that slots come from."""

    name: str
    network: IPv4Network

    @classmethod
    def parse(cls, name: str, text: str) -> Range:
        """Raises ``range_invalid`` (InvalidRequest)."""
        if not _NAME.fullmatch(name):
            raise InvalidRequest("range_invalid", f"“{name[:40]}” is no name for a range", "lower-case letters, digits and '-'")
        try:
            network = IPv4Network(text)
        except ValueError as e:
            raise InvalidRequest("range_invalid", f"the range {name} is no IPv4 network: {e}", f"{name} = 172.19.0.0/16") from None
        if not 8 <= network.prefixlen <= 30:
            raise InvalidRequest("range_invalid", f"the range {name}, {network}, has a prefix outside /8 to /30")
        first = network.network_address
        if first.is_loopback or first.is_multicast or first.is_link_local or first.packed[0] in (0, *range(240, 256)):
            raise InvalidRequest("range_invalid", f"the range {name}, {network}, is not for hosts", f"{name} = 172.19.0.0/16")
        return cls(name, network)

    def __str__(self) -> str:
        return f"range {self.name} ({self.network})"


RUN_RANGE: Final = Range("default", IPv4Network("172.16.0.0/16"))
NAMESPACE_RANGE: Final = Range("machines", IPv4Network("100.80.0.0/16"))


@dataclass(frozen=True, slots=True)
class Foreign:
    """A network of somebody else's on this host: of an interface's address, or of a route."""

    network: IPv4Network
    what: str


class Taken:
    """What slots must keep clear of: names of interfaces, and networks."""

    def __init__(self, names: Iterable[str] = (), networks: Iterable[IPv4Network] = ()) -> None:
        self.names = frozenset(names)
        # A default route takes nothing. Joined networks are disjoint, so the last that begins before an end is the only candidate.
        merged = sorted(collapse_addresses(network for network in networks if network.prefixlen > 0))
        self._first = [int(network.network_address) for network in merged]
        self._last = [int(network.broadcast_address) for network in merged]

    def holds(self, first: int, last: int) -> int | None:
        """The end of what is taken between two addresses (as numbers, both included); None when nothing is."""
        position = bisect_right(self._first, last) - 1
        return self._last[position] if position >= 0 and self._last[position] >= first else None


@dataclass(frozen=True, slots=True)
class Inside:
    """What every machine of the namespace plan sees: the same for all, for ever, since snapshots remember it."""

    tap: str = "tap0"
    tap_mac: str = "02:fc:00:00:00:06"
    gateway: IPv4Interface = field(default=IPv4Interface("169.254.0.22/30"))
    guest: IPv4Interface = field(default=IPv4Interface("169.254.0.21/30"))
    guest_mac: str = "02:fc:00:00:00:05"
    out: str = "eth0"

    @property
    def gateway6(self) -> IPv6Interface:
        return ula_beside(self.gateway)

    @property
    def guest6(self) -> IPv6Interface:
        return ula_beside(self.guest)


INSIDE: Final = Inside()


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A TAP in the host's namespace, with a /30 of its own. ``number`` is that of the /30 in its range."""

    name: str
    tap: str
    network: IPv4Network

    @property
    def id(self) -> str:
        return f"run:{self.tap}:{self.guest}/30"

    @property
    def interface(self) -> str:
        """By which the host's firewall knows the machine."""
        return self.tap

    @property
    def host(self) -> IPv4Address:
        return self.network[1]

    @property
    def guest(self) -> IPv4Address:
        return self.network[2]

    address = guest
    """By which the host reaches the machine."""

    @property
    def mac(self) -> str:
        return mac_of(self.guest)

    @property
    def tap_mac(self) -> str:
        return mac_of(self.host)

    source_mac = mac
    """Of the frames that come in by :attr:`interface`."""

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON prints it."""
        return {
            "name": self.tap,
            "host_ip": str(self.host),
            "guest_ip": str(self.guest),
            "mac": self.mac,
            "network": str(self.network),
        }


@dataclass(frozen=True, slots=True)
class NamespacePlan:
    """A namespace with :data:`INSIDE` in it, and a veth pair with a /31 out of it."""

    veth: str
    network: IPv4Network

    @property
    def id(self) -> str:
        return f"ns:{self.veth}:{self.address}/31"

    @property
    def interface(self) -> str:
        """By which the host's firewall knows the machine: the host's end of the pair."""
        return self.veth

    @property
    def host(self) -> IPv4Address:
        return self.network[0]

    @property
    def address(self) -> IPv4Address:
        """By which the host reaches the machine."""
        return self.network[1]

    @property
    def guest(self) -> IPv4Address:
        return INSIDE.guest.ip

    @property
    def mac(self) -> str:
        return INSIDE.guest_mac

    @property
    def veth_mac(self) -> str:
        return mac_of(self.host, 0x02FD)

    @property
    def source_mac(self) -> str:
        """Of the frames that come in by :attr:`interface`."""
        return mac_of(self.address, 0x02FD)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON prints it."""
        return {
            "name": self.veth,
            "host_ip": str(self.host),
            "address": str(self.address),
            "guest_ip": str(self.guest),
            "mac": self.mac,
        }


@dataclass(frozen=True, slots=True)
class BridgePlan:
    """A TAP that is a port of a bridge. The MAC follows from the TAP's name, so of one network no two may be named alike."""

    tap: str
    bridge: str

    @property
    def id(self) -> str:
        return f"bridge:{self.tap}:{self.bridge}"

    @property
    def interface(self) -> str:
        """By which the host's firewall knows the machine."""
        return self.tap

    @property
    def mac(self) -> str:
        digest = hashlib.sha256(self.tap.encode()).digest()
        return ":".join(f"{byte:02x}" for byte in b"\x02" + digest[:5])

    source_mac = mac
    """Of the frames that come in by :attr:`interface`."""

    @property
    def tap_mac(self) -> str:
        """The host's end. A bridge calls itself by the lowest MAC of its ports, unless it has one: this is never that."""
        return f"fe{self.mac[2:]}"

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON prints it."""
        return {"name": self.tap, "bridge": self.bridge, "mac": self.mac}


def parse_any_slot(text: str) -> RunPlan | NamespacePlan | BridgePlan:
    """The plan of a slot's id, whichever kind it is. Raises ``slot_invalid`` (InvalidRequest)."""
    kind, *names = text.split(":")
    if kind != "bridge":
        return parse_slot(text)
    try:
        tap, bridge = map(check_interface, names)
    except (ValueError, InvalidRequest):
        raise InvalidRequest("slot_invalid", f"“{text[:80]}” is no slot", "bridge:TAP:BRIDGE") from None
    return BridgePlan(tap, bridge)


def parse_slot(text: str) -> RunPlan | NamespacePlan:
    """The plan of the id of a slot that has addresses of ours. Raises ``slot_invalid`` (InvalidRequest)."""
    kind, _, rest = text.partition(":")
    name, _, address = rest.partition(":")
    try:
        interface = IPv4Interface(address)
        if kind == "run" and interface.network.prefixlen == 30:
            plan: RunPlan | NamespacePlan = RunPlan("", check_interface(name), interface.network)
        elif kind == "ns" and interface.network.prefixlen == 31:
            plan = NamespacePlan(check_interface(name), interface.network)
        else:
            raise ValueError
        if plan.address != interface.ip:
            raise ValueError
    except (ValueError, InvalidRequest):
        raise InvalidRequest("slot_invalid", f"“{text[:80]}” is no slot", "run:TAP:ADDRESS/30 or ns:VETH:ADDRESS/31") from None
    return plan


def _subnet(within: IPv4Network, prefix: int, number: int) -> IPv4Network:
    return IPv4Network((int(within.network_address) + (number << (32 - prefix)), prefix))


def _free(within: Range, prefix: int, start: int, taken: Sequence[Taken]) -> Iterator[int]:
    """The numbers of the free subnets of a range from ``start`` on, and then from the beginning up to it."""
    size, base = 1 << (32 - prefix), int(within.network.network_address)
    count = within.network.num_addresses // size
    for begin, end in ((start, count), (0, start)):
        number = begin
        while number < end:
            first = base + number * size
            blocked = max((last for one in taken if (last := one.holds(first, first + size - 1)) is not None), default=None)
            if blocked is None:
                yield number
                number += 1
            else:
                number = max(number, (min(blocked, 0xFFFFFFFF) - base) // size) + 1  # beyond the whole of what is in the way


def _exhausted(within: Range) -> CapacityExhausted:
    return CapacityExhausted(
        "slots_exhausted", f"no network is free in the {within}", "stoker rm what is not needed, or a wider range"
    )


def _tap_taken(tap: str) -> CapacityExhausted:
    return CapacityExhausted("tap_taken", f"there is an interface {tap} already", f"ip -d link show {tap}")


def first_guess(run_id: str, name: str) -> tuple[str, int]:
    """The TAP's name and the number of the /30 (0 to 16383) that follow from a run and a machine of it."""
    digest = hashlib.md5(f"{run_id}-{name}".encode(), usedforsecurity=False).hexdigest()
    return f"tap{digest[:12]}", int(digest[-4:], 16) & 0x3FFF


def plan_run(run_id: str, names: Sequence[str], taken: Taken, within: Range = RUN_RANGE) -> Mapping[str, RunPlan]:
    """The plans of a run's machines, in the order of their names given: each on its first guess, or on the next that is free.

    Raises ``slots_exhausted`` (CapacityExhausted), ``name_twice`` (InvalidRequest).
    """
    if len(set(names)) != len(names):
        raise InvalidRequest("name_twice", "two machines of a run cannot have one name")
    count = within.network.num_addresses // 4
    plans: dict[str, RunPlan] = {}
    used: set[int] = set()
    taps = set(taken.names)
    for name in names:
        tap, number = first_guess(run_id, name)
        attempt = 0
        while tap in taps:  # of somebody else's: another hash of ours
            attempt += 1
            tap, _ = first_guess(run_id, f"{name}+{attempt}")
        found = next((free for free in _free(within, 30, number % count, [taken]) if free not in used), None)
        if found is None:
            raise _exhausted(within)
        used.add(found)
        taps.add(tap)
        plans[name] = RunPlan(name, tap, _subnet(within.network, 30, found))
    return plans


def plan_tap(name: str, tap: str, taken: Taken, within: Range) -> RunPlan:
    """A TAP of a name that was chosen, on the first free /30 of a range. Raises ``tap_taken``, ``slots_exhausted``."""
    if check_interface(tap) in taken.names:
        raise _tap_taken(tap)
    number = next(_free(within, 30, 0, [taken]), None)
    if number is None:
        raise _exhausted(within)
    return RunPlan(name, tap, _subnet(within.network, 30, number))


def plan_bridge(bridge: str, taken: Taken, tap: str = "") -> BridgePlan:
    """A port of a bridge, named as wanted or by chance. Raises ``tap_taken`` (CapacityExhausted), ``interface_invalid``."""
    check_interface(bridge)
    while not tap or (tap in taken.names and tap.startswith(PORT)):
        tap = f"{PORT}{secrets.token_hex(5)}"
    if check_interface(tap) in taken.names:
        raise _tap_taken(tap)
    return BridgePlan(tap, bridge)


def plan_namespace(taken: Taken, within: Range = NAMESPACE_RANGE, *, after: int = -1) -> NamespacePlan:
    """The next free slot of the namespace plan behind number ``after``, and then from the beginning: an address that was just
    given back is used again as late as can be. Raises ``slots_exhausted`` (CapacityExhausted)."""
    count = within.network.num_addresses // 2
    for number in _free(within, 31, (after + 1) % count, [taken]):
        network = _subnet(within.network, 31, number)
        veth = f"{VETH}{int(network.network_address) & 0xFFFFFFFF:08x}"
        if veth not in taken.names:
            return NamespacePlan(veth, network)
    raise _exhausted(within)


def number_of(plan: NamespacePlan, within: Range) -> int:
    """Which slot of its range it is: what :func:`plan_namespace` takes for ``after``."""
    return (int(plan.network.network_address) - int(within.network.network_address)) // 2


def check_ranges(ranges: Sequence[Range], foreign: Sequence[Foreign]) -> list[str]:
    """What speaks against these ranges on this host, in words; empty when nothing does. A smaller network inside a range does not:
    slots keep clear of it."""
    overlaps = [
        f"the {one} overlaps the {other}"
        for position, one in enumerate(ranges)
        for other in ranges[:position]
        if one.network.overlaps(other.network)
    ]
    return overlaps + [
        f"the {one} lies in {found.network}, which {found.what}"
        for one in ranges
        for found in foreign
        if found.network.prefixlen and one.network.subnet_of(found.network)
    ]
