"""The proxy's listener, and what is true of all its connections."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Final

import structlog

from stoker.server.proxy.front import Front
from stoker.server.proxy.pool import IDLE_SECONDS

if TYPE_CHECKING:
    from stoker.server.proxy.router import Router

__all__ = ["Proxy"]

_log = structlog.get_logger("stoker.proxy")
MAX_CONNECTIONS: Final = 4096
TICK: Final = 1.0
BACKLOG: Final = 1024


class Proxy:
    """Takes connections of ``sock`` from :meth:`begin` on. ``trusted``: addresses of proxies in front of this one."""

    def __init__(self, router: Router, *, trusted: frozenset[str] = frozenset()) -> None:
        self.router = router
        self.trusted = trusted
        self.closing = False
        self.fronts: set[Front] = set()
        self._server: asyncio.Server | None = None
        self._ticking: asyncio.TimerHandle | None = None
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def begin(self, sock: socket.socket) -> None:
        self._server = await asyncio.get_running_loop().create_server(lambda: Front(self), sock=sock, backlog=BACKLOG)

    def enter(self, front: Front) -> bool:
        if self.closing or len(self.fronts) >= MAX_CONNECTIONS:
            return False
        self.fronts.add(front)
        self._quiet.clear()
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().call_later(TICK, self._tick)
        return True

    def leave(self, front: Front) -> None:
        self.fronts.discard(front)
        if not self.fronts:
            self._quiet.set()

    def _tick(self) -> None:
        """While there is anybody: a timer for each request would cost more than looking at all of them now and then."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for front in list(self.fronts):
            if front.deadline is not None and front.deadline <= now:
                front.expired()
        self.router.sweep(now - IDLE_SECONDS)
        self._ticking = loop.call_later(TICK, self._tick) if self.fronts or self.router.pools else None

    async def aclose(self, grace: float = 2.0) -> None:
        """No new clients; those that are being answered have ``grace`` seconds."""
        self.closing = True
        if self._server is not None:
            self._server.close()
        for front in list(self.fronts):
            front.shut()
        try:
            async with asyncio.timeout(grace):
                await self._quiet.wait()
        except TimeoutError:
            _log.info("connections are cut", connections=len(self.fronts))
        for front in list(self.fronts):
            front.abort()
        self.router.close()
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
