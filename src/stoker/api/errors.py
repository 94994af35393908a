"""The one shape of an error on the wire (:func:`stoker.errors.error_to_wire` writes it)."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, field

from stoker.api.types import END, Model

__all__ = ["ErrorBody"]


class ErrorBody(Model, frozen=True):
    """``code`` is stable, ``message`` says what and which object, ``hint`` what to do next, ``family`` the class of error."""

    code: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]*" + END)]
    message: str
    hint: str = ""
    family: str = "InternalError"
    details: dict[str, Any] = field(default_factory=dict)
    console: list[str] = field(default_factory=list)
