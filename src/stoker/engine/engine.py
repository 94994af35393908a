"""The persistent engine's front door: sandboxes that live, are used by many clients and survive the process that holds them.

``async with Engine.open(settings) as engine`` holds the data directory (one engine at a time), adopts every machine that lives,
removes what must not be there, and then serves. Leaving the block lets go of the machines; they go on.

The contract of every method is in :mod:`stoker.server.ports`, which this fits. How it is made:

============  ==================================================================================
database      one SQLite file, one thread, one hop per transaction
ledger        what the host has because of us, written down before it is made
state, core   rows and what may be done in which state; what the parts share
create, build the way of a create and a start; :mod:`.boot` makes the machine
ending        destroy, stop, a machine that is gone
pause, wake   memory and devices into files, and back
templates     names that sandboxes are created from: with ``template_*``, how they are made and used
watch         a machine's end, seen at once; its agent, reached again
reconcile     what a new engine does with what it finds
hub, feed     processes; one process's output for many clients
timers        timeouts and leases
============  ==================================================================================
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

from stoker.api.models import (
    ApiKey,
    ApiKeyPage,
    BuildTemplate,
    Certificate,
    CopySandbox,
    CreatedKey,
    CreateKey,
    CreateSandbox,
    CreateSnapshot,
    Event,
    ForkResult,
    ForkSandbox,
    Health,
    Metrics,
    Operation,
    OperationLog,
    OperationPage,
    OperationState,
    Principal,
    Sandbox,
    SandboxPage,
    SandboxState,
    SetNetwork,
    Snapshot,
    Timeout,
)
from stoker.engine import build, create, ending, fork, pause, verbs
from stoker.engine.apps import Apps
from stoker.engine.booter import Booter
from stoker.engine.core import Box, Core
from stoker.engine.create import Source
from stoker.engine.database import Database, lock_data
from stoker.engine.explaining import NetworksSeen
from stoker.engine.facts import facts
from stoker.engine.files import Files
from stoker.engine.hidden import PARKED
from stoker.engine.images import Images
from stoker.engine.keys import Keys
from stoker.engine.lines import Connections
from stoker.engine.metrics import sample
from stoker.engine.pages import page_after
from stoker.engine.pooling import Pooling
from stoker.engine.processes import Processes
from stoker.engine.reconcile import load_all, private_directory, reconcile
from stoker.engine.resize import resize
from stoker.engine.snapshots import Snapshots
from stoker.engine.state import Record
from stoker.engine.template_build import Builds
from stoker.engine.template_use import use
from stoker.engine.templates import Templates
from stoker.engine.timers import hold_lease, reap
from stoker.engine.trace import arm
from stoker.engine.units import Units
from stoker.engine.upkeep import Upkeep
from stoker.engine.volumes import Volumes, check_paths
from stoker.engine.waiting import Waiting
from stoker.engine.warm import WarmSets
from stoker.errors import GuestError, NotFound
from stoker.storage.app import prepare_apps, sweep_apps

if TYPE_CHECKING:
    from stoker.settings import Settings

__all__ = ["Engine"]

log = logging.getLogger(__name__)
LEASE_GRACE: Final = 10.0


class Engine:
    """See the module. Made by :meth:`open` only."""

    def __init__(self, core: Core, keys: Keys, stack: AsyncExitStack) -> None:
        self._core = core
        core.wake = self._wake
        self._keys = keys
        self._stack = stack
        self.processes = Processes(core)
        self.networks = NetworksSeen(core)
        self.connections = Connections(core)
        self.files = Files(core)
        self.images = Images(core)
        self.upkeep = Upkeep(core)
        self.volumes = Volumes(core, keys.quota)
        self.pools = Pooling(core)
        self.snapshots = Snapshots(core)
        self.templates = Templates(core, self.snapshots)
        self.builds = Builds(core, self.templates, keys.quota)
        self.apps = Apps(core, keys.quota)
        self._waiting = core.waiting = Waiting(core, keys.quota, self._source, core.settings.parked)
        self.warm = WarmSets(core, self._waiting)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        settings: Settings,
        *,
        booter: Booter | None = None,
        lease_grace: float = LEASE_GRACE,
        trace_kill: str | None = None,
        boots: int | None = None,
        make_pool: bool = False,
        keys_ahead: bool = False,
    ) -> AsyncIterator[Engine]:
        """Opens the engine of ``settings.data_dir``.

        ``lease_grace``: seconds a lease may be without a holder, at first and after a restart. ``trace_kill``: a point of
        :mod:`stoker.engine.trace` at which this process is to be killed (tests). ``boots``: how many at a time.
        ``make_pool``: in the background, a pool is made where the settings want one and there is none.
        ``keys_ahead``: likewise ssh host keys for copies; without, each is made when it is wanted.
        Errors: ``engine_running``, ``database_newer``, ``database_corrupt``, ``directory_refused``.
        """
        import os

        arm(os.environ.get("STOKER_TRACE_KILL", "") if trace_kill is None else trace_kill)
        if booter is None:
            from stoker.engine.machines import RealBooter

            booter = RealBooter(settings)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(lock_data(settings.data_dir))
            private_directory(settings.run_dir, 0o755)
            private_directory(settings.run_dir / "sandboxes", 0o711)
            private_directory(settings.run_dir / "helpers", 0o711)
            private_directory(settings.data_dir / "volumes", 0o700)
            private_directory(settings.data_dir / "apps", 0o711)
            private_directory(settings.data_dir / "memory", 0o700)
            private_directory(settings.data_dir / "snapshots", 0o700)
            prepare_apps(settings.data_dir)
            database = await stack.enter_async_context(Database.open(settings.database))
            units = await stack.enter_async_context(Units())
            width = boots or max(2, os.cpu_count() or 1)
            core = Core(settings, database, booter, lease_grace=lease_grace, boots=width, units=units)
            stack.callback(core.pools.close)
            await asyncio.to_thread(core.pools.open, "")
            keys = Keys(database)
            engine = cls(core, keys, stack)
            stack.push_async_callback(engine._let_go)
            await engine._begin()
            if make_pool:
                core.spawn(engine.pools.make_by_itself(), "pool")
            if keys_ahead:
                core.spawn(core.host_keys.keep_filled(), "host keys")
            yield engine

    async def _begin(self) -> None:
        core = self._core
        from stoker.host import cgroups

        if not core.units.usable:
            core.cgroups = await asyncio.to_thread(cgroups.base)
        await self._keys.load()
        await load_all(core)
        await self.pools.begin()
        await self.volumes.begin()
        await self.snapshots.begin()
        await asyncio.to_thread(core.host_keys.sweep)
        await self.templates.begin()
        await self.apps.begin()
        await reconcile(core)
        await asyncio.to_thread(sweep_apps, core.settings.data_dir)
        await self.warm.begin()
        self._waiting.begin()
        core.spawn(reap(core), "deadlines")
        core.spawn(core.filling.watch(), "space")
        core.spawn(sample(core), "metrics")

    def retire(self) -> None:
        """The daemon is about to end: clients that go from now on end nothing with them."""
        self._core.closing = True

    async def aclose(self) -> None:
        """Lets go of everything; machines live on. Leaving :meth:`open`'s block does it too."""
        await self._let_go()

    async def _let_go(self) -> None:
        core = self._core
        core.closing = True
        await core.end_tasks()
        self.templates.memories.close()
        await self._waiting.aclose()
        await core.networks.aclose()
        await core.booter.aclose()
        reason = GuestError("daemon_stopped", "the daemon ended; the sandbox goes on", "connect again")
        for box in core.boxes.values():
            box.console.close()
            live = box.live
            await ending.detach(box, reason)
            if live is not None:
                await live.machine.close()
        await self._keys.close()

    @staticmethod
    def _sees(who: Principal, record: Record) -> bool:
        return not record.warm and (who.admin or record.owner == who.owner)

    def _find(self, who: Principal, sandbox: str) -> Box:
        return self._core.find(who, sandbox)

    # -- sandboxes ----------------------------------------------------------------------------------------------------

    async def create(self, who: Principal, request: CreateSandbox, *, idempotency_key: str | None = None) -> Operation:
        core = self._core
        check_paths(request.volumes, request.app is not None)
        volumes = self.volumes.resolve(who, request.volumes)
        await self.volumes.left({volume.id for volume in volumes})
        if request.app is not None:
            await self.apps.get(who, request.app)
        source = self._source(who, request)
        quota = self._keys.quota(who.owner)
        return await core.shielded(create.create(core, who, request, idempotency_key, quota, volumes, source=source))

    def _source(self, who: Principal, request: CreateSandbox) -> Source | None:
        return use(self.templates, who, request, self.builds.remake)

    async def get(self, who: Principal, sandbox: str) -> Sandbox:
        return self._find(who, sandbox).value

    async def list(
        self,
        who: Principal,
        *,
        states: frozenset[SandboxState] = frozenset(),
        labels: Mapping[str, str | None] | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> SandboxPage:
        def wanted(box: Box) -> bool:
            record = box.record
            if not self._sees(who, record) or (states and record.state not in states):
                return False
            has = record.request.labels
            return all(key in has and value in (None, has[key]) for key, value in (labels or {}).items())

        found = sorted(filter(wanted, self._core.boxes.values()), key=_age, reverse=True)
        page, following = page_after(found, limit, cursor, _age)
        return SandboxPage(items=[box.value for box in page], next=following)

    async def destroy(self, who: Principal, sandbox: str) -> None:
        box = self._find(who, sandbox)
        await self._core.shielded(ending.destroy(self._core, box))

    async def stop(self, who: Principal, sandbox: str, grace: float) -> Sandbox:
        box = self._find(who, sandbox)
        await self._core.shielded(ending.stop(self._core, box, grace))
        return box.value

    async def start(self, who: Principal, sandbox: str) -> Operation:
        box = self._find(who, sandbox)
        return await self._core.shielded(create.start(self._core, box, self._keys.quota(box.record.owner)))

    async def resize(self, who: Principal, sandbox: str, disk: int) -> Sandbox:
        box = self._find(who, sandbox)
        await self._core.shielded(resize(self._core, box, disk, self._keys.quota(box.record.owner)))
        return box.value

    async def freeze(self, who: Principal, sandbox: str) -> Sandbox:
        box = self._find(who, sandbox)
        await self._core.shielded(verbs.freeze(self._core, box))
        return box.value

    async def thaw(self, who: Principal, sandbox: str) -> Sandbox:
        box = self._find(who, sandbox)
        await self._core.shielded(verbs.thaw(self._core, box))
        return box.value

    async def pause(self, who: Principal, sandbox: str) -> Sandbox:
        box = self._find(who, sandbox)
        await self._core.shielded(pause.pause(self._core, box))
        return box.value

    async def resume(self, who: Principal, sandbox: str) -> Sandbox:
        box = self._find(who, sandbox)
        await self._core.shielded(pause.resume(self._core, box, self._keys.quota(box.record.owner)))
        return box.value

    async def fork(self, who: Principal, sandbox: str, request: ForkSandbox) -> ForkResult:
        box = self._find(who, sandbox)
        await self._core.awake(box)
        quota = self._keys.quota(box.record.owner)
        operation, items = await self._core.shielded(fork.fork(self._core, box, request, quota))
        return ForkResult(items=items, operation=operation.id, steps=operation.steps)

    async def identity(self, who: Principal, sandbox: str) -> Certificate:
        record = self._find(who, sandbox).record
        return record.certificate or Certificate(generation=record.generation)

    async def snapshot(self, who: Principal, sandbox: str, request: CreateSnapshot) -> Snapshot:
        box = self._find(who, sandbox)
        return await self._core.shielded(self.snapshots.create(who, box, request))

    async def start_snapshot(self, who: Principal, snapshot: str, request: CopySandbox) -> Operation:
        quota = self._keys.quota(who.owner)
        return await self._core.shielded(self.snapshots.start(who, snapshot, request, quota))

    async def build_template(self, who: Principal, request: BuildTemplate) -> Operation:
        return await self.builds.begin(who, request)

    @asynccontextmanager
    async def operation_log(self, who: Principal, operation: str, start: int) -> AsyncIterator[AsyncIterator[OperationLog]]:
        self._core.operations.find(who, operation)
        yield self.builds.log_of(operation).follow(start)

    async def _wake(self, box: Box) -> None:
        await self._core.shielded(pause.wake_up(self._core, box, self._keys.quota(box.record.owner)))

    async def ping(self, who: Principal, sandbox: str) -> float:
        return await verbs.ping(self._core, self._find(who, sandbox))

    async def set_timeout(self, who: Principal, sandbox: str, timeout: Timeout | None) -> Sandbox:
        box = self._find(who, sandbox)
        await self._core.shielded(verbs.set_timeout(self._core, box, timeout))
        return box.value

    async def set_network(self, who: Principal, sandbox: str, request: SetNetwork) -> Sandbox:
        box = self._find(who, sandbox)
        await self._core.shielded(verbs.set_network(self._core, box, request))
        return box.value

    async def wait(self, who: Principal, sandbox: str, states: frozenset[SandboxState], timeout: float) -> Sandbox:
        return await verbs.wait(self._find(who, sandbox), states, timeout)

    async def console(self, who: Principal, sandbox: str, *, offset: int | None, limit: int) -> tuple[int, bytes, int]:
        box = self._find(who, sandbox)
        path = self._core.places(box.id).directory / "console.log"
        return await asyncio.to_thread(box.console.read, path, offset, limit)

    @asynccontextmanager
    async def lease(self, who: Principal, sandbox: str) -> AsyncIterator[None]:
        async with hold_lease(self._core, self._find(who, sandbox)):
            yield

    # -- operations, events, metrics ----------------------------------------------------------------------------------

    async def operation(self, who: Principal, operation: str) -> Operation:
        try:
            return self._core.operations.find(who, operation).value
        except NotFound:
            for box in self._core.boxes.values():
                if box.record.operation == operation and (who.admin or box.record.owner == who.owner):
                    return self._core.operations.of(box.record)
            raise

    async def operations(self, who: Principal, *, sandbox: str | None, limit: int, cursor: str | None) -> OperationPage:
        if sandbox is not None and not sandbox.startswith("sb-"):
            sandbox = self._find(who, sandbox).id
        return self._core.operations.page(who, sandbox, limit, cursor)

    async def wait_operation(self, who: Principal, operation: str, timeout: float, *, seen: Operation | None = None) -> Operation:
        now = await self.operation(who, operation)
        if now.state is not OperationState.RUNNING:
            return now
        return await self._core.operations.wait(who, operation, timeout, seen)

    async def cancel_operation(self, who: Principal, operation: str) -> Operation:
        now = await self.operation(who, operation)
        if now.state is OperationState.RUNNING and now.template is not None:
            cancel = self._core.operations.find(who, operation).cancel
            if cancel is not None:
                await self._core.shielded(cancel())
        elif now.state is OperationState.RUNNING and now.sandbox is not None:
            box = self._core.boxes.get(now.sandbox)
            if box is not None:
                await self._core.shielded(build.cancel(self._core, box))
        return await self.operation(who, operation)

    @asynccontextmanager
    async def events(
        self, who: Principal, *, sandbox: str | None = None, after: int | None = None
    ) -> AsyncIterator[AsyncIterator[Event]]:
        if sandbox is not None:
            sandbox = self._find(who, sandbox).id
        async with self._core.events.subscribe(who, sandbox, after) as stream:
            yield stream

    async def metrics(self, who: Principal, sandbox: str, *, window: float, since: float | None) -> Metrics:
        box = self._find(who, sandbox)
        return box.rings.read(box.id, window, since)

    async def latest_metrics(self, who: Principal) -> Mapping[str, Metrics]:
        return {
            box.id: Metrics(sandbox=box.id, step=0.5, window=0.5, samples=[box.rings.latest])
            for box in self._core.boxes.values()
            if box.live is not None and box.rings.latest is not None and self._sees(who, box.record)
        }

    # -- keys, health -------------------------------------------------------------------------------------------------

    async def create_key(self, request: CreateKey) -> CreatedKey:
        return await self._core.shielded(self._keys.create(request))

    async def keys(self, *, limit: int, cursor: str | None) -> ApiKeyPage:
        return self._keys.page(limit, cursor)

    async def revoke_key(self, key: str) -> ApiKey:
        return await self._core.shielded(self._keys.revoke(key))

    async def find_key(self, digest: bytes) -> ApiKey | None:
        return self._keys.find(digest)

    async def health(self) -> Health:
        problems = [*self._core.problems, *self._core.filling.problems()]
        problems += [f"{box.record.label} is lost" for box in self._core.boxes.values() if box.record.state is SandboxState.LOST]
        return Health(status="degraded" if problems else "ok", problems=problems[:100])

    def facts(self) -> Mapping[str, object]:
        """Counts by state, what is held and what there is."""
        return facts(self._core)

    def busy(self) -> bool:
        """Failed and stopped sandboxes need no daemon; one that has a timeout does: somebody must end it."""
        core = self._core
        return bool(core.operations.running) or any(
            box.live is not None or box.work is not None or box.deadline is not None or box.lease_until is not None
            for box in core.boxes.values()
            if not box.record.warm.startswith(PARKED)
        )


def _age(box: Box) -> tuple[float, str]:
    return box.record.created_at, box.id
