"""One accepted WebSocket: messages and frames of :mod:`stoker.api.websocket`, who is asking, and how it ends."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import structlog
from litestar import WebSocket

from stoker.api import websocket as wire
from stoker.api.errors import ErrorBody
from stoker.api.models import Principal
from stoker.errors import InvalidRequest, StokerError, Unauthenticated, error_to_wire
from stoker.server.auth import api_key, identify
from stoker.server.services import Services

__all__ = ["Channel", "Gone"]

_log = structlog.get_logger("stoker.server")


class Gone(Exception):
    """The client's end is closed. ``code`` 1012: this daemon is going away."""

    def __init__(self, code: int) -> None:
        super().__init__(f"closed with {code}")
        self.code = code


class Channel:
    """Thin: reading belongs to one task, sending to any number."""

    def __init__(self, socket: WebSocket[Any, Any, Any], services: Services) -> None:
        self._receive = socket.receive
        self._send = socket.send
        self.scope = socket.scope
        self.services = services
        self._first: str | bytes | None = None
        self._closed = False
        self._key: str | None = None

    async def accept(self) -> None:
        message = await self._receive()
        if message["type"] != "websocket.connect":
            raise Gone(1006)
        await self._send({"type": "websocket.accept", "subprotocol": None, "headers": []})

    async def principal(self) -> Principal:
        """By the connection or a header; otherwise by the first message, within 5 s."""
        peer = self.scope["state"].get("peer")
        key = api_key(list(self.scope["headers"]))
        if key is None and peer is None:
            with anyio.move_on_after(wire.AUTH_TIMEOUT) as waiting:
                first = await self.message()
                if not isinstance(first, wire.Auth):
                    raise Unauthenticated("key_required", "the first message must be an auth message with an API key")
                key = first.key
            if waiting.cancelled_caught:
                raise Unauthenticated("auth_timeout", f"no auth message came within {wire.AUTH_TIMEOUT:.0f} s")
        self._key = key
        return await self.identify_again()

    async def identify_again(self) -> Principal:
        """Whoever it is still may: a key can be revoked while a connection lasts."""
        return await identify(self.scope["state"].get("peer"), self._key, self.services.group, self.services.engine.find_key)

    async def receive(self) -> str | bytes:
        message: Any = await self._receive()
        if message["type"] == "websocket.disconnect":
            self._closed = True
            raise Gone(message.get("code") or 1005)
        data = message.get("bytes")
        return data if data is not None else message.get("text") or ""

    async def message(self) -> wire.ClientMessage:
        """The next control message; anything else is refused."""
        data = await self.receive()
        if isinstance(data, bytes):
            raise InvalidRequest("unexpected_data", "a control message was expected, not a binary frame")
        return decode(data)

    async def say(self, message: Any) -> None:
        await self._text(wire.encode_message(message))

    async def data(self, stream: int, offset: int, data: bytes | memoryview) -> None:
        if not self._closed:
            await self._send({"type": "websocket.send", "bytes": wire.encode_data(stream, offset, data), "text": None})

    async def _text(self, text: str) -> None:
        if not self._closed:
            await self._send({"type": "websocket.send", "bytes": None, "text": text})

    async def close(self, code: int = 1000, reason: str = "") -> None:
        if not self._closed:
            self._closed = True
            await self._send({"type": "websocket.close", "code": code, "reason": reason})

    async def fail(self, error: StokerError) -> None:
        """Says why, and closes. A reason is at most 123 bytes."""
        await self.say(wire.Failure(error=body_of(error)))
        await self.close(wire.CLOSE_BASE + error.status, error.code[:120])


def body_of(error: StokerError) -> ErrorBody:
    return msgspec.convert(error_to_wire(error), ErrorBody)


def decode(data: str) -> wire.ClientMessage:
    try:
        return wire.decode_client(data)
    except msgspec.DecodeError as e:
        raise InvalidRequest("bad_message", f"the message is not understood: {e}") from None
