"""Who starts, finds and reaches machines: what the engine asks of :mod:`.machines`, or of a test's own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stoker.api.models import Origin
from stoker.engine.state import Mounted, Record

if TYPE_CHECKING:
    from stoker.engine.boot import MachineRequest
    from stoker.engine.pools import MakeDisk
    from stoker.engine.wake import Identity, TakeMemory
    from stoker.guest.agent import Agent
    from stoker.guest.copies import Report
    from stoker.images.progress import Progress
    from stoker.vmm.driver import Machine

__all__ = ["Booted", "Booter"]


@dataclass(frozen=True, slots=True)
class Booted:
    """A machine that just came up, and what is worth remembering of it."""

    machine: Machine
    agent: Agent
    image_digest: str = ""
    image_path: str = ""
    kernel_path: str = ""
    kernel: str = ""
    disk: int = 0
    env: dict[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = ""
    command: tuple[str, ...] = ()
    accelerator: str = ""
    vmm: str = ""
    origin: Origin = Origin.BOOT
    base: str = ""
    """The digest of its memory's base, where a file of it is linked to ``MachineRequest.base_file``."""
    report: Report | None = None
    timings: dict[str, float] = field(default_factory=dict)
    held: ExitStack = field(default_factory=ExitStack)
    """What must not be removed until the sandbox's row names it."""

    def milliseconds(self) -> dict[str, float]:
        """The timings, and, of the guest's own clock, when the agent began and when it could be spoken to."""
        laps = {name: round(seconds * 1000, 3) for name, seconds in self.timings.items()}
        welcome = self.agent.welcome
        return {**laps, "agent_started": welcome.started_us / 1000, "agent_ready": welcome.ready_us / 1000}


class Booter(Protocol):
    """Who starts, finds and reaches machines; :class:`stoker.engine.machines.RealBooter` but in tests of failures."""

    @property
    def parks(self) -> bool:
        """Whether there is golden memory, out of which machines may be made for creates that are yet to come."""
        ...

    async def boot(
        self, request: MachineRequest, directory: Path, disk: MakeDisk, cgroup: Path | None, progress: Progress
    ) -> Booted: ...

    async def resume(
        self,
        request: MachineRequest,
        directory: Path,
        disk: MakeDisk,
        cgroup: Path | None,
        progress: Progress,
        memory: Path | TakeMemory,
        identity: Identity,
        ready: Callable[[Machine], Awaitable[None]],
    ) -> Booted:
        """Takes a machine up where it was put away, or copied. ``ready`` is awaited when it is whole and has not gone on yet."""
        ...

    async def still(self, record: Record) -> bool:
        """Whether a create of this record's request would stand on the same image and kernel as the record does."""
        ...

    async def adopt(self, directory: Path) -> Machine | None: ...

    async def connect(self, machine: Machine) -> Agent: ...

    async def helper(self, name: str, directory: Path, mounted: Mounted, file: Path) -> tuple[Machine, Agent]:
        """A small machine without a root, which ends with this process, with one volume mounted."""
        ...

    async def aclose(self) -> None:
        """Ends what it does in the background. Machines live on."""
        ...
