"""The language of egress policies: where a machine may connect to.

::

    none                                            nothing
    all                                             every public address, no private one
    allow: 10.1.0.0/16, *.example.org:443           clauses, separated by ";" or a new line; the first rule that matches decides
    deny: 10.1.9.0/24; allow: 10.1.0.0/16:5432/tcp, public:80-443/tcp, 192.0.2.7/icmp

A rule is ``TARGET[:PORT[-PORT]][/tcp|/udp|/icmp]``. A target is an IPv4 address or network, an IPv6 one in brackets
(``[2001:db8::/32]:443``), a domain (``example.org``), everything below a domain (``*.example.org``, not the domain itself) or
``public``. A port without a protocol is of both TCP and UDP; without
either it is every protocol. What no rule matches is denied, except after a list of nothing but ``deny``: the rest is public then.

A private or special network (:data:`stoker.network.user.DENIED`, :data:`DENIED6`) is open only to a rule whose own network lies
inside it: neither ``allow: 0.0.0.0/0`` nor a domain whose name server answers 10.0.0.1 leads there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, NetmaskValueError
from typing import Final

from stoker.errors import InvalidRequest
from stoker.network.user import DENIED

__all__ = ["ALL", "NONE", "Address", "Domain", "Egress", "Network", "Protocol", "Public", "Rule", "is_special", "parse_egress"]

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_TEXT: Final = 16384
MAX_RULES: Final = 128
DENIED6: Final = (
    "::/3",  # unspecified, loopback, and what has an IPv4 address in it: mapped, NAT64
    "2001::/23",  # special purposes, Teredo among them
    "2001:db8::/32",
    "2002::/16",  # 6to4: IPv4 addresses, private ones too
    "3fff::/20",
    "4000::/2",  # not given to anybody
    "8000::/1",  # nor this, with unique local, link-local and multicast addresses at its end
)
"""What is not public of IPv6 (IANA's registries): global addresses are all from 2000::/3."""
SPECIAL: Final = tuple(IPv4Network(text) for text in DENIED)
SPECIAL6: Final = tuple(IPv6Network(text) for text in DENIED6)
_CLAUSE: Final = re.compile(r"\s*(allow|deny)\s*:\s*(.*)", re.IGNORECASE | re.DOTALL)
_LABEL: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_RULE: Final = re.compile(
    r"(?P<target>\[[^\s\]]*\]|[^\s:]+?)(?::(?P<first>\d{1,5})(?:-(?P<last>\d{1,5}))?)?(?:/(?P<protocol>[A-Za-z]+))?"
)
HINT: Final = "for example: none, all, or 'allow: 10.1.0.0/16, *.example.org:443; deny: public'"


class Protocol(StrEnum):
    TCP = "tcp"
    UDP = "udp"
    ICMP = "icmp"


NUMBERS: Final = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.ICMP: 1}
ICMP6: Final = 58


def _special(version: int) -> tuple[IPv4Network, ...] | tuple[IPv6Network, ...]:
    return SPECIAL if version == 4 else SPECIAL6


def is_special(address: Address) -> bool:
    """Whether it is private, or of no host on the internet."""
    return any(address in network for network in _special(address.version))


@dataclass(frozen=True, slots=True)
class Public:
    """Every address that is neither private nor special."""

    def __str__(self) -> str:
        return "public"


@dataclass(frozen=True, slots=True)
class Domain:
    """A name (lower case, no final dot), or with ``below`` every name below it."""

    name: str
    below: bool = False

    def __str__(self) -> str:
        return f"*.{self.name}" if self.below else self.name

    def matches(self, name: str) -> bool:
        name = name.lower().rstrip(".")
        return name.endswith(f".{self.name}") if self.below else name == self.name


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``ports`` are first and last, both included; ``protocol`` None with ports: TCP and UDP."""

    allow: bool
    target: Network | Public | Domain
    ports: tuple[int, int] | None = None
    protocol: Protocol | None = None

    def __str__(self) -> str:
        target = self.target
        whole = isinstance(target, Network) and target.prefixlen == target.max_prefixlen
        text = str(target.network_address) if isinstance(target, Network) and whole else str(target)
        text = f"[{text}]" if isinstance(target, IPv6Network) else text
        if self.ports:
            text += f":{self.ports[0]}" if self.ports[0] == self.ports[1] else f":{self.ports[0]}-{self.ports[1]}"
        return f"{text}/{self.protocol}" if self.protocol else text

    def covers(self, address: Address, protocol: int, port: int) -> bool | None:
        """Whether it is about such packets (``protocol`` by its number); None: that is for a resolver to say."""
        if protocol == ICMP6 and address.version == 6:
            protocol = NUMBERS[Protocol.ICMP]
        if self.ports and not (protocol in NUMBERS.values() and self.ports[0] <= port <= self.ports[1]):
            return False
        if self.protocol and protocol != NUMBERS[self.protocol]:
            return False
        if self.ports and protocol == NUMBERS[Protocol.ICMP]:
            return False
        if not self.special and is_special(address):
            return False
        match self.target:
            case Public():
                return True
            case Domain():
                return None
            case network:
                return address in network

    @property
    def whole(self) -> bool:
        """Whether it is about every port and protocol."""
        return self.ports is None and self.protocol is None

    @property
    def special(self) -> bool:
        """Whether its network lies inside a private or special one, which it then opens."""
        target = self.target
        return isinstance(target, Network) and any(target.subnet_of(network) for network in _special(target.version))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Egress:
    """A policy: its rules in order, and what becomes of the rest (``rest``: public addresses are allowed).

    ``learn``: what it denies of the public is let through and recorded instead; private and special networks stay as they are.
    """

    rules: tuple[Rule, ...] = ()
    rest: bool = False
    learn: bool = False

    def __str__(self) -> str:
        if not self.rules:
            return "all" if self.rest else "none"
        clauses: list[tuple[bool, list[str]]] = []
        for rule in self.rules:
            if not clauses or clauses[-1][0] is not rule.allow:
                clauses.append((rule.allow, []))
            clauses[-1][1].append(str(rule))
        return "; ".join(f"{'allow' if allow else 'deny'}: {', '.join(rules)}" for allow, rules in clauses)

    def allows(self, address: Address, protocol: int, port: int) -> bool | None:
        """What becomes of such packets; None: that is for a resolver to say."""
        for rule in self.rules:
            match rule.covers(address, protocol, port):
                case None:
                    return None
                case True if rule.allow or not self.learn:
                    return rule.allow
                case True:
                    break
        return (self.rest or self.learn) and not is_special(address)

    def deciding(self, address: Address, protocol: int, port: int, named: Callable[[int], bool]) -> int | None:
        """The position of the rule that decides about such packets; None: what becomes of the rest does. ``named``: whether the
        address is one of the names' of the rule at a position, which only a resolver knows."""
        for position, rule in enumerate(self.rules):
            match rule.covers(address, protocol, port):
                case True:
                    return position
                case None if named(position):
                    return position
        return None

    @property
    def digest(self) -> str:
        """A short name: the same for the same policy, whoever has it."""
        return hashlib.sha256(f"{'learn: ' * self.learn}{self}".encode()).hexdigest()[:16]

    @property
    def has_domains(self) -> bool:
        """Whether the machine has to use our resolver, and no other."""
        return any(isinstance(rule.target, Domain) for rule in self.rules)

    def look_up(self, name: str) -> bool:
        """Whether the machine may ask for the addresses of a name. A rule for some ports only allows that, and denies nothing;
        a rule for a network says nothing about names, unless that is every network."""
        position = self.looking_up(name)
        return self.rest if position is None else self.rules[position].allow

    def looking_up(self, name: str) -> int | None:
        """The position of the rule that decides that; None: what becomes of the rest does."""
        for position, rule in enumerate(self.rules):
            match rule.target:
                case Domain():
                    about = rule.target.matches(name)
                case Public():
                    about = True
                case network:
                    about = network.prefixlen == 0
            if about and (rule.allow or rule.whole):
                return position
        return None

    def denies(self, name: str) -> bool:
        """Whether a rule for names denies this one altogether, by whatever other name one gets to it."""
        first = next(iter(self.naming(name)), None)
        return first is not None and not self.rules[first].allow and self.rules[first].whole

    def leads_below(self, name: str) -> bool:
        """Whether a name that is allowed lies below this one, so that this one has to exist."""
        names = (rule.target for rule in self.rules if rule.allow and isinstance(rule.target, Domain))
        return any(one.name.endswith(f".{name}") or (one.below and one.name == name) for one in names)

    def opens(self, address: Address) -> bool:
        """Whether a rule of its own leads to an address of a private or special network."""
        return any(rule.allow and rule.special and address in rule.target for rule in self.rules)  # type: ignore[operator]

    def naming(self, name: str) -> tuple[int, ...]:
        """The positions of the rules that are about this name."""
        return tuple(n for n, rule in enumerate(self.rules) if isinstance(rule.target, Domain) and rule.target.matches(name))


NONE: Final = Egress()
ALL: Final = Egress(rest=True)


def _refused(text: str, why: str, hint: str = HINT) -> InvalidRequest:
    return InvalidRequest("egress_invalid", f"the egress rule “{text[:100]}” {why}", hint)


def _domain(text: str, whole: str) -> Domain:
    name = text.lower().rstrip(".")
    below = name.startswith("*.")
    name = name[2:] if below else name
    if "*" in name:
        raise _refused(whole, "has a * that is not its first label", "*.example.org is everything below example.org")
    if not name.isascii():
        try:
            name = name.encode("idna").decode()
        except UnicodeError:
            raise _refused(whole, "names no domain that can be looked up") from None
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise _refused(whole, "names neither a network nor a domain")
    if name.rpartition(".")[2].isdigit():
        raise _refused(whole, "looks like an address, and is none", "an IPv4 address has four numbers from 0 to 255")
    if name in ("allow", "deny", "none", "all", "any"):
        raise _refused(whole, "is a word of the language, and no domain", HINT)
    return Domain(name, below)


def _network6(text: str, whole: str) -> IPv6Network:
    if re.fullmatch(r"[0-9A-Fa-f:./]+", text):
        try:
            return IPv6Network(text)
        except (AddressValueError, NetmaskValueError):
            pass
        except ValueError:  # host bits
            wanted = IPv6Network(text, strict=False)
            raise _refused(whole, "has bits set beyond its prefix", f"[{wanted}], or [{text.partition('/')[0]}]") from None
    raise _refused(whole, "names no IPv6 network", "a network is like [2001:db8::/32]")


def _target(text: str, whole: str) -> Network | Public | Domain:
    if text.lower() == "public":
        return Public()
    if text.startswith("["):
        return _network6(text[1:-1], whole)
    if re.fullmatch(r"[0-9./]+", text):
        try:
            return IPv4Network(text)
        except (AddressValueError, NetmaskValueError):
            raise _refused(whole, "names no IPv4 network", "a network is like 10.1.0.0/16") from None
        except ValueError:  # host bits
            wanted = IPv4Network(text, strict=False)
            raise _refused(
                whole, "has bits set beyond its prefix", f"{wanted}, or {text.partition('/')[0]} for one address"
            ) from None
    return _domain(text, whole)


def _rule(text: str, allow: bool) -> Rule:
    match = _RULE.fullmatch(text)
    if match is None and text.count(":") > 1:
        raise _refused(text, "is about IPv6 and cannot be read", "an IPv6 address is in brackets: [2001:db8::/32]:443/tcp")
    if match is None:
        raise _refused(text, "cannot be read")
    protocol = None
    if match["protocol"]:
        try:
            protocol = Protocol(match["protocol"].lower())
        except ValueError:
            raise _refused(text, f"has the unknown protocol {match['protocol'][:20]}", "tcp, udp or icmp") from None
    ports = None
    if match["first"]:
        ports = int(match["first"]), int(match["last"] or match["first"])
        if not 1 <= ports[0] <= ports[1] <= 65535:
            raise _refused(text, "has no such ports", "ports are 1 to 65535, a range is 8000-8010")
        if protocol is Protocol.ICMP:
            raise _refused(text, "has a port, which ICMP has not", text.partition(":")[0] + "/icmp")
    return Rule(allow, _target(match["target"], text), ports, protocol)


def _rules(text: str) -> Iterator[Rule]:
    for clause in re.split(r"[;\n]", text):
        if not clause.strip():
            continue
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise _refused(clause.strip(), "begins with neither allow: nor deny:")
        items = [item.strip() for item in match[2].split(",")]
        if not all(items):
            raise _refused(clause.strip(), "has an empty place in its list")
        for item in items:
            yield _rule(item, match[1].lower() == "allow")


def parse_egress(text: str) -> Egress:
    """A policy from its text; ``str()`` of it gives the canonical text back. Raises ``egress_invalid``, ``egress_too_long``
    (InvalidRequest)."""
    if len(text) > MAX_TEXT:
        raise InvalidRequest("egress_too_long", f"an egress policy has at most {MAX_TEXT} characters, this has {len(text)}")
    match text.strip().lower():
        case "none":
            return NONE
        case "all":
            return ALL
        case "":
            raise InvalidRequest("egress_invalid", "an egress policy cannot be empty", HINT)
    rules: list[Rule] = []
    for rule in _rules(text):
        rules.append(rule)
        if len(rules) > MAX_RULES:
            raise InvalidRequest(
                "egress_too_long", f"an egress policy has at most {MAX_RULES} rules", "join networks, or name a wider one"
            )
    if not rules:
        raise InvalidRequest("egress_invalid", "an egress policy cannot be empty", HINT)
    return Egress(tuple(rules), rest=not any(rule.allow for rule in rules))
