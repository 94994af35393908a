"""A sandbox's lease: as long as this connection is there, so is the sandbox; a second after it, both are gone.

The kernel closes it however this program ends. When the *daemon* goes away (an upgrade), the lease is taken up again at the next
one, which waits ten seconds for that.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from stoker.api import websocket as wire
from stoker.client.api import Api, path
from stoker.client.websocket import Closed
from stoker.errors import HostError, InternalError, StokerError

if TYPE_CHECKING:
    from stoker.client.websocket import WebSocket

__all__ = ["Lease"]

AGAIN = 0.1


class Lease:
    """Made by :meth:`hold`; ``release`` is synchronous, may be called again, and lets the daemon destroy the sandbox."""

    def __init__(self, api: Api, sandbox: str, socket: WebSocket) -> None:
        self._api = api
        self._sandbox = sandbox
        self._socket = socket
        self._task = asyncio.create_task(self._keep())

    @classmethod
    async def hold(cls, api: Api, sandbox: str) -> Lease:
        return cls(api, sandbox, await _open(api, sandbox))

    async def _keep(self) -> None:
        while True:
            try:
                while not isinstance(await self._socket.receive(), Closed):
                    pass
                if self._socket.closed is not None and self._socket.closed.code == 1000:
                    return  # the sandbox has ended, so there is nothing to hold
            except StokerError:
                pass  # a connection that broke is made again, as one that was closed
            self._socket.abort()
            if not await self._again():
                return

    async def _again(self) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wire.LEASE_SECONDS
        while loop.time() < deadline:
            try:
                self._socket = await _open(self._api, self._sandbox)
                return True
            except HostError:
                await asyncio.sleep(AGAIN)  # the next daemon is on its way
            except StokerError:
                return False  # there is no such sandbox any more, and whoever uses it is told so
        return False

    def release(self) -> None:
        self._task.cancel()
        self._socket.abort()


async def _open(api: Api, sandbox: str) -> WebSocket:
    socket = await api.websocket(path("sandboxes", sandbox, "lease"))
    try:
        frame = await socket.receive()
        if isinstance(frame, Closed):
            raise HostError("connection_lost", f"the daemon refused the lease: {frame.code} {frame.reason}".rstrip())
        message = wire.decode_daemon(frame)
        if isinstance(message, wire.Failure):
            from stoker.client.attachment import failure_of

            raise failure_of(message.error)
    except msgspec.DecodeError as e:
        socket.abort()
        raise InternalError("bad_websocket", f"the daemon sent a message that is not understood: {e}") from None
    except BaseException:
        socket.abort()
        raise
    return socket
