"""A channel of an ssh connection joined with an attachment: both ways, each held up by the other's reader.

What a client has sent and nobody has taken is at most the channel's window; of what the guest has written one piece at a time is
here, and what ssh's own window does not let through waits in the guest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from stoker.errors import Conflict, StokerError

if TYPE_CHECKING:
    from stoker.server.ports import Attachment

__all__ = ["WINDOW", "Pump"]

WINDOW = 1 << 20
"""Bytes that a client may send ahead on one channel."""
STDERR = 2
EXTENDED_STDERR = 1


class Pump:
    """What asyncssh calls on a session, for any kind of channel."""

    def __init__(self) -> None:
        self.chan: Any = None
        self._input: deque[bytes | None] = deque()
        self._waiting = 0
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def connection_made(self, chan: Any) -> None:
        self.chan = chan
        chan.set_write_buffer_limits(high=256 << 10)

    def data_received(self, data: bytes, datatype: Any) -> None:
        self._input.append(data)
        self._waiting += len(data)
        if self._waiting > WINDOW // 2:
            self.chan.pause_reading()
        self._more.set()

    def eof_received(self) -> bool:
        self._input.append(None)
        self._more.set()
        return True  # the other direction goes on

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    async def feed(self, attachment: Attachment) -> None:
        """What comes from the client, to its end. When nobody takes it any more it is dropped."""
        closed = False
        while True:
            while not self._input:
                self._more.clear()
                await self._more.wait()
            data = self._input.popleft()
            try:
                if data is None:
                    await attachment.close_stdin()
                    return
                if not closed:
                    await attachment.write(data)
            except Conflict:
                closed = True
            except StokerError:
                return  # whoever reads from it says why
            if data is None:
                return
            self._waiting -= len(data)
            if self._waiting <= WINDOW // 4:
                self.chan.resume_reading()

    def send_error(self, data: bytes) -> None:
        self.chan.write(data, EXTENDED_STDERR)

    async def drain(self, attachment: Attachment) -> None:
        """All that the guest writes. ``BrokenPipeError``: the client has closed the channel."""
        while (piece := await attachment.read()) is not None:
            if piece.stream == STDERR:
                self.send_error(bytes(piece.data))
            else:
                self.chan.write(bytes(piece.data))
            await self._room.wait()
