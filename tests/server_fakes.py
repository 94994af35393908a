"""An engine in memory for the server's own tests: a sandbox is a row, its processes are programs of this host, its files are too.

It keeps the promises of ``stoker.server.ports`` as far as the server relies on them, and fails on demand (``fail``).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from stoker.api.models import (
    ApiKey,
    ApiKeyPage,
    AppInfo,
    BuildTemplate,
    Certificate,
    CopySandbox,
    CreatedKey,
    CreateKey,
    CreatePool,
    CreateSandbox,
    CreateSnapshot,
    CreateVolume,
    Denial,
    Difference,
    ErrorBody,
    Event,
    ExplainNetwork,
    ExplainStep,
    Explanation,
    FileInfo,
    FileType,
    Forked,
    ForkResult,
    ForkSandbox,
    Freed,
    FsckReport,
    GcReport,
    Hazard,
    Health,
    Image,
    ImageList,
    Kernel,
    KernelList,
    LearnedNetwork,
    Metrics,
    MetricsSample,
    NetworkMode,
    NetworkStatus,
    Operation,
    OperationLog,
    OperationPage,
    OperationState,
    Pool,
    Principal,
    ProcessInfo,
    Resources,
    Sandbox,
    SandboxPage,
    SandboxState,
    SetNetwork,
    SetWarm,
    Snapshot,
    SnapshotState,
    StartProcess,
    Template,
    Timeout,
    Verdict,
    Volume,
    VolumePage,
    WarmSet,
    WatchEvent,
    WatchKind,
)
from stoker.engine.output import Output
from stoker.errors import Conflict, DeadlineExceeded, GuestError, InvalidRequest, NotFound, StokerError

ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


def new_id(prefix: str, length: int = 20) -> str:
    return prefix + "-" + "".join(secrets.choice(ALPHABET) for _ in range(length))


DIGEST = "ab" * 32


class FakeImages:
    """One image and one kernel, both used by a sandbox called web."""

    def __init__(self) -> None:
        self.removed: list[tuple[str, str]] = []

    def _known(self, kind: str, reference: str) -> None:
        if reference not in ("debian:12", "debian-bookworm") and not (len(reference) >= 6 and DIGEST.startswith(reference)):
            raise NotFound(f"{kind}_unknown", f"there is no {kind} {reference}")

    async def image(self, who: Principal, reference: str) -> Image:
        self._known("image", reference)
        return Image(
            digest=DIGEST,
            reference="debian:bookworm",
            names=["debian-bookworm"],
            size=700 << 20,
            disk=300 << 20,
            created_at=1.0,
            fstype="ext4",
            used_by=["web"] if who.admin else [],
        )

    async def kernel(self, who: Principal, reference: str) -> Kernel:
        self._known("kernel", reference)
        return Kernel(
            digest=DIGEST, reference="debian:bookworm", names=[], size=50 << 20, disk=90 << 20, created_at=1.0, release="6.1"
        )

    async def images(self, who: Principal) -> ImageList:
        return ImageList(items=[await self.image(who, DIGEST)])

    async def kernels(self, who: Principal) -> KernelList:
        return KernelList(items=[await self.kernel(who, DIGEST)])

    async def remove(self, kind: str, reference: str) -> None:
        self._known(kind[:-1], reference)
        if kind == "images":
            raise Conflict("image_in_use", f"the image {reference} is in use by web", "stoker rm web", details={"used_by": ["web"]})
        self.removed.append((kind, reference))


class FakeUpkeep:
    """A host with one difference and one thing too many."""

    async def fsck(self, *, repair: bool) -> FsckReport:
        difference = Difference(
            kind="clone", name="/pool/x.qcow2", expected="nothing", found="it is there", repair="remove it", repaired=repair
        )
        return FsckReport(clean=repair, repair=repair, differences=[difference], checked={"clone": 1}, busy=["web"])

    async def gc(self, *, dry_run: bool) -> GcReport:
        freed = Freed(kind="image", name=DIGEST, why="superseded", bytes=4096)
        return GcReport(dry_run=dry_run, items=[freed], freed=4096, by_kind={"image": 4096}, skipped=["kernels: not ours"])


class FakeNetworks:
    """Every sandbox reaches everything, but for the host ``closed``."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    async def show(self, who: Principal, sandbox: str) -> NetworkStatus:
        box = self._engine.find(who, sandbox)
        denial = Denial(protocol="tcp", destination="10.0.0.1", port=22, first_at=1.0, last_at=2.0, times=3)
        return NetworkStatus(
            sandbox=box.id, network=NetworkMode.NAT, address="100.80.0.1", egress="all", publish=["80:80"], denials=[denial]
        )

    async def learned(self, who: Principal, sandbox: str) -> LearnedNetwork:
        box = self._engine.find(who, sandbox)
        return LearnedNetwork(sandbox=box.id, rules=["a.net:443/tcp"], egress="allow: a.net:443/tcp")

    async def explain(self, who: Principal, sandbox: str, request: ExplainNetwork) -> Explanation:
        box = self._engine.use(who, sandbox)
        verdict = Verdict.FAIL if request.target.startswith("closed") else Verdict.PASS
        step = ExplainStep(name="policy", verdict=verdict, says="it says", mend="stoker network set x --egress all")
        fault = "policy" if verdict is Verdict.FAIL else None
        return Explanation(
            sandbox=box.id, target=request.target, protocol=request.protocol, reached=fault is None, fault=fault, steps=[step]
        )


class FakePools:
    """The data directory, and what was made."""

    def __init__(self) -> None:
        self.all = {"": Pool(name="", path="/data/pool", default=True, strategy="qcow2", total=1 << 40, free=1 << 39)}

    async def create(self, request: CreatePool) -> Pool:
        if request.name in self.all:
            raise Conflict("pool_exists", f"there is a pool {request.name}")
        made = Pool(name=request.name, path=f"/data/pools/{request.name}", strategy="qcow2", total=request.size, free=request.size)
        self.all[request.name] = made
        return made

    async def list(self) -> list[Pool]:
        return list(self.all.values())

    async def get(self, name: str) -> Pool:
        found = self.all.get("" if name == "directory" else name)
        if found is None:
            raise NotFound("pool_unknown", f"there is no pool {name}")
        return found

    async def remove(self, name: str) -> None:
        if not (await self.get(name)).name:
            raise Conflict("pool_needed", "the data directory is always a pool")
        del self.all[name]


class FakeProcess:
    """A program of this host with everything it ever said."""

    def __init__(self, number: int, request: StartProcess, child: asyncio.subprocess.Process) -> None:
        self.number, self.request, self.child = number, request, child
        self.output: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
        self.done: set[int] = set()
        self.changed = asyncio.Condition()
        self.killed_by_timeout = False
        self.tasks = [asyncio.create_task(self._pump(1, child.stdout)), asyncio.create_task(self._pump(2, child.stderr))]
        if request.timeout:
            self.tasks.append(asyncio.create_task(self._expire(request.timeout)))

    async def _expire(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self.child.returncode is None:
            self.killed_by_timeout = True
            self.signal(signal.SIGKILL)

    async def _pump(self, number: int, stream: asyncio.StreamReader | None) -> None:
        assert stream is not None
        while data := await stream.read(65536):
            async with self.changed:
                self.output[number] += data
                self.changed.notify_all()
        async with self.changed:
            self.done.add(number)
            self.changed.notify_all()

    def signal(self, number: int) -> None:
        if self.child.returncode is not None:
            raise Conflict("process_ended", "it has ended")
        os.killpg(self.child.pid, number)

    @property
    def info(self) -> ProcessInfo:
        code = self.child.returncode
        return ProcessInfo(
            id=self.number,
            pid=self.child.pid,
            running=code is None,
            argv=self.request.argv,
            tag=self.request.tag,
            stdin=self.request.stdin,
            exit_code=code if code is not None and code >= 0 else None,
            signal=-code if code is not None and code < 0 else None,
            timed_out=self.killed_by_timeout,
            stdout_bytes=len(self.output[1]),
            stderr_bytes=len(self.output[2]),
        )


class FakeAttachment:
    def __init__(self, process: FakeProcess, stdout: int | None, stderr: int | None) -> None:
        self.process = process
        self.info = process.info
        self.at = {n: len(process.output[n]) if o == -1 else o or 0 for n, o in ((1, stdout), (2, stderr))}
        self.stdout, self.stderr = self.at[1], self.at[2]
        self.closed = False

    async def read(self) -> Output | None:
        async with self.process.changed:
            while True:
                for number in (1, 2):
                    data = bytes(self.process.output[number][self.at[number] : self.at[number] + 65536])
                    if data:
                        piece = Output(number, self.at[number], data)
                        self.at[number] += len(data)
                        return piece
                if len(self.process.done) == 2:
                    return None
                await self.process.changed.wait()

    async def wait(self) -> ProcessInfo:
        await self.process.child.wait()
        return self.process.info

    async def write(self, data: bytes) -> None:
        pipe = self.process.child.stdin
        if pipe is None or pipe.is_closing():
            raise Conflict("stdin_closed", "nobody reads stdin")
        try:
            pipe.write(data)
            await pipe.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise Conflict("stdin_closed", "nobody reads stdin") from None

    async def close_stdin(self) -> None:
        if self.process.child.stdin is not None:
            self.process.child.stdin.close()

    async def resize(self, rows: int, cols: int) -> None:
        raise Conflict("no_terminal", "the process has no terminal")

    async def signal(self, number: int, *, group: bool = True) -> None:
        self.process.signal(number)

    async def aclose(self) -> None:
        self.closed = True


class FakeProcesses:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.all: dict[str, dict[int, FakeProcess]] = {}

    def find(self, who: Principal, sandbox: str, process: int | str) -> FakeProcess:
        box = self.engine.find(who, sandbox)
        for number, found in reversed(self.all.get(box.id, {}).items()):
            if process in (number, found.request.tag):
                return found
        raise NotFound("process_unknown", f"there is no process {process}")

    async def _spawn(self, who: Principal, sandbox: str, request: StartProcess) -> FakeProcess:
        box = self.engine.use(who, sandbox)
        pipe = asyncio.subprocess.PIPE
        if self.engine.harmless:
            request = replace(request, argv=["cat" if request.stdin else "true"], env={})
        try:
            child = await asyncio.create_subprocess_exec(
                *request.argv,
                stdin=pipe if request.stdin else asyncio.subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                env={"PATH": os.environ["PATH"], **request.env},
                start_new_session=True,
            )
        except FileNotFoundError:
            from stoker.errors import CommandNotFound

            raise CommandNotFound("no_such_command", f"there is no {request.argv[0]}") from None
        boxes = self.all.setdefault(box.id, {})
        process = boxes[len(boxes) + 1] = FakeProcess(len(boxes) + 1, request, child)
        return process

    async def start(self, who: Principal, sandbox: str, request: StartProcess) -> ProcessInfo:
        return (await self._spawn(who, sandbox, request)).info

    async def open(self, who: Principal, sandbox: str, request: StartProcess, *, lossless: bool = False) -> FakeAttachment:
        return FakeAttachment(await self._spawn(who, sandbox, request), 0, 0)

    async def attach(
        self, who: Principal, sandbox: str, process: int | str, stdout: int | None, stderr: int | None, *, lossless: bool = False
    ) -> FakeAttachment:
        return FakeAttachment(self.find(who, sandbox, process), stdout, stderr)

    async def list(self, who: Principal, sandbox: str, *, tag: str | None = None) -> Sequence[ProcessInfo]:
        box = self.engine.find(who, sandbox)
        return [p.info for p in self.all.get(box.id, {}).values() if tag in (None, p.request.tag)]

    async def get(self, who: Principal, sandbox: str, process: int | str) -> ProcessInfo:
        return self.find(who, sandbox, process).info

    async def signal(self, who: Principal, sandbox: str, process: int | str, number: int, *, group: bool) -> None:
        self.find(who, sandbox, process).signal(number)

    async def write_stdin(self, who: Principal, sandbox: str, process: int | str, data: bytes, *, close: bool) -> None:
        attachment = FakeAttachment(self.find(who, sandbox, process), 0, 0)
        await attachment.write(data)
        if close:
            await attachment.close_stdin()

    async def resize(self, who: Principal, sandbox: str, process: int | str, rows: int, cols: int) -> None:
        self.find(who, sandbox, process)
        raise Conflict("no_terminal", "the process has no terminal")

    async def forget(self, who: Principal, sandbox: str, process: int | str) -> None:
        found = self.find(who, sandbox, process)
        del self.all[self.engine.find(who, sandbox).id][found.number]

    async def aclose(self) -> None:
        for boxes in self.all.values():
            for process in boxes.values():
                if process.child.returncode is None:
                    process.signal(signal.SIGKILL)
                    await process.child.wait()
                if process.child.stdin is not None:
                    process.child.stdin.close()
                for task in process.tasks:
                    task.cancel()
                await asyncio.gather(*process.tasks, return_exceptions=True)


class FakeFiles:
    """Everything below one directory; no user ids."""

    def __init__(self, engine: FakeEngine, root: Path) -> None:
        self.engine = engine
        self.root = root
        self.watches: list[asyncio.Queue[WatchEvent]] = []

    def _path(self, who: Principal, sandbox: str, path: str) -> Path:
        """Always below the root: what a test generates at random must not reach this host's own files."""
        self.engine.use(who, sandbox)
        found = self.root / os.path.normpath("/" + path.removeprefix("~")).lstrip("/")
        try:
            if self.root.resolve() not in (found.resolve(), *found.resolve().parents):
                raise NotFound("file_not_found", "it leads out of the tests' directory")
        except (OSError, ValueError, RuntimeError):
            raise InvalidRequest("bad_path", "it is not a path here") from None
        return found

    def _info(self, path: Path) -> FileInfo:
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound("file_not_found", f"there is no {path.name}") from None
        except OSError as e:
            raise Conflict("bad_path", str(e)) from None
        kind = FileType.DIRECTORY if path.is_dir() else FileType.SYMLINK if path.is_symlink() else FileType.FILE
        return FileInfo(
            path="/" + str(path.relative_to(self.root)),
            name=path.name,
            type=kind,
            size=status.st_size,
            mode=status.st_mode & 0o7777,
            uid=0,
            gid=0,
            modified_at=status.st_mtime,
            etag=f"{status.st_mtime_ns:x}-{status.st_size:x}",
        )

    async def stat(self, who: Principal, sandbox: str, path: str, *, user: str | None, follow: bool) -> FileInfo:
        found = self._path(who, sandbox, path)
        return self._info(found.resolve() if follow else found)

    async def list(self, who: Principal, sandbox: str, path: str, *, depth: int, limit: int, user: str | None) -> Any:
        found = self._path(who, sandbox, path)
        if not found.is_dir():
            raise Conflict("not_directory", "it is no directory")
        items = [self._info(entry) for entry in sorted(found.rglob("*")) if len(entry.relative_to(found).parts) <= depth]
        return items[:limit], len(items) > limit

    @asynccontextmanager
    async def read(
        self, who: Principal, sandbox: str, path: str, *, offset: int, length: int | None, user: str | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        data = self._path(who, sandbox, path).read_bytes()[offset : None if length is None else offset + length]

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(data), 65536):
                yield data[start : start + 65536]

        yield pieces()

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
        found = self._path(who, sandbox, path)
        found.parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            raise Conflict("is_directory", "it is a directory")
        draft = found.with_name(found.name + ".draft")
        try:
            with open(draft, "wb") as file:
                if append and found.exists():
                    file.write(found.read_bytes())
                async for piece in source:
                    file.write(piece)
            draft.rename(found)
        finally:
            draft.unlink(missing_ok=True)
        for queue in self.watches:
            queue.put_nowait(WatchEvent(kind=WatchKind.CREATED, path=path))
        return self._info(found)

    async def make_directory(self, who: Principal, sandbox: str, request: Any) -> FileInfo:
        found = self._path(who, sandbox, request.path)
        try:
            found.mkdir(parents=request.parents, exist_ok=request.parents)
        except FileExistsError:
            raise Conflict("file_exists", "it exists") from None
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound("file_not_found", "a parent is missing") from None
        return self._info(found)

    async def make_symlink(self, who: Principal, sandbox: str, request: Any) -> FileInfo:
        found = self._path(who, sandbox, request.path)
        try:
            found.symlink_to(os.path.normpath("/" + request.target).lstrip("/") or "nowhere")
        except FileExistsError:
            raise Conflict("file_exists", "it exists") from None
        except OSError:
            raise NotFound("file_not_found", "a parent is missing") from None
        return self._info(found)

    async def move(self, who: Principal, sandbox: str, request: Any) -> FileInfo:
        source, target = self._path(who, sandbox, request.source), self._path(who, sandbox, request.destination)
        self._info(source)
        try:
            source.rename(target)
        except OSError:
            raise Conflict("file_exists", "it does not go there") from None
        return self._info(target)

    async def remove(self, who: Principal, sandbox: str, path: str, *, recursive: bool, user: str | None) -> None:
        found = self._path(who, sandbox, path)
        if found == self.root:
            raise Conflict("bad_path", "not the root")
        if self._info(found).type is not FileType.DIRECTORY:
            found.unlink()
        elif recursive:
            import shutil

            shutil.rmtree(found)
        else:
            try:
                found.rmdir()
            except OSError:
                raise Conflict("directory_not_empty", "it is not empty") from None

    async def change_mode(self, who: Principal, sandbox: str, request: Any) -> FileInfo:
        found = self._path(who, sandbox, request.path)
        self._info(found)
        return replace(self._info(found), mode=request.mode)

    async def change_owner(self, who: Principal, sandbox: str, request: Any) -> FileInfo:
        return self._info(self._path(who, sandbox, request.path))

    @asynccontextmanager
    async def watch(
        self, who: Principal, sandbox: str, path: str, *, recursive: bool, user: str | None
    ) -> AsyncIterator[AsyncIterator[WatchEvent]]:
        self._info(self._path(who, sandbox, path))
        queue: asyncio.Queue[WatchEvent] = asyncio.Queue()
        self.watches.append(queue)

        async def events() -> AsyncIterator[WatchEvent]:
            while True:
                yield await queue.get()

        try:
            yield events()
        finally:
            self.watches.remove(queue)

    @asynccontextmanager
    async def export_tar(self, who: Principal, sandbox: str, path: str, *, user: str | None) -> AsyncIterator[AsyncIterator[bytes]]:
        self._info(self._path(who, sandbox, path))

        async def pieces() -> AsyncIterator[bytes]:
            yield b"\0" * 10240

        yield pieces()

    async def import_tar(self, who: Principal, sandbox: str, path: str, source: AsyncIterator[bytes], *, user: str | None) -> None:
        self._path(who, sandbox, path)
        async for _ in source:
            pass


class FakeVolumes:
    """Volumes without a file behind them."""

    def __init__(self) -> None:
        self.all: dict[str, Volume] = {}

    def _find(self, who: Principal, volume: str) -> Volume:
        found = self.all.get(volume)
        if found is None or not (who.admin or found.owner == who.owner):
            raise NotFound("volume_unknown", f"there is no volume {volume}", "stoker volume ls")
        return found

    async def create(self, who: Principal, request: CreateVolume) -> Volume:
        if request.name in self.all:
            raise Conflict("volume_exists", f"there is a volume {request.name}")
        identity = "vol-" + "a" * 16
        made = Volume(id=identity, name=request.name, size=request.size, created_at=time.time(), owner=who.owner)
        self.all[request.name] = made
        return made

    async def get(self, who: Principal, volume: str) -> Volume:
        return self._find(who, volume)

    async def list(self, who: Principal, *, limit: int, cursor: str | None) -> VolumePage:
        if cursor is not None:
            raise InvalidRequest("bad_cursor", "that is no cursor of ours")
        return VolumePage(items=[v for v in self.all.values() if who.admin or v.owner == who.owner][:limit])

    async def remove(self, who: Principal, volume: str) -> None:
        del self.all[self._find(who, volume).name]

    async def resize(self, who: Principal, volume: str, size: int) -> Volume:
        found = self._find(who, volume)
        if size < found.size:
            raise InvalidRequest("volume_shrink", "it cannot become smaller")
        self.all[found.name] = replace(found, size=size)
        return self.all[found.name]

    async def import_tar(self, who: Principal, name: str, size: int, source: AsyncIterator[bytes]) -> Volume:
        made = await self.create(who, CreateVolume(name=name, size=size))
        async for _ in source:
            pass
        return made

    @asynccontextmanager
    async def export_tar(self, who: Principal, volume: str) -> AsyncIterator[AsyncIterator[bytes]]:
        self._find(who, volume)

        async def pieces() -> AsyncIterator[bytes]:
            yield bytes(10240)

        yield pieces()

    @asynccontextmanager
    async def export_raw(self, who: Principal, volume: str) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        found = self._find(who, volume)

        async def pieces() -> AsyncIterator[bytes]:
            left = found.size
            while left:
                yield bytes(min(left, 1 << 20))
                left -= min(left, 1 << 20)

        yield found.size, pieces()


class FakeApps:
    """App archives, not looked into."""

    def __init__(self) -> None:
        self.known: set[tuple[str, str]] = set()

    async def get(self, who: Principal, digest: str) -> AppInfo:
        if (who.owner, digest) not in self.known:
            raise NotFound("app_unknown", f"there is no app {digest}")
        return AppInfo(digest=digest)

    async def put(self, who: Principal, digest: str, source: AsyncIterator[bytes]) -> AppInfo:
        sums = hashlib.sha256()
        async for piece in source:
            sums.update(piece)
        if sums.hexdigest() != digest:
            raise InvalidRequest("digest_mismatch", "the checksum is another")
        self.known.add((who.owner, digest))
        return AppInfo(digest=digest)


class FakeSnapshots:
    """Snapshots in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Snapshot] = {}

    async def get(self, who: Principal, snapshot: str) -> Snapshot:
        found = next((one for one in self.kept.values() if snapshot in (one.id, one.name)), None)
        if found is None:
            raise NotFound("snapshot_unknown", f"there is no snapshot {snapshot}")
        return found

    async def list(self, who: Principal) -> Sequence[Snapshot]:
        return list(self.kept.values())[::-1]

    @asynccontextmanager
    async def export_file(self, who: Principal, snapshot: str, *, image: bool) -> AsyncIterator[AsyncIterator[bytes]]:
        found = await self.get(who, snapshot)

        async def pieces() -> AsyncIterator[bytes]:
            yield f"{found.id} {image}".encode()

        yield pieces()

    async def import_file(self, who: Principal, source: AsyncIterator[bytes], name: str | None) -> Snapshot:
        data = b"".join([piece async for piece in source])
        if not data.startswith(b"sn-"):
            raise InvalidRequest("bad_snapshot_file", "this is not a whole snapshot file: it is cut off")
        made = replace(await self.get(who, data.decode().split()[0]), id=new_id("sn"), name=name)
        self.kept[made.id] = made
        return made

    async def remove(self, who: Principal, snapshot: str) -> None:
        del self.kept[(await self.get(who, snapshot)).id]

    async def prune(self, who: Principal) -> Sequence[Snapshot]:
        gone = [one for one in self.kept.values() if not one.name and not one.tags]
        for one in gone:
            del self.kept[one.id]
        return gone


class FakeTemplates:
    """Templates in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Template] = {}

    async def get(self, who: Principal, template: str) -> Template:
        found = next((one for one in self.kept.values() if template in (one.id, one.name)), None)
        if found is None:
            raise NotFound("template_unknown", f"there is no template {template}")
        return found

    async def list(self, who: Principal) -> Sequence[Template]:
        return [replace(one, log=[]) for one in self.kept.values()][::-1]

    async def remove(self, who: Principal, template: str) -> None:
        del self.kept[(await self.get(who, template)).id]


class FakeWarm:
    """Warm sets that nothing waits in."""

    def __init__(self) -> None:
        self.kept: dict[str, WarmSet] = {}

    async def set(self, who: Principal, request: SetWarm) -> WarmSet:
        former = next((one for one in self.kept.values() if one.sandbox == request.sandbox), None)
        identity = new_id("ws") if former is None else former.id
        made = WarmSet(id=identity, owner=who.owner, sandbox=request.sandbox, size=request.size, ready=0, created_at=time.time())
        if request.size:
            self.kept[identity] = made
        else:
            self.kept.pop(identity, None)
        return made

    async def list(self, who: Principal) -> Sequence[WarmSet]:
        return list(self.kept.values())

    async def remove(self, who: Principal, warm: str) -> None:
        if self.kept.pop(warm, None) is None:
            raise NotFound("warm_set_unknown", f"there is no warm set {warm}")


class FakeLine:
    """A connection to a port of this host."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.ended = False
        self.brief = True

    async def read(self) -> bytes:
        return await self._reader.read(65536)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def close_write(self) -> None:
        self._writer.write_eof()

    def lasting(self) -> None:
        self.brief = False

    def rest(self) -> None: ...

    def use(self) -> bool:
        return not self.ended

    def drop(self) -> None:
        self.ended = True
        self._writer.close()

    async def aclose(self) -> None:
        self.drop()


class FakeRoute:
    def __init__(self, box: Sandbox) -> None:
        self.sandbox, self.local, self.policy = box.id, box.owner == "local", box.labels.get("stoker.proxy", "")
        self.direct = False


class FakeConnections:
    """The ports of every sandbox are those of this host."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def route(self, label: str) -> FakeRoute | None:
        for box in self._engine.boxes.values():
            if label in (box.id, (box.name or "").lower()):
                return FakeRoute(box)
        return None

    async def open(self, who: Principal, sandbox: str, port: int, *, address: str | None = None, brief: bool = False) -> FakeLine:
        await self._engine.get(who, sandbox)
        try:
            return FakeLine(*await asyncio.open_connection(address or "127.0.0.1", port))
        except ConnectionRefusedError:
            raise GuestError("port_refused", f"nothing listens on port {port} of {sandbox}") from None

    async def way(self, who: Principal, sandbox: str) -> None:
        return None


class FakeEngine:
    def __init__(self, root: Path, *, harmless: bool = False) -> None:
        """``harmless``: whatever command is asked for, ``true`` or ``cat`` runs; for commands made up at random."""
        self.harmless = harmless
        self.boxes: dict[str, Sandbox] = {}
        self.ops: dict[str, tuple[str, Operation]] = {}
        self.idempotent: dict[tuple[str, str], tuple[CreateSandbox, str]] = {}
        self.secrets: dict[bytes, str] = {}
        self.api_keys: dict[str, ApiKey] = {}
        self.log: list[Event] = []
        self.changed = asyncio.Condition()
        self.fail: dict[str, BaseException] = {}
        self.consoles: dict[str, bytes] = {}
        self.leases: dict[str, int] = {}
        self.processes = FakeProcesses(self)
        self.connections = FakeConnections(self)
        self.files = FakeFiles(self, root)
        self.images = FakeImages()
        self.upkeep = FakeUpkeep()
        self.volumes = FakeVolumes()
        self.pools = FakePools()
        self.networks = FakeNetworks(self)
        self.snapshots = FakeSnapshots()
        self.templates = FakeTemplates()
        self.warm = FakeWarm()
        self.logs: dict[str, list[str]] = {}
        self.apps = FakeApps()
        self.boot_seconds = 0.0
        self.retired = False
        self.tasks: set[asyncio.Task[None]] = set()

    # helpers
    def find(self, who: Principal, sandbox: str) -> Sandbox:
        for box in self.boxes.values():
            if sandbox in (box.id, box.name) and (who.admin or box.owner == who.owner):
                return box
        raise NotFound("sandbox_unknown", f"there is no sandbox {sandbox}", "stoker ls")

    def use(self, who: Principal, sandbox: str) -> Sandbox:
        return self.require(self.find(who, sandbox), SandboxState.RUNNING)

    def require(self, box: Sandbox, *states: SandboxState) -> Sandbox:
        if box.state not in states:
            raise Conflict("wrong_state", f"{box.id} is {box.state}", details={"state": box.state.value})
        return box

    async def put(self, box: Sandbox) -> Sandbox:
        async with self.changed:
            self.boxes[box.id] = box
            self.log.append(Event(id=len(self.log) + 1, at=time.time(), kind="sandbox.state", sandbox=box.id))
            self.changed.notify_all()
        return box

    def _check(self, name: str) -> None:
        if name in self.fail:
            raise self.fail[name]

    # sandboxes
    async def set_network(self, who: Principal, sandbox: str, request: SetNetwork) -> Sandbox:
        box = self.find(who, sandbox)
        return await self.put(replace(box, egress=request.egress if request.egress is not None else box.egress))

    async def create(self, who: Principal, request: CreateSandbox, *, idempotency_key: str | None = None) -> Operation:
        self._check("create")
        if idempotency_key is not None and (who.owner, idempotency_key) in self.idempotent:
            known, operation = self.idempotent[who.owner, idempotency_key]
            if known != request:
                raise Conflict("idempotency_mismatch", "another request had this key")
            return self.ops[operation][1]
        if request.name and any(b.name == request.name and b.owner == who.owner for b in self.boxes.values()):
            raise Conflict("name_taken", f"{request.name} is taken")
        box = Sandbox(
            id=new_id("sb"),
            state=SandboxState.CREATING,
            image=request.image,
            created_at=time.time(),
            name=request.name,
            owner=who.owner,
            labels=request.labels,
            resources=Resources(cpus=request.cpus or 1, memory=request.memory or 512 << 20, disk=request.disk),
            lease=request.lease,
            timeout=request.timeout,
        )
        operation = Operation(
            id=new_id("op"), kind="sandbox.create", state=OperationState.RUNNING, created_at=time.time(), sandbox=box.id
        )
        self.ops[operation.id] = (who.owner, operation)
        if idempotency_key is not None:
            self.idempotent[who.owner, idempotency_key] = (request, operation.id)
        await self.put(box)
        task = asyncio.create_task(self._boot(who, box, operation))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return operation

    async def _boot(self, who: Principal, box: Sandbox, operation: Operation) -> None:
        await asyncio.sleep(self.boot_seconds)
        error = self.fail.get("boot")
        if isinstance(error, StokerError):
            from stoker.server.channel import body_of

            end = replace(operation, state=OperationState.FAILED, error=body_of(error))
            box = replace(box, state=SandboxState.FAILED, error=end.error)
        else:
            end = replace(operation, state=OperationState.SUCCEEDED, ended_at=time.time())
            box = replace(box, state=SandboxState.RUNNING)
        self.ops[operation.id] = (who.owner, end)
        if box.id in self.boxes:
            await self.put(box)

    async def get(self, who: Principal, sandbox: str) -> Sandbox:
        self._check("get")
        return self.find(who, sandbox)

    async def list(
        self,
        who: Principal,
        *,
        states: frozenset[SandboxState] = frozenset(),
        labels: Mapping[str, str | None] | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> SandboxPage:
        self._check("list")
        start = 0
        if cursor is not None:
            if not cursor.isascii() or not cursor.isdigit() or len(cursor) > 9:
                raise InvalidRequest("bad_cursor", "the cursor is not one of ours")
            start = int(cursor)
        found = [
            box
            for box in reversed(self.boxes.values())
            if (who.admin or box.owner == who.owner)
            and (not states or box.state in states)
            and all(k in box.labels and v in (None, box.labels[k]) for k, v in (labels or {}).items())
        ]
        page = found[start : start + limit]
        return SandboxPage(items=page, next=str(start + limit) if len(found) > start + limit else None)

    async def destroy(self, who: Principal, sandbox: str) -> None:
        box = self.find(who, sandbox)
        async with self.changed:
            del self.boxes[box.id]
            self.changed.notify_all()

    async def _move(self, who: Principal, sandbox: str, start: SandboxState, end: SandboxState) -> Sandbox:
        return await self.put(replace(self.require(self.find(who, sandbox), start), state=end))

    async def stop(self, who: Principal, sandbox: str, grace: float) -> Sandbox:
        return await self._move(who, sandbox, SandboxState.RUNNING, SandboxState.STOPPED)

    async def start(self, who: Principal, sandbox: str) -> Operation:
        box = await self._move(who, sandbox, SandboxState.STOPPED, SandboxState.RUNNING)
        now = time.time()
        operation = Operation(
            id=new_id("op"), kind="sandbox.start", state=OperationState.SUCCEEDED, created_at=now, ended_at=now, sandbox=box.id
        )
        self.ops[operation.id] = (who.owner, operation)
        return operation

    async def resize(self, who: Principal, sandbox: str, disk: int) -> Sandbox:
        return self.use(who, sandbox)

    async def freeze(self, who: Principal, sandbox: str) -> Sandbox:
        return await self._move(who, sandbox, SandboxState.RUNNING, SandboxState.FROZEN)

    async def pause(self, who: Principal, sandbox: str) -> Sandbox:
        return await self._move(who, sandbox, SandboxState.RUNNING, SandboxState.PAUSED)

    async def resume(self, who: Principal, sandbox: str) -> Sandbox:
        return await self._move(who, sandbox, SandboxState.PAUSED, SandboxState.RUNNING)

    async def fork(self, who: Principal, sandbox: str, request: ForkSandbox) -> ForkResult:
        original = self.require(self.find(who, sandbox), SandboxState.RUNNING)
        copies = [
            await self.put(replace(original, id=new_id("sb"), name=f"{request.name}-{n}" if request.name else None))
            for n in range(1, request.count + 1)
        ]
        return ForkResult(items=[Forked(sandbox=copy) for copy in copies], operation=new_id("op"), steps={"stopped": 1.0})

    async def identity(self, who: Principal, sandbox: str) -> Certificate:
        self.find(who, sandbox)
        return Certificate(generation=1, restored_at=1.0, hazards=[Hazard(name="entropy", handled=True, at=1.0)])

    async def snapshot(self, who: Principal, sandbox: str, request: CreateSnapshot) -> Snapshot:
        box = self.find(who, sandbox)
        parent = next(reversed(self.snapshots.kept), None)
        made = Snapshot(
            id=new_id("sn"),
            state=SnapshotState.READY,
            created_at=time.time(),
            name=request.name,
            tags=request.tags,
            parent=parent,
            sandbox=box.id,
            image=box.image,
            memory=request.memory,
            own=4096,
            shared=1 << 20,
        )
        self.snapshots.kept[made.id] = made
        return made

    async def start_snapshot(self, who: Principal, snapshot: str, request: CopySandbox) -> Operation:
        await self.snapshots.get(who, snapshot)
        return await self.create(who, CreateSandbox(image="debian:12", name=request.name))

    async def build_template(self, who: Principal, request: BuildTemplate) -> Operation:
        """A step that says ``false`` fails; all others are said."""
        self._check("build_template")
        if (request.image is None) == (request.source is None):
            raise InvalidRequest("bad_template", "from what?")
        lines = [f"==> {script}" for script in request.setup]
        failed = next((script for script in request.setup if script == "false"), None)
        error = None
        if failed is not None:
            error = ErrorBody(
                code="template_step_failed", message="step failed", hint="", family="Conflict", console=["last words"]
            )
        made = Template(
            id=new_id("tp"),
            name=request.name,
            created_at=time.time(),
            image=request.image or "",
            made_from=request.image or request.source or "",
            memory=not request.disk_only,
            setup=request.setup,
            start=request.start or "",
            env=request.env,
            resources=Resources(cpus=request.cpus or 1, memory=request.memory or 512 << 20, disk=1 << 30),
            log=lines,
        )
        operation = Operation(
            id=new_id("op"),
            kind="template",
            state=OperationState.FAILED if error else OperationState.SUCCEEDED,
            created_at=time.time(),
            ended_at=time.time(),
            template=made.id,
            error=error,
        )
        if error is None:
            for one in [one for one in self.templates.kept.values() if one.name == request.name]:
                del self.templates.kept[one.id]
            self.templates.kept[made.id] = made
        self.ops[operation.id] = (who.owner, operation)
        self.logs[operation.id] = lines
        return operation

    @asynccontextmanager
    async def operation_log(self, who: Principal, operation: str, start: int) -> AsyncIterator[AsyncIterator[OperationLog]]:
        await self.operation(who, operation)
        if operation not in self.logs:
            raise NotFound("log_unknown", "it has none")

        async def parts() -> AsyncIterator[OperationLog]:
            lines = self.logs[operation]
            for number in range(start, len(lines)):
                yield OperationLog(lines=[lines[number]], next=number + 1)

        yield parts()

    async def thaw(self, who: Principal, sandbox: str) -> Sandbox:
        return await self._move(who, sandbox, SandboxState.FROZEN, SandboxState.RUNNING)

    async def ping(self, who: Principal, sandbox: str) -> float:
        self.use(who, sandbox)
        return 0.1

    async def set_timeout(self, who: Principal, sandbox: str, timeout: Timeout | None) -> Sandbox:
        return await self.put(replace(self.find(who, sandbox), timeout=timeout))

    async def wait(self, who: Principal, sandbox: str, states: frozenset[SandboxState], timeout: float) -> Sandbox:
        self.find(who, sandbox)
        try:
            async with asyncio.timeout(timeout), self.changed:
                while self.find(who, sandbox).state not in states:
                    await self.changed.wait()
        except TimeoutError:
            raise DeadlineExceeded("wait_timeout", "it took too long") from None
        return self.find(who, sandbox)

    async def console(self, who: Principal, sandbox: str, *, offset: int | None, limit: int) -> tuple[int, bytes, int]:
        data = self.consoles.get(self.find(who, sandbox).id, b"")
        start = max(0, len(data) - limit) if offset is None else min(offset, len(data))
        return start, data[start : start + limit], 0

    @asynccontextmanager
    async def lease(self, who: Principal, sandbox: str) -> AsyncIterator[None]:
        box = self.find(who, sandbox)
        if not box.lease:
            raise Conflict("no_lease", "it was made without a lease")
        self.leases[box.id] = self.leases.get(box.id, 0) + 1
        try:
            yield
        finally:
            self.leases[box.id] -= 1
            if not self.leases[box.id] and not self.retired:
                await self.destroy(Principal(), box.id)

    # operations, events, metrics
    async def operation(self, who: Principal, operation: str) -> Operation:
        owner, found = self.ops.get(operation, (None, None))
        if found is None or not (who.admin or owner == who.owner):
            raise NotFound("operation_unknown", f"there is no operation {operation}")
        return found

    async def operations(self, who: Principal, *, sandbox: str | None, limit: int, cursor: str | None) -> OperationPage:
        return OperationPage(items=[op for owner, op in self.ops.values() if who.admin or owner == who.owner][:limit])

    async def wait_operation(self, who: Principal, operation: str, timeout: float, *, seen: Operation | None = None) -> Operation:
        deadline = time.monotonic() + timeout
        while True:
            found = await self.operation(who, operation)
            if found.state is not OperationState.RUNNING or (seen is not None and found != seen) or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.005)

    async def cancel_operation(self, who: Principal, operation: str) -> Operation:
        return await self.operation(who, operation)

    @asynccontextmanager
    async def events(
        self, who: Principal, *, sandbox: str | None = None, after: int | None = None
    ) -> AsyncIterator[AsyncIterator[Event]]:
        async def events() -> AsyncIterator[Event]:
            at = len(self.log) if after is None else min(after, len(self.log))
            while True:
                async with self.changed:
                    while len(self.log) <= at:
                        await self.changed.wait()
                for event in self.log[at:]:
                    if sandbox in (None, event.sandbox):
                        yield event
                at = len(self.log)

        yield events()

    async def metrics(self, who: Principal, sandbox: str, *, window: float, since: float | None) -> Metrics:
        box = self.find(who, sandbox)
        return Metrics(sandbox=box.id, step=0.5, window=600, samples=[MetricsSample(at=time.time(), memory_host=4096)])

    async def latest_metrics(self, who: Principal) -> Mapping[str, Metrics]:
        page = await self.list(who, limit=1000)
        return {box.id: await self.metrics(who, box.id, window=600, since=None) for box in page.items}

    # keys, health
    async def create_key(self, request: CreateKey) -> CreatedKey:
        secret = "sk_" + secrets.token_urlsafe(32)
        key = ApiKey(id=new_id("key", 12), name=request.name, created_at=time.time(), quota=request.quota)
        self.api_keys[key.id] = key
        self.secrets[hashlib.sha256(secret.encode()).digest()] = key.id
        return CreatedKey(key=key, secret=secret)

    async def keys(self, *, limit: int, cursor: str | None) -> ApiKeyPage:
        return ApiKeyPage(items=list(self.api_keys.values())[:limit])

    async def revoke_key(self, key: str) -> ApiKey:
        if key not in self.api_keys:
            raise NotFound("key_unknown", f"there is no key {key}")
        self.api_keys[key] = replace(self.api_keys[key], revoked_at=time.time())
        return self.api_keys[key]

    async def find_key(self, digest: bytes) -> ApiKey | None:
        key = self.secrets.get(digest)
        return self.api_keys[key] if key and self.api_keys[key].revoked_at is None else None

    async def health(self) -> Health:
        self._check("health")
        return Health(status="degraded", problems=["the disk is nearly full"])

    def facts(self) -> Mapping[str, object]:
        return {"sandboxes": len(self.boxes), "secret_fact": 1}

    def busy(self) -> bool:
        return bool(self.boxes)

    def retire(self) -> None:
        self.retired = True

    async def aclose(self) -> None:
        await self.processes.aclose()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
