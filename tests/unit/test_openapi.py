"""The document says what the server does: every model strict, every answer and reference there, every route once."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from stoker.errors import FAMILIES
from stoker.server.app import all_endpoints
from stoker.server.docs import render_docs
from stoker.server.openapi import build_document

DOCUMENT = build_document(all_endpoints())
OPERATIONS = [(method, path, op) for path, methods in DOCUMENT["paths"].items() for method, op in methods.items()]


def _walk(value: Any) -> Any:
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _walk(inner)


def test_it_is_json_and_every_reference_leads_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    schemas = DOCUMENT["components"]["schemas"]
    for reference in re.findall(r'"\$ref": "([^"]+)"', text):
        assert reference.removeprefix("#/components/schemas/") in schemas
    assert "(?!" not in text


def test_every_object_is_closed() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        if schema.get("type") == "object":
            assert schema.get("additionalProperties") is False, name


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=[f"{m} {p}" for m, p, _ in OPERATIONS])
def test_every_operation_is_whole(method: str, path: str, operation: dict[str, Any]) -> None:
    assert operation["summary"] and not operation["summary"].endswith(".")
    statuses = set(operation["responses"])
    assert {"400", "500", "503"} <= statuses
    if operation.get("security") != []:
        assert {"401", "403"} <= statuses
    if "{sandbox}" in path:
        assert "404" in statuses
    if "requestBody" in operation:
        assert "413" in statuses
    for status, answer in operation["responses"].items():
        if status >= "400":
            assert answer["content"] == {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    named = set(re.findall(r"\{(\w+)\}", path))
    assert named == {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}


def test_operation_ids_are_unique() -> None:
    ids = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(ids) == len(set(ids))


def test_every_family_of_errors_has_a_declared_status() -> None:
    declared = {int(status) for _, _, operation in OPERATIONS for status in operation["responses"]}
    assert {family.status for family in FAMILIES.values()} <= declared


def test_strings_lists_and_maps_of_requests_are_bounded() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    requests = [op["requestBody"]["content"] for _, _, op in OPERATIONS if "requestBody" in op]
    names = {c["application/json"]["schema"]["$ref"].rpartition("/")[2] for c in requests if "application/json" in c}
    assert {"CreateSandbox", "ExecRequest", "WriteFiles"} <= names
    for name in names:
        for found in _walk(schemas[name]["properties"]):
            if not isinstance(found, dict):
                continue
            kind = found.get("type")
            if kind == "string" and "enum" not in found:
                assert "maxLength" in found or "{" in found.get("pattern", ""), (name, found)
            if kind == "array" and "items" in found and found["items"] is not False:
                assert "maxItems" in found, (name, found)
            if kind == "object" and isinstance(found.get("additionalProperties"), dict):
                assert "maxProperties" in found, (name, found)


def test_the_page_names_every_operation_and_runs_nothing() -> None:
    page = render_docs(DOCUMENT).decode()
    assert "<script" not in page and "http://" not in page and "https://" not in page
    for _, path, operation in OPERATIONS:
        assert path in page.replace("&#x27;", "'")
        assert operation["summary"].replace("'", "&#x27;") in page
