"""Building templates: a machine of the template's own, its steps, the command that stays, a snapshot, the row.

The machine is a sandbox of the user's like any other, but that its row names the template (``builds``): it ends with the build,
and the next start of the daemon removes it. What it says is the operation's log.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
from msgspec.structs import replace

from stoker.api.models import BuildTemplate, CreateSandbox, CreateSnapshot, Operation, OperationState, Principal, Quota
from stoker.engine import create
from stoker.engine.build import kept_rows
from stoker.engine.copies import check_copyable
from stoker.engine.ending import destroy
from stoker.engine.state import SnapshotRecord, new_id, require
from stoker.engine.template_steps import Log, begin_start, run_step, wait_ready
from stoker.engine.template_use import use
from stoker.engine.templates import EXPLICIT, TemplateRecord, Templates, row_of
from stoker.engine.trace import trace
from stoker.errors import Conflict, HostError, InternalError, InvalidRequest, NotFound, StokerError, error_from_wire
from stoker.guest.messages import ExecRequest
from stoker.host.laps import Laps

if TYPE_CHECKING:
    from stoker.engine.core import Box, Core, Live
    from stoker.engine.hub import Started
    from stoker.engine.operations import Running

__all__ = ["Builds"]

log = logging.getLogger(__name__)
T = TypeVar("T")
LABEL: Final = "stoker.build"
LOGS: Final = 32
"""Logs that are held of builds that ended."""
WARM: Final = ("/bin/true",)
WARM_TIME: Final = 30.0


class Builds:
    """``quota`` gives an owner's."""

    def __init__(self, core: Core, templates: Templates, quota: Callable[[str], Quota | None]) -> None:
        self._core, self._templates, self._quota = core, templates, quota
        self._logs: OrderedDict[str, Log] = OrderedDict()
        self._making: set[tuple[str, str]] = set()
        self._tried: set[str] = set()
        """Snapshots whose memory was made anew, or could not be."""

    def log_of(self, operation: str) -> Log:
        found = self._logs.get(operation)
        if found is None:
            raise NotFound(
                "log_unknown", f"the operation {operation} has no log (any more)", "stoker template inspect NAME has its end"
            )
        return found

    # -- beginning ----------------------------------------------------------------------------------------------------

    async def begin(self, who: Principal, request: BuildTemplate) -> Operation:
        """The work goes on by itself."""
        if (request.image is None) == (request.source is None):
            raise InvalidRequest(
                "bad_template", "a template is made from an image, or from a snapshot or sandbox", "name one of them"
            )
        if request.source is not None:
            self._refuse_shape(request)
        if self._core.closing:
            raise HostError("daemon_stopping", "the daemon is ending", "try again in a moment")
        self._templates.check_room(who.owner, request.name)
        if (who.owner, request.name) in self._making:
            raise Conflict(
                "template_building", f"the template {request.name} is just being made", "wait for it, or cancel its operation"
            )
        identity = new_id("tp")

        async def work(operation: Running, said: Log) -> None:
            if request.image is not None:
                await self._build(who, request, identity, operation, said)
            else:
                await self._adopt(who, request, identity, operation, said)

        return self._begin(who, request.name, identity, work)

    @staticmethod
    def _refuse_shape(request: BuildTemplate) -> None:
        """What a machine has that is there already."""
        given = {
            "setup": request.setup,
            "kernel": request.kernel,
            "cpus": request.cpus,
            "memory": request.memory,
            "disk": request.disk,
            "network": request.network,
        }
        for name, value in given.items():
            if value:
                raise InvalidRequest(
                    "bad_template",
                    f"{name} cannot be chosen for a template of what is there already",
                    "make the template, then build another one upon it: its image is the first one's name",
                )

    def _begin(self, who: Principal, name: str, identity: str, work: Callable[[Running, Log], Awaitable[None]]) -> Operation:
        core = self._core
        operation = core.operations.begin("template", who.owner, None)
        operation.value = replace(operation.value, template=identity)
        said = self._logs[operation.value.id] = Log()
        for key in [key for key, one in self._logs.items() if one.closed][: max(0, len(self._logs) - LOGS)]:
            del self._logs[key]
        self._making.add((who.owner, name))
        ended: list[StokerError | None] = []

        async def run() -> None:
            try:
                await work(operation, said)
                ended.append(None)
            except (Exception, asyncio.CancelledError) as cause:
                ended.append(_why(cause, name, core.closing))
                if isinstance(cause, asyncio.CancelledError):
                    raise

        task = core.spawn(run(), f"template {name}")

        def over(_: object) -> None:
            self._making.discard((who.owner, name))
            error = ended[0] if ended else Conflict("cancelled", f"the build of {name} was cancelled")
            if error is not None:
                said.line(f"==> failed: {error.message}")
            said.close()
            operation.end(error, cancelled=error is not None and error.code == "cancelled")

        async def cancel() -> None:
            task.cancel()
            await asyncio.wait({task})

        operation.cancel = cancel
        task.add_done_callback(over)
        return operation.value

    # -- the work -----------------------------------------------------------------------------------------------------

    async def _build(self, who: Principal, request: BuildTemplate, identity: str, operation: Running, said: Log) -> None:
        laps = Laps()
        wanted = CreateSandbox(
            image=str(request.image),
            kernel=request.kernel,
            cpus=request.cpus,
            memory=request.memory,
            disk=request.disk,
            env=request.env,
            network=request.network,
            labels={LABEL: request.name},
        )
        async with self._machine(who, wanted, identity, operation, said, laps) as box:
            trace("template.after_machine")
            await self._set_up(box, request, operation, said, laps)
            trace("template.after_setup")
            if not request.disk_only:
                with laps.lap("start"):
                    await self._start(box, request, said)
            trace("template.after_start")
            snapshot = await self._keep(box, request, identity, operation, said, laps)
            processes = await kept_rows(self._core, box)
            await self._commit(_record(who, request, identity, snapshot, operation, processes), said, laps, operation)

    async def _adopt(self, who: Principal, request: BuildTemplate, identity: str, operation: Running, said: Log) -> None:
        """Of what is there: a snapshot, or a sandbox, which goes on."""
        core, laps, source = self._core, Laps(), str(request.source)
        snapshots = self._templates.snapshots
        try:
            found = snapshots.find_whole(who, source)
        except NotFound:
            box = core.find(who, source)
            snapshot = await self._keep(box, request, identity, operation, said, laps)
            processes = await kept_rows(core, box)
        else:
            row = row_of(found.box, env=request.env, user=request.user, workdir=request.workdir)
            with laps.lap("snapshot"):
                snapshot = await snapshots.adopt(found, row, operation, identity, memory=not request.disk_only)
            processes = {}
        await self._commit(_record(who, request, identity, snapshot, operation, processes), said, laps, operation)

    @asynccontextmanager
    async def _machine(
        self, who: Principal, wanted: CreateSandbox, identity: str, operation: Running, said: Log, laps: Laps
    ) -> AsyncIterator[Box]:
        """The sandbox that it is built in. Nothing of it is left behind."""
        core = self._core
        with laps.lap("machine"):
            source = use(self._templates, who, wanted, self.remake)
            making = create.create(core, who, wanted, None, self._quota(who.owner), [], source=source, builds=identity)
            begun, cancelled = await _to_its_end(making)
            box = core.boxes[str(begun.sandbox)]
        try:
            if cancelled:
                raise asyncio.CancelledError
            said.line(f"==> machine {box.id} of {wanted.image}")
            with laps.lap("boot"):
                await self._created(who, begun, operation)
            yield box
        finally:
            await _to_its_end(_destroyed(core, box))

    async def _created(self, who: Principal, begun: Operation, operation: Running) -> None:
        now = begun
        while now.state is OperationState.RUNNING:
            now = await self._core.operations.wait(who, begun.id, 60.0, now)
            step = now.progress
            operation.step(step.step or "machine", step.done, step.total, step.detail)
        if now.error is not None:
            raise error_from_wire(500, msgspec.to_builtins(now.error))

    async def _set_up(self, box: Box, request: BuildTemplate, operation: Running, said: Log, laps: Laps) -> None:
        core, total = self._core, len(request.setup)
        if request.workdir is not None:
            script = f"mkdir -p -- {shlex.quote(request.workdir)}"
            await run_step(core, box, "workdir", script, said, request.step_timeout, user="root", cwd="/")
        for number, script in enumerate(request.setup, 1):
            what = f"step {number} of {total}"
            operation.step(f"setup: {what}", float(number - 1), float(total), script.splitlines()[0] if script.strip() else "")
            said.line(f"==> {what}: {script}")
            with laps.lap(f"step_{number}"):
                await run_step(
                    core, box, what, script, said, request.step_timeout, user=request.setup_user, cwd=request.workdir or "/"
                )

    async def _start(self, box: Box, request: BuildTemplate, said: Log) -> None:
        if request.start is not None:
            said.line(f"==> start: {request.start}")
            await begin_start(self._core, box, request.start, user=request.user, cwd=request.workdir)
        if request.start is not None or request.ready is not None:
            started = request.start is not None
            said.line("==> waiting until it is ready")
            await wait_ready(
                self._core,
                box,
                request.ready or "",
                request.ready_timeout,
                started=started,
                user=request.user,
                cwd=request.workdir,
            )

    async def _keep(
        self, box: Box, request: BuildTemplate, identity: str, operation: Running, said: Log, laps: Laps
    ) -> SnapshotRecord:
        """Of a machine of ours, or of a sandbox that goes on."""
        core, mine = self._core, bool(box.record.builds)
        said.line("==> snapshot")
        operation.step("snapshot")

        async def warm(live: Live) -> None:
            """What every command needs, and what was asked whether it is ready, is in the copies' page cache again."""
            for argv in ([*WARM], ["/bin/sh", "-c", request.ready or ":"]):
                with suppress(StokerError):
                    if live.agent is not None:
                        await live.agent.run(ExecRequest(argv, user=request.user), limit=0, timeout=WARM_TIME)

        with laps.lap("snapshot"):
            require(box.record, "snapshot")
            async with box.lock:
                require(box.record, "snapshot")
                check_copyable(box.record)
                core.filling.check(box.record.pool)
                row = row_of(box.record, env=request.env, user=request.user, workdir=request.workdir)
                words = CreateSnapshot(memory=not request.disk_only, compact=mine)
                snapshots = self._templates.snapshots
                # Cut short, it would leave the machine as it stands.
                taking = snapshots.take(box, words, operation, template=identity, row=row, warm=warm if mine else None)
                taken, cancelled = await _to_its_end(taking)
        if cancelled:
            await snapshots.discard(taken)
            raise asyncio.CancelledError
        return taken

    async def _commit(self, record: TemplateRecord, said: Log, laps: Laps, operation: Running, *, anew: bool = False) -> None:
        """The snapshot is there: now the row. That much is not cancelled any more."""
        core, templates = self._core, self._templates

        async def put() -> None:
            trace("template.after_snapshot")
            try:
                if anew and record.id not in core.templates:
                    raise NotFound("template_unknown", f"the template {record.name} is gone", "stoker template ls")
                templates.check_room(record.owner, record.name)
                said.line(f"==> the template {record.name} is there")
                await templates.put(record, said.tail())
            finally:
                if all(one.snapshot != record.snapshot for one in core.templates.values()):
                    await templates.snapshots.discard(core.snapshots[record.snapshot])

        record = replace(record, steps={name: round(seconds * 1000, 3) for name, seconds in laps.seconds.items()})
        await _to_its_end(put())
        operation.laps(laps.seconds)
        log.info("template %s (%s): %s", record.name, record.id, record.steps)

    # -- again --------------------------------------------------------------------------------------------------------

    def remake(self, record: TemplateRecord) -> None:
        """Has the memory of a template, which cannot be used, made anew from its disk: in the background, and once."""
        busy = (record.owner, record.name) in self._making
        if not record.built or record.snapshot in self._tried or busy or self._core.closing:
            return
        self._tried.add(record.snapshot)
        who = Principal(owner=record.owner, admin=False)

        async def work(operation: Running, said: Log) -> None:
            laps = Laps()
            wanted = CreateSandbox(image=EXPLICIT + record.id, cold=True, labels={LABEL: record.name})
            async with self._machine(who, wanted, record.id, operation, said, laps) as box:
                trace("template.after_again")
                request = BuildTemplate(name=record.name, ready=record.ready or None)
                snapshot = await self._keep(box, request, record.id, operation, said, laps)
                processes = await kept_rows(self._core, box)
                fresh = replace(record, snapshot=snapshot.id, processes=processes, operation=operation.value.id)
                await self._commit(fresh, said, laps, operation, anew=True)

        self._begin(who, record.name, record.id, work)


def _record(
    who: Principal,
    request: BuildTemplate,
    identity: str,
    snapshot: SnapshotRecord,
    operation: Running,
    processes: dict[int, Started],
) -> TemplateRecord:
    return TemplateRecord(
        id=identity,
        owner=who.owner,
        name=request.name,
        created_at=time.time(),
        snapshot=snapshot.id,
        made_from=str(request.image or request.source),
        setup=request.setup,
        start=request.start or "",
        ready=request.ready or "",
        ready_timeout=request.ready_timeout,
        processes=processes if snapshot.memory else {},
        built=request.image is not None or request.start is not None,
        operation=operation.value.id,
    )


async def _to_its_end(work: Coroutine[Any, Any, T]) -> tuple[T, bool]:
    """What must not be cut short: its result, and whether this was cancelled meanwhile."""
    task, cancelled = asyncio.get_running_loop().create_task(work), False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    return task.result(), cancelled


async def _destroyed(core: Core, box: Box) -> None:
    try:
        if not box.gone:
            await destroy(core, box)
    except (StokerError, OSError) as error:
        log.exception("%s could not be removed; the next start of the daemon goes on with it", box.id)
        core.problems.append(f"{box.id} could not be removed: {error}")


def _why(cause: BaseException, name: str, closing: bool) -> StokerError:
    if isinstance(cause, StokerError):
        return cause
    if isinstance(cause, asyncio.CancelledError):
        if closing:
            return HostError("daemon_stopped", f"the daemon ended while the template {name} was made", "make it again")
        return Conflict("cancelled", f"the build of the template {name} was cancelled", "make it again")
    if isinstance(cause, OSError):
        return HostError("host_failed", f"{cause.strerror}: {cause.filename or 'the host refused it'}", "stoker doctor")
    log.error("the build of template %s failed", name, exc_info=cause)
    return InternalError("internal", f"{type(cause).__name__}: {cause}", "see the daemon's log")
