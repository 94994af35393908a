"""Operations, keys, health and version on the wire, and who is asking."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from msgspec import Meta, field

from stoker.api.errors import ErrorBody
from stoker.api.types import END, ByteCount, KeyId, Model, OperationId, UnixTime

__all__ = [
    "ApiKey",
    "ApiKeyPage",
    "CreateKey",
    "CreatedKey",
    "Health",
    "Operation",
    "OperationPage",
    "OperationState",
    "Principal",
    "Progress",
    "Quota",
    "Version",
]


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking. ``owner`` is written on what they make: ``local`` for the Unix socket, a key's id otherwise.

    An administrator (the Unix socket) sees everything; everyone else only what is theirs: the rest does not exist for them.
    Not on the wire; here because server and engine share it.
    """

    owner: str = "local"
    admin: bool = True
    uid: int | None = None


class OperationState(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Progress(Model, frozen=True):
    """The step that is going on. ``done`` of ``total``, in bytes or pieces; null where nobody knows."""

    step: str = ""
    done: float | None = None
    total: float | None = None
    detail: str = ""


class Operation(Model, frozen=True):
    """Long work. It goes on when its client goes; ``sandbox`` is what it works on."""

    id: OperationId
    kind: str
    state: OperationState
    created_at: UnixTime
    sandbox: str | None = None
    template: str | None = None
    """The template that it makes."""
    progress: Progress = field(default_factory=Progress)
    ended_at: UnixTime | None = None
    error: ErrorBody | None = None
    steps: dict[str, float] = field(default_factory=dict)
    """Milliseconds that the parts of a pause, resume, snapshot or fork took; ``stopped``: how long the guest stood."""


class OperationPage(Model, frozen=True):
    """One page of operations."""

    items: list[Operation]
    next: str | None = None


class Quota(Model, frozen=True):
    """Most that one key's sandboxes may hold together; 0: no bound but the host's."""

    sandboxes: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    cpus: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    memory: ByteCount = 0
    disk: ByteCount = 0


class CreateKey(Model, frozen=True):
    """A key to be; ``name`` is for people."""

    name: Annotated[str, Meta(max_length=64, pattern=r"^[^\x00-\x1f]*" + END)] = ""
    quota: Quota = field(default_factory=Quota)


class ApiKey(Model, frozen=True):
    """A key without its secret."""

    id: KeyId
    name: str
    created_at: UnixTime
    quota: Quota = field(default_factory=Quota)
    last_used_at: UnixTime | None = None
    revoked_at: UnixTime | None = None


class CreatedKey(Model, frozen=True):
    """``secret`` is shown this once and kept nowhere."""

    key: ApiKey
    secret: str


class ApiKeyPage(Model, frozen=True):
    """One page of keys."""

    items: list[ApiKey]
    next: str | None = None


class Health(Model, frozen=True):
    """``ok``, or ``degraded`` with what is wrong."""

    status: str
    problems: list[str] = field(default_factory=list)


class Version(Model, frozen=True):
    """The daemon's version and what it speaks. ``extensions`` name what this daemon's API has beyond the first ``v1``."""

    version: str
    api: str = "v1"
    agent_protocol: int = 1
    pid: int = 0
    started_at: UnixTime | None = None
    uptime: float = 0.0
    auto_started: bool = False
    sandboxes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    extensions: list[str] = field(default_factory=list)
