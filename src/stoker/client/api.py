"""Typed calls over the transport: a model goes in, a model or a :class:`StokerError` comes out. Knows no single operation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from stoker.api.codec import decode_answer, encode
from stoker.client.connection import Body, Headers
from stoker.client.endpoint import query_string
from stoker.client.transport import REQUEST_TIMEOUT, Answer, Stream, Transport
from stoker.errors import InternalError, StokerError, error_from_wire

if TYPE_CHECKING:
    from stoker.client.websocket import WebSocket

__all__ = ["Api", "path"]

T = TypeVar("T")
JSON = ("Content-Type", "application/json")


def path(*segments: object) -> str:
    """``/v1/`` and the segments, each escaped: a name can never become a path of its own."""
    return "/v1/" + "/".join(quote(str(segment), safe="") for segment in segments)


def error_of(status: int, body: bytes) -> StokerError:
    """The error in an answer; one made up from the status when a proxy (or a defect) answered something else."""
    import json

    try:
        wire = json.loads(body)
        if isinstance(wire, dict) and "code" in wire:
            return error_from_wire(status, wire)
    except ValueError:
        pass
    text = body[:200].decode("utf-8", "replace").strip()
    return error_from_wire(
        status, {"code": f"http_{status}", "message": f"the server answered {status}" + (f": {text}" if text else "")}
    )


class Api:
    """One daemon, spoken to with models."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    async def call(
        self,
        method: str,
        target: str,
        answer: type[T],
        *,
        query: dict[str, object] | None = None,
        body: Any = None,
        headers: Headers = (),
        timeout: float | None = REQUEST_TIMEOUT,
    ) -> T:
        """Sends ``body`` as JSON and reads the answer as a model."""
        return decode_answer(
            (await self.send(method, target, query=query, body=body, headers=headers, timeout=timeout)).body, answer
        )

    async def send(
        self,
        method: str,
        target: str,
        *,
        query: dict[str, object] | None = None,
        body: Any = None,
        headers: Headers = (),
        timeout: float | None = REQUEST_TIMEOUT,
    ) -> Answer:
        """The same without looking at the answer's body. A raised status is an error."""
        data = None if body is None else encode(body)
        headers = headers if data is None else (*headers, JSON)
        whole = target + query_string(query or {})
        answer = await self.transport.request(method, whole, body=data, headers=headers, timeout=timeout)
        if answer.status >= 400:
            raise error_of(answer.status, answer.body)
        return answer

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        target: str,
        *,
        query: dict[str, object] | None = None,
        body: Body | None = None,
        headers: Headers = (),
        timeout: float | None = REQUEST_TIMEOUT,
        idle: float | None = None,
        allow: Sequence[int] = (),
    ) -> AsyncIterator[Stream]:
        """A raw body in, a raw body out. Statuses in ``allow`` (304, 416) are handed to the caller."""
        whole = target + query_string(query or {})
        async with self.transport.stream(method, whole, body=body, headers=headers, timeout=timeout, idle=idle) as stream:
            if stream.status >= 300 and stream.status not in allow:
                raise error_of(stream.status, await stream.read(1 << 20))
            yield stream

    async def websocket(self, target: str, query: dict[str, object] | None = None) -> WebSocket:
        opened = await self.transport.websocket(target + query_string(query or {}))
        if isinstance(opened, Answer):
            if opened.status < 400:
                raise InternalError("bad_answer", f"{target} answered {opened.status} instead of a WebSocket")
            raise error_of(opened.status, opened.body)
        return opened
