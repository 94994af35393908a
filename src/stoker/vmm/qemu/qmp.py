"""A small QMP client: one connection, one command at a time, every wait and every line bounded.

The machine is driven by few commands, so events are only kept, the last 64, for whoever wants to look.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from pathlib import Path
from typing import Any

from stoker.errors import GuestError
from stoker.host.sockets import unix_address

__all__ = ["Qmp"]

LINE_BYTES = 1 << 20


class Qmp:
    """A monitor connection, greeted and ready. Made by :meth:`connect`; errors are :class:`GuestError`:
    ``vmm_gone`` (no monitor any more), ``vmm_unresponsive`` (no answer in time), ``vmm_refused`` (QEMU's own error)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sock: socket.socket, name: str) -> None:
        self._reader = reader
        self._writer = writer
        self._sock = sock
        self._name = name
        self._lock = asyncio.Lock()
        self._number = 0
        self.events: deque[dict[str, Any]] = deque(maxlen=64)
        self.broken = False

    @classmethod
    async def connect(cls, path: Path, name: str, *, timeout: float = 10.0) -> Qmp:
        try:
            async with asyncio.timeout(timeout):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    sock.setblocking(False)
                    with unix_address(path) as address:
                        await asyncio.get_running_loop().sock_connect(sock, address)
                    reader, writer = await asyncio.open_unix_connection(sock=sock, limit=LINE_BYTES)
                except BaseException:
                    sock.close()
                    raise
                qmp = cls(reader, writer, sock, name)
                try:
                    greeting = await qmp._receive()
                    if "QMP" not in greeting:
                        raise GuestError("vmm_gone", f"machine {name}: this is no QMP monitor")
                    await qmp._transact("qmp_capabilities", {})
                except BaseException:
                    writer.close()
                    raise
                return qmp
        except TimeoutError:
            raise GuestError("vmm_unresponsive", f"machine {name}: the monitor did not answer within {timeout:g} s") from None
        except OSError as e:
            raise GuestError("vmm_gone", f"machine {name}: no monitor: {e.strerror or e}") from None

    async def execute(self, command: str, /, *, timeout: float = 10.0, fd: int | None = None, **arguments: Any) -> Any:
        """Runs a command and gives its ``return``. A connection that broke on the way stays broken: connect anew.

        ``fd`` goes along with it (``add-fd``, ``getfd``); the caller's own copy stays open.
        """
        try:
            async with self._lock, asyncio.timeout(timeout):
                return await self._transact(command, arguments, fd)
        except TimeoutError:
            self.abort()
            raise GuestError("vmm_unresponsive", f"machine {self._name}: {command} did not end within {timeout:g} s") from None
        except asyncio.CancelledError:
            self.abort()  # its answer would be taken for the next command's
            raise

    async def _transact(self, command: str, arguments: dict[str, Any], fd: int | None = None) -> Any:
        if self.broken:
            raise GuestError("vmm_gone", f"machine {self._name}: the monitor is closed")
        self._number += 1
        request: dict[str, Any] = {"execute": command, "id": self._number}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        line = json.dumps(request).encode() + b"\n"
        try:
            if fd is None:
                self._writer.write(line)
                await self._writer.drain()
            else:
                # Commands go one at a time, so nothing is queued before this; and so short a line finds room.
                socket.send_fds(self._sock, [line], [fd])
        except OSError as e:
            self.abort()
            raise GuestError("vmm_gone", f"machine {self._name}: the monitor closed: {e.strerror or e}") from None
        while True:
            answer = await self._receive()
            if "event" in answer:
                self.events.append(answer)
            elif answer.get("id") == self._number:
                if "error" in answer:
                    error = answer["error"] if isinstance(answer["error"], dict) else {}
                    raise GuestError("vmm_refused", f"machine {self._name}: {command}: {error.get('desc', 'refused')}")
                return answer.get("return")

    async def _receive(self) -> dict[str, Any]:
        try:
            line = await self._reader.readuntil(b"\n")
            answer = json.loads(line)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError) as e:
            self.abort()
            reason = "the monitor closed" if isinstance(e, asyncio.IncompleteReadError | OSError) else "the monitor talks nonsense"
            raise GuestError("vmm_gone", f"machine {self._name}: {reason}") from None
        return answer if isinstance(answer, dict) else {}

    def abort(self) -> None:
        """Drops the connection at once."""
        self.broken = True
        self._writer.transport.abort()

    async def close(self) -> None:
        self.broken = True
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            pass  # it was closed from the other side before
