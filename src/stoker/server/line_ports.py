"""What the server needs of an engine for ports inside guests: a part of :mod:`stoker.server.ports`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from stoker.api.models import Principal
from stoker.errors import StokerError

__all__ = ["Connections", "Line", "Route", "Use", "Way"]


class Use(Protocol):
    """Somebody's use of a sandbox, for as long as it is open and not at :meth:`rest`."""

    @property
    def ended(self) -> bool:
        """It is over in both directions."""

    def lasting(self) -> None:
        """A pause of the sandbox is not to wait for it."""

    def rest(self) -> None:
        """Nobody uses it for now."""

    def use(self) -> bool:
        """Somebody does again; False: it cannot be used any more."""

    def drop(self) -> None:
        """Closes it at once. Again is no error."""


class Line(Use, Protocol):
    """A connection to a port inside a guest by its agent. One that is :meth:`lasting` goes on after a pause."""

    async def read(self) -> bytes:
        """The next bytes; ``b""`` when the other end has closed. ``GuestError("connection_reset")`` when it broke."""

    async def write(self, data: bytes) -> None:
        """Returns when there is room for more. ``Conflict("stdin_closed")`` when the other end takes no more."""

    def close_write(self) -> None: ...

    async def aclose(self) -> None:
        """Closes it behind what was written."""


class Way(Use, Protocol):
    """The address at which this host reaches a sandbox, while its machine has it. A pause takes it away."""

    @property
    def address(self) -> str: ...

    def watch(self, cut: Callable[[StokerError | None], None]) -> None:
        """``cut`` is called when it ends: what was made to the address is to be closed, and why (None: it was dropped)."""


class Route(Protocol):
    """A sandbox as the proxy sees it."""

    @property
    def sandbox(self) -> str: ...

    @property
    def local(self) -> bool:
        """An administrator's."""

    @property
    def policy(self) -> str:
        """Its label ``stoker.proxy``: ``open``, ``token``, ``none`` or empty."""

    @property
    def direct(self) -> bool:
        """It has an address of its own on this host, when it runs."""


class Connections(Protocol):
    """Connections to ports inside the guests, by their agents: no network is needed, and what only localhost reaches is reached."""

    def route(self, label: str) -> Route | None:
        """The sandbox that has this name (in lower case) or id for the proxy."""

    async def open(self, who: Principal, sandbox: str, port: int, *, address: str | None = None, brief: bool = False) -> Line:
        """Wakes the sandbox where it is paused. ``address``: of the guest's; None its loopback addresses, one after the other.

        ``brief``: a pause waits for it (within bounds). ``GuestError``: ``port_refused``, ``port_timeout``, ``port_unreachable``.
        """

    async def way(self, who: Principal, sandbox: str) -> Way | None:
        """Wakes the sandbox where it is paused. None: it has no address that this host reaches."""
