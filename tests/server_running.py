"""A real server (uvicorn, sockets, our protocol) on the fake engine, in the test's own loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from blockbuster import BlockBuster
from websockets.asyncio.client import ClientConnection, connect, unix_connect

from server_fakes import FakeEngine
from stoker.api.models import CreateKey, CreateSandbox, Principal, Sandbox
from stoker.server.daemon import serve
from stoker.server.ports import EngineProtocol
from stoker.settings import Settings, load_settings

LOCAL = Principal()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Running:
    engine: FakeEngine
    settings: Settings
    http: httpx.AsyncClient
    """Over the Unix socket."""
    tcp: httpx.AsyncClient
    task: asyncio.Task[None]

    async def sandbox(self, **rest: Any) -> Sandbox:
        operation = await self.engine.create(LOCAL, CreateSandbox(image="debian:12", **rest))
        await self.engine.wait_operation(LOCAL, operation.id, 5)
        return await self.engine.get(LOCAL, operation.sandbox or "")

    async def key(self) -> str:
        return (await self.engine.create_key(CreateKey(name="test"))).secret

    def websocket(self, path: str, **rest: Any) -> unix_connect:
        return unix_connect(str(self.settings.socket), f"ws://localhost{path}", compression=None, **rest)

    def tcp_websocket(self, path: str, **rest: Any) -> connect:
        return connect(f"ws://{self.settings.listen}{path}", compression=None, proxy=None, **rest)


def test_settings(directory: Path) -> Settings:
    base = load_settings({"HOME": str(directory), "XDG_RUNTIME_DIR": str(directory)}, root=False)
    return replace(base, data_dir=directory / "data", run_dir=directory / "run", listen=f"127.0.0.1:{free_port()}", proxy="")


test_settings.__test__ = False  # type: ignore[attr-defined]


@asynccontextmanager
async def running(directory: Path, *, auto: bool = False, guarded: bool = False, **changes: Any) -> AsyncIterator[Running]:
    settings = replace(test_settings(directory), **changes)
    settings.data_dir.mkdir()
    (directory / "guest").mkdir()
    engine = FakeEngine(directory / "guest")

    @asynccontextmanager
    async def open_engine(_: Settings) -> AsyncIterator[EngineProtocol]:
        try:
            yield engine
        finally:
            await engine.aclose()

    ready = asyncio.Event()
    task = asyncio.create_task(serve(settings, auto=auto, ready=ready.set, open_engine=open_engine))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if not ready.is_set():
        waiting.cancel()
        await task
    # From here on nothing of the server may block the loop (its start may: nobody waits for it yet).
    guard = BlockBuster(["stoker.server", "stoker.api"])
    if guarded:
        guard.activate()
    transport = httpx.AsyncHTTPTransport(uds=str(settings.socket))
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client,
        httpx.AsyncClient(base_url=f"http://{settings.listen}", timeout=20, trust_env=False) as tcp,
    ):
        try:
            yield Running(engine, settings, client, tcp, task)
        finally:
            if guarded:
                guard.deactivate()
    if not task.done():
        import os
        import signal

        os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 20)


__all__ = ["LOCAL", "ClientConnection", "Running", "running"]
