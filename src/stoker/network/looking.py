"""What the host has for one machine and one address: the facts of :mod:`.facts` that are the host's. Nothing is changed.

Each call looks at the namespace that the :class:`Looking` was made for, and waits for the kernel only: for threads, not for a loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, Final

from stoker.errors import HostError
from stoker.host import conntrack
from stoker.host.conntrack import Connection
from stoker.host.namespaces import Namespace
from stoker.host.netlink import Netlink, Way
from stoker.host.nftables import Nftables
from stoker.network.egress import NUMBERS, Protocol
from stoker.network.facts import Dropping, Host
from stoker.network.firewall import Counters, Firewall
from stoker.network.host import Chain
from stoker.network.plan import INSIDE
from stoker.network.rules import ARP_TABLE, TABLE, Machine

__all__ = ["Looking", "Moment"]

HOOKS: Final = ("prerouting", "forward", "postrouting")
OURS: Final = (TABLE, ARP_TABLE)
MOST_TABLES: Final = 16
COMPLETE: Final = 2
"""Of an entry in /proc/net/arp: the neighbour has answered."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What changes when a packet comes by. ``filtered``: packets that the host dropped for where they came from (rp_filter).
    ``rejected``: how often it told anybody that something is unreachable."""

    counters: Counters
    tracked: dict[bytes, Connection]
    filtered: int
    rejected: int


class Looking:
    """At one machine's way. ``inside``: its own namespace, where it has one that is held."""

    def __init__(self, firewall: Firewall, home: Namespace, machine: Machine, inside: Namespace | None = None) -> None:
        self._firewall, self._home, self.machine, self._inside = firewall, home, machine, inside

    def moment(self, address: IPv4Address, protocol: Protocol, port: int) -> Moment:
        """The machine's counters, and its connections to that port, by what names each and no other."""
        wanted = (self.machine.address, address, NUMBERS[protocol], port)
        found = self._home.run(conntrack.connections)
        those = {one.name: one for one in found if (one.source, one.destination, one.protocol, one.port) == wanted}
        return Moment(self._firewall.counters_of(self.machine.interface), those, *self._home.run(_counted))

    def host(self, address: IPv4Address) -> Host:
        """How things stand before anything is sent."""
        machine = self.machine
        missing = tuple(self._firewall.missing(machine))
        named = self._firewall.named(machine.egress, address)
        private = self._firewall.private(address)
        slot = self._slot()
        with self._home.run(Netlink) as link:
            index = link.index(machine.interface)
            if index is None:
                return Host(slot, missing, named, private, self._forwards(), 0)
            names = {one.index: one.name for one in link.links()}
            way = link.route_to(address, source=machine.address, index=index)
            back = link.route_to(machine.address)
            out, neighbour, reverse = "", False, None
            if isinstance(way, Way) and not way.local:
                out = names.get(way.index, "")
                neighbour = out in self._firewall.interfaces
                # The address that it is translated to is the one that the host's own packets would have.
                own = link.route_to(address)
                if isinstance(own, Way) and own.source is not None:
                    reverse = link.route_to(own.source, source=address, index=way.index)
        back_by = names.get(back.index, "") if isinstance(back, Way) and not back.local else ""
        return Host(slot, missing, named, private, self._forwards(), way, out, neighbour, back_by, reverse)

    def _forwards(self) -> bool:
        return self._home.run(lambda: _read("/proc/sys/net/ipv4/ip_forward")).strip() != "0"

    def _slot(self) -> str:
        """What is wrong with the interfaces between the machine and the host's firewall; empty: nothing."""
        interface = self.machine.interface
        with self._home.run(Netlink) as link:
            found = link.link(interface)
            if found is None:
                return f"the interface {interface} is not there"
            if not found.up:
                return f"the interface {interface} is down"
        if self._inside is None:
            return ""
        with self._inside.run(Netlink) as link:
            up = {one.name for one in link.links() if one.up}
            routes = link.routes()
        for name in (INSIDE.tap, INSIDE.out):
            if name not in up:
                return f"{name} in the machine's own namespace is down, or not there"
        if not any(route.destination.prefixlen == 0 for route in routes):
            return "the machine's own namespace has no default route"
        return ""

    def dead(self, way: Way | int, address: IPv4Address) -> bool:
        """Whether the next hop does not answer the host."""
        if not isinstance(way, Way) or way.local:
            return False
        next_hop = str(way.gateway or address)
        for line in self._home.run(lambda: _read("/proc/thread-self/net/arp")).splitlines()[1:]:
            words = line.split()
            if words[:1] == [next_hop]:
                return not int(words[2], 16) & COMPLETE
        return False

    def dropping(self) -> tuple[Dropping, ...]:
        """Chains of other firewalls, on the way of what is forwarded, that drop or refuse something, or by default everything."""
        with self._home.run(Nftables) as nft:
            chains = [row["chain"] for row in nft.query("list chains") if "chain" in row]
            found: list[Dropping] = []
            tables: dict[tuple[str, str], dict[str, list[Any]]] = {}
            for one in chains:
                family, table, name = one["family"], one["table"], one["name"]
                if one.get("hook") not in HOOKS or family not in ("ip", "inet") or f"{family} {table}" in OURS:
                    continue
                chain = Chain(family, table, name, one["hook"])
                if one.get("policy") == "drop":
                    found.append(Dropping(chain, True))
                    continue
                if (family, table) not in tables:
                    if len(tables) >= MOST_TABLES:
                        continue
                    tables[family, table] = _rules(nft, family, table)
                if any(_drops(rule) for rule in _reached(tables[family, table], name)):
                    found.append(Dropping(chain, False))
            return tuple(found)


def _rules(nft: Nftables, family: str, table: str) -> dict[str, list[Any]]:
    """The statements of a table's rules, by their chains."""
    found: dict[str, list[Any]] = {}
    try:
        rows = nft.query(f"list table {family} {table}")
    except HostError as error:
        if error.code == "nftables_unknown":
            return {}  # it is gone by now
        raise
    for row in rows:
        if rule := row.get("rule"):
            found.setdefault(rule["chain"], []).append(rule.get("expr", []))
    return found


def _reached(rules: dict[str, list[Any]], chain: str) -> Iterator[Any]:
    """The rules of a chain, and of those that it leads to."""
    waiting, seen = [chain], {chain}
    while waiting:
        for rule in rules.get(waiting.pop(), []):
            yield rule
            for target in re.findall(r"'(?:jump|goto)': \{'target': '([^']*)'", str(rule)):
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)


def _drops(rule: list[Any]) -> bool:
    return any(isinstance(one, dict) and ("drop" in one or "reject" in one) for one in rule)


def _counted() -> tuple[int, int]:
    """What the kernel counts in IPReversePathFilter and OutDestUnreachs, in the namespace of the calling thread."""
    return _count("netstat", "TcpExt:", "IPReversePathFilter"), _count("snmp", "Icmp:", "OutDestUnreachs")


def _count(file: str, table: str, name: str) -> int:
    rows = [line.split() for line in _read(f"/proc/thread-self/net/{file}").splitlines() if line.startswith(table)]
    return int(dict(zip(*rows[:2], strict=False)).get(name, "0")) if len(rows) >= 2 else 0


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read(1 << 16)
