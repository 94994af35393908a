"""The server with processes of the real agent (a program of this host), and this host's own ssh, scp and sftp."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import STOKER
from guest_host import running_agent
from server_fakes import FakeEngine, FakeProcesses
from server_running import Running, running
from stoker.api.models import Principal, StartProcess
from stoker.engine.feed import Client
from stoker.engine.hub import Hub
from stoker.errors import GuestError
from stoker.guest.agent import Agent
from stoker.guest.channel import connect


class HubProcesses(FakeProcesses):
    """As the engine's own: by a hub, over an agent."""

    def __init__(self, engine: FakeEngine, hub: Hub, agent: Agent) -> None:
        super().__init__(engine)
        self.hub, self.agent = hub, agent
        self.applet = "sftp"

    async def open(self, who: Principal, sandbox: str, request: StartProcess, *, lossless: bool = False) -> Client:  # type: ignore[override]
        self.engine.use(who, sandbox)
        return await self.hub.open(self.agent, request, lossless=lossless)

    async def sftp(self, who: Principal, sandbox: str, user: str | None) -> Client:
        self.engine.use(who, sandbox)
        request = StartProcess(argv=[self.applet], tag="files.sftp", user=user, cwd="~", stdin=True)
        return await self.hub.open(self.agent, request, lossless=True, builtin=True)


@dataclass
class Done:
    code: int
    out: bytes
    err: bytes


@dataclass
class SshHost:
    """Commands of this host, with the environment that finds the test's daemon and a key of the test's own."""

    server: Running
    hub: Hub
    env: dict[str, str]
    config: Path
    running: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def start(self, *words: str | Path, stdin: Any = asyncio.subprocess.PIPE) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*map(str, words), stdin=stdin, stdout=pipe, stderr=pipe, env=self.env)
        self.running.append(process)
        return process

    async def __call__(self, *words: str | Path, input: bytes = b"") -> Done:
        process = await self.start(*words)
        async with asyncio.timeout(60):
            out, err = await process.communicate(input)
        return Done(process.returncode or 0, out, err)

    async def ssh(self, *words: str | Path, input: bytes = b"") -> Done:
        return await self("ssh", "-F", self.config, *words, input=input)


@asynccontextmanager
async def ssh_host(directory: Path, short: Path, *, guarded: bool = True) -> AsyncIterator[SshHost]:
    path = short / "agent.sock"
    async with running_agent(path), running(directory, guarded=guarded, run_dir=short / "run") as server:
        agent = await connect(path, fresh=True, timeout=10)
        hub = Hub("web", lambda kind, **data: None, lambda number, started: None)
        server.engine.processes = HubProcesses(server.engine, hub, agent)
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "XDG_DATA_HOME": str(directory / "share"),
            "STOKER_RUN_DIR": str(server.settings.run_dir),
            "STOKER_DATA_DIR": str(server.settings.data_dir),
            "STOKER_CONFIG": "/nonexistent/stoker.toml",
            "LC_TEST": "from here",
            "OTHER": "must not get there",
        }
        host = SshHost(server, hub, env, directory / "ssh_config")
        try:
            yield host
        finally:
            for process in host.running:
                if process.returncode is None:
                    process.kill()
                await process.wait()
            await hub.close(GuestError("over", "the test is over"))
            await agent.aclose()


async def configured(host: SshHost, *names: str) -> None:
    """``stoker ssh-config`` into the file that the commands use."""
    done = await host(STOKER, "ssh-config", *names)
    assert done.code == 0, done
    host.config.write_bytes(done.out)
