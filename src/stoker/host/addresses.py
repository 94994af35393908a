"""The host's own IPv4 addresses, asked of the kernel over one netlink socket: no process, no library.

Both tables matter. Addresses say what interfaces carry, up or down; the routes of type *local* say which destinations the
kernel delivers to itself, which can be whole networks that no interface shows (``ip route add local 192.0.2.0/24 dev lo``).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

from stoker.errors import HostError

__all__ = ["host_addresses", "parse_messages"]

NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWADDR, RTM_GETADDR, RTM_NEWROUTE, RTM_GETROUTE = 20, 22, 24, 26
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
RTN_LOCAL = 2
IFA_ADDRESS, IFA_LOCAL, RTA_DST = 1, 2, 1


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def parse_messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each netlink message in a datagram."""
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        if length < 16:
            return
        yield kind, data[16:length]
        data = data[(length + 3) & ~3 :]


def _network(kind: int, body: bytes) -> str | None:
    if kind == RTM_NEWADDR and len(body) >= 8 and body[0] == socket.AF_INET:
        attributes = _attributes(body[8:])
        address = attributes.get(IFA_LOCAL) or attributes.get(IFA_ADDRESS)
        return f"{socket.inet_ntoa(address)}/32" if address and len(address) == 4 else None
    if kind == RTM_NEWROUTE and len(body) >= 12 and body[0] == socket.AF_INET and body[7] == RTN_LOCAL:
        # A local default route means every destination is the host itself; it has no RTA_DST.
        destination = _attributes(body[12:]).get(RTA_DST, bytes(4))
        return f"{socket.inet_ntoa(destination)}/{body[1]}" if len(destination) == 4 else None
    return None


def _dump(sock: socket.socket, request: int, body: bytes) -> Iterator[tuple[int, bytes]]:
    sock.send(struct.pack("=IHHII", 16 + len(body), request, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + body)
    while True:
        for kind, message in parse_messages(sock.recv(1 << 16)):
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                code = -struct.unpack_from("=i", message)[0]
                raise HostError("netlink_failed", f"the kernel did not list its addresses: {os.strerror(code)}")
            yield kind, message


def host_addresses() -> tuple[str, ...]:
    """Every IPv4 network (CIDR, mostly /32) that this host takes for itself, in this network namespace, sorted."""
    found: set[str] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(5)
        for request, body in (
            (RTM_GETADDR, bytes([socket.AF_INET]) + bytes(7)),
            (RTM_GETROUTE, bytes([socket.AF_INET]) + bytes(11)),
        ):
            found.update(network for kind, message in _dump(sock, request, body) if (network := _network(kind, message)))
    return tuple(sorted(found))
