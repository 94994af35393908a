"""Why a machine reaches a port, judged from facts by value; what is a target; what the log of denials becomes."""

from __future__ import annotations

import errno
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.api.network import Verdict
from stoker.engine.gathering import _hosts, _resolvers
from stoker.errors import InvalidRequest
from stoker.host.conntrack import Connection
from stoker.host.netlink import Way
from stoker.host.nflog import Logged
from stoker.network.denials import MOST, Denials
from stoker.network.egress import ALL, NONE, Protocol, parse_egress
from stoker.network.explain import Step, judge, wider
from stoker.network.facts import (
    Dropping,
    Facts,
    Guest,
    GuestRoute,
    Host,
    Looked,
    Outcome,
    Probe,
    parse_routes,
    parse_target,
)
from stoker.network.firewall import Counters
from stoker.network.host import Chain
from stoker.network.rules import LEARNED_PREFIX, Machine

OWN, THERE, OUTSIDE = IPv4Address("100.80.0.1"), IPv4Address("9.9.9.9"), IPv4Address("5.5.5.5")
GATEWAY = IPv4Address("169.254.0.22")
MACHINE = Machine("stk64500000", "02:fd:64:50:00:01", OWN, ALL)
WAY = Way(False, 2, IPv4Address("5.5.5.1"), None)
HOST = Host("", (), frozenset(), False, True, WAY, "up0", False, MACHINE.interface, Way(True, 1, None, None))
TRACKED = Connection(OWN, THERE, 6, 443, THERE, b"", OUTSIDE, True)
SENT = Counters(3, 180, 0, 0)
WORKS = Probe(Outcome.CONNECTED, SENT, TRACKED)
SILENT = Probe(Outcome.SILENT, SENT, replace(TRACKED, answered=False))
LOST = Probe(Outcome.SILENT, SENT, None)
GUEST = Guest((GuestRoute(IPv4Network("0.0.0.0/0"), GATEWAY, "eth0"),), (IPv4Address("1.1.1.1"),), {})
GOOD = Facts(
    "web",
    parse_target("example.org:443"),
    MACHINE,
    GATEWAY,
    GUEST,
    Looked("guest", "1.1.1.1", False, 0, (THERE,)),
    THERE,
    HOST,
    WORKS,
)
DROPS = (Dropping(Chain("ip", "filter", "FORWARD", "forward"), True),)
CHECK = "stoker network check --fix"


def wrong(facts: Facts) -> list[Step]:
    return [step for step in judge(facts) if step.verdict is Verdict.FAIL]


def with_host(probe: Probe | None = LOST, **changes: Any) -> Facts:
    return replace(GOOD, host=replace(HOST, **changes), probe=probe)


def with_policy(text: str, probe: Probe | None = None, **changes: Any) -> Facts:
    return replace(GOOD, machine=replace(MACHINE, egress=parse_egress(text)), probe=probe, **changes)


DENIED = Probe(Outcome.UNREACHABLE, Counters(1, 60, 1, 0), None, "No route to host", rejected=1)
TARGET = replace(GOOD, target=parse_target("9.9.9.9:443"), looked=None)
FAULTS: dict[str, tuple[Facts, str, str, str]] = {
    "no default route": (
        replace(
            GOOD, guest=replace(GUEST, routes=()), probe=Probe(Outcome.UNREACHABLE, Counters(), None, "Network is unreachable")
        ),
        "guest route",
        "no route to 9.9.9.9",
        "stoker exec web -- ip route add default via 169.254.0.22 dev eth0",
    ),
    "another gateway": (
        replace(GOOD, guest=replace(GUEST, routes=(GuestRoute(IPv4Network("9.0.0.0/8"), OUTSIDE, "eth0"),)), probe=LOST),
        "guest route",
        "its gateway is 169.254.0.22",
        "stoker exec web -- ip route replace 9.0.0.0/8 via 169.254.0.22 dev eth0",
    ),
    "no resolver": (
        replace(GOOD, guest=replace(GUEST, nameservers=()), looked=None, address=None, host=None, probe=None),
        "guest resolver",
        "names no resolver",
        "stoker exec web -- sh -c 'echo nameserver 1.1.1.1 >/etc/resolv.conf'",
    ),
    "no such name": (
        replace(GOOD, looked=Looked("guest", "1.1.1.1", False, 3), address=None, host=None, probe=None),
        "name",
        "there is no such name",
        "",
    ),
    "a silent resolver": (
        replace(GOOD, looked=Looked("guest", "1.1.1.1", problem="nothing"), address=None, host=None, probe=None),
        "name",
        "1.1.1.1 did not answer: nothing",
        "",
    ),
    "a closed resolver": (
        with_policy("none", looked=Looked("guest", "1.1.1.1", problem="nothing"), address=None, host=None),
        "name",
        "did not answer",
        "stoker network set web --egress 'allow: 1.1.1.1:53'",
    ),
    "a name that the policy denies": (
        with_policy("allow: a.net", looked=Looked("guest", "1.1.1.1", True, 3), address=None, host=None),
        "name",
        "no rule of the policy allows it",
        "stoker network set web --egress 'allow: example.org:443/tcp, a.net'",
    ),
    "a name that a rule denies": (
        with_policy("deny: *.org; allow: a.net", looked=Looked("guest", "1.1.1.1", True, 3), address=None, host=None),
        "name",
        "rule 1 of the policy, `deny: *.org`",
        "stoker network set web --egress 'allow: example.org:443/tcp; deny: *.org; allow: a.net'",
    ),
    "an address that a rule denies": (
        replace(TARGET, machine=replace(MACHINE, egress=parse_egress("deny: 9.9.9.9")), probe=DENIED),
        "policy",
        "rule 1 of the policy, `deny: 9.9.9.9`, denies 9.9.9.9:443/tcp",
        "stoker network set web --egress 'allow: 9.9.9.9:443/tcp; deny: 9.9.9.9; allow: public'",
    ),
    "nothing is allowed": (
        replace(TARGET, machine=replace(MACHINE, egress=NONE), probe=DENIED),
        "policy",
        "no rule allows it",
        "stoker network set web --egress 'allow: 9.9.9.9:443/tcp'",
    ),
    "a name without its address": (with_policy("allow: example.org", DENIED), "policy", "has not answered with this address", ""),
    "the operator's network": (with_host(DENIED, private=True), "policy", "the operator's", ""),
    "the host itself": (
        with_host(DENIED, way=Way(True, 1, None, None)),
        "policy",
        "the host itself",
        "stoker network set web --host-access",
    ),
    "a neighbour": (with_host(DENIED, neighbour=True, out="stk64500002"), "firewall", "another machine", ""),
    "no interface": (
        with_host(None, slot="the interface stk64500000 is not there", way=0),
        "interface",
        "is not there",
        "stoker stop web && stoker start web",
    ),
    "nothing comes out": (
        with_host(Probe(Outcome.SILENT, Counters(), None)),
        "interface",
        "nothing that the machine sent",
        "stoker stop web && stoker start web",
    ),
    "entries are gone": (
        with_host(missing=("inet stoker egress x",)),
        "firewall",
        "`inet stoker egress x`",
        "",
    ),
    "no forwarding": (with_host(forwards=False, way=errno.EHOSTUNREACH), "forwarding", "net.ipv4.ip_forward is 0", CHECK),
    "no forwarding of one": (
        with_host(way=errno.EHOSTUNREACH),
        "forwarding",
        "comes in by stk64500000",
        "sysctl -w net.ipv4.conf.stk64500000.forwarding=1",
    ),
    "strict about the machine": (
        with_host(way=errno.EXDEV),
        "reverse path",
        "comes in by stk64500000",
        "sysctl -w net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.stk64500000.rp_filter=0",
    ),
    "strict about answers": (
        with_host(SILENT, reverse=errno.EXDEV),
        "reverse path",
        "comes in by up0",
        "sysctl -w net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.up0.rp_filter=0",
    ),
    "strict about others": (with_host(replace(SILENT, filtered=2)), "reverse path", "dropped 2 packets", CHECK),
    "too many": (
        replace(
            GOOD,
            machine=replace(MACHINE, connections=8),
            probe=Probe(Outcome.UNREACHABLE, Counters(sent=1, crowded=1), None, "No route to host"),
        ),
        "limits",
        "as it may, 8",
        "stoker network set web --connections 16",
    ),
    "no uplink": (
        with_host(way=errno.ENETUNREACH),
        "uplink",
        "no route to 9.9.9.9",
        "ip route add default via ROUTER dev INTERFACE",
    ),
    "a route that forbids": (with_host(way=errno.EACCES), "uplink", "forbids", "ip route get 9.9.9.9"),
    "another firewall": (with_host(replace(LOST, dropping=DROPS)), "other firewalls", "ip filter FORWARD", CHECK),
    "another firewall's rule": (
        with_host(replace(LOST, outcome=Outcome.REFUSED, rejected=1, dropping=(replace(DROPS[0], rest=False),))),
        "other firewalls",
        "ip filter FORWARD",
        "nft list chain ip filter FORWARD",
    ),
    "another firewall, for answers": (
        with_host(replace(SILENT, tracked=TRACKED, dropping=DROPS)),
        "other firewalls",
        "what came back was dropped",
        CHECK,
    ),
    "no translation": (
        with_host(replace(SILENT, tracked=replace(TRACKED, towards=OWN, answered=False))),
        "translation",
        "the machine's own address",
        "",
    ),
    "another way back": (
        with_host(SILENT, back="up0"),
        "way back",
        "100.80.0.1 by up0, not by stk64500000",
        "ip route get 100.80.0.1; ip rule",
    ),
    "refused on the way back": (with_host(replace(SILENT, counted=replace(SENT, refused=2))), "way back", "refused 2 packets", ""),
    "nobody listens": (
        with_host(Probe(Outcome.REFUSED, SENT, None, "Connection refused")),
        "connection",
        "nobody listens on port 443",
        "",
    ),
    "nobody answers": (with_host(SILENT), "connection", "it left by up0", ""),
    "a dead router": (
        with_host(replace(SILENT, dead_gateway=True)),
        "connection",
        "5.5.5.1, on up0, is not there",
        "ip neigh show dev up0",
    ),
}


def test_what_works_passes() -> None:
    assert {step.verdict for step in judge(GOOD)} == {Verdict.PASS}
    assert [step.name for step in judge(GOOD)] == [
        "guest route",
        "guest resolver",
        "name",
        "policy",
        "interface",
        "firewall",
        "forwarding",
        "reverse path",
        "uplink",
        "other firewalls",
        "translation",
        "way back",
        "connection",
    ]
    strict = with_host(replace(WORKS, filtered=3, dropping=DROPS), reverse=errno.EXDEV)
    assert wrong(strict) == [], "what lets this one through is nothing against it"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_fault_and_its_mend(fault: str) -> None:
    facts, name, says, mend = FAULTS[fault]
    found = wrong(facts)
    assert found and (found[0].name, found[0].mend) == (name, mend), found
    assert says in found[0].says
    for step in judge(facts):
        assert step.says and (step.verdict is not Verdict.PASS or not step.mend)


def test_what_is_not_known_is_not_said_to_be_wrong() -> None:
    nothing = Facts("web", parse_target("example.org:443"), MACHINE, GATEWAY, Guest())
    assert {step.verdict for step in judge(nothing)} == {Verdict.UNKNOWN}
    untried = replace(GOOD, probe=None, target=replace(GOOD.target, protocol=Protocol.UDP))
    assert wrong(untried) == [] and judge(untried)[-1].verdict is Verdict.UNKNOWN
    unseen = with_host(replace(LOST, dropping=()))
    others = next(step for step in judge(unseen) if step.name == "other firewalls")
    assert others.verdict is Verdict.UNKNOWN and "nft list ruleset" in others.mend


def test_learning_and_led_questions() -> None:
    learns = replace(TARGET, machine=replace(MACHINE, egress=replace(parse_egress("deny: 9.9.9.9; allow: 1.0.0.0/8"), learn=True)))
    assert wrong(learns) == []
    inner = replace(learns, target=parse_target("10.0.0.1:443"), address=IPv4Address("10.0.0.1"), probe=DENIED)
    assert wrong(inner)[0].name == "policy"
    asks = replace(
        TARGET, target=parse_target("9.9.9.9:53"), machine=replace(MACHINE, egress=parse_egress("allow: a.net"), resolver=OWN)
    )
    led = replace(asks, probe=replace(WORKS, tracked=replace(TRACKED, answering=OWN, towards=OWN)))
    assert wrong(led) == []


def test_the_rule_that_decides() -> None:
    policy = parse_egress("deny: 9.9.9.9:22; allow: a.net, 9.9.9.0/24")
    assert policy.deciding(THERE, 6, 22, lambda _: True) == 0
    assert policy.deciding(THERE, 6, 80, lambda _: True) == 1
    assert policy.deciding(THERE, 6, 80, lambda _: False) == 2
    assert policy.deciding(IPv4Address("8.8.8.8"), 6, 80, lambda _: False) is None
    learns = replace(policy, learn=True)
    assert learns.digest != policy.digest
    assert (learns.allows(THERE, 6, 22), learns.allows(IPv4Address("10.0.0.1"), 6, 22)) == (True, False)
    assert replace(NONE, learn=True).allows(THERE, 6, 22) and not replace(NONE, learn=True).allows(IPv4Address("10.0.0.1"), 6, 22)


POLICIES = st.sampled_from(
    ["none", "all", "deny: 9.9.9.9", "allow: 10.0.0.0/8", "deny: a.net; allow: b.net, public:1-9/udp", "deny: 0.0.0.0/0"]
)


@given(
    POLICIES,
    st.sampled_from(["9.9.9.9:443/tcp", "10.1.2.3:443/tcp"]),
    st.sampled_from(["9.9.9.9", "10.1.2.3", "8.8.8.8", "10.2.2.2"]),
    st.integers(1, 65535),
)
def test_a_wider_policy_allows_that_and_nothing_else(text: str, rule: str, address: str, port: int) -> None:
    policy = parse_egress(text)
    wide = parse_egress(wider(policy, rule))
    about = f"{address}:{port}/tcp" == rule
    assert wide.allows(IPv4Address(address), 6, port) == (True if about else policy.allows(IPv4Address(address), 6, port))


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "x",
        "x:",
        ":80",
        "x:0",
        "x:65536",
        "x:99999999",
        "x:8a",
        "a b:80",
        "::1:80",
        "127.0.0.1:80",
        "224.0.0.1:80",
        "255.255.255.255:1",
        "0.0.0.0:1",
        "1.2.3.999:80",
        "localhost:80",
        "a.localhost:80",
        "x" * 300 + ":80",
        "-\n:80",
        "1.2.3:80",
    ],
)
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_target(text)
    assert caught.value.code == "bad_target" and caught.value.hint


@given(st.text(max_size=60))
def test_any_target_is_one_or_refused(text: str) -> None:
    try:
        found = parse_target(text)
    except InvalidRequest:
        return
    assert parse_target(f"{found.host}:{found.port}") == found


def test_targets() -> None:
    assert (parse_target(" Example.ORG.:443 ").host, parse_target("bücher.example:1").host) == (
        "example.org",
        "xn--bcher-kva.example",
    )
    assert parse_target("10.1.2.3:5432").literal == IPv4Address("10.1.2.3")
    assert str(parse_target("a:53", Protocol.UDP)) == "a:53/udp"


def test_what_a_guest_says_of_itself() -> None:
    head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
    default, own = (
        "eth0\t00000000\t1600FEA9\t0003\t0\t0\t0\t00000000\t0\t0\t0\n",
        "eth0\t1400FEA9\t00000000\t0001\t0\t0\t0\tFCFFFFFF\t0\t0\t0\n",
    )
    found = parse_routes(head + default + own + "lo\t0000000A\t00000000\t0000\t0\t0\t0\t000000FF\n" + "rubbish\nx\ty\tz\n")
    assert [str(route.network) for route in found] == ["169.254.0.20/30", "0.0.0.0/0"]
    assert found[1].gateway == GATEWAY and found[0].gateway is None
    assert parse_routes("") == () and len(parse_routes(head + default * 10000)) == 512
    assert _resolvers("nameserver ::1\nnameserver 9.9.9.9\n") == (THERE,) and _resolvers("search a\n") == ()
    assert _hosts("9.9.9.9 A.org b # c\n::1 x\n\nrubbish y\n8.8.8.8 b\n") == {"a.org": THERE, "b": THERE}


@given(st.text(), st.binary())
def test_whatever_a_guest_says(text: str, data: bytes) -> None:
    for words in (text, data.decode(errors="replace"), "Iface\n" + text):
        parse_routes(words)
        _resolvers(words)
        _hosts(words)


def test_denials_are_joined_and_bounded() -> None:
    now = [100.0]
    denials = Denials(lambda: now[0])
    denials.watch("one", MACHINE)

    def packet(destination: str = "9.9.9.9", port: int | None = 80, prefix: str = "stoker-denied", **changes: Any) -> None:
        denials.note(replace(Logged(prefix, MACHINE.interface, OWN, IPv4Address(destination), 6, port), **changes))

    packet()
    now[0] = 105.0
    packet()
    packet("8.8.8.8")
    packet(interface="stk1")
    assert [(str(one.destination), one.times, one.first, one.last) for one in denials.recent("one")] == [
        ("8.8.8.8", 1, 105.0, 105.0),
        ("9.9.9.9", 2, 100.0, 105.0),
    ]
    for port in range(MOST):
        packet("7.7.7.7", port)
    assert len(denials.recent("one")) == MOST and {str(one.destination) for one in denials.recent("one")} == {"7.7.7.7"}
    assert denials.learned("one") is None and denials.learning(MACHINE.interface) is None
    denials.watch("one", replace(MACHINE, egress=replace(NONE, learn=True)))
    assert denials.learning(MACHINE.interface) is denials.learned("one")
    for prefix, destination in ((LEARNED_PREFIX, "9.9.9.9"), ("stoker-denied", "10.0.0.1"), (LEARNED_PREFIX, "224.0.0.251")):
        packet(destination, 443, prefix)
    packet("6.6.6.6", 443, source=IPv4Address("1.2.3.4"))
    packet("6.6.6.6", None, protocol=47)
    packet("5.5.5.5", None, protocol=1)
    learned = denials.learned("one")
    assert learned is not None and learned.rules() == ["10.0.0.1:443/tcp", "5.5.5.5/icmp", "9.9.9.9:443/tcp"]
    assert [str(one.destination) for one in denials.recent("one")][:4] == ["5.5.5.5", "6.6.6.6", "6.6.6.6", "10.0.0.1"]
    denials.watch("one", MACHINE)
    packet(prefix=LEARNED_PREFIX, port=22)
    assert "9.9.9.9:22/tcp" not in learned.rules() and denials.learned("one") is learned, "it is kept, and nothing is added"
    denials.leave(MACHINE.interface)
    packet("4.4.4.4")
    assert "4.4.4.4" not in {str(one.destination) for one in denials.recent("one")}
    denials.forget("one")
    assert denials.recent("one") == [] and denials.learned("one") is None
