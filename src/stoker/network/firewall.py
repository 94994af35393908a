"""The firewall of the host: the rules of :mod:`stoker.network.rules` and :mod:`stoker.network.bridged`, applied by small
transactions and read back from the kernel.

What is installed is known by reading the tables once, so a daemon that starts again, or a tool without records, removes exactly
what a machine left. A table that another version of the rules made is replaced in one transaction, and its machines stay in it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from types import MappingProxyType
from typing import Any, Final

from stoker.errors import Conflict, HostError
from stoker.host.nftables import Nftables
from stoker.network import bridged, rules
from stoker.network.bridged import BRIDGE_TABLE, Port
from stoker.network.egress import Domain, Egress, Network
from stoker.network.named import Answers, Entering, Names
from stoker.network.rules import ARP_TABLE, MAPS, SETS, TABLE, Element, Machine, Publication

__all__ = ["Counters", "Firewall"]

log = logging.getLogger(__name__)
MARK: Final = "version-"
LIMITS: Final = ("rate_out", "rate_in", "connections", "over_out", "over_in", "crowded")
FACTS: Final = ("machines", "sent", "denials", "refusals", "pinned", "egress", "resolvers", "host_access", "host_services")
FACTS6: Final = ("machines6", "pinned6", "asking6")
BY_INTERFACE: Final = (*FACTS, *FACTS6, *LIMITS)
BY_ADDRESS: Final = ("open", "peers", "peers6")
PUBLISHED: Final = ("published", "published_at")
COUNTING: Final = (
    ("sent", "sent", "sent_bytes"),
    ("denials", "denied", ""),
    ("refusals", "refused", ""),
    *((name, name, "") for name in ("over_out", "over_in", "crowded")),
)
"""Sets with counters: which fields of :class:`Counters` their packets and bytes are."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Of one machine since it was added: packets and bytes that it sent, packets denied of those, and packets of others refused;
    packets over its rate, out and in, and packets of connections too many, since it has such a limit."""

    sent: int = 0
    sent_bytes: int = 0
    denied: int = 0
    refused: int = 0
    over_out: int = 0
    over_in: int = 0
    crowded: int = 0


def _word(value: Any) -> str:
    """A key or value of libnftables' JSON in the words of :mod:`.rules`; interfaces' names are quoted by the caller."""
    match value:
        case {"elem": {"val": inner}}:
            return _word(inner)
        case {"concat": parts}:
            return " . ".join(_word(part) for part in parts)
        case {"goto": {"target": target}}:
            return f"goto {target}"
        case _:
            return str(value)


PROTOCOLS: Final = {"6": "tcp", "17": "udp", "1": "icmp"}


def _parts(value: Any) -> list[str]:
    return _word(value).split(" . ")


def _key(name: str, parts: list[str]) -> str:
    """With the protocol by its name, whichever way the library gave it."""
    if name in BY_INTERFACE:
        parts = [f'"{parts[0]}"', *parts[1:]]
    place = {"open": 1, "published": 0, "published_at": 1, "host_services": 1}.get(name)
    if place is not None:
        parts[place] = PROTOCOLS.get(parts[place], parts[place])
    return " . ".join(parts)


UNITS: Final = {"bytes": 1, "kbytes": 1 << 10, "mbytes": 1 << 20}


def _limit(value: Any) -> str:
    """An element's own statement, in the words of :mod:`.rules`."""
    match value:
        case {"elem": {"limit": {"rate": rate, "rate_unit": unit, "burst": burst, "burst_unit": burst_unit}}}:
            return rules.rate_limit(rate * UNITS[unit], burst * UNITS[burst_unit])
        case {"elem": {"ct count": {"val": most}}}:
            return f"ct count over {most}"
        case _:
            return ""


def _rows(row: Mapping[str, Any]) -> Iterable[tuple[list[str], str, str]]:
    """Of each element: the parts of its key, its value, its limit."""
    for item in row.get("elem", []):
        key, value = item if isinstance(item, list) else (item, None)
        yield _parts(key), "" if value is None else _word(value), _limit(key)


def _sets_of(commands: Iterable[str]) -> set[str]:
    """The names of the sets that commands make."""
    return {command.split()[4] for command in commands if command.startswith("add set ")}


class Firewall:
    """The host's two tables, and the third where machines are on a bridge. Made by :meth:`open`; safe to use from any thread."""

    def __init__(self, nft: Nftables, base: list[str], bridge_base: list[str]) -> None:
        self._nft, self._base, self._bridge_base = nft, base, bridge_base
        self._bridged = False
        """Whether there is a table for bridges."""
        self._lock = threading.Lock()
        self._version = hashlib.sha256("\n".join([*base, *bridge_base]).encode()).hexdigest()[:16]
        self._installed: dict[str, frozenset[Element]] = {}
        self._chains: dict[str, list[str]] = {}
        """The commands of each policy that is installed; none where another process made it."""
        self._sets: set[str] = set()
        self._names = Names()
        self._published: dict[tuple[str, str], str] = {}
        """Whose each published port is: map and key, interface."""

    @classmethod
    def open(cls, ranges: Collection[IPv4Network], private: Collection[Network] = (), *, log_group: int = 0) -> Firewall:
        """Makes the tables in the namespace of the calling thread, or takes over those that are there. Raises HostError."""
        nft = Nftables()
        try:
            firewall = cls(nft, rules.base(ranges, private, log_group), bridged.base(log_group))
            firewall._load()
        except BaseException:
            nft.close()
            raise
        return firewall

    def close(self) -> None:
        """Lets go of the library; the tables stay."""
        self._nft.close()

    def __enter__(self) -> Firewall:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self) -> None:
        try:
            found = self._nft.query(f"list table {TABLE}")
        except HostError as error:
            if error.code != "nftables_unknown":
                raise
            self._install()
            return self._read_bridged()
        chains = {row["chain"]["name"] for row in found if "chain" in row}
        self._read(found)
        self._read_bridged()
        self._chains = {name: [] for name in chains if name.startswith("policy-")}
        if f"{MARK}{self._version}" not in chains:
            self._replace()

    def _read(self, found: list[dict[str, Any]]) -> None:
        """What each machine has in the tables, by what names its interface or its address."""
        rows = {row[kind]["name"]: row[kind] for row in found for kind in ("set", "map") if kind in row}
        self._sets = set(rows)
        owners: dict[str, str] = {}
        installed: dict[str, set[Element]] = {}
        for parts, _, _ in _rows(rows.get("machines", {})):
            name = f'"{parts[0]}"'
            installed[parts[0]] = {Element(ARP_TABLE, "machines", name)}
        for parts, _, _ in _rows(rows.get("pinned", {})):
            owners[parts[2]] = parts[0]
            installed.setdefault(parts[0], set()).add(Element(ARP_TABLE, "pinned", _key("pinned", parts)))
        owners |= {parts[2]: parts[0] for parts, _, _ in _rows(rows.get("pinned6", {}))}
        for name in (*SETS, *MAPS):
            for parts, value, limit in _rows(rows.get(name, {})):
                if name in BY_INTERFACE:
                    owner: str | None = parts[0]
                else:
                    owner = owners.get(parts[0] if name in BY_ADDRESS else value.split(" . ")[0])
                if owner is not None:
                    installed.setdefault(owner, set()).add(Element(TABLE, name, _key(name, parts), value, limit))
        self._installed = {name: frozenset(items) for name, items in installed.items()}
        self._published = {
            (item.name, item.key): interface for interface, items in installed.items() for item in items if item.name in PUBLISHED
        }

    def _read_bridged(self) -> None:
        """The same of those on a bridge."""
        try:
            found = self._nft.query(f"list table {BRIDGE_TABLE}")
        except HostError as error:
            if error.code not in ("nftables_unknown", "nftables_refused"):  # a kernel that has no such tables
                raise
            return
        self._bridged = True
        installed: dict[str, set[Element]] = {}
        for row in (row["set"] for row in found if "set" in row and row["set"]["name"] in bridged.SETS):
            for parts, _, limit in _rows(row):
                item = Element(BRIDGE_TABLE, row["name"], _key(row["name"], parts), limit=limit)
                installed.setdefault(parts[0], set()).add(item)
        self._installed |= {name: frozenset(items) for name, items in installed.items()}

    def _install(self) -> None:
        self._nft.apply([*self._base, f"add chain {TABLE} {MARK}{self._version}"])
        self._sets = {*SETS, *MAPS}

    def restore(self) -> bool:
        """Makes the tables what they should be, when somebody else flushed or changed them; False when they are."""
        with self._lock:
            try:
                there = Firewall(self._nft, self._base, self._bridge_base)
                found = self._nft.query(f"list table {TABLE}")
                there._read(found)
                there._read_bridged()
                chains = {row["chain"]["name"] for row in found if "chain" in row}
                rules_there = Counter(row["rule"]["chain"] for row in found if "rule" in row)
                whole = Counter(command.split()[4] for command in self._base if command.startswith(f"add rule {TABLE} "))
                if (
                    there._installed == self._installed
                    and {f"{MARK}{self._version}", *self._chains} <= chains
                    and whole <= rules_there
                ):
                    return False
            except HostError as error:
                if error.code != "nftables_unknown":
                    raise
            self._replace()
            return True

    def _replace(self) -> None:
        """Puts these rules in the place of what is there. Machines whose policy is only known by its chain's name, since another
        process set it, reach nothing until it is set again."""
        lost = {f"goto {chain}" for chain, commands in self._chains.items() if not commands}
        kept: dict[str, frozenset[Element]] = {}
        for interface, items in self._installed.items():
            gone = {item for item in items if item.name == "egress" and item.value in lost}
            kept[interface] = (items - gone) | {Element(TABLE, "egress", item.key, rules.NONE_VERDICT) for item in gone}
        chains = {chain: commands for chain, commands in self._chains.items() if commands}
        policies = [command for commands in chains.values() for command in commands]
        entries = [item.added for items in kept.values() for item in sorted(items)]
        self._names.keep(_sets_of(policies))
        entries += self._names.commands()
        base = [*self._base, *(self._bridge_base if self._bridged else [])]
        self._nft.apply([*self._gone(), *base, f"add chain {TABLE} {MARK}{self._version}", *policies, *entries])
        self._installed, self._chains = kept, chains
        self._sets = {*SETS, *MAPS, *_sets_of(policies)}

    def _gone(self) -> list[str]:
        """The commands that remove the tables, whether they are there or not."""
        tables = (TABLE, ARP_TABLE, *([BRIDGE_TABLE] if self._bridged else []))
        return [line for table in tables for line in (f"add table {table}", f"delete table {table}")]

    @property
    def interfaces(self) -> frozenset[str]:
        """Those of the machines that are installed."""
        return frozenset(self._installed)

    def put(self, machine: Machine | Port, names: Answers | None = None) -> None:
        """Adds a machine, or changes what is different: one transaction. ``names``: what is known of the names in its policy (as
        for :meth:`resolved`), so that an edit does not cut what it still allows. Raises ``port_published`` (Conflict),
        HostError."""
        with self._lock:
            if isinstance(machine, Port):
                return self._change(machine.interface, bridged.elements(machine), None)
            wanted = rules.elements(machine)
            self._check_ports(machine.interface, wanted)
            self._change(machine.interface, wanted, machine.egress, names or {})

    def remove(self, interface: str) -> bool:
        """Removes everything of a machine; False when there was nothing. The interface has to be gone or silent by now: without its
        entries it is nobody's, and what comes from it is not judged."""
        with self._lock:
            if interface not in self._installed:
                return False
            self._change(interface, frozenset(), None)
            return True

    def prune(self, keep: Collection[str]) -> list[str]:
        """Removes every machine but those; says which."""
        gone = sorted(self.interfaces - set(keep))
        for interface in gone:
            self.remove(interface)
        return gone

    def fresh(self, machine: Machine) -> list[Publication]:
        """The ports that it would publish and does not yet."""
        with self._lock:
            mine = {item for item in self._installed.get(machine.interface, ()) if item.name in PUBLISHED}
        return [port for port in machine.published if rules.publication(port, machine) not in mine]

    def _check_ports(self, interface: str, wanted: frozenset[Element]) -> None:
        for name, key in [(item.name, item.key) for item in wanted if item.name in PUBLISHED]:
            other = self._published.get((name, key), interface)
            if other != interface:
                port = key.replace(" . ", " ")
                why = f"{port} of this host leads to another machine ({other})"
                raise Conflict("port_published", why, "choose another port", details={"interface": other})

    def _change(
        self, interface: str, wanted: frozenset[Element], egress: Egress | None, names: Answers = MappingProxyType({})
    ) -> None:
        before = self._installed.get(interface, frozenset())
        commands, made = self._needed(egress)
        first = not self._bridged and any(item.table == BRIDGE_TABLE for item in wanted)
        commands += self._bridge_base if first else []
        entering = self._names.entering(egress, names) if egress is not None else Entering()
        commands += entering.commands
        deleted = sorted(before - wanted)
        commands += [item.deleted for item in deleted]
        commands += [item.added for item in sorted(wanted - before)]
        unused = self._unused(interface, {item.value for item in deleted if item.name == "egress"}, wanted)
        for chain in unused:
            commands += rules.without_policy(chain, self._sets | made)
        try:
            self._nft.apply(commands)
        except HostError as error:
            if error.code != "nftables_unknown":
                raise
            log.warning("the firewall's tables are not what they were (%s); making them anew", error.message)
            self._replace()
            self._nft.apply(commands)
        self._bridged = self._bridged or first
        if wanted:
            self._installed[interface] = wanted
        else:
            self._installed.pop(interface, None)
        for item in before | wanted:
            if item.name in PUBLISHED:
                self._published.pop((item.name, item.key), None)
        self._published.update({(item.name, item.key): interface for item in wanted if item.name in PUBLISHED})
        self._sets |= made
        for chain in unused:
            self._chains.pop(chain, None)
            digest = chain.removeprefix("policy-")
            self._sets = {name for name in self._sets if f"-{digest}-" not in name}
        self._names.enter(entering)
        self._names.keep(self._sets)
        if egress is not None and egress.rules:
            self._chains[rules.policy_chain(egress)] = rules.policy(egress)

    def _needed(self, egress: Egress | None) -> tuple[list[str], set[str]]:
        """The commands for a policy's chain that is not there yet, and the names of the sets they make."""
        if egress is None or not egress.rules or rules.policy_chain(egress) in self._chains:
            return [], set()
        commands = rules.policy(egress)
        return commands, _sets_of(commands)

    def _unused(self, interface: str, left: set[str], wanted: frozenset[Element]) -> list[str]:
        """The chains of those verdicts that no machine has any more, when this one has what is wanted."""
        candidates = {value.removeprefix("goto ") for value in left if value.startswith("goto policy-")}
        if not candidates:
            return []
        others = (items for other, items in self._installed.items() if other != interface)
        used = {item.value for items in (*others, wanted) for item in items if item.name == "egress"}
        return sorted(chain for chain in candidates if f"goto {chain}" not in used)

    def holds(self, egress: Egress, answers: Answers) -> bool:
        """Whether :meth:`resolved` would do nothing. Waits for nobody."""
        return self._names.hold(egress, answers)

    def resolved(self, egress: Egress, answers: Answers) -> None:
        """What a resolver learned: for the positions of rules (:meth:`Egress.naming`), addresses and their lifetimes in seconds. No
        lifetime is made shorter. Raises ``names_full`` (CapacityExhausted), ``nftables_unknown``: no machine has this policy."""
        with self._lock:
            entering = self._names.entering(egress, answers)
            self._nft.apply(entering.commands)
            self._names.enter(entering)

    def counters(self) -> dict[str, Counters]:
        """Of every machine."""
        found: dict[str, dict[str, int]] = {}
        wanted = [(TABLE, *row) for row in COUNTING]
        if self._bridged:
            wanted += [(BRIDGE_TABLE, *row) for row in COUNTING if row[0] in bridged.SETS]
        for table, name, packets, size in wanted:
            for row in self._nft.query(f"list set {table} {name}"):
                for item in row.get("set", {}).get("elem", []):
                    counter = item["elem"].get("counter", {})
                    values = found.setdefault(item["elem"]["val"], {})
                    values[packets] = counter.get("packets", 0)
                    if size:
                        values[size] = counter.get("bytes", 0)
        return {interface: Counters(**values) for interface, values in found.items()}

    def counters_of(self, interface: str) -> Counters:
        """Of one machine; nothing is listed."""
        found = []
        for name in ("sent", "denials", "refusals"):
            words = (self._nft.element(f"{TABLE} {name}", f'"{interface}"') or "").split()
            found.append([int(words[words.index(unit) + 1]) if unit in words else 0 for unit in ("packets", "bytes")])
        (sent, size), (denied, _), (refused, _) = found
        return Counters(sent, size, denied, refused)

    def missing(self, machine: Machine) -> list[str]:
        """What of a machine should be in the kernel's tables, and is not, or says something else there."""
        lost = []
        for one in sorted(rules.elements(machine)):
            there = self._nft.element(f"{one.table} {one.name}", one.key)
            if there is None or (one.name == "egress" and not there.endswith(one.value)):
                lost.append(str(one))
        return lost

    def named(self, egress: Egress, address: IPv4Address) -> frozenset[int]:
        """The positions of the rules for names that a resolver has entered this address for, and that are open to it now."""
        digest = egress.digest
        names = [position for position, rule in enumerate(egress.rules) if isinstance(rule.target, Domain)]
        there = (position for position in names if self._nft.element(f"{TABLE} {rules.names_set(digest, position)}", str(address)))
        return frozenset(there)

    def private(self, address: IPv4Address) -> bool:
        """Whether it is in a network that only a rule of its own opens."""
        return self._nft.element(f"{TABLE} private", str(address)) is not None

    def drop(self) -> None:
        """Removes the tables."""
        with self._lock:
            self._nft.apply(self._gone())
            self._bridged = False
            self._installed, self._chains, self._sets, self._published = {}, {}, set(), {}
            self._names.keep(())
