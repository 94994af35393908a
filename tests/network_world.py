"""A world for tests of slots: a host, an internet and machines, each a network namespace of this process. No process is started,
nothing has a name on the real host, and all of it goes when its descriptors are closed.

A "machine" is a namespace with a TAP of its own, whose frames a thread carries to and from the slot's: a real IP stack behind a
real slot, without a VMM.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Interface, IPv4Network, IPv6Network, ip_interface
from typing import Any, TypeVar

from stoker.host import netlink, tun
from stoker.host.namespaces import Namespace
from stoker.host.netlink import End, Netlink
from stoker.host.nftables import Nftables
from stoker.network.bridged import BRIDGE_TABLE
from stoker.network.egress import ALL, Egress
from stoker.network.firewall import Firewall
from stoker.network.plan import INSIDE, NAMESPACE_RANGE, RUN_RANGE, RunPlan, plan_namespace, plan_run, ula, ula_beside
from stoker.network.rules import ARP_TABLE, TABLE, Machine
from stoker.network.slot import Joined, Plan, Slot, Slots

T = TypeVar("T")
HOST, ROUTER = IPv4Interface("5.5.5.5/24"), IPv4Interface("5.5.5.1/24")
SERVED = ("1.1.1.1", "8.8.8.8", "10.1.2.3", "10.1.9.3", "169.254.169.254", "192.168.3.4")
"""Addresses of the internet, and of private networks that the host has a way to."""
HOST6, ROUTER6 = ip_interface("2600:5::5/64"), ip_interface("2600:5::1/64")
SERVED6 = ("2600:1::1", "2600:8::8", "fd00:1::1", "64:ff9b::a01:203", "2002:a01:203::1", "2001:0:a01:203::1")
"""The same of IPv6: two public addresses, a private one, and three with a private IPv4 address in them."""
EVERYTHING, EVERYTHING6 = IPv4Network("0.0.0.0/0"), IPv6Network("::/0")
PORT = 8080
LOG_GROUP = 5300


def configure(*requests: netlink.Request) -> None:
    with Netlink() as link:
        link.apply(*requests)


def up(name: str) -> netlink.Request:
    index = socket.if_nametoindex(name)
    return netlink.set_link(index, name, up=True)


def addressed(name: str, *addresses: str) -> list[netlink.Request]:
    return [netlink.add_address(socket.if_nametoindex(name), ip_interface(text), name) for text in addresses]


class Server:
    """Answers every TCP connection and UDP packet with who asks. Its sockets are of the namespace it was started in."""

    def __init__(self, address: str, port: int) -> None:
        self._stop, self._wake = os.pipe()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.tcp = socket.create_server((address, port), family=family)
        self.udp = socket.socket(family, socket.SOCK_DGRAM)
        self.udp.bind((address, port))
        self.heard: list[bytes] = []
        """What came over UDP."""
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._stop, self.tcp, self.udp, *self._open], [], [])
            if self._stop in ready:
                return
            for one in ready:
                if one is self.tcp:
                    connection, peer = self.tcp.accept()
                    connection.sendall(peer[0].encode() + b"\n")
                    self._open.append(connection)
                elif one is self.udp:
                    data, peer = self.udp.recvfrom(2048)
                    self.heard.append(data)
                    self.udp.sendto(peer[0].encode(), peer)
                else:
                    assert isinstance(one, socket.socket)
                    self._echo(one)

    def _echo(self, one: socket.socket) -> None:
        try:
            data = one.recv(65536)
        except OSError:
            data = b""
        if data:
            one.sendall(data)
        else:
            self._open.remove(one)
            one.close()

    def say(self, data: bytes) -> None:
        """To everybody who is connected, unasked."""
        for one in [*self._open]:
            one.sendall(data)

    def close(self) -> None:
        os.write(self._wake, b"x")
        self._thread.join()
        for one in (self.tcp, self.udp, *self._open):
            one.close()
        os.close(self._stop)
        os.close(self._wake)


class Place:
    """A namespace with servers in it."""

    def __init__(self, stack: ExitStack, *, ipv6: bool = False) -> None:
        self.namespace, _ = Namespace.create(lambda _: self._begin(ipv6))
        self._stack = stack
        stack.callback(self.namespace.close)

    def _begin(self, ipv6: bool) -> None:
        for name in ("default", "lo"):
            with open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as file:
                file.write("0" if ipv6 else "1")
        configure(up("lo"))

    def run(self, work: Callable[[], T]) -> T:
        return self.namespace.run(work)

    def serve(self, address: str, port: int = PORT) -> Server:
        server = self.run(lambda: Server(address, port))
        self._stack.callback(server.close)
        return server

    def connect(self, address: str, port: int = PORT, *, timeout: float = 5.0, source: str = "") -> socket.socket:
        """A connection whose greeting (who we are to the server) is unread."""

        def work() -> socket.socket:
            return socket.create_connection((address, port), timeout, (source, 0) if source else None)

        return self.run(work)

    def ask(self, address: str, port: int = PORT, *, timeout: float = 5.0, source: str = "") -> str:
        """Whom a server takes us for, over TCP; the error's name when it cannot be reached."""
        try:
            with self.connect(address, port, timeout=timeout, source=source) as connection:
                return connection.recv(100).decode().strip()
        except TimeoutError:
            return "timeout"
        except OSError as e:
            return type(e).__name__ if type(e) is not OSError else os.strerror(e.errno or 0)

    def ask_udp(self, address: str, port: int = PORT, *, timeout: float = 5.0) -> str:
        def work() -> str:
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(timeout)
                sock.sendto(b"?", (address, port))
                return sock.recv(100).decode()

        try:
            return self.run(work)
        except TimeoutError:
            return "timeout"
        except OSError as e:
            return type(e).__name__ if type(e) is not OSError else os.strerror(e.errno or 0)


class Wired(Place):
    """What a VMM and its machine would be: frames from a TAP to an interface with a MAC. ``configured`` runs inside, and gives the
    interface (``eth0``, number 2) its addresses."""

    def __init__(self, stack: ExitStack, slot: Slot | Joined, configured: Callable[[], None], *, ipv6: bool = False) -> None:
        super().__init__(stack, ipv6=ipv6)

        def inside() -> int:
            fd = tun.open_tap("eth0", create=True, index=2)
            configure(netlink.set_link(2, "eth0", up=True, mac=slot.plan.mac))
            configured()
            return fd

        self.wire, self.own = os.dup(slot.tap), self.run(inside)
        slot.let_go()
        self._stop, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()
        self._ended = False
        stack.callback(self.end)

    def _carry(self) -> None:
        while True:
            ready, _, _ = select.select([self._stop, self.wire, self.own], [], [])
            if self._stop in ready:
                return
            for source, target in ((self.wire, self.own), (self.own, self.wire)):
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        os.write(target, os.read(source, 70000))

    def send(self, frame: bytes) -> None:
        """A frame as it is, from the machine; a virtio header without offloads goes before it."""
        os.write(self.wire, bytes(10) + frame)

    def end(self) -> None:
        """As a VMM ends: its descriptors are closed."""
        if not self._ended:
            self._ended = True
            os.write(self._wake, b"x")
            self._thread.join()
            for fd in (self.wire, self.own, self._stop, self._wake):
                os.close(fd)


class Guest(Wired):
    """With the addresses of its plan."""

    def __init__(self, stack: ExitStack, slot: Slot, *, ipv6: bool = False) -> None:
        plan = slot.plan
        gateway = plan.host if isinstance(plan, RunPlan) else INSIDE.gateway.ip

        def configured() -> None:
            own = IPv4Interface((plan.guest, 30))
            configure(netlink.add_address(2, own, "eth0"), netlink.add_route(EVERYTHING, gateway=gateway))
            if ipv6:
                configure(netlink.add_address(2, ula_beside(own), "eth0"), netlink.add_route(EVERYTHING6, gateway=ula(gateway)))

        super().__init__(stack, slot, configured, ipv6=ipv6)
        self.slot, self.ipv6 = slot, ipv6
        """``ipv6``: whether its slot has it; its own kernel always has, in a world that has."""


class Member(Wired):
    """A machine on a bridge, with an address of that network."""

    def __init__(self, stack: ExitStack, slot: Joined, address: str) -> None:
        super().__init__(stack, slot, lambda: configure(*addressed("eth0", address)))
        self.slot = slot


class Hosted:
    """A host with an uplink to an internet, and nothing of slots yet. ``ipv6``: of both, which the host forwards."""

    def __init__(self, stack: ExitStack, *, ipv6: bool = False) -> None:
        self.stack, self.ipv6 = stack, ipv6
        self.internet, self.host = Place(stack, ipv6=ipv6), Place(stack, ipv6=ipv6)
        self.host.run(self._wire)
        self.internet.run(lambda: configure(*addressed("net0", str(ROUTER)), *addressed("lo", *(f"{one}/32" for one in SERVED))))
        self.host.run(self._route)
        if ipv6:
            self.host.run(self._route6)
            more = [f"{one}/128" for one in SERVED6]
            known = lambda: netlink.add_neighbour(socket.if_nametoindex("net0"), HOST6.ip, "02:aa:00:00:00:01", "net0")  # noqa: E731
            self.internet.run(lambda: configure(*addressed("net0", str(ROUTER6)), *addressed("lo", *more), known()))
        for address in (*SERVED, *(SERVED6 if ipv6 else ())):
            self.internet.serve(address)

    def _wire(self) -> None:
        configure(netlink.add_veth(End("up0", "02:aa:00:00:00:01"), End("net0", "02:aa:00:00:00:02"), self.internet.namespace.fd))
        self.internet.run(lambda: configure(up("net0")))

    def _route(self) -> None:
        configure(up("up0"), *addressed("up0", str(HOST)), netlink.add_route(EVERYTHING, gateway=ROUTER.ip))
        with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
            file.write("1")

    def _route6(self) -> None:
        # Neighbours that need not be asked for: that takes link-local addresses, which come a second later.
        known = netlink.add_neighbour(socket.if_nametoindex("up0"), ROUTER6.ip, "02:aa:00:00:00:02", "up0")
        configure(*addressed("up0", str(HOST6)), netlink.add_route(EVERYTHING6, gateway=ROUTER6.ip), known)
        with open("/proc/sys/net/ipv6/conf/all/forwarding", "w") as file:
            file.write("1")

    def interfaces(self) -> set[str]:
        return {name for _, name in self.host.run(socket.if_nameindex)}

    def routes(self) -> set[str]:
        with self.host.run(Netlink) as link:
            return {f"{route.destination} {route.table}" for route in link.routes()}

    def left(self) -> list[str]:
        """Elements of machines that the kernel has in the tables, whatever the firewall's own books say."""
        with self.host.run(Nftables) as nft:
            there = {f"{row['table']['family']} {row['table']['name']}" for row in nft.query("list tables")}
            ours = [table for table in (TABLE, ARP_TABLE, BRIDGE_TABLE) if table in there]
            rows = [row for table in ours for row in nft.query(f"list table {table}")]
        named = [row[kind] for row in rows for kind in ("set", "map") if kind in row]
        constant = ("private", "private6", "ranges", "logged", "noted")
        return [f"{row['name']}: {row['elem']}" for row in named if row.get("elem") and row["name"] not in constant] + [
            row["chain"]["name"] for row in rows if "chain" in row and row["chain"]["name"].startswith("policy-")
        ]


class World(Hosted):
    """The host with its slots, and an internet. Use :func:`world`."""

    def __init__(self, stack: ExitStack, *, ipv6: bool = False) -> None:
        super().__init__(stack, ipv6=ipv6)
        self.guests: list[Guest] = []
        self.reopen()

    def reopen(self) -> None:
        """As a daemon that starts: takes over what is there."""
        self.firewall = self.host.run(lambda: Firewall.open([RUN_RANGE.network, NAMESPACE_RANGE.network], log_group=LOG_GROUP))
        self.stack.callback(self.firewall.close)
        self.slots = self.stack.enter_context(self.host.run(lambda: Slots.open(self.firewall)))

    def plan(self, kind: str, name: str = "one") -> Plan:
        if kind == "run":
            return plan_run("test", [name], self.slots.taken())[name]
        return plan_namespace(self.slots.taken())

    def machine(self, kind: str, name: str = "one", egress: Egress = ALL, **facts: Any) -> Guest:
        plan = self.plan(kind, name)
        slot = self.slots.up(plan, Machine(plan.interface, plan.source_mac, plan.address, egress, **facts))
        guest = Guest(self.stack, slot, ipv6=self.ipv6)
        guest.ipv6 = facts.get("ipv6", False)
        self.guests.append(guest)
        return guest

    def change(self, guest: Guest, **facts: Any) -> None:
        plan = guest.slot.plan
        facts.setdefault("ipv6", guest.ipv6)
        self.firewall.put(Machine(plan.interface, plan.source_mac, plan.address, **{"egress": ALL, **facts}))


@contextmanager
def world(*, ipv6: bool = False) -> Iterator[World]:
    """Nothing of a slot may be left on the world's host when the test has dropped those it was told of."""
    with ExitStack() as stack:
        made = World(stack, ipv6=ipv6)
        before, routes = made.interfaces(), made.routes()
        yield made
        for guest in made.guests:
            guest.end()
            made.slots.drop(guest.slot.plan, guest.slot).result(20)
        assert made.firewall.interfaces == frozenset()
        assert made.interfaces() == before
        assert made.routes() == routes
        assert not made.left(), "elements of the firewall's are left"
