"""A WebSocket on a process: output within the client's window, input within ours, so that neither end piles anything up."""

from __future__ import annotations

from collections import deque

import anyio
import structlog

from stoker.api import websocket as wire
from stoker.api.models import Principal
from stoker.errors import Conflict, InvalidRequest, StokerError
from stoker.server.channel import Channel, body_of, decode
from stoker.server.ports import Attachment
from stoker.server.routes.processes import signal_number

__all__ = ["attach_to", "relay", "start_and_attach"]

_log = structlog.get_logger("stoker.server")


class _Window:
    """Bytes that may still be sent before the other side says more."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._room = anyio.Event()

    async def take(self, size: int) -> None:
        """Waits until there is any room, then takes ``size``, even where it is a little more than the room."""
        while self._used >= self._size:
            self._room = anyio.Event()
            await self._room.wait()
        self._used += size

    def give(self, size: int) -> None:
        self._used = max(0, self._used - size)
        self._room.set()


class _Relay:
    """Three tasks: what the process says, what the client says, and what the client's input waits for."""

    def __init__(self, channel: Channel, attachment: Attachment, window: int) -> None:
        self._channel = channel
        self._attachment = attachment
        self._window = _Window(window)
        self._input: deque[bytes | None] = deque()
        self._waiting = 0
        self._more = anyio.Event()

    async def run(self) -> None:
        attached = wire.Attached(process=self._attachment.info)
        await self._channel.say(attached)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._listen)
            tasks.start_soon(self._feed)
            await self._speak()
            tasks.cancel_scope.cancel()

    async def _speak(self) -> None:
        while (piece := await self._attachment.read()) is not None:
            data = memoryview(piece.data)
            for start in range(0, len(data), wire.MAX_PAYLOAD):
                part = data[start : start + wire.MAX_PAYLOAD]
                await self._window.take(len(part))
                await self._channel.data(piece.stream, piece.offset + start, part)
        ended = await self._attachment.wait()
        await self._channel.say(wire.Exit(process=ended))
        await self._channel.close()

    async def _listen(self) -> None:
        while True:
            data = await self._channel.receive()
            if isinstance(data, bytes):
                self._queue(data)
            else:
                await self._control(decode(data))

    def _queue(self, frame: bytes) -> None:
        try:
            stream, _, data = wire.decode_data(frame)
        except ValueError as e:
            raise InvalidRequest("bad_frame", str(e)) from None
        if stream != wire.STDIN:
            raise InvalidRequest("bad_frame", "a client writes to stdin (stream 0) only")
        self._waiting += len(data)
        if self._waiting > wire.STDIN_WINDOW:
            raise InvalidRequest("window_exceeded", f"more than {wire.STDIN_WINDOW} bytes of input are unacknowledged")
        self._input.append(bytes(data))
        self._more.set()

    async def _control(self, message: wire.ClientMessage) -> None:
        if isinstance(message, wire.Ack):
            self._window.give(message.bytes)
        elif isinstance(message, wire.CloseStdin):
            self._input.append(None)
            self._more.set()
        elif isinstance(message, (wire.Resize, wire.SendSignal)):
            try:
                if isinstance(message, wire.Resize):
                    await self._attachment.resize(message.rows, message.cols)
                else:
                    await self._attachment.signal(signal_number(message.signal), group=message.group)
            except StokerError as e:  # the process may just have ended; the client decides whether that matters
                await self._channel.say(wire.Failure(error=body_of(e), fatal=False))
        else:
            raise InvalidRequest("unexpected_message", f"{type(message).__name__} has no place here")

    async def _feed(self) -> None:
        closed = False
        while True:
            while not self._input:
                self._more = anyio.Event()
                await self._more.wait()
            data = self._input.popleft()
            try:
                if closed:
                    pass
                elif data is None:
                    closed = True
                    await self._attachment.close_stdin()
                elif data:
                    await self._attachment.write(data)
            except Conflict:
                closed = True
                await self._channel.say(wire.StdinClosed())
            if data:
                self._waiting -= len(data)
                await self._channel.say(wire.Ack(bytes=len(data)))


async def relay(channel: Channel, attachment: Attachment, window: int) -> None:
    try:
        await _Relay(channel, attachment, window).run()
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(5):
            await attachment.aclose()


async def attach_to(channel: Channel, who: Principal, sandbox: str, process: int | str) -> None:
    message = await channel.message()
    if not isinstance(message, wire.Attach):
        raise InvalidRequest("unexpected_message", f"an attach message was expected, not {type(message).__name__}")
    processes = channel.services.engine.processes
    attachment = await processes.attach(who, sandbox, process, message.stdout, message.stderr, lossless=message.lossless)
    await relay(channel, attachment, message.window)


async def start_and_attach(channel: Channel, who: Principal, sandbox: str) -> None:
    message = await channel.message()
    if not isinstance(message, wire.Start):
        raise InvalidRequest("unexpected_message", f"a start message was expected, not {type(message).__name__}")
    attachment = await channel.services.engine.processes.open(who, sandbox, message.process, lossless=message.lossless)
    await relay(channel, attachment, message.window)
