"""What was answered, remembered for its lifetime: bounded by number and size, the least recently used goes first."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from stoker.network.dns_wire import Malformed, Rcode, Record, Reply, Type, chain, text_of

__all__ = ["Answer", "Answers", "address_of", "answer_of"]

OVERHEAD: Final = 200
"""Bytes that a record takes besides its own."""


def address_of(record: Record) -> IPv4Address | IPv6Address | None:
    """The address that a record gives. Raises :class:`Malformed`."""
    match record.type, len(record.data):
        case Type.A, 4:
            return IPv4Address(record.data)
        case Type.AAAA, 16:
            return IPv6Address(record.data)
        case ((Type.A | Type.AAAA), _):
            raise Malformed("an address that is not as long as one")
        case _:
            return None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to one question. ``aliases``: the other names that it led along (None: one of no host). ``end``: until when
    (monotonic, seconds) it is good; each record has as long as the shortest-lived of them."""

    rcode: Rcode
    records: tuple[Record, ...]
    aliases: tuple[str | None, ...]
    end: float
    size: int

    def addresses(self) -> list[IPv4Address | IPv6Address]:
        return [address for record in self.records if (address := address_of(record)) is not None]

    def left(self, now: float) -> int:
        """Seconds of its lifetime, rounded up."""
        return max(0, -int(-(self.end - now) // 1))


def answer_of(name: bytes, type_: int, reply: Reply, *, longest: int, negative: int, now: float) -> Answer:
    """What a reply says about the question. ``longest``: of its lifetime, in seconds; ``negative``: of one that says there is
    nothing. Raises :class:`Malformed`."""
    if reply.rcode not in (Rcode.NOERROR, Rcode.NXDOMAIN):
        raise Malformed(f"no answer: {reply.rcode}")
    names, records = chain(name, type_, reply.records)
    final = [record for record in records if record.type == type_]
    if reply.rcode == Rcode.NXDOMAIN and final:
        raise Malformed("a name that does not exist, and has an answer")
    lifetime = min([longest, *(record.ttl for record in records)])
    if not final:
        lifetime = min(lifetime, negative, reply.negative if reply.negative is not None else 0)
    size = sum(len(record.name) + len(record.data) + OVERHEAD for record in records) + len(name) + OVERHEAD
    return Answer(Rcode(reply.rcode), records, tuple(text_of(one) for one in names[1:]), now + lifetime, size)


class Answers:
    def __init__(self, most: int, largest: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._largest, self._clock = most, largest, clock
        self._known: OrderedDict[tuple[bytes, int], Answer] = OrderedDict()
        self.size = 0

    def __len__(self) -> int:
        return len(self._known)

    def get(self, name: bytes, type_: int) -> Answer | None:
        key = name, type_
        answer = self._known.get(key)
        if answer is None:
            return None
        if answer.end <= self._clock():
            self._forget(key)
            return None
        self._known.move_to_end(key)
        return answer

    def put(self, name: bytes, type_: int, answer: Answer) -> None:
        key = name, type_
        if key in self._known:
            self._forget(key)
        if answer.end <= self._clock() or answer.size > self._largest // 8:
            return
        self._known[key] = answer
        self.size += answer.size
        while len(self._known) > self._most or self.size > self._largest:
            self._forget(next(iter(self._known)))

    def _forget(self, key: tuple[bytes, int]) -> None:
        self.size -= self._known.pop(key).size

    def clear(self) -> None:
        self._known.clear()
        self.size = 0
