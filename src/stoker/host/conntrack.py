"""The kernel's table of connections, by ctnetlink: forgetting those of one address, or all of a namespace.

What a machine that is gone had open would otherwise be taken for the next machine's with its address. Both calls walk the kernel's
whole table, which takes milliseconds where that is big: not for the way of a create.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Final

from stoker.errors import HostError
from stoker.host.addresses import parse_messages

__all__ = ["forget", "forget_all"]

NETLINK_NETFILTER: Final = 12
CT_GET, CT_DELETE = 0x101, 0x102
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NESTED: Final = 0x8000
TUPLE_ORIGINAL, TUPLE_REPLY, ID, ZONE, FILTER = 1, 2, 12, 18, 25
IDENTIFYING: Final = (TUPLE_ORIGINAL, ID, ZONE)
BY_SOURCE: Final = 1
"""CTA_FILTER_F_CTA_IP_SRC: of a tuple, only its source address is compared."""
HEADER: Final = struct.pack("=BBH", socket.AF_INET, 0, 0)


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _tuple(kind: int, source: IPv4Address) -> bytes:
    return _attribute(NESTED | kind, _attribute(NESTED | 1, _attribute(1, source.packed)))


def _filter(kind: int) -> bytes:
    flags = {TUPLE_ORIGINAL: 0, TUPLE_REPLY: 0, kind: BY_SOURCE}
    return _attribute(NESTED | FILTER, b"".join(_attribute(number, struct.pack("=I", value)) for number, value in flags.items()))


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    sock.settimeout(30)
    return sock


def _send(sock: socket.socket, kind: int, flags: int, body: bytes) -> None:
    sock.send(struct.pack("=IHHII", 20 + len(body), kind, NLM_F_REQUEST | flags, 1, 0) + HEADER + body)


def _answers(sock: socket.socket) -> Iterator[bytes]:
    """The bodies of what comes, up to the end or the acknowledgement. Raises OSError."""
    while True:
        for kind, body in parse_messages(sock.recv(1 << 16)):
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                number = -struct.unpack_from("=i", body)[0]
                if number:
                    raise OSError(number, "conntrack")
                return
            yield body[4:]


def _identity(entry: bytes) -> bytes:
    """The attributes of an entry that name it and no other, as they came."""
    kept = b""
    while len(entry) >= 4:
        length, kind = struct.unpack_from("=HH", entry)
        if length < 4:
            break
        padded = (length + 3) & ~3
        if kind & 0x3FFF in IDENTIFYING:
            kept += entry[:padded]
        entry = entry[padded:]
    return kept


def forget(address: IPv4Address) -> int:
    """Forgets every connection that an address opened or that leads to it, in the calling thread's namespace; says how many."""
    forgotten = 0
    try:
        with _socket() as sock:
            for kind in (TUPLE_ORIGINAL, TUPLE_REPLY):
                _send(sock, CT_GET, NLM_F_DUMP, _tuple(kind, address) + _filter(kind))
                for entry in [_identity(body) for body in _answers(sock)]:
                    try:
                        _send(sock, CT_DELETE, NLM_F_ACK, entry)
                        list(_answers(sock))
                        forgotten += 1
                    except OSError as e:
                        if e.errno != errno.ENOENT:  # it has ended meanwhile
                            raise
    except OSError as e:
        raise HostError("conntrack_refused", f"the connections of {address} cannot be forgotten: {e.strerror}") from None
    return forgotten


def forget_all() -> None:
    """Forgets every IPv4 connection of the calling thread's namespace."""
    try:
        with _socket() as sock:
            _send(sock, CT_DELETE, NLM_F_ACK, b"")
            list(_answers(sock))
    except OSError as e:
        raise HostError("conntrack_refused", f"connections cannot be forgotten: {e.strerror}") from None
