"""What is in the firewall's sets of names: addresses that a resolver found, until when. Not safe from several threads at once.

The kernel could be asked, but only for a whole set. What it has is what was entered here, since nobody else enters anything; after
a restart of ours it has more, and what is entered then counts from then on.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from stoker.errors import CapacityExhausted
from stoker.network.egress import Address, Egress
from stoker.network.rules import TABLE, names_set

__all__ = ["Answers", "Entering", "Names"]

Answers = Mapping[int, Collection[tuple[Address, int]]]
"""By the position of a rule: addresses, and their lifetimes in seconds."""
LONGEST: Final = 86400
MOST: Final = 60000
"""Addresses in one set, which the kernel bounds at 65,535."""


@dataclass(frozen=True, slots=True)
class Entering:
    """What a transaction does: its commands, and by set and address the moment (monotonic, seconds) until which it is good."""

    commands: list[str] = field(default_factory=list)
    until: dict[str, dict[Address, float]] = field(default_factory=dict)


def _by_set(egress: Egress, answers: Answers) -> Iterator[tuple[str, list[tuple[Address, int]]]]:
    for position, addresses in answers.items():
        for version in (4, 6):
            if found := [one for one in addresses if one[0].version == version]:
                yield names_set(egress.digest, position, version), found


class Names:
    def __init__(self) -> None:
        self._until: dict[str, dict[Address, float]] = {}

    def entering(self, egress: Egress, answers: Answers) -> Entering:
        """What is to be done for these answers; nothing where what was entered lasts as long. Raises ``names_full``."""
        found, now = Entering(), time.monotonic()
        for name, addresses in _by_set(egress, answers):
            there = self._until.get(name, {})
            until: dict[Address, float] = {}
            for address, lifetime in addresses:
                lifetime = max(1, min(lifetime, LONGEST))
                if max(there.get(address, 0.0), until.get(address, 0.0)) < now + lifetime:
                    until[address] = now + lifetime
            if len(there) + len(until) > MOST:
                there = self._until[name] = {address: end for address, end in there.items() if end > now}
                if len(there.keys() | until.keys()) > MOST:
                    rule = egress.rules[int(name.rpartition("-")[2])]
                    raise CapacityExhausted("names_full", f"the rule {rule} has {MOST} addresses already")
            for address, end in until.items():
                # An element that is there keeps its old lifetime when it is only added again.
                found.commands.append(f"add element {TABLE} {name} {{ {address} }}")
                found.commands.append(f"delete element {TABLE} {name} {{ {address} }}")
                found.commands.append(f"add element {TABLE} {name} {{ {address} timeout {round(end - now)}s }}")
            if until:
                found.until[name] = until
        return found

    def hold(self, egress: Egress, answers: Answers) -> bool:
        """Whether what was entered lasts as long, but for a second, as lifetimes are rounded; of any thread."""
        now = time.monotonic()
        for name, addresses in _by_set(egress, answers):
            there = self._until.get(name, {})
            if any(there.get(address, 0.0) < now + min(lifetime, LONGEST) - 1 for address, lifetime in addresses):
                return False
        return True

    def enter(self, done: Entering) -> None:
        """It is in the kernel now."""
        for name, until in done.until.items():
            self._until.setdefault(name, {}).update(until)

    def keep(self, sets: Collection[str]) -> None:
        """Forgets sets that are gone."""
        for name in [name for name in self._until if name not in sets]:
            del self._until[name]

    def commands(self) -> list[str]:
        """Those that enter everything anew into sets that are empty."""
        now = time.monotonic()
        return [
            f"add element {TABLE} {name} {{ {address} timeout {max(1, round(end - now))}s }}"
            for name, addresses in self._until.items()
            for address, end in addresses.items()
            if end > now
        ]
