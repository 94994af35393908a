"""The language of egress policies, and the rules that it becomes."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.errors import InvalidRequest
from stoker.network import rules
from stoker.network.egress import ALL, NONE, Domain, Egress, Protocol, Public, Rule, parse_egress

PORTS = st.one_of(st.none(), st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(lambda pair: (min(pair), max(pair))))
LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
DOMAINS = st.builds(Domain, st.lists(LABELS, min_size=1, max_size=3).map(lambda labels: ".".join([*labels, "org"])), st.booleans())
NETWORKS = st.builds(
    lambda number, prefix: IPv4Network((number, prefix), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 32)
)
NETWORKS6 = st.builds(
    lambda number, prefix: IPv6Network((number, prefix), strict=False), st.integers(0, 2**128 - 1), st.integers(0, 128)
)
RULES = st.builds(
    lambda allow, target, ports, protocol: Rule(allow, target, None if protocol is Protocol.ICMP else ports, protocol),
    st.booleans(),
    st.one_of(NETWORKS, NETWORKS6, DOMAINS, st.just(Public())),
    PORTS,
    st.one_of(st.none(), st.sampled_from(Protocol)),
)
POLICIES = st.lists(RULES, min_size=1, max_size=12).map(
    lambda found: Egress(tuple(found), rest=not any(rule.allow for rule in found))
)


@given(POLICIES)
def test_a_policy_says_itself(policy: Egress) -> None:
    assert parse_egress(str(policy)) == policy


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_an_error(text: str) -> None:
    try:
        policy = parse_egress(text)
    except InvalidRequest as error:
        assert error.code in ("egress_invalid", "egress_too_long") and error.message
    else:
        assert parse_egress(str(policy)) == policy


@given(POLICIES)
def test_what_reaches_nftables_is_one_line_each(policy: Egress) -> None:
    for command in rules.policy(policy):
        assert "\n" not in command and ";" not in command.partition("{")[0]


def test_the_example_of_the_documents() -> None:
    policy = parse_egress("allow: 10.1.0.0/16, *.Example.org:443")
    assert policy.rules == (
        Rule(True, IPv4Network("10.1.0.0/16")),
        Rule(True, Domain("example.org", below=True), (443, 443)),
    )
    assert policy.has_domains and not policy.rest
    assert policy.naming("WWW.example.org.") == (1,) and policy.naming("example.org") == policy.naming("xexample.org") == ()
    assert str(policy) == "allow: 10.1.0.0/16, *.example.org:443"
    assert parse_egress(" NONE ") == NONE and parse_egress("all") == ALL
    assert parse_egress("deny: 8.8.8.8; deny: 9.9.9.9\nallow: public:1-2/udp").rules[2].ports == (1, 2)
    assert parse_egress("deny: 8.8.8.8").rest and not parse_egress("deny: 8.8.8.8; allow: public").rest
    assert parse_egress("allow: bücher.example").rules[0].target == Domain("xn--bcher-kva.example")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("allow:", "empty"),
        ("allow: a.org,, b.org", "empty place"),
        ("10.0.0.0/8", "neither allow"),
        ("allow: 10.0.0.1/8", "beyond its prefix"),
        ("allow: 10.0.0.0/33", "no IPv4 network"),
        ("allow: 10.0.0.300", "no IPv4 network"),
        ("allow: 2001:db8::1", "IPv6"),
        ("allow: [2001:db8::1/32]:80", "beyond its prefix"),
        ("allow: [2001:db8::/129]", "no IPv6 network"),
        ("allow: [fe80::1%eth0]", "no IPv6 network"),
        ("allow: [example.org]:80", "no IPv6 network"),
        ("allow: []", "no IPv6 network"),
        ("allow: [1.1.1.1", "no IPv6 network"),
        ("allow: example.org:0", "no such ports"),
        ("allow: example.org:70000", "no such ports"),
        ("allow: example.org:90-80", "no such ports"),
        ("allow: example.org/sctp", "sctp"),
        ("allow: example.org:1/icmp", "ICMP"),
        ("allow: www.*.org", "first label"),
        ("allow: ex ample.org", "cannot be read"),
        ("allow: -x.org", "neither a network nor a domain"),
        ('allow: a"b.org', "neither a network nor a domain"),
        ("allow: a{b}.org", "neither a network nor a domain"),
        (f"allow: {'a.' * 150}org", "neither a network nor a domain"),
        (f"allow: {', '.join(['1.1.1.1'] * 129)}", "128 rules"),
        ("x" * 20000, "16384"),
    ],
)
def test_errors_say_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse_egress(text)
    assert caught.value.hint or "too_long" in caught.value.code


def test_rules_by_value() -> None:
    policy = parse_egress(
        "deny: 10.1.9.0/24; allow: 10.1.0.0/16:5432/tcp, public:80-443, 0.0.0.0/0/icmp, *.example.org:443, "
        "[2600:1::]/icmp, [fd00:1::/64]:53"
    )
    chain, digest = f"policy-{policy.digest}", policy.digest
    rule = f"add rule inet stoker {chain} "
    held, held6 = f"@held-{digest}-4", f"@held6-{digest}-4"
    use = f"meta l4proto {{ tcp, udp }} th dport 443 update {held} {{ ip saddr . ip daddr }} accept"
    use6 = f"meta l4proto {{ tcp, udp }} th dport 443 update {held6} {{ ip6 saddr . ip6 daddr }} accept"
    assert rules.policy(policy) == [
        f"add chain inet stoker {chain}",
        rule + "ip daddr 10.1.9.0/24 goto denied",
        rule + "ip daddr 10.1.0.0/16 meta l4proto tcp th dport 5432 accept",
        rule + "ip daddr != @private meta l4proto { tcp, udp } th dport 80-443 accept",
        rule + "ip6 daddr != @private6 meta l4proto { tcp, udp } th dport 80-443 accept",
        rule + "ip daddr != @private meta l4proto icmp accept",
        f"add set inet stoker names-{digest}-4 {{ type ipv4_addr; flags timeout; size 65535; }}",
        f"add set inet stoker held-{digest}-4 {{ type ipv4_addr . ipv4_addr; flags dynamic,timeout; timeout 1d; size 65535; }}",
        rule + f"ct state established ip saddr . ip daddr {held} {use}",
        rule + f"ip daddr @names-{digest}-4 ip daddr != @private {use}",
        f"add set inet stoker names6-{digest}-4 {{ type ipv6_addr; flags timeout; size 65535; }}",
        f"add set inet stoker held6-{digest}-4 {{ type ipv6_addr . ipv6_addr; flags dynamic,timeout; timeout 1d; size 65535; }}",
        rule + f"ct state established ip6 saddr . ip6 daddr {held6} {use6}",
        rule + f"ip6 daddr @names6-{digest}-4 ip6 daddr != @private6 {use6}",
        rule + "ip6 daddr 2600:1::/128 ip6 daddr != @private6 meta l4proto 58 accept",
        rule + "ip6 daddr fd00:1::/64 meta l4proto { tcp, udp } th dport 53 accept",
        rule + "goto denied",
    ]
    assert rules.without_policy(chain, {f"names-{digest}-4", f"held6-{digest}-4", "private", "names-other-1"})[1:] == [
        f"delete chain inet stoker {chain}",
        f"delete set inet stoker held6-{digest}-4",
        f"delete set inet stoker names-{digest}-4",
    ]
    assert rules.verdict(NONE) == "goto denied" and rules.verdict(ALL) == "goto public" and rules.verdict(policy) == f"goto {chain}"


def test_what_becomes_of_a_packet() -> None:
    policy = parse_egress(
        "deny: 10.1.9.0/24; allow: 10.1.0.0/16:5432/tcp, public:80-443, 192.168.3.4/icmp, *.example.org:25; deny: public"
    )

    def allowed(address: str, protocol: int, port: int = 0, by: Egress = policy) -> bool | None:
        return by.allows(ip_address(address), protocol, port)

    assert allowed("10.1.2.3", 6, 5432) and not allowed("10.1.2.3", 17, 5432) and not allowed("10.1.2.3", 6, 80)
    assert allowed("10.1.9.3", 6, 5432) is False and allowed("192.168.3.4", 1) and allowed("192.168.3.4", 6, 80) is False
    assert allowed("1.1.1.1", 17, 443) and allowed("1.1.1.1", 6, 444) is False and allowed("1.1.1.1", 47) is False
    assert allowed("1.1.1.1", 6, 25) is None and allowed("10.1.2.3", 6, 25) is False, "a name leads to no private address"
    assert (
        allowed("1.1.1.1", 47, by=ALL)
        and allowed("10.0.0.1", 6, 80, by=ALL) is False
        and allowed("1.1.1.1", 6, 80, by=NONE) is False
    )
    for address in ("::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1", "2001::1", "fe80::1", "fd00::1", "ff02::1"):
        assert allowed(address, 6, 80, by=ALL) is False and allowed(address, 6, 80, by=parse_egress("allow: [::/0]")) is False
    narrow = parse_egress("deny: [2600:9::/32]; allow: [2600::/16]:80, [fd00:1::/64], public/icmp")
    assert allowed("2600:1::1", 6, 80, by=narrow) and allowed("2600:9::1", 6, 80, by=narrow) is False
    assert allowed("fd00:1::9", 50, by=narrow) and allowed("fd00:2::9", 6, 80, by=narrow) is False
    assert allowed("2600:1::1", 58, by=narrow) and allowed("1.1.1.1", 1, by=narrow) and not allowed("1.1.1.1", 58, by=narrow)
    assert allowed("2600:1::1", 6, 80, by=ALL) and allowed("2600:1::1", 6, 80, by=parse_egress("allow: 0.0.0.0/0")) is False
    everything = parse_egress("allow: 0.0.0.0/0")
    assert allowed("1.1.1.1", 50, by=everything) and allowed("169.254.169.254", 6, 80, by=everything) is False
