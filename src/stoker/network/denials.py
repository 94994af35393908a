"""What the firewall denied, as its log tells: by machine, repeated ones joined, bounded. And what machines that are learned from
needed beyond their policy (:mod:`.learning`).

Belongs to one event loop. The kernel limits what it logs of one machine, so that a machine in a loop floods nobody; how much was
denied altogether is in the firewall's counters.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final

from stoker.errors import HostError
from stoker.host.nflog import Log, Logged
from stoker.network.egress import Address
from stoker.network.learning import Learned
from stoker.network.rules import LEARNED_PREFIX, Machine

__all__ = ["Denial", "Denials"]

log = logging.getLogger(__name__)
LOG_GROUP: Final = 5300
MOST: Final = 256
NAMES: Final = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp"}
ICMP: Final = (1, 58)


@dataclass(slots=True)
class Denial:
    """``port`` None: the protocol has none. ``destination`` None: neither IPv4 nor IPv6. Times are seconds since 1970."""

    protocol: int
    destination: Address | None
    port: int | None
    first: float
    last: float
    times: int = 1

    @property
    def word(self) -> str:
        """The protocol's name."""
        return NAMES.get(self.protocol, str(self.protocol)) if self.destination is not None else "ipv6"


@dataclass(slots=True)
class _Machine:
    address: IPv4Address | None = None
    recent: OrderedDict[tuple[int, Address | None, int | None], Denial] = field(default_factory=OrderedDict)
    learned: Learned | None = None
    learns: bool = False


class Denials:
    """Machines are known by a key of the caller's, which stays when their interface becomes another."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._machines: dict[str, _Machine] = {}
        self._keys: dict[str, str] = {}
        self._log: Log | None = None
        self.lost = 0
        """How often the kernel had more than we took in time."""

    @property
    def logged(self) -> bool:
        """Whether the firewall's log is read here."""
        return self._log is not None

    def open(self, group: int = LOG_GROUP) -> int:
        """Takes the firewall's log, in the namespace of the calling thread: the number of its group; 0: another has it, or the
        kernel has none, and nothing is recorded. Twice is fine."""
        try:
            self._log = self._log or Log(group)
        except HostError as error:
            log.warning("denials are not recorded: %s", error)
            return 0
        return group

    def begin(self) -> None:
        """Reads from now on, in the running loop."""
        if self._log is not None:
            asyncio.get_running_loop().add_reader(self._log.fileno(), self._read, self._log)

    def close(self) -> None:
        source, self._log = self._log, None
        if source is not None:
            asyncio.get_running_loop().remove_reader(source.fileno())
            source.close()

    def watch(self, key: str, machine: Machine) -> None:
        """The interface is that machine's. Where its policy learns, what it needs beyond that is kept from now on."""
        seen = self._machines.setdefault(key, _Machine())
        seen.address, seen.learns = machine.address, machine.egress.learn
        if seen.learns and seen.learned is None:
            seen.learned = Learned(self._clock)
        self._keys[machine.interface] = key

    def learning(self, interface: str) -> Learned | None:
        """Where what this machine needs is to be recorded now."""
        machine = self._machines.get(self._keys.get(interface, ""))
        return machine.learned if machine is not None and machine.learns else None

    def leave(self, interface: str) -> None:
        """It is nobody's any more; what is known of the machine stays."""
        self._keys.pop(interface, None)

    def forget(self, key: str) -> None:
        self._machines.pop(key, None)

    def recent(self, key: str) -> list[Denial]:
        """The last ones, newest first."""
        machine = self._machines.get(key)
        return [] if machine is None else list(reversed(machine.recent.values()))

    def learned(self, key: str) -> Learned | None:
        """None: it was never learned from."""
        machine = self._machines.get(key)
        return None if machine is None else machine.learned

    def _read(self, source: Log) -> None:
        try:
            found, lost = source.read()
        except OSError as error:
            log.warning("denials are not recorded any more: %s", error)
            self.close()
            return
        self.lost += lost
        for one in found:
            self.note(one)

    def note(self, one: Logged) -> None:
        """A packet of the log."""
        machine = self._machines.get(self._keys.get(one.interface, ""))
        if machine is None:
            return
        if machine.learned is not None and machine.learns and one.destination is not None and one.source == machine.address:
            # Neighbours' calls to everybody are nothing that one would allow.
            if not (one.destination.is_multicast or int(one.destination) == 0xFFFFFFFF) and (one.port or one.protocol in ICMP):
                machine.learned.connected(one.destination, one.protocol, one.port or 0)
        if one.prefix == LEARNED_PREFIX:
            return
        now, key = self._clock(), (one.protocol, one.destination, one.port)
        denial = machine.recent.get(key)
        if denial is None:
            machine.recent[key] = Denial(*key, first=now, last=now)
            if len(machine.recent) > MOST:
                machine.recent.popitem(last=False)
        else:
            denial.times, denial.last = denial.times + 1, now
            machine.recent.move_to_end(key)
