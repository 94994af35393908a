"""The resolver of machines with real questions: through slots of both plans, from a name server on the internet of the world."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import IPv4Address
from typing import Any

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rcode
import pytest
from dns.message import Message

from name_server import Loop, NameServer, reply
from network_world import SERVED6, Guest, World, world
from stoker.errors import Conflict
from stoker.host.nftables import Nftables
from stoker.network.dns_upstream import Server
from stoker.network.egress import ALL, Egress, parse_egress
from stoker.network.learning import Learned
from stoker.network.plan import INSIDE, RunPlan
from stoker.network.resolver import SERVICES, Counts, Limits, Resolver
from stoker.network.rules import TABLE, Machine, names_set

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
KINDS = pytest.mark.parametrize("kind", ["run", "ns"])
CLOSED = ("No route to host", "timeout", "PermissionError", "ConnectionRefusedError")
POLICY = "deny: bad.example.org; allow: *.example.org:8080/tcp, exact.net"


class Names:
    """A world with a name server and a resolver that asks it."""

    def __init__(self, made: World) -> None:
        self.made = made
        self.upstream = made.internet.run(lambda: NameServer("8.8.8.8"))
        made.stack.callback(self.upstream.close)
        self.loop = Loop()
        made.stack.callback(self.loop.close)
        self.resolver: Resolver
        self.open()

    def open(self, **limits: Any) -> None:
        servers = [Server.parse("8.8.8.8")]

        self.close()
        self.resolver = self.made.host.run(lambda: Resolver.open(self.made.firewall, servers, limits=Limits(**limits)))
        self.resolver.upstreams.timeout = 0.5

    def close(self) -> None:
        if hasattr(self, "resolver"):
            self.loop.run(self.resolver.aclose())
            del self.resolver

    def machine(
        self, kind: str, policy: str | Egress = POLICY, name: str = "one", learned: Learned | None = None, *, ipv6: bool = False
    ) -> Guest:
        egress = parse_egress(policy) if isinstance(policy, str) else policy
        guest = self.made.machine(kind, name, egress, host_services=SERVICES, ipv6=ipv6)
        self.serve(guest, egress, learned)
        return guest

    def serve(self, guest: Guest, egress: Egress, learned: Learned | None = None) -> None:
        plan = guest.slot.plan
        machine = Machine(plan.interface, plan.source_mac, plan.address, egress, host_services=SERVICES, ipv6=guest.ipv6)
        self.loop.run(self.resolver.put(machine, plan.host, learned))

    def edit(self, guest: Guest, policy: str) -> None:
        """As the engine does it."""
        plan, egress = guest.slot.plan, parse_egress(policy)
        machine = Machine(plan.interface, plan.source_mac, plan.address, egress, host_services=SERVICES, ipv6=guest.ipv6)
        known = self.loop.call(lambda: self.resolver.known(plan.interface, egress))
        self.made.slots.change(machine, known).result(20)
        self.loop.run(self.resolver.put(machine, plan.host))

    def counts(self, guest: Guest) -> Counts:
        return self.loop.call(lambda: self.resolver.counts()[guest.slot.plan.interface])

    def entered(self, policy: str, position: int, version: int = 4) -> dict[str, int]:
        """The addresses in a rule's set, with the seconds they have left."""
        name = names_set(parse_egress(policy).digest, position, version)
        with self.made.host.run(Nftables) as nft:
            rows = nft.query(f"list set {TABLE} {name}")
        found = next(row["set"].get("elem", []) for row in rows if "set" in row)
        return {one["elem"]["val"]: one["elem"]["expires"] for one in found}


@pytest.fixture
def names() -> Iterator[Names]:
    with world() as made:
        one = Names(made)
        yield one
        one.close()


def gateway(guest: Guest) -> str:
    plan = guest.slot.plan
    return str(plan.host if isinstance(plan, RunPlan) else INSIDE.gateway.ip)


def look_up(guest: Guest, name: str, kind: str = "A", *, tcp: bool = False, timeout: float = 5.0, **facts: Any) -> Message:
    question = dns.message.make_query(name, kind, **facts)
    way = dns.query.tcp if tcp else dns.query.udp
    return guest.run(lambda: way(question, gateway(guest), timeout=timeout))


def addresses(answer: Message) -> list[str]:
    return sorted(item.to_text() for one in answer.answer if one.rdtype == 1 for item in one)


def code(answer: Message) -> str:
    return dns.rcode.to_text(answer.rcode())


def eventually(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not look():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.02)


@KINDS
def test_a_server_is_reached_after_its_name_was_looked_up(names: Names, kind: str) -> None:
    names.upstream.zone["www.example.org", "A"] = ["www.example.org 300 A 1.1.1.1", "www.example.org 300 A 8.8.8.8"]
    guest, other = names.machine(kind), names.machine(kind, "allow: other.org", "two")
    assert guest.ask("1.1.1.1", timeout=0.3) in CLOSED
    answer = look_up(guest, "WwW.Example.org")
    assert addresses(answer) == ["1.1.1.1", "8.8.8.8"] and answer.flags & dns.flags.RA
    assert answer.question[0].name.to_text() == "WwW.Example.org."
    assert answer.answer[0].ttl in (299, 300)
    assert guest.ask("1.1.1.1") == guest.ask("8.8.8.8") == "5.5.5.5"
    assert guest.ask_udp("1.1.1.1", timeout=0.2) in CLOSED, "the rule is about TCP"
    assert other.ask("1.1.1.1", timeout=0.3) in CLOSED
    assert set(names.entered(POLICY, 1)) == {"1.1.1.1", "8.8.8.8"} and not names.entered(POLICY, 0)
    assert addresses(look_up(guest, "www.example.org", tcp=True)) == ["1.1.1.1", "8.8.8.8"]
    assert names.upstream.names() == ["www.example.org."], "the second came from the cache"
    assert (names.counts(guest).answered, names.counts(guest).cached) == (2, 1)


@KINDS
def test_whomever_a_machine_asks_it_is_our_resolver_that_answers(names: Names, kind: str) -> None:
    names.upstream.zone["www.example.org", "A"] = ["www.example.org 300 A 1.1.1.1"]
    names.upstream.zone["secret.attacker.net", "A"] = ["secret.attacker.net 300 A 1.1.1.1"]
    guest = names.machine(kind)
    plan, egress = guest.slot.plan, parse_egress(POLICY)
    names.made.change(guest, egress=egress, host_services=SERVICES, resolver=plan.host)

    def asked(name: str, *, tcp: bool) -> Message:
        question = dns.message.make_query(name, "A")
        return guest.run(lambda: (dns.query.tcp if tcp else dns.query.udp)(question, "8.8.8.8", timeout=5))

    for tcp in (False, True):
        assert addresses(asked("www.example.org", tcp=tcp)) == ["1.1.1.1"]
        assert code(asked("secret.attacker.net", tcp=tcp)) == "NXDOMAIN"
    assert names.upstream.names() == ["www.example.org."] and guest.ask("1.1.1.1") == "5.5.5.5"
    names.made.change(guest, egress=ALL)
    assert addresses(asked("secret.attacker.net", tcp=False)) == ["1.1.1.1"], "a policy without names leaves it alone"


@KINDS
def test_what_the_policy_denies_is_asked_of_nobody(names: Names, kind: str) -> None:
    guest = names.machine(kind)
    for name in ("secret-data.attacker.net", "bad.example.org", "xexact.net", "x.exact.net", "com", "1.0.0.10.in-addr.arpa", "."):
        answer = look_up(guest, name, use_edns=0)
        assert (code(answer), answer.answer) == ("NXDOMAIN", []), name
        assert [option.code for option in answer.options if isinstance(option, dns.edns.EDEOption)] == [15]
        assert not answer.authority, "nobody may remember it"
    for name in ("example.org", "org", "net"):
        answer = look_up(guest, name)
        assert (code(answer), answer.answer) == ("NOERROR", []), "there is something below it"
    for kind_ in ("AAAA", "HTTPS", "SVCB"):
        answer = look_up(guest, "www.example.org", kind_)
        assert (code(answer), answer.answer) == ("NOERROR", [])
    for kind_ in ("ANY", "AXFR"):
        assert code(look_up(guest, "www.example.org", kind_, tcp=kind_ == "ANY")) == "REFUSED"
    odd = dns.message.make_query("a\\.example.org", "A"), dns.message.make_query("a\\000b.example.org", "A")
    for question in odd:
        assert code(guest.run(lambda question=question: dns.query.udp(question, gateway(guest), timeout=5))) == "NXDOMAIN"  # type: ignore[misc]
    assert names.upstream.asked == []
    assert names.counts(guest).denied == 12
    answer = look_up(guest, "nothing.example.org")
    assert (code(answer), names.upstream.names()) == ("NXDOMAIN", ["nothing.example.org."])


def test_lifetimes_end(names: Names) -> None:
    names.open(grace=1)
    guest = names.machine("run")
    names.upstream.zone["short.example.org", "A"] = ["short.example.org 1 A 1.1.1.1"]
    names.upstream.zone["long.example.org", "A"] = ["long.example.org 600 A 8.8.8.8"]
    names.upstream.zone["again.example.org", "A"] = ["again.example.org 0 A 8.8.8.8"]
    for name in ("short", "long", "again"):
        look_up(guest, f"{name}.example.org")
    assert guest.ask("1.1.1.1") == guest.ask("8.8.8.8") == "5.5.5.5"
    with guest.connect("1.1.1.1") as connection:
        assert connection.recv(100) == b"5.5.5.5\n"
        eventually(lambda: guest.ask("1.1.1.1", timeout=0.3) in CLOSED)
        connection.sendall(b"still?")
        assert connection.recv(100) == b"still?", "an open connection goes on"
    assert guest.ask("8.8.8.8") == "5.5.5.5", "a shorter lifetime by another name does not end a longer one"
    look_up(guest, "short.example.org")
    assert guest.ask("1.1.1.1") == "5.5.5.5"
    assert names.upstream.names().count("short.example.org.") == 2


def test_bounds_of_lifetimes(names: Names) -> None:
    names.upstream.zone["old.example.org", "A"] = ["old.example.org 2147483647 A 1.1.1.1"]
    guest = names.machine("run")
    assert look_up(guest, "old.example.org").answer[0].ttl == 3600
    assert 3600 < names.entered(POLICY, 1)["1.1.1.1"] <= 3630


@KINDS
def test_aliases(names: Names, kind: str) -> None:
    zone = names.upstream.zone
    chain = ["www.example.org 300 CNAME edge.cdn.net", "edge.cdn.net 20 CNAME pop.cdn.net", "pop.cdn.net 60 A 1.1.1.1"]
    zone["www.example.org", "A"] = [*chain, "unasked.example.org 300 A 9.9.9.9"]
    zone["evil.example.org", "A"] = ["evil.example.org 300 CNAME bad.example.org", "bad.example.org 60 A 8.8.8.8"]
    zone["loop.example.org", "A"] = ["loop.example.org 300 CNAME a.net", "a.net 60 CNAME loop.example.org"]
    guest = names.machine(kind)
    answer = look_up(guest, "www.example.org")
    assert addresses(answer) == ["1.1.1.1"] and len(answer.answer) == 3
    assert {one.ttl for one in answer.answer} <= {19, 20}
    assert set(names.entered(POLICY, 1)) == {"1.1.1.1"}
    assert guest.ask("1.1.1.1") == "5.5.5.5"
    assert code(look_up(guest, "pop.cdn.net")) == "NXDOMAIN", "by itself it is not allowed"
    assert code(look_up(guest, "evil.example.org")) == "NXDOMAIN", "nor by way of another name what is denied"
    assert code(look_up(guest, "loop.example.org")) == "SERVFAIL"
    assert guest.ask("8.8.8.8", timeout=0.3) in CLOSED


def test_a_denied_port_of_a_name(names: Names) -> None:
    policy = "deny: www.example.org:8080; allow: *.example.org"
    names.made.internet.serve("1.1.1.1", 80)
    names.upstream.zone["www.example.org", "A"] = ["www.example.org 300 A 1.1.1.1"]
    names.upstream.zone["alias.example.org", "A"] = ["alias.example.org 300 CNAME www.example.org", "www.example.org 300 A 8.8.8.8"]
    guest = names.machine("run", policy)
    assert addresses(look_up(guest, "www.example.org")) == ["1.1.1.1"]
    assert guest.ask("1.1.1.1", 80) == "5.5.5.5"
    assert guest.ask("1.1.1.1", timeout=0.3) in CLOSED
    assert addresses(look_up(guest, "alias.example.org")) == ["8.8.8.8"]
    assert guest.ask("8.8.8.8", timeout=0.3) in CLOSED, "an alias goes round no rule"


def test_private_addresses_are_taken_out(names: Names) -> None:
    policy = "allow: *.example.org, 10.1.0.0/16"
    names.upstream.zone["mixed.example.org", "A"] = [
        f"mixed.example.org 300 A {address}" for address in ("1.1.1.1", "192.168.3.4", "169.254.169.254", "127.0.0.1", "100.80.0.2")
    ]
    names.upstream.zone["only.example.org", "A"] = ["only.example.org 300 A 192.168.3.4"]
    names.upstream.zone["inner.example.org", "A"] = ["inner.example.org 300 A 10.1.2.3"]
    guest = names.machine("ns", policy)
    assert addresses(look_up(guest, "mixed.example.org")) == ["1.1.1.1"]
    answer = look_up(guest, "only.example.org", use_edns=0)
    assert (code(answer), answer.answer) == ("NOERROR", []) and answer.options
    assert addresses(look_up(guest, "inner.example.org")) == ["10.1.2.3"]
    assert guest.ask("10.1.2.3") == guest.ask("1.1.1.1") == "5.5.5.5"
    assert guest.ask("192.168.3.4", timeout=0.3) in CLOSED
    assert names.counts(guest).rebound == 5


@KINDS
def test_ipv6_addresses_are_for_machines_with_ipv6(kind: str) -> None:
    policy, after = "allow: *.example.org:8080/tcp", "allow: *.example.org:8080/tcp, 9.9.9.9"
    with world(ipv6=True) as made:
        names = Names(made)
        public, private, mapped = SERVED6[0], SERVED6[2], "::ffff:10.1.2.3"
        names.upstream.zone["www.example.org", "AAAA"] = [f"www.example.org 300 AAAA {one}" for one in (public, private, mapped)]
        guest, without = names.machine(kind, policy, ipv6=True), names.machine(kind, policy, "two")
        answer = look_up(without, "www.example.org", "AAAA")
        assert (code(answer), answer.answer, names.upstream.asked) == ("NOERROR", [], [])
        assert guest.ask(public, timeout=0.3) in CLOSED
        answer = look_up(guest, "www.example.org", "AAAA")
        assert [item.to_text() for one in answer.answer for item in one] == [public]
        assert names.counts(guest).rebound == 2 and set(names.entered(policy, 0, 6)) == {public}
        assert guest.ask(public) == "2600:5::5" and guest.ask(private, timeout=0.3) in CLOSED
        # An edit takes along what is known.
        names.edit(guest, after)
        assert set(names.entered(after, 0, 6)) == {public} and guest.ask(public) == "2600:5::5"
        names.close()


def test_long_answers_go_over_tcp(names: Names) -> None:
    """Between us and the upstream, and between a machine and us."""
    lines = [f"many.example.org 300 A 1.1.{number}.1" for number in range(100)]

    def many(question: Message, stream: bool) -> Message:
        if stream:
            return reply(question, *lines)
        made = reply(question)
        made.flags |= dns.flags.TC
        return made

    names.upstream.zone["many.example.org", "A"] = many
    guest = names.machine("run")
    short = look_up(guest, "many.example.org")
    assert short.flags & dns.flags.TC and not short.answer
    assert [stream for _, _, stream in names.upstream.asked] == [False, True]
    assert len(addresses(look_up(guest, "many.example.org", tcp=True))) == 100
    assert len(names.entered(POLICY, 1)) == 100
    names.upstream.zone["some.example.org", "A"] = [f"some.example.org 300 A 1.1.{number}.1" for number in range(40)]
    assert look_up(guest, "some.example.org").flags & dns.flags.TC
    assert len(addresses(look_up(guest, "some.example.org", use_edns=0, payload=4096))) == 40


def test_forged_answers(names: Names) -> None:
    zone = names.upstream.zone

    def forged(question: Message, stream: bool) -> list[bytes]:
        """Another number, another name, another case; then the truth."""
        true, lie = (reply(question, f"www.example.org 300 A {one}").to_wire() for one in ("1.1.1.1", "8.8.8.8"))
        number = bytes([lie[0] ^ 1]) + lie[1:]
        other = reply(dns.message.make_query("else.example.org", "A", id=question.id), "www.example.org 300 A 8.8.8.8").to_wire()
        return [true] if stream else [number, b"\0" * 5, lie[:-3], other, true]

    def wrong_case(question: Message, stream: bool) -> Message:
        lower = dns.message.make_query(question.question[0].name.to_text().lower(), "A", id=question.id)
        return reply(question if stream else lower, f"case.example.org 300 A {'1.1.1.1' if stream else '8.8.8.8'}")

    zone["www.example.org", "A"] = forged
    zone["case.example.org", "A"] = wrong_case
    zone["storm.example.org", "A"] = lambda question, stream: (
        reply(question, "storm.example.org 300 A 1.1.1.1") if stream else [secrets.token_bytes(40)] * 20
    )
    zone["broken.example.org", "A"] = lambda question, _: reply(question, "broken.example.org 300 A 1.1.1.1").to_wire()[:-2]
    zone["mute.example.org", "A"] = lambda *_: None
    zone["sick.example.org", "A"] = lambda question, _: reply(question, rcode=2)
    guest = names.machine("run")
    assert addresses(look_up(guest, "www.example.org")) == ["1.1.1.1"]
    assert addresses(look_up(guest, "case.example.org")) == ["1.1.1.1"]
    assert addresses(look_up(guest, "storm.example.org")) == ["1.1.1.1"]
    for name in ("broken", "mute", "sick"):
        assert code(look_up(guest, f"{name}.example.org")) == "SERVFAIL", name
    assert set(names.entered(POLICY, 1)) == {"1.1.1.1"}
    assert names.counts(guest).failed == 3
    # Cases, ports and numbers are not the same twice.
    for number in range(8):
        look_up(guest, f"abcdefghijklmnop{number}.example.org")
    written = [name[:16] for name, _, _ in names.upstream.asked if name.lower().startswith("abcdefghijklmnop")]
    assert len(set(written)) == 8 and len(set(names.upstream.ports[-8:])) > 4 and len(set(names.upstream.numbers[-8:])) > 4


def test_an_upstream_that_knows_no_edns(names: Names) -> None:
    def old(question: Message, _: bool) -> Message:
        return reply(question, rcode=1) if question.edns >= 0 else reply(question, "old.example.org 300 A 1.1.1.1")

    names.upstream.zone["old.example.org", "A"] = old
    guest = names.machine("run")
    assert addresses(look_up(guest, "old.example.org")) == ["1.1.1.1"]


def test_the_next_upstream(names: Names) -> None:
    names.resolver.upstreams.servers = [Server.parse("5.5.5.1:5300"), Server.parse("9.9.9.9"), Server.parse("8.8.8.8")]
    names.upstream.zone["www.example.org", "A"] = ["www.example.org 300 A 1.1.1.1"]
    guest = names.machine("run")
    assert addresses(look_up(guest, "www.example.org")) == ["1.1.1.1"]


@KINDS
def test_an_edit_keeps_what_it_allows_and_cuts_the_rest(names: Names, kind: str) -> None:
    names.upstream.zone["www.example.org", "A"] = ["www.example.org 300 A 1.1.1.1"]
    names.upstream.zone["exact.net", "A"] = ["exact.net 300 A 8.8.8.8"]
    guest = names.machine(kind)
    look_up(guest, "www.example.org")
    look_up(guest, "exact.net")
    with guest.connect("1.1.1.1") as kept, guest.connect("8.8.8.8") as cut:
        assert kept.recv(100) == cut.recv(100) == b"5.5.5.5\n"
        names.edit(guest, "allow: www.example.org, new.org")
        kept.sendall(b"still?")
        assert kept.recv(100) == b"still?"
        with pytest.raises(OSError):
            cut.sendall(b"?")
            if not cut.recv(100):
                raise ConnectionResetError
    assert guest.ask("1.1.1.1") == "5.5.5.5", "without another question"
    assert guest.ask("8.8.8.8", timeout=0.3) in CLOSED
    assert code(look_up(guest, "exact.net")) == "NXDOMAIN"
    names.edit(guest, "deny: www.example.org; allow: *.example.org")
    assert guest.ask("1.1.1.1", timeout=0.3) in CLOSED


def test_a_flushed_firewall_gets_its_names_back(names: Names) -> None:
    names.upstream.zone["www.example.org", "A"] = ["www.example.org 300 A 1.1.1.1"]
    guest = names.machine("run")
    look_up(guest, "www.example.org")
    with names.made.host.run(Nftables) as nft:
        nft.apply(["flush ruleset"])
    assert names.made.firewall.restore()
    assert guest.ask("1.1.1.1") == "5.5.5.5" and guest.ask("8.8.8.8", timeout=0.3) in CLOSED
    with names.made.host.run(Nftables) as nft:
        nft.apply(["flush ruleset"])
    names.upstream.zone["next.example.org", "A"] = ["next.example.org 300 A 8.8.8.8"]
    answer = look_up(guest, "next.example.org")
    assert code(answer) == "SERVFAIL", "what cannot be entered is not told"
    assert names.made.firewall.restore()
    assert addresses(look_up(guest, "next.example.org")) == ["8.8.8.8"] and guest.ask("8.8.8.8") == "5.5.5.5"


def test_learning(names: Names) -> None:
    names.upstream.zone["www.example.org", "A"] = ["www.example.org 300 A 1.1.1.1"]
    names.upstream.zone["any.where.net", "A"] = ["any.where.net 300 CNAME x.net", "x.net 30 A 8.8.8.8"]
    learned = Learned(clock=lambda: 1.0)
    guest = names.made.machine("run", egress=ALL, host_services=SERVICES)
    policy = parse_egress("allow: www.example.org")
    names.serve(guest, policy, learned)
    assert addresses(look_up(guest, "any.where.net")) == ["8.8.8.8"]
    look_up(guest, "any.where.net")
    look_up(guest, "unused.net")
    learned.connected(IPv4Address("8.8.8.8"), 6, 443)
    learned.connected(IPv4Address("9.9.9.9"), 17, 123)
    assert learned.rules() == ["9.9.9.9:123/udp", "any.where.net:443/tcp", "unused.net"]
    assert learned.names["any.where.net"].times == 2 and "www.example.org" not in learned.names
    parse_egress(f"allow: {', '.join(learned.rules())}")


def send(guest: Guest, packets: list[bytes]) -> None:
    def work() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for packet in packets:
                sock.sendto(packet, (gateway(guest), 53))

    guest.run(work)


def test_malformed_packets_are_dropped(names: Names) -> None:
    guest = names.machine("run")
    good = dns.message.make_query("www.example.org", "A").to_wire()
    answer = reply(dns.message.make_query("www.example.org", "A")).to_wire()
    packets = [b"", b"\0", good[:-1], good + b"x", answer, good[:4] + b"\0\2" + good[6:], good[:12] + b"\xc0\x0c\0\1\0\1"]
    packets += [good[:12] + b"\x3f" + good[13:], good + bytes(600), b"\xff" * 40]
    send(guest, packets)
    eventually(lambda: names.counts(guest).malformed == len(packets))
    assert code(look_up(guest, "no.net")) == "NXDOMAIN"


def test_one_machines_rate_is_bounded(names: Names) -> None:
    names.open(rate=0.5, burst=20)
    guest, other = names.machine("run"), names.machine("run", name="two")
    question = dns.message.make_query("no.net", "A").to_wire()
    send(guest, [question] * 100)
    eventually(lambda: names.counts(guest).limited >= 79)
    assert code(look_up(other, "no.net")) == "NXDOMAIN"
    assert names.counts(guest).denied <= 21


def test_questions_that_wait_are_bounded(names: Names) -> None:
    names.open(pending=4)
    zone = names.upstream.zone
    for number in range(8):
        zone[f"m{number}.example.org", "A"] = lambda *_: None
    guest = names.machine("run")
    send(guest, [dns.message.make_query(f"m{number}.example.org", "A").to_wire() for number in range(8)])
    eventually(lambda: names.counts(guest).limited == 4)
    eventually(lambda: names.counts(guest).failed == 4)
    assert len(set(names.upstream.names())) == 4
    # The same question of many is asked once.
    names.upstream.asked.clear()
    send(guest, [dns.message.make_query("m1.example.org", "A").to_wire()] * 3)
    eventually(lambda: names.counts(guest).failed == 7)
    assert len(names.upstream.asked) == 2, "once in each round"


def test_what_one_machine_may_fill_is_bounded(names: Names) -> None:
    names.open(held=30)
    for number in range(4):
        lines = [f"m{number}.example.org 300 A 1.2.{number}.{low}" for low in range(10)]
        names.upstream.zone[f"m{number}.example.org", "A"] = lines
    guest = names.machine("run")
    assert [code(look_up(guest, f"m{number}.example.org")) for number in range(4)] == ["NOERROR"] * 3 + ["SERVFAIL"]
    assert len(names.entered(POLICY, 1)) == 30


def test_connections_are_bounded(names: Names) -> None:
    guest = names.machine("run")
    question = dns.message.make_query("no.net", "A").to_wire()

    def work() -> tuple[int, bytes]:
        opened = [socket.create_connection((gateway(guest), 53), 5) for _ in range(12)]
        closed = 0
        for one in opened[8:]:
            try:
                closed += one.recv(1) == b""
            except ConnectionResetError:
                closed += 1
        opened[0].sendall(struct.pack("!H", len(question)) + question)
        data = opened[0].recv(1000)
        opened[1].sendall(b"\xff\xff")
        try:
            assert opened[1].recv(1) == b"", "too long"
        except ConnectionResetError:
            pass
        for one in opened:
            one.close()
        return closed, data

    closed, data = guest.run(work)
    assert closed == 4 and code(dns.message.from_wire(data[2:])) == "NXDOMAIN"
    eventually(lambda: code(look_up(guest, "no.net", tcp=True)) == "NXDOMAIN")


def test_another_resolver_on_the_port(names: Names) -> None:
    guest = names.made.machine("run", egress=parse_egress(POLICY), host_services=SERVICES)
    other = names.made.host.serve(str(guest.slot.plan.host), 53)
    with pytest.raises(Conflict) as caught:
        names.serve(guest, parse_egress(POLICY))
    assert caught.value.code == "resolver_port_taken"
    assert other.heard == []
    assert names.loop.call(names.resolver.counts) == {}


def test_edits_and_removals_under_load(names: Names) -> None:
    """Broken and good questions all the while: the loop has nothing to complain of, and nothing waits for ever."""
    names.open(rate=1e6, burst=1e6)
    problems: list[object] = []
    names.loop.call(lambda: asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem)))
    for number in range(10):
        lines = [f"m{number}.example.org {number % 3} A 2.2.2.{number}"]
        names.upstream.zone[f"m{number}.example.org", "A"] = lines if number % 5 else lambda *_: None
    guests = [names.machine("run"), names.machine("ns", name="two")]
    deadline = time.monotonic() + 1.5

    def flood(guest: Guest) -> None:
        chance = random.Random(1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while time.monotonic() < deadline:
                kind = chance.choice(["A", "AAAA", "TXT", "ANY"])
                packet = bytearray(dns.message.make_query(f"m{chance.randrange(14)}.example.org", kind).to_wire())
                if chance.random() < 0.5:
                    packet[chance.randrange(len(packet))] = chance.randrange(256)
                with suppress(OSError):
                    sock.sendto(packet, (gateway(guest), 53))
                if chance.random() < 0.1:
                    with suppress(OSError), socket.create_connection((gateway(guest), 53), 0.2) as connection:
                        connection.send(bytes(packet))

    with ThreadPoolExecutor(2) as pool:
        floods = [pool.submit(guest.run, lambda guest=guest: flood(guest)) for guest in guests]  # type: ignore[misc]
        for policy in itertools.cycle([POLICY, "allow: *.example.org", "deny: m3.example.org", "allow: public:443"]):
            if time.monotonic() > deadline:
                break
            for guest in guests:
                names.edit(guest, policy)
                names.loop.run(names.resolver.remove(guest.slot.plan.interface))
                names.serve(guest, parse_egress(policy))
        for one in floods:
            one.result()
    for guest in guests:
        names.edit(guest, POLICY)
        assert code(look_up(guest, "no.net")) == "NXDOMAIN"
        assert addresses(look_up(guest, "m1.example.org")) == ["2.2.2.1"]
    assert problems == []


def test_removed_and_served_again(names: Names) -> None:
    guest = names.machine("run")
    assert code(look_up(guest, "no.net")) == "NXDOMAIN"
    interface = guest.slot.plan.interface
    for _ in range(2):
        names.loop.run(names.resolver.remove(interface))
    with pytest.raises((dns.exception.Timeout, OSError)):
        look_up(guest, "no.net", timeout=0.3)
    names.serve(guest, parse_egress(POLICY))
    assert code(look_up(guest, "no.net")) == "NXDOMAIN"
