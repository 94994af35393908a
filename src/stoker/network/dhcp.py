"""DHCP for one machine: a dnsmasq on its TAP that offers one address to one MAC, and serves no names.

For images that boot an init of their own; the agent configures its guests itself. What dnsmasq gets is rendered here (pure); it
reads no file of the host's. Two ways to run it:

* :func:`start` in the namespace of the slot, for the engine to supervise: in the machine's directory it keeps ``dhcp.leases``, says
  ``dhcp.log``, and is known by the one argument that names its lease file. Whatever a crash left is ended by :func:`end`, by the
  directory alone. It holds the slot's namespace, so it is ended before the slot is dropped.
* the template unit :data:`UNIT` of systemd, one instance for each TAP of the run plan.

What a guest says of itself (its name, its class) is never used.
"""

from __future__ import annotations

import os
import re
import select
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from stoker.errors import HostError, InvalidRequest
from stoker.host.namespaces import Namespace
from stoker.host.process import ProcessIdentity, send_signal
from stoker.host.run import spawn_detached
from stoker.network.plan import INSIDE, NamespacePlan, RunPlan

__all__ = [
    "UNIT",
    "UNIT_NAME",
    "Dhcp",
    "command",
    "end",
    "find",
    "instance",
    "of_slot",
    "start",
    "unit_environment",
    "unit_file",
    "unit_script",
]

LEASE: Final = 3600
NAMESERVERS: Final = (IPv4Address("1.1.1.1"),)
_LABEL: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_INTERFACE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
PATIENCE: Final = 5.0
"""Seconds that a dnsmasq gets to end, first asked, then killed."""


def _is_domain(text: str) -> bool:
    return len(text) <= 253 and all(_LABEL.fullmatch(label) for label in text.split("."))


@dataclass(frozen=True, slots=True)
class Dhcp:
    """What a machine is offered. ``gateway`` is the TAP's own address; ``mtu`` 0: not said. Raises ``hostname_invalid``,
    ``search_invalid``, ``mtu_invalid`` (InvalidRequest): these may come from a user, and would be words of dnsmasq's language."""

    interface: str
    gateway: IPv4Address
    guest: IPv4Address
    mac: str
    hostname: str = ""
    nameservers: tuple[IPv4Address, ...] = NAMESERVERS
    search: tuple[str, ...] = ()
    mtu: int = 0

    def __post_init__(self) -> None:
        if not _INTERFACE.fullmatch(self.interface) or not _MAC.fullmatch(self.mac):
            raise ValueError(f"{self.interface} with {self.mac} is no interface of a plan's")
        if self.hostname and not _LABEL.fullmatch(self.hostname):
            raise InvalidRequest(
                "hostname_invalid",
                f"“{self.hostname[:80]}” is no host name",
                "letters, digits and '-', at most 63; its domain is a search domain",
            )
        for name in self.search:
            if not _is_domain(name):
                raise InvalidRequest("search_invalid", f"“{name[:80]}” is no domain to search in", "for example: example.org")
        if self.mtu and not 576 <= self.mtu <= 65535:
            raise InvalidRequest("mtu_invalid", f"an MTU of {self.mtu} cannot be offered", "576 to 65535")


def of_slot(
    plan: RunPlan | NamespacePlan,
    *,
    hostname: str = "",
    nameservers: tuple[IPv4Address, ...] = NAMESERVERS,
    search: tuple[str, ...] = (),
    mtu: int = 0,
) -> Dhcp:
    """What the machine of a slot is offered: the plan's addresses, on the TAP that its VMM has."""
    if isinstance(plan, RunPlan):
        ends = plan.tap, plan.host, plan.guest, plan.mac
    else:
        ends = INSIDE.tap, INSIDE.gateway.ip, INSIDE.guest.ip, INSIDE.guest_mac
    return Dhcp(*ends, hostname, nameservers, search, mtu)


def _fixed(interface: str, leases: str) -> list[str]:
    """What does not depend on the machine. No ping before an offer (it would take three seconds): nobody else is on the wire."""
    return [
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--pid-file=",
        "--log-facility=-",
        "--quiet-dhcp",
        "--port=0",
        "--no-resolv",
        "--no-hosts",
        "--no-ping",
        "--bind-dynamic",
        "--except-interface=lo",
        f"--interface={interface}",
        "--dhcp-authoritative",
        "--dhcp-lease-max=1",
        "--dhcp-ignore-names",
        "--dhcp-ignore=tag:!known",
        f"--dhcp-leasefile={leases}",
    ]


def _offered(dhcp: Dhcp) -> list[str]:
    """The options beyond address and router."""
    words = [f"--dhcp-option=option:dns-server,{','.join(str(one) for one in dhcp.nameservers)}".rstrip(",")]
    if dhcp.search:
        words += [
            f"--dhcp-option=option:domain-name,{dhcp.search[0]}",
            f"--dhcp-option=option:domain-search,{','.join(dhcp.search)}",
        ]
    if dhcp.hostname:
        # By its number: among the words of --dhcp-host, a machine called "ignore" or "1h" would be taken for something else.
        words.append(f"--dhcp-option=12,{dhcp.hostname}")
    if dhcp.mtu:
        words.append(f"--dhcp-option=option:mtu,{dhcp.mtu}")
    return words


def command(dhcp: Dhcp, leases: Path) -> list[str]:
    """The command line of a dnsmasq that stays in the foreground and says what it has to say on stderr."""
    guest = str(dhcp.guest)
    return [
        "dnsmasq",
        *_fixed(dhcp.interface, str(leases)),
        f"--dhcp-range={guest},{guest},255.255.255.252,{LEASE}",
        f"--dhcp-host={dhcp.mac},{guest},{LEASE}",
        f"--dhcp-option=option:router,{dhcp.gateway}",
        *_offered(dhcp),
    ]


def _leases(directory: Path) -> Path:
    return directory / "dhcp.leases"


def start(dhcp: Dhcp, directory: Path, namespace: Namespace) -> ProcessIdentity:
    """Starts dnsmasq for a slot that is up, in the slot's namespace (the host's for the run plan), with files in the machine's
    directory. It runs on when we end; :func:`end` ends it. Raises ``tool_missing``, ``dhcp_failed`` (HostError)."""
    words = command(dhcp, _leases(directory))
    log = os.open(directory / "dhcp.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        pid = namespace.run(lambda: spawn_detached(words, output=log))
    except HostError as error:
        raise HostError("tool_missing", error.message, "apt-get install -y dnsmasq-base") from None
    finally:
        os.close(log)
    try:
        return ProcessIdentity(pid, ProcessIdentity.of(pid).start)
    except ProcessLookupError:
        said = (directory / "dhcp.log").read_text(errors="replace").strip()[-300:]
        raise HostError("dhcp_failed", f"dnsmasq on {dhcp.interface} ended at once: {said or 'it said nothing'}") from None


def find(directory: Path) -> Iterator[ProcessIdentity]:
    """The dnsmasq of a machine's directory: whoever has exactly that lease file among its arguments. One pass over /proc."""
    wanted = b"--dhcp-leasefile=" + os.fsencode(_leases(directory))
    with os.scandir("/proc") as entries:
        for entry in entries:
            if not entry.name.isdigit():
                continue
            try:
                with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                    words = file.read(8192).split(b"\0")
                if wanted in words and words[0].rpartition(b"/")[2] == b"dnsmasq":
                    yield ProcessIdentity.of(int(entry.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue


def end(directory: Path, known: ProcessIdentity | None = None) -> None:
    """Ends it and removes its files; fine when there is none, and twice. ``known``: what :func:`start` gave, in the same boot of
    the host, which saves the look through all processes. Raises ``process_stuck``."""
    for identity in [known] if known is not None else list(find(directory)):
        _end(identity)
    for name in ("dhcp.leases", "dhcp.log"):
        (directory / name).unlink(missing_ok=True)


def _end(identity: ProcessIdentity) -> None:
    with ExitStack() as undo:
        try:
            descriptor = identity.open_pidfd()
        except ProcessLookupError:
            return
        undo.callback(os.close, descriptor)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not send_signal(descriptor, number) or poll.poll(PATIENCE * 1000):
                return
    raise HostError("process_stuck", f"dnsmasq (process {identity.pid}) does not end although it was killed", "see dmesg")


# The run plan under systemd. The instance says TAP, host's and guest's address; the guest's MAC follows from its address as in
# stoker.network.plan.mac_of. What else is offered comes from a file of the instance in /run, which need not be there.
UNIT_NAME: Final = "dnsmasq-tap@.service"
RUN: Final = "/run"


def instance(plan: RunPlan) -> str:
    """The name of the unit for a slot of the run plan."""
    return UNIT_NAME.replace("@", f"@{plan.tap}:{plan.host}:{plan.guest}")


def unit_environment(dhcp: Dhcp) -> tuple[Path, str]:
    """Where the unit finds what it offers besides the address, and the text that goes there (before the unit is started)."""
    name = f"dnsmasq-tap@{dhcp.interface}:{dhcp.gateway}:{dhcp.guest}.service"
    return unit_file(name), f"OPTIONS={' '.join(_offered(dhcp))}\n"


def unit_file(name: str) -> Path:
    """Where that of an instance is."""
    return Path(RUN, f"{name.removesuffix('.service').replace('@', '-')}.env")


def unit_script(run: str = RUN) -> str:
    """For ``sh -c SCRIPT INSTANCE OPTION...``: takes the instance apart, becomes dnsmasq."""
    fixed = " ".join(f'"{word}"' for word in _fixed("$tap", f"{run}/dnsmasq-tap-$tap.leases"))
    return (
        "tap=${0%%:*}; rest=${0#*:}; host=${rest%%:*}; guest=${rest#*:}; "
        'mac=$(IFS=.; printf "02:fc:%02x:%02x:%02x:%02x" $guest) || exit 2; '
        f'exec dnsmasq {fixed} "--dhcp-range=$guest,$guest,255.255.255.252,{LEASE}" "--dhcp-option=option:router,$host" '
        f'"--dhcp-host=$mac,$guest,{LEASE}" "$@"'
    )


def _escaped(script: str) -> str:
    """As a word of a unit file: systemd has its own idea of percent and dollar signs."""
    return "'" + script.replace("%", "%%").replace("$", "$$") + "'"


UNIT: Final = f"""\
[Unit]
Description=DHCP for the one machine behind a TAP (%i)
Documentation=man:dnsmasq(8)

[Service]
Type=exec
Environment="OPTIONS={_offered(Dhcp("tap", IPv4Address(0), IPv4Address(0), "02:fc:00:00:00:00"))[0]}"
EnvironmentFile=-{RUN}/dnsmasq-tap-%i.env
ExecStart=/bin/sh -c {_escaped(unit_script())} %i $OPTIONS
ExecStopPost=/bin/sh -c {_escaped(f'rm -f "{RUN}/dnsmasq-tap-${{0%%:*}}.leases"')} %i
Restart=always
RestartSec=1
"""
