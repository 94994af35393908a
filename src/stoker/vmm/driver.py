"""What every driver gives: one running machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stoker.host.process import ProcessIdentity
from stoker.vmm.machine import MachineExit
from stoker.vmm.memory import Delta, Scratch

__all__ = ["Captured", "Machine", "NextDisk"]


@dataclass(frozen=True, slots=True)
class NextDisk:
    """What a disk goes on in: an empty overlay for the disk at ``index`` of the specification. What it wrote so far lies below."""

    index: int
    path: Path


@dataclass(frozen=True, slots=True)
class Captured:
    """A machine at one moment: what its memory differs from its base in, and its devices. ``steps``: seconds each part took;
    ``stopped`` among them: how long its vCPUs stood."""

    delta: Delta
    state: bytes
    steps: dict[str, float] = field(default_factory=dict)


class Machine(Protocol):
    """One running VMM. Errors: :class:`~stoker.errors.GuestError` when the machine is gone or does not answer."""

    @property
    def spec_name(self) -> str: ...
    @property
    def directory(self) -> Path: ...
    @property
    def vmm(self) -> ProcessIdentity: ...

    def channel(self) -> Path:
        """The Unix socket behind which the agent's port is. It listens from before the VMM starts."""
        ...

    async def wait(self) -> MachineExit:
        """How the VMM ended; returns once it has, also for adopted machines, and any number may wait."""
        ...

    async def console_tail(self, lines: int = 20) -> tuple[str, ...]:
        """The last lines of the guest's console, cleaned of control characters."""
        ...

    async def vmm_tail(self, lines: int = 20) -> tuple[str, ...]:
        """The last lines the VMM itself said."""
        ...

    async def freeze(self) -> None:
        """Stops the vCPUs."""
        ...

    async def thaw(self) -> None: ...

    def made_by(self) -> dict[str, Any]:
        """What has to be the same for its memory and devices to be taken up (:func:`stoker.vmm.saved.portable`)."""
        ...

    def memory(self) -> int:
        """The base that its memory is a private view of, as a descriptor, which the caller closes. :class:`HostError`
        ``memory_unknown``: it was started without one."""
        ...

    def tap(self) -> int | None:
        """A copy of its descriptor of the TAP it was given, which the caller closes; None: it was given none."""
        ...

    async def capture(self, scratch: Scratch, *, disks: Sequence[NextDisk] = (), go_on: bool, zeros: bool = False) -> Captured:
        """Stops the vCPUs and takes memory and devices; the disks are switched at the same moment. With ``go_on`` the guest goes on
        when it ran before; a failure lets it go on in any case. The content is in ``scratch``.
        ``zeros``: see :func:`stoker.vmm.memory.capture`."""
        ...

    async def flatten_disk(self, index: int, name: str) -> None:
        """Copies what lies in the layers of a disk into its own overlay, so that it stands on its base alone; the guest goes on
        meanwhile, and is slower. Returns when it is done. ``name`` is what the overlay's header calls the base from then on."""
        ...

    async def resize_disk(self, index: int, size: int) -> None:
        """The disk at this place in the specification has so many bytes from now on; the guest is told. Never fewer."""
        ...

    async def status(self) -> str:
        """The VMM's own word: ``running``, ``paused``..."""
        ...

    async def kill(self) -> MachineExit:
        """SIGKILL, and returns when it is gone. May be called again. Removes nothing on disk."""
        ...

    async def close(self) -> None:
        """Lets go of the descriptors. A detached machine lives on, an attached one ends."""
        ...
