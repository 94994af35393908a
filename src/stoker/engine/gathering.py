"""The facts of one machine's way to one port (:mod:`stoker.network.facts`), in the order in which a packet meets things.

The guest says what routes and resolvers it has, asks for the name and tries the connection, all by its agent, so that nothing has
to be in its image; the host's counters and table of connections are read before and after. Each part has its own seconds, all of
it :data:`WHOLE`; what was not answered by then is unknown.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import astuple, replace
from functools import partial
from ipaddress import AddressValueError, IPv4Address
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from stoker.errors import GuestError, StokerError
from stoker.host.conntrack import Connection
from stoker.network import dns_wire
from stoker.network.dns_upstream import Server, Unanswered, Upstreams, nameservers
from stoker.network.dns_wire import Malformed, Rcode, Type
from stoker.network.egress import NUMBERS
from stoker.network.egress import Protocol as Transmission
from stoker.network.facts import Facts, Guest, Looked, Outcome, Probe, Target, parse_routes
from stoker.network.firewall import Counters
from stoker.network.looking import Looking, Moment

if TYPE_CHECKING:
    from stoker.guest.agent import Agent
    from stoker.host.namespaces import Namespace

__all__ = ["AgentInside", "Inside", "Stream", "gather"]

log = logging.getLogger(__name__)
WHOLE: Final = 9.5
SAYING, ASKING, LOOKING, TRYING = 2.5, 2.5, 1.5, 2.5
"""Seconds for what the guest says of itself, for a name, for the host and for a connection."""
LONGEST_FILE: Final = 65536
LONGEST_ANSWER: Final = 16384
T = TypeVar("T")


class Stream(Protocol):
    """An open connection of the guest's."""

    async def read(self, limit: int = -1) -> bytes: ...

    async def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...


class Inside(Protocol):
    """What is asked of a guest. Errors: StokerError; of a connection those of :meth:`stoker.guest.agent.Agent.connect`."""

    async def read(self, path: str) -> str: ...

    async def connect(self, address: IPv4Address, port: int, timeout: float) -> Stream: ...


class AgentInside:
    """By a guest's agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def read(self, path: str) -> str:
        from stoker.guest.files import Files

        data = await Files(self._agent, user="0:0").read(path, length=LONGEST_FILE)
        return data.decode(errors="replace")

    async def connect(self, address: IPv4Address, port: int, timeout: float) -> Stream:
        from stoker.guest.connections import inet

        return await self._agent.connect(inet(port, str(address)), timeout=timeout)


async def gather(
    label: str, target: Target, looking: Looking, gateway: IPv4Address, home: Namespace, inside: Inside | None
) -> Facts:
    """Everything that is known within :data:`WHOLE` seconds. ``inside`` None: the guest's agent does not answer."""
    found = _Gathering(Facts(label, target, looking.machine, gateway, Guest(), address=target.literal), looking, home, inside)
    with suppress(TimeoutError):
        async with asyncio.timeout(WHOLE):
            await found.all()
    return found.facts


class _Gathering:
    def __init__(self, facts: Facts, looking: Looking, home: Namespace, inside: Inside | None) -> None:
        self.facts, self._looking, self._home, self._inside = facts, looking, home, inside

    async def all(self) -> None:
        if self._inside is not None:
            self.facts = replace(self.facts, guest=await _guest(self._inside))
        if self.facts.address is None:
            looked = await self._name()
            address = looked.addresses[0] if looked is not None and looked.addresses else None
            self.facts = replace(self.facts, looked=looked, address=address)
        if (address := self.facts.address) is None:
            return
        host = await _within(LOOKING, asyncio.to_thread(self._looking.host, address))
        self.facts = replace(self.facts, host=host)
        if self._inside is not None and self.facts.target.protocol is Transmission.TCP:
            self.facts = replace(self.facts, probe=await self._probe(self._inside, address))

    # -- names --------------------------------------------------------------------------------------------------------

    async def _name(self) -> Looked | None:
        facts = self.facts
        guest, host = facts.guest, facts.target.host
        if guest.hosts is not None and host in guest.hosts:
            return Looked("hosts", addresses=(guest.hosts[host],))
        server = guest.nameservers[0] if guest.nameservers else None
        ours = facts.machine.resolver is not None
        if server is None:
            return None
        problem = "the guest cannot be asked"
        if self._inside is not None:
            try:
                async with asyncio.timeout(ASKING):
                    return _looked("guest", server, ours, await _ask(self._inside, server, host))
            except TimeoutError:
                problem = f"no answer within {ASKING:g} s"
            except (StokerError, Malformed, EOFError) as error:
                problem = error.message if isinstance(error, StokerError) else str(error)
        # Over TCP its policy may not let it ask, and over UDP it may: that is how it asks first.
        by_udp = facts.machine.egress.allows(server, NUMBERS[Transmission.UDP], 53) is True
        if not ours and by_udp and not server.is_loopback:
            why = f"over TCP {problem}"
            with suppress(Unanswered, TimeoutError):
                async with asyncio.timeout(ASKING):
                    upstreams = Upstreams(self._home, [Server(server)], timeout=1.0, rounds=1)
                    reply = await upstreams.ask(dns_wire.name_of(host), Type.A)
                    return replace(_looked("host", server, ours, (reply.rcode, _addresses(host, reply))), problem=why)
        return Looked("guest", str(server), ours, problem=problem)

    # -- a connection -------------------------------------------------------------------------------------------------

    async def _probe(self, inside: Inside, address: IPv4Address) -> Probe | None:
        target, looking = self.facts.target, self._looking
        look = partial(looking.moment, address, target.protocol, target.port)
        before = await _within(LOOKING, asyncio.to_thread(look))
        why = ""
        try:
            stream = await inside.connect(address, target.port, TRYING)
            outcome = Outcome.CONNECTED
            stream.abort()
        except GuestError as error:
            number = error.details.get("errno")
            if error.code == "connect_timeout":
                outcome = Outcome.SILENT
            elif error.code == "unreachable":
                outcome = Outcome.REFUSED if number == errno.ECONNREFUSED else Outcome.UNREACHABLE
                why = os.strerror(number) if isinstance(number, int) else error.message
            else:
                return None  # it was not tried
        after = await _within(LOOKING, asyncio.to_thread(look))
        if before is None or after is None:
            return Probe(outcome, Counters(), None, why)
        filtered, rejected = after.filtered - before.filtered, after.rejected - before.rejected
        probe = Probe(outcome, _between(before, after), _new(before, after), why, filtered, rejected)
        if outcome is Outcome.CONNECTED or self.facts.host is None:
            return probe
        way = self.facts.host.way
        dropping = await _within(LOOKING, asyncio.to_thread(looking.dropping))
        dead = await _within(LOOKING, asyncio.to_thread(looking.dead, way, address))
        return replace(probe, dropping=dropping or (), dead_gateway=bool(dead))


def _between(before: Moment, after: Moment) -> Counters:
    a, b = before.counters, after.counters
    return Counters(*(new - old for old, new in zip(astuple(a), astuple(b), strict=True)))


def _new(before: Moment, after: Moment) -> Connection | None:
    return next((one for name, one in after.tracked.items() if name not in before.tracked), None)


async def _within(seconds: float, work: Awaitable[T]) -> T | None:
    """None: not in time, or the host would not say."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        return None
    except StokerError as error:
        log.warning("%s", error)
        return None


async def _guest(inside: Inside) -> Guest:
    async def read(path: str) -> str | None:
        return await _within(SAYING, inside.read(path))

    routes, resolvers, hosts = await asyncio.gather(read("/proc/net/route"), read("/etc/resolv.conf"), read("/etc/hosts"))
    return Guest(
        None if routes is None else parse_routes(routes),
        None if resolvers is None else _resolvers(resolvers),
        _hosts(hosts or ""),
    )


def _resolvers(text: str) -> tuple[IPv4Address, ...]:
    if not any(line.split()[:1] == ["nameserver"] for line in text.splitlines()):
        return ()
    return tuple(one.address for one in nameservers(text) if isinstance(one.address, IPv4Address))


def _hosts(text: str) -> dict[str, IPv4Address]:
    found: dict[str, IPv4Address] = {}
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        with suppress(AddressValueError, IndexError):
            address = IPv4Address(words[0])
            for name in words[1:]:
                found.setdefault(name.lower().rstrip("."), address)
    return found


async def _ask(inside: Inside, server: IPv4Address, name: str) -> tuple[int, tuple[IPv4Address, ...]]:
    """A question for the addresses of a name, from the guest: over TCP, which every resolver has."""
    number = secrets.randbits(16)
    question = dns_wire.ask(number, dns_wire.name_of(name), Type.A)
    stream = await inside.connect(server, 53, ASKING)
    try:
        await stream.write(len(question).to_bytes(2, "big") + question)
        data = b""
        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
            part = await stream.read(LONGEST_ANSWER)
            if not part:
                raise EOFError("it closed the connection without an answer")
            data += part
            if len(data) > LONGEST_ANSWER:
                raise Malformed("an answer that is too long")
    finally:
        stream.abort()
    reply = dns_wire.parse_reply(data[2:], number, dns_wire.name_of(name), Type.A)
    return reply.rcode, _addresses(name, reply)


def _addresses(name: str, reply: dns_wire.Reply) -> tuple[IPv4Address, ...]:
    if reply.rcode != Rcode.NOERROR:
        return ()
    _, records = dns_wire.chain(dns_wire.name_of(name), Type.A, reply.records)
    return tuple(IPv4Address(one.data) for one in records if one.type == Type.A)


def _looked(by: str, server: IPv4Address, ours: bool, answer: tuple[int, tuple[IPv4Address, ...]]) -> Looked:
    return Looked(by, str(server), ours, answer[0], answer[1])
