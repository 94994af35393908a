"""``AsyncTemplate``: a name that sandboxes are created from. The sync twin, ``Template``, is generated from this."""

from __future__ import annotations

import asyncio
import builtins
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from stoker.api.codec import decode_answer
from stoker.api.models import BuildTemplate, Operation, OperationLog, TemplateList
from stoker.api.models import Template as TemplateInfo
from stoker.api.units import parse_duration, parse_size
from stoker.client.api import Api, path
from stoker.client.client import AsyncClient, default_client
from stoker.client.feed import events_feed
from stoker.client.operations import cancel_operation, finish_operation
from stoker.client.words import network_mode
from stoker.errors import HostError, NotFound, StokerError

__all__ = ["AsyncTemplate", "OnLog"]

OnLog: TypeAlias = Callable[[str], object]
"""Called with each line that a build says; what it returns is awaited where it can be."""
REMOVE_TIMEOUT = 600.0
LOG_LEFT = 10.0
"""Seconds that the last lines have to come after a build has ended."""


class AsyncTemplate:
    """A template by its handle: :meth:`build` one, :meth:`create` one from what is there, or :meth:`get` it.

    ``AsyncSandbox.create("NAME")`` makes a sandbox of it.
    """

    def __init__(self, client: AsyncClient, info: TemplateInfo) -> None:
        self._client = client
        self._info = info

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._info.name}>"

    @property
    def id(self) -> str:
        return self._info.id

    @property
    def name(self) -> str:
        return self._info.name

    @property
    def info(self) -> TemplateInfo:
        """As it was when it was asked for."""
        return self._info

    @classmethod
    async def build(
        cls,
        name: str,
        *,
        image: str,
        setup: Sequence[str] = (),
        start: str | None = None,
        ready: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        workdir: str | None = None,
        setup_user: str = "root",
        kernel: str = "",
        cpus: int | None = None,
        memory: str | int | None = None,
        disk: str | int = 0,
        network: str | None = None,
        disk_only: bool = False,
        step_timeout: float | str = 1800.0,
        ready_timeout: float | str = 120.0,
        build_timeout: float = 7200.0,
        on_log: OnLog | None = None,
        client: AsyncClient | None = None,
    ) -> AsyncTemplate:
        """Makes a template of an image, or of another template: the steps of ``setup`` run in a machine of it, by ``/bin/sh -c``.

        Then ``start`` runs in the background, as the process ``start`` that every sandbox of the template has, and once ``ready``
        ends with 0, memory and disk are kept. With ``disk_only`` the disk alone: sandboxes boot, and start and ready run in each.
        ``env``, ``user`` and ``workdir`` are the sandboxes' defaults. A template of this name is replaced once the new one is
        whole. What a failed step said is in the error's ``console``. Cancelled, or not whole within ``build_timeout`` seconds,
        nothing of it is left.
        """
        request = BuildTemplate(
            name=name,
            image=image,
            setup=list(setup),
            setup_user=setup_user,
            start=start,
            ready=ready,
            env=dict(env or {}),
            user=user,
            workdir=workdir,
            kernel=kernel,
            cpus=cpus,
            memory=None if memory is None else parse_size(memory),
            disk=parse_size(disk),
            network=None if network is None else network_mode(network),
            disk_only=disk_only,
            step_timeout=parse_duration(step_timeout),
            ready_timeout=parse_duration(ready_timeout),
        )
        client = client or await default_client()
        return cls(client, await _made(client.api, request, build_timeout, on_log))

    @classmethod
    async def create(
        cls,
        name: str,
        source: str,
        *,
        start: str | None = None,
        ready: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        workdir: str | None = None,
        disk_only: bool = False,
        build_timeout: float = 7200.0,
        on_log: OnLog | None = None,
        client: AsyncClient | None = None,
    ) -> AsyncTemplate:
        """Makes a template of a snapshot or a sandbox, by name or id; the sandbox goes on.

        ``start`` and ``ready`` are for where its memory cannot be taken up.
        """
        request = BuildTemplate(
            name=name,
            source=source,
            start=start,
            ready=ready,
            env=dict(env or {}),
            user=user,
            workdir=workdir,
            disk_only=disk_only,
        )
        client = client or await default_client()
        return cls(client, await _made(client.api, request, build_timeout, on_log))

    @classmethod
    async def get(cls, template: str, *, client: AsyncClient | None = None) -> AsyncTemplate:
        """One, by name or id, with the end of its build's log (``info.log``)."""
        client = client or await default_client()
        return cls(client, await client.api.call("GET", path("templates", template), TemplateInfo))

    @classmethod
    async def list(cls, *, client: AsyncClient | None = None) -> builtins.list[TemplateInfo]:
        """All of one's templates, newest first."""
        client = client or await default_client()
        return (await client.api.call("GET", path("templates"), TemplateList)).items

    async def remove(self) -> None:
        """Removes it. Sandboxes that were made from it stay."""
        await self._client.api.send("DELETE", path("templates", self.id), timeout=REMOVE_TIMEOUT)


async def _made(api: Api, request: BuildTemplate, timeout: float, on_log: OnLog | None) -> TemplateInfo:
    operation = await _begun(api, request)
    reading = asyncio.create_task(_read(api, operation, on_log)) if on_log is not None else None
    try:
        await finish_operation(api, operation, timeout, None)
    finally:
        if reading is not None:
            with suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(LOG_LEFT):
                    await asyncio.wait({reading})
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
    if reading is not None and not reading.cancelled() and (error := reading.exception()) is not None:
        raise error
    return await api.call("GET", path("templates", str(operation.template)), TemplateInfo)


async def _begun(api: Api, request: BuildTemplate) -> Operation:
    """Asks for it. Cancelled while it asks, it waits for the answer, to take back what was asked for."""
    asking = asyncio.ensure_future(api.call("POST", path("templates"), Operation, body=request, query={"wait": False}))
    try:
        return await asyncio.shield(asking)
    except asyncio.CancelledError:
        with suppress(StokerError, TimeoutError):
            async with asyncio.timeout(LOG_LEFT):
                await cancel_operation(api, await asking)
        raise


async def _read(api: Api, operation: Operation, on_log: OnLog) -> None:
    """Its log, line by line; over another connection where one breaks."""
    start = 0
    target = path("operations", operation.id, "log", "stream")
    while True:
        try:
            async with await events_feed(api, target, _decode, query={"start": start}) as parts:
                async for part in parts:
                    for line in part.lines:
                        result: Any = on_log(line)
                        if inspect.isawaitable(result):
                            await result
                    start = part.next
            return
        except NotFound:
            return  # the daemon has been started anew: the build is gone
        except HostError:
            await asyncio.sleep(0.2)
        except StokerError:
            return


def _decode(data: bytes) -> OperationLog:
    return decode_answer(data, OperationLog)
