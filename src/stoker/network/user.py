"""The user-mode network: a guest that reaches the internet, and neither the host nor what is behind it.

QEMU's own user network (libslirp) needs no privilege, but takes the gateway's address for the host's loopback (older ones every
address of 10.0.2.0/24), and connects to private networks as the host would. So each frame of the guest passes a filter (the
shim's) that drops those destinations. What the guest is left with: public addresses that are not the host's own, and DNS on the
nameserver's address, which libslirp hands to the host's resolver.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, collapse_addresses

__all__ = ["DENIED", "UserNetwork", "plan_user_network"]

DENIED = (
    "0.0.0.0/8",  # "this host": connecting to it reaches loopback
    "10.0.0.0/8",
    "100.64.0.0/10",  # carrier-grade NAT, and what many VPNs use
    "127.0.0.0/8",
    "169.254.0.0/16",  # link-local, the clouds' metadata services among it
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
)
"""Private, special and reserved networks (IANA's special-purpose registry), multicast and broadcast included."""


@dataclass(frozen=True, slots=True)
class UserNetwork:
    """What :class:`stoker.vmm.machine.UserNetwork` asks for."""

    mac: str
    address: str
    gateway: str
    nameserver: str
    denied: tuple[str, ...]


def plan_user_network(host_addresses: Iterable[str]) -> UserNetwork:
    """The one address plan all such guests have, each on a wire of its own; ``host_addresses`` (CIDR) are denied on top of
    :data:`DENIED`."""
    networks = [IPv4Network(text, strict=False) for text in (*DENIED, *host_addresses)]
    return UserNetwork(
        mac="52:54:00:53:4b:02",
        address="10.0.2.15/24",
        gateway="10.0.2.2",
        nameserver="10.0.2.3",
        denied=tuple(str(network) for network in collapse_addresses(networks)),
    )
