"""What is known of one machine's way to one port: the facts that :mod:`.explain` judges, and what a target is. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import Final

from stoker.errors import InvalidRequest
from stoker.host.conntrack import Connection
from stoker.host.netlink import Way
from stoker.network.egress import Protocol
from stoker.network.firewall import Counters
from stoker.network.host import Chain
from stoker.network.rules import Machine

__all__ = [
    "Dropping",
    "Facts",
    "Guest",
    "GuestRoute",
    "Host",
    "Looked",
    "Outcome",
    "Probe",
    "Target",
    "parse_routes",
    "parse_target",
]

_NAME: Final = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
UP: Final = 1
MOST_ROUTES: Final = 512


@dataclass(frozen=True, slots=True)
class Target:
    """Where to. ``host`` is an IPv4 address or a name in lower case."""

    host: str
    port: int
    protocol: Protocol = Protocol.TCP

    @property
    def literal(self) -> IPv4Address | None:
        try:
            return IPv4Address(self.host)
        except AddressValueError:
            return None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" + ("" if self.protocol is Protocol.TCP else f"/{self.protocol}")


@dataclass(frozen=True, slots=True)
class GuestRoute:
    network: IPv4Network
    gateway: IPv4Address | None
    interface: str


@dataclass(frozen=True, slots=True)
class Guest:
    """What the machine says of itself; None where it does not say. ``hosts``: names of its /etc/hosts."""

    routes: tuple[GuestRoute, ...] | None = None
    nameservers: tuple[IPv4Address, ...] | None = None
    hosts: Mapping[str, IPv4Address] | None = None


@dataclass(frozen=True, slots=True)
class Looked:
    """What a name leads to. ``by``: ``guest`` (it asked), ``host`` (asked in its stead) or ``hosts`` (its own file). ``rcode``
    None: nobody answered, ``problem`` says why. ``ours``: our resolver, which is under the policy."""

    by: str
    server: str = ""
    ours: bool = False
    rcode: int | None = None
    addresses: tuple[IPv4Address, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """What the host has for this machine and address.

    ``slot``: what is wrong with the machine's interface, empty: nothing. ``missing``: of the firewall's entries. ``named``: rules
    for names that the address is one of now. ``private``: it is in a network that is closed but to rules of its own. ``way``: what
    becomes of the machine's packet (an errno: dropped), out by ``out``, which is another machine's (``neighbour``). ``back``: the
    interface by which the host sends to the machine. ``reverse``: what becomes of an answer that comes in by ``out``; None: nothing
    was asked.
    """

    slot: str
    missing: tuple[str, ...]
    named: frozenset[int]
    private: bool
    forwards: bool
    way: Way | int
    out: str = ""
    neighbour: bool = False
    back: str = ""
    reverse: Way | int | None = None


@dataclass(frozen=True, slots=True)
class Dropping:
    """A chain of another firewall's that drops or refuses something. ``rest``: what it does not know, by default."""

    chain: Chain
    rest: bool


class Outcome(StrEnum):
    CONNECTED = "connected"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    SILENT = "silent"


@dataclass(frozen=True, slots=True)
class Probe:
    """A connection that the machine really tried: what it saw, what was counted of it meanwhile, and what the host's table of
    connections has of it.

    ``filtered``: packets that the host dropped meanwhile for where they came from. ``rejected``: how often it said meanwhile that
    something is unreachable. ``dropping``: chains of other firewalls that may drop it. ``dead_gateway``: the next hop does not
    answer the host.
    """

    outcome: Outcome
    counted: Counters
    tracked: Connection | None
    why: str = ""
    filtered: int = 0
    rejected: int = 0
    dropping: tuple[Dropping, ...] = ()
    dead_gateway: bool = False

    @property
    def works(self) -> bool:
        """Something at the other end answered (that nobody listens is an answer too, if it is not a firewall's)."""
        ours = self.counted.denied or self.rejected
        return self.outcome is Outcome.CONNECTED or (self.outcome is Outcome.REFUSED and not ours)


@dataclass(frozen=True, slots=True)
class Facts:
    """``gateway``: the machine's. ``address``: where the target's name leads to; None: that is not known."""

    label: str
    target: Target
    machine: Machine
    gateway: IPv4Address
    guest: Guest
    looked: Looked | None = None
    address: IPv4Address | None = None
    host: Host | None = None
    probe: Probe | None = None


def parse_target(text: str, protocol: Protocol = Protocol.TCP) -> Target:
    """``HOST:PORT``. Raises ``bad_target`` (InvalidRequest)."""

    def refused(why: str, hint: str = "example.org:443, 10.1.2.3:5432") -> InvalidRequest:
        return InvalidRequest("bad_target", f"{text[:100]!r} {why}", hint)

    host, _, number = text.strip().rpartition(":")
    if not (host and number.isascii() and number.isdigit() and 0 < int(number[:6]) < 65536):
        raise refused("is no HOST:PORT")
    host = host.lower().rstrip(".")
    if not host.isascii():
        try:
            host = host.encode("idna").decode()
        except UnicodeError:
            raise refused("names nothing that can be looked up") from None
    target = Target(host, int(number), protocol)
    if (address := target.literal) is None:
        if not _NAME.fullmatch(host) or host.rpartition(".")[2].isdigit():
            raise refused("names neither an IPv4 address nor a host")
    elif address.is_loopback or address.is_multicast or address.is_unspecified or int(address) == 0xFFFFFFFF:
        raise refused("never leaves the machine, or is for many", "stoker exec NAME -- ss -ltn")
    if host == "localhost" or host.endswith(".localhost"):
        raise refused("never leaves the machine", "stoker exec NAME -- ss -ltn")
    return target


def parse_routes(text: str) -> tuple[GuestRoute, ...]:
    """Those of ``/proc/net/route`` that are up, the most particular first."""
    found = []
    for line in text.splitlines()[1 : MOST_ROUTES + 1]:
        words = line.split()
        try:
            destination, gateway, mask = (IPv4Address(bytes.fromhex(words[n])[::-1]) for n in (1, 2, 7))
            network, flags = IPv4Network(f"{destination}/{mask}", strict=False), int(words[3], 16)
        except (IndexError, ValueError):
            continue
        if flags & UP:
            found.append(GuestRoute(network, gateway if int(gateway) else None, words[0]))
    return tuple(sorted(found, key=lambda route: -route.network.prefixlen))
