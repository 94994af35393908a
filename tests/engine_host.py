"""A booter without guests: the real agent as an ordinary program of this host plays the machine. For failures and many cycles.

Its machine is a process that outlives the one that started it, is found again by ``machine.json`` in its directory, can be killed
and frozen (SIGSTOP), and whose agent speaks the real protocol. What a test wants to go wrong is said in :class:`Faults`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guest_host import children
from stoker.engine.booter import Booted
from stoker.engine.pools import MakeDisk
from stoker.engine.trace import trace
from stoker.errors import GuestError
from stoker.guest.agent import Agent
from stoker.guest.channel import connect
from stoker.host.binaries import agent_path
from stoker.host.process import ProcessIdentity, boot_id, wait_pidfd
from stoker.storage.strategy import Base
from stoker.vmm.machine import MachineExit


@dataclass
class Faults:
    """What goes wrong. ``before`` and ``after`` are awaited before and after the process is started."""

    before: Callable[[], Awaitable[None]] | None = None
    after: Callable[[], Awaitable[None]] | None = None
    boots: int = 0
    peak: int = 0
    running: int = 0
    order: list[str] = field(default_factory=list)


class HostMachine:
    """Fits ``stoker.vmm.driver.Machine``."""

    def __init__(self, directory: Path, vmm: ProcessIdentity, process: asyncio.subprocess.Process | None = None) -> None:
        self.spec_name = directory.name
        self.directory = directory
        self.vmm = vmm
        self.requested = False
        self._process = process
        self._pidfd: int | None = vmm.open_pidfd()

    def channel(self) -> Path:
        return self.directory / "agent.sock"

    async def wait(self) -> MachineExit:
        assert self._pidfd is not None
        await wait_pidfd(self._pidfd)
        return MachineExit(None, 9, self.requested)

    async def console_tail(self, lines: int = 20) -> tuple[str, ...]:
        return ("the last line of its console",)

    async def vmm_tail(self, lines: int = 20) -> tuple[str, ...]:
        return ()

    async def freeze(self) -> None:
        os.kill(self.vmm.pid, signal.SIGSTOP)

    async def thaw(self) -> None:
        os.kill(self.vmm.pid, signal.SIGCONT)

    async def capture(self, scratch: Any, **_: Any) -> Any:
        """A process of this host has no memory that could be put away."""
        raise GuestError("memory_unknown", "there are no guests here")

    def made_by(self) -> dict[str, Any]:
        return {}

    def memory(self) -> int:
        raise GuestError("memory_unknown", "there are no guests here")

    async def flatten_disk(self, index: int, name: str) -> None:
        """An agent on the host has no disk of its own."""

    async def resize_disk(self, index: int, size: int) -> None:
        """An agent on the host has no disk of its own."""

    async def status(self) -> str:
        state = Path(f"/proc/{self.vmm.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "paused" if state == "T" else "running"

    async def kill(self) -> MachineExit:
        self.requested = True
        if self._pidfd is None:
            return MachineExit(None, 9, True)
        try:
            # A real machine takes what ran in it along; each process of this one has a session of its own.
            for pid in children(self.vmm.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.killpg(self.vmm.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        exit = await self.wait()
        if self._process is not None:
            await self._process.wait()
        return exit

    async def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


class HostBooter:
    """Fits ``stoker.engine.booter.Booter``."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()

    async def boot(self, request: Any, directory: Path, disk: MakeDisk, cgroup: Path | None, progress: Any) -> Booted:
        faults = self.faults
        faults.boots += 1
        faults.running += 1
        faults.peak = max(faults.peak, faults.running)
        faults.order.append(request.name)
        progress.step("booting", None, None)
        try:
            if faults.before is not None:
                await faults.before()
            return await self._start(request, directory, disk)
        finally:
            faults.running -= 1

    parks = False

    async def still(self, record: Any) -> bool:
        return True

    async def _start(self, request: Any, directory: Path, disk: MakeDisk) -> Booted:
        base = directory.parent.parent / "base.img"
        if not base.exists():
            base.write_bytes(b"base" * (256 << 10))
        await disk(Base(base, 1 << 20), 0)
        trace("boot.after_clone")
        console = os.open(directory / "console.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(console, f"boot of {request.name}\n".encode())
        process = await asyncio.create_subprocess_exec(
            agent_path(),
            "--socket",
            directory / "agent.sock",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
        os.close(console)
        identity = ProcessIdentity.of(process.pid)
        record = {"pid": identity.pid, "start": identity.start}
        # The shape of the shim's own record, so that the engine's release finds the process.
        (directory / "shim.json").write_text(json.dumps({"boot": boot_id(), "shim": record, "vmm": record}))
        machine = HostMachine(directory, identity, process)
        try:
            trace("boot.after_launch")
            if self.faults.after is not None:
                await self.faults.after()
            agent = await self._first_word(machine, process)
            trace("boot.after_hello")
            trace("boot.after_configure")
        except BaseException:
            await machine.kill()
            await machine.close()
            raise
        return Booted(
            machine,
            agent,
            "sha256:image",
            "/nowhere",
            "",
            "host",
            max(request.disk, 1 << 20),
            dict(request.env),
            "root",
            "/",
            ("true",),
        )

    async def _first_word(self, machine: HostMachine, process: asyncio.subprocess.Process) -> Agent:
        while True:
            if process.returncode is not None:
                raise GuestError("machine_died", "the agent ended at once")
            try:
                return await connect(machine.channel(), fresh=True, timeout=10)
            except GuestError:
                # Its socket is not there yet, or is bound and does not listen yet.
                await asyncio.sleep(0.005)

    async def helper(self, name: str, directory: Path, mounted: Any, file: Path) -> Any:
        raise GuestError("no_guest", "there are no guests here")

    async def adopt(self, directory: Path) -> HostMachine | None:
        try:
            record = json.loads((directory / "shim.json").read_text())["vmm"]
            return HostMachine(directory, ProcessIdentity(record["pid"], record["start"]))
        except (FileNotFoundError, ProcessLookupError):
            return None

    async def aclose(self) -> None:
        pass

    async def connect(self, machine: HostMachine) -> Agent:
        return await connect(machine.channel(), fresh=False, timeout=5)
