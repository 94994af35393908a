"""What the server needs of an engine. :class:`stoker.engine.engine.Engine` fits it; tests bring one of their own.

:class:`EngineProtocol` follows the engine's own signatures. What the server asks for beyond them is :attr:`EngineProtocol.files`
(an object that fits :class:`Files`) and :meth:`EngineProtocol.latest_metrics`.

Rules for every method:

* The principal sees and changes only what is theirs (:class:`~stoker.api.models.Principal`); anything else is ``NotFound``, in
  the same words as what does not exist. A reference is an id or a name.
* Failures are :class:`~stoker.errors.StokerError`; a wrong state is a ``Conflict`` whose message says the state and what leaves it.
* Cancelling a call (the client went away) leaves nothing half done.
* Any use of a sandbox (a call on its processes or files, an open attachment or lease) counts against its idle timeout.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from stoker.api.models import (
    ApiKey,
    ApiKeyPage,
    ChangeMode,
    ChangeOwner,
    ConsoleLog,
    CreatedKey,
    CreateKey,
    CreateSandbox,
    Event,
    EventPage,
    ExecRequest,
    ExecResult,
    FileInfo,
    MakeDirectory,
    MakeSymlink,
    Metrics,
    MetricsSample,
    MoveFile,
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
    WatchEvent,
    WriteStdin,
)

__all__ = ["Attachment", "Chunk", "EngineProtocol", "Files", "ProgressReport"]


class ProgressReport(Protocol):
    """Who is told how far long work is (:class:`stoker.images.progress.Progress`)."""

    def step(self, name: str, done: float | None = None, total: float | None = None, detail: str = "") -> None: ...


class Chunk(Protocol):
    """A piece of output: ``stream`` 1 or 2, ``offset`` of its first byte, at most 256 KiB."""

    @property
    def stream(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def data(self) -> bytes: ...


class Attachment(Protocol):
    """One client's own view of a process, among any number. Nothing piles up in it between two steps of the iteration."""

    @property
    def info(self) -> ProcessInfo: ...
    def __aiter__(self) -> AsyncIterator[Chunk]: ...
    async def exit(self) -> ProcessInfo: ...
    async def write(self, data: bytes) -> None: ...
    async def close_stdin(self) -> None: ...
    async def resize(self, rows: int, cols: int) -> None: ...
    async def signal(self, number: int, *, group: bool = True) -> None: ...


class Files(Protocol):
    """The files of the guests. Paths are the guest's: absolute, ``~``, ``~user`` or relative to the default directory; ``user``
    None is the sandbox's user.

    Codes: ``file_not_found`` (NotFound); ``file_exists``, ``is_directory``, ``not_directory``, ``directory_not_empty`` (Conflict);
    ``permission_denied`` (Forbidden); ``no_space`` (CapacityExhausted); ``bad_path`` (InvalidRequest).
    """

    async def stat(self, principal: Principal, reference: str, path: str, *, user: str | None, follow: bool) -> FileInfo: ...

    async def list(
        self, principal: Principal, reference: str, path: str, *, depth: int, limit: int, user: str | None
    ) -> tuple[Sequence[FileInfo], bool]:
        """Entries below a directory down to ``depth`` (1: its own), sorted by path, and whether ``limit`` cut them off."""

    def read(
        self, principal: Principal, reference: str, path: str, *, offset: int, length: int | None, user: str | None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...

    async def write(
        self,
        who: Principal,
        sandbox: str,
        path: str,
        source: AsyncIterator[bytes],
        *,
        append: bool,
        mode: int | None,
        user: str | None,
    ) -> FileInfo:
        """Makes missing parents. A file that is not appended to appears whole or not at all."""

    async def make_directory(self, principal: Principal, reference: str, request: MakeDirectory) -> FileInfo: ...

    async def make_symlink(self, principal: Principal, reference: str, request: MakeSymlink) -> FileInfo: ...

    async def move(self, principal: Principal, reference: str, request: MoveFile) -> FileInfo: ...

    async def remove(self, principal: Principal, reference: str, path: str, *, recursive: bool, user: str | None) -> None: ...

    async def change_mode(self, principal: Principal, reference: str, request: ChangeMode) -> FileInfo: ...

    async def change_owner(self, principal: Principal, reference: str, request: ChangeOwner) -> FileInfo: ...

    def watch(
        self, principal: Principal, reference: str, path: str, *, recursive: bool, user: str | None
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchEvent]]:
        """Entered once the watch is in place: what happens after that is seen."""

    def export_tar(
        self, principal: Principal, reference: str, path: str, *, user: str | None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """A directory's contents (names relative to it) or one file, as an uncompressed POSIX tar."""

    async def import_tar(
        self, principal: Principal, reference: str, path: str, source: AsyncIterator[bytes], *, user: str | None
    ) -> None:
        """Unpacks below a directory, which is made where missing. Entries never leave it."""


class EngineProtocol(Protocol):
    """See the module and the engine's own docstrings."""

    @property
    def files(self) -> Files: ...

    @property
    def count(self) -> int: ...

    def facts(self) -> dict[str, Any]: ...

    async def create(
        self,
        principal: Principal,
        request: CreateSandbox,
        *,
        idempotency_key: str | None = None,
        wait: bool = True,
        progress: ProgressReport | None = None,
    ) -> Sandbox: ...

    async def get(self, principal: Principal, reference: str) -> Sandbox: ...

    async def list(
        self,
        principal: Principal,
        *,
        states: Collection[SandboxState] = (),
        labels: Mapping[str, str] | None = None,
        name: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> SandboxPage: ...

    async def wait(
        self, principal: Principal, reference: str, states: Collection[SandboxState], *, timeout: float | None = None
    ) -> Sandbox: ...

    async def destroy(self, principal: Principal, reference: str) -> None: ...
    async def stop(self, principal: Principal, reference: str, request: StopSandbox) -> Sandbox: ...
    async def start(self, principal: Principal, reference: str, *, progress: ProgressReport | None = None) -> Sandbox: ...
    async def freeze(self, principal: Principal, reference: str) -> Sandbox: ...
    async def thaw(self, principal: Principal, reference: str) -> Sandbox: ...
    async def pause(self, principal: Principal, reference: str) -> Sandbox: ...
    async def resume(self, principal: Principal, reference: str) -> Sandbox: ...
    async def set_timeout(self, principal: Principal, reference: str, request: SetTimeout) -> Sandbox: ...
    async def ping(self, principal: Principal, reference: str) -> PingResult: ...
    def lease(self, principal: Principal, reference: str) -> AbstractAsyncContextManager[Sandbox]: ...

    async def console(
        self, principal: Principal, reference: str, *, offset: int | None = None, limit: int = 65536
    ) -> ConsoleLog: ...
    def follow_console(self, principal: Principal, reference: str, *, offset: int | None = None) -> AsyncIterator[ConsoleLog]: ...
    async def events(
        self, principal: Principal, reference: str | None = None, *, after: int = 0, limit: int = 100
    ) -> EventPage: ...
    def subscribe(
        self, principal: Principal, reference: str | None = None, *, after: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]: ...
    async def metrics(self, principal: Principal, reference: str, *, window: float = 600.0) -> Metrics: ...

    def latest_metrics(self, principal: Principal) -> Mapping[str, MetricsSample]:
        """The newest sample of each of the principal's running sandboxes, by id: memory only, no waiting."""

    async def exec(self, principal: Principal, reference: str, request: ExecRequest) -> ExecResult: ...
    async def start_process(self, principal: Principal, reference: str, request: StartProcess) -> ProcessInfo: ...
    async def processes(self, principal: Principal, reference: str) -> ProcessList: ...
    async def process(self, principal: Principal, reference: str, which: int | str) -> ProcessInfo: ...
    async def signal(self, principal: Principal, reference: str, which: int | str, request: SignalRequest) -> None: ...
    async def resize(self, principal: Principal, reference: str, which: int | str, request: ResizeRequest) -> None: ...
    async def write_stdin(self, principal: Principal, reference: str, which: int | str, request: WriteStdin) -> None: ...
    def attach(
        self,
        principal: Principal,
        reference: str,
        which: int | str,
        *,
        stdout: int | None = None,
        stderr: int | None = None,
        lossless: bool = True,
    ) -> AbstractAsyncContextManager[Attachment]: ...

    async def create_key(self, principal: Principal, request: CreateKey) -> CreatedKey: ...
    async def keys(self, principal: Principal) -> ApiKeyPage: ...
    async def revoke_key(self, principal: Principal, key: str) -> ApiKey: ...
    async def authenticate(self, secret: str) -> Principal: ...
