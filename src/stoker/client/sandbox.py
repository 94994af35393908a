"""``AsyncSandbox``: one microVM, from outside. The sync twin, ``Sandbox``, is generated from this."""

from __future__ import annotations

import asyncio
import builtins
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from stoker.api.codec import decode_answer
from stoker.api.models import (
    Certificate,
    ConsoleLog,
    CopySandbox,
    CreateSandbox,
    CreateSnapshot,
    Event,
    ExplainNetwork,
    Explanation,
    ForkResult,
    ForkSandbox,
    Interface,
    LearnedNetwork,
    Metrics,
    NetworkStatus,
    Operation,
    OperationPage,
    PingResult,
    PortAccess,
    ResizeSandbox,
    SetTimeout,
    Snapshot,
    SshAccess,
    StopSandbox,
    VolumeMount,
)
from stoker.api.models import Sandbox as SandboxInfo
from stoker.api.network import parse_interface
from stoker.api.units import parse_size
from stoker.api.volumes import parse_mount
from stoker.client.api import path
from stoker.client.client import AsyncClient, default_client
from stoker.client.commands import AsyncCommands, AsyncPty
from stoker.client.feed import AsyncFeed, events_feed
from stoker.client.files import AsyncFiles
from stoker.client.forward import AsyncForward, listen
from stoker.client.making import app_of, hold, network_change, timeout_of
from stoker.client.operations import OnProgress, begin_create, destroy_made, finish_operation, wait_for_state
from stoker.client.words import bridge_name, init_mode, network_mode, transport
from stoker.errors import Conflict, NotFound, error_from_wire

if TYPE_CHECKING:
    from stoker.client.lease import Lease

__all__ = ["AsyncSandbox", "created"]

LONG = 600.0
"""Seconds that memory of any size gets to be written or read."""


class AsyncSandbox:
    """A sandbox by its handle. Make one with :meth:`create`, find one with :meth:`connect` or :meth:`list`.

    Used with ``async with`` it is destroyed at the end of the block; otherwise it lives until it is killed or its timeout passes.
    """

    def __init__(self, client: AsyncClient, info: SandboxInfo) -> None:
        self._client = client
        self._api = client.api
        self._info = info
        self._held: Lease | None = None
        self.commands = AsyncCommands(self._api, info.id)
        self.files = AsyncFiles(self._api, info.id)
        self.pty = AsyncPty(self._api, info.id)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._info.name or self.id} {self._info.state.value}>"

    @property
    def id(self) -> str:
        return self._info.id

    @property
    def name(self) -> str | None:
        return self._info.name

    @property
    def info(self) -> SandboxInfo:
        """As it was when something was last heard of it; :meth:`refresh` asks."""
        return self._info

    @classmethod
    async def create(
        cls,
        image: str,
        *,
        name: str | None = None,
        memory: str | int | None = None,
        cpus: int | None = None,
        disk: str | int = 0,
        env: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        timeout: float | str | None = None,
        idle_timeout: float | str | None = None,
        kernel: str = "",
        initrd: str = "",
        hostname: str | None = None,
        user: str | None = None,
        workdir: str | None = None,
        network: str | None = None,
        egress: str | None = None,
        learn: bool = False,
        publish: Sequence[str] = (),
        host_access: bool = False,
        rate_in: str | int = 0,
        rate_out: str | int = 0,
        connections: int = 0,
        ipv6: bool = False,
        address: str | None = None,
        gateway: str | None = None,
        run_id: str | None = None,
        address_range: str | None = None,
        tap: str | None = None,
        interfaces: Sequence[str | Interface] = (),
        init: str | None = None,
        volumes: Sequence[str | VolumeMount] = (),
        app: str | os.PathLike[str] | None = None,
        lease: bool = False,
        cold: bool = False,
        start: bool = False,
        ready_timeout: float = 900.0,
        on_progress: OnProgress | None = None,
        client: AsyncClient | None = None,
    ) -> AsyncSandbox:
        """Makes a sandbox out of an image or a template (by its name) and returns when it runs.

        ``memory`` (512M), ``cpus`` (1), ``network`` (as configured) and ``init`` (``agent``) are a template's where that is one.
        Sizes are bytes or such as ``512M``, times seconds or such as ``30m``. ``timeout`` destroys it so long after now,
        ``idle_timeout`` so long after its last use. With ``lease`` it ends with this program, however that ends. ``start`` runs
        the image's own command as a process tagged ``main``. With ``init="image"`` process 1 is the image's ``/sbin/init``.
        With ``network="nat"`` it has an interface on the host (root's daemon), ``egress`` says where it may connect to (``all``:
        public addresses, ``none``, or rules such as ``allow: 10.1.0.0/16, *.example.org:443``), and ``publish`` which ports of the
        host lead into it (``8080:80``); ``run_id`` (with a name), ``address_range`` or ``tap`` give it an address of its own on the
        host. ``interfaces`` are further ones, such as ``bridge:br1,address=192.168.1.50/24``; ``volumes`` ``data:/srv/data:ro``;
        ``app`` is a zip, tar, tar.gz or directory of this host whose content goes into ``/app``.
        Cancelled, or not ready within ``ready_timeout`` seconds, nothing of it is left.
        """
        client = client or await default_client()
        request = CreateSandbox(
            image=image,
            name=name,
            kernel=kernel,
            initrd=initrd,
            cpus=cpus,
            memory=None if memory is None else parse_size(memory),
            disk=parse_size(disk),
            env=dict(env or {}),
            labels=dict(labels or {}),
            hostname=hostname,
            user=user,
            workdir=workdir,
            network=None if network is None else network_mode(network),
            egress=egress,
            learn=learn,
            publish=list(publish),
            host_access=host_access,
            rate_in=parse_size(rate_in),
            rate_out=parse_size(rate_out),
            connections=connections,
            ipv6=ipv6,
            bridge=bridge_name(network),
            address=address,
            gateway=gateway,
            run_id=run_id,
            address_range=address_range,
            tap=tap,
            interfaces=[parse_interface(one) if isinstance(one, str) else one for one in interfaces],
            init=None if init is None else init_mode(init),
            volumes=[parse_mount(one) if isinstance(one, str) else one for one in volumes],
            app=None if app is None else await app_of(client.api, app),
            timeout=timeout_of(timeout, idle_timeout),
            lease=lease,
            cold=cold,
            start=start,
        )
        operation = await begin_create(client.api, request)
        return await created(client, operation, lease=lease, ready_timeout=ready_timeout, on_progress=on_progress)

    @classmethod
    async def connect(cls, sandbox: str, *, client: AsyncClient | None = None) -> AsyncSandbox:
        """A handle on a sandbox that is there, by its id or its name."""
        client = client or await default_client()
        return cls(client, await client.api.call("GET", path("sandboxes", sandbox), SandboxInfo))

    @classmethod
    async def list(
        cls,
        *,
        states: tuple[str, ...] = (),
        labels: Mapping[str, str | None] | None = None,
        limit: int | None = None,
        client: AsyncClient | None = None,
    ) -> builtins.list[AsyncSandbox]:
        """Handles on one's sandboxes, newest first. A label with None must be there with any value."""
        client = client or await default_client()
        return [cls(client, info) for info in await client.sandboxes(states=states, labels=labels, limit=limit)]

    async def __aenter__(self) -> AsyncSandbox:
        return self

    async def __aexit__(self, *_: object) -> None:
        # Also when the block was cancelled: the machine must not stay because its user was interrupted.
        await asyncio.shield(self.kill())

    def _path(self, *rest: str) -> str:
        return path("sandboxes", self.id, *rest)

    async def refresh(self) -> SandboxInfo:
        """Asks how it is now."""
        return self._keep(await self._api.call("GET", self._path(), SandboxInfo))

    def _keep(self, info: SandboxInfo) -> SandboxInfo:
        self._info = info
        return info

    async def kill(self) -> bool:
        """Destroys it: the machine, its disk, everything. False: it was gone already."""
        try:
            await self._api.send("DELETE", self._path(), timeout=120.0)
        except NotFound:
            return False
        finally:
            await self.release()
        return True

    async def release(self) -> None:
        """Lets go of its lease: the daemon destroys it within a second. Nothing happens to one without a lease."""
        if self._held is not None:
            self._held.release()

    async def _change(self, what: str, body: Any = None, timeout: float = 120.0) -> SandboxInfo:
        return self._keep(await self._api.call("POST", self._path(what), SandboxInfo, body=body, timeout=timeout))

    async def resize(self, *, disk: int | str) -> SandboxInfo:
        """A larger root disk (bytes, or such as ``20G``). The file system of a running one grows with it."""
        return await self._change("resize", ResizeSandbox(disk=parse_size(disk)))

    async def freeze(self) -> SandboxInfo:
        """Stops its CPUs. It keeps its memory, and answers nothing until :meth:`thaw`."""
        return await self._change("freeze")

    async def thaw(self) -> SandboxInfo:
        return await self._change("thaw")

    async def pause(self) -> SandboxInfo:
        """Puts it away: memory, devices and processes go into files, and it takes nothing but disk.

        :meth:`resume`, or whatever uses its processes or files, brings all back.
        """
        return await self._change("pause", timeout=LONG)

    async def resume(self) -> SandboxInfo:
        """Takes it up again where it was paused."""
        return await self._change("resume", timeout=LONG)

    async def fork(
        self, count: int = 1, *, name: str | None = None, labels: Mapping[str, str] | None = None
    ) -> builtins.list[AsyncSandbox]:
        """Copies of it as it is now, which go on from here; it goes on, too. With a name and several they are NAME-1, NAME-2...

        Where only some could be made, those are destroyed and what went wrong with the first of the others is raised.
        """
        body = ForkSandbox(count=count, name=name, labels=dict(labels) if labels is not None else None)
        result = await self._api.call("POST", self._path("fork"), ForkResult, body=body, timeout=LONG)
        made = [
            await AsyncSandbox.connect(item.sandbox.id, client=self._client) for item in result.items if item.sandbox is not None
        ]
        failed = next((item.error for item in result.items if item.error is not None), None)
        if failed is not None:
            await asyncio.gather(*(box.kill() for box in made))
            raise error_from_wire(500, msgspec.to_builtins(failed))
        return made

    async def operation(self, kind: str) -> Operation:
        """The last operation of a kind (``pause``, ``resume``, ``fork``, ``snapshot``): its steps say how long each part took."""
        page = await self._api.call("GET", path("operations"), OperationPage, query={"sandbox": self.id, "limit": 100})
        found = next((one for one in page.items if one.kind == kind), None)
        if found is None:
            raise NotFound("operation_unknown", f"{self.id} had no {kind} that is remembered")
        return found

    async def identity(self) -> Certificate:
        """What was done when it last came back from memory, so that it is nobody's twin."""
        return await self._api.call("GET", self._path("identity"), Certificate)

    async def snapshot(
        self, name: str | None = None, *, tags: Sequence[str] = (), memory: bool = True, compact: bool = False
    ) -> Snapshot:
        """Keeps what it is now: disk, memory and processes, or with ``memory=False`` the disk alone. It goes on.

        ``compact`` leaves out memory that the guest does not use, which takes it a moment. See :meth:`from_snapshot`.
        """
        body = CreateSnapshot(name=name, tags=list(tags), memory=memory, compact=compact)
        return await self._api.call("POST", self._path("snapshots"), Snapshot, body=body, timeout=LONG)

    @classmethod
    async def from_snapshot(
        cls,
        snapshot: str,
        *,
        name: str | None = None,
        hostname: str | None = None,
        labels: Mapping[str, str] | None = None,
        timeout: float | str | None = None,
        idle_timeout: float | str | None = None,
        cold: bool = False,
        ready_timeout: float = 900.0,
        on_progress: OnProgress | None = None,
        client: AsyncClient | None = None,
    ) -> AsyncSandbox:
        """A sandbox that goes on where a snapshot was taken, as another machine. ``cold``: it boots from its disk."""
        client = client or await default_client()
        body = CopySandbox(
            name=name,
            hostname=hostname,
            labels=dict(labels) if labels is not None else None,
            timeout=timeout_of(timeout, idle_timeout),
            cold=cold,
        )
        target = path("snapshots", snapshot, "sandboxes")
        operation = await client.api.call("POST", target, Operation, body=body, query={"wait": False})
        return await created(client, operation, ready_timeout=ready_timeout, on_progress=on_progress)

    async def stop(self, *, grace: float = 10.0) -> SandboxInfo:
        """Shuts it down and keeps its disk. ``grace``: seconds its processes get to end by themselves."""
        return await self._change("stop", StopSandbox(grace=grace), timeout=grace + 120.0)

    async def start(self, *, ready_timeout: float = 900.0, on_progress: OnProgress | None = None) -> SandboxInfo:
        """Boots a stopped one from its disk."""
        operation = await self._api.call("POST", self._path("start"), Operation, query={"wait": False})
        await finish_operation(self._api, operation, ready_timeout, on_progress)
        return await self.refresh()

    async def set_timeout(self, timeout: float | str | None = None, *, idle_timeout: float | str | None = None) -> SandboxInfo:
        """Destroys it so long after now, or pauses it so long after its last use; with neither it stays until it is killed."""
        body = SetTimeout(timeout=timeout_of(timeout, idle_timeout))
        return self._keep(await self._api.call("PUT", self._path("timeout"), SandboxInfo, body=body))

    async def set_network(
        self,
        *,
        egress: str | None = None,
        publish: Sequence[str] | None = None,
        host_access: bool | None = None,
        learn: bool | None = None,
        rate_in: str | int | None = None,
        rate_out: str | int | None = None,
        connections: int | None = None,
    ) -> SandboxInfo:
        """Another egress policy, other published ports, access to the host or none, other limits (bytes a second, and how many at
        once; 0: none); None leaves them. Connections that it may not have any more are cut. ``learn``: what the policy denies of
        the public is let through and recorded (:meth:`learned`)."""
        body = network_change(egress, publish, host_access, learn, rate_in, rate_out, connections)
        return self._keep(await self._api.call("PUT", self._path("network"), SandboxInfo, body=body))

    async def network(self) -> NetworkStatus:
        """Its address, policy and ports, counters, and what was denied of late."""
        return await self._api.call("GET", self._path("network"), NetworkStatus)

    async def learned(self) -> LearnedNetwork:
        """What it needed beyond its policy."""
        return await self._api.call("GET", self._path("network", "learned"), LearnedNetwork)

    async def explain(self, target: str, *, protocol: str = "tcp") -> Explanation:
        """Why it reaches ``HOST:PORT``, or does not; 10 s at most. ``protocol`` may be ``udp``; nothing is sent then."""
        body = ExplainNetwork(target=target, protocol=transport(protocol))
        return await self._api.call("POST", self._path("network", "explain"), Explanation, body=body)

    async def wait(self, *states: str, timeout: float | None = None) -> SandboxInfo:
        """Until it is in one of the states (none: until it is gone). :class:`DeadlineExceeded` after ``timeout`` seconds."""
        info = await wait_for_state(self._api, self.id, states, timeout)
        return self._info if info is None else self._keep(info)

    async def port(self, port: int) -> PortAccess:
        """Where the daemon's reverse proxy serves a port of it, and the token for that."""
        return await self._api.call("GET", self._path("ports", str(port)), PortAccess)

    async def ssh(self) -> SshAccess:
        """Its ssh host key. What speaks ssh with it is the WebSocket of the same path, and ``stoker ssh``."""
        return await self._api.call("GET", self._path("ssh"), SshAccess)

    async def forward(self, port: int, local: str = "127.0.0.1:0") -> AsyncForward:
        """Listens on a local address (port 0: any free one; or the path of a Unix socket) that leads to a port of it.

        The sandbox needs no network, and its service may listen on localhost only. To be closed, or used with ``async with``.
        """
        return await listen(self._api, self._path("ports", str(port), "stream"), local)

    async def ping(self) -> float:
        """Seconds until the agent in the guest has answered."""
        return (await self._api.call("POST", self._path("ping"), PingResult)).ms / 1000

    async def metrics(self, *, window: float = 60.0) -> Metrics:
        """CPU, memory, disk and network over the last so many seconds."""
        return await self._api.call("GET", self._path("metrics"), Metrics, query={"window": window})

    async def logs(self) -> str:
        """The end of the serial console, at most 64 KiB."""
        return (await self.console()).text

    async def console(self, *, offset: int | None = None, limit: int | None = None) -> ConsoleLog:
        """A part of the serial console from ``offset`` on, or its end."""
        return await self._api.call("GET", self._path("console"), ConsoleLog, query={"offset": offset, "limit": limit})

    async def follow_logs(self, *, offset: int | None = None) -> AsyncFeed[ConsoleLog]:
        """The serial console as it grows."""
        query: dict[str, object] = {"offset": offset}
        target = self._path("console", "stream")
        return await events_feed(self._api, target, lambda data: decode_answer(data, ConsoleLog), query=query)

    async def events(self, *, after: int | None = None) -> AsyncFeed[Event]:
        """What happens to it from now on; with ``after`` first what is kept after that event (0: everything)."""
        return await self._client.events(sandbox=self.id, after=after)

    async def url_for(self, path: str, *, operation: str = "read", expires_in: int = 3600) -> str:
        """A whole URL that reads or writes one of its files without a key. Of use where the daemon listens on TCP."""
        signed = await self.files.signed_url(path, operation=operation, expires_in=expires_in)
        return f"{self._client.endpoint}{signed.url}"


async def created(
    client: AsyncClient,
    operation: Operation,
    *,
    lease: bool = False,
    ready_timeout: float = 900.0,
    on_progress: OnProgress | None = None,
) -> AsyncSandbox:
    """The sandbox that an operation makes, once it runs. Given up before that, nothing of it is left."""
    held: Lease | None = None
    try:
        try:
            held = await hold(client.api, str(operation.sandbox)) if lease else None
        except (Conflict, NotFound):
            # It failed before anybody could hold it: its operation says why.
            await finish_operation(client.api, operation, ready_timeout, on_progress, undo=destroy_made)
            raise
        await finish_operation(client.api, operation, ready_timeout, on_progress, undo=destroy_made)
        box = await AsyncSandbox.connect(str(operation.sandbox), client=client)
    except BaseException as e:
        if held is not None:
            held.release()
        elif isinstance(e, asyncio.CancelledError):
            await asyncio.shield(destroy_made(client.api, operation))
        raise
    box._held = held
    return box
