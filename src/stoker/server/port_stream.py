"""A WebSocket on a port inside a sandbox: the messages of an attachment, with the connection in the place of a process.

What the other end sends is stdout, what the client sends is stdin, ``close_stdin`` closes that direction alone. The stream ends
(``exit``) when the other end has closed.
"""

from __future__ import annotations

from stoker.api import websocket as wire
from stoker.api.models import Principal, ProcessInfo
from stoker.engine.output import Output
from stoker.errors import InvalidRequest
from stoker.server.attach import relay
from stoker.server.channel import Channel
from stoker.server.line_ports import Line

__all__ = ["LineAttachment", "connect_to", "port_number"]


def port_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 6 and 0 < int(text) < 65536):
        raise InvalidRequest("bad_port", f"{text[:20]!r} is not a port", "1 to 65535")
    return int(text)


class LineAttachment:
    """A line in the place of a process. Fits :class:`stoker.server.ports.Attachment`."""

    stdout = stderr = 0

    def __init__(self, line: Line) -> None:
        self._line = line
        self._offset = 0
        self.info = ProcessInfo(id=1, pid=0, running=True, stdin=True)

    async def read(self) -> Output | None:
        data = await self._line.read()
        if not data:
            return None
        offset = self._offset
        self._offset += len(data)
        return Output(1, offset, data)

    async def wait(self) -> ProcessInfo:
        return ProcessInfo(id=1, pid=0, running=False, exit_code=0, stdout_bytes=self._offset)

    async def write(self, data: bytes) -> None:
        await self._line.write(data)

    async def close_stdin(self) -> None:
        self._line.close_write()

    async def resize(self, rows: int, cols: int) -> None:
        raise InvalidRequest("unexpected_message", "a connection has no terminal")

    async def signal(self, number: int, *, group: bool = True) -> None:
        raise InvalidRequest("unexpected_message", "a connection takes no signals")

    async def aclose(self) -> None:
        await self._line.aclose()


async def connect_to(channel: Channel, who: Principal, sandbox: str, port: int) -> None:
    message = await channel.message()
    if not isinstance(message, wire.Attach):
        raise InvalidRequest("unexpected_message", f"an attach message was expected, not {type(message).__name__}")
    line = await channel.services.engine.connections.open(who, sandbox, port)
    await relay(channel, LineAttachment(line), message.window)
