"""What a slot with IPv6 has besides (:mod:`stoker.network.slot`)."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface

from stoker.errors import HostError
from stoker.host import netlink
from stoker.network.plan import ula, ula_beside

__all__ = ["beside", "check_ipv6", "open_ipv6"]


def check_ipv6() -> None:
    """Whether the calling thread's namespace has IPv6 for machines: ``ipv6_unavailable``, ``network_unprepared`` (HostError)."""
    if not netlink.has_ipv6():
        raise HostError("ipv6_unavailable", "this host's kernel has no IPv6", "without --ipv6; or boot without ipv6.disable=1")
    with open("/proc/sys/net/ipv6/conf/all/forwarding", encoding="ascii") as file:
        if file.read().strip() == "0":
            raise HostError(
                "network_unprepared",
                "this host does not forward IPv6: machines would reach nothing by it",
                "stoker network check --ipv6 --fix",
            )


def open_ipv6(*interfaces: str, forward: bool = False) -> None:
    """Of the calling thread's namespace: interfaces that shall have IPv6 addresses, whatever new ones have here; with ``forward``,
    IPv6 goes through. By /proc/sys, since there is no other way."""
    values = {f"{name}/{setting}": value for name in interfaces for setting, value in (("disable_ipv6", "0"), ("accept_ra", "0"))}
    if forward:
        values["all/forwarding"] = "1"
    for name, value in values.items():
        try:
            with open(f"/proc/sys/net/ipv6/conf/{name}", "w", encoding="ascii") as file:
                file.write(value)
        except OSError as error:
            raise HostError("ipv6_unavailable", f"net.ipv6.conf.{name}: {error.strerror}", "without --ipv6") from None


def beside(index: int, own: IPv4Interface, other: IPv4Address, mac: str, about: str) -> list[netlink.Request]:
    """The IPv6 address beside one of IPv4, and whose the one at the other end is."""
    return [
        netlink.add_address(index, ula_beside(own), about),
        netlink.add_neighbour(index, ula(other), mac, about),
    ]
