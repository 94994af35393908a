"""What the server needs of an engine for ports inside guests: a part of :mod:`stoker.server.ports`."""

from __future__ import annotations

from typing import Protocol

from stoker.api.models import Principal

__all__ = ["Connections", "Line", "Route"]


class Line(Protocol):
    """A connection to a port inside a guest. While it is open, and not at :meth:`rest`, its sandbox is in use."""

    @property
    def ended(self) -> bool:
        """It is over in both directions."""

    async def read(self) -> bytes:
        """The next bytes; ``b""`` when the other end has closed. ``GuestError("connection_reset")`` when it broke."""

    async def write(self, data: bytes) -> None:
        """Returns when there is room for more. ``Conflict("stdin_closed")`` when the other end takes no more."""

    def close_write(self) -> None: ...

    def lasting(self) -> None:
        """A pause of the sandbox is not to wait for it; it goes on after the resume."""

    def rest(self) -> None:
        """Nobody uses it for now."""

    def use(self) -> bool:
        """Somebody does again; False: it cannot be used any more."""

    def drop(self) -> None:
        """Closes it at once. Again is no error."""

    async def aclose(self) -> None:
        """Closes it behind what was written."""


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


class Connections(Protocol):
    """Connections to ports inside the guests, by their agents: no network is needed, and what only localhost reaches is reached."""

    def route(self, label: str) -> Route | None:
        """The sandbox that has this name (in lower case) or id for the proxy."""

    async def open(self, who: Principal, sandbox: str, port: int, *, address: str | None = None, brief: bool = False) -> Line:
        """Wakes the sandbox where it is paused. ``address``: of the guest's; None its loopback addresses, one after the other.

        ``brief``: a pause waits for it (within bounds). ``GuestError``: ``port_refused``, ``port_timeout``, ``port_unreachable``.
        """
