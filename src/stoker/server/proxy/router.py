"""From a Host header to a service, and who may use it."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from stoker.errors import NotFound
from stoker.server.line_ports import Connections
from stoker.server.proxy.backend import Backend, ChannelBackend
from stoker.server.proxy.direct import DirectBackend
from stoker.server.proxy.heads import Head, Headers, authority
from stoker.server.proxy.pool import Pool

__all__ = ["COOKIE", "HEADER", "Router", "Target", "proxy_token"]

HEADER: Final = b"x-stoker-token"
COOKIE: Final = b"stoker-token"
LABEL: Final = re.compile(r"([1-9][0-9]{0,4})-([a-z0-9][a-z0-9._-]{0,63})\Z")
EVENTS: Final = b"text/event-stream"
POOLS: Final = 4096
NOTHING: Final[frozenset[bytes]] = frozenset()
EXPECT: Final = frozenset((b"expect",))


def proxy_token(secret: bytes, sandbox: str) -> str:
    """The token of a sandbox: whoever has it may use its ports by the proxy. It cannot be revoked but with the sandbox."""
    return hmac.new(secret, b"proxy\0" + sandbox.encode(), hashlib.sha256).hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes, and its headers without what was for the proxy."""

    pool: Pool
    headers: Headers
    without: frozenset[bytes]


class Router:
    """``fixed`` are services by their whole name in place of a sandbox's: for measurements, and what else the host offers."""

    def __init__(
        self, connections: Connections, domain: str, secret: bytes, fixed: dict[str, Callable[[], Backend]] | None = None
    ) -> None:
        self._connections = connections
        self._domain = "." + domain.lower().strip(".")
        self._secret = secret
        self._fixed = fixed or {}
        self.pools: dict[object, Pool] = {}

    def find(self, head: Head, headers: Headers) -> Target:
        """The service. What is unknown, and what is not for this client, is the same ``NotFound``."""
        name, _ = authority(head.host)
        without = NOTHING if head.expects else EXPECT
        fixed = self._fixed.get(name)
        if fixed is not None:
            return Target(self._pool(fixed()), headers, without)
        found = LABEL.match(name.removesuffix(self._domain)) if name.endswith(self._domain) else None
        port = int(found[1]) if found is not None else 0
        if found is None or port > 65535:
            raise NotFound("no_such_service", "there is no such service", f"the name is PORT-SANDBOX{self._domain}")
        route = self._connections.route(found[2])
        shown, headers = _shown(headers)
        if route is None or route.policy == "none":
            # As long as for one that is there: which names exist is nobody's business.
            self._right(found[2], shown)
            raise _hidden()
        if (route.policy == "token" or not (route.local or route.policy == "open")) and not self._right(route.sandbox, shown):
            raise _hidden()
        kind = DirectBackend if route.direct and not _lasts(head, headers) else ChannelBackend
        return Target(self._pool(kind(self._connections, route.sandbox, port)), headers, without | {HEADER})

    def _right(self, sandbox: str, shown: list[bytes]) -> bool:
        right = proxy_token(self._secret, sandbox).encode()
        return True in [hmac.compare_digest(one, right) for one in shown]

    def _pool(self, backend: Backend) -> Pool:
        pool = self.pools.get(backend.key)
        if pool is None:
            if len(self.pools) >= POOLS:
                self.pools = {key: pool for key, pool in self.pools.items() if pool.count}
            pool = self.pools[backend.key] = Pool(backend)
        return pool

    def sweep(self, before: float) -> None:
        """Closes connections that have rested since ``before``."""
        for key, pool in list(self.pools.items()):
            pool.sweep(before)
            if not pool.count:
                del self.pools[key]

    def close(self) -> None:
        self.sweep(float("inf"))


def _lasts(head: Head, headers: Headers) -> bool:
    """What is asked for is to outlive a pause of the machine: a WebSocket (or another upgrade), a stream of events."""
    return bool(head.upgrade) or any(name == b"accept" and EVENTS in value.lower() for name, value in headers)


def _hidden() -> NotFound:
    return NotFound("no_such_service", "there is no such service, or it wants another token", "stoker ls; stoker url NAME PORT")


def _shown(headers: Headers) -> tuple[list[bytes], Headers]:
    """The tokens a request shows, and its headers without the cookie among them."""
    shown = [value for name, value in headers if name == HEADER]
    if not any(name == b"cookie" and COOKIE in value for name, value in headers):
        return shown, headers
    kept: Headers = []
    for name, value in headers:
        if name == b"cookie":
            others = []
            for pair in value.split(b";"):
                key, _, content = pair.strip().partition(b"=")
                if key == COOKIE:
                    shown.append(content)
                else:
                    others.append(pair.strip())
            if not others:
                continue
            value = b"; ".join(others)
        kept.append((name, value))
    return shown, kept
