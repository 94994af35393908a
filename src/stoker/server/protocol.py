"""uvicorn's HTTP protocol with what a daemon needs besides: who the peer is, and bounds on what comes before a body.

The peer's credentials go into the connection's state, which every scope of the connection gets a copy of (WebSockets too).
uvicorn itself has no bound on a request's head: here it has one in bytes and one in seconds. And a client that goes on sending
after it was answered is heard out for a while, so that it can read the answer, but not for ever.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from stoker.errors import InvalidRequest, error_to_wire
from stoker.server.auth import peer_of

__all__ = ["Connections", "DaemonProtocol"]

MAX_HEAD = 64 << 10
HEAD_TIMEOUT = 30.0
LINGER_BYTES = 64 << 20
LINGER_SECONDS = 10.0
MAX_CONNECTIONS = 4096


class Connections(ServerState):
    """All of them, and when the last one did something."""

    def __init__(self) -> None:
        super().__init__()
        self.used = asyncio.get_running_loop().time()

    def touch(self) -> None:
        self.used = asyncio.get_running_loop().time()


class DaemonProtocol(HttpToolsProtocol):
    """One connection."""

    server_state: Connections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unread = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._lingering = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        sock = transport.get_extra_info("socket")
        self.app_state = {**self.app_state, "peer": peer_of(sock) if sock is not None else None}
        super().connection_made(transport)
        self.server_state.touch()
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timers()
        self.server_state.touch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        # Bytes that lead to nothing (an endless header, an endless trailer) pile up in the parser.
        self._unread += len(data)
        if self._lingering:
            self._lingering -= len(data)
            if self._lingering <= 0:
                self.transport.abort()
                return
        super().data_received(data)
        if self._unread > MAX_HEAD and self.parser is not None and not self.transport.is_closing():
            self.send_400_response("the request's head is too large")

    def handle_websocket_upgrade(self) -> None:
        self._forget_timers()
        super().handle_websocket_upgrade()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= 256:
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        self._lingering = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self.server_state.touch()
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and cycle.more_body and self._linger_timer is None and not self.transport.is_closing():
            self._lingering = LINGER_BYTES
            self._linger_timer = self.loop.call_later(LINGER_SECONDS, self.transport.abort)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(error_to_wire(InvalidRequest("bad_request", msg))).encode()
        head = ("HTTP/1.1 400 Bad Request", "content-type: application/json", f"content-length: {len(body)}", "connection: close")
        self.transport.write("\r\n".join((*head, "", "")).encode() + body)
        self.transport.close()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT, self.transport.abort)

    def _forget_timers(self) -> None:
        for timer in (self._head_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._linger_timer = None
