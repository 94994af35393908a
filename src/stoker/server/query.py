"""Query strings to models: every parameter is known, within bounds, and of the right kind, or the request is refused."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl

import msgspec

from stoker.api.codec import plain_message
from stoker.errors import InvalidRequest

__all__ = ["Query", "decode_query"]

T = TypeVar("T")
MAX_FIELDS = 128


class Query(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base of an endpoint's parameters. A list's parameter may be repeated, any other may not."""


@lru_cache(maxsize=256)
def _lists(model: Hashable) -> frozenset[str]:
    info = msgspec.inspect.type_info(model)
    assert isinstance(info, msgspec.inspect.StructType)
    return frozenset(f.encode_name for f in info.fields if isinstance(_bare(f.type), msgspec.inspect.ListType))


def _bare(info: Any) -> Any:
    return info.type if isinstance(info, msgspec.inspect.Metadata) else info


def decode_query(raw: bytes, model: type[T]) -> T:
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except (ValueError, UnicodeDecodeError) as e:
        raise InvalidRequest("bad_query", f"the query string is not right: {e}") from None
    lists = _lists(cast(Hashable, model))
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in lists:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise InvalidRequest("bad_query", f"the parameter {name[:64]!r} is there more than once")
        else:
            values[name] = value
    try:
        return msgspec.convert(values, model, strict=False)
    except msgspec.ValidationError as e:
        message = plain_message(e)
        raise InvalidRequest("bad_query", f"the query string is not right: {message}", "see /v1/openapi.json") from None
