"""Connections to services: each parses responses, and rests between two requests."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from stoker.errors import GuestError, HostError
from stoker.server.proxy.heads import BadHead, Headers, judge

if TYPE_CHECKING:
    from stoker.server.proxy.backend import Backend, Wire
    from stoker.server.proxy.exchange import Exchange

__all__ = ["Pool", "Upstream"]

IDLE_KEPT: Final = 64
IDLE_SECONDS: Final = 15.0
AT_A_TIME: Final = 200
"""Connections to one service; the agent of a guest has 256 for all."""
MAX_HEAD: Final = 64 << 10
MAX_HEADERS: Final = 128


class Pool:
    """The connections to one service."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.idle: deque[Upstream] = deque()
        self.count = 0

    def take(self) -> Upstream | None:
        """One that rests, if there is one that is still good."""
        while self.idle:
            up = self.idle.pop()
            if self.backend.use(up.wire):
                up.reused = True
                return up
            up.abort()
        return None

    async def connect(self) -> Upstream:
        if self.count >= AT_A_TIME:
            raise HostError("proxy_busy", f"{AT_A_TIME} requests to this port are being answered already", "try again")
        self.count += 1
        up = Upstream(self)
        try:
            await self.backend.connect(up)
        except BaseException:
            self.count -= 1
            raise
        return up

    def put(self, up: Upstream) -> None:
        if len(self.idle) >= IDLE_KEPT or up.wire.is_closing():
            up.abort()
            return
        self.backend.rest(up.wire)
        up.resting_since = asyncio.get_running_loop().time()
        self.idle.append(up)

    def sweep(self, before: float) -> None:
        """Closes those that have rested for long."""
        while self.idle and self.idle[0].resting_since < before:
            self.idle.popleft().abort()

    def close(self) -> None:
        self.sweep(float("inf"))


class Upstream(asyncio.Protocol):
    """One connection to a service. It answers one exchange at a time."""

    wire: Wire

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.exchange: Exchange | None = None
        self.reused = False
        self.resting_since = 0.0
        self.tunnel = False
        self._lost = False
        self._parser: HttpResponseParser | None = None
        self._headers: Headers = []
        self._reason = b""
        self._head_bytes = self._header_bytes = 0
        self._in_head = True
        self._until_close = False
        self._done = False
        self._keep = False
        self._trailing: Headers = []

    def begin(self, exchange: Exchange) -> None:
        """The next request is about to be written."""
        self.exchange = exchange
        self._done = False
        self._expect_head()

    def _expect_head(self) -> None:
        self._parser = HttpResponseParser(self)
        self._headers, self._trailing = [], []
        self._reason = b""
        self._head_bytes = self._header_bytes = 0
        self._in_head = True
        self._until_close = False

    def abort(self) -> None:
        self.exchange = None
        self.wire.abort()

    # -- asyncio's --------------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.wire = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            self.wire.abort()  # nobody asked
            return
        if self.tunnel:
            exchange.front.write(data)
            return
        if self._in_head:
            self._head_bytes += len(data)
        assert self._parser is not None
        rest = b""
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        except BadHead as bad:
            exchange.broken(GuestError("bad_response", f"the service's answer cannot be sent on: {bad.why}"))
            return
        except HttpParserError as error:
            # A callback's own exception is its cause.
            why = error.__context__.why if isinstance(error.__context__, BadHead) else str(error)
            exchange.broken(GuestError("bad_response", f"the service's answer is not HTTP/1.1: {why}"))
            return
        if self._in_head and self._head_bytes > MAX_HEAD:
            exchange.broken(GuestError("bad_response", f"the head of the service's answer has more than {MAX_HEAD} bytes"))
            return
        exchange.front.flush()
        if self.tunnel:
            if rest:
                exchange.front.write(rest)
        elif self._done:
            self._finish(exchange)

    def eof_received(self) -> bool:
        exchange = self.exchange
        if self.tunnel and exchange is not None:
            exchange.front.half_close()
            return True
        return False

    def connection_lost(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        self.pool.count -= 1
        if self in self.pool.idle:
            self.pool.idle.remove(self)
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return
        if self.tunnel:
            exchange.front.close()
        elif self._until_close and error is None:
            exchange.response_end([])
            exchange.front.flush()
            exchange.finish()
        else:
            exchange.lost(self, error)

    def pause_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.front.hold("service")

    def resume_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.front.go_on("service")

    # -- the parser's -----------------------------------------------------------------------------------------------------------

    def on_status(self, status: bytes) -> None:
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self._headers if self._in_head else self._trailing
        if len(headers) >= MAX_HEADERS:
            raise BadHead(502, f"more than {MAX_HEADERS} headers")
        headers.append((name.lower(), value))
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes > MAX_HEAD:
            raise BadHead(502, f"its head has more than {MAX_HEAD} bytes")

    def on_headers_complete(self) -> None:
        exchange, parser = self.exchange, self._parser
        if exchange is None or parser is None or self._done:
            raise BadHead(502, "more than one answer")
        status, version = parser.get_status_code(), parser.get_http_version()
        head = judge(self._headers, version, request=False)
        self._in_head = False
        if status == 101:
            if not exchange.head.upgrade or not head.upgrade:
                raise BadHead(502, "it switched to a protocol that nobody asked for")
            self.tunnel = True
            exchange.response_head(status, self._reason, self._headers, head, bodiless=True)
            self.pool.backend.lasting(self.wire)
        elif status < 200:
            exchange.response_head(status, self._reason, self._headers, head, bodiless=True)
        else:
            bodiless = exchange.method == b"HEAD" or status in (204, 304)
            self._until_close = not bodiless and head.length is None and not head.chunked
            self._keep = not head.close and not self._until_close
            exchange.response_head(status, self._reason, self._headers, head, bodiless=bodiless)
            self._done = bodiless

    def on_body(self, body: bytes) -> None:
        if self._done or self.exchange is None:
            raise BadHead(502, "it has a body where none may be")
        self.exchange.response_body(body)

    def on_message_complete(self) -> None:
        if self.tunnel or self._done or self.exchange is None:
            return
        assert self._parser is not None
        if self._parser.get_status_code() < 200:
            self._headers, self._reason, self._in_head, self._head_bytes = [], b"", True, 0
            return
        self._done = True
        self.exchange.response_end(self._trailing)

    def _finish(self, exchange: Exchange) -> None:
        self.exchange = None
        if self._keep and exchange.sent_all and not self._lost:
            self.pool.put(self)
        else:
            self.wire.abort()
        exchange.finish()
