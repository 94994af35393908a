"""What the proxy itself answers: why, and how to mend it, as JSON for programs that ask for it, else as text."""

from __future__ import annotations

import json

from stoker.errors import CapacityExhausted, Conflict, HostError, NotFound, StokerError, error_to_wire
from stoker.server.proxy.heads import REASONS, Headers

__all__ = ["page", "status_of"]

RETRY_AFTER = 5
TIMEOUTS = frozenset(("port_timeout", "connect_timeout", "response_timeout"))


def status_of(error: StokerError) -> int:
    """The status of an answer in a service's place."""
    if isinstance(error, NotFound):
        return 404
    if error.code in TIMEOUTS:
        return 504
    if isinstance(error, CapacityExhausted | HostError) or error.code in ("wake_timeout", "agent_unreachable", "proxy_busy"):
        return 503
    if isinstance(error, Conflict):
        return 503  # a sandbox that is stopped, or just begins
    return error.status if error.status in (400, 401, 405, 408, 413, 417, 414, 431, 501, 504, 505) else 502


def page(status: int, error: StokerError, headers: Headers, *, head_only: bool, close: bool) -> bytes:
    """The whole response."""
    accept = b",".join(value for name, value in headers if name == b"accept").lower()
    if b"application/json" in accept or b"+json" in accept:
        kind, body = b"application/json", json.dumps(error_to_wire(error)).encode()
    else:
        text = f"{status} {REASONS.get(status, b'').decode()}: {error.message} [{error.code}]\n"
        kind, body = b"text/plain; charset=utf-8", (text + (f"hint: {error.hint}\n" if error.hint else "")).encode()
    lines = [
        b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n" % (status, REASONS.get(status, b""), kind, len(body)),
        b"cache-control: no-store\r\nx-stoker-proxy: %b\r\nx-content-type-options: nosniff\r\n" % error.code.encode(),
    ]
    if status == 503:
        lines.append(b"retry-after: %d\r\n" % RETRY_AFTER)
    if close:
        lines.append(b"connection: close\r\n")
    return b"".join((*lines, b"\r\n", b"" if head_only else body))
