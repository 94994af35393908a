"""The persistent engine's front door: sandboxes that live, are used by many clients and survive the process that holds them.

``async with Engine.open(settings) as engine`` holds the data directory (one engine at a time), adopts every machine that lives,
removes what must not be there, and then serves. Leaving the block lets go of the machines; they go on.

Every method takes the :class:`~stoker.api.models.Principal` who asks and a *reference* (``sb-...`` or a name). What is not the
principal's does not exist for it: ``NotFound("sandbox_unknown")``. Values are the models of :mod:`stoker.api.models`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

from stoker.api.models import (
    ApiKey,
    ApiKeyPage,
    ConsoleLog,
    CreatedKey,
    CreateKey,
    CreateSandbox,
    Event,
    EventPage,
    ExecRequest,
    ExecResult,
    Metrics,
    PingResult,
    Principal,
    ProcessInfo,
    ProcessList,
    ResizeRequest,
    Sandbox,
    SandboxPage,
    SandboxState,
    SetTimeout,
    SignalRequest,
    StartProcess,
    StopSandbox,
    WriteStdin,
)

if TYPE_CHECKING:
    from stoker.engine.processes import Attachment
    from stoker.engine.state import Booter
    from stoker.images.progress import Progress as ProgressReport
    from stoker.settings import Settings

__all__ = ["Engine"]

EVERYTHING = Principal()


class Engine:
    """See the module. Made by :meth:`open` only."""

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, *, booter: Booter | None = None, lease_grace: float = 10.0) -> AsyncIterator[Engine]:
        """Opens the engine of ``settings.data_dir``.

        Errors: ``engine_running``, ``database_newer``, ``database_corrupt``, ``directory_refused``.
        """
        raise NotImplementedError
        yield cls()

    # -- sandboxes ----------------------------------------------------------------------------------------------------

    async def create(
        self,
        principal: Principal,
        request: CreateSandbox,
        *,
        idempotency_key: str | None = None,
        wait: bool = True,
        progress: ProgressReport | None = None,
    ) -> Sandbox:
        """Makes a sandbox. With ``wait`` the answer comes when it runs (or raises why it does not: the failed sandbox remains).

        Without, it comes at once in state ``creating``. Either way the work belongs to the engine: a caller that is cancelled
        does not stop it; :meth:`destroy` does. The same idempotency key with the same request gives the same sandbox again; with
        another request it is ``Conflict("idempotency_mismatch")``.
        """
        raise NotImplementedError

    async def get(self, principal: Principal, reference: str) -> Sandbox:
        raise NotImplementedError

    async def list(
        self,
        principal: Principal,
        *,
        states: Collection[SandboxState] = (),
        labels: Mapping[str, str] | None = None,
        name: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> SandboxPage:
        """Newest last, all of the principal's that match every filter."""
        raise NotImplementedError

    async def wait(
        self, principal: Principal, reference: str, states: Collection[SandboxState], *, timeout: float | None = None
    ) -> Sandbox:
        """Returns when the sandbox is in one of ``states``. ``DeadlineExceeded("wait_timeout")`` after ``timeout`` seconds,
        ``Conflict("state_unreachable")`` when it can no longer get there by itself, ``NotFound`` when it is destroyed meanwhile."""
        raise NotImplementedError

    async def destroy(self, principal: Principal, reference: str) -> None:
        """Ends and removes everything of it; a second call, or one on an unknown id, is ``NotFound``. From every state."""
        raise NotImplementedError

    async def stop(self, principal: Principal, reference: str, request: StopSandbox) -> Sandbox:
        raise NotImplementedError

    async def start(self, principal: Principal, reference: str, *, progress: ProgressReport | None = None) -> Sandbox:
        """Boots a stopped sandbox from its disk again."""
        raise NotImplementedError

    async def freeze(self, principal: Principal, reference: str) -> Sandbox:
        raise NotImplementedError

    async def thaw(self, principal: Principal, reference: str) -> Sandbox:
        raise NotImplementedError

    async def pause(self, principal: Principal, reference: str) -> Sandbox:
        """``InvalidRequest("not_supported_yet")``."""
        raise NotImplementedError

    async def resume(self, principal: Principal, reference: str) -> Sandbox:
        """``InvalidRequest("not_supported_yet")``."""
        raise NotImplementedError

    async def set_timeout(self, principal: Principal, reference: str, request: SetTimeout) -> Sandbox:
        raise NotImplementedError

    async def ping(self, principal: Principal, reference: str) -> PingResult:
        raise NotImplementedError

    def lease(self, principal: Principal, reference: str) -> AbstractAsyncContextManager[Sandbox]:
        """Holds the lease of a sandbox created with ``lease``. When the block is left, the sandbox is destroyed.

        The lease can have one holder: ``Conflict("lease_held")``. A sandbox whose lease nobody takes within the grace is destroyed.
        """
        raise NotImplementedError

    # -- what it says -------------------------------------------------------------------------------------------------

    async def console(self, principal: Principal, reference: str, *, offset: int | None = None, limit: int = 65536) -> ConsoleLog:
        """A part of the serial console from ``offset``; None: the last ``limit`` bytes."""
        raise NotImplementedError

    def follow_console(self, principal: Principal, reference: str, *, offset: int | None = None) -> AsyncIterator[ConsoleLog]:
        """Parts as they come, until the sandbox has no machine any more."""
        raise NotImplementedError

    async def events(
        self, principal: Principal, reference: str | None = None, *, after: int = 0, limit: int = 100
    ) -> EventPage:
        """The history that is kept (the last 256 of each sandbox), of one sandbox or of all that are the principal's."""
        raise NotImplementedError

    def subscribe(
        self, principal: Principal, reference: str | None = None, *, after: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Events as they happen; with ``after`` first those of the history with a larger id. A reader that is too slow gets one
        event of kind ``overflow`` with the number of those it missed (``data["missed"]``)."""
        raise NotImplementedError

    async def metrics(self, principal: Principal, reference: str, *, window: float = 600.0) -> Metrics:
        """The ring that covers ``window`` seconds best: 600 (every 0.5 s), 7200 (30 s), 86400 (5 min)."""
        raise NotImplementedError

    # -- processes ----------------------------------------------------------------------------------------------------

    async def exec(self, principal: Principal, reference: str, request: ExecRequest) -> ExecResult:
        """Runs and waits. A caller that is cancelled kills the process group."""
        raise NotImplementedError

    async def start_process(self, principal: Principal, reference: str, request: StartProcess) -> ProcessInfo:
        raise NotImplementedError

    async def processes(self, principal: Principal, reference: str) -> ProcessList:
        raise NotImplementedError

    async def process(self, principal: Principal, reference: str, which: int | str) -> ProcessInfo:
        """``which`` is the process's id or its tag (the newest with that tag)."""
        raise NotImplementedError

    async def signal(self, principal: Principal, reference: str, which: int | str, request: SignalRequest) -> None:
        raise NotImplementedError

    async def resize(self, principal: Principal, reference: str, which: int | str, request: ResizeRequest) -> None:
        raise NotImplementedError

    async def write_stdin(self, principal: Principal, reference: str, which: int | str, request: WriteStdin) -> None:
        raise NotImplementedError

    def attach(
        self,
        principal: Principal,
        reference: str,
        which: int | str,
        *,
        stdout: int | None = None,
        stderr: int | None = None,
        lossless: bool = True,
    ) -> AbstractAsyncContextManager[Attachment]:
        """Looks on a process, with any number of others, from these offsets (None: the oldest byte held).

        ``async for chunk in attachment`` gives :class:`~stoker.engine.processes.Chunk` (``stream`` 1 or 2, ``offset``, ``data``;
        a gap in the offsets is what the ring no longer held) and ends after the last byte of both; then ``await
        attachment.exit()`` gives the :class:`ProcessInfo` of the ended process. ``await attachment.write(data)`` (stdin, awaits
        flow control), ``close_stdin()``, ``signal(n)``, ``resize(rows, cols)``. With ``lossless`` the process waits for this
        reader rather than lose a byte; without, the oldest bytes are dropped.
        """
        raise NotImplementedError

    # -- files: the facade over guest/files.py, see engine/files.py ----------------------------------------------------

    # -- keys ---------------------------------------------------------------------------------------------------------

    async def create_key(self, principal: Principal, request: CreateKey) -> CreatedKey:
        raise NotImplementedError

    async def keys(self, principal: Principal) -> ApiKeyPage:
        raise NotImplementedError

    async def revoke_key(self, principal: Principal, key: str) -> ApiKey:
        """At once. What the key made goes on, and belongs to the administrator."""
        raise NotImplementedError

    async def authenticate(self, secret: str) -> Principal:
        """The principal of a key. ``Unauthenticated("bad_key")`` for a wrong or a revoked one."""
        raise NotImplementedError

    # -- the host -----------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many sandboxes there are, in any state. (An auto-started daemon may end when it is 0.)"""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Figures of the host for health, version and Prometheus: budgets, what is held, states and their counts, adopted, problems."""
        raise NotImplementedError
