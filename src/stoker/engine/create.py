"""May this sandbox be, and its first row: admission, idempotency, names, the intent. The work itself is in :mod:`.build`."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
from msgspec.structs import replace

import stoker
from stoker.api.models import (
    CreateSandbox,
    Event,
    InitMode,
    NetworkMode,
    Operation,
    Principal,
    Quota,
    Resources,
    SandboxState,
    Timeout,
    TimeoutAction,
    TimeoutMode,
    Versions,
)
from stoker.engine.build import begin
from stoker.engine.claims import claim_in
from stoker.engine.core import Box, Core, put
from stoker.engine.ledger import Ledger
from stoker.engine.network_words import check_network, default_network, has_own_addresses
from stoker.engine.state import Mounted, Record, new_id, require
from stoker.engine.takeover import take_over
from stoker.engine.trace import trace
from stoker.errors import Conflict, Forbidden, HostError

if TYPE_CHECKING:
    from stoker.engine.operations import Running
    from stoker.settings import Settings

__all__ = ["Source", "begin_from", "check_host_paths", "create", "expiry", "first_row", "settled", "start", "whole"]

MIB: Final = 1 << 20
MEMORY: Final = 512 * MIB
IDEMPOTENT_SECONDS: Final = 86400.0


def settled(timeout: Timeout | None) -> Timeout | None:
    """A timeout that says what happens when it passes."""
    if timeout is None or timeout.action is not None:
        return timeout
    return replace(timeout, action=TimeoutAction.PAUSE if timeout.mode is TimeoutMode.IDLE else TimeoutAction.DESTROY)


def with_network(request: CreateSandbox, settings: Settings) -> CreateSandbox:
    """Which network it gets when it names none: one that has what else it asks for."""
    if request.network is not None:
        return request
    if request.bridge is not None:
        return replace(request, network=NetworkMode.BRIDGE)
    limited = request.rate_in or request.rate_out or request.connections or request.ipv6 or request.learn
    asks = request.egress is not None or request.publish or request.host_access or limited or has_own_addresses(request)
    return replace(request, network=NetworkMode.NAT if asks else default_network(settings))


def whole(request: CreateSandbox) -> CreateSandbox:
    """The same with everything that was left open."""
    return replace(
        request,
        cpus=request.cpus or 1,
        memory=-(-(request.memory or MEMORY) // MIB) * MIB,
        network=request.network or NetworkMode.USER,
        init=request.init or InitMode.AGENT,
    )


class Source(Protocol):
    """What a sandbox is made from that is more than an image."""

    def row(self, record: Record) -> Record:
        """The first row, with what it has from there."""

    def begin(self, box: Box, operation: Running) -> None:
        """Starts the work."""

    @property
    def key(self) -> str:
        """What two sources have to have in common for their sandboxes to begin as the same."""

    @property
    def restores(self) -> bool:
        """Whether there is memory of it that can be taken up."""


def expiry(timeout: Timeout | None) -> float | None:
    return time.time() + timeout.seconds if timeout is not None and timeout.mode is TimeoutMode.ABSOLUTE else None


def check_host_paths(who: Principal, request: CreateSandbox) -> None:
    """Refuses files of the host to all but its own users."""
    if not who.admin and (request.initrd or request.kernel.startswith(("/", ".", "~")) or request.image.startswith("ext4:")):
        raise Forbidden("host_path", "files of the daemon's host are for its own users", "ask over the Unix socket, or use a name")


def digest_of(request: CreateSandbox) -> str:
    """What makes two requests the same."""
    return hashlib.sha256(msgspec.json.encode(request, order="sorted")).hexdigest()


class _Repeated(Exception):
    """The idempotency key was used before."""

    def __init__(self, sandbox: str, digest: str) -> None:
        super().__init__(sandbox)
        self.sandbox, self.digest = sandbox, digest


async def create(
    core: Core,
    who: Principal,
    request: CreateSandbox,
    key: str | None,
    quota: Quota | None,
    volumes: list[Mounted],
    *,
    source: Source | None = None,
    builds: str = "",
) -> Operation:
    """Admits, records and begins; the rest goes on by itself. ``volumes`` are those that the request names.

    With ``builds`` it ends with the daemon, as what is made in it does.
    """
    check_host_paths(who, request)
    if core.closing:
        raise HostError("daemon_stopping", "the daemon is ending", "try again in a moment")
    digest = digest_of(request)
    record = first_row(core, who.owner, request, volumes, source, builds=builds)
    check_network(record.request)
    core.filling.check(record.pool, further=bool(volumes or request.app))
    box = Box(record)
    if key is not None and (former := await _former(core, who, key)) is not None:
        return _again(core, who, *former, digest)
    if core.waiting is not None and (waits := await core.waiting.take(request, record, source)) is not None:
        return await _take_over(core, who, waits, record, key, digest, quota, source)
    await core.admit(box, quota)
    operation = core.operations.begin("create", who.owner, box.id)
    box.record = replace(record, operation=operation.value.id)
    trace("create.after_admit")

    def undo() -> None:
        core.admission.release(box.id)
        core.operations.discard(operation)

    if (before := await _enter(core, who, box, key, digest, undo)) is not None:
        return before
    begin_from(core, box, operation, source, "create")
    return operation.value


def first_row(
    core: Core,
    owner: str,
    request: CreateSandbox,
    volumes: list[Mounted],
    source: Source | None,
    *,
    builds: str = "",
    warm: str = "",
) -> Record:
    """The row that a sandbox of this request begins with."""
    asked = whole(with_network(request, core.settings))
    record = Record(
        id=new_id("sb"),
        owner=owner,
        state=SandboxState.CREATING,
        request=asked,
        created_at=time.time(),
        name=request.name,
        resources=Resources(cpus=asked.cpus or 1, memory=asked.memory or MEMORY, disk=request.disk),
        hostname=request.hostname or request.name or "",
        pool=core.pools.default,
        volumes=volumes,
        timeout=settled(request.timeout),
        expires_at=expiry(request.timeout),
        versions=Versions(daemon=stoker.__version__),
        builds=builds,
        warm=warm,
    )
    return record if source is None else source.row(record)


def begin_from(core: Core, box: Box, operation: Running, source: Source | None, verb: str) -> None:
    """Starts the work, upon whatever the sandbox is made from."""
    if source is not None:
        source.begin(box, operation)
    else:
        begin(core, box, operation, verb)


async def _take_over(
    core: Core,
    who: Principal,
    box: Box,
    wanted: Record,
    key: str | None,
    digest: str,
    quota: Quota | None,
    source: Source | None,
) -> Operation:
    """The same with a machine that waits: its row becomes the new sandbox's."""
    waits, waiting = box.record, core.waiting
    assert waiting is not None
    try:
        # Of the host it has what it needs; its owner may have had less left when it began to wait.
        await core.admit(box, quota)
    except BaseException:
        waiting.put_back(box)
        raise
    operation = core.operations.begin("create", who.owner, box.id)
    box.golden_only = False
    box.record = replace(
        waits,
        state=SandboxState.CREATING,
        request=wanted.request,
        created_at=wanted.created_at,
        name=wanted.name,
        env={**waits.env, **wanted.request.env},
        user=wanted.request.user or waits.user,
        workdir=wanted.request.workdir or waits.workdir,
        hostname=wanted.hostname,
        timeout=wanted.timeout,
        expires_at=wanted.expires_at,
        operation=operation.value.id,
        boots=0,
        started_at=None,
        warm="",
    )

    def undo() -> None:
        box.record = waits
        core.operations.discard(operation)
        waiting.put_back(box)

    if (before := await _enter(core, who, box, key, digest, undo)) is not None:
        return before
    take_over(core, box, operation, lambda: begin_from(core, box, operation, source, "create"))
    return operation.value


async def _enter(core: Core, who: Principal, box: Box, key: str | None, digest: str, undo: Callable[[], None]) -> Operation | None:
    """Writes the row down, and tells of the sandbox. Where that fails ``undo`` is called; so it is where the key was used before:
    then the result is the operation of that time."""
    record = box.record
    event = core.events.make("sandbox.created", box.id, name=record.name, image=record.request.image)
    try:
        await _intend(core, who, box, key, digest, event)
    except BaseException as error:
        undo()
        if isinstance(error, _Repeated):
            return _again(core, who, error.sandbox, error.digest, digest)
        raise
    core.add(box)
    core.events.tell(record.owner, event)
    if record.request.lease:
        box.lease_until = time.monotonic() + core.lease_grace
    trace("create.after_intent")
    return None


async def _former(core: Core, who: Principal, key: str) -> tuple[str, str] | None:
    row: tuple[str, str] | None = await core.database.read(
        lambda db: db.execute(
            "SELECT sandbox, digest FROM idempotency WHERE owner = ? AND key = ? AND created > ?",
            (who.owner, key, time.time() - IDEMPOTENT_SECONDS),
        ).fetchone()
    )
    return row


def _again(core: Core, who: Principal, sandbox: str, before: str, digest: str) -> Operation:
    if before != digest:
        raise Conflict(
            "idempotency_mismatch", "this Idempotency-Key was used for another request", "use a new key for a new request"
        )
    box = core.find(who, sandbox)
    return core.operations.of(box.record)


async def _intend(core: Core, who: Principal, box: Box, key: str | None, digest: str, event: Event) -> None:
    record = box.record
    places = core.places(record.id, record.pool, app=record.request.app is not None)
    things = places.things(lease=record.request.lease, sandbox=record.id)

    def work(db: sqlite3.Connection) -> None:
        if key is not None:
            db.execute("DELETE FROM idempotency WHERE created < ?", (time.time() - IDEMPOTENT_SECONDS,))
            former = db.execute("SELECT sandbox, digest FROM idempotency WHERE owner = ? AND key = ?", (who.owner, key)).fetchone()
            if former is not None:
                raise _Repeated(*former)
            values = (who.owner, key, digest, record.id, record.created_at)
            db.execute("INSERT INTO idempotency (owner, key, digest, sandbox, created) VALUES (?, ?, ?, ?, ?)", values)
        if record.name is not None:
            taken = db.execute("SELECT id FROM sandboxes WHERE owner = ? AND name = ?", (record.owner, record.name)).fetchone()
            if taken is not None:
                raise Conflict(
                    "name_taken",
                    f"there is a sandbox {record.name} already: {taken[0]}",
                    f"stoker rm {record.name}, or another name",
                )
        put(db, record)
        claim_in(db, record.id, record.label, record.volumes)
        Ledger.intend_in(db, record.id, things)
        core.events.insert_in(db, event)

    await core.database.write(work, durable=True)


async def start(core: Core, box: Box, quota: Quota | None) -> Operation:
    """Boots a stopped sandbox from its disk again."""
    require(box.record, "start")
    async with box.lock:
        require(box.record, "start")
        await core.admit(box, quota)
        operation = core.operations.begin("start", box.record.owner, box.id)
        try:
            places = core.places(box.id)
            things = places.things(lease=False, sandbox=box.id)
            await core.save(
                box,
                event="sandbox.state",
                durable=True,
                also=lambda db: Ledger.intend_in(db, box.id, things),
                state=SandboxState.CREATING,
                error=None,
                main=None,
                operation=operation.value.id,
                expires_at=expiry(box.record.timeout),
            )
        except BaseException:
            core.admission.rest(box.id)
            core.operations.discard(operation)
            raise
        trace("start.after_mark")
        begin(core, box, operation, "start")
    return operation.value
