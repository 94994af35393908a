"""The first word to a daemon that runs: said with plain sockets before anything heavy is imported.

Importing the client takes longer than starting a VMM, so ``stoker run`` asks for its machine first and imports while it boots. The
sandbox's lease is held on a connection of its own from the first moment; the client takes another before this one is let go.
Whatever is unusual (no daemon, another host, an API key, an error) is left to the client, which words it properly.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from stoker.settings import Settings

__all__ = ["Early", "create_early"]

PATIENCE = 10.0
LONGEST_HEAD = 65536
LONGEST_BODY = 1 << 20


@dataclass(frozen=True, slots=True)
class Early:
    """A sandbox that is being made. ``operation`` is the daemon's answer; leaving the block lets go of the first lease."""

    operation: bytes
    _connections: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for connection in self._connections:
            connection.close()


class _Unusual(Exception):
    """Not what we hoped for: the client goes the long way."""


def _open(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(PATIENCE)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def _ask(connection: socket.socket, line: str, headers: tuple[str, ...], body: bytes = b"") -> tuple[int, bytes]:
    """One HTTP/1.1 exchange: the status and the body."""
    head = "\r\n".join((f"{line} HTTP/1.1", "Host: localhost", *headers, f"Content-Length: {len(body)}", "", ""))
    connection.sendall(head.encode() + body)
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk or len(data) > LONGEST_HEAD:
            raise _Unusual
        data += chunk
    answer, _, rest = data.partition(b"\r\n\r\n")
    first, *fields = answer.decode("latin-1").split("\r\n")
    named = {name.strip().lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    length = int(named.get("content-length", "0"))
    if "transfer-encoding" in named or length > LONGEST_BODY:
        raise _Unusual
    while len(rest) < length:
        chunk = connection.recv(65536)
        if not chunk:
            raise _Unusual
        rest += chunk
    return int(first.split()[1]), rest


def _create(path: str, request: dict[str, Any]) -> Early:
    body = json.dumps(request).encode()
    with _open(path) as connection:
        status, answer = _ask(connection, "POST /v1/sandboxes?wait=false", ("Content-Type: application/json",), body)
    if status not in (200, 201, 202):
        raise _Unusual
    sandbox = json.loads(answer)["sandbox"]
    lease = _open(path)
    try:
        key = "c3Rva2VyLXJ1bi1lYXJseQ=="
        upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}")
        if _ask(lease, f"GET /v1/sandboxes/{sandbox}/lease", upgrade)[0] != 101:
            raise _Unusual
    except BaseException:
        lease.close()
        raise
    return Early(answer, [lease])


def create_early(settings: Settings, request: dict[str, Any]) -> Early | None:
    """Asks the daemon of this user's socket for a sandbox; None when the client has to do it."""
    if settings.url or settings.api_key:
        return None
    try:
        # In a directory of somebody else's (/tmp), whoever listens is not to be told anything.
        if os.stat(settings.run_dir).st_uid not in (0, os.geteuid()):
            return None
        return _create(str(settings.socket), request)
    except (OSError, ValueError, KeyError, IndexError, _Unusual):
        return None
