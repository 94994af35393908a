"""JSON to models and back, for both sides.

The daemon refuses what it does not know; a client reads what it knows and leaves the rest, so that an older client understands
a newer daemon.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, TypeVar, cast

import msgspec

from stoker.errors import InternalError, InvalidRequest

__all__ = ["decode_answer", "decode_request", "encode", "plain_message"]

T = TypeVar("T")

_encoder = msgspec.json.Encoder()
encode = _encoder.encode


@lru_cache(maxsize=256)
def _decoder(model: Hashable) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(model)


def decode_request(data: bytes | memoryview, model: type[T]) -> T:
    """A request's body. What is wrong, and where, is in the message: ``Expected `int`, got `str` - at `$.cpus```."""
    try:
        value: T = _decoder(cast(Hashable, model)).decode(data)
    except msgspec.ValidationError as e:
        raise InvalidRequest(
            "invalid_field", f"the request is not right: {plain_message(e)}", "see /v1/openapi.json for what it may hold"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise InvalidRequest("invalid_json", f"the body is not JSON: {e}", "send UTF-8 JSON") from None
    return value


def plain_message(error: msgspec.ValidationError) -> str:
    """What is wrong and where, without what only Python's regular expressions need (:data:`stoker.api.types.END`)."""
    return str(error).replace("(?!\\\\n)", "").replace("(?!\\n)", "")


def decode_answer(data: bytes, model: type[T]) -> T:
    """An answer; fields that this side does not know are left out."""
    try:
        value: T = _decoder(cast(Hashable, model)).decode(data)
        return value
    except msgspec.ValidationError:
        pass
    except msgspec.DecodeError as e:
        raise InternalError("bad_answer", f"the daemon's answer is not JSON: {e}") from None
    try:
        return msgspec.convert(_prune(msgspec.json.decode(data), msgspec.inspect.type_info(model)), model)
    except msgspec.ValidationError as e:
        raise InternalError(
            "bad_answer", f"the daemon's answer is not understood: {e}", "daemon and client differ in version"
        ) from None


def _prune(value: Any, info: Any) -> Any:
    """``value`` without the fields that the type does not have, all the way down."""
    if isinstance(info, msgspec.inspect.Metadata):
        return _prune(value, info.type)
    if isinstance(info, msgspec.inspect.UnionType):
        kind = msgspec.inspect.StructType if isinstance(value, dict) else msgspec.inspect.ListType
        inner = next((t for t in info.types if isinstance(t, kind)), None)
        return value if inner is None else _prune(value, inner)
    if isinstance(info, msgspec.inspect.StructType) and isinstance(value, dict):
        return {f.encode_name: _prune(value[f.encode_name], f.type) for f in info.fields if f.encode_name in value}
    if isinstance(info, msgspec.inspect.ListType) and isinstance(value, list):
        return [_prune(item, info.item_type) for item in value]
    return value
