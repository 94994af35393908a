"""The kernel's table of connections, by ctnetlink: forgetting those of one address, or all of a namespace.

What a machine that is gone had open would otherwise be taken for the next machine's with its address. Both calls walk the kernel's
whole table, which takes milliseconds (10 for 262,144 buckets) however little is in it: not for the way of a create, and for
many addresses at once.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from ipaddress import IPv4Address
from typing import Final

from stoker.errors import HostError
from stoker.host.addresses import parse_messages

__all__ = ["forget", "forget_all"]

NETLINK_NETFILTER: Final = 12
CT_GET, CT_DELETE = 0x101, 0x102
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
TUPLE_ORIGINAL, TUPLE_REPLY, ID, ZONE = 1, 2, 12, 18
TUPLE_IP: Final = 1
IDENTIFYING: Final = (TUPLE_ORIGINAL, ID, ZONE)
HEADER: Final = struct.pack("=BBH", socket.AF_INET, 0, 0)


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


def _attributes(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Kind, content and the whole of each attribute."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return
        padded = (length + 3) & ~3
        yield kind & 0x3FFF, data[4:length], data[:padded]
        data = data[padded:]


def _ends(tuple_: bytes) -> Iterator[bytes]:
    """Source and destination address of a tuple."""
    for kind, content, _ in _attributes(tuple_):
        if kind == TUPLE_IP:
            yield from (address for _, address, _ in _attributes(content))


def _identity(entry: bytes, addresses: Collection[bytes]) -> bytes:
    """The attributes of an entry that name it and no other, as they came; nothing when it has none of the addresses at an end."""
    found = list(_attributes(entry))
    tuples = [content for kind, content, _ in found if kind in (TUPLE_ORIGINAL, TUPLE_REPLY)]
    if not any(end in addresses for content in tuples for end in _ends(content)):
        return b""
    return b"".join(whole for kind, _, whole in found if kind in IDENTIFYING)


def forget(addresses: Iterable[IPv4Address]) -> int:
    """Forgets every connection that one of the addresses opened or that leads to it, in the calling thread's namespace; says how
    many."""
    wanted, forgotten = frozenset(address.packed for address in addresses), 0
    try:
        with _socket() as sock:
            _send(sock, CT_GET, NLM_F_DUMP, b"")
            for entry in [name for body in _answers(sock) if (name := _identity(body, wanted))]:
                try:
                    _send(sock, CT_DELETE, NLM_F_ACK, entry)
                    list(_answers(sock))
                    forgotten += 1
                except OSError as e:
                    if e.errno != errno.ENOENT:  # it has ended meanwhile
                        raise
    except OSError as e:
        raise HostError("conntrack_refused", f"connections cannot be forgotten: {e.strerror}") from None
    return forgotten


def forget_all() -> None:
    """Forgets every IPv4 connection of the calling thread's namespace."""
    try:
        with _socket() as sock:
            _send(sock, CT_DELETE, NLM_F_ACK, b"")
            list(_answers(sock))
    except OSError as e:
        raise HostError("conntrack_refused", f"connections cannot be forgotten: {e.strerror}") from None
