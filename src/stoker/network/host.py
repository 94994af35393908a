"""What the host's own network has to be like for ours, as data: what was found, what speaks against it, how to mend and undo it.

Looking (:func:`observe`) and judging (:func:`judge`, pure) change nothing. :func:`mend` does what it is given, and returns what
:func:`undo` needs. Only a :class:`Pass` reaches into a table that is not ours: another firewall that drops what is forwarded
(Docker's and ufw's do) is told of our ranges, since to nftables an ``accept`` of our own is not the last word. Its rules carry a
comment by which exactly they are found again. Addresses are translated by our own table (:mod:`.rules`), whatever the uplink is.

The files that keep the settings over a restart of the host are rendered by :func:`sysctl_file`; who writes them is not told here.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stoker.errors import HostError
from stoker.host.durable import write_atomically
from stoker.host.netlink import Netlink, uplinks
from stoker.host.nftables import Nftables
from stoker.network.plan import Foreign, Range, check_ranges

__all__ = [
    "Chain",
    "File",
    "Finding",
    "Observed",
    "Pass",
    "Setting",
    "foreign_networks",
    "judge",
    "mend",
    "observe",
    "sysctl_file",
    "undo",
]

ROOT: Final = "/proc/sys/net"
FORWARD: Final = "ipv4/ip_forward"
FORWARD6: Final = "ipv6/conf/all/forwarding"
ADVERTISED: Final = 0x40000
"""RTF_ADDRCONF: a route that a router told of."""
COMMENT: Final = "stoker"
TAPS: Final = 'iifname "tap*" udp dport 67'
MANAGER: Final = "NetworkManager"
MANAGED: Final = ("/etc/NetworkManager", "/run/NetworkManager/conf.d", "/usr/lib/NetworkManager/conf.d")
HANDS_OFF: Final = """# Written by `stoker network check --fix`; `--undo` removes it.
[device-stoker]
match-device=interface-name:stk*;interface-name:tap*
managed=0
"""


@dataclass(frozen=True, slots=True)
class Chain:
    """A base chain of another's firewall that drops what it does not know. ``ours``: our rules are in it."""

    family: str
    table: str
    name: str
    hook: str
    ours: bool = False

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


@dataclass(frozen=True, slots=True)
class Observed:
    """``settings``: names below ``net`` (with slashes) and values. ``uplinks``: names, best first; ``advertised``: those with a
    route of IPv6 by a router's advertisement."""

    settings: Mapping[str, str]
    uplinks: tuple[str, ...]
    foreign: tuple[Foreign, ...]
    chains: tuple[Chain, ...]
    advertised: tuple[str, ...] = ()
    managed: bool = False
    """Whether NetworkManager runs, and has not been told to leave machines' interfaces alone."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A mend: the value that a setting gets."""

    name: str
    value: str

    def __str__(self) -> str:
        return f"sysctl -w net.{self.name.replace('/', '.')}={self.value}"


@dataclass(frozen=True, slots=True)
class Pass:
    """A mend: rules at the beginning of another's chain, which let our machines' packets through to our own rules."""

    chain: Chain
    matches: tuple[str, ...]

    @property
    def commands(self) -> list[str]:
        return [f'insert rule {self.chain} {match} accept comment "{COMMENT}"' for match in self.matches]

    def __str__(self) -> str:
        return "; ".join(f"nft '{command}'" for command in self.commands)


@dataclass(frozen=True, slots=True)
class File:
    """A mend: a file of another program's configuration, which that reads again (SIGHUP)."""

    path: str
    content: str
    program: str

    def __str__(self) -> str:
        return f"write {self.path}, and systemctl reload {self.program}: " + " ".join(self.content.splitlines()[1:])


Mend = Setting | Pass | File


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. ``mends`` is empty where it is well, or where only the operator can decide."""

    name: str
    ok: bool
    says: str
    mends: tuple[Mend, ...] = ()


def _settings() -> dict[str, str]:
    names = [FORWARD, FORWARD6]
    for version, word in (("ipv4", "rp_filter"), ("ipv6", "accept_ra")):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            names += [f"{version}/conf/{interface}/{word}" for interface in sorted(os.listdir(f"{ROOT}/{version}/conf"))]
    found = {}
    for name in names:
        try:
            with open(f"{ROOT}/{name}") as file:
                found[name] = file.read().strip()
        except FileNotFoundError:
            continue  # the interface is gone
    return found


def _chains(nft: Nftables) -> tuple[Chain, ...]:
    """Base chains of others' that drop by default what is forwarded, or what comes in."""
    rows = nft.query("list ruleset")
    ours = {
        (rule["family"], rule["table"], rule["chain"])
        for row in rows
        if (rule := row.get("rule")) and str(rule.get("comment", "")) == COMMENT
    }
    found = []
    for row in rows:
        chain = row.get("chain", {})
        if chain.get("hook") in ("forward", "input") and chain.get("policy") == "drop" and chain["family"] in ("ip", "inet"):
            place = (chain["family"], chain["table"], chain["name"])
            found.append(Chain(*place, chain["hook"], place in ours))
    return tuple(found)


def foreign_networks(link: Netlink, besides: Collection[str] = ()) -> list[Foreign]:
    """The networks of the host: of its interfaces' addresses and its routes, but for those of interfaces ``besides``."""
    names = {one.index: one.name for one in link.links()}
    mine = {index for index, name in names.items() if name in besides}
    found = [
        Foreign(address.interface.network, f"{names.get(address.index, 'an interface')} has the address {address.interface} of")
        for address in link.addresses()
        if address.index not in mine
    ]
    routes = (route for route in link.routes() if route.destination.prefixlen and route.index not in mine)
    return found + [Foreign(route.destination, f"is routed to {names.get(route.index, 'nowhere')}") for route in routes]


def _advertised() -> tuple[str, ...]:
    """Interfaces with a default route of IPv6 that goes when the host begins to forward, unless they go on to listen."""
    try:
        with open("/proc/thread-self/net/ipv6_route", encoding="ascii") as file:
            rows = [line.split() for line in file]
    except FileNotFoundError:
        return ()
    return tuple({row[9]: None for row in rows if row[:2] == ["0" * 32, "00"] and int(row[8], 16) & ADVERTISED})


def _processes(name: str) -> list[int]:
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry.name}/comm", encoding="utf-8", errors="replace") as file:
                if file.read().rstrip("\n") == name:
                    found.append(int(entry.name))
    return found


def _managed() -> bool:
    if not _processes(MANAGER):
        return False
    files = [path for place in MANAGED for path in Path(place).glob("**/*.conf")]
    return not any("interface-name:stk*" in path.read_text(errors="replace") for path in files)


def observe(foreign: Iterable[Foreign]) -> Observed:
    """The calling thread's namespace as it is. ``foreign``: networks of the host that are not slots' (:func:`foreign_networks`)."""
    with Netlink() as link, Nftables() as nft:
        names = {found.index: found.name for found in link.links()}
        out = tuple(dict.fromkeys(names[route.index] for route in uplinks(link.routes()) if route.index in names))
        return Observed(_settings(), out, tuple(foreign), _chains(nft), _advertised(), _managed())


def _filters(settings: Mapping[str, str]) -> Finding:
    strict = sorted(name for name, value in settings.items() if name.endswith("/rp_filter") and value == "1")
    names = ", ".join(name.split("/")[2] for name in strict)
    says = f"packets are dropped by the way their answer would take (rp_filter) on: {names}" if strict else "no rp_filter is strict"
    return Finding("reverse path", not strict, says, tuple(Setting(name, "0") for name in strict))


def _ipv6(found: Observed) -> Finding:
    """What machines with IPv6 need besides. An uplink listens to its router first: forwarding hosts do so only when told."""
    if FORWARD6 not in found.settings:
        return Finding("IPv6", False, "this host's kernel has no IPv6")
    deaf = [f"ipv6/conf/{name}/accept_ra" for name in found.advertised if found.settings.get(f"ipv6/conf/{name}/accept_ra") != "2"]
    if found.settings[FORWARD6] == "1" and not deaf:
        return Finding("IPv6", True, "the host forwards IPv6")
    says = "the host does not forward IPv6 (net.ipv6.conf.all.forwarding is 0)"
    if found.settings[FORWARD6] == "1":
        says = f"the route of {', '.join(found.advertised)} is a router's word, which is not listened to while the host forwards"
    return Finding("IPv6", False, says, (*(Setting(name, "2") for name in deaf), Setting(FORWARD6, "1")))


def _others(chains: Sequence[Chain], ranges: Sequence[Range]) -> list[Finding]:
    findings = []
    for chain in chains:
        if chain.hook == "forward":
            matches = tuple(f"ip {side} {one.network}" for one in ranges for side in ("saddr", "daddr"))
            what = "drops what is forwarded"
        else:
            matches, what = (TAPS,), "drops what comes in, our DHCP among it"
        says = f"the chain {chain} of another firewall {what}" + ("; ours is let through" if chain.ours else "")
        findings.append(Finding(f"firewall {chain}", chain.ours, says, () if chain.ours else (Pass(chain, matches),)))
    return findings


def judge(found: Observed, ranges: Sequence[Range], *, ipv6: bool = False) -> list[Finding]:
    """Every finding, good and bad, in the order in which to read them. ``ipv6``: also of what machines with IPv6 need."""
    forward = found.settings.get(FORWARD) == "1"
    says = "the host forwards packets" if forward else "the host does not forward packets (net.ipv4.ip_forward is 0)"
    findings = [Finding("forwarding", forward, says, () if forward else (Setting(FORWARD, "1"),)), _filters(found.settings)]
    out = f"machines leave by {found.uplinks[0]}" if found.uplinks else "the host has no default route: machines reach nothing"
    findings.append(Finding("uplink", bool(found.uplinks), out))
    problems = check_ranges(ranges, found.foreign)
    findings += [Finding("range", False, problem) for problem in problems]
    if not problems:
        findings.append(Finding("range", True, "no range of ours is somebody else's"))
    if ipv6:
        findings.append(_ipv6(found))
    if found.managed:
        says = "NetworkManager takes the interfaces of machines for its own to configure"
        mend = File(f"{MANAGED[0]}/conf.d/90-stoker.conf", HANDS_OFF, MANAGER)
        findings.append(Finding(MANAGER, False, says, (mend,)))
    return findings + _others(found.chains, ranges)


def _set(name: str, value: str) -> str | None:
    """Changes a setting and gives its old value; None when there is no such setting any more."""
    try:
        with open(f"{ROOT}/{name}", "r+") as file:
            before = file.read().strip()
            file.seek(0)
            file.write(value)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise HostError(
            "setting_refused", f"net.{name.replace('/', '.')}: {e.strerror}", "stoker network check --fix needs root"
        ) from None
    return before


def _reload(program: str) -> None:
    for pid in _processes(program):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)


def mend(mends: Iterable[Mend]) -> list[dict[str, Any]]:
    """Does it, in the calling thread's namespace. What it gives back is JSON, for :func:`undo`; write it down first if it matters
    that a crash in between is undone too: undoing what was not done is harmless."""
    record: list[dict[str, Any]] = []
    for one in mends:
        if isinstance(one, Setting):
            before = _set(one.name, one.value)
            if before is not None and before != one.value:
                record.append({"setting": one.name, "before": before, "after": one.value})
        elif isinstance(one, File):
            path = Path(one.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, one.content.encode(), 0o644)
            _reload(one.program)
            record.append({"file": one.path, "content": one.content, "program": one.program})
        else:
            with Nftables() as nft:
                nft.apply(one.commands)
            record.append({"chain": [one.chain.family, one.chain.table, one.chain.name]})
    return record


def undo(record: Iterable[Mapping[str, Any]]) -> None:
    """Takes back what :func:`mend` recorded: a setting or file that is still as it was left, rules with our comment. Twice is
    fine."""
    for step in reversed(list(record)):
        if "setting" in step:
            name = _setting(step)
            if _settings().get(name) == step["after"]:
                _set(name, step["before"])
            continue
        if "file" in step:
            path = Path(step["file"])
            if path.is_file() and path.read_text(errors="replace") == step["content"]:
                path.unlink()
                _reload(step["program"])
            continue
        family, table, name = step["chain"]
        with Nftables() as nft:
            try:
                rows = nft.query(f"list chain {family} {table} {name}")
            except HostError as error:
                if error.code == "nftables_unknown":
                    continue
                raise
            handles = [row["rule"]["handle"] for row in rows if row.get("rule", {}).get("comment") == COMMENT]
            nft.apply([f"delete rule {family} {table} {name} handle {handle}" for handle in handles])


def _setting(step: Mapping[str, Any]) -> str:
    name = str(step["setting"])
    return name if name.startswith(("ipv4/", "ipv6/")) else f"ipv4/{name}"  # as an older Stoker recorded it


def sysctl_file(record: Iterable[Mapping[str, Any]]) -> str:
    """For ``/etc/sysctl.d/``: all settings ever mended that last, as far as they are not of one interface, which may be gone by
    then."""
    lasting = {_setting(step): step["after"] for step in record if "setting" in step}
    kept = [name for name in lasting if name == FORWARD or name.split("/")[2] in ("all", "default") or "/accept_ra" in name]
    return "# Written by `stoker network check --fix`; `--undo` removes it.\n" + "".join(
        f"net.{name.replace('/', '.')} = {lasting[name]}\n" for name in kept
    )
