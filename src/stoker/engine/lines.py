"""Connections to ports inside the guests: a door that wakes a paused sandbox, counts as use, and closes before a pause.

A line is *busy* while somebody uses it (its sandbox's idle timeout does not run), or *at rest* in a pool. Before a pause no new
line is opened or taken into use, and those that answer a request (``brief``) are waited for, within bounds; the others go on after
the resume, as the outputs of processes do. A copy of a machine has none of them.

What leads to a machine's own address (:class:`Way`) is let in and waited for likewise, but ends with the pause: the address does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stoker.api.models import NetworkMode
from stoker.errors import Conflict, GuestError, NotFound, StokerError
from stoker.guest.connections import Connection, inet, refused

if TYPE_CHECKING:
    from stoker.api.models import Principal
    from stoker.engine.core import Box, Core
    from stoker.guest.agent import Agent

__all__ = ["Connections", "Line", "Lines", "Route", "Way"]

log = logging.getLogger(__name__)
CONNECT: Final = 10.0
"""Seconds that a connection may take to be made in the guest."""
LABEL: Final = "stoker.proxy"
DRAIN: Final = 5.0
"""Seconds that requests which are being answered may hold up a pause."""
ATTEMPTS: Final = 3
LOOPBACK: Final = ("127.0.0.1", "::1")


class Lines:
    """Those of one machine; :class:`~stoker.engine.hub.Hub` keeps them, so that they outlive a pause."""

    def __init__(self) -> None:
        self.all: set[Line | Way] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._calm = asyncio.Event()

    @property
    def closing(self) -> bool:
        """The machine is about to be paused."""
        return not self._open.is_set()

    async def gate(self) -> bool:
        """Waits while the machine is about to be paused. True: it did, and what was known of the machine may be wrong."""
        waited = self.closing
        await self._open.wait()
        return waited

    def changed(self) -> None:
        if not any(line.busy and line.brief for line in self.all):
            self._calm.set()

    async def drain(self) -> None:
        """Lets nobody in, and waits for those who are being answered. To be followed by :meth:`reopen`."""
        self._open.clear()
        for line in list(self.all):
            if not line.busy:
                line.drop()
        self._calm.clear()
        self.changed()
        try:
            async with asyncio.timeout(DRAIN):
                await self._calm.wait()
        except TimeoutError:
            log.info("requests are not answered before the pause: %d", sum(line.busy and line.brief for line in self.all))
        for line in list(self.all):
            if isinstance(line, Way):
                line.abandon(Conflict("paused_meanwhile", "the sandbox was paused before it had answered", "ask again"))

    def reopen(self) -> None:
        self._open.set()

    async def resynchronise(self, agent: Agent) -> None:
        """Over the next connection to the guest."""
        for line in list(self.all):
            if isinstance(line, Way):
                continue
            try:
                await line.connection.process.reattach(agent)
            except NotFound:
                line.abandon(GuestError("connection_lost", "the guest does not know the connection any more"))
                self.all.discard(line)

    def close(self, error: StokerError) -> None:
        """The machine is gone."""
        everything, self.all = self.all, set()
        for line in everything:
            line.abandon(error)
        self._calm.set()
        self._open.set()


class _Use:
    """Somebody's use of a sandbox. Fits ``server.line_ports.Use``, as :meth:`drop` does of those below."""

    def __init__(self, core: Core, box: Box, lines: Lines, *, brief: bool) -> None:
        self._core, self._box, self._lines = core, box, lines
        self.brief = brief
        self.busy = True
        box.users += 1

    @property
    def ended(self) -> bool:
        return self not in self._lines.all

    def lasting(self) -> None:
        """It is no request that will be answered soon (any more): a pause does not wait for it."""
        self.brief = False
        self._lines.changed()

    def rest(self) -> None:
        """Nobody uses it for now."""
        if self.busy:
            self.busy = False
            self._box.users -= 1
            self._box.touch()
            self._core.alarm.set()
            self._lines.changed()
            if self._lines.closing and self in self._lines.all:
                self.drop()  # nobody would wake its machine for it

    def use(self) -> bool:
        """Takes one that rests into use again. False: it is over, or its machine is about to be paused."""
        if self.ended or self._lines.closing:
            return False
        if not self.busy:
            self.busy = True
            self._box.users += 1
        return True

    def drop(self) -> None:
        raise NotImplementedError


class Line(_Use):
    """One connection by the agent. Fits ``server.line_ports.Line``."""

    def __init__(self, core: Core, box: Box, lines: Lines, connection: Connection, *, brief: bool) -> None:
        super().__init__(core, box, lines, brief=brief)
        self.connection = connection
        lines.all.add(self)

    @property
    def ended(self) -> bool:
        return self.connection.ended or self not in self._lines.all

    async def read(self) -> bytes:
        return await self.connection.read()

    async def write(self, data: bytes) -> None:
        await self._core.awake(self._box)
        await self.connection.write(data)

    def close_write(self) -> None:
        self.connection.close_write()

    def abandon(self, error: StokerError) -> None:
        """Nothing comes or goes any more; who reads hears why."""
        self.connection.process.abandon(error)

    def drop(self) -> None:
        """Closes it at once. Again is no error."""
        self._lines.all.discard(self)
        self.rest()
        self.connection.abort()

    async def aclose(self) -> None:
        """Closes it behind what was written."""
        try:
            async with asyncio.timeout(DRAIN):
                await self.connection.aclose()
        except TimeoutError:
            pass  # the other end does not take it
        finally:
            self.drop()


class Way(_Use):
    """The address of a machine, while it has it. Fits ``server.line_ports.Way``."""

    def __init__(self, core: Core, box: Box, lines: Lines, address: str) -> None:
        super().__init__(core, box, lines, brief=True)
        self.address = address
        self._cut: Callable[[StokerError | None], None] | None = None
        lines.all.add(self)

    def watch(self, cut: Callable[[StokerError | None], None]) -> None:
        self._cut = cut

    def abandon(self, error: StokerError | None) -> None:
        """The address is somebody else's soon; who has a connection hears why."""
        self._lines.all.discard(self)
        cut, self._cut = self._cut, None
        if cut is not None:
            cut(error)
        self.rest()

    def drop(self) -> None:
        """Closes what was made to it at once. Again is no error."""
        self.abandon(None)


@dataclass(frozen=True, slots=True)
class Route:
    """A sandbox as the proxy sees it. ``local``: an administrator's; ``policy``: its label ``stoker.proxy``; ``direct``: it has
    an address on this host, when it runs."""

    sandbox: str
    label: str
    local: bool
    policy: str
    direct: bool


class Connections:
    """The door. Fits ``server.ports.Connections``."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def route(self, label: str) -> Route | None:
        """What the proxy knows by this name, or id: an administrator's own first, of others one whose name nobody else has.
        Upper and lower case are the same."""
        core = self._core
        box = core.boxes.get(label)
        if box is None:
            named = [core.boxes[identity] for (_, name), identity in core.names.items() if name.lower() == label]
            own = [box for box in named if box.record.owner == "local"]
            box = own[0] if len(own) == 1 else named[0] if len(named) == 1 else None
        if box is None or box.record.warm or box.record.doomed:
            return None
        record = box.record
        direct = record.request.network is NetworkMode.NAT
        return Route(box.id, record.label, record.owner == "local", record.request.labels.get(LABEL, ""), direct)

    async def open(self, who: Principal, sandbox: str, port: int, *, address: str | None = None, brief: bool = False) -> Line:
        """To a TCP port in the guest: at this address, or at whichever of its loopback addresses somebody listens.

        ``port_refused`` (nobody listens), ``port_unreachable``; and what waking it up, or reaching its agent, may raise.
        """
        box = self._core.find(who, sandbox)
        for attempt in range(ATTEMPTS):
            live, agent = await self._core.agent(box)
            if await live.hub.lines.gate():
                continue  # it was put away meanwhile
            try:
                connection = await self._connect(agent, (address,) if address is not None else LOOPBACK, port)
            except GuestError as error:
                if error.code not in ("agent_lost", "agent_closed") or attempt == ATTEMPTS - 1:
                    raise _told(error, box, port) from None
            else:
                return Line(self._core, box, live.hub.lines, connection, brief=brief)
        raise _restless(box)

    async def way(self, who: Principal, sandbox: str) -> Way | None:
        """The address at which this host reaches the sandbox, which is woken where it is paused. None: it has none."""
        box = self._core.find(who, sandbox)
        for _ in range(ATTEMPTS):
            live, _ = await self._core.agent(box)
            if not await live.hub.lines.gate():
                address = box.value.address
                return Way(self._core, box, live.hub.lines, address) if address else None
        raise _restless(box)

    async def _connect(self, agent: Agent, places: Sequence[str], port: int) -> Connection:
        problem: GuestError | None = None
        for place in places:
            try:
                return await agent.connect(inet(port, place), persistent=True, timeout=CONNECT)
            except GuestError as error:
                # That of the first place, where nearly everybody listens, unless it only said that nobody does.
                problem = error if problem is None or not refused(error) else problem
                if not refused(error):
                    break
        assert problem is not None
        raise problem


def _restless(box: Box) -> GuestError:
    return GuestError("agent_unreachable", f"{box.record.label} is paused as soon as it runs", f"stoker inspect {box.id}")


def _told(error: GuestError, box: Box, port: int) -> StokerError:
    label = box.record.label
    if refused(error):
        return GuestError(
            "port_refused", f"nothing listens on port {port} of {label}", f"start it, or look: stoker exec {label} ss -ltn"
        )
    if error.code == "connect_timeout":
        return GuestError("port_timeout", f"port {port} of {label} does not answer: {error.message}", "is the service hung?")
    if error.code == "unreachable":
        return GuestError("port_unreachable", f"port {port} of {label}: {error.message}", details=error.details)
    return error
