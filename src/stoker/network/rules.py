"""The firewall as text: one table of a few rules, and what is particular to a machine as elements of its sets and maps. Pure.

A packet passes the same rules with one machine or five hundred: every question about a machine (whose is this interface? may it
send from this address? which policy has it?) is one look-up by the interface's name. A policy that is neither ``none`` nor ``all``
is a chain named after its content, shared by all machines that have it, with one rule for each of its rules in the same order.
(Interval maps with a verdict for each machine, network and port were the other way: they cannot hold overlapping rules in order,
and the kernel copies the whole map for every change.)

::

    prerouting raw      guard: from a machine? then foreign sources (interface, MAC, address), loopback, DHCP answers go, and IPv6
                        of machines that have none; of those that have, what spoofs neighbours and routers
    prerouting nat      published ports to the machine; nat output: the same from the host itself. What a machine of a policy with
                        names asks of any port 53 goes to our resolver
    forward             from a machine: answers pass, another machine needs ``peers``, else its egress policy decides
                        to a machine: answers and published ports pass
    input               from a machine: answers, DHCP, ``host_services`` (a resolver), ``host_access``
    postrouting nat     out of our ranges: masqueraded; from 127.0.0.1 to a machine: too
    postrouting filter  to a machine: its rate (the other direction's is judged by the guard)

Packets that a machine sends are judged one by one, not once for a connection: a policy that changes cuts what it no longer allows.
Denials are counted by machine, logged at a bounded rate, and answered, so that a program in the guest fails at once. Of a machine
that is learned from, public connections that its policy denies are logged, and let through.

A machine's limits are elements too, each with a bucket or a count of its own in it (``limit``, ``ct count``): a look-up finds an
interface only while that is over its limit. Packets over a rate are dropped, not kept waiting: TCP finds the rate by itself, and
nothing that a machine sends or gets waits behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, collapse_addresses
from typing import Final

from stoker.network.egress import DENIED6, Domain, Egress, Network, Protocol, Public, Rule
from stoker.network.plan import INSIDE, ULA, Inside, ula
from stoker.network.user import DENIED

__all__ = [
    "ARP_TABLE",
    "SERVICES",
    "TABLE",
    "Element",
    "Machine",
    "Publication",
    "base",
    "elements",
    "inside",
    "names_set",
    "policy",
    "policy_chain",
    "chained",
    "rates",
    "without_policy",
]

TABLE: Final = "inet stoker"
ARP_TABLE: Final = "arp stoker"
NONE_VERDICT, ALL_VERDICT, LEARN_VERDICT = "goto denied", "goto public", "goto learned"
LOGGED: Final = "{ type ifname; flags dynamic,timeout; timeout 1m; size 65535; }"
LOG_RATE: Final = "limit rate 5/second burst 10 packets"
LEARN_RATE: Final = "limit rate 100/second burst 1000 packets"
DENIED_PREFIX, LEARNED_PREFIX = "stoker-denied", "stoker-learned"
NAMED: Final = ("names", "names6", "held", "held6")
HELD_FOR: Final = "1d"
"""How long a connection to a domain's address may be silent, once the name's own lifetime is over."""
BURST: Final = 128 << 10
"""Bytes that a rate lets through at once besides a second's worth: two packets as large as a TAP hands them over."""
ANSWERS: Final = (
    "ct direction reply ct state established accept",
    "meta l4proto icmp ct state related accept",
    "meta l4proto 58 ct state related accept",
)
SOLICIT: Final = "icmpv6 type nd-neighbor-solicit ip6 hoplimit 255"
"""The only word of neighbour discovery that a machine has a say in: it asks for its gateway. Who it is we know."""
QUIET: Final = "icmpv6 type { nd-router-solicit, mld-listener-report, mld-listener-done, mld2-listener-report } drop"
"""What every guest with IPv6 says by itself, which nobody needs to hear."""
FORGED: Final = "icmpv6 type { nd-neighbor-advert, nd-router-advert, nd-redirect }"
ASKING: Final = "ip6 saddr { ::, fe80::/10 }"
"""Addresses that a guest may ask from besides its own: it has not tried its own yet, or asks whether a neighbour is there still."""

SERVICES: Final = ((Protocol.UDP, 53), (Protocol.TCP, 53))
"""``host_services`` of a machine that has to use our resolver."""

RATES: Final[Mapping[str, str]] = {
    "rate_out": "type ifname; limit rate over 1 bytes/second;",
    "rate_in": "type ifname; limit rate over 1 bytes/second;",
    "over_out": "type ifname; counter;",
    "over_in": "type ifname; counter;",
}
SETS: Final[Mapping[str, str]] = {
    "machines": "type ifname;",
    "sent": "type ifname; counter;",
    "denials": "type ifname; counter;",
    "refusals": "type ifname; counter;",
    "pinned": "type ifname . ether_addr . ipv4_addr;",
    "pinned6": "type ifname . ether_addr . ipv6_addr;",
    "machines6": "type ifname;",
    "asking6": "type ifname . ether_addr;",
    "peers": "type ipv4_addr . ipv4_addr;",
    "peers6": "type ipv6_addr . ipv6_addr;",
    "open": "type ipv4_addr . inet_proto . inet_service;",
    "host_access": "type ifname;",
    "host_services": "type ifname . inet_proto . inet_service;",
    **RATES,
    "connections": "type ifname; ct count over 1;",
    "crowded": "type ifname; counter;",
}
MAPS: Final[Mapping[str, str]] = {
    "egress": "type ifname : verdict;",
    "resolvers": "type ifname : ipv4_addr;",
    "published": "type inet_proto . inet_service : ipv4_addr . inet_service;",
    "published_at": "type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service;",
}
ARP_SETS: Final[Mapping[str, str]] = {"machines": "type ifname;", "pinned": "type ifname . ether_addr . ipv4_addr;"}


@dataclass(frozen=True, slots=True)
class Publication:
    """A port of the host's that leads to one of the machine's. ``host_address`` None: every address of the host."""

    protocol: Protocol
    host_port: int
    guest_port: int
    host_address: IPv4Address | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """What the firewall knows of a machine. ``interface``, ``mac`` and ``address`` as the host sees them (:mod:`.plan`).

    ``peers``: addresses of machines that it may connect to. ``host_services``: protocol and port of what it may reach on the host.
    ``resolver``: who on the host answers its questions for names, whomever it asks (port 53 has to be among ``host_services``).
    ``rate_in``, ``rate_out``: bytes a second to and from it; ``connections``: how many it may have open outwards; 0: any number.
    ``ipv6``: it has the IPv6 address beside its own, and reaches ``peers`` by theirs; set when its slot is made.
    """

    interface: str
    mac: str
    address: IPv4Address
    egress: Egress
    published: tuple[Publication, ...] = ()
    peers: tuple[IPv4Address, ...] = ()
    host_services: tuple[tuple[Protocol, int], ...] = ()
    host_access: bool = False
    resolver: IPv4Address | None = None
    rate_in: int = 0
    rate_out: int = 0
    connections: int = 0
    ipv6: bool = False

    @property
    def address6(self) -> IPv6Address:
        return ula(self.address)


@dataclass(frozen=True, slots=True, order=True)
class Element:
    """An element of a set, or of a map when it has a value. ``table`` is one of ours; ``limit``: a statement of its own."""

    table: str
    name: str
    key: str
    value: str = ""
    limit: str = ""

    def __str__(self) -> str:
        rest = f" {self.limit}" if self.limit else ""
        return f"{self.table} {self.name} {{ {self.key}{rest}{f' : {self.value}' if self.value else ''} }}"

    @property
    def added(self) -> str:
        return f"add element {self}"

    @property
    def deleted(self) -> str:
        return f"delete element {self.table} {self.name} {{ {self.key} }}"


def publication(port: Publication, machine: Machine) -> Element:
    """What leads from a port of the host's to one of a machine's."""
    key, target = f"{port.protocol} . {port.host_port}", f"{machine.address} . {port.guest_port}"
    if port.host_address is None:
        return Element(TABLE, "published", key, target)
    return Element(TABLE, "published_at", f"{port.host_address} . {key}", target)


def elements(machine: Machine) -> frozenset[Element]:
    """Everything that is in the tables because of this machine."""
    one, address = f'"{machine.interface}"', str(machine.address)
    pin = f"{one} . {machine.mac} . {address}"
    found = [Element(TABLE, name, one) for name in ("machines", "sent", "denials", "refusals")]
    found += [Element(TABLE, "pinned", pin), Element(ARP_TABLE, "machines", one), Element(ARP_TABLE, "pinned", pin)]
    found.append(Element(TABLE, "egress", one, verdict(machine.egress)))
    for port in machine.published:
        found.append(publication(port, machine))
        found.append(Element(TABLE, "open", f"{address} . {port.protocol} . {port.guest_port}"))
    found += [Element(TABLE, "peers", f"{address} . {peer}") for peer in machine.peers]
    if machine.ipv6:
        found.append(Element(TABLE, "pinned6", f"{one} . {machine.mac} . {machine.address6}"))
        found.append(Element(TABLE, "machines6", one))
        found.append(Element(TABLE, "asking6", f"{one} . {machine.mac}"))
        found += [Element(TABLE, "peers6", f"{machine.address6} . {ula(peer)}") for peer in machine.peers]
    found += [Element(TABLE, "host_services", f"{one} . {protocol} . {port}") for protocol, port in machine.host_services]
    if machine.host_access:
        found.append(Element(TABLE, "host_access", one))
    if machine.resolver is not None:
        found.append(Element(TABLE, "resolvers", one, str(machine.resolver)))
    return frozenset([*found, *_limits(machine)])


def rate_limit(rate: int, burst: int = BURST) -> str:
    """``rate`` in bytes a second."""
    return f"limit rate over {rate} bytes/second burst {burst} bytes"


def rates(table: str, interface: str, rate_out: int, rate_in: int) -> list[Element]:
    """Elements for the rates of an interface, in bytes a second, and for what is over them."""
    one, found = f'"{interface}"', list[Element]()
    for name, rate, counted in (("rate_out", rate_out, "over_out"), ("rate_in", rate_in, "over_in")):
        if rate:
            found += [Element(table, name, one, limit=rate_limit(rate)), Element(table, counted, one)]
    return found


def _limits(machine: Machine) -> list[Element]:
    one, found = f'"{machine.interface}"', rates(TABLE, machine.interface, machine.rate_out, machine.rate_in)
    if machine.connections:
        found.append(Element(TABLE, "connections", one, limit=f"ct count over {machine.connections}"))
        found.append(Element(TABLE, "crowded", one))
    return found


def policy_chain(egress: Egress) -> str:
    return f"policy-{egress.digest}"


def verdict(egress: Egress) -> str:
    """What the map of policies says for one."""
    if not egress.rules:
        return _rest(egress)
    return f"goto {policy_chain(egress)}"


def _denied(egress: Egress) -> str:
    return LEARN_VERDICT if egress.learn else NONE_VERDICT


def _rest(egress: Egress) -> str:
    return ALL_VERDICT if egress.rest else _denied(egress)


def names_set(digest: str, position: int, version: int = 4) -> str:
    """The set that a resolver fills with the addresses of a rule's domain, those of IPv4 or of IPv6."""
    return f"names{'6' * (version == 6)}-{digest}-{position}"


def held_set(digest: str, position: int, version: int = 4) -> str:
    return f"held{'6' * (version == 6)}-{digest}-{position}"


def _ports(rule: Rule, version: int) -> str:
    if rule.protocol is Protocol.ICMP:
        return f"meta l4proto {'icmp' if version == 4 else 58} "
    if rule.ports:
        first, last = rule.ports
        protocols = str(rule.protocol) if rule.protocol else "{ tcp, udp }"
        return f"meta l4proto {protocols} th dport {first if first == last else f'{first}-{last}'} "
    return f"meta l4proto {rule.protocol} " if rule.protocol else ""


def _statements(egress: Egress, position: int, rule: Rule, version: int) -> list[str]:
    end, ports = "accept" if rule.allow else _denied(egress), _ports(rule, version)
    ip, public = ("ip", "ip daddr != @private ") if version == 4 else ("ip6", "ip6 daddr != @private6 ")
    match rule.target:
        case Public():
            return [f"{public}{ports}{end}"]
        case Domain():
            names = f"{ip} daddr @{names_set(egress.digest, position, version)} {public}{ports}"
            if not rule.allow:
                return [names + end]
            # A connection outlives the answer of the resolver that it was opened by.
            held = f"@{held_set(egress.digest, position, version)}"
            used = f"update {held} {{ {ip} saddr . {ip} daddr }} accept"
            return [f"ct state established {ip} saddr . {ip} daddr {held} {ports}{used}", names + used]
        case network if network.version == version:
            beyond = "" if rule.special else public
            exact = f"{ip} daddr {network} " if network.prefixlen else ""
            return [f"{exact}{beyond}{ports}{end}"]
        case _:
            return []


def policy(egress: Egress) -> list[str]:
    """The commands that make a policy's chain."""
    chain = policy_chain(egress)
    commands = [f"add chain {TABLE} {chain}"]
    for position, rule in enumerate(egress.rules):
        for version in (4, 6):
            if isinstance(rule.target, Domain):
                names, held = names_set(egress.digest, position, version), held_set(egress.digest, position, version)
                kind = f"ipv{version}_addr"
                commands.append(f"add set {TABLE} {names} {{ type {kind}; flags timeout; size 65535; }}")
                if rule.allow:
                    dynamic = f"flags dynamic,timeout; timeout {HELD_FOR}; size 65535;"
                    commands.append(f"add set {TABLE} {held} {{ type {kind} . {kind}; {dynamic} }}")
            commands += [f"add rule {TABLE} {chain} {statement}" for statement in _statements(egress, position, rule, version)]
    commands.append(f"add rule {TABLE} {chain} {_rest(egress)}")
    return commands


def without_policy(chain: str, sets: Iterable[str]) -> list[str]:
    """The commands that remove a policy's chain that nothing leads to any more. ``sets``: the names of the table's sets."""
    digest = chain.removeprefix("policy-")
    own = sorted(name for name in sets if name.startswith(tuple(f"{kind}-{digest}-" for kind in NAMED)))
    return [f"flush chain {TABLE} {chain}", f"delete chain {TABLE} {chain}", *(f"delete set {TABLE} {name}" for name in own)]


def _networks(networks: Iterable[Network], version: int = 4) -> str:
    if version == 4:
        joined = ", ".join(map(str, collapse_addresses(one for one in networks if isinstance(one, IPv4Network))))
    else:
        joined = ", ".join(map(str, collapse_addresses(one for one in networks if isinstance(one, IPv6Network))))
    return f"type ipv{version}_addr; flags interval; elements = {{ {joined} }};"


def chained(name: str, statements: Iterable[str], hook: str = "", table: str = TABLE) -> list[str]:
    head = f"add chain {table} {name}" + (f" {{ type {hook}; policy accept; }}" if hook else "")
    return [head, *(f"add rule {table} {name} {statement}" for statement in statements)]


def logging_to(group: int, when: str = "update @logged", rate: str = LOG_RATE, prefix: str = DENIED_PREFIX) -> list[str]:
    """What logs a denial, or another packet; nothing for group 0."""
    return [f'{when} {{ iifname {rate} }} log group {group} snaplen 128 prefix "{prefix}"'] if group else []


def _guards() -> list[str]:
    """The commands for what every packet of a machine passes first: is it who it says it is?"""
    dhcp = "ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept"
    # Each look-up in a set that counts is counted: in those, an interface is looked up once for a packet.
    pins = [
        "iifname @sent",
        "meta nfproto ipv6 goto from_machine6",
        dhcp,
        "iifname . ether saddr . ip saddr != @pinned goto spoofed",
    ]
    rest = ["ip daddr 127.0.0.0/8 goto spoofed", "udp sport 67 goto spoofed", "iifname @rate_out goto too_fast"]
    commands = chained("too_fast", ["iifname @over_out", "drop"])
    asks = f"{SOLICIT} {ASKING} iifname . ether saddr @asking6 accept"
    pins6 = [asks, "iifname . ether saddr . ip6 saddr != @pinned6 goto spoofed", f"{FORGED} goto spoofed"]
    rest6 = ["ip6 daddr ::1 goto spoofed", "udp sport 547 goto spoofed", "iifname @rate_out goto too_fast"]
    commands += chained("from_machine6", [QUIET, *pins6, *rest6])
    commands += chained("from_machine", [*pins, *rest])
    return commands + chained("guard", ["iifname @machines jump from_machine"], "filter hook prerouting priority raw")


def base(ranges: Iterable[IPv4Network], private: Iterable[Network] = (), log_group: int = 0) -> list[str]:
    """The commands that make both tables, with no machine in them. ``ranges``: where machines' addresses are from; ``private``:
    networks of the operator's that are closed besides :data:`DENIED`; ``log_group``: of NFLOG, 0 for no log."""
    closed: list[Network] = [*(IPv4Network(text) for text in DENIED), *(IPv6Network(text) for text in DENIED6), *private]
    commands = [f"add table {TABLE}", f"add table {ARP_TABLE}"]
    commands += [f"add set {TABLE} {name} {{ {kind} }}" for name, kind in SETS.items()]
    commands += [f"add set {ARP_TABLE} {name} {{ {kind} }}" for name, kind in ARP_SETS.items()]
    commands += [f"add set {TABLE} private {{ {_networks(closed)} }}", f"add set {TABLE} ranges {{ {_networks(ranges)} }}"]
    commands.append(f"add set {TABLE} private6 {{ {_networks(closed, 6)} }}")
    commands += [f"add set {TABLE} {name} {LOGGED}" for name in ("logged", "noted")]
    commands += [f"add map {TABLE} {name} {{ {kind} }}" for name, kind in MAPS.items()]
    log = logging_to(log_group)
    note = logging_to(log_group, "ct state new update @noted", LEARN_RATE, LEARNED_PREFIX)
    count = "iifname @denials"
    refused = "reject with icmpx type admin-prohibited"
    # Whatever the kernel knows of the connection: a program is told of the end of one that was forgotten too.
    cut = "tcp flags & (syn | ack) != syn reject with tcp reset"
    commands += chained("denied", [count, *log, cut, refused])
    commands += chained("spoofed", [count, *log, "drop"])
    commands += chained("refused", ["oifname @refusals", "drop"])
    commands += chained("public", ["ip daddr != @private accept", "ip6 daddr != @private6 accept", "goto denied"])
    commands += chained("learned", ["ip daddr @private goto denied", "ip6 daddr @private6 goto denied", *note, "accept"])
    commands += _guards()
    commands += chained("between", ["ip saddr . ip daddr @peers accept", "ip6 saddr . ip6 daddr @peers6 accept", "goto denied"])
    commands += chained("too_many", ["iifname @crowded", refused])
    many = "ct state new iifname @connections goto too_many"
    commands += chained("out", [*ANSWERS, many, "oifname @machines goto between", "iifname vmap @egress", "goto denied"])
    commands += chained("to_machine", [*ANSWERS, "ct status dnat ip daddr . meta l4proto . th dport @open accept", "goto refused"])
    forward = ["iifname @machines goto out", "oifname @machines goto to_machine"]
    commands += chained("forward", forward, "filter hook forward priority filter")
    services = ["udp dport 67 accept", "iifname . meta l4proto . th dport @host_services accept", "iifname @host_access accept"]
    commands += chained("to_host", [*ANSWERS, f"{SOLICIT} accept", *services, "goto denied"])
    commands += chained("input", ["iifname @machines goto to_host"], "filter hook input priority filter")
    publish = [
        "fib daddr type local dnat ip to ip daddr . meta l4proto . th dport map @published_at",
        "fib daddr type local dnat ip to meta l4proto . th dport map @published",
    ]
    ask = "meta l4proto { tcp, udp } th dport 53 dnat ip to iifname map @resolvers"
    commands += chained("publish", [ask, *publish], "nat hook prerouting priority dstnat")
    commands += chained("publish_here", publish, "nat hook output priority -100")
    source = ["oifname @machines ip saddr 127.0.0.0/8 masquerade", "oifname @machines return", "ip saddr @ranges masquerade"]
    source.append(f"ip6 saddr {ULA} masquerade")
    commands += chained("source", source, "nat hook postrouting priority srcnat")
    commands += chained("too_fast_in", ["oifname @over_in", "drop"])
    # What this host's own kernel says of itself on every interface is not for machines without IPv6.
    silent = "meta nfproto ipv6 oifname @machines oifname != @machines6 drop"
    commands += chained("pace", [silent, "oifname @rate_in goto too_fast_in"], "filter hook postrouting priority filter")
    arp = ["iifname @machines iifname . arp saddr ether . arp saddr ip != @pinned drop"]
    commands += chained("guard", arp, "filter hook input priority filter", ARP_TABLE)
    return commands


def inside(resolver: IPv4Address, plan: Inside = INSIDE, *, ipv6: bool = False) -> list[str]:
    """The commands for the namespace of one machine. What the guest sends leaves with the address of the way out, what comes to
    that goes to the guest; its source is pinned; the namespace itself gives it DHCP and nothing else. What it asks of its gateway's
    port 53 goes to ``resolver``, the host's end of the way out, where ``host_services`` decides."""
    table, tap = TABLE, f'iifname "{plan.tap}"'
    dhcp = f"{tap} ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept"
    mine = f"{tap} ether saddr {plan.guest_mac} ip saddr {plan.guest.ip} ip daddr != 127.0.0.0/8 udp sport != 67 accept"
    # A packet that is not UDP has no such port and fails that match: it is accepted by the next.
    other = f"{tap} ether saddr {plan.guest_mac} ip saddr {plan.guest.ip} ip daddr != 127.0.0.0/8 meta l4proto != udp accept"
    # Every kernel asks for IPv6 routers now and then: no reason to say that somebody forges packets.
    quiet = f"{tap} meta nfproto ipv6 drop"
    commands = [f"add table {table}", f"add table {ARP_TABLE}"]
    here = f"{tap} ether saddr {plan.guest_mac}"
    asks = [f"{here} {SOLICIT} {ASKING} accept", f"{tap} {FORGED} counter drop"]
    mine6 = [
        f"{here} ip6 saddr {plan.guest6.ip} ip6 daddr != ::1 {rest} accept" for rest in ("udp sport != 547", "meta l4proto != udp")
    ]
    guard = [dhcp, mine, other, *([*asks, *mine6, f"{tap} {QUIET}"] if ipv6 else [quiet]), f"{tap} counter drop"]
    commands += chained("guard", guard, "filter hook prerouting priority raw")
    service = f"{tap} udp dport 67 accept"
    commands += chained(
        "input",
        [*(f"{tap} {answer}" for answer in ANSWERS), f"{tap} {SOLICIT} accept", service, f"{tap} drop"],
        "filter hook input priority filter",
    )
    ask = f"{tap} ip daddr {plan.gateway.ip} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {resolver}"
    publish = [f'iifname "{plan.out}" dnat ip to {plan.guest.ip}', ask]
    if ipv6:
        publish.append(f'iifname "{plan.out}" dnat ip6 to {plan.guest6.ip}')
    commands += chained("publish", publish, "nat hook prerouting priority dstnat")
    commands += chained("source", [f'oifname "{plan.out}" masquerade'], "nat hook postrouting priority srcnat")
    arp = f"{tap} arp saddr ether != {plan.guest_mac} drop", f"{tap} arp saddr ip != {plan.guest.ip} drop"
    return commands + chained("guard", arp, "filter hook input priority filter", ARP_TABLE)
