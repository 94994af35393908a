"""The ASGI application: every route, one way in, one way out for errors."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

import anyio
import structlog
from litestar import Litestar, Request, Response, WebSocket
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException
from litestar.handlers import WebsocketRouteHandler

from stoker.api.models import Principal
from stoker.errors import InvalidRequest, NotFound
from stoker.server.attach import attach_to, start_and_attach
from stoker.server.auth import group_id
from stoker.server.channel import Channel, Gone
from stoker.server.docs import render_docs
from stoker.server.endpoint import Endpoint, build_handler, failure
from stoker.server.lease import hold_lease
from stoker.server.openapi import build_document
from stoker.server.port_stream import connect_to, port_number
from stoker.server.ports import EngineProtocol
from stoker.server.replies import Reply, error_reply
from stoker.server.routes import (
    apps,
    files,
    images,
    keys,
    network,
    operations,
    pools,
    ports,
    processes,
    sandboxes,
    signed,
    snapshots,
    ssh,
    system,
    templates,
    upkeep,
    volumes,
    warm,
)
from stoker.server.services import Services
from stoker.server.signing import Signer
from stoker.server.ssh.stream import speak_ssh

__all__ = ["all_endpoints", "create_app"]

_log = structlog.get_logger("stoker.server")
SocketHandler = Callable[[Channel, Principal, dict[str, str]], Awaitable[None]]


def all_endpoints() -> list[Endpoint]:
    modules = (
        sandboxes,
        processes,
        ports,
        ssh,
        files,
        signed,
        operations,
        images,
        upkeep,
        keys,
        network,
        system,
        volumes,
        apps,
        pools,
        snapshots,
        templates,
        warm,
    )
    return [endpoint for module in modules for endpoint in module.routes.endpoints]


async def _lease(channel: Channel, who: Principal, path: dict[str, str]) -> None:
    await hold_lease(channel, who, path["sandbox"])


async def _attach(channel: Channel, who: Principal, path: dict[str, str]) -> None:
    text = path["process"]
    process = int(text) if text.isascii() and text.isdigit() and len(text) < 12 else text
    await attach_to(channel, who, path["sandbox"], process)


async def _start(channel: Channel, who: Principal, path: dict[str, str]) -> None:
    await start_and_attach(channel, who, path["sandbox"])


async def _port(channel: Channel, who: Principal, path: dict[str, str]) -> None:
    await connect_to(channel, who, path["sandbox"], port_number(path["port"]))


async def _ssh(channel: Channel, who: Principal, path: dict[str, str]) -> None:
    await speak_ssh(channel, who, path["sandbox"])


SOCKETS: dict[str, SocketHandler] = {
    "/v1/sandboxes/{sandbox:str}/lease": _lease,
    "/v1/sandboxes/{sandbox:str}/processes/stream": _start,
    "/v1/sandboxes/{sandbox:str}/processes/{process:str}/attach": _attach,
    "/v1/sandboxes/{sandbox:str}/ports/{port:str}/stream": _port,
    "/v1/sandboxes/{sandbox:str}/ssh": _ssh,
}


def _only_gone(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_only_gone(inner) for inner in error.exceptions)
    return isinstance(error, Gone)


async def _talk(channel: Channel, handler: SocketHandler, where: str) -> None:
    """Everything that goes wrong is told in a message and a close code; a client that went away is told nothing."""
    try:
        await channel.accept()
        await handler(channel, await channel.principal(), channel.scope["path_params"])
    except Exception as e:
        if not _only_gone(e):
            with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                await channel.fail(failure(e, where))


def _socket_handler(path: str, handler: SocketHandler, services: Services) -> WebsocketRouteHandler:
    async def handle(socket: WebSocket) -> None:  # type: ignore[type-arg]
        await _talk(Channel(socket, services), handler, f"WS {path}")

    return WebsocketRouteHandler(path, name=f"WS {path}")(handle)


def _methods(path: str) -> list[str]:
    """What a path does take, for ``Allow``."""
    found = {e.method for e in all_endpoints() if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", e.path), path.rstrip("/"))}
    return sorted(found | {"OPTIONS"})


def _response(reply: Reply) -> Response[bytes]:
    headers = {name.decode(): value.decode() for name, value in reply.headers}
    return Response(reply.body, status_code=reply.status, media_type="application/json", headers=headers)


def _framework_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """What fails before a handler runs (routing), or after it in a stream's own code."""
    if isinstance(error, MethodNotAllowedException):
        reply = error_reply(InvalidRequest("method_not_allowed", f"{request.method} is not for {request.url.path}", "see /docs"))
        allow = ", ".join(_methods(request.url.path))
        return _response(Reply(405, reply.body, headers=[(b"allow", allow.encode())]))
    if isinstance(error, NotFoundException):
        return _response(error_reply(NotFound("no_such_route", f"there is no {request.url.path[:200]}", "see /docs")))
    if isinstance(error, HTTPException):
        return _response(error_reply(InvalidRequest("bad_request", error.detail or "the request is not right")))
    return _response(error_reply(failure(error, f"{request.method} {request.url.path[:200]}")))


@lru_cache(maxsize=1)
def _documents() -> dict[str, bytes]:
    document = build_document(all_endpoints())
    return {"openapi": json.dumps(document).encode(), "docs": render_docs(document)}


def create_app(
    engine: EngineProtocol, *, secret: bytes, group: int | None = None, auto_started: bool = False, proxy: str | None = None
) -> Litestar:
    """``secret`` signs URLs; ``group`` may use the Unix socket besides the owner (default: the group ``stoker``); ``proxy`` is
    where the reverse proxy is found."""
    endpoints = all_endpoints()
    services = Services(
        engine=engine,
        signer=Signer(secret),
        group=group_id() if group is None else group,
        auto_started=auto_started,
        secret=secret,
        proxy=proxy,
        documents=_documents(),
    )
    handlers: list[Any] = [build_handler(endpoint, services) for endpoint in endpoints]
    handlers += [_socket_handler(path, handler, services) for path, handler in SOCKETS.items()]
    return Litestar(
        route_handlers=handlers,
        openapi_config=None,
        exception_handlers={Exception: _framework_error},
        request_max_body_size=None,
        logging_config=None,
        debug=False,
    )
