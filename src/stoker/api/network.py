"""What is seen of a sandbox's network, and why it reaches a port or does not."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from msgspec import Meta, ValidationError, convert, field

from stoker.api.types import InterfaceAddress, InterfaceName, Model, NetworkMode, SandboxId, UnixTime
from stoker.errors import InvalidRequest

__all__ = [
    "Denial",
    "ExplainNetwork",
    "ExplainStep",
    "Explanation",
    "LearnedNetwork",
    "NetworkCounters",
    "NetworkStatus",
    "Interface",
    "Transport",
    "Verdict",
    "parse_interface",
]


class Transport(StrEnum):
    TCP = "tcp"
    UDP = "udp"


class Verdict(StrEnum):
    """``unknown``: it could not be seen, or nothing came that far."""

    PASS = "pass"
    FAIL = "fail"
    UNKNOWN = "unknown"


class Interface(Model, frozen=True):
    """A further interface: a port of a bridge of the host's. In the guest they are ``eth1``, ``eth2``..., after that of ``network``
    (or ``eth0``... without one)."""

    bridge: InterfaceName
    address: InterfaceAddress | None = None
    """Without, it has none of ours: the image may ask for one."""
    tap: InterfaceName | None = None
    """Its name on the host."""


def parse_interface(text: str) -> Interface:
    """``bridge:NAME[,address=IP/PREFIX][,tap=IFNAME]``, as on a command line."""
    mode, *words = text.split(",")
    kind, _, bridge = mode.partition(":")
    given = dict(word.partition("=")[::2] for word in words)
    try:
        if kind == "bridge" and len({"bridge", *given}) == 1 + len(words):
            return convert({"bridge": bridge, **given}, Interface)
    except ValidationError:
        pass
    hint = "bridge:br1, or bridge:br1,address=192.168.1.50/24,tap=tap7"
    raise InvalidRequest("bad_interface", f"{text[:100]!r} is no further interface", hint)


class ExplainNetwork(Model, frozen=True):
    """Which way is to be explained."""

    target: Annotated[str, Meta(min_length=3, max_length=300, description="`HOST:PORT`, by name or IPv4 address.")]
    protocol: Transport = Transport.TCP
    """Only a TCP connection is really tried."""


class ExplainStep(Model, frozen=True):
    """One thing that decides. ``mend``: the command that mends it, where there is one."""

    name: str
    verdict: Verdict
    says: str
    mend: str = ""


class Explanation(Model, frozen=True):
    """Every step of the way, in its order. ``fault``: the first that fails; those behind it may follow from it.

    ``reached``: whether the machine got a connection; null where none was tried, and nothing speaks against it.
    """

    sandbox: SandboxId
    target: str
    protocol: Transport
    reached: bool | None
    fault: str | None
    steps: list[ExplainStep]
    milliseconds: float = 0.0


class NetworkCounters(Model, frozen=True):
    """Since its machine got its interface: packets and bytes sent, packets denied of those, and packets of others refused."""

    sent: int = 0
    sent_bytes: int = 0
    denied: int = 0
    refused: int = 0


class Denial(Model, frozen=True):
    """Packets of one kind that the firewall denied. ``port`` null: the protocol has none. ``times`` counts those that were logged:
    a few a second at most; the counters have all."""

    protocol: str
    destination: str | None
    port: int | None
    first_at: UnixTime
    last_at: UnixTime
    times: int = 1


class NetworkStatus(Model, frozen=True):
    """The network of a sandbox with an interface on the host. Without a machine it has no slot, address or counters."""

    sandbox: SandboxId
    network: NetworkMode
    interface: str = ""
    address: str = ""
    slot: str = ""
    egress: str = ""
    learn: bool = False
    publish: list[str] = field(default_factory=list)
    counters: NetworkCounters = field(default_factory=NetworkCounters)
    denials: list[Denial] = field(default_factory=list)
    """The last ones, newest first; of this run of the daemon."""
    logged: bool = True
    """False: the firewall's log could not be had, so there are no denials here."""


class LearnedNetwork(Model, frozen=True):
    """What a sandbox with ``learn`` needed beyond its policy, as rules: exact ones, for a person to widen. ``egress``: its policy
    with these rules in front, to be pasted. ``lost``: how much more there was than is kept."""

    sandbox: SandboxId
    rules: list[str]
    egress: str
    names: dict[str, Any] = field(default_factory=dict)
    lost: int = 0
