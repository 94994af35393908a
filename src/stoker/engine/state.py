"""A sandbox's row, and what may be done in which state.

Each operation names the states it may start from; nothing else is allowed. The refusal says which state it is and what leaves it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from msgspec import Struct, field
from msgspec.structs import replace

from stoker.api.models import (
    Certificate,
    CreateSandbox,
    ErrorBody,
    InitMode,
    Interface,
    NetworkMode,
    Origin,
    Resources,
    Sandbox,
    SandboxState,
    SnapshotState,
    Timeout,
    Versions,
    VolumeMount,
)
from stoker.errors import Conflict, StokerError, error_to_wire
from stoker.network.plan import BridgePlan, parse_any_slot

__all__ = [
    "ALLOWED",
    "ASLEEP",
    "TRANSIENT",
    "WITH_MACHINE",
    "Attached",
    "Mounted",
    "Record",
    "SnapshotRecord",
    "VolumeRecord",
    "actions",
    "new_id",
    "require",
    "to_body",
    "to_sandbox",
]

S = SandboxState
TRANSIENT: Final = frozenset({S.CREATING, S.PAUSING, S.RESUMING, S.STOPPING})
"""States that end by themselves."""
ASLEEP: Final = frozenset({S.PAUSING, S.PAUSED, S.RESUMING})
"""States that whoever wants to use the sandbox waits out, or ends."""
WITH_MACHINE: Final = frozenset({S.RUNNING, S.FROZEN, S.LOST})

ALLOWED: Final[dict[str, frozenset[SandboxState]]] = {
    "destroy": frozenset(S),
    "stop": frozenset({S.RUNNING, S.FROZEN, S.LOST, S.PAUSED}),
    "start": frozenset({S.STOPPED, S.FAILED}),
    "freeze": frozenset({S.RUNNING}),
    "thaw": frozenset({S.FROZEN}),
    "pause": frozenset({S.RUNNING, S.FROZEN}),
    "resume": frozenset({S.PAUSED}),
    "fork": frozenset({S.RUNNING}),
    "snapshot": frozenset({S.RUNNING, S.FROZEN, S.PAUSED}),
    "exec": frozenset({S.RUNNING}),
    "ping": frozenset({S.RUNNING}),
    "resize": frozenset({S.RUNNING, S.STOPPED}),
    "set_network": frozenset({S.RUNNING, S.FROZEN, S.STOPPED, S.PAUSED, S.LOST}),
    "set_timeout": frozenset({S.CREATING, S.RUNNING, S.FROZEN, S.STOPPED, S.PAUSED, S.LOST}),
    "lease": frozenset({S.CREATING, S.RUNNING, S.FROZEN, S.LOST, S.PAUSED}),
}
"""Operation to the states it may start from. ``exec`` stands for everything on processes and files.
``start`` from ``failed`` needs a disk that is left: a sandbox that ran once."""

_LEAVES: Final = {
    S.CREATING: "it becomes running or failed by itself (stoker wait {id}); stoker rm {id} cancels it",
    S.RUNNING: "stoker stop {id}, or stoker rm {id}",
    S.FROZEN: "stoker thaw {id}",
    S.PAUSING: "it becomes paused by itself (stoker wait {id})",
    S.PAUSED: "stoker resume {id}, or anything that uses it; stoker stop {id} gives its memory up and keeps its disk",
    S.RESUMING: "it becomes running by itself (stoker wait {id})",
    S.STOPPING: "it becomes stopped by itself (stoker wait {id})",
    S.STOPPED: "stoker start {id}",
    S.FAILED: "stoker inspect {id} says why; stoker rm {id}, or stoker start {id} where it has a disk",
    S.LOST: "the daemon goes on trying to reach its agent; stoker stop {id} ends the machine and keeps the disk",
}
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"


def new_id(prefix: str, length: int = 20) -> str:
    """``sb-`` and 20 base32 characters: 100 random bits."""
    return f"{prefix}-" + "".join(secrets.choice(_ALPHABET) for _ in range(length))


class Mounted(Struct, frozen=True, kw_only=True):
    """A volume of a sandbox: which one, and where it is in the guest."""

    id: str
    name: str
    path: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Attached:
    """A further disk of a machine, mounted at ``path``: ``file`` is raw, or, with ``base``, an overlay over that raw image.

    ``serial`` is how the guest finds it: at most 20 letters, digits, ``-`` and ``_``.
    """

    serial: str
    file: Path
    path: str
    read_only: bool = False
    base: Path | None = None


class VolumeRecord(Struct, frozen=True, kw_only=True):
    """A volume as the database has it. ``size`` is bytes."""

    id: str
    owner: str
    name: str
    size: int
    created_at: float


class SnapshotRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A snapshot as the database has it. ``box``: its sandbox's row at that moment."""

    id: str
    owner: str
    state: SnapshotState
    created_at: float
    box: Record
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    parent: str = ""
    memory: bool = True
    template: str = ""
    """The template that it belongs to: nobody sees it but through that one."""
    operation: str | None = None
    steps: dict[str, float] = field(default_factory=dict)
    imported: bool = False
    unfit: str = ""
    """Why its memory is of no use here."""

    @property
    def label(self) -> str:
        return self.name or self.id


class Record(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A sandbox as the database has it. Values are replaced, never changed."""

    id: str
    owner: str
    state: SandboxState
    request: CreateSandbox
    created_at: float
    name: str | None = None
    resources: Resources = field(default_factory=Resources)
    image_digest: str = ""
    image_path: str = ""
    kernel_path: str = ""
    kernel: str = ""
    env: dict[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = ""
    command: list[str] = field(default_factory=list)
    hostname: str = ""
    volumes: list[Mounted] = field(default_factory=list)
    timeout: Timeout | None = None
    expires_at: float | None = None
    """Of an absolute timeout; an idle one depends on the use."""
    started_at: float | None = None
    ended_at: float | None = None
    versions: Versions = field(default_factory=Versions)
    error: ErrorBody | None = None
    operation: str | None = None
    main: int | None = None
    origin: Origin = Origin.BOOT
    timings: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    """Why it is frozen, when nobody asked for that."""
    slot: str = ""
    """The slot that its machine has on the host."""
    pinned: str = ""
    """The slot that is its own while it exists, with a machine or without."""
    joined: list[str] = field(default_factory=list)
    """The slots of its further interfaces, which are its own likewise."""
    pool: str = ""
    """The pool its disk is in; "" is the one that needs no file system of its own."""
    boots: int = 0
    """How often it ran. From the first time on its disk is kept until it is destroyed."""
    base: str = ""
    """The digest of its memory's base, where ``DATA_DIR/memory/ID`` is a file of it; "": it has none, or none that has a file."""
    saved: str = ""
    """The name, in ``DATA_DIR/snapshots``, of what it is paused in."""
    woken: bool = False
    """What it is paused in is its past: the guest goes on, or has."""
    pauses: int = 0
    generation: int = 0
    """How many times a memory was taken up since the first boot that it stems from."""
    certificate: Certificate | None = None
    parent: str = ""
    """The sandbox or snapshot whose copy it is."""
    disk_of: str = ""
    """The snapshot whose disk it boots from the first time."""
    ancestor: str = ""
    """The snapshot that was last made of it, or that it was made from."""
    template: str = ""
    """The template it was made from, by its name then."""
    builds: str = ""
    """The template that is being made in it: it ends with that, or with the daemon."""
    warm: str = ""
    """The warm set in which its machine waits for a create. Nobody sees it."""
    doomed: bool = False
    """A destroy has begun; nothing but finishing it is left."""

    @property
    def label(self) -> str:
        return self.name or self.id


def actions(record: Record) -> list[str]:
    """The operations that the sandbox's state allows."""
    if record.doomed:
        return ["destroy"]
    return [
        verb
        for verb, states in ALLOWED.items()
        if record.state in states and verb != "lease" and not (verb == "start" and not record.boots)
    ]


def require(record: Record, verb: str) -> None:
    """Raises ``Conflict("wrong_state")`` unless the sandbox is in a state that ``verb`` may start from."""
    allowed = ALLOWED[verb]
    if record.state in allowed and not record.doomed:
        if verb != "start" or record.boots:
            return
        raise Conflict("no_disk", f"{record.label} never ran: it has no disk to start from", f"stoker rm {record.label}")
    state = "being destroyed" if record.doomed else record.state.value
    leaves = "nothing; it goes by itself" if record.doomed else _LEAVES[record.state].format(id=record.label)
    raise Conflict(
        "wrong_state",
        f"{record.label} is {state}; {verb} needs it {' or '.join(sorted(s.value for s in allowed))}",
        leaves,
        details={"state": record.state.value, "allowed": sorted(s.value for s in allowed), "actions": actions(record)},
    )


def to_body(error: StokerError) -> ErrorBody:
    """An error as it is kept."""
    wire = error_to_wire(error)
    return ErrorBody(
        code=wire["code"],
        message=wire["message"],
        hint=wire["hint"],
        family=wire["family"],
        details=wire.get("details", {}),
        console=wire.get("console", []),
    )


def _address(record: Record) -> str:
    """By which the host reaches its machine; empty: that is not known."""
    if not record.slot:
        return ""
    plan = parse_any_slot(record.slot)
    return (record.request.address or "").partition("/")[0] if isinstance(plan, BridgePlan) else str(plan.address)


def _interfaces(record: Record) -> list[Interface]:
    """With the names that they have on the host."""
    if not record.joined:
        return record.request.interfaces
    plans = map(parse_any_slot, record.joined)
    return [replace(asked, tap=plan.interface) for asked, plan in zip(record.request.interfaces, plans, strict=True)]


def to_sandbox(record: Record, expires_at: float | None) -> Sandbox:
    """What the world sees of a row."""
    request = record.request
    return Sandbox(
        id=record.id,
        state=record.state,
        image=request.image,
        created_at=record.created_at,
        name=record.name,
        owner=record.owner,
        labels=request.labels,
        image_digest=record.image_digest,
        kernel=record.kernel or request.kernel,
        resources=record.resources,
        env=record.env or request.env,
        hostname=record.hostname,
        user=record.user or request.user or "",
        workdir=record.workdir or request.workdir or "",
        command=record.command,
        template=record.template,
        network=request.network or NetworkMode.USER,
        address=_address(record),
        egress=(request.egress or "all") if request.network is NetworkMode.NAT else "",
        publish=request.publish,
        rate_in=request.rate_in,
        rate_out=request.rate_out,
        connections=request.connections,
        ipv6=request.ipv6,
        bridge=request.bridge or "",
        interfaces=_interfaces(record),
        interface=parse_any_slot(record.slot).interface if record.slot else "",
        init=request.init or InitMode.AGENT,
        volumes=[VolumeMount(name=m.name, path=m.path, read_only=m.read_only) for m in record.volumes],
        app=request.app,
        lease=request.lease,
        timeout=record.timeout,
        expires_at=expires_at,
        reason=record.reason,
        pool=record.pool,
        started_at=record.started_at,
        ended_at=record.ended_at,
        versions=record.versions,
        error=record.error,
        operation=record.operation,
        main=record.main,
        origin=record.origin,
        timings=record.timings,
        actions=actions(record),
    )
