"""What the server needs of an engine: the contract. :class:`stoker.engine.engine.Engine` fits it; tests bring one of their own.

Rules for every method:

* ``who`` sees and changes only what is theirs (:class:`~stoker.api.models.Principal`); anything else is ``NotFound``, in the
  same words as what does not exist. ``sandbox`` is an id or a name (own names first for an administrator).
* Failures are :class:`~stoker.errors.StokerError`; a wrong state is ``Conflict("wrong_state", ...)`` whose message says the state
  and what leaves it, with ``details={"state": ..., "allowed": [...]}``.
* Cancelling a call (the client went away) leaves nothing half done; long work goes on as its operation.
* Any use of a sandbox (a call on its processes or files, an open attachment or lease) counts against its idle timeout.
* ``cursor`` values are the engine's own, opaque strings; a wrong one is ``InvalidRequest("bad_cursor")``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from stoker.api.models import (
    ApiKey,
    ApiKeyPage,
    AppInfo,
    Certificate,
    ChangeMode,
    ChangeOwner,
    CopySandbox,
    CreatedKey,
    CreateKey,
    CreatePool,
    CreateSandbox,
    CreateSnapshot,
    CreateVolume,
    Event,
    FileInfo,
    ForkResult,
    ForkSandbox,
    FsckReport,
    GcReport,
    Health,
    Image,
    ImageList,
    Kernel,
    KernelList,
    MakeDirectory,
    MakeSymlink,
    Metrics,
    MoveFile,
    Operation,
    OperationPage,
    Pool,
    Principal,
    ProcessInfo,
    Sandbox,
    SandboxPage,
    SandboxState,
    Snapshot,
    StartProcess,
    Timeout,
    Volume,
    VolumePage,
    WatchEvent,
)
from stoker.server.line_ports import Connections
from stoker.server.network_ports import NetworkEngine
from stoker.server.template_ports import TemplateEngine

__all__ = ["Apps", "Attachment", "EngineProtocol", "Files", "Images", "Output", "Pools", "Processes", "Upkeep", "Volumes"]


class Output(Protocol):
    """A piece of a process's output: ``stream`` 1 or 2, ``offset`` of its first byte."""

    @property
    def stream(self) -> int: ...

    @property
    def offset(self) -> int: ...

    @property
    def data(self) -> bytes: ...


class Attachment(Protocol):
    """One client's own view of a process, among any number. Closing it leaves the process as it is."""

    @property
    def info(self) -> ProcessInfo:
        """As it was when the attachment began."""

    @property
    def stdout(self) -> int:
        """The offset stdout begins at here; likewise ``stderr``."""

    @property
    def stderr(self) -> int: ...

    async def read(self) -> Output | None:
        """The next piece, at most 256 KiB; None once, when both streams have ended. Nothing piles up between calls: a slow
        reader of a ``block`` process slows it down, and of a ``discard`` one finds a gap in the offsets."""

    async def wait(self) -> ProcessInfo:
        """Until the process has ended."""

    async def write(self, data: bytes) -> None:
        """Into stdin; returns when the guest has room for more. ``Conflict("stdin_closed")`` when nobody reads it any more."""

    async def close_stdin(self) -> None: ...

    async def resize(self, rows: int, cols: int) -> None: ...

    async def signal(self, number: int, *, group: bool = True) -> None: ...

    async def aclose(self) -> None: ...


class Processes(Protocol):
    """The processes of the guests."""

    async def start(self, who: Principal, sandbox: str, request: StartProcess) -> ProcessInfo: ...

    async def open(self, who: Principal, sandbox: str, request: StartProcess, *, lossless: bool = False) -> Attachment:
        """Starts and attaches in one round trip: nothing of the output is missed."""

    async def sftp(self, who: Principal, sandbox: str, user: str | None) -> Attachment:
        """A server of ssh's file transfer protocol in the guest, on the attachment's streams; nothing of ssh has to be in it."""

    async def attach(
        self,
        who: Principal,
        sandbox: str,
        process: int | str,
        stdout: int | None,
        stderr: int | None,
        *,
        lossless: bool = False,
    ) -> Attachment:
        """``process`` is an id or a tag (of several, the newest). Offsets: None the oldest byte held, -1 from now on.

        ``lossless``: while this attachment is open, the process waits rather than that a byte is lost, whatever its mode."""

    async def list(self, who: Principal, sandbox: str, *, tag: str | None = None) -> Sequence[ProcessInfo]: ...

    async def get(self, who: Principal, sandbox: str, process: int | str) -> ProcessInfo: ...

    async def signal(self, who: Principal, sandbox: str, process: int | str, number: int, *, group: bool) -> None:
        """``Conflict("process_ended")`` when it has ended."""

    async def write_stdin(self, who: Principal, sandbox: str, process: int | str, data: bytes, *, close: bool) -> None: ...

    async def resize(self, who: Principal, sandbox: str, process: int | str, rows: int, cols: int) -> None: ...

    async def forget(self, who: Principal, sandbox: str, process: int | str) -> None:
        """Frees an ended one's output."""


class Files(Protocol):
    """The files of the guests. Paths are the guest's: absolute, ``~``, ``~user`` or relative to the default directory; ``user``
    None is the sandbox's user.

    Codes: ``file_not_found`` (NotFound); ``file_exists``, ``is_directory``, ``not_directory``, ``directory_not_empty`` (Conflict);
    ``permission_denied`` (Forbidden); ``no_space`` (CapacityExhausted); ``bad_path`` (InvalidRequest).
    """

    async def stat(self, who: Principal, sandbox: str, path: str, *, user: str | None, follow: bool) -> FileInfo: ...

    async def list(
        self, who: Principal, sandbox: str, path: str, *, depth: int, limit: int, user: str | None
    ) -> tuple[Sequence[FileInfo], bool]:
        """Entries below a directory down to ``depth`` (1: its own), sorted by path, and whether ``limit`` cut them off."""

    def read(
        self, who: Principal, sandbox: str, path: str, *, offset: int, length: int | None, user: str | None
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

    async def make_directory(self, who: Principal, sandbox: str, request: MakeDirectory) -> FileInfo: ...

    async def make_symlink(self, who: Principal, sandbox: str, request: MakeSymlink) -> FileInfo: ...

    async def move(self, who: Principal, sandbox: str, request: MoveFile) -> FileInfo: ...

    async def remove(self, who: Principal, sandbox: str, path: str, *, recursive: bool, user: str | None) -> None: ...

    async def change_mode(self, who: Principal, sandbox: str, request: ChangeMode) -> FileInfo: ...

    async def change_owner(self, who: Principal, sandbox: str, request: ChangeOwner) -> FileInfo: ...

    def watch(
        self, who: Principal, sandbox: str, path: str, *, recursive: bool, user: str | None
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchEvent]]:
        """Entered once the watch is in place: what happens after that is seen."""

    def export_tar(
        self, who: Principal, sandbox: str, path: str, *, user: str | None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """A directory's contents (names relative to it) or one file, as an uncompressed POSIX tar."""

    async def import_tar(self, who: Principal, sandbox: str, path: str, source: AsyncIterator[bytes], *, user: str | None) -> None:
        """Unpacks below a directory, which is made where missing. Entries never leave it."""


class Images(Protocol):
    """What the store holds. References are names (``debian:12``), digests or beginnings of them.

    Codes: ``image_unknown``, ``kernel_unknown``, ``image_ambiguous`` (NotFound); ``image_in_use``, ``image_shared`` and the
    kernels' (Conflict).
    """

    async def images(self, who: Principal) -> ImageList: ...

    async def kernels(self, who: Principal) -> KernelList: ...

    async def image(self, who: Principal, reference: str) -> Image: ...

    async def kernel(self, who: Principal, reference: str) -> Kernel: ...

    async def remove(self, kind: str, reference: str) -> None:
        """``kind``: images or kernels. A name goes; with its last name, or by digest, the content does too."""


class Upkeep(Protocol):
    """Looking after the host. Administrators only; one at a time."""

    async def fsck(self, *, repair: bool) -> FsckReport: ...

    async def gc(self, *, dry_run: bool) -> GcReport: ...


class Volumes(Protocol):
    """File systems that outlive sandboxes. ``volume`` is a name or an id. ``volume_in_use`` (Conflict) names the users."""

    async def create(self, who: Principal, request: CreateVolume) -> Volume: ...

    async def get(self, who: Principal, volume: str) -> Volume: ...

    async def list(self, who: Principal, *, limit: int, cursor: str | None) -> VolumePage:
        """Newest first."""

    async def remove(self, who: Principal, volume: str) -> None: ...

    async def resize(self, who: Principal, volume: str, size: int) -> Volume: ...

    async def import_tar(self, who: Principal, name: str, size: int, source: AsyncIterator[bytes]) -> Volume:
        """A new volume, whole or not at all."""

    def export_tar(self, who: Principal, volume: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...

    def export_raw(self, who: Principal, volume: str) -> AbstractAsyncContextManager[tuple[int, AsyncIterator[bytes]]]: ...


class Snapshots(Protocol):
    """What sandboxes were at a moment. ``snapshot`` is a name or an id."""

    async def get(self, who: Principal, snapshot: str) -> Snapshot: ...

    async def list(self, who: Principal) -> Sequence[Snapshot]:
        """Newest first."""

    async def remove(self, who: Principal, snapshot: str) -> None: ...

    def export_file(self, who: Principal, snapshot: str, *, image: bool) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """``snapshot_tied``, ``image_unnamed`` (Conflict): it cannot leave, or not without its image."""

    async def import_file(self, who: Principal, source: AsyncIterator[bytes], name: str | None) -> Snapshot:
        """``bad_snapshot_file``, ``snapshot_format`` (InvalidRequest), ``image_missing``, ``kernel_missing`` (NotFound)."""

    async def prune(self, who: Principal) -> Sequence[Snapshot]:
        """Removes those with neither name nor tag, and tells which."""


class Pools(Protocol):
    """Where disks are. ``pool`` is a name; ``directory`` is the data directory itself. For administrators."""

    async def create(self, request: CreatePool) -> Pool:
        """``pool_exists`` (Conflict), ``pool_too_small``, ``needs_root`` (InvalidRequest), ``mkfs_failed`` (HostError)."""

    async def list(self) -> Sequence[Pool]: ...

    async def get(self, name: str) -> Pool: ...

    async def remove(self, name: str) -> None:
        """``pool_in_use`` (Conflict) names the sandboxes whose disks are in it."""


class Apps(Protocol):
    """App archives, by the SHA-256 of the archive."""

    async def get(self, who: Principal, digest: str) -> AppInfo:
        """``app_unknown`` (NotFound) unless this owner has uploaded it."""

    async def put(self, who: Principal, digest: str, source: AsyncIterator[bytes]) -> AppInfo:
        """``digest_mismatch``, ``bad_archive`` (InvalidRequest, TooLarge)."""


class EngineProtocol(TemplateEngine, NetworkEngine, Protocol):
    """Everything else."""

    @property
    def processes(self) -> Processes: ...

    @property
    def connections(self) -> Connections: ...

    @property
    def files(self) -> Files: ...

    @property
    def volumes(self) -> Volumes: ...

    @property
    def pools(self) -> Pools: ...

    @property
    def snapshots(self) -> Snapshots: ...

    @property
    def apps(self) -> Apps: ...

    @property
    def images(self) -> Images: ...

    @property
    def upkeep(self) -> Upkeep: ...

    # sandboxes ---------------------------------------------------------------------------------------------------------------

    async def create(self, who: Principal, request: CreateSandbox, *, idempotency_key: str | None = None) -> Operation:
        """Admits, records and begins. Returns at once with ``operation.sandbox`` set; the work goes on by itself. The same key
        and request of the same owner within a day: the same operation; another request: ``Conflict("idempotency_mismatch")``."""

    async def get(self, who: Principal, sandbox: str) -> Sandbox: ...

    async def list(
        self,
        who: Principal,
        *,
        states: frozenset[SandboxState] = frozenset(),
        labels: Mapping[str, str | None] = ...,
        limit: int = 100,
        cursor: str | None = None,
    ) -> SandboxPage:
        """Newest first. A label with the value None must be there with any value. No states: all."""

    async def destroy(self, who: Principal, sandbox: str) -> None:
        """Returns when nothing is left. From every state, ``creating`` included (it is cancelled)."""

    async def stop(self, who: Principal, sandbox: str, grace: float) -> Sandbox: ...

    async def start(self, who: Principal, sandbox: str) -> Operation: ...

    async def resize(self, who: Principal, sandbox: str, disk: int) -> Sandbox:
        """A larger root disk, and the file system in a running guest with it. Bytes."""

    async def freeze(self, who: Principal, sandbox: str) -> Sandbox: ...

    async def pause(self, who: Principal, sandbox: str) -> Sandbox:
        """Returns when memory and devices are on disk and the machine is gone. Whoever uses it then resumes it."""
        ...

    async def fork(self, who: Principal, sandbox: str, request: ForkSandbox) -> ForkResult:
        """Copies of a running machine. Errors: ``volume_writable``, ``layers_unsupported``, ``capacity_exhausted``."""
        ...

    async def identity(self, who: Principal, sandbox: str) -> Certificate:
        """What was done so that a machine that came back from memory is nobody's twin."""
        ...

    async def snapshot(self, who: Principal, sandbox: str, request: CreateSnapshot) -> Snapshot:
        """Returns when it is on disk. Errors as those of a fork."""
        ...

    async def start_snapshot(self, who: Principal, snapshot: str, request: CopySandbox) -> Operation:
        """A sandbox out of a snapshot. The operation may fail with ``saved_unusable`` or ``saved_damaged``."""
        ...

    async def resume(self, who: Principal, sandbox: str) -> Sandbox:
        """Returns when it runs. Errors: ``saved_unusable``, ``saved_damaged`` (it stays paused), ``capacity_exhausted``."""
        ...

    async def thaw(self, who: Principal, sandbox: str) -> Sandbox: ...

    async def ping(self, who: Principal, sandbox: str) -> float:
        """Milliseconds until the agent answered."""

    async def set_timeout(self, who: Principal, sandbox: str, timeout: Timeout | None) -> Sandbox: ...

    async def wait(self, who: Principal, sandbox: str, states: frozenset[SandboxState], timeout: float) -> Sandbox:
        """Until it is in one of the states. ``DeadlineExceeded`` after ``timeout``; ``NotFound`` when it is destroyed meanwhile
        (unless it was asked for with no states: then that is what is waited for)."""

    async def console(self, who: Principal, sandbox: str, *, offset: int | None, limit: int) -> tuple[int, bytes, int]:
        """Offset of the first byte, bytes, oldest offset held. Offset None: the last ``limit`` bytes."""

    def lease(self, who: Principal, sandbox: str) -> AbstractAsyncContextManager[None]:
        """Held while inside. Leaving it destroys a sandbox made with ``lease``, when it was the last one, within a second.
        ``Conflict("no_lease")`` when the sandbox was made without."""

    # operations, events, metrics ---------------------------------------------------------------------------------------------

    async def operation(self, who: Principal, operation: str) -> Operation: ...

    async def operations(self, who: Principal, *, sandbox: str | None, limit: int, cursor: str | None) -> OperationPage: ...

    async def wait_operation(self, who: Principal, operation: str, timeout: float, *, seen: Operation | None = None) -> Operation:
        """Until it has ended, or (``seen``) differs from that one; after ``timeout`` it is returned as it is."""

    async def cancel_operation(self, who: Principal, operation: str) -> Operation:
        """Returns when it has ended. An ended one stays as it is."""

    def events(
        self, who: Principal, *, sandbox: str | None = None, after: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """From now on, or after an event's id as far as they are kept. A consumer that does not keep up gets ``events.lost``."""

    async def metrics(self, who: Principal, sandbox: str, *, window: float, since: float | None) -> Metrics:
        """The finest ring that covers ``window`` seconds."""

    async def latest_metrics(self, who: Principal) -> Mapping[str, Metrics]:
        """The newest sample of every running sandbox, by id, for Prometheus."""

    # keys, health ------------------------------------------------------------------------------------------------------------

    async def create_key(self, request: CreateKey) -> CreatedKey: ...

    async def keys(self, *, limit: int, cursor: str | None) -> ApiKeyPage: ...

    async def revoke_key(self, key: str) -> ApiKey: ...

    async def find_key(self, digest: bytes) -> ApiKey | None:
        """The key whose secret has this SHA-256, unless revoked. Notes that it was used."""

    async def health(self) -> Health: ...

    def facts(self) -> Mapping[str, object]:
        """``sandboxes`` (those that are not at an end), ``boot_id``, versions of VMMs: what ``GET /v1/version`` adds."""

    def busy(self) -> bool:
        """Whether anything is there that an auto-started daemon must stay for (sandboxes, operations)."""

    def retire(self) -> None:
        """The daemon is about to end: connections that close from now on end no lease."""

    async def aclose(self) -> None:
        """Lets go of everything; machines live on."""
