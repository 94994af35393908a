"""Messages of the kernel's packet filter on a netlink socket of ours: what :mod:`.conntrack` and :mod:`.nflog` have in common.

The socket belongs to the namespace that the thread was in which opened it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Final

from stoker.host.addresses import parse_messages

__all__ = ["ACK", "DUMP", "answers", "attribute", "attributes", "open_socket", "send"]

NETLINK_NETFILTER: Final = 12
NLMSG_ERROR, NLMSG_DONE = 2, 3
REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
HEADER: Final = 4
"""Bytes of an nfgenmsg: family, version, resource (big-endian)."""


def open_socket() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Kind, content and the whole of each attribute."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return
        padded = (length + 3) & ~3
        yield kind & 0x3FFF, data[4:length], data[:padded]
        data = data[padded:]


def send(sock: socket.socket, kind: int, flags: int, body: bytes, *, family: int = socket.AF_INET, resource: int = 0) -> None:
    """``kind``: subsystem and message (``subsystem << 8 | message``)."""
    header = struct.pack("=BB", family, 0) + struct.pack("!H", resource)
    sock.send(struct.pack("=IHHII", 16 + HEADER + len(body), kind, REQUEST | flags, 1, 0) + header + body)


def answers(sock: socket.socket) -> Iterator[bytes]:
    """The attributes of each message that comes, up to the end or the acknowledgement. Raises OSError."""
    while True:
        for kind, body in parse_messages(sock.recv(1 << 16)):
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                number = -struct.unpack_from("=i", body)[0]
                if number:
                    raise OSError(number, "refused")
                return
            yield body[HEADER:]
