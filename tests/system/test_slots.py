"""Slots of both plans with a real IP stack behind their TAP, in a world of network namespaces."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from network_world import LOG_GROUP, PORT, Guest, World, configure, world
from stoker.errors import Conflict, HostError, StokerError
from stoker.host import netlink
from stoker.host.netlink import End
from stoker.host.nflog import Log
from stoker.host.nftables import Nftables
from stoker.network.egress import ALL, NONE, Protocol, parse_egress
from stoker.network.firewall import Firewall
from stoker.network.plan import INSIDE, NAMESPACE_RANGE, RUN_RANGE, RunPlan, Taken, parse_slot, plan_namespace, plan_run
from stoker.network.rules import Machine, Publication
from stoker.network.slot import POINTS, Plan, Slots

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
KINDS = pytest.mark.parametrize("kind", ["run", "ns"])
CUT = ("ConnectionResetError", "BrokenPipeError", "TimeoutError")
CLOSED = ("No route to host", "timeout", "PermissionError", "ConnectionRefusedError")
"""What a program sees that may not connect. (A port where nobody listens says ConnectionRefusedError too; these all have one.)"""


@pytest.fixture
def made() -> Iterator[World]:
    with world() as one:
        yield one


def said(connection: socket.socket, text: bytes = b"still there?") -> str:
    """What comes back over an open connection; the error's name when it is cut."""
    connection.settimeout(0.7)
    try:
        connection.sendall(text)
        return connection.recv(1000).decode() or "closed"
    except OSError as e:
        return type(e).__name__


def eventually(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not look():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.02)


@KINDS
def test_the_public_is_reached_and_nothing_else(made: World, kind: str) -> None:
    guest, other = made.machine(kind), made.machine(kind, "two")
    other.serve("0.0.0.0")
    made.host.serve("0.0.0.0")
    assert guest.ask("1.1.1.1") == "5.5.5.5"
    assert guest.ask_udp("8.8.8.8") == "5.5.5.5"
    plan = guest.slot.plan
    closed = ["10.1.2.3", "192.168.3.4", "169.254.169.254", "5.5.5.5", str(plan.host), str(other.slot.plan.address)]
    if kind == "ns":
        closed += ["169.254.0.22", str(plan.address)]
    else:
        closed.append(str(other.slot.plan.host))
    for address in closed:
        assert guest.ask(address, timeout=0.3) in CLOSED, address
        assert guest.ask_udp(address, timeout=0.1) in CLOSED, address
    # That it is the rules that close all this: the host reaches what it asks, and the private network is there.
    assert made.host.ask(str(other.slot.plan.address)) == str(other.slot.plan.host)
    assert made.host.ask("10.1.2.3") == "5.5.5.5"
    assert made.firewall.counters()[plan.interface].denied >= 10
    assert made.firewall.counters()[other.slot.plan.interface].denied == 0


@KINDS
def test_two_machines_of_one_address_at_once(made: World, kind: str) -> None:
    guests = [made.machine(kind, f"m{number}") for number in range(3)]
    assert [guest.ask("1.1.1.1") for guest in guests] == ["5.5.5.5"] * 3
    addresses = {guest.slot.plan.guest for guest in guests}
    assert len(addresses) == (1 if kind == "ns" else 3)
    assert len({guest.slot.plan.address for guest in guests}) == 3


@KINDS
def test_host_access_and_services(made: World, kind: str) -> None:
    made.host.serve("0.0.0.0")
    made.host.serve("0.0.0.0", 53)
    guest = made.machine(kind)
    gateway, host, mine = str(guest_gateway(guest)), str(guest.slot.plan.host), str(guest.slot.plan.address)
    assert guest.ask(gateway, 53, timeout=0.3) in CLOSED
    made.change(guest, host_services=((Protocol.UDP, 53), (Protocol.TCP, 53)))
    assert guest.ask(gateway, 53) == guest.ask_udp(gateway, 53) == mine, "a resolver is asked by the gateway's address"
    assert guest.ask(host, timeout=0.3) in CLOSED
    made.change(guest, host_access=True)
    assert guest.ask(host) == mine


@KINDS
def test_peers_one_way(made: World, kind: str) -> None:
    one, two = made.machine(kind, "one"), made.machine(kind, "two")
    one.serve("0.0.0.0")
    two.serve("0.0.0.0")
    made.change(one, peers=(two.slot.plan.address,))
    assert one.ask(str(two.slot.plan.address)) == str(one.slot.plan.address)
    assert two.ask(str(one.slot.plan.address), timeout=0.3) in CLOSED
    # An egress rule that names another machine's address does not lead there.
    made.change(one, egress=parse_egress(f"allow: {two.slot.plan.address}/32"))
    assert one.ask(str(two.slot.plan.address), timeout=0.3) in CLOSED


@KINDS
def test_policies_decide_by_the_first_rule(made: World, kind: str) -> None:
    made.internet.serve("1.1.1.1", 443)
    made.internet.serve("10.1.2.3", 5432)
    guest = made.machine(kind, egress=NONE)
    assert guest.ask("1.1.1.1", timeout=0.3) in CLOSED
    made.change(guest, egress=parse_egress("deny: 10.1.9.0/24; allow: 10.1.0.0/16:8080/tcp, public:443"))
    assert guest.ask("10.1.2.3") == "5.5.5.5"
    assert guest.ask_udp("10.1.2.3", timeout=0.2) in CLOSED
    assert guest.ask("10.1.2.3", 5432, timeout=0.3) in CLOSED
    assert guest.ask("10.1.9.3", timeout=0.3) in CLOSED
    assert guest.ask("1.1.1.1", 443) == guest.ask_udp("1.1.1.1", 443) == "5.5.5.5"
    assert guest.ask("1.1.1.1", timeout=0.3) in CLOSED
    # A rule for everything does not open what is private.
    made.change(guest, egress=parse_egress("allow: 0.0.0.0/0"))
    assert guest.ask("1.1.1.1") == "5.5.5.5"
    assert guest.ask("10.1.2.3", timeout=0.3) in CLOSED
    assert guest.ask("169.254.169.254", timeout=0.3) in CLOSED
    # Nothing but denials: the rest is public.
    made.change(guest, egress=parse_egress("deny: 8.8.8.8"))
    assert guest.ask("1.1.1.1") == "5.5.5.5"
    assert guest.ask("8.8.8.8", timeout=0.3) in CLOSED
    assert guest.ask("10.1.2.3", timeout=0.3) in CLOSED


@KINDS
def test_an_edit_cuts_what_is_open(made: World, kind: str) -> None:
    guest = made.machine(kind, egress=parse_egress("allow: 1.1.1.1, 8.8.8.8"))
    kept, cut = guest.connect("8.8.8.8"), guest.connect("1.1.1.1")
    with kept, cut:
        assert [kept.recv(100), cut.recv(100)] == [b"5.5.5.5\n"] * 2
        assert said(kept) == said(cut) == "still there?"
        made.change(guest, egress=parse_egress("allow: 8.8.8.8"))
        assert said(cut) in CUT
        assert said(kept) == "still there?"


@KINDS
def test_nothing_comes_in_over_what_was_cut(made: World, kind: str) -> None:
    """A server that goes on sending, though the machine may no longer ask it."""
    far = made.internet.serve("1.1.1.1", 5000)
    guest = made.machine(kind, published=(Publication(Protocol.UDP, 9000, 9),))

    def asking() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(0.5)
        sock.bind(("0.0.0.0", 9))
        sock.sendto(b"?", ("1.1.1.1", 5000))
        return sock

    with guest.run(asking) as sock, guest.connect("8.8.8.8") as kept:
        assert sock.recv(100) == b"5.5.5.5" and kept.recv(100) == b"5.5.5.5\n"
        far.udp.sendto(b"more", ("5.5.5.5", 9))
        assert sock.recv(100) == b"more"
        plan = guest.slot.plan
        machine = Machine(plan.interface, plan.source_mac, plan.address, parse_egress("allow: 8.8.8.8"))
        made.slots.change(machine).result(20)
        far.udp.sendto(b"late", ("5.5.5.5", 9))
        with pytest.raises(TimeoutError):
            sock.recv(100)
        assert said(kept) == "still there?"


def test_domains(made: World) -> None:
    policy = parse_egress("deny: bad.example.org; allow: *.example.org:8080/tcp")
    guest = made.machine("run", egress=policy)
    public, private = IPv4Address("1.1.1.1"), IPv4Address("10.1.2.3")
    assert guest.ask("1.1.1.1", timeout=0.3) in CLOSED
    assert policy.naming("www.example.org") == (1,) and policy.naming("bad.example.org") == (0, 1)
    made.firewall.resolved(policy, {1: [(public, 1), (private, 60)]})
    with guest.connect("1.1.1.1") as connection:
        assert connection.recv(100) == b"5.5.5.5\n"
        assert guest.ask_udp("1.1.1.1", timeout=0.2) in CLOSED, "only TCP was allowed"
        assert guest.ask("10.1.2.3", timeout=0.3) in CLOSED, "a name does not open a private address"
        eventually(lambda: guest.ask("1.1.1.1", timeout=0.3) in CLOSED)  # its lifetime is over
        assert said(connection) == "still there?", "an open connection outlives the name's lifetime"
        made.firewall.resolved(policy, {1: [(public, 600)]})
        assert guest.ask("1.1.1.1") == "5.5.5.5"
        made.firewall.resolved(policy, {0: [(public, 600)]})
        assert guest.ask("1.1.1.1", timeout=0.3) in CLOSED
        assert said(connection) in CUT


@KINDS
def test_published_ports(made: World, kind: str) -> None:
    ports = (
        Publication(Protocol.TCP, 9000, PORT),
        Publication(Protocol.UDP, 9000, PORT),
        Publication(Protocol.TCP, 9001, PORT, IPv4Address("127.0.0.1")),
    )
    guest, other = made.machine(kind, published=ports), made.machine(kind, "two")
    guest.serve("0.0.0.0")
    assert made.internet.ask("5.5.5.5", 9000) == "5.5.5.1", "the machine sees who it is"
    assert made.internet.ask_udp("5.5.5.5", 9000) == "5.5.5.1"
    assert made.internet.ask("5.5.5.5", 9001, timeout=0.3) in CLOSED
    inward = str(guest.slot.plan.host)
    for address in ("127.0.0.1", "5.5.5.5"):
        assert made.host.ask(address, 9000) in (inward, "5.5.5.5"), address
    assert made.host.ask("127.0.0.1", 9001) == inward
    assert made.host.ask_udp("127.0.0.1", 9000) == inward
    assert other.ask("5.5.5.5", 9000, timeout=0.3) in CLOSED, "other machines are not let in by the host's port"
    assert guest.ask("5.5.5.5", 9000, timeout=0.3) in CLOSED
    with pytest.raises(Conflict, match="tcp 9000"):
        made.change(other, published=ports[:1])
    with made.internet.connect("5.5.5.5", 9000) as connection:
        assert connection.recv(100) == b"5.5.5.1\n"
        made.change(guest, published=())
        assert made.internet.ask("5.5.5.5", 9000, timeout=0.3) in CLOSED
        assert said(connection) in CUT
    made.change(other, published=ports[:1])


@KINDS
def test_a_port_that_a_program_of_the_host_has(made: World, kind: str) -> None:
    """Is not taken away from it: neither by a machine that begins, nor by an edit."""
    made.host.serve("127.0.0.1", 9000)
    for port in (
        Publication(Protocol.TCP, 9000, PORT),
        Publication(Protocol.UDP, 9000, PORT, IPv4Address("127.0.0.1")),
    ):
        with pytest.raises(Conflict, match=f"{port.protocol} .*9000") as caught:
            made.machine(kind, published=(port,))
        assert caught.value.code == "port_in_use"
    free = (Publication(Protocol.TCP, 9000, PORT, IPv4Address("5.5.5.5")), Publication(Protocol.TCP, 9001, PORT))
    guest = made.machine(kind, published=free)
    guest.serve("0.0.0.0")
    plan = guest.slot.plan
    machine = Machine(plan.interface, plan.source_mac, plan.address, ALL, (*free, Publication(Protocol.TCP, 9000, PORT)))
    with pytest.raises(Conflict, match="9000"):
        made.slots.change(machine)
    assert made.internet.ask("5.5.5.5", 9000) == made.internet.ask("5.5.5.5", 9001) == "5.5.5.1"
    # What it has it keeps, though a program has taken its place beside it meanwhile.
    made.host.serve("0.0.0.0", 9001)
    made.slots.change(Machine(plan.interface, plan.source_mac, plan.address, NONE, free)).result(20)
    assert made.internet.ask("5.5.5.5", 9001) == "5.5.5.1" and made.host.ask("127.0.0.1", 9000) == "127.0.0.1"


@KINDS
def test_who_only_listens_is_told_of_the_end(made: World, kind: str) -> None:
    """Both while something comes in, and when it speaks again after a silence."""
    guest, far = made.machine(kind), made.internet.serve("1.1.1.1", 5000)
    with guest.connect("1.1.1.1", 5000) as listening, guest.connect("8.8.8.8") as silent:
        assert [listening.recv(100), silent.recv(100)] == [b"5.5.5.5\n"] * 2
        assert said(listening) == "still there?"
        time.sleep(0.3)  # what it has heard is acknowledged
        plan = guest.slot.plan
        done = made.slots.change(Machine(plan.interface, plan.source_mac, plan.address, NONE))
        while not done.done():
            time.sleep(0.1)
            far.say(b"more")
        for one in (listening, silent):
            one.settimeout(5)
        with pytest.raises(ConnectionResetError):
            while listening.recv(100):
                continue
        with pytest.raises(ConnectionResetError):
            silent.sendall(b"still there?")
            silent.recv(100)


def test_machines_are_not_reached_unasked(made: World) -> None:
    guest = made.machine("run")
    guest.serve("0.0.0.0")
    address = guest.slot.plan.address
    made.internet.run(lambda: configure(netlink.add_route(guest.slot.plan.network, gateway=IPv4Address("5.5.5.5"))))
    assert made.internet.ask(str(address), timeout=0.3) == "timeout"
    assert made.firewall.counters()[guest.slot.plan.interface].refused >= 1


@KINDS
def test_sources_are_pinned(made: World, kind: str) -> None:
    guest, other = made.machine(kind), made.machine(kind, "two")
    far = made.internet.serve("1.1.1.1", 53)
    mine, gateway = guest.slot.plan, guest_gateway(guest)
    forged = str(other.slot.plan.guest) if kind == "run" else "169.254.0.20"
    mac = guest.run(lambda: gateway_mac(gateway))

    def send(payload: bytes, source: str, sender: str = mine.mac) -> None:
        guest.run(lambda: inject(ethernet(sender, 0x0800, datagram(source, "1.1.1.1", 53, payload), mac)))

    send(b"mine", str(mine.guest))
    eventually(lambda: far.heard == [b"mine"])
    for number, source in enumerate((forged, "9.9.9.9", "0.0.0.0", "127.0.0.1")):
        send(f"forged {number}".encode(), source)
    send(b"another's MAC", str(mine.guest), "02:fc:00:00:00:99")
    send(b"last", str(mine.guest))
    eventually(lambda: b"last" in far.heard)
    assert far.heard == [b"mine", b"last"]


@KINDS
def test_the_hosts_loopback_is_closed_even_to_a_machine_that_may_reach_the_host(made: World, kind: str) -> None:
    guest = made.machine(kind, host_access=True)
    near, inner = made.host.serve(str(guest.slot.plan.host), 7777), made.host.serve("127.0.0.1", 7777)
    gateway = guest_gateway(guest)
    mac = guest.run(lambda: gateway_mac(gateway))
    for target in ("127.0.0.1", str(guest.slot.plan.host)):
        packet = datagram(str(guest.slot.plan.guest), target, 7777, target.encode())
        guest.run(lambda packet=packet: inject(ethernet(guest.slot.plan.mac, 0x0800, packet, mac)))  # type: ignore[misc]
    eventually(lambda: near.heard == [str(guest.slot.plan.host).encode()])
    assert inner.heard == []


def guest_gateway(guest: Guest) -> IPv4Address:
    plan = guest.slot.plan
    return plan.host if isinstance(plan, RunPlan) else INSIDE.gateway.ip


def gateway_mac(gateway: IPv4Address) -> str:
    """As the machine's kernel learned it by asking."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"?", (str(gateway), 9))
    table = Path("/proc/thread-self/net/arp")
    eventually(lambda: any(line.split()[0] == str(gateway) and line.split()[2] == "0x2" for line in table.read_text().splitlines()))
    return next(line.split()[3] for line in table.read_text().splitlines() if line.split()[0] == str(gateway))


def ethernet(source: str, kind: int, body: bytes, target: str = "ff:ff:ff:ff:ff:ff") -> bytes:
    return bytes.fromhex((target + source).replace(":", "")) + struct.pack("!H", kind) + body


def datagram(source: str, target: str, port: int, payload: bytes) -> bytes:
    """An IPv4 packet with a UDP datagram in it."""
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(payload), 1, 0, 64, 17, 0) + ends
    total = sum(struct.unpack("!10H", header))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:10] + struct.pack("!H", checksum) + header[12:] + struct.pack("!HHHH", 4000, port, 8 + len(payload), 0) + payload


def test_forged_arp_and_ipv6_change_nothing(made: World) -> None:
    guest = made.machine("run", host_access=True)
    plan = guest.slot.plan
    assert guest.ask("1.1.1.1") == "5.5.5.5"

    def arp(mac: str, address: str) -> bytes:
        sender = bytes.fromhex(mac.replace(":", "")) + socket.inet_aton(address)
        return ethernet(mac, 0x0806, struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + sender + bytes(6) + plan.host.packed)

    # The kernel believes a new answer at once, and hears IPv6, which it otherwise drops before the firewall is asked.
    for name in (f"ipv4/neigh/{plan.interface}/locktime", f"ipv6/conf/{plan.interface}/disable_ipv6"):
        made.host.run(lambda name=name: Path(f"/proc/sys/net/{name}").write_text("0"))  # type: ignore[misc]
    before = made.host.run(lambda: Path("/proc/thread-self/net/arp").read_text())
    assert plan.mac in before
    guest.run(lambda: inject(arp("02:66:66:66:66:66", str(plan.guest))))
    addresses = socket.inet_pton(socket.AF_INET6, "fe80::1") + socket.inet_pton(socket.AF_INET6, "ff02::1")
    packet = struct.pack("!IHBB", 6 << 28, 0, 59, 64) + addresses
    guest.run(lambda: inject(ethernet(plan.mac, 0x86DD, packet, "33:33:00:00:00:01")))
    eventually(lambda: made.firewall.counters()[plan.interface].denied >= 1)
    after = made.host.run(lambda: Path("/proc/thread-self/net/arp").read_text())
    assert "02:66:66:66:66:66" not in after and plan.mac in after
    assert guest.ask("1.1.1.1") == "5.5.5.5"


def test_a_machine_answers_no_dhcp(made: World) -> None:
    guest = made.machine("run", host_access=True)
    made.host.serve("0.0.0.0", 68)

    def offer() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("0.0.0.0", 67))
            sock.sendto(b"offer", (str(guest.slot.plan.host), 68))

    assert guest.ask_udp(str(guest.slot.plan.host), 68) == str(guest.slot.plan.guest), "but not from the server's port"
    guest.run(offer)
    eventually(lambda: made.firewall.counters()[guest.slot.plan.interface].denied == 1)


def inject(frame: bytes) -> None:
    """A frame out of the machine's interface, as its kernel would never send it."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        raw.send(frame)


@KINDS
def test_reuse(made: World, kind: str) -> None:
    first = made.machine(kind, published=(Publication(Protocol.TCP, 9000, PORT),))
    slot = first.slot
    first.serve("0.0.0.0")
    assert first.ask("1.1.1.1") == made.internet.ask("5.5.5.5", 9000).replace("5.1", "5.5") == "5.5.5.5"
    with pytest.raises(HostError, match="in use"):
        made.slots.reuse(slot, Machine(slot.plan.interface, slot.plan.source_mac, slot.plan.address, ALL))
    other = made.machine(kind, "two")
    first.end()
    assert made.slots.park(slot).result(20) is slot
    made.change(other, published=(Publication(Protocol.TCP, 9000, PORT),))  # its port is free again
    assert made.internet.ask("5.5.5.5", 9000, timeout=0.3) in CLOSED
    machine = Machine(slot.plan.interface, slot.plan.source_mac, slot.plan.address, ALL)
    second = Guest(made.stack, made.slots.reuse(slot, machine))
    made.guests = [second, other]
    assert second.ask("8.8.8.8") == "5.5.5.5"
    assert second.ask("10.1.2.3", timeout=0.3) in CLOSED


@KINDS
def test_dropped_twice_and_by_the_id_alone(made: World, kind: str) -> None:
    guest = made.machine(
        kind, egress=parse_egress("allow: example.org, 1.1.1.1"), published=(Publication(Protocol.TCP, 9000, PORT),)
    )
    guest.end()
    plan = parse_slot(guest.slot.plan.id)
    assert plan.id == guest.slot.plan.id
    guest.slot.close()
    with made.host.run(lambda: Firewall.open([RUN_RANGE.network, NAMESPACE_RANGE.network], log_group=LOG_GROUP)) as later:
        assert plan.interface in later.interfaces
        with made.host.run(lambda: Slots.open(later)) as slots:
            slots.drop(plan).result(20)
            slots.drop(plan).result(20)
        assert later.interfaces == frozenset()
    assert plan.interface not in made.interfaces() and not made.left()
    made.guests.clear()
    made.reopen()


@KINDS
def test_a_failed_step_leaves_nothing(made: World, kind: str) -> None:
    plan = made.plan(kind)
    machine = Machine(plan.interface, plan.source_mac, plan.address, ALL)
    other = End("other0", "02:aa:00:00:00:09")
    made.host.run(lambda: configure(netlink.add_veth(End(plan.interface, "02:aa:00:00:00:08"), other, made.host.namespace.fd)))
    with pytest.raises(StokerError, match=plan.interface):
        made.slots.up(plan, machine)
    assert made.firewall.interfaces == frozenset() and not made.left()
    with made.host.run(netlink.Netlink) as link:
        assert link.delete(plan.interface)
    guest = Guest(made.stack, made.slots.up(plan, machine))
    made.guests.append(guest)
    assert guest.ask("1.1.1.1") == "5.5.5.5"
    with pytest.raises(Conflict, match="in use"):
        made.slots.up(plan, machine)
    assert guest.ask("1.1.1.1") == "5.5.5.5"


def test_adopted_by_the_tap(made: World) -> None:
    guest = made.machine("ns")
    assert guest.slot.namespace is not None
    there = guest.slot.namespace.identity
    adopted = made.slots.adopt(parse_slot(guest.slot.plan.id), guest.wire)
    assert adopted.namespace is not None and adopted.namespace.identity == there != made.host.namespace.identity
    guest.slot.close()
    assert guest.ask("1.1.1.1") == "5.5.5.5"
    guest.slot = adopted


def test_a_packet_passes_the_same_rules_with_more_machines(made: World) -> None:
    def rules() -> int:
        with made.host.run(Nftables) as nft:
            return sum("rule" in row for row in nft.query("list ruleset"))

    policies = [ALL, NONE, parse_egress("allow: example.org, 10.0.0.0/8")]
    facts = {"published": (), "host_access": True}
    made.firewall.put(machine_number(0, policies[2]))
    one = rules()
    for number in range(1, 60):
        made.firewall.put(machine_number(number, policies[number % 3], **facts))
    assert rules() == one
    for number in range(60):
        made.firewall.remove(machine_number(number, ALL).interface)
    assert rules() < one, "the policy's own chain went with its last machine"


def test_many_at_once_from_many_threads(made: World) -> None:
    plans: list[Plan] = [*plan_run("many", [f"m{number}" for number in range(12)], made.slots.taken()).values()]
    for _ in range(12):
        plans.append(plan_namespace(made.slots.taken(plans)))

    def live(plan: Plan) -> None:
        for _ in range(2):
            slot = made.slots.up(plan, Machine(plan.interface, plan.source_mac, plan.address, ALL))
            made.slots.drop(plan, slot).result(20)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(live, plans))
    assert made.firewall.interfaces == frozenset() and not made.left()


def test_another_version_of_the_rules_takes_over(made: World) -> None:
    port = (Publication(Protocol.TCP, 9000, PORT),)
    guest, other = made.machine("run", published=port), made.machine("ns", "two", parse_egress("allow: 1.1.1.1"))
    guest.serve("0.0.0.0")
    with made.host.run(lambda: Firewall.open([RUN_RANGE.network, NAMESPACE_RANGE.network], log_group=77)) as later:
        assert later.interfaces == {guest.slot.plan.interface, other.slot.plan.interface}
        assert guest.ask("1.1.1.1") == "5.5.5.5" and made.internet.ask("5.5.5.5", 9000) == "5.5.5.1"
        assert other.ask("1.1.1.1", timeout=0.3) in CLOSED, "closed until its policy is set again"
        plan = other.slot.plan
        later.put(Machine(plan.interface, plan.source_mac, plan.address, parse_egress("allow: 1.1.1.1")))
        assert other.ask("1.1.1.1") == "5.5.5.5" and other.ask("8.8.8.8", timeout=0.3) in CLOSED
    made.reopen()


def test_a_flushed_firewall_is_made_anew(made: World) -> None:
    guest, other = made.machine("run"), made.machine("ns", "two", parse_egress("allow: 1.1.1.1"))
    assert not made.firewall.restore()
    for flush in ("flush ruleset", "delete table inet stoker", "flush set inet stoker pinned"):
        with made.host.run(Nftables) as nft:
            nft.apply([flush])
        assert made.firewall.restore() and not made.firewall.restore()
        assert guest.ask("1.1.1.1") == other.ask("1.1.1.1") == "5.5.5.5"
        assert other.ask("8.8.8.8", timeout=0.3) in CLOSED
    with made.host.run(Nftables) as nft:
        nft.apply(["flush ruleset"])
    made.change(guest, egress=NONE)  # notices it
    assert guest.ask("1.1.1.1", timeout=0.3) in CLOSED and other.ask("1.1.1.1") == "5.5.5.5"
    with made.host.run(Nftables) as nft:
        nft.apply(["flush ruleset"])


def test_denials_are_logged_at_a_bounded_rate(made: World) -> None:
    guest, other = made.machine("run"), made.machine("ns", "two")
    with made.host.run(lambda: Log(LOG_GROUP)) as log:
        with pytest.raises(HostError, match="log"):
            made.host.run(lambda: Log(LOG_GROUP))

        mac = guest.run(lambda: gateway_mac(guest_gateway(guest)))
        eventually(lambda: made.firewall.counters()[guest.slot.plan.interface].denied == 1)  # that it asked the gateway
        before = made.firewall.counters()[guest.slot.plan.interface]
        frame = ethernet(guest.slot.plan.mac, 0x0800, datagram(str(guest.slot.plan.guest), "10.1.2.3", 9999, b"x"), mac)
        log.read()
        guest.run(lambda: [inject(frame) for _ in range(200)])
        eventually(lambda: made.firewall.counters()[guest.slot.plan.interface].denied == before.denied + 200)
        after = made.firewall.counters()[guest.slot.plan.interface]
        assert (after.sent, after.sent_bytes) == (before.sent + 200, before.sent_bytes + 200 * 29)
        assert other.ask("192.168.3.4", timeout=0.3) in CLOSED
        found, lost = log.read()
        assert not lost and {one.prefix for one in found} == {"stoker-denied"}
        mine = [one for one in found if one.interface == guest.slot.plan.interface]
        assert 5 <= len(mine) <= 100
        assert {(one.source, str(one.destination), one.protocol, one.port) for one in mine} == {
            (guest.slot.plan.address, "10.1.2.3", 17, 9999)
        }
        (theirs,) = {(one.interface, one.source, one.protocol, one.port) for one in found if one not in mine}
        assert theirs == (other.slot.plan.interface, other.slot.plan.address, 6, PORT), (
            "one machine's noise hides no other's denial"
        )
        assert log.read() == ([], False)


def test_prune(made: World) -> None:
    guest = made.machine("run")
    for number in range(3):
        made.firewall.put(machine_number(number, ALL))
    gone = made.firewall.prune([guest.slot.plan.interface])
    assert len(gone) == 3 and made.firewall.interfaces == {guest.slot.plan.interface}


def machine_number(number: int, egress: object, **facts: object) -> Machine:
    plan = plan_namespace(Taken(), after=number)
    return Machine(plan.interface, plan.source_mac, plan.address, egress, **facts)  # type: ignore[arg-type]


@KINDS
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_every_point(made: World, kind: str, point: str) -> None:
    if kind == "run" and point == "slot.inside":
        pytest.skip("the run plan has no inside")
    plan = plan_run("test", ["one"], Taken())["one"] if kind == "run" else plan_namespace(Taken())
    words = [sys.executable, str(Path(__file__).parents[1] / "slot_worker.py"), str(made.host.namespace.fd), plan.id, point]
    ended = subprocess.run(words, pass_fds=[made.host.namespace.fd], timeout=60, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    made.reopen()
    for _ in range(2):
        made.slots.drop(parse_slot(plan.id)).result(20)
    assert not made.left()
    assert plan.interface not in made.interfaces()
    guest = Guest(made.stack, made.slots.up(plan, Machine(plan.interface, plan.source_mac, plan.address, ALL)))
    made.guests.append(guest)
    assert guest.ask("1.1.1.1") == "5.5.5.5"
