"""The kernel's table of connections, by ctnetlink: forgetting those of some addresses, or all of a namespace.

What a machine that is gone had open would otherwise be taken for the next machine's with its address. Both calls walk the kernel's
whole table, which takes milliseconds (10 for 262,144 buckets) however little is in it: not for the way of a create, and for
many addresses at once.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from stoker.errors import HostError
from stoker.host.nfnetlink import ACK, DUMP, answers, attributes, open_socket, send

__all__ = ["Connection", "connections", "forget", "forget_all"]

GET, DELETE = 0x101, 0x102
TUPLE_ORIGINAL, TUPLE_REPLY, STATUS, ID, ZONE = 1, 2, 3, 12, 18
TUPLE_IP, TUPLE_PROTOCOL = 1, 2
SOURCE, DESTINATION = 1, 2
SOURCE6, DESTINATION6 = 3, 4
NUMBER, DESTINATION_PORT = 1, 3
IDENTIFYING: Final = (TUPLE_ORIGINAL, ID, ZONE)
SEEN_REPLY: Final = 2


@dataclass(frozen=True, slots=True)
class Connection:
    """Who opened it, to which address and port (0: has none), who answers, and to whom: other addresses where those were
    translated. ``answered``: something came back."""

    source: IPv4Address | IPv6Address
    destination: IPv4Address | IPv6Address
    protocol: int
    port: int
    answering: IPv4Address | IPv6Address
    name: bytes
    """The attributes that name it and no other, as they came."""
    towards: IPv4Address | IPv6Address
    answered: bool


def _inner(content: bytes, part: int) -> dict[int, bytes]:
    """The addresses, or the protocol's part, of a tuple."""
    for kind, inner, _ in attributes(content):
        if kind == part:
            return {number: value for number, value, _ in attributes(inner)}
    return {}


def _connection(body: bytes) -> Connection | None:
    parts = list(attributes(body))
    tuples = {kind: content for kind, content, _ in parts if kind in (TUPLE_ORIGINAL, TUPLE_REPLY)}
    if len(tuples) != 2:
        return None
    ends, answer = _inner(tuples[TUPLE_ORIGINAL], TUPLE_IP), _inner(tuples[TUPLE_REPLY], TUPLE_IP)
    transport = _inner(tuples[TUPLE_ORIGINAL], TUPLE_PROTOCOL)
    source, destination = (SOURCE, DESTINATION) if SOURCE in ends else (SOURCE6, DESTINATION6)
    return Connection(
        ip_address(ends[source]),
        ip_address(ends[destination]),
        transport.get(NUMBER, b"\0")[0],
        int.from_bytes(transport.get(DESTINATION_PORT, b""), "big"),
        ip_address(answer[source]),
        b"".join(whole for kind, _, whole in parts if kind in IDENTIFYING),
        ip_address(answer[destination]),
        any(kind == STATUS and int.from_bytes(content, "big") & SEEN_REPLY for kind, content, _ in parts),
    )


def _refused(error: OSError) -> HostError:
    return HostError("conntrack_refused", f"the kernel's table of connections: {os.strerror(error.errno or 0)}", "this needs root")


def connections() -> list[Connection]:
    """Every connection of the calling thread's namespace. Raises ``conntrack_refused``."""
    try:
        with open_socket() as sock:
            sock.settimeout(30)
            send(sock, GET, DUMP, b"", family=socket.AF_UNSPEC)
            return [found for body in answers(sock) if (found := _connection(body)) is not None]
    except OSError as e:
        raise _refused(e) from None


def forget(those: Callable[[Connection], bool]) -> int:
    """Forgets the connections of which it is true, in the calling thread's namespace; says how many.

    Raises ``conntrack_refused``.
    """
    wanted, forgotten = [found for found in connections() if those(found)], 0
    try:
        with open_socket() as sock:
            sock.settimeout(30)
            for found in wanted:
                try:
                    family = socket.AF_INET if found.source.version == 4 else socket.AF_INET6
                    send(sock, DELETE, ACK, found.name, family=family)
                    list(answers(sock))
                    forgotten += 1
                except OSError as e:
                    if e.errno != errno.ENOENT:  # it has ended meanwhile
                        raise
    except OSError as e:
        raise _refused(e) from None
    return forgotten


def forget_all() -> None:
    """Forgets every connection of the calling thread's namespace. Raises ``conntrack_refused``."""
    try:
        with open_socket() as sock:
            sock.settimeout(30)
            send(sock, DELETE, ACK, b"", family=socket.AF_UNSPEC)
            list(answers(sock))
    except OSError as e:
        raise _refused(e) from None
