"""Ports of the host's that its own programs have: a published port would take them away without a word."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable

from stoker.errors import Conflict
from stoker.network.egress import Protocol
from stoker.network.rules import Publication

__all__ = ["require_free"]


def require_free(ports: Iterable[Publication]) -> None:
    """In the calling thread's namespace. Raises ``port_in_use`` (Conflict), with the port and its protocol in words.

    Only who listens has a TCP port: connections that have just ended do not count. An address that is not the host's is not judged.
    """
    for port in ports:
        stream = port.protocol is Protocol.TCP
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM) as probe:
            if stream:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            where = str(port.host_address or "")
            try:
                probe.bind((where, port.host_port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    name = f"{port.protocol} {where + ':' if where else ''}{port.host_port}"
                    raise Conflict(
                        "port_in_use",
                        f"a program of this host has {name}",
                        f"choose another port; ss -lnp sport = :{port.host_port}",
                    ) from None
                if error.errno != errno.EADDRNOTAVAIL:
                    raise Conflict("port_refused", f"{port.protocol} {port.host_port}: {os.strerror(error.errno or 0)}") from None
