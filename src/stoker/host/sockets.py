"""Unix sockets under any path: the kernel's 108 bytes for a name are got round through ``/proc/self/fd``."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["listen_unix", "unix_address"]


@contextmanager
def unix_address(path: Path) -> Iterator[str]:
    """A short name for the socket ``path``, good within the block."""
    if len(os.fsencode(path)) < 100:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen_unix(path: Path, backlog: int = 4) -> socket.socket:
    """A listening stream socket, mode 0600. :class:`FileExistsError` or :class:`OSError` as the kernel says."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), 0o600)  # before bind, so that the name never has another mode
        with unix_address(path) as address:
            sock.bind(address)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock
