"""Machines on a bridge of an operator's: reached like any other host of that network, and kept to what they are."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from network_world import LOG_GROUP, PORT, Member, Place, World, addressed, configure, up, world
from stoker.errors import CapacityExhausted, Conflict, HostError, InvalidRequest
from stoker.host import netlink
from stoker.host.netlink import End, Netlink
from stoker.host.nflog import Log
from stoker.host.nftables import Nftables
from stoker.network.bridged import BRIDGE_TABLE, Port
from stoker.network.firewall import Firewall
from stoker.network.plan import NAMESPACE_RANGE, RUN_RANGE, BridgePlan, Taken, parse_any_slot, plan_bridge
from stoker.network.slot import Joined, Slots

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
CLOSED = ("No route to host", "timeout", "PermissionError", "ConnectionRefusedError")
SERVER = "192.168.77.1"
SO_RCVBUFFORCE = 33
FORGED = "02:66:66:66:66:66"


class Lan:
    """A bridge of the operator's, with a port to the rest of a network where there is a server."""

    def __init__(self, made: World) -> None:
        self.made, self.members = made, list[Member]()
        self.rest = Place(made.stack)
        made.host.run(self._wire)
        self.rest.run(lambda: configure(up("lan0"), *addressed("lan0", f"{SERVER}/24")))
        self.rest.serve(SERVER)
        self.before = self.bridge_mac()

    def _wire(self) -> None:
        subprocess.run(["ip", "link", "add", "br0", "type", "bridge"], check=True)
        configure(netlink.add_veth(End("port0", "02:bb:00:00:00:01"), End("lan0", "02:bb:00:00:00:02"), self.rest.namespace.fd))
        bridge = socket.if_nametoindex("br0")
        configure(netlink.set_link(socket.if_nametoindex("port0"), "port0", master=bridge), up("port0"), up("br0"))
        configure(*addressed("br0", "192.168.77.9/24"))

    def bridge_mac(self) -> tuple[str, int]:
        with self.made.host.run(Netlink) as link:
            found = link.link("br0")
        assert found is not None
        return found.mac, found.mtu

    def plan(self) -> BridgePlan:
        return plan_bridge("br0", self.made.slots.taken())

    def member(self, address: str, plan: BridgePlan | None = None, **facts: int) -> Member:
        plan = plan or self.plan()
        slot = self.made.slots.join(plan, Port(plan.interface, plan.mac, **facts))
        member = Member(self.made.stack, slot, address)
        self.members.append(member)
        return member

    def end(self) -> None:
        for member in self.members:
            member.end()
            self.made.slots.drop(member.slot.plan, member.slot).result(20)
        assert self.bridge_mac() == self.before
        self.made.host.run(lambda: subprocess.run(["ip", "link", "del", "br0"], check=True))
        self.made.host.run(lambda: subprocess.run(["ip", "link", "del", "port0"], check=True))


@pytest.fixture
def lan() -> Iterator[Lan]:
    with world() as made:
        one = Lan(made)
        yield one
        one.end()


def eventually(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not look():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.02)


def ethernet(source: str, target: str, kind: int, body: bytes) -> bytes:
    return bytes.fromhex((target + source).replace(":", "")) + struct.pack("!H", kind) + body


def datagram(source: str, target: str, ports: tuple[int, int], payload: bytes = b"x") -> bytes:
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(payload), 1, 0, 64, 17, 0) + ends
    total = sum(struct.unpack("!10H", header))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:10] + struct.pack("!H", checksum) + header[12:] + struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload


def inject(interface: str, *frames: bytes) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((interface, 0))
        for one in frames:
            raw.send(one)


def heard(lan: Lan, work: Callable[[], None]) -> list[bytes]:
    """What comes out of the bridge to the rest of the network meanwhile."""

    def listen() -> socket.socket:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        raw.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        raw.bind(("lan0", 3))
        raw.setblocking(False)
        return raw

    found = []
    with lan.rest.run(listen) as raw:
        work()
        time.sleep(0.4)
        while True:
            try:
                data, about = raw.recvfrom(2000)
            except BlockingIOError:
                return found
            if about[2] != socket.PACKET_OUTGOING:
                found.append(data)


def test_a_host_of_the_network(lan: Lan) -> None:
    one, two = lan.member("192.168.77.50/24"), lan.member("192.168.77.51/24")
    one.serve("0.0.0.0")
    two.serve("0.0.0.0")
    assert one.ask(SERVER) == "192.168.77.50" and two.ask(SERVER) == "192.168.77.51"
    assert lan.rest.ask("192.168.77.50") == SERVER
    assert lan.made.host.ask("192.168.77.50") == "192.168.77.9"
    assert one.ask("192.168.77.51", timeout=0.5) in CLOSED, "machines do not reach each other"
    counters = lan.made.firewall.counters()[one.slot.plan.interface]
    assert counters.sent > 0 and counters.denied == 0
    guest = lan.made.machine("run")
    assert guest.ask("1.1.1.1") == "5.5.5.5", "beside slots of the other kinds"


def test_what_a_machine_may_not_say(lan: Lan) -> None:
    machine = lan.member("192.168.77.50/24")
    plan, everybody = machine.slot.plan, "ff:ff:ff:ff:ff:ff"
    assert machine.ask(SERVER) == "192.168.77.50"

    def arp(mac: str, says: str) -> bytes:
        sender = bytes.fromhex(says.replace(":", "")) + socket.inet_aton("192.168.77.9")
        return ethernet(mac, everybody, 0x0806, struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + sender + bytes(10))

    advert = struct.pack("!IHBB", 6 << 28, 16, 58, 255) + socket.inet_pton(socket.AF_INET6, "fe80::1")
    advert += socket.inet_pton(socket.AF_INET6, "ff02::1") + struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
    tree = "01:80:c2:00:00:00"
    forbidden = [
        ethernet(FORGED, everybody, 0x0800, datagram("192.168.77.50", "192.168.77.255", (4000, 4000))),
        arp(FORGED, FORGED),
        arp(plan.mac, FORGED),
        ethernet(plan.mac, everybody, 0x8100, struct.pack("!HH", 7, 0x0800) + datagram("192.168.77.50", "255.255.255.255", (9, 9))),
        ethernet(plan.mac, everybody, 0x88A8, struct.pack("!HH", 7, 0x0800) + datagram("192.168.77.50", "255.255.255.255", (9, 9))),
        ethernet(plan.mac, tree, 38, bytes.fromhex("424203") + bytes(35)),
        ethernet(plan.mac, everybody, 0x0800, datagram("192.168.77.50", "255.255.255.255", (67, 68))),
        ethernet(plan.mac, "33:33:00:00:00:01", 0x86DD, advert),
    ]
    before = lan.made.firewall.counters()[plan.interface].denied
    with lan.made.host.run(lambda: Log(LOG_GROUP)) as log:
        passed = heard(lan, lambda: machine.run(lambda: inject("eth0", *forbidden)))
        assert not {":".join(f"{byte:02x}" for byte in one[6:12]) for one in passed} & {plan.mac, FORGED}
        assert {(row.interface, row.prefix) for row in log.read()[0]} == {(plan.interface, "stoker-denied")}
    assert lan.made.firewall.counters()[plan.interface].denied == before + len(forbidden)
    assert machine.ask(SERVER) == "192.168.77.50"
    # What it may say arrives: its own address by its own MAC, a question for an address.
    allowed = ethernet(plan.mac, everybody, 0x0800, datagram("0.0.0.0", "255.255.255.255", (68, 67)))
    assert any(b[:14] == allowed[:14] for b in heard(lan, lambda: machine.run(lambda: inject("eth0", allowed))))


def test_who_speaks_of_a_spanning_tree_is_cut_off(lan: Lan) -> None:
    machine, other = lan.member("192.168.77.50/24"), lan.member("192.168.77.51/24")
    words = ["ip", "link", "set", "br0", "type", "bridge", "forward_delay", "200", "stp_state", "1"]
    lan.made.host.run(lambda: subprocess.run(words, check=True))

    def bridge() -> dict[str, Any]:
        shown = lan.made.host.run(lambda: subprocess.run(["ip", "-j", "-d", "link"], check=True, capture_output=True).stdout)
        return {one["ifname"]: one["linkinfo"] for one in json.loads(shown) if "linkinfo" in one}

    def states() -> dict[str, str]:
        return {name: info["info_slave_data"]["state"] for name, info in bridge().items() if "info_slave_data" in info}

    eventually(lambda: set(states().values()) == {"forwarding"})
    root = bridge()["br0"]["info_data"]["root_id"]
    # It says that it is a better root than the bridge itself.
    body = bytes.fromhex("424203") + struct.pack("!HBBQIQHHHHH", 0, 0, 0, 0, 0, 0, 0x8001, 0, 20 << 8, 2 << 8, 15 << 8)
    machine.run(lambda: inject("eth0", ethernet(machine.slot.plan.mac, "01:80:c2:00:00:00", len(body), body)))
    eventually(lambda: states()[machine.slot.plan.interface] == "disabled")
    assert bridge()["br0"]["info_data"]["root_id"] == root
    assert other.ask(SERVER) == "192.168.77.51"


def test_rates_of_a_port(lan: Lan) -> None:
    machine = lan.member("192.168.77.50/24", rate_out=20_000)
    payload = datagram("192.168.77.50", "192.168.77.255", (4000, 4000), bytes(1000))
    frame = ethernet(machine.slot.plan.mac, "ff:ff:ff:ff:ff:ff", 0x0800, payload)
    got = heard(lan, lambda: machine.run(lambda: inject("eth0", *[frame] * 500)))
    counters = lan.made.firewall.counters()[machine.slot.plan.interface]
    assert 0 < len([one for one in got if one == frame]) < 250 < counters.over_out
    plan = machine.slot.plan
    lan.made.firewall.put(Port(plan.interface, plan.mac))
    assert len([one for one in heard(lan, lambda: machine.run(lambda: inject("eth0", *[frame] * 500))) if one == frame]) == 500


def test_what_is_no_bridge_is_refused_with_words(lan: Lan) -> None:
    for name, words in (("br9", "no such interface"), ("up0", "veth")):
        plan = BridgePlan("stkbtest", name)
        with pytest.raises(HostError, match=words) as caught:
            lan.made.slots.join(plan, Port(plan.interface, plan.mac))
        assert caught.value.code == "bridge_unknown" and caught.value.hint
    assert lan.made.firewall.interfaces == frozenset() and "stkbtest" not in lan.made.interfaces()
    member = lan.member("192.168.77.50/24")
    with pytest.raises(Conflict, match="in use"):
        lan.made.slots.join(member.slot.plan, Port(member.slot.plan.interface, member.slot.plan.mac))
    with pytest.raises(CapacityExhausted, match="up0"):
        plan_bridge("br0", lan.made.slots.taken(), "up0")
    for text in ("bridge:", "bridge:a", "bridge:a:b:c", "bridge:a b:br0", "bridge:a:" + "x" * 16, "bridge::br0"):
        with pytest.raises(InvalidRequest, match="no slot"):
            parse_any_slot(text)


def test_found_again_and_dropped_by_the_id_alone(lan: Lan) -> None:
    member = lan.member("192.168.77.50/24", rate_in=1_000_000)
    plan = parse_any_slot(member.slot.plan.id)
    assert plan == member.slot.plan and isinstance(plan, BridgePlan) and plan.mac == member.slot.plan.mac
    made = lan.made
    with made.host.run(lambda: Firewall.open([RUN_RANGE.network, NAMESPACE_RANGE.network], log_group=LOG_GROUP)) as later:
        assert later.interfaces == {plan.interface} and not later.restore()
        with made.host.run(Nftables) as nft:
            nft.apply([f"delete table {BRIDGE_TABLE}"])
        assert later.restore() and not later.restore()
        assert member.ask(SERVER) == "192.168.77.50"
        before = later.counters()[plan.interface].denied
        member.run(lambda: inject("eth0", ethernet(FORGED, "ff:ff:ff:ff:ff:ff", 0x0806, bytes(28))))
        eventually(lambda: later.counters()[plan.interface].denied == before + 1)
        member.end()
        with made.host.run(lambda: Slots.open(later)) as slots:
            slots.drop(plan, Joined(-1, plan=plan)).result(20)
            slots.drop(plan).result(20)
        assert later.interfaces == frozenset() and not made.left() and plan.interface not in made.interfaces()
    lan.members.clear()
    made.reopen()


@pytest.mark.parametrize("point", ["slot.judged", "slot.tap", "slot.linked", "slot.up", "slot.dropping", "slot.unlinked"])
def test_killed_at_every_point(lan: Lan, point: str) -> None:
    made, plan = lan.made, plan_bridge("br0", Taken())
    words = [sys.executable, str(Path(__file__).parents[1] / "slot_worker.py"), str(made.host.namespace.fd), plan.id, point]
    ended = subprocess.run(words, pass_fds=[made.host.namespace.fd], timeout=60, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    made.reopen()
    for _ in range(2):
        made.slots.drop(plan).result(20)
    assert not made.left() and plan.interface not in made.interfaces()
    assert lan.member("192.168.77.50/24", plan).ask(SERVER) == "192.168.77.50"
    assert lan.rest.ask("192.168.77.50", PORT, timeout=0.5) in CLOSED
