"""The firewall of machines on a bridge of the operator's, as text. Pure.

Their packets pass the bridge and not the host's routing, so who may talk to whom is the operator's own network's to say: a policy
has no place here. What is left is that a machine is who it is (its MAC, in ARP too), that it takes no part in what the network
itself is run by (VLAN tags, DHCP's and routers' words), and its rates. A bridge's own settings of its port do the rest
(:func:`stoker.host.netlink.guard_port`): machines reach the network and not each other, and who speaks of a spanning tree is cut
off, since a bridge that takes part in one hears that before any rule does.

The table is made with the first such machine: not every kernel has this family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from stoker.network.rules import LOGGED, RATES, Element, chained, logging_to, rates

__all__ = ["BRIDGE_TABLE", "SETS", "Port", "base", "elements"]

BRIDGE_TABLE: Final = "bridge stoker"
SETS: Final[Mapping[str, str]] = {
    "machines": "type ifname;",
    "sent": "type ifname; counter;",
    "denials": "type ifname; counter;",
    "pinned": "type ifname . ether_addr;",
    **RATES,
}
OFFICES: Final = (
    "ether type { 8021q, 8021ad }",
    "ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00",  # what bridges say to each other
    "ether type ip udp sport 67",
    "ether type ip6 udp sport 547",
    "icmpv6 type { nd-router-advert, nd-redirect }",
)
"""What is for those who run a network to say."""


@dataclass(frozen=True, slots=True)
class Port:
    """A machine on a bridge: its TAP, its MAC, and its rates in bytes a second (0: any)."""

    interface: str
    mac: str
    rate_in: int = 0
    rate_out: int = 0


def elements(port: Port) -> frozenset[Element]:
    """Everything that is in the table because of this machine."""
    one = f'"{port.interface}"'
    found = [Element(BRIDGE_TABLE, name, one) for name in ("machines", "sent", "denials")]
    found.append(Element(BRIDGE_TABLE, "pinned", f"{one} . {port.mac}"))
    return frozenset([*found, *rates(BRIDGE_TABLE, port.interface, port.rate_out, port.rate_in)])


def base(log_group: int = 0) -> list[str]:
    """The commands that make the table, with no machine in it."""
    table = BRIDGE_TABLE
    commands = [f"add table {table}", f"add set {table} logged {LOGGED}"]
    commands += [f"add set {table} {name} {{ {kind} }}" for name, kind in SETS.items()]
    commands += chained("spoofed", ["iifname @denials", *logging_to(log_group), "drop"], table=table)
    commands += chained("too_fast", ["iifname @over_out", "drop"], table=table)
    commands += chained("too_fast_in", ["oifname @over_in", "drop"], table=table)
    pins = ["iifname . ether saddr != @pinned goto spoofed", "ether type arp iifname . arp saddr ether != @pinned goto spoofed"]
    offices = [f"{office} goto spoofed" for office in OFFICES]
    commands += chained("from_machine", ["iifname @sent", *pins, *offices, "iifname @rate_out goto too_fast"], table=table)
    commands += chained("guard", ["iifname @machines jump from_machine"], "filter hook prerouting priority -300", table)
    return commands + chained("pace", ["oifname @rate_in goto too_fast_in"], "filter hook postrouting priority 0", table)
