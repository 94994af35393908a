"""Links, addresses and routes by rtnetlink: pyroute2's messages on a socket of ours.

The socket belongs to the network namespace it was *opened* in, whichever thread uses it afterwards; nothing here looks at the
namespace of the caller. (pyroute2's own sockets do, so only its messages are used.) Several requests go to the kernel in one
system call; it works on them one after the other, and the first that it refuses is the error.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Any, Final

from stoker.errors import HostError
from stoker.host.netlink_errors import refusal, said

__all__ = ["Address", "Link", "Netlink", "Request", "Route", "Way", "has_ipv6", "refusal"]

NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH: Final = 28
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_EXCL, NLM_F_CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
IFF_UP: Final = 1
SOL_NETLINK, NETLINK_EXT_ACK, NETLINK_CAP_ACK = 270, 11, 10
SIOCGIFINDEX: Final = 0x8933
MAIN_TABLE: Final = 254
RTN_UNICAST, RTN_LOCAL = 1, 2
IFA_F_NODAD: Final = 0x02
NUD_PERMANENT: Final = 0x80
BUFFER: Final = 1 << 18
TOGETHER: Final = 64
FORWARDING, ROUTE_LOCALNET = 1, 26
IFLA_LINKINFO, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 18, 4, 5
IFLA_BRPORT_GUARD, IFLA_BRPORT_ISOLATED = 5, 33
IFLA_AF_SPEC, IFLA_INET_CONF, IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE = 26, 1, 8, 1


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface. ``kind`` is the kernel's word (``veth``, ``tun``, ``bridge``), empty for hardware."""

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    up: bool


@dataclass(frozen=True, slots=True)
class Address:
    index: int
    interface: IPv4Interface


@dataclass(frozen=True, slots=True)
class Route:
    """An IPv4 route. ``kind`` is RTN_* (1: unicast, 2: local), ``index`` of the outgoing interface (0: none)."""

    destination: IPv4Network
    index: int
    gateway: IPv4Address | None
    table: int
    kind: int
    metric: int


@dataclass(frozen=True, slots=True)
class Way:
    """Where one packet goes. ``local``: to the host itself; else out by the link ``index``, where the host's own packets have the
    address ``source``."""

    local: bool
    index: int
    gateway: IPv4Address | None
    source: IPv4Address | None


@dataclass(frozen=True, slots=True)
class Request:
    """One encoded request, and what it is about, for the error."""

    kind: int
    flags: int
    body: bytes
    about: str


@cache
def _codecs() -> Any:
    """pyroute2's message classes; they take 0.2 s to import, so not before they are used."""
    from types import SimpleNamespace

    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
    from pyroute2.netlink.rtnl.ndmsg import ndmsg
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    return SimpleNamespace(link=ifinfmsg, address=ifaddrmsg, route=rtmsg, neighbour=ndmsg)


@cache
def has_ipv6() -> bool:
    """Whether the kernel has it at all."""
    return os.path.exists("/proc/net/if_inet6")


def _request(kind: int, flags: int, message: Any, about: str) -> Request:
    message.encode()
    return Request(kind, flags, bytes(message.data[16:]), about)


def _nested(kind: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack("=HH", 4 + len(body), kind) + body + bytes(-len(body) % 4)


def set_link(
    index: int,
    about: str,
    *,
    up: bool | None = None,
    mac: str = "",
    mtu: int = 0,
    queue: int = 0,
    master: int = 0,
    settings: Mapping[int, int] | None = None,
) -> Request:
    """Changes a link. ``master``: the bridge that it becomes a port of. ``queue`` is its transmit queue's length in packets.
    ``settings``: IPv4 settings of the link by number (:data:`FORWARDING`, :data:`ROUTE_LOCALNET`); where they are given, even none,
    it also gets no IPv6 address of itself. They count from the next request on: raise the link in one of its own.

    (In /proc/sys the same takes the longer the more namespaces there are: the kernel has a name there once for each.)
    """
    message = _codecs().link()
    message["index"] = index
    if up is not None:
        message["flags"], message["change"] = IFF_UP * up, IFF_UP
    attributes: list[Any] = []
    if mac:
        attributes.append(("IFLA_ADDRESS", mac))
    if mtu:
        attributes.append(("IFLA_MTU", mtu))
    if queue:
        attributes.append(("IFLA_TXQLEN", queue))
    if master:
        attributes.append(("IFLA_MASTER", master))
    message["attrs"] = attributes
    request = _request(RTM_SETLINK, 0, message, about)
    if settings is None:
        return request
    values = _nested(IFLA_INET_CONF, *(_nested(number, struct.pack("=I", value)) for number, value in settings.items()))
    families = [_nested(socket.AF_INET, values)]
    if has_ipv6():
        families.append(_nested(socket.AF_INET6, _nested(IFLA_INET6_ADDR_GEN_MODE, bytes([IN6_ADDR_GEN_MODE_NONE]))))
    return replace(request, body=request.body + bytes(-len(request.body) % 4) + _nested(IFLA_AF_SPEC, *families))


def guard_port(index: int, about: str) -> Request:
    """A port of a bridge for somebody who is not trusted: it gets to no other that is isolated too, only to those that are not and
    to the bridge's own host, and is disabled when it takes part in a spanning tree."""
    message = _codecs().link()
    message["index"] = index
    request = _request(RTM_NEWLINK, 0, message, f"{about} as a port of its bridge")
    flags = (IFLA_BRPORT_GUARD, IFLA_BRPORT_ISOLATED)
    slave = _nested(IFLA_INFO_SLAVE_DATA, *(_nested(flag, b"\x01") for flag in flags))
    info = _nested(IFLA_LINKINFO, _nested(IFLA_INFO_SLAVE_KIND, b"bridge\0"), slave)
    return replace(request, body=request.body + bytes(-len(request.body) % 4) + info)


@dataclass(frozen=True, slots=True)
class End:
    """One end of a veth pair. ``index``: which number it shall have; 0 leaves that to the kernel."""

    name: str
    mac: str
    index: int = 0


def settle_link(index: int, about: str) -> Request:
    """Has a link that was raised carry packets from now on. A pair's end whose other end is raised after it drops everything until
    a worker of the kernel gets to it; to be asked about it makes the kernel do that at once (since Linux 6.8)."""
    message = _codecs().link()
    message["index"] = index
    return _request(RTM_GETLINK, 0, message, about)


def add_veth(here: End, there: End, namespace: int, *, mtu: int = 0) -> Request:
    """A pair whose one end is in the socket's namespace and the other in that of the descriptor; both are still down.

    Made where it belongs: moving an end to another namespace costs the kernel milliseconds.
    """
    message, peer = _codecs().link(), _codecs().link()
    size = [("IFLA_MTU", mtu)] if mtu else []
    for end, part in ((here, message), (there, peer)):
        part["index"] = end.index
        part["attrs"] = [("IFLA_IFNAME", end.name), ("IFLA_ADDRESS", end.mac), *size]
    peer["attrs"].append(("IFLA_NET_NS_FD", namespace))
    data = {"index": there.index, "attrs": peer["attrs"]}
    info = [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", data)]})]
    message["attrs"].append(("IFLA_LINKINFO", {"attrs": info}))
    return _request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, message, f"the pair {here.name}, {there.name}")


def delete_link(index: int, about: str) -> Request:
    message = _codecs().link()
    message["index"] = index
    return _request(RTM_DELLINK, 0, message, about)


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def add_address(index: int, interface: IPv4Interface | IPv6Interface, about: str) -> Request:
    """An IPv6 address counts at once: nobody is asked whether it is there twice."""
    message = _codecs().address()
    message["family"], message["prefixlen"], message["index"] = _family(interface.version), interface.network.prefixlen, index
    message["attrs"] = [("IFA_LOCAL", str(interface.ip)), ("IFA_ADDRESS", str(interface.ip))]
    if interface.version == 6:
        message["attrs"].append(("IFA_FLAGS", IFA_F_NODAD))
    return _request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, message, f"{interface} on {about}")


def add_neighbour(index: int, address: IPv4Address | IPv6Address, mac: str, about: str) -> Request:
    """Whose an address is, once and for all: nobody is asked, nobody's claim is heard."""
    message = _codecs().neighbour()
    message["family"], message["ifindex"], message["state"] = _family(address.version), index, NUD_PERMANENT
    message["attrs"] = [("NDA_DST", str(address)), ("NDA_LLADDR", mac)]
    return _request(RTM_NEWNEIGH, NLM_F_CREATE, message, f"the neighbour {address} on {about}")


Destination = IPv4Network | IPv6Network
Gateway = IPv4Address | IPv6Address


def _route(kind: int, flags: int, destination: Destination, index: int, gateway: Gateway | None) -> Request:
    message = _codecs().route()
    message["family"], message["dst_len"], message["table"] = _family(destination.version), destination.prefixlen, MAIN_TABLE
    message["type"], message["proto"], message["scope"] = RTN_UNICAST, 4, 0 if gateway else 253
    attributes: list[Any] = [("RTA_TABLE", MAIN_TABLE)]
    if destination.prefixlen:
        attributes.append(("RTA_DST", str(destination.network_address)))
    if index:
        attributes.append(("RTA_OIF", index))
    if gateway is not None:
        attributes.append(("RTA_GATEWAY", str(gateway)))
    message["attrs"] = attributes
    return _request(kind, flags, message, f"the route to {destination}")


def add_route(destination: Destination, *, index: int = 0, gateway: Gateway | None = None) -> Request:
    return _route(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, destination, index, gateway)


def delete_route(destination: Destination, *, index: int = 0, gateway: Gateway | None = None) -> Request:
    return _route(RTM_DELROUTE, 0, destination, index, gateway)


def _way(message: bytes) -> Way:
    row = _codecs().route(message)
    row.decode()
    gateway, source = row.get_attr("RTA_GATEWAY"), row.get_attr("RTA_PREFSRC")
    return Way(
        row["type"] == RTN_LOCAL,
        row.get_attr("RTA_OIF") or 0,
        IPv4Address(gateway) if gateway else None,
        IPv4Address(source) if source else None,
    )


class Netlink:
    """A socket of one network namespace: that of the thread that calls :meth:`__init__`. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            self._socket.settimeout(30)
            # Only the header of a refused request comes back, and the kernel's words with it.
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self._socket.bind((0, 0))
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _messages(self) -> Iterator[tuple[int, int, bytes]]:
        """Type, sequence number and whole message of each that comes in the next datagram."""
        data = self._socket.recv(BUFFER)
        while len(data) >= 16:
            length, kind, _, sequence = struct.unpack_from("=IHHI", data)
            if length < 16:
                return
            yield kind, sequence, data[:length]
            data = data[(length + 3) & ~3 :]

    def apply(self, *requests: Request) -> None:
        """Has the kernel do all of it, in this order. Raises what :func:`refusal` makes of the first that it refused; some of those
        after that one may have been done."""
        with self._lock:
            # More answers than this at once do not fit into what the kernel keeps for a socket.
            for start in range(0, len(requests), TOGETHER):
                self._apply(requests[start : start + TOGETHER])

    def _apply(self, requests: Sequence[Request]) -> None:
        packed, waiting = bytearray(), {}
        for request in requests:
            self._sequence += 1
            waiting[self._sequence] = request
            flags = request.flags | NLM_F_REQUEST | NLM_F_ACK
            packed += struct.pack("=IHHII", 16 + len(request.body), request.kind, flags, self._sequence, 0) + request.body
            packed += bytes(-len(packed) % 4)
        self._socket.send(packed)
        failed: HostError | None = None
        while waiting:
            for kind, sequence, message in self._messages():
                if kind != NLMSG_ERROR or (asked := waiting.pop(sequence, None)) is None:
                    continue
                number = -struct.unpack_from("=i", message, 16)[0]
                if number and failed is None:
                    failed = refusal(number, asked.about, said(message[16:]))
        if failed is not None:
            raise failed

    def _dump(self, kind: int, decoder: Any) -> list[Any]:
        with self._lock:
            self._sequence += 1
            # An rtgenmsg is too short for strict kernels: the longest of the headers, all zero but for the family.
            body = bytes([socket.AF_INET if kind != RTM_GETLINK else 0]) + bytes(15)
            self._socket.send(struct.pack("=IHHII", 16 + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, 0) + body)
            found: list[Any] = []
            while True:
                for answer, sequence, message in self._messages():
                    if sequence != self._sequence:
                        continue
                    if answer == NLMSG_DONE:
                        return found
                    if answer == NLMSG_ERROR:
                        raise refusal(-struct.unpack_from("=i", message, 16)[0], "a list of the kernel's")
                    decoded = decoder(message)
                    decoded.decode()
                    found.append(decoded)

    def links(self) -> list[Link]:
        found = []
        for row in self._dump(RTM_GETLINK, _codecs().link):
            info = row.get_attr("IFLA_LINKINFO")
            kind = (info.get_attr("IFLA_INFO_KIND") if info is not None else "") or ""
            mac, mtu = row.get_attr("IFLA_ADDRESS") or "", row.get_attr("IFLA_MTU") or 0
            found.append(Link(row["index"], row.get_attr("IFLA_IFNAME"), kind, mac, mtu, bool(row["flags"] & IFF_UP)))
        return found

    def link(self, name: str) -> Link | None:
        return next((link for link in self.links() if link.name == name), None)

    def index(self, name: str) -> int | None:
        """The number of a link, by the socket's own namespace; None when there is none of that name. Does not list them all."""
        try:
            # On a socket of any family this answers for the namespace that it was opened in.
            request = bytearray(struct.pack("16si20x", name.encode(), 0))
            fcntl.ioctl(self._socket, SIOCGIFINDEX, request)
        except OSError as e:
            if e.errno == errno.ENODEV:
                return None
            raise
        return int(struct.unpack_from("=i", request, 16)[0])

    def addresses(self) -> list[Address]:
        found = []
        for row in self._dump(RTM_GETADDR, _codecs().address):
            text = row.get_attr("IFA_LOCAL") or row.get_attr("IFA_ADDRESS")
            if row["family"] == socket.AF_INET and text:
                found.append(Address(row["index"], IPv4Interface(f"{text}/{row['prefixlen']}")))
        return found

    def routes(self) -> list[Route]:
        """Every IPv4 route of every table."""
        found = []
        for row in self._dump(RTM_GETROUTE, _codecs().route):
            if row["family"] != socket.AF_INET:
                continue
            destination = IPv4Network(f"{row.get_attr('RTA_DST') or '0.0.0.0'}/{row['dst_len']}")
            gateway = row.get_attr("RTA_GATEWAY")
            found.append(
                Route(
                    destination,
                    row.get_attr("RTA_OIF") or 0,
                    IPv4Address(gateway) if gateway else None,
                    row.get_attr("RTA_TABLE") or row["table"],
                    row["type"],
                    row.get_attr("RTA_PRIORITY") or 0,
                )
            )
        return found

    def route_to(self, address: IPv4Address, *, source: IPv4Address | None = None, index: int = 0) -> Way | int:
        """What the kernel would do with a packet: one of the host's own, or, with ``index``, one that comes in by that interface
        from ``source``. An errno where it would drop it: ENETUNREACH (no route), EHOSTUNREACH (that interface does not forward),
        EXDEV (its source is not to come from there), EACCES, EINVAL (a route that forbids)."""
        message = _codecs().route()
        message["family"], message["dst_len"], message["src_len"] = socket.AF_INET, 32, 32 if source is not None else 0
        attributes: list[Any] = [("RTA_DST", str(address))]
        if source is not None:
            attributes.append(("RTA_SRC", str(source)))
        if index:
            attributes.append(("RTA_IIF", index))
        message["attrs"] = attributes
        request = _request(RTM_GETROUTE, 0, message, f"the route to {address}")
        with self._lock:
            self._sequence += 1
            header = struct.pack("=IHHII", 16 + len(request.body), request.kind, NLM_F_REQUEST, self._sequence, 0)
            self._socket.send(header + request.body)
            while True:
                for kind, sequence, answer in self._messages():
                    if sequence == self._sequence:
                        return -int(struct.unpack_from("=i", answer, 16)[0]) if kind == NLMSG_ERROR else _way(answer)

    def delete(self, name: str) -> bool:
        """Removes the link of exactly this name; False when there is none. Waits until the kernel has let go of it."""
        index = self.index(name)
        if index is None:
            return False
        try:
            self.apply(delete_link(index, name))
        except HostError as error:
            if error.code != "link_unknown":
                raise
            return False
        return True

    def delete_all(self, names: Iterable[str]) -> None:
        for name in names:
            self.delete(name)


def uplinks(routes: Sequence[Route]) -> list[Route]:
    """The default routes of the main table, best first."""
    found = [route for route in routes if route.destination.prefixlen == 0 and route.table == MAIN_TABLE and route.index]
    return sorted(found, key=lambda route: route.metric)
