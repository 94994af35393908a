"""The firewall as text: one table of a few rules, and what is particular to a machine as elements of its sets and maps. Pure.

A packet passes the same rules with one machine or five hundred: every question about a machine (whose is this interface? may it
send from this address? which policy has it?) is one look-up by the interface's name. A policy that is neither ``none`` nor ``all``
is a chain named after its content, shared by all machines that have it, with one rule for each of its rules in the same order.
(Interval maps with a verdict for each machine, network and port were the other way: they cannot hold overlapping rules in order,
and the kernel copies the whole map for every change.)

::

    prerouting raw      guard: from a machine? then IPv6, foreign sources (interface, MAC, address), loopback, DHCP answers go
    prerouting nat      published ports to the machine; nat output: the same from the host itself. What a machine of a policy with
                        names asks of any port 53 goes to our resolver
    forward             from a machine: answers pass, another machine needs ``peers``, else its egress policy decides
                        to a machine: answers and published ports pass
    input               from a machine: answers, DHCP, ``host_services`` (a resolver), ``host_access``
    postrouting nat     out of our ranges: masqueraded; from 127.0.0.1 to a machine: too

Packets that a machine sends are judged one by one, not once for a connection: a policy that changes cuts what it no longer allows.
Denials are counted by machine, logged at a bounded rate, and answered, so that a program in the guest fails at once. Of a machine
that is learned from, public connections that its policy denies are logged, and let through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, collapse_addresses
from typing import Final

from stoker.network.egress import Domain, Egress, Protocol, Public, Rule
from stoker.network.plan import INSIDE, Inside
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
    "without_policy",
]

TABLE: Final = "inet stoker"
ARP_TABLE: Final = "arp stoker"
NONE_VERDICT, ALL_VERDICT, LEARN_VERDICT = "goto denied", "goto public", "goto learned"
LOG_RATE: Final = "limit rate 5/second burst 10 packets"
LEARN_RATE: Final = "limit rate 100/second burst 1000 packets"
DENIED_PREFIX, LEARNED_PREFIX = "stoker-denied", "stoker-learned"
HELD_FOR: Final = "1d"
"""How long a connection to a domain's address may be silent, once the name's own lifetime is over."""
ANSWERS: Final = ("ct direction reply ct state established accept", "meta l4proto icmp ct state related accept")

SERVICES: Final = ((Protocol.UDP, 53), (Protocol.TCP, 53))
"""``host_services`` of a machine that has to use our resolver."""

SETS: Final[Mapping[str, str]] = {
    "machines": "type ifname;",
    "sent": "type ifname; counter;",
    "denials": "type ifname; counter;",
    "refusals": "type ifname; counter;",
    "pinned": "type ifname . ether_addr . ipv4_addr;",
    "peers": "type ipv4_addr . ipv4_addr;",
    "open": "type ipv4_addr . inet_proto . inet_service;",
    "host_access": "type ifname;",
    "host_services": "type ifname . inet_proto . inet_service;",
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


@dataclass(frozen=True, slots=True, order=True)
class Element:
    """An element of a set, or of a map when it has a value. ``table`` is one of the two."""

    table: str
    name: str
    key: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.table} {self.name} {{ {self.key}{f' : {self.value}' if self.value else ''} }}"

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
    found += [Element(TABLE, "host_services", f"{one} . {protocol} . {port}") for protocol, port in machine.host_services]
    if machine.host_access:
        found.append(Element(TABLE, "host_access", one))
    if machine.resolver is not None:
        found.append(Element(TABLE, "resolvers", one, str(machine.resolver)))
    return frozenset(found)


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


def names_set(digest: str, position: int) -> str:
    """The set that a resolver fills with the addresses of a rule's domain."""
    return f"names-{digest}-{position}"


def held_set(digest: str, position: int) -> str:
    return f"held-{digest}-{position}"


def _ports(rule: Rule) -> str:
    if rule.ports:
        first, last = rule.ports
        protocols = str(rule.protocol) if rule.protocol else "{ tcp, udp }"
        return f"meta l4proto {protocols} th dport {first if first == last else f'{first}-{last}'} "
    return f"meta l4proto {rule.protocol} " if rule.protocol else ""


def _statements(egress: Egress, position: int, rule: Rule) -> list[str]:
    end, ports = "accept" if rule.allow else _denied(egress), _ports(rule)
    match rule.target:
        case Public():
            return [f"ip daddr != @private {ports}{end}"]
        case Domain():
            names = f"ip daddr @{names_set(egress.digest, position)} ip daddr != @private {ports}"
            if not rule.allow:
                return [names + end]
            # A connection outlives the answer of the resolver that it was opened by.
            held = f"@{held_set(egress.digest, position)}"
            used = f"update {held} {{ ip saddr . ip daddr }} accept"
            return [f"ct state established ip saddr . ip daddr {held} {ports}{used}", names + used]
        case network:
            beyond = "" if rule.special else "ip daddr != @private "
            exact = f"ip daddr {network} " if network.prefixlen else ""
            return [f"{exact}{beyond}{ports}{end}"]


def policy(egress: Egress) -> list[str]:
    """The commands that make a policy's chain."""
    chain = policy_chain(egress)
    commands = [f"add chain {TABLE} {chain}"]
    for position, rule in enumerate(egress.rules):
        if isinstance(rule.target, Domain):
            names, held = names_set(egress.digest, position), held_set(egress.digest, position)
            commands.append(f"add set {TABLE} {names} {{ type ipv4_addr; flags timeout; size 65535; }}")
            if rule.allow:
                dynamic = f"flags dynamic,timeout; timeout {HELD_FOR}; size 65535;"
                commands.append(f"add set {TABLE} {held} {{ type ipv4_addr . ipv4_addr; {dynamic} }}")
        commands += [f"add rule {TABLE} {chain} {statement}" for statement in _statements(egress, position, rule)]
    commands.append(f"add rule {TABLE} {chain} {_rest(egress)}")
    return commands


def without_policy(chain: str, sets: Iterable[str]) -> list[str]:
    """The commands that remove a policy's chain that nothing leads to any more. ``sets``: the names of the table's sets."""
    digest = chain.removeprefix("policy-")
    own = sorted(name for name in sets if name.startswith((f"names-{digest}-", f"held-{digest}-")))
    return [f"flush chain {TABLE} {chain}", f"delete chain {TABLE} {chain}", *(f"delete set {TABLE} {name}" for name in own)]


def _networks(networks: Iterable[IPv4Network]) -> str:
    joined = ", ".join(str(network) for network in collapse_addresses(networks))
    return f"type ipv4_addr; flags interval; elements = {{ {joined} }};"


def _chain(name: str, statements: Iterable[str], hook: str = "", table: str = TABLE) -> list[str]:
    head = f"add chain {table} {name}" + (f" {{ type {hook}; policy accept; }}" if hook else "")
    return [head, *(f"add rule {table} {name} {statement}" for statement in statements)]


def base(ranges: Iterable[IPv4Network], private: Iterable[IPv4Network] = (), log_group: int = 0) -> list[str]:
    """The commands that make both tables, with no machine in them. ``ranges``: where machines' addresses are from; ``private``:
    networks of the operator's that are closed besides :data:`DENIED`; ``log_group``: of NFLOG, 0 for no log."""
    closed = [*(IPv4Network(text) for text in DENIED), *private]
    commands = [f"add table {TABLE}", f"add table {ARP_TABLE}"]
    commands += [f"add set {TABLE} {name} {{ {kind} }}" for name, kind in SETS.items()]
    commands += [f"add set {ARP_TABLE} {name} {{ {kind} }}" for name, kind in ARP_SETS.items()]
    commands += [f"add set {TABLE} private {{ {_networks(closed)} }}", f"add set {TABLE} ranges {{ {_networks(ranges)} }}"]
    for name in ("logged", "noted"):
        commands.append(f"add set {TABLE} {name} {{ type ifname; flags dynamic,timeout; timeout 1m; size 65535; }}")
    commands += [f"add map {TABLE} {name} {{ {kind} }}" for name, kind in MAPS.items()]
    to = f"log group {log_group} snaplen 128 prefix"
    log = [f'update @logged {{ iifname {LOG_RATE} }} {to} "{DENIED_PREFIX}"'] if log_group else []
    note = [f'ct state new update @noted {{ iifname {LEARN_RATE} }} {to} "{LEARNED_PREFIX}"'] if log_group else []
    count = "iifname @denials"
    # Whatever the kernel knows of the connection: a program is told of the end of one that was forgotten too.
    cut = "tcp flags & (syn | ack) != syn reject with tcp reset"
    commands += _chain("denied", [count, *log, cut, "reject with icmpx type admin-prohibited"])
    commands += _chain("spoofed", [count, *log, "drop"])
    commands += _chain("refused", ["oifname @refusals", "drop"])
    commands += _chain("public", ["ip daddr != @private accept", "goto denied"])
    commands += _chain("learned", ["ip daddr @private goto denied", *note, "accept"])
    dhcp = "ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept"
    # Each look-up in a set that counts is counted: in those, an interface is looked up once for a packet.
    pins = ["iifname @sent", "meta nfproto ipv6 goto spoofed", dhcp, "iifname . ether saddr . ip saddr != @pinned goto spoofed"]
    commands += _chain("from_machine", [*pins, "ip daddr 127.0.0.0/8 goto spoofed", "udp sport 67 goto spoofed"])
    commands += _chain("guard", ["iifname @machines jump from_machine"], "filter hook prerouting priority raw")
    commands += _chain("between", ["ip saddr . ip daddr @peers accept", "goto denied"])
    commands += _chain("out", [*ANSWERS, "oifname @machines goto between", "iifname vmap @egress", "goto denied"])
    commands += _chain("to_machine", [*ANSWERS, "ct status dnat ip daddr . meta l4proto . th dport @open accept", "goto refused"])
    forward = ["iifname @machines goto out", "oifname @machines goto to_machine"]
    commands += _chain("forward", forward, "filter hook forward priority filter")
    services = ["udp dport 67 accept", "iifname . meta l4proto . th dport @host_services accept", "iifname @host_access accept"]
    commands += _chain("to_host", [*ANSWERS, *services, "goto denied"])
    commands += _chain("input", ["iifname @machines goto to_host"], "filter hook input priority filter")
    publish = [
        "fib daddr type local dnat ip to ip daddr . meta l4proto . th dport map @published_at",
        "fib daddr type local dnat ip to meta l4proto . th dport map @published",
    ]
    ask = "meta l4proto { tcp, udp } th dport 53 dnat ip to iifname map @resolvers"
    commands += _chain("publish", [ask, *publish], "nat hook prerouting priority dstnat")
    commands += _chain("publish_here", publish, "nat hook output priority -100")
    source = ["oifname @machines ip saddr 127.0.0.0/8 masquerade", "oifname @machines return", "ip saddr @ranges masquerade"]
    commands += _chain("source", source, "nat hook postrouting priority srcnat")
    arp = ["iifname @machines iifname . arp saddr ether . arp saddr ip != @pinned drop"]
    commands += _chain("guard", arp, "filter hook input priority filter", ARP_TABLE)
    return commands


def inside(resolver: IPv4Address, plan: Inside = INSIDE) -> list[str]:
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
    commands += _chain("guard", [dhcp, mine, other, quiet, f"{tap} counter drop"], "filter hook prerouting priority raw")
    service = f"{tap} udp dport 67 accept"
    commands += _chain(
        "input", [*(f"{tap} {answer}" for answer in ANSWERS), service, f"{tap} drop"], "filter hook input priority filter"
    )
    ask = f"{tap} ip daddr {plan.gateway.ip} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {resolver}"
    publish = [f'iifname "{plan.out}" dnat ip to {plan.guest.ip}', ask]
    commands += _chain("publish", publish, "nat hook prerouting priority dstnat")
    commands += _chain("source", [f'oifname "{plan.out}" masquerade'], "nat hook postrouting priority srcnat")
    arp = f"{tap} arp saddr ether != {plan.guest_mac} drop", f"{tap} arp saddr ip != {plan.guest.ip} drop"
    return commands + _chain("guard", arp, "filter hook input priority filter", ARP_TABLE)
