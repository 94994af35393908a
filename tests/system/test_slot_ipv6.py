"""IPv6 of slots, on a host that has it: nothing at all of it where a machine has none, and the same policy where it has."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from network_world import PORT, SERVED6, Guest, World, world
from stoker.errors import HostError
from stoker.host import conntrack
from stoker.network.egress import NONE, parse_egress
from stoker.network.plan import INSIDE, RunPlan, ula
from stoker.network.rules import Machine

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
KINDS = pytest.mark.parametrize("kind", ["run", "ns"])
PUBLIC, OTHER, PRIVATE, *EMBEDDED = SERVED6
CLOSED = ("No route to host", "timeout", "PermissionError", "ConnectionRefusedError", "Permission denied")
ALL_NODES, ALL_ROUTERS = "ff02::1", "ff02::2"
ICMP6, IPV6 = 58, 0x86DD


@pytest.fixture
def made() -> Iterator[World]:
    with world(ipv6=True) as one:
        yield one


def eventually(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not look():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.02)


def gateway(guest: Guest) -> str:
    return str(ula(guest.slot.plan.host) if isinstance(guest.slot.plan, RunPlan) else INSIDE.gateway6.ip)


def gateway_mac(guest: Guest) -> str:
    plan = guest.slot.plan
    return plan.tap_mac if isinstance(plan, RunPlan) else INSIDE.tap_mac


def own(guest: Guest) -> str:
    return str(ula(guest.slot.plan.guest))


def inward(guest: Guest) -> str:
    return str(ula(guest.slot.plan.address))


def icmp6(source: str, target: str, body: bytes, hops: int = 255) -> bytes:
    """An ICMPv6 packet; its checksum is filled in."""
    ends = IPv6Address(source).packed + IPv6Address(target).packed
    whole = ends + struct.pack("!II", len(body), ICMP6) + body
    total = sum(struct.unpack(f"!{(len(whole) + 1) // 2}H", whole + b"\0" * (len(whole) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
    return struct.pack("!IHBB", 6 << 28, len(body), ICMP6, hops) + ends + body


def frame(mac: str, packet: bytes, target: str) -> bytes:
    return bytes.fromhex((target + mac).replace(":", "")) + struct.pack("!H", IPV6) + packet


def option(kind: int, mac: str) -> bytes:
    return bytes([kind, 1]) + bytes.fromhex(mac.replace(":", ""))


def echo(source: str, target: str) -> bytes:
    return icmp6(source, target, struct.pack("!BBHHH", 128, 0, 0, 7, 1), hops=64)


def solicit(source: str, wanted: str, mac: str) -> bytes:
    return icmp6(source, ALL_NODES, struct.pack("!BBHI", 135, 0, 0, 0) + IPv6Address(wanted).packed + option(1, mac))


def advertise(source: str, claimed: str, mac: str) -> bytes:
    """That a neighbour's address is this MAC's, whatever was believed."""
    return icmp6(source, ALL_NODES, struct.pack("!BBHI", 136, 0, 0, 0x20000000) + IPv6Address(claimed).packed + option(2, mac))


def router(source: str, prefix: str) -> bytes:
    """That the sender is a router, and hosts shall have addresses of its network."""
    network = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 3600, 3600, 0) + IPv6Address(prefix).packed
    return icmp6(source, ALL_NODES, struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + network)


@contextmanager
def heard(guest: Guest) -> Iterator[list[bytes]]:
    """The IPv6 frames that come to a machine meanwhile."""
    found: list[bytes] = []

    def listen() -> socket.socket:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(IPV6))
        raw.bind(("eth0", IPV6))
        raw.setblocking(False)
        return raw

    with guest.run(listen) as raw:
        yield found
        time.sleep(0.5)
        while True:
            try:
                data, about = raw.recvfrom(2000)
            except BlockingIOError:
                return
            if about[2] != socket.PACKET_OUTGOING:
                found.append(data)


def inject(*frames: bytes) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        for one in frames:
            raw.send(one)


def addresses(guest: Guest, made: World) -> list[str]:
    """Every IPv6 address and route of the host, and of the machine's own namespace; not the host's link-local one on its uplink,
    which comes when it likes."""
    places = [made.host, *([guest.slot.namespace] if guest.slot.namespace is not None else [])]
    lines: list[str] = []
    for place in places:
        for name in ("if_inet6", "ipv6_route"):
            lines += place.run(lambda name=name: Path(f"/proc/thread-self/net/{name}").read_text().splitlines())  # type: ignore[attr-defined,misc]
    parts = sorted(tuple(line.split()[:3] + line.split()[-1:]) for line in lines)
    return [" ".join(part) for part in parts if not (part[0].startswith("fe80") and part[-1] == "up0")]


@KINDS
def test_off_is_off(made: World, kind: str) -> None:
    """A machine that speaks IPv6 by itself, on a host that does, and forwards it."""
    guest = made.machine(kind, host_access=True)
    assert made.host.ask(PUBLIC) == "2600:5::5" and guest.ask("1.1.1.1") == "5.5.5.5"
    mac, to, plan = guest.slot.plan.mac, gateway_mac(guest), guest.slot.plan
    link_local, before = "fe80::1234", addresses(guest, made)
    first = made.firewall.counters()[plan.interface].denied
    with heard(guest) as frames:
        assert guest.ask(PUBLIC, timeout=0.3) in CLOSED
        assert guest.ask_udp("2600:5::5", timeout=0.3) in CLOSED
        sent = [
            frame(mac, echo(link_local, ALL_NODES), "33:33:00:00:00:01"),
            frame(mac, echo(link_local, ALL_ROUTERS), "33:33:00:00:00:02"),
            frame(mac, echo(own(guest), "2600:5::5"), to),
            frame(mac, echo(own(guest), PUBLIC), to),
            frame(mac, solicit(link_local, gateway(guest), mac), "33:33:00:00:00:01"),
            frame(mac, solicit(link_local, "2600:5::5", mac), "33:33:00:00:00:01"),
            frame(mac, advertise(link_local, gateway(guest), mac), "33:33:00:00:00:01"),
            frame(mac, router(link_local, "2600:66::"), "33:33:00:00:00:01"),
        ]
        guest.run(lambda: inject(*sent))
    assert frames == []
    assert addresses(guest, made) == before
    assert not any(line.startswith(("fe80", "fd73")) for line in before)
    if kind == "run":
        eventually(lambda: made.firewall.counters()[plan.interface].denied >= first + len(sent))
    assert guest.ask("1.1.1.1") == "5.5.5.5"


@KINDS
def test_the_public_is_reached_and_nothing_else(made: World, kind: str) -> None:
    guest, other, without = made.machine(kind, ipv6=True), made.machine(kind, "two", ipv6=True), made.machine(kind, "three")
    other.serve("::")
    made.host.serve("::")
    assert guest.ask(PUBLIC) == guest.ask_udp(OTHER) == other.ask(PUBLIC) == "2600:5::5"
    assert guest.ask("1.1.1.1") == "5.5.5.5"
    for address in (
        PRIVATE,
        *EMBEDDED,
        "2600:5::5",
        inward(other),
        str(ula(other.slot.plan.host)),
        gateway(guest),
        inward(without),
    ):
        if address != own(guest):
            assert guest.ask(address, timeout=0.3) in CLOSED, address
            assert guest.ask_udp(address, timeout=0.1) in CLOSED, address
    # That it is the rules that close all this: the host reaches what it asks.
    assert made.host.ask(inward(other)) == str(ula(other.slot.plan.host))
    for address in (PRIVATE, *EMBEDDED):
        assert made.host.ask(address) == "2600:5::5"
    assert made.firewall.counters()[guest.slot.plan.interface].denied >= 10
    made.change(guest, peers=(other.slot.plan.address,))
    assert guest.ask(inward(other)) == inward(guest)
    assert other.ask(inward(guest), timeout=0.3) in CLOSED


@KINDS
def test_policies(made: World, kind: str) -> None:
    guest = made.machine(kind, egress=NONE, ipv6=True)
    assert guest.ask(PUBLIC, timeout=0.3) in CLOSED
    made.change(guest, egress=parse_egress(f"deny: [2600:8::/32]; allow: [2600::/16]:{PORT}/tcp, [fd00:1::/64]"))
    assert guest.ask(PUBLIC) == guest.ask(PRIVATE) == guest.ask_udp(PRIVATE) == "2600:5::5"
    assert guest.ask_udp(PUBLIC, timeout=0.2) in CLOSED
    assert guest.ask(OTHER, timeout=0.3) in CLOSED
    assert guest.ask("1.1.1.1", timeout=0.3) in CLOSED
    made.change(guest, egress=parse_egress("allow: [::/0]"))
    assert guest.ask(PUBLIC) == "2600:5::5"
    for address in (PRIVATE, *EMBEDDED, "1.1.1.1"):
        assert guest.ask(address, timeout=0.3) in CLOSED, address
    made.change(guest, egress=parse_egress("allow: public; deny: 1.1.1.1"))
    assert guest.ask(PUBLIC) == "2600:5::5"
    # Names: a set of each family for a rule, private addresses stay closed.
    policy = parse_egress("allow: example.org")
    made.change(guest, egress=policy)
    assert guest.ask(PUBLIC, timeout=0.3) in CLOSED
    made.firewall.resolved(policy, {0: [(IPv6Address(PUBLIC), 60), (IPv6Address(PRIVATE), 60)]})
    assert guest.ask(PUBLIC) == "2600:5::5"
    assert guest.ask(PRIVATE, timeout=0.3) in CLOSED and guest.ask(OTHER, timeout=0.3) in CLOSED


@KINDS
def test_an_edit_cuts_what_is_open(made: World, kind: str) -> None:
    guest = made.machine(kind, ipv6=True)
    plan = guest.slot.plan

    def known() -> set[str]:
        return made.host.run(lambda: {str(one.destination) for one in conntrack.connections() if one.source == ula(plan.address)})

    with guest.connect(PUBLIC) as cut, guest.connect(OTHER) as kept:
        assert cut.recv(100) == kept.recv(100) == b"2600:5::5\n"
        assert known() == {PUBLIC, OTHER}
        machine = Machine(plan.interface, plan.source_mac, plan.address, parse_egress(f"allow: [{OTHER}]"), ipv6=True)
        made.slots.change(machine).result(20)
        assert known() == {OTHER}
        kept.sendall(b"still there?")
        assert kept.recv(100) == b"still there?"
        cut.settimeout(0.7)
        with pytest.raises(OSError):
            cut.sendall(b"still there?")
            assert not cut.recv(100)


def test_a_host_that_does_not_forward_is_refused_with_words(made: World) -> None:
    made.host.run(lambda: Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("0"))
    with pytest.raises(HostError, match="does not forward IPv6") as caught:
        made.machine("run", ipv6=True)
    assert caught.value.code == "network_unprepared" and "check --ipv6" in caught.value.hint
    assert made.firewall.interfaces == frozenset() and not made.left()
    assert made.machine("run").ask("1.1.1.1") == "5.5.5.5"


@KINDS
def test_forged_neighbours_and_sources_change_nothing(made: World, kind: str) -> None:
    guest = made.machine(kind, host_access=True, ipv6=True)
    made.host.serve("::")
    plan, to = guest.slot.plan, gateway_mac(guest)
    assert guest.ask(PUBLIC) == "2600:5::5" and guest.ask(str(ula(plan.host))) == inward(guest)
    evil, link_local = "02:66:66:66:66:66", "fe80::1234"
    denied = made.firewall.counters()[plan.interface].denied
    before = addresses(guest, made)
    far = made.internet.serve(PUBLIC, 9999)
    udp = struct.pack("!HHHH", 4000, 9999, 9, 0) + b"x"
    forged = struct.pack("!IHBB", 6 << 28, len(udp), 17, 64) + IPv6Address("2600:5::77").packed + IPv6Address(PUBLIC).packed + udp
    with heard(guest) as frames:
        sent = [
            frame(plan.mac, advertise(link_local, own(guest), evil), "33:33:00:00:00:01"),
            frame(plan.mac, advertise(own(guest), own(guest), evil), "33:33:00:00:00:01"),
            frame(plan.mac, advertise(own(guest), "2600:5::1", evil), "33:33:00:00:00:01"),
            frame(evil, solicit(own(guest), gateway(guest), evil), "33:33:00:00:00:01"),
            frame(plan.mac, solicit("2600:5::1", gateway(guest), plan.mac), "33:33:00:00:00:01"),
            frame(plan.mac, router(link_local, "2600:66::"), "33:33:00:00:00:01"),
            frame(plan.mac, echo(link_local, ALL_NODES), "33:33:00:00:00:01"),
            frame(plan.mac, forged, to),
            frame(evil, echo(own(guest), PUBLIC), to),
        ]
        guest.run(lambda: inject(*sent))
    assert not [one for one in frames if one[20] == ICMP6], "what the host says by itself is behind another header"
    if kind == "run":
        assert made.firewall.counters()[plan.interface].denied == denied + len(sent)
    assert addresses(guest, made) == before and far.heard == []
    # What it may say is answered.
    with heard(guest) as frames:
        guest.run(lambda: inject(frame(plan.mac, solicit(link_local, gateway(guest), plan.mac), "33:33:00:00:00:01")))
    assert [one[54] for one in frames if one[20] == ICMP6] == [136]
    assert guest.ask(PUBLIC) == "2600:5::5"
    assert made.host.ask(inward(guest), timeout=0.5) == "ConnectionRefusedError", "it is reached where it was"
