"""A connection into a guest: what :meth:`stoker.guest.agent.Agent.connect` gives, and the addresses it takes.

In the agent it is a process without a process: offsets, acknowledgements, windows and reattaching are those of a
:class:`~stoker.guest.process.Process`. So a persistent one goes on after a lost channel and after a pause of the machine.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from typing import Final

from stoker.errors import GuestError, StokerError
from stoker.guest.process import Process

__all__ = ["FIRST_CONNECTION", "RING", "Connection", "inet", "unix"]

FIRST_CONNECTION: Final = 1 << 27
"""Ids of processes are below, of connections from here on."""
RING: Final = 128 << 10
"""Bytes from the guest that may wait on either side."""
SUN_PATH: Final = 107


def inet(port: int, address: str = "127.0.0.1") -> bytes:
    """A TCP address as the guest's ``connect(2)`` takes it (Linux, little-endian)."""
    parsed = ipaddress.ip_address(address)
    if parsed.version == 4:
        return struct.pack("<H", socket.AF_INET) + struct.pack(">H", port) + parsed.packed + bytes(8)
    return struct.pack("<H", socket.AF_INET6) + struct.pack(">HI", port, 0) + parsed.packed + bytes(4)


def unix(path: str) -> bytes:
    """The address of a Unix socket; ``@name`` is an abstract one."""
    raw = os.fsencode(path)
    if not 0 < len(raw) <= SUN_PATH:
        raise ValueError(f"a socket's path has 1 to {SUN_PATH} bytes")
    raw = b"\0" + raw[1:] if raw[:1] == b"@" else raw + b"\0"
    return struct.pack("<H", socket.AF_UNIX) + raw


class Connection:
    """Both directions of one. Each end can be closed by itself; memory is bounded by the windows of the two streams."""

    def __init__(self, process: Process) -> None:
        self.process = process

    @property
    def ended(self) -> bool:
        """Both directions are over, or the guest does not know it any more."""
        return self.process.status is not None or self.process.error is not None

    async def read(self, limit: int = -1) -> bytes:
        """The next bytes as soon as there are some; ``b""`` when the other end has closed. ``connection_reset`` when it broke."""
        data = await self.process.stdout.read(limit)
        status = self.process.status
        if not data and status is not None and status.code:
            why = os.strerror(status.code)
            raise GuestError("connection_reset", f"the connection broke in the guest: {why}", details={"errno": status.code})
        return data

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Returns when the last of it is on its way. ``Conflict("stdin_closed")``: the other end takes no more."""
        await self.process.stdin.write(data)

    def close_write(self) -> None:
        """The end of file for the other end, behind everything written."""
        self.process.stdin.close()

    def abort(self) -> None:
        """Closes it in both directions, whatever was on its way. Again is no error."""
        self.process.persistent = False
        self.process.dismiss()
        self.process.abandon(GuestError("connection_closed", "the connection was closed by this side"))

    async def aclose(self) -> None:
        """Once what was written is taken (while the other end lives), the connection is closed."""
        self.close_write()
        try:
            await self.process.stdin.drain()
        except StokerError:
            pass  # it is gone: so is what was written
        finally:
            self.abort()


def refused(error: StokerError) -> bool:
    """Whether nobody listens there."""
    return error.code == "unreachable" and error.details.get("errno") == errno.ECONNREFUSED
