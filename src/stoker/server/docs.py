"""The API's description as one page without scripts, made from the OpenAPI document."""

from __future__ import annotations

from html import escape
from typing import Any

__all__ = ["render_docs"]

STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
code{font:13px ui-monospace,monospace}h2{margin-top:2.5rem;border-bottom:1px solid #8884}details{margin:.4rem 0}
summary{cursor:pointer}summary b{display:inline-block;min-width:4.5rem;font:bold 13px ui-monospace,monospace}
table{border-collapse:collapse;margin:.5rem 0 .5rem 1rem}td,th{padding:.15rem .6rem;text-align:left;vertical-align:top}
td,th{border-top:1px solid #8883}
p{margin:.3rem 0 .3rem 1rem}nav a{margin-right:1rem}.o{opacity:.7}
"""


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words; a model is a link to its own place."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " | ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        items = schema.get("items")
        return f"list of {_type(items)}" if isinstance(items, dict) else "list"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"map to {_type(schema['additionalProperties'])}"
    bounds = [
        f"{sign} {schema[key]}" for key, sign in (("minimum", "≥"), ("maximum", "≤"), ("maxLength", "length ≤")) if key in schema
    ]
    return escape(" ".join([str(kind), *bounds]))


def _row(name: str, schema: dict[str, Any], required: bool, note: str = "") -> str:
    default = schema.get("default")
    extra = f' <span class="o">default {escape(str(default))}</span>' if default not in (None, "", {}, []) else ""
    text = escape(note or str(schema.get("description", "")))
    star = "" if required else '<span class="o">?</span>'
    return f"<tr><td><code>{escape(name)}</code>{star}</td><td>{_type(schema)}{extra}</td><td>{text}</td></tr>"


def _body(content: dict[str, Any]) -> str:
    return ", ".join(
        _type(described["schema"]) if media == "application/json" and described["schema"] else f"<code>{escape(media)}</code>"
        for media, described in content.items()
    )


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code> — {escape(operation['summary'])}</summary>"]
    if "description" in operation:
        parts.append(f"<p>{escape(operation['description'])}</p>")
    if operation.get("parameters"):
        rows = (_row(p["name"], p["schema"], p["required"], p.get("description", "")) for p in operation["parameters"])
        parts.append(f"<table>{''.join(rows)}</table>")
    if "requestBody" in operation:
        parts.append(f"<p>Body: {_body(operation['requestBody']['content'])}</p>")
    answers = (
        f"<tr><td>{status}</td><td>{_body(answer.get('content', {}))}</td><td>{escape(answer['description'])}</td></tr>"
        for status, answer in sorted(operation["responses"].items())
    )
    parts.append(f"<table>{''.join(answers)}</table></details>")
    return "".join(parts)


def _model(name: str, schema: dict[str, Any]) -> str:
    text = f"<p>{escape(schema.get('description', ''))}</p>"
    if "properties" not in schema:
        return f'<h3 id="{escape(name)}">{escape(name)}</h3>{text}<p>{_type(schema)}</p>'
    required = set(schema.get("required", ()))
    rows = "".join(_row(field, inner, field in required) for field, inner in schema["properties"].items())
    return f'<h3 id="{escape(name)}">{escape(name)}</h3>{text}<table>{rows}</table>'


def render_docs(document: dict[str, Any]) -> bytes:
    tags = [tag["name"] for tag in document["tags"]]
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Stoker API</title><style>{STYLE}</style>',
        f"<h1>Stoker API {escape(document['info']['version'])}</h1><p>{escape(document['info']['description'])}</p>",
        "<nav>" + "".join(f'<a href="#tag-{tag}">{tag}</a>' for tag in tags),
        '<a href="#models">models</a><a href="/v1/openapi.json">openapi.json</a></nav>',
    ]
    for tag in tags:
        parts.append(f'<h2 id="tag-{tag}">{tag}</h2>')
        parts += [
            _operation(path, method, operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
            if tag in operation["tags"]
        ]
    parts.append('<h2 id="models">models</h2>')
    parts += [_model(name, schema) for name, schema in sorted(document["components"]["schemas"].items())]
    return "".join(parts).encode()
