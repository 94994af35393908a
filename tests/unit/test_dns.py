"""DNS messages against another implementation, what policies say of names, and what is remembered of answers."""

from __future__ import annotations

import asyncio
import struct
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stoker.errors import CapacityExhausted
from stoker.host.namespaces import Namespace, own_namespace
from stoker.network import named
from stoker.network.dns_answers import Answer, Answers, answer_of
from stoker.network.dns_upstream import Server, Unanswered, Upstreams, nameservers
from stoker.network.dns_wire import (
    MAX_CHAIN,
    Malformed,
    Query,
    Rcode,
    Record,
    Reply,
    Type,
    ask,
    chain,
    mixed_case,
    name_of,
    parse_query,
    parse_reply,
    render,
    text_of,
)
from stoker.network.egress import Egress, parse_egress
from stoker.network.learning import Learned
from stoker.network.named import Names
from stoker.network.rules import names_set

LABELS = st.text("abxyz019-_", min_size=1, max_size=9)
NAMES = st.lists(LABELS, min_size=1, max_size=5).map(".".join)
DATA = st.one_of(
    st.tuples(st.just("A"), st.ip_addresses(v=4).map(str)),
    st.tuples(st.just("AAAA"), st.ip_addresses(v=6).map(str)),
    st.tuples(st.just("CNAME"), NAMES.map(lambda name: f"{name}.")),
    st.tuples(st.just("NS"), NAMES.map(lambda name: f"{name}.")),
    st.tuples(st.just("MX"), NAMES.map(lambda name: f"10 {name}.")),
    st.tuples(st.just("SRV"), NAMES.map(lambda name: f"1 2 53 {name}.")),
    st.tuples(st.just("SOA"), NAMES.map(lambda name: f"{name}. {name}. 1 2 3 4 77")),
    st.tuples(st.just("TXT"), st.text("abc ;", max_size=20).map(lambda text: f'"{text}"')),
)
RECORDS = st.lists(st.tuples(NAMES, st.integers(0, 2**31 - 1), DATA), max_size=12)


def message(name: str, kind: str, records: list[tuple[str, int, tuple[str, str]]]) -> tuple[dns.message.Message, bytes]:
    """An answer as the other implementation writes it, with its own compression."""
    made = dns.message.make_response(dns.message.make_query(name, kind, use_edns=0))
    for owner, ttl, (type_, data) in records:
        made.answer.append(dns.rrset.from_text(f"{owner}.", ttl, "IN", type_, data))
    return made, made.to_wire(max_size=65535)


@settings(max_examples=50)
@given(NAMES, RECORDS)
def test_answers_are_read_as_another_reads_them(name: str, records: list[tuple[str, int, tuple[str, str]]]) -> None:
    made, wire = message(name, "A", records)
    found = parse_reply(wire, made.id, name_of(name), Type.A)
    expected = [(one.name.to_wire().lower(), int(one.rdtype), one.ttl, item.to_wire()) for one in made.answer for item in one]
    assert [(one.name, one.type, one.ttl, one.data) for one in found.records] == expected
    assert found.exact and not found.truncated


def test_answers_to_something_else() -> None:
    made, wire = message("a.b", "A", [("a.b", 60, ("A", "1.1.1.1"))])
    assert parse_reply(wire, made.id, name_of("A.b"), Type.A).exact is False
    for number, name, kind in ((made.id ^ 1, "a.b", Type.A), (made.id, "a.c", Type.A), (made.id, "a.b", Type.MX)):
        with pytest.raises(Malformed, match="answer"):
            parse_reply(wire, number, name_of(name), kind)
    with pytest.raises(Malformed, match="answer"):
        parse_reply(ask(1, name_of("a.b"), Type.A), 1, name_of("a.b"), Type.A)
    with pytest.raises(Malformed, match="early"):
        parse_reply(wire[:-1], made.id, name_of("a.b"), Type.A)


@settings(max_examples=50)
@given(NAMES, RECORDS, st.booleans())
def test_what_is_written_can_be_read_by_another(name: str, records: list[tuple[str, int, tuple[str, str]]], edns: bool) -> None:
    made, wire = message(name, "A", records)
    found = parse_reply(wire, made.id, name_of(name), Type.A).records
    query = Query(7, name_of(name.upper()), Type.A, 1, True, edns, 65535)
    written = render(query, Rcode.NOERROR, [(one, one.ttl // 2) for one in found], blocked="no")
    read = dns.message.from_wire(written, one_rr_per_rrset=True)
    assert (read.id, read.rcode(), read.edns) == (7, 0, 0 if edns else -1)
    assert read.flags & (dns.flags.QR | dns.flags.RA | dns.flags.RD) == dns.flags.QR | dns.flags.RA | dns.flags.RD
    assert [(one.name.to_wire().lower(), int(one.rdtype), one.ttl, one[0].to_wire()) for one in read.answer] == [
        (one.name, one.type, one.ttl // 2, one.data) for one in found
    ]
    if edns:
        (why,) = read.options
        assert isinstance(why, dns.edns.EDEOption) and (why.code, why.text) == (15, "no")
    assert parse_reply(written, 7, query.name, Type.A).records == tuple(
        Record(one.name, one.type, one.ttl // 2, one.data) for one in found
    )


@settings(max_examples=50)
@given(NAMES, RECORDS, st.data())
def test_broken_answers_raise_one_error(name: str, records: list[tuple[str, int, tuple[str, str]]], data: st.DataObject) -> None:
    made, wire = message(name, "A", records)
    broken = bytearray(wire)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(2, len(broken) - 1))] = data.draw(st.integers(0, 255))
    broken = broken[: data.draw(st.integers(0, len(broken)))]
    with suppress(Malformed):
        reply = parse_reply(bytes(broken), made.id, name_of(name), Type.A)
        chain(name_of(name), Type.A, reply.records)
    with suppress(Malformed):
        parse_query(bytes(broken))


@given(st.binary(max_size=600))
def test_noise_raises_one_error(noise: bytes) -> None:
    for flags in (b"", b"\0\1\1\0\0\1\0\0\0\0\0\0", b"\0\1\1\0\0\1\0\0\0\0\0\1"):
        with suppress(Malformed):
            query = parse_query(flags + noise)
            text_of(query.name)
            dns.message.from_wire(render(query, Rcode.NXDOMAIN))
    with suppress(Malformed):
        parse_reply(b"\0\1\x81\x80\0\1\0\4\0\0\0\0\1a\0\0\1\0\1" + noise, 1, b"\1a\0", 1)


def test_hostile_names_take_no_time() -> None:
    """Pointers to pointers, forwards, to themselves, and names that grow by them."""
    question = b"\0\1\x81\x80\0\1\1\0\0\0\0\0\1a\0\0\1\0\1"
    for pointer in (b"\xc0\x13", b"\xc0\xff", b"\xff\xff", b"\xc0\x00", b"\x40a", b"\x80a"):
        with pytest.raises(Malformed):
            parse_reply(question + pointer + b"\0\1\0\1\0\0\0\1\0\4abcd", 1, b"\1a\0", 1)
    long = b"".join(b"\x3f" + b"a" * 63 for _ in range(3)) + b"\x3e" + b"a" * 62
    with pytest.raises(Malformed, match="too long"):
        parse_reply(question[:12] + long + b"\0" + b"\0\1\0\1", 1, b"\1a\0", 1)
    with pytest.raises(Malformed, match="too many"):
        parse_reply(b"\0\1\x81\x80\0\1\1\1\0\0\0\0", 1, b"\1a\0", 1)


@given(NAMES, st.sampled_from(["A", "AAAA", "TXT"]), st.one_of(st.none(), st.integers(0, 65535)))
def test_questions(name: str, kind: str, payload: int | None) -> None:
    made = dns.message.make_query(name, kind, use_edns=-1 if payload is None else 0, payload=payload or 0)
    query = parse_query(made.to_wire())
    assert (query.id, query.name, query.type, query.recursion) == (made.id, name_of(name), dns.rdatatype.from_text(kind), True)
    assert query.limit == min(1232, max(512, payload or 0)) and query.edns is (payload is not None)
    assert parse_query(made.to_wire(), stream=True).limit == 65535
    read = dns.message.from_wire(ask(9, query.name, query.type))
    assert read.question == made.question and (read.edns, read.payload, read.id) == (0, 1232, 9)


@given(NAMES)
def test_names(name: str) -> None:
    wire = name_of(name)
    assert wire == dns.name.from_text(name).to_wire() and text_of(wire) == name
    assert text_of(wire.upper().lower()) == name
    assert mixed_case(wire).lower() == wire
    assert {mixed_case(name_of("abcdefghijklmnop.example.org")) for _ in range(20)} != {wire}


@pytest.mark.parametrize("labels", [[b"a.example", b"org"], [b"a\0b"], [b"a b"], [b"\xff"], [b"*", b"org"], [b"a\\b"]])
def test_names_that_look_like_others_are_no_hosts(labels: list[bytes]) -> None:
    assert text_of(b"".join(bytes([len(label)]) + label for label in labels) + b"\0") is None


@pytest.mark.parametrize("text", ["a" * 64, ".".join(["a" * 63] * 4), "a..b"])
def test_names_that_are_too_long(text: str) -> None:
    with pytest.raises(Malformed):
        name_of(text)


def alias(name: str, target: str, ttl: int = 60) -> Record:
    return Record(name_of(name), Type.CNAME, ttl, name_of(target))


def address(name: str, text: str, ttl: int = 60) -> Record:
    return Record(name_of(name), Type.A, ttl, IPv4Address(text).packed)


def test_only_what_follows_from_the_question() -> None:
    records = [address("b", "1.1.1.1"), alias("a", "b"), address("c", "2.2.2.2"), alias("b", "c"), address("b", "3.3.3.3")]
    names, kept = chain(name_of("a"), Type.A, records)
    assert [text_of(name) for name in names] == ["a", "b"] and kept == (records[1], records[0], records[4])
    names, kept = chain(name_of("x"), Type.A, records)
    assert (len(names), kept) == (1, ())
    long = [alias(f"n{number}", f"n{number + 1}") for number in range(MAX_CHAIN)]
    assert len(chain(name_of("n1"), Type.A, long)[0]) == MAX_CHAIN
    for endless in ([alias("n0", "n0")], [alias("n0", "n1"), alias("n1", "n0")], long):
        with pytest.raises(Malformed, match="without an end"):
            chain(name_of("n0"), Type.A, endless)


# What policies say of names. The reference is written by labels, from the right.


def below(name: list[str], domain: list[str]) -> bool:
    return len(name) > len(domain) and all(one == other for one, other in zip(reversed(name), reversed(domain), strict=False))


def reference(policy: Egress, name: str) -> bool:
    labels = name.lower().split(".")
    for rule in policy.rules:
        text, _, rest = str(rule).partition(":")
        narrow = bool(rest) or text.endswith(("/tcp", "/udp"))
        text = text.removesuffix("/tcp").removesuffix("/udp")
        if text in ("public", "0.0.0.0/0"):
            hit = True
        elif text.startswith("*."):
            hit = below(labels, text[2:].split("."))
        else:
            hit = labels == text.split(".")
        if hit and (rule.allow or not narrow):
            return rule.allow
    return all(not rule.allow for rule in policy.rules)


SMALL = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=4).map(".".join)
TARGETS = st.one_of(SMALL, SMALL.map(lambda name: f"*.{name}"), st.sampled_from(["public", "10.0.0.0/8", "0.0.0.0/0"]))
RULES = st.tuples(st.sampled_from(["allow", "deny"]), TARGETS, st.sampled_from(["", ":443", ":80-90/tcp", "/udp"]))
POLICIES = st.lists(RULES, min_size=1, max_size=6).map(
    lambda rules: parse_egress("; ".join(f"{verb}: {target}{port}" for verb, target, port in rules))
)


@given(POLICIES, SMALL)
@example(parse_egress("deny: a:443; allow: *.b, a"), "a")
def test_the_first_rule_about_a_name_decides(policy: Egress, name: str) -> None:
    allowed = policy.look_up(name)
    assert allowed == reference(policy, name) == policy.look_up(name.upper() + ".")
    if policy.leads_below(name):
        assert any(rule.allow and (f".{name}" in str(rule)) for rule in policy.rules)
    if policy.denies(name):
        assert not policy.rules[policy.naming(name)[0]].allow


@given(POLICIES, SMALL, SMALL)
def test_what_lies_below_an_allowed_wildcard(policy: Egress, name: str, more: str) -> None:
    wider = Egress((*parse_egress(f"allow: *.{name}").rules, *policy.rules), policy.rest)
    assert wider.look_up(f"{more}.{name}") and wider.leads_below(name)
    closed = Egress((*parse_egress(f"deny: *.{name}").rules, *policy.rules), policy.rest)
    assert not closed.look_up(f"{more}.{name}") and closed.denies(f"{more}.{name}")
    assert closed.look_up(name) == policy.look_up(name), "a wildcard is not about the name itself"


def test_private_networks_are_opened_by_their_own_rules() -> None:
    policy = parse_egress("allow: 10.1.0.0/16, 0.0.0.0/0, *.org, 9.9.9.0/24; deny: 192.168.0.0/16")
    assert policy.opens(IPv4Address("10.1.2.3"))
    assert not any(policy.opens(IPv4Address(text)) for text in ("10.2.0.1", "192.168.0.1", "9.9.9.9", "127.0.0.1"))


# What is remembered.


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(name: str, *texts: str, ttl: int = 60, now: float = 1000.0, longest: int = 3600) -> Answer:
    reply = Reply(Rcode.NOERROR, False, True, tuple(address(name, text, ttl) for text in texts), None)
    return answer_of(name_of(name), Type.A, reply, longest=longest, negative=30, now=now)


def test_the_cache_forgets_in_time_and_by_size() -> None:
    now = Time()
    cache = Answers(3, 1 << 20, now)
    for name in ("a", "b", "c"):
        cache.put(name_of(name), Type.A, made(name, "1.1.1.1"))
    assert cache.get(name_of("a"), Type.A) is not None and cache.get(name_of("a"), Type.AAAA) is None
    cache.put(name_of("d"), Type.A, made("d", "1.1.1.1", ttl=5))
    assert [cache.get(name_of(name), Type.A) is not None for name in "abcd"] == [True, False, True, True], "the least used goes"
    now.now += 5
    assert cache.get(name_of("d"), Type.A) is None and len(cache) == 2
    now.now += 100
    assert cache.get(name_of("a"), Type.A) is None
    cache.put(name_of("e"), Type.A, made("e", "1.1.1.1", ttl=0, now=now.now))
    assert cache.get(name_of("e"), Type.A) is None
    cache.clear()
    assert cache.size == len(cache) == 0
    small = Answers(1000, 10_000, now)
    for number in range(100):
        small.put(name_of(f"n{number}"), Type.A, made(f"n{number}", "1.1.1.1", now=now.now))
        assert small.size <= 10_000
    assert 5 < len(small) < 50
    small.put(name_of("big"), Type.A, made("big", *(f"1.1.1.{number}" for number in range(50)), now=now.now))
    assert small.get(name_of("big"), Type.A) is None


def test_lifetimes_of_answers() -> None:
    assert made("a", "1.1.1.1", ttl=7).left(1000.0) == 7
    assert made("a", "1.1.1.1", ttl=7).left(1000.5) == 7 and made("a", "1.1.1.1", ttl=7).left(2000.0) == 0
    assert made("a", "1.1.1.1", ttl=1 << 30).left(1000.0) == 3600
    for told, expected in ((None, 0), (5, 5), (1 << 30, 30)):
        nothing = Reply(Rcode.NXDOMAIN, False, True, (), told)
        assert answer_of(name_of("a"), Type.A, nothing, longest=3600, negative=30, now=0.0).left(0.0) == expected
    both = Reply(Rcode.NXDOMAIN, False, True, (address("a", "1.1.1.1"),), None)
    sick = Reply(Rcode.SERVFAIL, False, True, (), None)
    for reply in (both, sick):
        with pytest.raises(Malformed):
            answer_of(name_of("a"), Type.A, reply, longest=3600, negative=30, now=0.0)


def test_the_negative_lifetime_is_that_of_the_zone() -> None:
    made_, _ = message("a.b", "A", [])
    made_.set_rcode(3)
    made_.authority.append(dns.rrset.from_text("b.", 900, "IN", "SOA", "ns.b. root.b. 1 2 3 4 77"))
    assert parse_reply(made_.to_wire(), made_.id, name_of("a.b"), Type.A).negative == 77


def test_no_lifetime_is_made_shorter() -> None:
    names, policy = Names(), parse_egress("allow: *.org, a.net")
    one, two = IPv4Address("1.1.1.1"), IPv4Address("2.2.2.2")
    first = names.entering(policy, {0: [(one, 100), (two, 5)]})
    assert len(first.commands) == 6
    assert not names.hold(policy, {0: [(one, 50)]})
    names.enter(first)
    assert names.hold(policy, {0: [(one, 50)]}) and names.hold(policy, {})
    assert not names.hold(policy, {0: [(one, 50), (two, 50)]}) and not names.hold(policy, {1: [(one, 50)]})
    again = names.entering(policy, {0: [(one, 50), (two, 50)], 1: [(one, 1 << 30)]})
    assert [command for command in again.commands if "timeout" in command] == [
        f"add element inet stoker {names_set(policy.digest, 0)} {{ 2.2.2.2 timeout 50s }}",
        f"add element inet stoker {names_set(policy.digest, 1)} {{ 1.1.1.1 timeout 86400s }}",
    ]
    names.enter(again)
    assert len(names.commands()) == 3
    names.keep([names_set(policy.digest, 1)])
    assert len(names.commands()) == 1


def test_sets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "MOST", 10)
    names, policy = Names(), parse_egress("allow: *.org")
    names.enter(names.entering(policy, {0: [(IPv4Address(number), 60) for number in range(10)]}))
    with pytest.raises(CapacityExhausted, match=r"\*\.org"):
        names.entering(policy, {0: [(IPv4Address(99), 60)]})
    names.entering(policy, {0: [(IPv4Address(5), 60)]})


def test_what_is_learned_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.network.learning.MOST_NAMES", 2)
    monkeypatch.setattr("stoker.network.learning.MOST_CONNECTIONS", 2)
    learned = Learned(clock=lambda: 5.0)
    for number in range(4):
        learned.looked_up(f"n{number}.org", [IPv4Address(low) for low in range(100)])
        learned.connected(IPv4Address("9.9.9.9"), 6, number + 1)
    assert learned.lost == 4 and len(learned.names["n0.org"].addresses) == 64
    assert learned.rules() == ["9.9.9.9:1/tcp", "9.9.9.9:2/tcp", "n0.org", "n1.org"]
    assert learned.as_dict()["names"]["n0.org"]["times"] == 1
    learned.connected(IPv4Address("9.9.9.9"), 6, 1)
    learned.connected(IPv4Address("9.9.9.9"), 1, 0)
    assert learned.connections["9.9.9.9", 6, 1].times == 2


# Whom to ask.


def test_resolv_conf(tmp_path: Path) -> None:
    text = "# nameserver 1.1.1.1\nnameserver 10.0.0.1\nsearch a\nnameserver fe80::1%lo x\nnameserver nonsense\nnameserver 9.9.9.9\n"
    found = nameservers(text + "nameserver 8.8.8.8\n")
    assert [str(server.address) for server in found] == ["10.0.0.1", "fe80::1%lo", "9.9.9.9"]
    assert found[1].name == ("fe80::1", 53, 0, 1)
    assert nameservers("") == [Server(IPv4Address("127.0.0.1"))]
    path = tmp_path / "resolv.conf"
    with Namespace(own_namespace()) as home:
        upstreams = Upstreams(home, resolv_conf=path, ours=lambda: {IPv4Address("172.16.0.1")})
        assert [str(server.address) for server in upstreams.current()] == ["127.0.0.1"]
        path.write_text("nameserver 172.16.0.1\nnameserver 1.1.1.1\n")
        assert [str(server.address) for server in upstreams.current()] == ["1.1.1.1"], "never ourselves"
        path.write_text("nameserver 172.16.0.1\n\n")
        assert upstreams.current() == []
        with pytest.raises(Unanswered, match="no resolver"):
            asyncio.run(upstreams.ask(name_of("a"), Type.A))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("1.1.1.1", ("1.1.1.1", 53)),
        ("1.1.1.1:5300", ("1.1.1.1", 5300)),
        ("[::1]:54", ("::1", 54, 0, 0)),
        ("::1", ("::1", 53, 0, 0)),
    ],
)
def test_servers(text: str, name: tuple[object, ...]) -> None:
    assert Server.parse(text).name == name


@pytest.mark.parametrize("text", ["", "x", "1.1.1.1:0", "1.1.1.1:99999", "1.1.1.1:x", "[::1]:"])
def test_servers_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        Server.parse(text)


def test_sizes_of_messages() -> None:
    question = struct.pack("!HHHHHH", 1, 256, 1, 0, 0, 0) + name_of("a.b") + struct.pack("!HH", 1, 1)
    query = parse_query(question)
    records = [(address("a.b", f"1.1.1.{number}"), 60) for number in range(100)]
    short = render(query, Rcode.NOERROR, records)
    assert len(short) <= 512 and short[2] & 2 and struct.unpack_from("!HHHH", short, 4) == (1, 0, 0, 0)
    assert len(render(parse_query(question, stream=True), Rcode.NOERROR, records)) == len(question) + 100 * 16
