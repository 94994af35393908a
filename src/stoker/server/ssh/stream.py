"""A WebSocket that carries ssh: the messages of an attachment, with the ssh server in the place of a process."""

from __future__ import annotations

import asyncio
import socket

import anyio

from stoker.api import websocket as wire
from stoker.api.models import Principal, ProcessInfo
from stoker.engine.output import Output
from stoker.errors import CapacityExhausted, Conflict, InvalidRequest
from stoker.server.attach import relay
from stoker.server.channel import Channel, Gone
from stoker.server.ssh.keys import private_key

__all__ = ["speak_ssh"]

READ = 64 << 10
CLOSING = 10.0
SERVICE_RESTART = 1012
CONNECTIONS = 256
"""Those of one daemon at a time."""


class _Wire:
    """Our end of the socket whose other end the ssh library has. Fits :class:`stoker.server.ports.Attachment`."""

    stdout = stderr = 0

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._offset = 0
        self.info = ProcessInfo(id=1, pid=0, running=True, stdin=True)

    async def read(self) -> Output | None:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._sock, READ)
        except OSError:
            data = b""
        if not data:
            return None
        offset, self._offset = self._offset, self._offset + len(data)
        return Output(1, offset, data)

    async def wait(self) -> ProcessInfo:
        return ProcessInfo(id=1, pid=0, running=False, exit_code=0, stdout_bytes=self._offset)

    async def write(self, data: bytes) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self._sock, data)
        except OSError:
            raise Conflict("stdin_closed", "the ssh connection is over") from None

    async def close_stdin(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    async def resize(self, rows: int, cols: int) -> None:
        raise InvalidRequest("unexpected_message", "ssh has its own words for that")

    async def signal(self, number: int, *, group: bool = True) -> None:
        raise InvalidRequest("unexpected_message", "ssh has its own words for that")

    async def aclose(self) -> None:
        self._sock.close()


async def speak_ssh(channel: Channel, who: Principal, sandbox: str) -> None:
    message = await channel.message()
    if not isinstance(message, wire.Ssh):
        raise InvalidRequest("unexpected_message", f"an ssh message was expected, not {type(message).__name__}")
    services = channel.services
    found = await services.engine.get(who, sandbox)
    if services.ssh_connections >= CONNECTIONS:
        raise CapacityExhausted(
            "too_many_ssh", f"there are {CONNECTIONS} ssh connections already", "end some, or share one (ControlMaster)"
        )
    services.ssh_connections += 1
    try:
        # The library takes a quarter of a second to import; nobody else is to wait for that.
        await asyncio.to_thread(__import__, "stoker.server.ssh.connection")
        from stoker.server.ssh.connection import Connection, parse_key
        from stoker.server.ssh.session import Guest

        guest = Guest(services.engine, who, found.id, channel.identify_again)
        connection = Connection(guest, parse_key(message.key))
        key = private_key(services.secret, found.id)
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        serving = asyncio.ensure_future(connection.run(near, key))
        try:
            await relay(channel, _Wire(far), message.window)
        except BaseException as error:
            guest.let_run = _daemon_ends(error)
            raise
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSING):
                await connection.aclose()
            serving.cancel()
            near.close()
    finally:
        services.ssh_connections -= 1


def _daemon_ends(error: BaseException) -> bool:
    """Whether that is why the stream is over, and not its client."""
    if isinstance(error, BaseExceptionGroup):
        return any(_daemon_ends(inner) for inner in error.exceptions)
    return isinstance(error, asyncio.CancelledError) or (isinstance(error, Gone) and error.code == SERVICE_RESTART)
