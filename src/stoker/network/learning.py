"""What a policy would have to allow: recorded of a machine that may do everything for the time being. Bounded, since the machine
decides what is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from stoker.network.egress import ICMP6, NUMBERS, Address, Protocol

__all__ = ["Learned", "Need"]

MOST_NAMES: Final = 1000
MOST_CONNECTIONS: Final = 4000
MOST_ADDRESSES: Final = 64
PROTOCOLS: Final = {6: "tcp", 17: "udp", 1: "icmp"}


@dataclass(slots=True)
class Need:
    """Something that was asked for: how often, and when first and last (seconds since 1970)."""

    first: float
    last: float
    times: int = 1
    addresses: set[Address] = field(default_factory=set)


class Learned:
    """Names that were looked up, and connections beyond the policy. ``lost``: how much more there was than is kept."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.names: dict[str, Need] = {}
        self.connections: dict[tuple[str, int, int], Need] = {}
        self._of: dict[Address, str] = {}
        self.lost = 0

    def _note(self, needs: dict[Any, Need], key: Any, most: int) -> Need | None:
        now = self._clock()
        if (need := needs.get(key)) is not None:
            need.last, need.times = now, need.times + 1
            return need
        if len(needs) >= most:
            self.lost += 1
            return None
        return needs.setdefault(key, Need(now, now))

    def looked_up(self, name: str, addresses: list[Address]) -> None:
        """A name that the policy would have denied, and what was answered."""
        need = self._note(self.names, name, MOST_NAMES)
        if need is not None:
            for address in addresses[: MOST_ADDRESSES - len(need.addresses)]:
                need.addresses.add(address)
                self._of[address] = name

    def connected(self, address: Address, protocol: int, port: int) -> None:
        """A connection that the policy would have denied (``protocol`` by its number); by its name where one was looked up."""
        target = self._of.get(address, str(address) if address.version == 4 else f"[{address}]")
        protocol = NUMBERS[Protocol.ICMP] if protocol == ICMP6 else protocol
        self._note(self.connections, (target, protocol, port), MOST_CONNECTIONS)

    def rules(self) -> list[str]:
        """Rules of the language of policies that allow all this, sorted: connections exactly, and names that none was made to."""
        found = set()
        for target, protocol, port in self.connections:
            word = PROTOCOLS.get(protocol)
            if word is None:
                found.add(target)
            else:
                found.add(f"{target}/icmp" if word == "icmp" else f"{target}:{port}/{word}")
        reached = {target for target, _, _ in self.connections}
        return sorted(found | {name for name in self.names if name not in reached})

    def as_dict(self) -> dict[str, Any]:
        return {
            "rules": self.rules(),
            "lost": self.lost,
            "names": {
                name: {"first": need.first, "last": need.last, "times": need.times, "addresses": sorted(map(str, need.addresses))}
                for name, need in sorted(self.names.items())
            },
        }
