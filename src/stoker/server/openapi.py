"""The OpenAPI 3.1 document, generated from the endpoints and their models: what is declared is what is checked."""

from __future__ import annotations

import re
from typing import Any

import msgspec

import stoker
from stoker.api.models import ErrorBody
from stoker.server.endpoint import Content, Endpoint

__all__ = ["PATH_PARAMETERS", "build_document"]

REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)\}")

PATH_PARAMETERS: dict[str, dict[str, Any]] = {
    "sandbox": {
        "description": "A sandbox's id or name.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", "maxLength": 64, "minLength": 1},
    },
    "process": {
        "description": "A process's id or tag.",
        "schema": {"type": "string", "pattern": "^([0-9]{1,9}|[A-Za-z_][A-Za-z0-9._-]{0,63})$", "maxLength": 64, "minLength": 1},
    },
    "port": {"description": "A TCP port in the guest.", "schema": {"type": "integer", "minimum": 1, "maximum": 65535}},
    "volume": {
        "description": "A volume's name or id.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", "maxLength": 64, "minLength": 1},
    },
    "snapshot": {
        "description": "A snapshot's name or id.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", "maxLength": 64, "minLength": 1},
    },
    "template": {
        "description": "A template's name or id.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", "maxLength": 64, "minLength": 1},
    },
    "warm": {"description": "A warm set's id.", "schema": {"type": "string", "pattern": "^ws-[a-z2-7]{20}$"}},
    "pool": {
        "description": "A pool's name; `directory` is the data directory itself.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", "maxLength": 64, "minLength": 1},
    },
    "app": {"description": "The SHA-256 of an app archive.", "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"}},
    "operation": {"description": "An operation's id.", "schema": {"type": "string", "pattern": "^op-[a-z2-7]{20}$"}},
    "image": {
        "description": "An image's name (`debian:12`), its digest, or the first characters of that.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9:._-]*$", "maxLength": 128, "minLength": 1},
    },
    "kernel": {
        "description": "A kernel's name (`debian:12`), its digest, or the first characters of that.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9:._-]*$", "maxLength": 128, "minLength": 1},
    },
    "key": {"description": "A key's id.", "schema": {"type": "string", "pattern": "^key-[a-z2-7]{12}$"}},
    "token": {
        "description": "From a signed URL.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]+$", "minLength": 1, "maxLength": 8192},
    },
}
REASONS = {
    200: "Done.",
    201: "Created.",
    202: "Begun; the operation tells of its end.",
    204: "Done; there is nothing to say.",
    206: "A part of it.",
    304: "What the client has is still right.",
    400: "The request makes no sense.",
    401: "No key, or a wrong one.",
    403: "Not with this key, or not for this user.",
    404: "No such thing, or not yours.",
    408: "It is not so yet; ask again.",
    409: "In the wrong state, or there already.",
    413: "A bound was passed.",
    416: "The range lies outside the file.",
    422: "The guest has no such command, or cannot execute it.",
    429: "No room on the host or in the quota.",
    500: "A defect of ours.",
    502: "The machine or its agent failed.",
    503: "The host lacks or refuses something.",
    504: "It took too long.",
}
ALWAYS = (400, 500, 503)
WITH_KEY = (401, 403)


def _clean(value: Any) -> Any:
    """What Python's regular expressions need and JSON Schema's do not: see ``stoker.api.types.END``."""
    if isinstance(value, dict):
        return {k: v.replace("(?!\\n)", "") if k == "pattern" and isinstance(v, str) else _clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


class _Schemas:
    """All models at once, so that each is described once and referred to by name."""

    def __init__(self, models: list[Any]) -> None:
        unique = list(dict.fromkeys(models))
        schemas, components = msgspec.json.schema_components(unique, ref_template=REF)
        self._by_model = dict(zip(unique, schemas, strict=True))
        self.components: dict[str, Any] = _clean(components)

    def of(self, model: Any) -> dict[str, Any]:
        return _clean(self._by_model[model])  # type: ignore[no-any-return]


def _models(endpoints: list[Endpoint]) -> list[Any]:
    found: list[Any] = [ErrorBody]
    for endpoint in endpoints:
        for answer in endpoint.answers.values():
            if isinstance(answer, Content):
                found += [answer.item] if answer.item is not None else []
            elif answer is not None:
                found.append(answer)
        if endpoint.body is not None:
            found.append(endpoint.body)
    return found


def _inline(schema: Any, components: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        ref = schema.get("$ref")
        if isinstance(ref, str):
            return _inline(components[ref.rpartition("/")[2]], components)
        return {key: _inline(value, components) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_inline(item, components) for item in schema]
    return schema


def _query_parameters(model: Any) -> list[dict[str, Any]]:
    """A Struct's fields as parameters. Null cannot be sent in a query string, so optional means absent."""
    (_,), components = msgspec.json.schema_components([model], ref_template=REF)
    schema = _clean(components[model.__name__])
    required = set(schema.get("required", ()))
    parameters = []
    for name, raw in schema["properties"].items():
        inlined = _inline(raw, components)
        options = [option for option in inlined.get("anyOf", ()) if option != {"type": "null"}]
        inner = {**options[0], **{k: v for k, v in inlined.items() if k != "anyOf"}} if len(options) == 1 else inlined
        if inner.get("default", 0) is None:
            del inner["default"]
        parameter: dict[str, Any] = {"name": name, "in": "query", "required": name in required, "schema": inner}
        if "description" in inner:
            parameter["description"] = inner.pop("description")
        parameters.append(parameter)
    return parameters


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    parameters = [
        {"name": name, "in": "path", "required": True, **PATH_PARAMETERS[name]} for name in _PARAMETER.findall(endpoint.path)
    ]
    if endpoint.query is not None:
        parameters += _query_parameters(endpoint.query)
    parameters += [
        {
            "name": name,
            "in": "header",
            "required": False,
            "description": text,
            "schema": {"type": "string", "minLength": 1, "maxLength": 128, "pattern": "^[!-~]+$"},
        }
        for name, text in endpoint.headers.items()
    ]
    return parameters


def _answer(status: int, answer: Any, schemas: _Schemas) -> dict[str, Any]:
    described: dict[str, Any] = {"description": REASONS[status]}
    if isinstance(answer, Content):
        schema: dict[str, Any] = {}
        if answer.item is not None:
            described["description"] = f"{answer.description} Each `data:` line is one {answer.item.__name__}."
            schema = {"type": "string", "contentMediaType": "text/event-stream"}
        described["content"] = {media: {"schema": schema} for media in answer.media}
    elif answer is not None:
        described["content"] = {"application/json": {"schema": schemas.of(answer)}}
    return described


def _request_body(endpoint: Endpoint, schemas: _Schemas) -> dict[str, Any] | None:
    if endpoint.upload is not None:
        return {"required": True, "content": {media: {"schema": {}} for media in endpoint.upload.media}}
    if endpoint.body is None:
        return None
    required = any(field.required for field in msgspec.structs.fields(endpoint.body))
    return {"required": required, "content": {"application/json": {"schema": schemas.of(endpoint.body)}}}


def _operation(endpoint: Endpoint, schemas: _Schemas) -> dict[str, Any]:
    error = {"application/json": {"schema": schemas.of(ErrorBody)}}
    errors = {*ALWAYS, *endpoint.errors, *(() if endpoint.public else WITH_KEY)}
    if endpoint.body is not None or endpoint.upload is not None:
        errors |= {413, 504}
    responses = {str(status): _answer(status, answer, schemas) for status, answer in endpoint.answers.items()}
    for status in sorted(errors):
        responses[str(status)] = {"description": REASONS[status], "content": error}
    operation: dict[str, Any] = {
        "operationId": endpoint.handler.__name__,
        "tags": [endpoint.tag],
        "summary": endpoint.summary.rstrip("."),
        "responses": responses,
    }
    if endpoint.description:
        operation["description"] = endpoint.description
    parameters = _parameters(endpoint)
    if parameters:
        operation["parameters"] = parameters
    body = _request_body(endpoint, schemas)
    if body is not None:
        operation["requestBody"] = body
    if endpoint.public:
        operation["security"] = []
    return operation


def build_document(endpoints: list[Endpoint]) -> dict[str, Any]:
    schemas = _Schemas(_models(endpoints))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Stoker",
            "version": stoker.__version__,
            "description": "MicroVM sandboxes as a service. WebSockets are described in docs/api.md.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"apiKey": []}],
        "tags": [{"name": tag} for tag in dict.fromkeys(endpoint.tag for endpoint in endpoints)],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }
