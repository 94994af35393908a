"""One connection of a client's: requests in, responses out, one after the other."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import TYPE_CHECKING, Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from stoker.server.proxy.exchange import Exchange
from stoker.server.proxy.heads import BadHead

if TYPE_CHECKING:
    from stoker.server.proxy.router import Router
    from stoker.server.proxy.service import Proxy

__all__ = ["Front"]

MAX_HEAD: Final = 64 << 10
MAX_TARGET: Final = 16 << 10
MAX_HEADERS: Final = 128
HEAD_SECONDS: Final = 30.0
KEEP_ALIVE: Final = 75.0
LINGER_SECONDS: Final = 5.0
PIPELINED: Final = 512


class Front(asyncio.Protocol):
    """The parser runs ahead of the responses only within what one read brought: then nothing is read until they are written."""

    transport: asyncio.Transport

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self.router: Router = proxy.router
        self.now = asyncio.get_running_loop().time
        self.client = ""
        self.trusted = False
        self.deadline: float | None = None
        """When the connection is given up, if nothing happens."""
        self.out: list[bytes] = []
        self._parser: HttpRequestParser | None = None
        self._queue: deque[Exchange] = deque()
        self._reading: Exchange | None = None
        self._holds: set[str] = set()
        self._unread = 0
        self._upgrading = False
        self._held = b""
        self._resuming = False
        self._tunnel: Exchange | None = None
        self._lingering = False
        self._half_closed = False
        self._eof = False

    @property
    def accepting(self) -> bool:
        return not self._proxy.closing

    # -- asyncio's --------------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        sock, peer = transport.get_extra_info("socket"), transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.client = str(peer[0]).removeprefix("::ffff:")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.trusted = self.client in self._proxy.trusted
        if not self._proxy.enter(self):
            transport.abort()
            return
        self._parser = HttpRequestParser(self)
        self.deadline = self.now() + HEAD_SECONDS

    def connection_lost(self, error: Exception | None) -> None:
        self._proxy.leave(self)
        for exchange in self._queue:
            exchange.give_up()
        self._queue.clear()
        self._tunnel = None

    def data_received(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._tunnel.to_service(data)
        elif self._lingering:
            pass
        elif self._upgrading:
            # Said before the service agreed: it waits.
            self._held += data
            self.hold("upgrade")
        else:
            self._feed(data)

    def eof_received(self) -> bool:
        self._eof = True
        if self._tunnel is not None:
            self._tunnel.end_to_service()
            return True
        # A client that has said everything may still listen.
        return bool(self._queue) and self._queue[-1].received_all

    def pause_writing(self) -> None:
        if self._queue:
            self._queue[0].service_pauses(True)

    def resume_writing(self) -> None:
        if self._queue:
            self._queue[0].service_pauses(False)

    # -- reading ----------------------------------------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        if self._reading is None and not self._queue:
            self.deadline = self.now() + HEAD_SECONDS
        self._unread += len(data)
        assert self._parser is not None
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self._upgrade(data[upgrade.args[0] :])
        except HttpParserError as error:
            if self._lingering or self.transport.is_closing():
                return  # what is behind the last request is nobody's
            bad = error.__context__ if isinstance(error.__context__, BadHead) else BadHead(400, f"it is not HTTP/1.1: {error}")
            self._refuse(bad)
        if self._reading is not None and self._reading.in_head and self._unread > MAX_HEAD:
            self._refuse(BadHead(431, f"the request's head has more than {MAX_HEAD} bytes"))
        if len(self._queue) > 1:
            self.hold("turn")

    def _upgrade(self, rest: bytes) -> None:
        """The parser stops behind a head that asks for an upgrade, and leaves out a body."""
        exchange = self._reading
        if exchange is None:
            self._upgrading = True
            self._held = rest
            self.hold("upgrade")
            return
        # It has a body, so it is not upgraded: another parser goes on there, which is told of nothing but the body's length.
        self._parser = HttpRequestParser(self)
        framing = b"transfer-encoding: chunked" if exchange.head.chunked else b"content-length: %d" % (exchange.head.length or 0)
        self._resuming = True
        self._parser.feed_data(b"POST / HTTP/1.1\r\nhost: x\r\n" + framing + b"\r\n\r\n")
        self._resuming = False
        if rest:
            self._feed(rest)

    def _refuse(self, bad: BadHead) -> None:
        """Nothing behind this can be understood. What came before is answered first."""
        exchange = self._reading or (self._queue[-1] if self._queue and not self._queue[-1].received_all else None)
        self._reading = None
        self.hold("refused")
        if exchange is not None and exchange in self._queue:
            # In the middle of its body: the service must not take what there is for the whole.
            exchange.close = True
            exchange.broken_request(bad)
            return
        exchange = exchange or Exchange(self)
        exchange.fail_with(bad)
        self._enter(exchange)

    def _enter(self, exchange: Exchange) -> None:
        self._queue.append(exchange)
        if len(self._queue) == 1:
            self.deadline = None
            exchange.start()

    def on_message_begin(self) -> None:
        if self._resuming:
            return
        if self._lingering or self.transport.is_closing():
            raise BadHead(400, "nothing more is read")
        if len(self._queue) >= PIPELINED:
            raise BadHead(400, f"more than {PIPELINED} requests at a time")
        self._reading = Exchange(self)
        if self._queue:
            self._unread = 0

    def on_url(self, url: bytes) -> None:
        if self._resuming:
            return
        exchange = self._reading
        assert exchange is not None
        exchange.url += url
        if len(exchange.url) > MAX_TARGET:
            raise BadHead(414, f"the request's target has more than {MAX_TARGET} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        exchange = self._reading
        if self._resuming:
            return
        assert exchange is not None
        headers = exchange.headers if exchange.in_head else exchange.trailers
        if len(headers) >= MAX_HEADERS:
            raise BadHead(431, f"more than {MAX_HEADERS} headers")
        headers.append((name.lower(), value))
        exchange.head_bytes += len(name) + len(value) + 4
        if exchange.head_bytes > MAX_HEAD:
            raise BadHead(431, f"the request's head has more than {MAX_HEAD} bytes")

    def on_headers_complete(self) -> None:
        exchange, parser = self._reading, self._parser
        if self._resuming:
            return
        assert exchange is not None and parser is not None
        exchange.judged(parser.get_method(), parser.get_http_version())
        self._unread = 0
        self._enter(exchange)

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        assert self._reading is not None
        self._reading.body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        exchange, parser = self._reading, self._parser
        assert exchange is not None and parser is not None
        if exchange.has_body and parser.should_upgrade():
            return
        self._reading = None
        exchange.end()

    def hold(self, why: str) -> None:
        """Nothing is read until :meth:`go_on` for every reason."""
        if not self._holds and not self.transport.is_closing():
            self.transport.pause_reading()
        self._holds.add(why)

    def go_on(self, why: str) -> None:
        if why in self._holds:
            self._holds.discard(why)
            if not self._holds and not self.transport.is_closing():
                self.transport.resume_reading()

    # -- writing ----------------------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def flush(self) -> None:
        out = self.out
        if out:
            self.transport.write(b"".join(out) if len(out) > 1 else out[0])
            out.clear()

    def finished(self, exchange: Exchange) -> None:
        """Its response is written: the next one's turn, unless the connection ends."""
        if not self._queue or self._queue[0] is not exchange:
            return
        self._queue.popleft()
        if exchange.close or not exchange.received_all:
            self._linger()
            return
        self.go_on("service")
        self.go_on("body")
        if self._upgrading and not self._queue:
            # Nobody agreed: what follows is HTTP.
            self._upgrading = False
            held, self._held = self._held, b""
            self._parser = HttpRequestParser(self)
            self.go_on("upgrade")
            if held:
                self._feed(held)
            if self._queue:
                return
        if self._queue:
            if len(self._queue) == 1:
                self.go_on("turn")
            self._queue[0].start()
            return
        if self._eof:
            self.transport.close()
            return
        self.deadline = self.now() + (KEEP_ALIVE if self._reading is None else HEAD_SECONDS)
        self.go_on("turn")

    def _linger(self) -> None:
        """The client may still be sending: its answer must not be lost to a reset, and it is not listened to for long."""
        for other in self._queue:
            other.give_up()
        self._queue.clear()
        if self.transport.is_closing():
            return
        if self._eof or self._reading is None and not self._holds:
            self.transport.close()
            return
        self._lingering = True
        self._holds = {"linger"}
        self.go_on("linger")
        self.deadline = self.now() + LINGER_SECONDS
        if self.transport.can_write_eof():
            self.transport.write_eof()

    # -- tunnels ----------------------------------------------------------------------------------------------------------------

    def out_tunnel(self, exchange: Exchange) -> None:
        """From here on bytes go both ways as they are."""
        self.flush()
        self._tunnel = exchange
        self.deadline = None
        held, self._held = self._held, b""
        if held:
            exchange.to_service(held)
        self.go_on("upgrade")

    def half_close(self) -> None:
        if self._half_closed or self.transport.is_closing():
            return
        self._half_closed = True
        if self._eof or not self.transport.can_write_eof():
            self.transport.close()
        else:
            self.transport.write_eof()

    def close(self) -> None:
        """Behind what was written."""
        self.transport.close()

    def abort(self) -> None:
        self.transport.abort()

    def expired(self) -> None:
        """The deadline has passed."""
        self.deadline = None
        if self._queue and self._tunnel is None:
            self._queue[0].too_late()
        elif self._reading is not None:
            self._refuse(BadHead(408, f"the request's head did not come within {HEAD_SECONDS:g} s"))
        else:
            self.transport.abort() if self._lingering else self.transport.close()

    def shut(self) -> None:
        """The proxy ends: at once where nothing is going on, else after what is being answered."""
        if not self._queue:
            self.transport.close()
