"""How one operation of the API is declared, and what every one of them goes through.

A handler says what it takes in its own signature; the decorator adds what HTTP needs. Routing, the OpenAPI document and
validation all come from this one declaration::

    @routes.get("/v1/sandboxes/{sandbox}", answers={200: Sandbox}, errors=SANDBOX)
    async def get_sandbox(call: Call) -> Sandbox: ...

Each request: who is asking, then query and body against their models, then the handler, then the answer. A StokerError from any
of it becomes the one error body with its own status; anything else is a defect: logged with its traceback, answered as 500.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, get_type_hints

import anyio
import msgspec
import structlog
from litestar import Request
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from stoker.api.codec import decode_request
from stoker.api.models import Principal
from stoker.errors import Forbidden, HostError, InternalError, InvalidRequest, StokerError
from stoker.server.auth import api_key, identify
from stoker.server.bodies import header, read_body
from stoker.server.query import decode_query
from stoker.server.replies import Reply, error_reply, json_reply

if TYPE_CHECKING:
    from stoker.server.ports import EngineProtocol
    from stoker.server.services import Services

__all__ = ["GUEST", "SANDBOX", "Call", "Content", "Endpoint", "Routes", "build_handler", "failure", "principal_of"]

_log = structlog.get_logger("stoker.server")
_NOTHING: Any = None

SANDBOX = (404, 409)
"""What an operation on a sandbox may answer besides what every one may."""
GUEST = (403, 404, 409, 429, 502, 504)
"""What an operation inside a guest may answer besides."""
BODY_BOUND = 1 << 20


@dataclass(frozen=True, slots=True)
class Content:
    """An answer or a request that is not JSON."""

    media: tuple[str, ...]
    description: str = ""
    item: Any = None
    """The model of one event, for ``text/event-stream``."""


@dataclass(slots=True)
class Call:
    """One request, as a handler sees it."""

    services: Services
    principal: Principal
    request: Request[Any, Any, Any]
    path: dict[str, str]

    @property
    def engine(self) -> EngineProtocol:
        return self.services.engine

    @property
    def sandbox(self) -> str:
        return self.path["sandbox"]

    @property
    def process(self) -> int | str:
        """A process's id, or its tag."""
        text = self.path["process"]
        return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else text

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return cast("list[tuple[bytes, bytes]]", self.request.scope["headers"])

    def header(self, name: bytes) -> str | None:
        return header(self.headers, name)


Handler = Callable[..., Awaitable[Any]]
H = TypeVar("H", bound=Handler)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The declaration."""

    method: str
    path: str
    handler: Handler
    answers: dict[int, Any]
    errors: tuple[int, ...]
    query: Any
    body: Any
    tag: str
    summary: str
    description: str
    upload: Content | None = None
    headers: dict[str, str] = field(default_factory=dict)
    public: bool = False
    local: bool = False
    bound: int = BODY_BOUND
    abort: bool = False
    """The handler is cancelled when the client goes away."""


class Routes(Generic[H]):
    """The endpoints of one noun."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.endpoints: list[Endpoint] = []

    def add(
        self, method: str, path: str, *, answers: dict[int, Any], errors: tuple[int, ...] = (), **rest: Any
    ) -> Callable[[H], H]:
        def decorate(handler: H) -> H:
            summary, _, description = inspect.cleandoc(handler.__doc__ or "").partition("\n\n")
            hints = get_type_hints(handler)
            self.endpoints.append(
                Endpoint(
                    method,
                    path,
                    handler,
                    answers,
                    errors,
                    hints.get("query"),
                    hints.get("body"),
                    self.tag,
                    " ".join(summary.split()),
                    description,
                    **rest,
                )
            )
            return handler

        return decorate

    def get(self, path: str, **rest: Any) -> Callable[[H], H]:
        return self.add("GET", path, **rest)

    def post(self, path: str, **rest: Any) -> Callable[[H], H]:
        return self.add("POST", path, **rest)

    def put(self, path: str, **rest: Any) -> Callable[[H], H]:
        return self.add("PUT", path, **rest)

    def delete(self, path: str, **rest: Any) -> Callable[[H], H]:
        return self.add("DELETE", path, **rest)


def failure(error: Exception, where: str) -> StokerError:
    """The error to answer with. What is not a StokerError is a defect of ours, and the log has all of it."""
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1 and isinstance(error.exceptions[0], Exception):
        return failure(error.exceptions[0], where)
    if isinstance(error, StokerError):
        if isinstance(error, InternalError):
            _log.error("internal error", where=where, code=error.code, message=error.message, exc_info=error)
        return error
    _log.error("defect", where=where, exc_info=error)
    return InternalError("internal_error", f"{where} failed: {type(error).__name__}", "the daemon's log has the traceback")


async def principal_of(services: Services, scope: Any) -> Principal:
    return await identify(scope["state"].get("peer"), api_key(scope["headers"]), services.group, services.engine.find_key)


async def _arguments(endpoint: Endpoint, call: Call) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    raw_query = call.request.scope["query_string"]
    if endpoint.query is not None:
        arguments["query"] = decode_query(raw_query, endpoint.query)
    elif raw_query:
        decode_query(raw_query, NoQuery)
    if endpoint.body is not None:
        kind = call.header(b"content-type")
        # A page in a browser can send any other type to any address without asking first.
        if kind is not None and kind.partition(";")[0].strip().lower() != "application/json":
            raise InvalidRequest("bad_content_type", f"the body's type is {kind[:100]!r}", "send Content-Type: application/json")
        data = await read_body(call.headers, call.request.receive, endpoint.bound)
        if not data and not any(f.required for f in msgspec.structs.fields(endpoint.body)):
            data = b"{}"
        if len(data) > BODY_BOUND:
            arguments["body"] = await anyio.to_thread.run_sync(decode_request, data, endpoint.body)
        else:
            arguments["body"] = decode_request(data, endpoint.body)
    return arguments


class NoQuery(msgspec.Struct, forbid_unknown_fields=True):
    """For an endpoint without parameters."""


async def _watched(call: Call, work: Awaitable[Any]) -> Any:
    """``work``, cancelled when the client goes away."""
    result: Any = None

    async def watch() -> None:
        while (await call.request.receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        result = await work
        tasks.cancel_scope.cancel()
    if result is None and tasks.cancel_scope.cancelled_caught:
        raise HostError("client_gone", "the client went away")
    return result


async def _serve(endpoint: Endpoint, services: Services, request: Request[Any, Any, Any]) -> ASGIApp:
    scope = request.scope
    principal = _NOTHING if endpoint.public else await principal_of(services, scope)
    if endpoint.local and not principal.admin:
        raise Forbidden("local_only", "this is for the Unix socket only", "use the daemon's socket on its own host")
    call = Call(services, principal, request, scope["path_params"])
    work = endpoint.handler(call, **await _arguments(endpoint, call))
    value = await (_watched(call, work) if endpoint.abort else work)
    if value is None:
        return cast(ASGIApp, Reply(204))
    if isinstance(value, msgspec.Struct):
        return cast(ASGIApp, json_reply(value, next(iter(endpoint.answers))))
    return cast(ASGIApp, value)


def build_handler(endpoint: Endpoint, services: Services) -> HTTPRouteHandler:
    """The Litestar handler of an endpoint."""
    where = f"{endpoint.method} {endpoint.path}"

    async def handle(request: Request) -> ASGIApp:  # type: ignore[type-arg]
        try:
            return await _serve(endpoint, services, request)
        except Exception as e:
            return cast(ASGIApp, error_reply(failure(e, where)))

    path = endpoint.path.replace("}", ":str}")
    return HTTPRouteHandler(path, http_method=endpoint.method, status_code=200, include_in_schema=False, name=where)(handle)  # type: ignore[arg-type]
