"""One attachment to a process: the WebSocket of :mod:`stoker.api.websocket`, seen from the client.

It keeps the offsets it has consumed, so that after a lost connection (the daemon was restarted, a network changed) another
attachment goes on at exactly the next byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec

from stoker.api import websocket as wire
from stoker.api.models import ErrorBody, ProcessInfo, StartProcess
from stoker.client.results import Output
from stoker.client.websocket import Closed
from stoker.errors import HostError, InternalError, StokerError, error_from_wire

if TYPE_CHECKING:
    from stoker.client.api import Api
    from stoker.client.websocket import WebSocket

__all__ = ["Attachment", "Offsets"]

WINDOW = 4 << 20
NAMES = {wire.STDOUT: "stdout", wire.STDERR: "stderr"}


class Offsets:
    """How far somebody has read both outputs; None is the oldest byte there is."""

    def __init__(self, stdout: int | None = None, stderr: int | None = None) -> None:
        self.stdout = stdout
        self.stderr = stderr

    def advance(self, output: Output) -> None:
        setattr(self, output.stream, output.offset + len(output.data))


class Attachment:
    """Iterate for :class:`Output`; after the end ``exit`` is set. ``write`` may be used by another task meanwhile."""

    def __init__(self, socket: WebSocket, attached: wire.Attached, offsets: Offsets) -> None:
        self._socket = socket
        self._offsets = offsets
        self.process: ProcessInfo = attached.process
        self.exit: ProcessInfo | None = None
        self._credit = attached.stdin_window
        self._window = attached.stdin_window
        self._changed = asyncio.Event()
        self._consumed = 0
        self.stdin_closed = False

    @classmethod
    async def attach(cls, api: Api, target: str, offsets: Offsets, *, lossless: bool = True) -> Attachment:
        """To a process that is there, from ``offsets`` on. What was lost before them shows as the first offset being larger."""
        first = wire.Attach(stdout=offsets.stdout, stderr=offsets.stderr, window=WINDOW, lossless=lossless)
        return await cls.open(api, target, first, offsets)

    @classmethod
    async def start(cls, api: Api, target: str, process: StartProcess, offsets: Offsets) -> Attachment:
        """Starts the process too, in the same round trip."""
        return await cls.open(api, target, wire.Start(process=process, window=WINDOW), offsets)

    @classmethod
    async def open(cls, api: Api, target: str, first: wire.Attach | wire.Start | wire.Ssh, offsets: Offsets) -> Attachment:
        socket = await api.websocket(target)
        try:
            await socket.send(wire.encode_message(first))
            message = _decode(await socket.receive())
            if not isinstance(message, wire.Attached):
                raise InternalError("bad_websocket", f"the daemon began an attachment with {type(message).__name__}")
        except BaseException:
            socket.abort()
            raise
        return cls(socket, message, offsets)

    @property
    def pending(self) -> int:
        """Bytes of input that the guest has not taken yet, as far as is known."""
        return self._window - self._credit

    def __aiter__(self) -> AsyncIterator[Output]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Output]:
        try:
            async for output in self._outputs():
                yield output
        except StokerError:
            self._wake(closed=True)  # or a writer would wait for ever for room that nobody makes
            raise

    async def _outputs(self) -> AsyncIterator[Output]:
        while True:
            frame = await self._socket.receive()
            if isinstance(frame, bytes):
                output = self._output(frame)
                yield output
                # Only now: what the consumer has not finished with counts against the window.
                await self._acknowledge(len(output.data))
                continue
            message = _decode(frame)
            if isinstance(message, wire.Exit):
                self.exit = self.process = message.process
                self._wake(closed=True)
                return
            if isinstance(message, wire.Ack):
                self._credit = min(self._window, self._credit + message.bytes)
                self._changed.set()
            elif isinstance(message, wire.StdinClosed):
                self._wake(closed=True)

    def _output(self, frame: bytes) -> Output:
        try:
            stream, offset, view = wire.decode_data(frame)
            name = NAMES[stream]
        except (ValueError, KeyError) as e:
            raise InternalError("bad_websocket", f"the daemon sent output that is none: {e}") from None
        expected: int | None = getattr(self._offsets, name)
        output = Output(name, bytes(view), offset, lost=max(0, offset - (expected or 0)) if expected is not None else 0)
        self._offsets.advance(output)
        return output

    async def _acknowledge(self, size: int) -> None:
        self._consumed += size
        if self._consumed >= WINDOW // 8:
            consumed, self._consumed = self._consumed, 0
            await self._socket.send(wire.encode_message(wire.Ack(bytes=consumed)))

    def _wake(self, *, closed: bool) -> None:
        self.stdin_closed = self.stdin_closed or closed
        self._changed.set()

    async def write(self, data: bytes | memoryview) -> bool:
        """Sends input as the guest takes it. False: nobody reads it any more. Somebody must iterate meanwhile."""
        view = memoryview(data)
        while view and not self.stdin_closed:
            if not self._credit:
                self._changed.clear()
                await self._changed.wait()
                continue
            size = min(len(view), self._credit, wire.MAX_PAYLOAD)
            self._credit -= size
            await self._socket.send(wire.encode_data(wire.STDIN, 0, view[:size]))
            view = view[size:]
        return not self.stdin_closed

    async def close_stdin(self) -> None:
        await self._socket.send(wire.encode_message(wire.CloseStdin()))

    async def resize(self, rows: int, cols: int) -> None:
        await self._socket.send(wire.encode_message(wire.Resize(rows=rows, cols=cols)))

    async def signal(self, signal: str | int, *, group: bool = True) -> None:
        await self._socket.send(wire.encode_message(wire.SendSignal(signal=signal, group=group)))

    async def close(self) -> None:
        """Lets go. The process goes on."""
        self._wake(closed=True)
        await self._socket.close()

    def abort(self) -> None:
        self._wake(closed=True)
        self._socket.abort()


def _decode(frame: str | bytes | Closed) -> wire.DaemonMessage:
    if isinstance(frame, Closed):
        raise HostError("connection_lost", f"the daemon ended the attachment (code {frame.code}) {frame.reason}".rstrip())
    try:
        message = wire.decode_daemon(frame)
    except msgspec.DecodeError as e:
        raise InternalError("bad_websocket", f"the daemon sent a message that is not understood: {e}") from None
    if isinstance(message, wire.Failure) and message.fatal:
        raise failure_of(message.error)
    return message


def failure_of(body: ErrorBody) -> StokerError:
    """The exception that an error on the wire stands for."""
    return error_from_wire(500, {name: getattr(body, name) for name in ("code", "message", "hint", "family", "details", "console")})
