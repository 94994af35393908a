"""The kernel's table of connections, by ctnetlink: forgetting those of some addresses, or all of a namespace.

What a machine that is gone had open would otherwise be taken for the next machine's with its address. Both calls walk the kernel's
whole table, which takes milliseconds (10 for 262,144 buckets) however little is in it: not for the way of a create, and for
many addresses at once.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Iterator
from ipaddress import IPv4Address
from typing import Final

from stoker.errors import HostError
from stoker.host.nfnetlink import ACK, DUMP, answers, attributes, open_socket, send

__all__ = ["connections", "forget", "forget_all"]

GET, DELETE = 0x101, 0x102
TUPLE_ORIGINAL, TUPLE_REPLY, ID, ZONE = 1, 2, 12, 18
TUPLE_IP: Final = 1
IDENTIFYING: Final = (TUPLE_ORIGINAL, ID, ZONE)


def _ends(content: bytes) -> Iterator[bytes]:
    """Source and destination address of a tuple."""
    for kind, inner, _ in attributes(content):
        if kind == TUPLE_IP:
            yield from (address for _, address, _ in attributes(inner))


def _refused(error: OSError) -> HostError:
    return HostError("conntrack_refused", f"the kernel's table of connections: {os.strerror(error.errno or 0)}", "this needs root")


def _entries() -> list[tuple[frozenset[bytes], bytes]]:
    """Of each connection: the addresses at its ends, both ways, and the attributes that name it and no other, as they came."""
    found = []
    with open_socket() as sock:
        sock.settimeout(30)
        send(sock, GET, DUMP, b"")
        for body in answers(sock):
            parts = list(attributes(body))
            ends = frozenset(end for kind, content, _ in parts if kind in (TUPLE_ORIGINAL, TUPLE_REPLY) for end in _ends(content))
            found.append((ends, b"".join(whole for kind, _, whole in parts if kind in IDENTIFYING)))
    return found


def connections() -> list[frozenset[IPv4Address]]:
    """The addresses at the ends of every IPv4 connection of the calling thread's namespace. Raises ``conntrack_refused``."""
    try:
        return [frozenset(IPv4Address(end) for end in ends) for ends, _ in _entries()]
    except OSError as e:
        raise _refused(e) from None


def forget(addresses: Iterable[IPv4Address]) -> int:
    """Forgets every connection that one of the addresses opened or that leads to it, in the calling thread's namespace; says how
    many. Raises ``conntrack_refused``."""
    wanted: Collection[bytes] = frozenset(address.packed for address in addresses)
    forgotten = 0
    try:
        with open_socket() as sock:
            sock.settimeout(30)
            for name in [name for ends, name in _entries() if not ends.isdisjoint(wanted)]:
                try:
                    send(sock, DELETE, ACK, name)
                    list(answers(sock))
                    forgotten += 1
                except OSError as e:
                    if e.errno != errno.ENOENT:  # it has ended meanwhile
                        raise
    except OSError as e:
        raise _refused(e) from None
    return forgotten


def forget_all() -> None:
    """Forgets every IPv4 connection of the calling thread's namespace. Raises ``conntrack_refused``."""
    try:
        with open_socket() as sock:
            sock.settimeout(30)
            send(sock, DELETE, ACK, b"")
            list(answers(sock))
    except OSError as e:
        raise _refused(e) from None
