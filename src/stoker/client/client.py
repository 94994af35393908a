"""One daemon, seen from a program: what is not about one sandbox, and the way to the sandboxes.

Without a client of their own, sandboxes share one per event loop and configuration. It closes when the loop ends.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING

from stoker.api.codec import decode_answer
from stoker.api.models import (
    ApiKey,
    ApiKeyPage,
    CreatedKey,
    CreateKey,
    CreatePool,
    CreateSandbox,
    Event,
    Fsck,
    FsckReport,
    Gc,
    GcReport,
    Health,
    Image,
    ImageList,
    Kernel,
    KernelList,
    Operation,
    OperationPage,
    Pool,
    PoolList,
    Quota,
    SandboxPage,
    SetWarm,
    Snapshot,
    SnapshotList,
    StartProcess,
    Version,
    WarmSet,
    WarmSetList,
)
from stoker.api.models import Sandbox as SandboxInfo
from stoker.api.units import parse_size
from stoker.client.api import Api, path
from stoker.client.data import chunks
from stoker.client.endpoint import Endpoint, parse_endpoint
from stoker.client.feed import AsyncFeed, bytes_feed, events_feed
from stoker.client.files import OnBytes, counted
from stoker.client.results import Data
from stoker.client.transport import Transport
from stoker.client.volumes import AsyncVolumes
from stoker.client.words import network_mode
from stoker.settings import Settings, load_settings

if TYPE_CHECKING:
    from stoker.client.launch import DaemonProcess
    from stoker.client.process import AsyncProcess

__all__ = ["AsyncClient", "default_client"]

UPKEEP_TIMEOUT = 1800.0
"""Seconds: a check may have to read every byte of an image."""


class AsyncClient:
    """A connection to a daemon, for one event loop.

    ``url`` and ``api_key`` default to ``STOKER_URL`` and ``STOKER_API_KEY``; without a URL it is this host's daemon, which is
    started when it does not run (unless ``start`` is false).
    """

    def __init__(
        self, url: str | None = None, api_key: str | None = None, *, start: bool = True, settings: Settings | None = None
    ) -> None:
        settings = settings or load_settings()
        url = settings.url if url is None else url
        key = settings.api_key if api_key is None else api_key
        endpoint = parse_endpoint(url) if url else Endpoint(socket=settings.socket)
        headers = [("User-Agent", "stoker-client"), ("Accept", "application/json")]
        if key:
            headers.append(("Authorization", f"Bearer {key}"))

        async def launch() -> None:
            from stoker.client.launch import start_daemon

            await start_daemon(settings)

        self.endpoint = endpoint
        self.api = Api(
            Transport(
                endpoint,
                headers=headers,
                start=launch if start and not url else None,
                hint="stoker serve" if not url else f"is the daemon running at {endpoint}, and STOKER_URL right?",
            )
        )
        self.volumes = AsyncVolumes(self.api)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes its connections. Sandboxes and processes go on."""
        self.api.transport.close()

    async def version(self) -> Version:
        """The daemon's version, pid and facts."""
        return await self.api.call("GET", path("version"), Version)

    async def health(self) -> Health:
        return await self.api.call("GET", path("health"), Health)

    async def sandboxes(
        self,
        *,
        states: tuple[str, ...] = (),
        labels: Mapping[str, str | None] | None = None,
        name: str | None = None,
        limit: int | None = None,
    ) -> list[SandboxInfo]:
        """The sandboxes as they are now, newest first. A label with None must be there with any value."""
        wanted = [key if value is None else f"{key}={value}" for key, value in (labels or {}).items()]
        items: list[SandboxInfo] = []
        cursor: str | None = None
        while True:
            size = 500 if limit is None else min(500, limit - len(items))
            query: dict[str, object] = {"state": states, "label": wanted, "name": name, "limit": size, "cursor": cursor}
            page = await self.api.call("GET", path("sandboxes"), SandboxPage, query=query)
            items.extend(page.items)
            cursor = page.next
            if cursor is None or (limit is not None and len(items) >= limit):
                return items

    async def operations(self) -> list[Operation]:
        """The long work that is going on, and what of it has ended lately."""
        return (await self.api.call("GET", path("operations"), OperationPage, query={"limit": 500})).items

    async def events(self, *, sandbox: str | None = None, after: int | None = None) -> AsyncFeed[Event]:
        """What happens from now on, as it happens; with ``after`` first what is kept after that event (0: everything)."""
        where = path("events", "stream") if sandbox is None else path("sandboxes", sandbox, "events", "stream")
        return await events_feed(self.api, where, lambda data: decode_answer(data, Event), query={"after": after})

    async def images(self) -> list[Image]:
        """The images in the daemon's store, the newest first."""
        return (await self.api.call("GET", path("images"), ImageList)).items

    async def image(self, reference: str) -> Image:
        """One image: by name (``debian:12``), digest, or the first characters of that."""
        return await self.api.call("GET", path("images", reference), Image)

    async def remove_image(self, reference: str) -> None:
        """By name: that name, and the content with its last one. ``Conflict("image_in_use")`` names the sandboxes that use it."""
        await self.api.send("DELETE", path("images", reference), timeout=UPKEEP_TIMEOUT)

    async def kernels(self) -> list[Kernel]:
        """The kernels in the daemon's store, the newest first."""
        return (await self.api.call("GET", path("kernels"), KernelList)).items

    async def kernel(self, reference: str) -> Kernel:
        """One kernel: by name (``debian:12``), digest, or the first characters of that."""
        return await self.api.call("GET", path("kernels", reference), Kernel)

    async def remove_kernel(self, reference: str) -> None:
        """As :meth:`remove_image`; the code is ``kernel_in_use``."""
        await self.api.send("DELETE", path("kernels", reference), timeout=UPKEEP_TIMEOUT)

    async def fsck(self, *, repair: bool = False) -> FsckReport:
        """Compares the daemon's books with its host; with ``repair`` what differs is mended. For administrators."""
        body = Fsck(repair=repair)
        return await self.api.call("POST", path("host", "fsck"), FsckReport, body=body, timeout=UPKEEP_TIMEOUT)

    async def gc(self, *, dry_run: bool = False) -> GcReport:
        """Frees what nothing refers to and says how much; with ``dry_run`` only says it. For administrators."""
        return await self.api.call("POST", path("host", "gc"), GcReport, body=Gc(dry_run=dry_run), timeout=UPKEEP_TIMEOUT)

    async def create_pool(self, name: str = "main", *, size: int | str) -> Pool:
        """A pool with a file system of its own. ``size``: bytes, or such as ``50G``. For administrators, as all about pools."""
        body = CreatePool(name=name, size=parse_size(size))
        return await self.api.call("POST", path("pools"), Pool, body=body, timeout=UPKEEP_TIMEOUT)

    async def snapshots(self) -> list[Snapshot]:
        """All snapshots, newest first."""
        return (await self.api.call("GET", path("snapshots"), SnapshotList)).items

    async def snapshot(self, name: str) -> Snapshot:
        """One snapshot, by id or name."""
        return await self.api.call("GET", path("snapshots", name), Snapshot)

    async def export_snapshot(
        self, name: str, destination: str | os.PathLike[str], *, image: bool = True, on_progress: OnBytes | None = None
    ) -> None:
        """Writes a snapshot into one file, whole or not at all. Without ``image`` the host it goes to has to have its image."""
        from stoker.client.archive import save

        async with await self.read_snapshot(name, image=image) as pieces:
            await save(counted(pieces, on_progress), destination, 0o600)

    async def read_snapshot(self, name: str, *, image: bool = True) -> AsyncFeed[bytes]:
        """That file, as bytes."""
        where = path("snapshots", name, "file")
        feed, _ = await bytes_feed(
            self.api.stream("GET", where, query={"image": image}, timeout=UPKEEP_TIMEOUT, idle=UPKEEP_TIMEOUT)
        )
        return feed

    async def import_snapshot(self, data: Data, *, name: str | None = None, on_progress: OnBytes | None = None) -> Snapshot:
        """A snapshot out of such a file: an open file, bytes, or an iterable. ``unfit`` says why its memory is of no use."""
        pieces = counted(chunks(data), on_progress)
        async with self.api.stream("POST", path("snapshots"), query={"name": name}, body=pieces, timeout=None) as stream:
            return decode_answer(await stream.read(), Snapshot)

    async def remove_snapshot(self, name: str) -> None:
        """Removes a snapshot. What was started from it stays."""
        await self.api.send("DELETE", path("snapshots", name), timeout=UPKEEP_TIMEOUT)

    async def keep_warm(
        self,
        image: str,
        size: int,
        *,
        memory: str | int | None = None,
        cpus: int | None = None,
        disk: str | int = 0,
        kernel: str = "",
        network: str | None = None,
    ) -> WarmSet:
        """Has ``size`` machines wait for creates that ask for the same (0: none any more). They are made in the background."""
        wanted = CreateSandbox(
            image=image,
            kernel=kernel,
            cpus=cpus,
            memory=None if memory is None else parse_size(memory),
            disk=parse_size(disk),
            network=None if network is None else network_mode(network),
        )
        return await self.api.call("PUT", path("warm"), WarmSet, body=SetWarm(sandbox=wanted, size=size))

    async def warm_sets(self) -> list[WarmSet]:
        """How many machines wait, and for what."""
        return (await self.api.call("GET", path("warm"), WarmSetList)).items

    async def remove_warm_set(self, warm: str) -> None:
        """Ends a warm set, by its id. Sandboxes that were served from it stay."""
        await self.api.send("DELETE", path("warm", warm), timeout=UPKEEP_TIMEOUT)

    async def prune_snapshots(self) -> list[Snapshot]:
        """Removes those that have neither a name nor a tag; which they were."""
        return (await self.api.call("DELETE", path("snapshots"), SnapshotList, timeout=UPKEEP_TIMEOUT)).items

    async def pools(self) -> list[Pool]:
        """All pools; the one with an empty name is the data directory."""
        return (await self.api.call("GET", path("pools"), PoolList)).items

    async def pool(self, name: str) -> Pool:
        """One pool, and what a small clone takes there by each strategy. ``directory`` is the data directory."""
        return await self.api.call("GET", path("pools", name), Pool, timeout=UPKEEP_TIMEOUT)

    async def remove_pool(self, name: str) -> None:
        """Removes a pool that no disk is in: ``pool_in_use`` (Conflict) otherwise."""
        await self.api.send("DELETE", path("pools", name), timeout=UPKEEP_TIMEOUT)

    async def create_key(self, name: str = "", *, quota: Quota | None = None) -> CreatedKey:
        """Makes an API key. Its secret is in this answer and nowhere else."""
        return await self.api.call("POST", path("keys"), CreatedKey, body=CreateKey(name=name, quota=quota or Quota()))

    async def keys(self) -> list[ApiKey]:
        return (await self.api.call("GET", path("keys"), ApiKeyPage, query={"limit": 500})).items

    async def revoke_key(self, key: str) -> ApiKey:
        """Makes a key worthless, at once."""
        return await self.api.call("DELETE", path("keys", key), ApiKey)

    async def start_process(self, sandbox: str, request: StartProcess) -> AsyncProcess:
        """Starts a process that is described by a whole request, in the background."""
        from stoker.client.commands import start_process

        return await start_process(self.api, sandbox, request)

    async def open_process(self, sandbox: str, request: StartProcess) -> AsyncProcess:
        """The same, attached to it from its first byte, in one round trip. It waits for its reader."""
        from stoker.client.commands import open_process

        return await open_process(self.api, sandbox, request)

    def daemon(self) -> DaemonProcess | None:
        """Who listens on this host's socket; None when nobody does, or when the daemon is elsewhere."""
        from stoker.client.launch import listening

        return None if self.endpoint.socket is None else listening(self.endpoint.socket)


_Key = tuple[str, str, str]
_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Key, tuple[AsyncClient, AsyncGenerator[None, None]]]] = (
    weakref.WeakKeyDictionary()
)


async def _keeper(client: AsyncClient) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await client.close()


async def default_client() -> AsyncClient:
    """The client that sandboxes of this event loop share, for the configuration as it is now.

    ``asyncio.run`` ends the open asynchronous generators of its loop: one of them closes the client, so nothing is left open.
    """
    settings = load_settings()
    key: _Key = (settings.url, settings.api_key, str(settings.socket))
    clients = _clients.setdefault(asyncio.get_running_loop(), {})
    if key not in clients:
        client = AsyncClient(settings=settings)
        keeper = _keeper(client)
        clients[key] = (client, keeper)
        await anext(keeper)
    return clients[key][0]
