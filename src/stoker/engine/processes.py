"""The API's view of processes: finds the sandbox, its agent and its hub, and counts the use. See :class:`stoker.engine.hub.Hub`."""

from __future__ import annotations

from collections.abc import Sequence

from stoker.api.models import Principal, ProcessInfo, StartProcess
from stoker.engine.core import Box, Core, Live
from stoker.engine.feed import Client
from stoker.engine.output import Output
from stoker.guest.agent import Agent

__all__ = ["Attached", "Processes"]


class Attached:
    """A client of one process; while it is open, its sandbox is in use. Fits ``server.ports.Attachment``."""

    def __init__(self, core: Core, box: Box, client: Client) -> None:
        self._core, self._box, self._client = core, box, client
        self._open = True
        box.users += 1

    @property
    def info(self) -> ProcessInfo:
        return self._client.info

    @property
    def stdout(self) -> int:
        return self._client.stdout

    @property
    def stderr(self) -> int:
        return self._client.stderr

    async def read(self) -> Output | None:
        return await self._client.read()

    async def wait(self) -> ProcessInfo:
        return await self._client.wait()

    async def write(self, data: bytes) -> None:
        await self._core.awake(self._box)
        await self._client.write(data)

    async def close_stdin(self) -> None:
        await self._client.close_stdin()

    async def resize(self, rows: int, cols: int) -> None:
        await self._core.awake(self._box)
        await self._client.resize(rows, cols)

    async def signal(self, number: int, *, group: bool = True) -> None:
        await self._core.awake(self._box)
        await self._client.signal(number, group=group)

    async def aclose(self) -> None:
        if self._open:
            self._open = False
            self._box.users -= 1
            self._box.touch()
            self._core.alarm.set()
            await self._core.shielded(self._client.aclose())


class Processes:
    """Fits ``server.ports.Processes``."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def _reach(self, who: Principal, sandbox: str) -> tuple[Box, Live, Agent]:
        box = self._core.find(who, sandbox)
        live, agent = await self._core.agent(box)
        return box, live, agent

    async def start(self, who: Principal, sandbox: str, request: StartProcess) -> ProcessInfo:
        _, live, agent = await self._reach(who, sandbox)
        return await self._core.shielded(live.hub.start(agent, request))

    async def open(self, who: Principal, sandbox: str, request: StartProcess, *, lossless: bool = False) -> Attached:
        box, live, agent = await self._reach(who, sandbox)
        return Attached(self._core, box, await live.hub.open(agent, request, lossless=lossless))

    async def sftp(self, who: Principal, sandbox: str, user: str | None) -> Attached:
        """The agent's own server of sftp, from the user's home on."""
        box, live, agent = await self._reach(who, sandbox)
        request = StartProcess(argv=["sftp"], tag="files.sftp", user=user, cwd="~", stdin=True)
        return Attached(self._core, box, await live.hub.open(agent, request, lossless=True, builtin=True))

    async def attach(
        self, who: Principal, sandbox: str, process: int | str, stdout: int | None, stderr: int | None, *, lossless: bool = False
    ) -> Attached:
        box, live, _ = await self._reach(who, sandbox)
        return Attached(self._core, box, await live.hub.attach(process, stdout, stderr, lossless=lossless))

    async def list(self, who: Principal, sandbox: str, *, tag: str | None = None) -> Sequence[ProcessInfo]:
        _, live, agent = await self._reach(who, sandbox)
        return await live.hub.list(agent, tag)

    async def get(self, who: Principal, sandbox: str, process: int | str) -> ProcessInfo:
        _, live, agent = await self._reach(who, sandbox)
        return await live.hub.get(agent, process)

    async def signal(self, who: Principal, sandbox: str, process: int | str, number: int, *, group: bool) -> None:
        _, live, _ = await self._reach(who, sandbox)
        await live.hub.signal(process, number, group=group)

    async def write_stdin(self, who: Principal, sandbox: str, process: int | str, data: bytes, *, close: bool) -> None:
        _, live, _ = await self._reach(who, sandbox)
        await live.hub.write(process, data, close=close)

    async def resize(self, who: Principal, sandbox: str, process: int | str, rows: int, cols: int) -> None:
        _, live, _ = await self._reach(who, sandbox)
        await live.hub.resize(process, rows, cols)

    async def forget(self, who: Principal, sandbox: str, process: int | str) -> None:
        _, live, _ = await self._reach(who, sandbox)
        live.hub.forget(process)
