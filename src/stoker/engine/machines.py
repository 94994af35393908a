"""The real machines: booted by :func:`stoker.engine.boot.boot`, found and reached again after a restart."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stoker.api.models import Origin
from stoker.engine.bases import Bases
from stoker.engine.booter import Booted
from stoker.engine.state import Attached, Mounted, Record

if TYPE_CHECKING:
    from stoker.engine.boot import LiveMachine, MachineRequest
    from stoker.engine.golden import Goldens
    from stoker.engine.pools import MakeDisk
    from stoker.engine.wake import Identity, TakeMemory
    from stoker.guest.agent import Agent
    from stoker.images.progress import Progress
    from stoker.settings import Settings
    from stoker.vmm.driver import Machine
    from stoker.vmm.qemu.facts import QemuFacts

__all__ = ["RealBooter"]

CONNECT: Final = 5.0
"""Seconds for one attempt to reach an agent that has answered before."""


class RealBooter:
    """See :class:`stoker.engine.booter.Booter`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._goldens: Goldens | None = None
        self._bases = Bases(self._golden_base)

    def _golden_base(self, digest: str) -> int | None:
        return self._goldens.by_digest(digest) if self._goldens is not None else None

    @property
    def parks(self) -> bool:
        return bool(self._settings.golden)

    async def boot(
        self, request: MachineRequest, directory: Path, disk: MakeDisk, cgroup: Path | None, progress: Progress
    ) -> Booted:
        from stoker.engine.boot import boot
        from stoker.engine.golden import Goldens
        from stoker.vmm.qemu.facts import qemu_facts

        if self._goldens is None and self._settings.golden:
            self._goldens = Goldens(self._settings)
        live = await boot(
            request,
            self._settings,
            directory,
            disk,
            detached=True,
            progress=progress,
            cgroup=cgroup,
            goldens=self._goldens,
        )
        facts = await qemu_facts(self._settings)
        self._zygote(facts)
        return _booted(live, facts, Origin.GOLDEN if live.golden else Origin.BOOT)

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
        from stoker.engine.wake import kept_memory, wake
        from stoker.vmm.qemu.facts import qemu_facts

        take = kept_memory(memory, self._bases, alone=not identity.copy) if isinstance(memory, Path) else memory
        live = await wake(request, self._settings, directory, disk, take, identity, ready=ready, progress=progress, cgroup=cgroup)
        origin = Origin.BOOT if not identity.copy else Origin.SNAPSHOT if isinstance(memory, Path) else Origin.FORK
        facts = await qemu_facts(self._settings)
        self._zygote(facts)
        return _booted(live, facts, identity.origin or origin)

    async def helper(self, name: str, directory: Path, mounted: Mounted, file: Path) -> tuple[Machine, Agent]:
        from stoker.engine.boot import boot_helper
        from stoker.engine.helper import MEMORY

        disk = Attached(mounted.id, file, mounted.path, read_only=mounted.read_only)
        return await boot_helper(name, self._settings, directory, disk, MEMORY)

    def _zygote(self, facts: QemuFacts) -> None:
        """The next VMM begins from one."""
        from stoker.vmm.zygote import want_zygote

        if self._settings.zygote:
            want_zygote(self._settings.run_dir, facts.path)

    async def aclose(self) -> None:
        from stoker.vmm.zygote import end_zygote

        await end_zygote(self._settings.run_dir)
        self._bases.close()
        if self._goldens is not None:
            await self._goldens.aclose()

    async def still(self, record: Record) -> bool:
        from stoker.images.inventory import held_image, held_kernel
        from stoker.images.progress import NullProgress

        request, settings = record.request, self._settings
        with ExitStack() as held:
            image = await held_image(request.image, settings, NullProgress(), held)
            kernel = await held_kernel(request.kernel or settings.default_kernel, settings, NullProgress(), held)
        return (image.digest, kernel.digest) == (record.image_digest, record.kernel_path)

    async def adopt(self, directory: Path) -> Machine | None:
        from stoker.vmm.qemu.driver import adopt

        return await adopt(directory)

    async def connect(self, machine: Machine) -> Agent:
        from stoker.guest.channel import connect

        return await connect(machine.channel(), fresh=False, timeout=CONNECT)


def _booted(live: LiveMachine, facts: QemuFacts, origin: Origin) -> Booted:
    return Booted(
        machine=live.machine,
        agent=live.agent,
        image_digest=live.rootfs.digest,
        image_path=str(live.rootfs.path),
        kernel_path=live.kernel.digest,
        kernel=live.kernel.name,
        disk=live.disk.size,
        env={**dict(live.rootfs.env), **dict(live.request.env)},
        user=live.request.user or live.rootfs.user or "root",
        workdir=live.request.workdir or live.rootfs.workdir or "/",
        command=live.rootfs.command,
        accelerator=live.accelerator,
        vmm="qemu " + ".".join(map(str, facts.version)),
        origin=origin,
        base=live.base,
        report=live.report,
        timings=live.timings,
        held=live.held,
    )
