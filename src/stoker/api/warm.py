"""Warm sets on the wire: machines that are up and stand still until a create takes one."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta, field

from stoker.api.errors import ErrorBody
from stoker.api.sandboxes import CreateSandbox
from stoker.api.types import END, Model, UnixTime

__all__ = ["SetWarm", "WarmSet", "WarmSetId", "WarmSetList"]

WarmSetId: TypeAlias = Annotated[
    str, Meta(pattern=r"^ws-[a-z2-7]{20}" + END, description="A warm set: `ws-` and 20 base32 characters.")
]
Size: TypeAlias = Annotated[int, Meta(ge=0, le=256)]


class SetWarm(Model, frozen=True):
    """How many machines are to wait, and for which creates: those that ask for the same image (or template), kernel, CPUs, memory,
    disk and network. Everything else is each create's own, and refused here."""

    sandbox: CreateSandbox
    size: Size


class WarmSet(Model, frozen=True):
    """One warm set. ``ready`` machines wait; ``making``: one is being made."""

    id: WarmSetId
    owner: str
    sandbox: CreateSandbox
    size: int
    ready: int
    created_at: UnixTime
    making: bool = False
    taken: int = 0
    """Creates that were served from it since the daemon started."""
    problem: ErrorBody | None = None
    """Why the last machine could not be made; it is tried again."""


class WarmSetList(Model, frozen=True):
    """All warm sets of a key; an administrator sees everybody's."""

    items: list[WarmSet] = field(default_factory=list)
