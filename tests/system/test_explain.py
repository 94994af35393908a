"""Why a machine reaches a port or does not: each thing on the way is really broken, in a world of namespaces, and named."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from name_server import Loop, NameServer
from network_world import EVERYTHING, LOG_GROUP, PORT, ROUTER, Guest, World, configure, world
from stoker.api.models import Explanation, Verdict
from stoker.engine.explaining import told
from stoker.engine.gathering import Stream, gather
from stoker.errors import GuestError
from stoker.host import netlink
from stoker.host.nftables import Nftables
from stoker.network.denials import Denials
from stoker.network.dns_upstream import Server
from stoker.network.egress import ALL, Egress, Protocol, parse_egress
from stoker.network.explain import wider
from stoker.network.facts import parse_target
from stoker.network.looking import Looking
from stoker.network.plan import RunPlan
from stoker.network.resolver import SERVICES, Resolver
from stoker.network.rules import Machine

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
KINDS = pytest.mark.parametrize("kind", ["run", "ns"])
SANDBOX = "sb-" + "a" * 20


@pytest.fixture
def made() -> Iterator[World]:
    with world() as one:
        yield one


def eventually(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not look():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.02)


class Line:
    """A connection of the guest's, as :class:`stoker.guest.connections.Connection` is one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def read(self, limit: int = -1) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self._sock, limit if limit > 0 else 65536)

    async def write(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    def abort(self) -> None:
        self._sock.close()


class Within:
    """In the place of an agent: the namespace that plays the guest."""

    def __init__(self, guest: Guest, resolv: str = "nameserver 1.1.1.1\n", hosts: str = "127.0.0.1 localhost\n") -> None:
        self.guest = guest
        self.files = {"/etc/resolv.conf": resolv, "/etc/hosts": hosts}

    async def read(self, path: str) -> str:
        if path in self.files:
            return self.files[path]
        assert path == "/proc/net/route"
        return await asyncio.to_thread(self.guest.run, self._routes)

    def _routes(self) -> str:
        with open("/proc/thread-self/net/route") as file:
            return file.read()

    async def connect(self, address: IPv4Address, port: int, timeout: float) -> Stream:
        sock = self.guest.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        try:
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
        except BaseException as error:
            sock.close()
            if isinstance(error, TimeoutError):
                raise GuestError("connect_timeout", f"nobody answered in the guest within {timeout:g} s") from None
            if not isinstance(error, OSError):
                raise
            raise GuestError("unreachable", str(error), details={"errno": error.errno}) from None
        return Line(sock)


class Explaining:
    """The world with an event loop, and a name server on the internet that our resolver asks too."""

    def __init__(self, made: World) -> None:
        self.made, self.loop = made, Loop()
        made.stack.callback(self.loop.close)
        self.names = made.internet.run(lambda: NameServer("1.1.1.1"))
        made.stack.callback(self.names.close)
        self.names.zone["web.example.org", "A"] = ["web.example.org 60 A 8.8.8.8"]
        self.names.zone["inner.example.org", "A"] = ["inner.example.org 60 A 10.1.2.3"]
        self.resolver = made.host.run(lambda: Resolver.open(made.firewall, [Server.parse("1.1.1.1")]))
        made.stack.callback(lambda: self.loop.run(self.resolver.aclose()))
        self.machines: dict[str, Machine] = {}

    def machine(self, kind: str, policy: str | Egress = ALL, name: str = "one", **facts: Any) -> Guest:
        egress = parse_egress(policy) if isinstance(policy, str) else policy
        if egress.has_domains:
            facts["host_services"] = SERVICES
        guest = self.made.machine(kind, name, egress, **facts)
        plan = guest.slot.plan
        machine = Machine(plan.interface, plan.source_mac, plan.address, egress, **facts)
        if egress.has_domains:
            machine = replace(machine, resolver=plan.host)
            self.made.firewall.put(machine)
            self.loop.run(self.resolver.put(machine, plan.host))
        self.machines[plan.interface] = machine
        return guest

    def why(self, guest: Guest, target: str, inside: Any = "", protocol: Protocol = Protocol.TCP) -> Explanation:
        plan = guest.slot.plan
        looking = Looking(self.made.firewall, self.made.host.namespace, self.machines[plan.interface], guest.slot.namespace)
        gateway = plan.host if isinstance(plan, RunPlan) else IPv4Address("169.254.0.22")
        inside = Within(guest) if inside == "" else inside
        home = self.made.host.namespace
        facts = self.loop.run(gather("web", parse_target(target, protocol), looking, gateway, home, inside))
        return told(SANDBOX, facts, 0.0)

    def on_host(self, name: str, value: str) -> None:
        def work() -> None:
            with open(f"/proc/sys/net/ipv4/{name}", "w") as file:
                file.write(value)

        self.made.host.run(work)


@pytest.fixture
def explaining(made: World) -> Explaining:
    return Explaining(made)


def steps(found: Explanation) -> dict[str, str]:
    return {step.name: step.verdict.value for step in found.steps}


def failed(found: Explanation) -> dict[str, tuple[str, str]]:
    return {step.name: (step.says, step.mend) for step in found.steps if step.verdict is Verdict.FAIL}


@KINDS
def test_what_works_passes_every_step(explaining: Explaining, kind: str) -> None:
    guest = explaining.machine(kind)
    found = explaining.why(guest, f"web.example.org:{PORT}")
    assert (found.reached, found.fault) == (True, None), found
    assert set(steps(found).values()) == {"pass"}, found
    said = {step.name: step.says for step in found.steps}
    assert "1.1.1.1" in said["guest resolver"] and "8.8.8.8" in said["name"]
    assert said["translation"] == "it leaves as 5.5.5.5"
    assert said["uplink"] == "the host sends it out by up0 via 5.5.5.1"


def test_forwarding_is_off(explaining: Explaining) -> None:
    guest = explaining.machine("ns")
    explaining.on_host("ip_forward", "0")
    found = explaining.why(guest, f"1.1.1.1:{PORT}")
    assert (found.reached, found.fault) == (False, "forwarding"), found
    assert failed(found)["forwarding"][1] == "stoker network check --fix"
    explaining.on_host("ip_forward", "1")
    assert explaining.why(guest, f"1.1.1.1:{PORT}").reached


@pytest.mark.parametrize("how", ["policy", "rule", "jump", "reply"])
def test_another_firewall_drops_it(explaining: Explaining, how: str) -> None:
    guest = explaining.machine("ns")
    rest = "drop" if how == "policy" else "accept"
    drops = {"policy": "counter", "rule": "ip daddr 1.1.1.1 drop", "jump": "jump deep", "reply": "ip saddr 1.1.1.1 drop"}
    with explaining.made.host.run(Nftables) as nft:
        nft.apply(
            [
                "add table ip filter",
                "add chain ip filter deep",
                "add rule ip filter deep ip daddr 1.1.1.1 reject" if how == "jump" else "add rule ip filter deep counter",
                f"add chain ip filter FORWARD {{ type filter hook forward priority 0; policy {rest}; }}",
                f"add rule ip filter FORWARD {drops[how]}",
                "add table ip harmless",
                "add chain ip harmless forward { type filter hook forward priority 10; policy accept; }",
            ]
        )
    found = explaining.why(guest, f"1.1.1.1:{PORT}")
    assert (found.reached, found.fault) == (False, "other firewalls"), found
    says, mend = failed(found)["other firewalls"]
    assert "ip filter FORWARD" in says and "harmless" not in says
    assert ("what came back" in says) is (how == "reply")
    assert mend == ("stoker network check --fix" if how == "policy" else "nft list chain ip filter FORWARD")
    assert explaining.why(guest, f"8.8.8.8:{PORT}").reached is (how != "policy"), "only what it really drops"


def test_the_guest_has_no_route(explaining: Explaining) -> None:
    guest = explaining.machine("ns")
    gateway = IPv4Address("169.254.0.22")
    guest.run(lambda: configure(netlink.delete_route(EVERYTHING, gateway=gateway)))
    found = explaining.why(guest, f"1.1.1.1:{PORT}")
    assert (found.reached, found.fault) == (False, "guest route"), found
    assert failed(found)["guest route"][1] == "stoker exec web -- ip route add default via 169.254.0.22 dev eth0"
    named = explaining.why(guest, f"web.example.org:{PORT}")
    assert named.fault == "guest route" and steps(named)["name"] == "unknown", named


def test_the_host_has_no_route(explaining: Explaining) -> None:
    guest = explaining.machine("ns")
    explaining.made.host.run(lambda: configure(netlink.delete_route(EVERYTHING, gateway=ROUTER.ip)))
    found = explaining.why(guest, f"1.1.1.1:{PORT}")
    explaining.made.host.run(lambda: configure(netlink.add_route(EVERYTHING, gateway=ROUTER.ip)))
    assert (found.reached, found.fault) == (False, "uplink"), found


@KINDS
def test_the_policy_denies_and_its_mend_mends(explaining: Explaining, kind: str) -> None:
    policy = "allow: 10.1.0.0/16:5432; deny: 8.8.8.8; allow: public"
    guest = explaining.machine(kind, policy)
    before = explaining.made.firewall.counters()[guest.slot.plan.interface].denied
    found = explaining.why(guest, f"8.8.8.8:{PORT}")
    assert (found.reached, found.fault) == (False, "policy"), found
    says, mend = failed(found)["policy"]
    assert "rule 2 of the policy, `deny: 8.8.8.8`" in says
    assert "counted as denied" in failed(found)["firewall"][0]
    assert explaining.made.firewall.counters()[guest.slot.plan.interface].denied > before
    assert mend == f"stoker network set web --egress 'allow: 8.8.8.8:{PORT}/tcp, 10.1.0.0/16:5432; deny: 8.8.8.8; allow: public'"
    for target in ("8.8.8.8", "10.1.2.3"):
        _, mend = failed(explaining.why(guest, f"{target}:{PORT}"))["policy"]
        edited = parse_egress(mend.split("'")[1])
        explaining.machines[guest.slot.plan.interface] = replace(explaining.machines[guest.slot.plan.interface], egress=edited)
        explaining.made.change(guest, egress=edited)
        assert explaining.why(guest, f"{target}:{PORT}").reached
        assert guest.ask(target) == "5.5.5.5"


def test_a_private_network_needs_a_rule_of_its_own(explaining: Explaining) -> None:
    guest = explaining.machine("ns")
    found = explaining.why(guest, f"inner.example.org:{PORT}")
    assert found.fault == "policy" and steps(found)["name"] == "pass", found
    says, mend = failed(found)["policy"]
    assert "private" in says and mend == f"stoker network set web --egress 'allow: 10.1.2.3:{PORT}/tcp, public'"


def test_names_under_a_policy(explaining: Explaining) -> None:
    guest = explaining.machine("ns", f"deny: bad.example.org; allow: *.example.org:{PORT}")
    explaining.names.zone["bad.example.org", "A"] = ["bad.example.org 60 A 8.8.8.8"]
    assert explaining.why(guest, f"web.example.org:{PORT}").reached
    denied = explaining.why(guest, f"bad.example.org:{PORT}")
    assert denied.fault == "name" and denied.reached is None or denied.reached is False, denied
    assert "rule 1 of the policy, `deny: bad.example.org`" in failed(denied)["name"][0]
    other = explaining.why(guest, f"elsewhere.net:{PORT}")
    assert "no rule of the policy" in failed(other)["name"][0]
    assert failed(other)["name"][1].startswith(f"stoker network set web --egress 'allow: elsewhere.net:{PORT}/tcp; deny: bad")
    absent = explaining.why(guest, f"absent.example.org:{PORT}")
    assert absent.fault == "name" and "no such name" in failed(absent)["name"][0]
    wrong_port = explaining.why(guest, "web.example.org:22")
    assert wrong_port.fault == "policy", wrong_port
    by_file = explaining.why(guest, f"bad.example.org:{PORT}", Within(guest, hosts="1.1.1.1 x bad.example.org\n"))
    assert steps(by_file)["name"] == "pass" and by_file.fault == "policy", by_file


def test_the_resolver_is_silent_or_closed(explaining: Explaining) -> None:
    guest = explaining.machine("ns")
    silent = explaining.why(guest, f"web.example.org:{PORT}", Within(guest, "nameserver 9.9.9.9\n"))
    assert silent.fault == "name" and "9.9.9.9 did not answer" in failed(silent)["name"][0], silent
    none = explaining.why(guest, f"web.example.org:{PORT}", Within(guest, "search lan\n"))
    assert none.fault == "guest resolver", none
    closed = explaining.machine("ns", "allow: 8.8.8.8", name="two")
    found = explaining.why(closed, f"web.example.org:{PORT}")
    assert found.fault == "name" and "allow: 1.1.1.1:53, 8.8.8.8" in failed(found)["name"][1], found
    by_udp = explaining.machine("ns", "allow: 1.1.1.1:53/udp, 8.8.8.8", name="three")
    found = explaining.why(by_udp, f"web.example.org:{PORT}")
    assert found.reached and steps(found)["name"] == "unknown", found


def test_nobody_is_there(explaining: Explaining) -> None:
    guest = explaining.machine("ns")
    refused = explaining.why(guest, "1.1.1.1:81")
    assert (refused.reached, refused.fault) == (False, "connection"), refused
    assert "nobody listens on port 81" in failed(refused)["connection"][0] and list(failed(refused)) == ["connection"]
    silent = explaining.why(guest, "1.0.0.1:80")
    assert (silent.reached, silent.fault) == (False, "connection"), silent
    assert "it left by up0" in failed(silent)["connection"][0]


def test_the_next_hop_is_dead(explaining: Explaining) -> None:
    guest = explaining.machine("ns")
    route, gateway = IPv4Network("9.0.0.0/8"), IPv4Address("5.5.5.77")
    explaining.made.host.run(lambda: configure(netlink.add_route(route, gateway=gateway)))
    found = explaining.why(guest, "9.9.9.9:80")
    explaining.made.host.run(lambda: configure(netlink.delete_route(route, gateway=gateway)))
    assert found.fault == "connection" and "5.5.5.77, on up0, is not there" in failed(found)["connection"][0], found


def test_answers_are_filtered_by_where_they_come_from(explaining: Explaining) -> None:
    made, guest = explaining.made, explaining.machine("ns")
    made.host.run(
        lambda: configure(
            netlink.add_veth(
                netlink.End("up1", "02:aa:00:00:00:03"), netlink.End("net1", "02:aa:00:00:00:04"), made.internet.namespace.fd
            )
        )
    )

    def there() -> None:
        configure(netlink.set_link(socket.if_nametoindex("net1"), "net1", up=True))
        configure(netlink.add_address(socket.if_nametoindex("net1"), netlink.IPv4Interface("6.6.6.1/24"), "net1"))
        for name in ("all", "net1"):
            with open(f"/proc/sys/net/ipv4/conf/{name}/rp_filter", "w") as file:
                file.write("0")

    def here() -> None:
        index = socket.if_nametoindex("up1")
        configure(netlink.set_link(index, "up1", up=True))
        configure(netlink.add_route(IPv4Network("8.8.8.8/32"), index=index))

    made.internet.run(there)
    made.host.run(here)
    for _ in range(10):  # a new link takes a second until it carries
        if guest.ask("8.8.8.8", timeout=2) == "5.5.5.5":
            break
    explaining.on_host("conf/up0/rp_filter", "1")
    found = explaining.why(guest, f"8.8.8.8:{PORT}")
    assert (found.reached, found.fault) == (False, "reverse path"), found
    explaining.on_host("conf/up0/rp_filter", "0")
    assert explaining.why(guest, f"8.8.8.8:{PORT}").reached
    made.host.run(lambda: configure(netlink.delete_link(socket.if_nametoindex("up1"), "up1")))


def test_what_is_ours_is_broken(explaining: Explaining) -> None:
    made, guest = explaining.made, explaining.machine("ns")
    interface, target = guest.slot.plan.interface, f"1.1.1.1:{PORT}"
    with made.host.run(Nftables) as nft:
        nft.apply([f'delete element inet stoker egress {{ "{interface}" }}'])
        found = explaining.why(guest, target)
        assert found.fault == "firewall" and "egress" in failed(found)["firewall"][0], found
        made.firewall.restore()
        nft.apply(["flush chain inet stoker source"])
        found = explaining.why(guest, target)
        assert found.fault == "translation", found
        assert made.firewall.restore() and not made.firewall.restore()
    assert explaining.why(guest, target).reached
    plan = guest.slot.plan
    route = IPv4Network((plan.address, 32))
    made.host.run(lambda: configure(netlink.add_route(route, gateway=ROUTER.ip)))
    found = explaining.why(guest, target)
    assert "way back" in failed(found) and not found.reached, found
    made.host.run(lambda: configure(netlink.delete_route(route, gateway=ROUTER.ip)))
    namespace = guest.slot.namespace
    assert namespace is not None
    namespace.run(lambda: configure(netlink.set_link(socket.if_nametoindex("eth0"), "eth0", up=False)))
    found = explaining.why(guest, target)
    assert found.fault == "interface", found
    made.host.run(lambda: configure(netlink.set_link(socket.if_nametoindex(interface), interface, up=False)))
    found = explaining.why(guest, target)
    assert found.fault == "interface" and "is down" in failed(found)["interface"][0], found


def test_the_host_and_the_neighbours(explaining: Explaining) -> None:
    guest, other = explaining.machine("run"), explaining.machine("run", name="two")
    other.serve("0.0.0.0")
    explaining.made.host.serve("0.0.0.0")
    found = explaining.why(guest, f"{other.slot.plan.address}:{PORT}")
    assert not found.reached and "another machine" in failed(found)["firewall"][0], found
    found = explaining.why(guest, f"5.5.5.5:{PORT}")
    assert found.fault == "policy" and failed(found)["policy"][1] == "stoker network set web --host-access", found
    interface = guest.slot.plan.interface
    explaining.machines[interface] = replace(explaining.machines[interface], host_access=True)
    explaining.made.firewall.put(explaining.machines[interface])
    assert explaining.why(guest, f"5.5.5.5:{PORT}").reached


def test_an_agent_that_is_away_or_hangs(explaining: Explaining, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = explaining.machine("ns")
    away = explaining.why(guest, f"1.1.1.1:{PORT}", None)
    assert (away.reached, away.fault) == (None, None), away
    assert steps(away)["guest route"] == steps(away)["connection"] == "unknown" and steps(away)["uplink"] == "pass"
    udp = explaining.why(guest, f"1.1.1.1:{PORT}", protocol=Protocol.UDP)
    assert udp.reached is None and steps(udp)["policy"] == "pass" and steps(udp)["connection"] == "unknown", udp

    class Hanging(Within):
        async def read(self, path: str) -> str:
            await asyncio.Event().wait()
            return ""

        async def connect(self, address: IPv4Address, port: int, timeout: float) -> Stream:
            await asyncio.Event().wait()
            raise AssertionError

    monkeypatch.setattr("stoker.engine.gathering.SAYING", 0.2)
    monkeypatch.setattr("stoker.engine.gathering.WHOLE", 1.5)
    hanging = explaining.why(guest, f"1.1.1.1:{PORT}", Hanging(guest))
    assert steps(hanging)["connection"] == "unknown" and steps(hanging)["uplink"] == "pass", hanging


def test_denials_are_recorded_and_what_is_learned_allows_it(explaining: Explaining) -> None:
    made = explaining.made

    def begin() -> Denials:
        found = Denials()
        assert made.host.run(lambda: found.open(LOG_GROUP)) == made.host.run(lambda: found.open(LOG_GROUP)) == LOG_GROUP
        found.begin()
        return found

    denials = explaining.loop.call(begin)
    made.stack.callback(lambda: explaining.loop.call(denials.close))
    guest, other = explaining.machine("ns", "allow: 8.8.8.8"), explaining.machine("run", "none", name="two")
    for one, key in ((guest, "a"), (other, "b")):
        explaining.loop.call(partial(denials.watch, key, explaining.machines[one.slot.plan.interface]))
    for _ in range(3):
        assert guest.ask("1.1.1.1", timeout=1) == "No route to host"
    other.ask_udp("10.1.2.3", timeout=1)
    eventually(lambda: [one.times for one in explaining.loop.call(lambda: denials.recent("a"))] == [3])
    (one,) = denials.recent("a")
    assert (one.word, str(one.destination), one.port, one.last >= one.first > 0) == ("tcp", "1.1.1.1", PORT, True)
    eventually(
        lambda: [(d.word, str(d.destination)) for d in explaining.loop.call(lambda: denials.recent("b"))] == [("udp", "10.1.2.3")]
    )
    assert denials.learned("a") is None
    assert not explaining.made.host.run(lambda: Denials().open(LOG_GROUP)), "one reader for a group"

    learning = replace(explaining.machines[guest.slot.plan.interface], egress=replace(parse_egress("allow: 8.8.8.8"), learn=True))
    made.firewall.put(learning)
    explaining.loop.call(partial(denials.watch, "a", learning))
    assert guest.ask("1.1.1.1") == guest.ask("8.8.8.8") == guest.ask_udp("1.1.1.1") == "5.5.5.5"
    assert guest.ask("10.1.2.3", timeout=1) == "No route to host", "private networks stay closed"
    wanted = [f"1.1.1.1:{PORT}/tcp", f"1.1.1.1:{PORT}/udp", f"10.1.2.3:{PORT}/tcp"]

    def rules() -> list[str]:
        learned = denials.learned("a")
        return learned.rules() if learned is not None else []

    eventually(lambda: explaining.loop.call(rules) == wanted)
    explaining.machines[guest.slot.plan.interface] = learning
    assert explaining.why(guest, f"1.1.1.1:{PORT}").reached
    edited = parse_egress(wider(parse_egress("allow: 8.8.8.8"), ", ".join(wanted)))
    made.change(guest, egress=edited)
    assert guest.ask("1.1.1.1") == guest.ask("10.1.2.3") == guest.ask("8.8.8.8") == "5.5.5.5"
    explaining.loop.call(partial(denials.leave, guest.slot.plan.interface))
    guest.ask_udp("192.168.3.4", timeout=0.5)
    other.ask_udp("192.168.3.4", timeout=0.5)
    eventually(lambda: len(explaining.loop.call(lambda: denials.recent("b"))) == 2)
    assert not any(str(one.destination) == "192.168.3.4" for one in denials.recent("a"))
    explaining.loop.call(partial(denials.forget, "a"))
    assert denials.recent("a") == []
