"""The resolver of machines whose egress policy has rules for names: one service for all machines of a host.

It listens on port 53 of each machine's gateway as the host sees it (``plan.host``), on sockets that are bound to that machine's
interface, so whose question it is needs no telling. A question goes this way:

1. Rate, size and form. What is malformed, or too much, is dropped and counted.
2. The policy (:meth:`.Egress.look_up`). A name that it denies is asked of nobody: no data leaves by questions. The answer is
   NXDOMAIN, not REFUSED: upon REFUSED glibc says "temporary failure" and programs try again and again, musl waits until its time is
   over; upon NXDOMAIN all fail at once. It has no SOA record, so nobody remembers it past an edit of the policy. It is NOERROR
   without records where the name has to exist, since one below it is allowed.
3. AAAA is answered empty where a machine has no IPv6; SVCB and HTTPS always, as their hints of addresses would lead past the
   firewall's sets.
4. The cache, else the host's resolvers (:mod:`.dns_upstream`); one question at a time for one name.
5. Of the answer only what follows from the question. Aliases lead anywhere, but not to what a rule denies by name.
6. Private addresses are taken out (no rebinding), but for those that a rule for their network opens.
7. Every address left is in the firewall's sets before the answer is sent, for its lifetime and some seconds more, in which a
   program may connect.

Nothing of it is kept over a restart: the firewall's sets stay in the kernel, and the machines' resolvers ask again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address
from typing import Final

from stoker.errors import CapacityExhausted, Conflict, HostError, StokerError
from stoker.host.namespaces import Namespace, own_namespace
from stoker.network import named
from stoker.network.dns_answers import Answer, Answers, address_of, answer_of
from stoker.network.dns_listener import Listener, bound
from stoker.network.dns_upstream import Server, Unanswered, Upstreams
from stoker.network.dns_wire import IN, Malformed, Query, Rcode, Record, Type, parse_query, render, text_of
from stoker.network.egress import SPECIAL, SPECIAL6, Address, Egress, Network
from stoker.network.firewall import Firewall
from stoker.network.learning import Learned
from stoker.network.rules import SERVICES, Machine

__all__ = ["SERVICES", "Counts", "Limits", "Resolver"]

log = logging.getLogger(__name__)
PORT: Final = 53
EMPTY: Final = (Type.SVCB, Type.HTTPS)
MOST_ADDRESSES: Final = 256
"""Of one name, that are remembered for an edit."""
BY_ADDRESS: Final = "the policy allows no address of this name"
BY_NAME: Final = "the policy does not allow this name"


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds are seconds; the rest are numbers. ``rate`` and ``burst``: questions of one machine. ``grace``: how much longer than
    its lifetime an address may be connected to. ``remembered``: names of one machine that an edit of its policy carries over, of as
    many addresses as ``held`` at once."""

    rate: float = 100.0
    burst: float = 200.0
    pending: int = 64
    pending_of_all: int = 1024
    answers: int = 8192
    answers_size: int = 8 << 20
    longest: int = 3600
    negative: int = 60
    grace: int = 30
    remembered: int = 1024
    held: int = 8192


@dataclass(slots=True)
class Counts:
    """Of one machine: questions by what became of them. ``rebound``: private addresses that were taken out of answers."""

    answered: int = 0
    cached: int = 0
    denied: int = 0
    malformed: int = 0
    limited: int = 0
    failed: int = 0
    rebound: int = 0


@dataclass(slots=True)
class _Found:
    """What a machine may connect to by a name it looked up, each until when (monotonic, seconds)."""

    addresses: dict[Address, float] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


@dataclass(slots=True)
class _Client:
    machine: Machine
    learned: Learned | None
    allowance: float
    refilled: float
    counts: Counts = field(default_factory=Counts)
    pending: int = 0
    looked_up: OrderedDict[str, _Found] = field(default_factory=OrderedDict)
    held: dict[Address, float] = field(default_factory=dict)
    listener: Listener | None = None


class Resolver:
    """Made by :meth:`open`. All of it belongs to one event loop."""

    def __init__(
        self, firewall: Firewall, home: Namespace, upstreams: Upstreams, private: Collection[Network], limits: Limits
    ) -> None:
        self._firewall, self._home, self.upstreams, self._limits = firewall, home, upstreams, limits
        self._private = (*SPECIAL, *SPECIAL6, *private)
        self._clients: dict[str, _Client] = {}
        self._answers = Answers(limits.answers, limits.answers_size)
        self._asking: dict[tuple[bytes, int], asyncio.Task[Answer]] = {}
        self._tables = ThreadPoolExecutor(1, thread_name_prefix="resolver")
        upstreams.ours = lambda: {client.listener.address for client in self._clients.values() if client.listener is not None}

    @classmethod
    def open(
        cls, firewall: Firewall, servers: Sequence[Server] = (), private: Collection[Network] = (), limits: Limits | None = None
    ) -> Resolver:
        """In the namespace of the calling thread, which is that of the firewall. ``servers``: whom to ask, those of resolv.conf
        unless said; ``private``: networks of the operator's, as the firewall has them."""
        home = Namespace(own_namespace())
        return cls(firewall, home, Upstreams(home, servers), private, limits or Limits())

    async def aclose(self) -> None:
        """Stops answering everybody. The firewall's sets stay as they are."""
        for interface in list(self._clients):
            await self.remove(interface)
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)
        self._tables.shutdown(wait=True)
        self._home.close()

    async def __aenter__(self) -> Resolver:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def put(self, machine: Machine, at: IPv4Address, learned: Learned | None = None) -> None:
        """Answers a machine whose slot is up, at ``at`` (``plan.host``) by its interface; or follows a change of its policy, which
        the firewall has by now. ``learned``: no name is denied, but recorded there. Raises ``resolver_port_taken`` (Conflict),
        ``resolver_failed`` (HostError)."""
        client = self._clients.get(machine.interface)
        if client is not None and client.listener is not None and client.listener.address == at:
            client.machine, client.learned = machine, learned
            return
        await self.remove(machine.interface)
        now = time.monotonic()
        client = self._clients[machine.interface] = _Client(machine, learned, self._limits.burst, now)
        try:
            sockets = self._sockets(machine.interface, at)
            client.listener = await Listener.open(sockets, at, partial(self._admit, client), partial(self._counted, client))
        except BaseException:
            self._clients.pop(machine.interface, None)
            raise

    async def remove(self, interface: str) -> None:
        """Answers a machine no more; before its slot is dropped or parked. Fine when it was not answered."""
        client = self._clients.pop(interface, None)
        if client is not None and client.listener is not None:
            await client.listener.aclose()

    def _sockets(self, interface: str, at: IPv4Address) -> tuple[socket.socket, socket.socket]:
        try:
            return self._home.run(lambda: bound(interface, str(at), PORT))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Conflict(
                    "resolver_port_taken",
                    f"port {PORT} of {at} is taken by another resolver of this host",
                    f"ss -lntup 'sport = :{PORT}'; bind it to addresses of its own",
                ) from None
            raise HostError("resolver_failed", f"names cannot be served at {at} ({interface}): {error.strerror}") from None

    def known(self, interface: str, egress: Egress) -> named.Answers:
        """What a machine has looked up, by the rules of its next policy: for :meth:`.Slots.change`. An address whose lifetime is
        over comes with the grace, so that connections to it go on."""
        client = self._clients.get(interface)
        found: dict[int, dict[Address, int]] = {}
        now = time.monotonic()
        for name, found_before in client.looked_up.items() if client is not None else ():
            for position in _positions(egress, name, found_before.aliases):
                there = found.setdefault(position, {})
                for address, end in found_before.addresses.items():
                    there[address] = max(there.get(address, 0), round(end - now), self._limits.grace)
        return {position: list(addresses.items()) for position, addresses in found.items()}

    def counts(self) -> dict[str, Counts]:
        """Of every machine, by its interface."""
        return {interface: client.counts for interface, client in self._clients.items()}

    # From here on: one question.

    def _admit(self, client: _Client, source: IPv4Address, data: bytes, stream: bool) -> Query | None:
        """The question in a message; None when it gets no answer."""
        limits, now = self._limits, time.monotonic()
        client.allowance = min(limits.burst, client.allowance + (now - client.refilled) * limits.rate)
        client.refilled = now
        if source != client.machine.address or client.allowance < 1 or client.pending >= limits.pending:
            client.counts.limited += 1
            return None
        client.allowance -= 1
        try:
            query = parse_query(data, stream=stream)
        except Malformed:
            client.counts.malformed += 1
            return None
        client.pending += 1
        return query

    async def _counted(self, client: _Client, query: Query) -> bytes:
        try:
            return await self._answered(client, query)
        finally:
            client.pending -= 1

    async def _answered(self, client: _Client, query: Query) -> bytes:
        if query.kind != IN or query.type == Type.OPT or 128 <= query.type <= 255:
            return render(query, Rcode.REFUSED)  # meta-questions: transfers, ANY
        name, egress = text_of(query.name), client.machine.egress
        allowed = name is not None and egress.look_up(name)
        if not allowed and (client.learned is None or name is None):
            return self._denied(client, query, exists=name is not None and egress.leads_below(name))
        if query.type in EMPTY or (query.type == Type.AAAA and not client.machine.ipv6):
            return render(query, Rcode.NOERROR)
        assert name is not None
        try:
            answer = await self._answer(client, query.name.lower(), query.type)
            if allowed and client.learned is None and any(alias is not None and egress.denies(alias) for alias in answer.aliases):
                return self._denied(client, query, exists=False)
            records = self._without_private(client, answer.records)
            if not allowed and client.learned is not None:
                client.learned.looked_up(name, answer.addresses())
            await self._enter(client, egress, name, records, answer)
        except (Unanswered, Malformed, StokerError) as error:
            client.counts.failed += 1
            log.debug("%s of %s: %s", name, client.machine.interface, error)
            return render(query, Rcode.SERVFAIL)
        client.counts.answered += 1
        left = answer.left(time.monotonic())
        blocked = BY_ADDRESS if len(records) < len(answer.records) else ""
        return render(query, answer.rcode, [(record, left) for record in records], blocked=blocked)

    def _denied(self, client: _Client, query: Query, *, exists: bool) -> bytes:
        client.counts.denied += 1
        return render(query, Rcode.NOERROR if exists else Rcode.NXDOMAIN, blocked=BY_NAME)

    def _without_private(self, client: _Client, records: Sequence[Record]) -> list[Record]:
        egress, kept = client.machine.egress, []
        for record in records:
            if (address := address_of(record)) is not None:
                if any(address in network for network in self._private) and not egress.opens(address):
                    client.counts.rebound += 1
                    continue
            kept.append(record)
        return kept

    async def _answer(self, client: _Client, name: bytes, type_: int) -> Answer:
        if (answer := self._answers.get(name, type_)) is not None:
            client.counts.cached += 1
            return answer
        key = name, type_
        if (task := self._asking.get(key)) is None:
            if len(self._asking) >= self._limits.pending_of_all:
                raise Unanswered("too many questions are being asked")
            task = self._asking[key] = asyncio.create_task(self._ask(name, type_))
            task.add_done_callback(lambda done: self._asked(key, done))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Unanswered("the resolver ends") from None
            raise

    def _asked(self, key: tuple[bytes, int], done: asyncio.Task[Answer]) -> None:
        self._asking.pop(key, None)
        if not done.cancelled():
            done.exception()  # whoever waited has it; there may be nobody left

    async def _ask(self, name: bytes, type_: int) -> Answer:
        reply = await self.upstreams.ask(name, type_)
        limits = self._limits
        answer = answer_of(name, type_, reply, longest=limits.longest, negative=limits.negative, now=time.monotonic())
        self._answers.put(name, type_, answer)
        return answer

    async def _enter(self, client: _Client, egress: Egress, name: str, records: Sequence[Record], answer: Answer) -> None:
        """Returns when the firewall has the addresses of an answer."""
        addresses = [address for record in records if (address := address_of(record)) is not None]
        if not addresses:
            return
        now = time.monotonic()
        end = max(now, answer.end) + self._limits.grace
        self._hold(client, addresses, now, end)
        aliases = tuple(alias for alias in answer.aliases if alias is not None)
        lifetime = answer.left(now) + self._limits.grace
        entered = {position: [(address, lifetime) for address in addresses] for position in _positions(egress, name, aliases)}
        if not self._firewall.holds(egress, entered):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._tables, self._firewall.resolved, egress, entered)
        if client.machine.egress != egress:
            raise Unanswered("the policy changed meanwhile")
        there = client.looked_up.setdefault(name, _Found())
        there.aliases = aliases
        there.addresses.update(dict.fromkeys(addresses, end))
        for address in list(there.addresses)[: max(0, len(there.addresses) - MOST_ADDRESSES)]:
            del there.addresses[address]
        client.looked_up.move_to_end(name)
        while len(client.looked_up) > self._limits.remembered:
            client.looked_up.popitem(last=False)

    def _hold(self, client: _Client, addresses: list[Address], now: float, end: float) -> None:
        """Bounds what one machine fills into sets that it shares with others of its policy."""
        client.held.update(dict.fromkeys(addresses, end))
        if len(client.held) > self._limits.held:
            client.held = {address: until for address, until in client.held.items() if until > now}
            if len(client.held) > self._limits.held:
                for address in addresses:
                    client.held.pop(address, None)
                raise CapacityExhausted("names_full", f"{client.machine.interface} has looked up too many addresses")


def _positions(egress: Egress, name: str, aliases: Sequence[str]) -> set[int]:
    """The rules whose sets the addresses of a name go into: every one about the name, and those about its aliases that deny."""
    denying = {position for alias in aliases for position in egress.naming(alias) if not egress.rules[position].allow}
    return denying | set(egress.naming(name))
