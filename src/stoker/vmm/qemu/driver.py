"""Starting QEMU, and finding it again after a restart.

Beside the shim's files (``stoker.vmm.shim``) a machine's directory holds ``qmp.sock`` and ``agent.sock``, bound by us before QEMU
starts, so whoever connects waits for an answer and never for a name, and ``machine.json`` (its name). The directory's owner
removes them all with it.

As root the VMM runs under a user and group number of its own, which own nothing: disks, kernel and sockets are descriptors.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stoker.errors import Conflict, GuestError, HostError
from stoker.host.binaries import shim_path
from stoker.host.process import ProcessIdentity, descriptor_of, send_signal, wait_pidfd
from stoker.settings import Settings
from stoker.vmm import shim
from stoker.vmm.console import tail
from stoker.vmm.driver import Captured, NextDisk
from stoker.vmm.elf import check_memory
from stoker.vmm.machine import MachineExit, MachineSpec, TapNetwork
from stoker.vmm.memory import Delta, Scratch, inject
from stoker.vmm.qemu.capture import capture_machine, device_state, stream, top_nodes
from stoker.vmm.qemu.command import command
from stoker.vmm.qemu.facts import qemu_facts
from stoker.vmm.qemu.handles import open_handles
from stoker.vmm.qemu.qmp import Qmp
from stoker.vmm.saved import portable
from stoker.vmm.zygote import find_zygote

__all__ = ["QemuMachine", "adopt", "launch"]

STALE = ("shim.json", "exit.json", "console.log", "console.log.1", "vmm.log", "vmm.log.1", "qmp.sock", "agent.sock", "net.deny")
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


Mapped = tuple[tuple[int, int], list[int]]
"""The number of the VMM's descriptor of its memory's base and the memory's size; which file that is (device, inode, kind)."""


class QemuMachine:
    """A running QEMU (:class:`stoker.vmm.driver.Machine`)."""

    def __init__(
        self,
        name: str,
        directory: Path,
        pair: shim.Supervised,
        owner: int | None = None,
        state: int | None = None,
        *,
        child: bool,
        memory: Mapped | None = None,
    ) -> None:
        self.spec_name = name
        self.directory = directory
        self.vmm: ProcessIdentity = pair.vmm
        self._memory: tuple[int, int] | None = memory[0] if memory else None
        self._base: list[int] = memory[1] if memory else []
        self._owner = owner
        self._state = state
        self._exit: MachineExit | None = None
        self._requested = False
        self._qmp: Qmp | None = None
        self._qmp_lock = asyncio.Lock()
        self._shim_pid = pair.shim.pid
        # A child of ours that ended is there to be opened until it is waited for, so a shim may have ended by now, and its VMM too.
        with ExitStack() as undo:
            if pair.descriptor is not None:
                self._shim_fd = pair.descriptor
            else:
                self._shim_fd = os.pidfd_open(pair.shim.pid) if child else pair.shim.open_pidfd()
            undo.callback(os.close, self._shim_fd)
            try:
                self._vmm_fd: int | None = pair.vmm.open_pidfd()
            except ProcessLookupError:
                self._vmm_fd = None
            undo.pop_all()
        self._closed = False

    def channel(self) -> Path:
        return self.directory / "agent.sock"

    async def wait(self) -> MachineExit:
        if self._exit is None:
            self._check_open()
            # The shim ends after it has written how the VMM did; if it was killed, its end takes the VMM along.
            waits = [wait_pidfd(fd) for fd in (self._shim_fd, self._vmm_fd) if fd is not None]
            await asyncio.gather(*waits)
            self._reap()
            if self._exit is None:
                self._exit = shim.exit_of(shim.read_exit(self.directory), self._requested)
        return self._exit

    def _reap(self) -> None:
        try:
            os.waitpid(self._shim_pid, os.WNOHANG)
        except ChildProcessError:
            pass  # adopted: not our child; or waited for already

    async def console_tail(self, lines: int = 20) -> tuple[str, ...]:
        return await asyncio.to_thread(tail, self.directory / "console.log", lines)

    async def vmm_tail(self, lines: int = 20) -> tuple[str, ...]:
        said = await asyncio.to_thread(tail, self.directory / "vmm.log", lines)
        # QEMU would like to enlarge the file its memory is a view of, and has no need to.
        return tuple(line for line in said if line != "ftruncate: Invalid argument")

    async def qmp(self) -> Qmp:
        """The monitor, connected when it is first wanted."""
        self._check_open()
        async with self._qmp_lock:
            if self._qmp is None or self._qmp.broken:
                self._qmp = await Qmp.connect(self.directory / "qmp.sock", self.spec_name)
            return self._qmp

    async def freeze(self) -> None:
        await (await self.qmp()).execute("stop")

    async def thaw(self) -> None:
        await (await self.qmp()).execute("cont")

    async def flatten_disk(self, index: int, name: str) -> None:
        await stream(await self.qmp(), index, name)

    async def resize_disk(self, index: int, size: int) -> None:
        qmp = await self.qmp()
        await qmp.execute("block_resize", node_name=(await top_nodes(qmp))[index], size=size)

    async def status(self) -> str:
        answer = await (await self.qmp()).execute("query-status")
        return str(answer.get("status", "")) if isinstance(answer, dict) else ""

    async def device_state(self) -> bytes:
        """Everything of the machine but its memory and its disks, some KiB. Its vCPUs must be stopped; it goes on as it was."""
        return await device_state(await self.qmp())

    def made_by(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "machine.json").read_bytes()).get("made_by", {}))

    def memory(self) -> int:
        if self._memory is None:
            raise HostError(
                "memory_unknown",
                f"machine {self.spec_name} was started by an older Stoker: its memory cannot be taken",
                f"stoker stop {self.spec_name} and start it again",
            )
        number, size = self._memory
        # What is behind the number is the VMM's word; nothing that it opened itself is taken for a base.
        fd = os.open(f"/proc/{self.vmm.pid}/fd/{number}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        status = os.fstat(fd)
        if [status.st_dev, status.st_ino, status.st_rdev] != self._base or (
            stat.S_ISREG(status.st_mode) and status.st_size != size
        ):
            os.close(fd)
            raise GuestError("memory_unknown", f"machine {self.spec_name} does not have the memory it was started from any more")
        return fd

    def tap(self) -> int | None:
        number = json.loads((self.directory / "machine.json").read_bytes()).get("tap")
        if number is None or self._vmm_fd is None:
            return None
        try:
            return descriptor_of(self._vmm_fd, int(number))
        except OSError as error:
            raise HostError("tap_unknown", f"the TAP of {self.spec_name} cannot be had: {error.strerror}") from None

    async def capture(self, scratch: Scratch, *, disks: Sequence[NextDisk] = (), go_on: bool, zeros: bool = False) -> Captured:
        base = self.memory()
        try:
            assert self._memory is not None
            qmp, (_, size) = await self.qmp(), self._memory
            return await capture_machine(qmp, self.vmm.pid, base, size, scratch, disks, go_on=go_on, zeros=zeros)
        finally:
            os.close(base)

    async def restore(self, base: int, delta: Delta | None, state: bytes, *, timeout: float = 10.0) -> None:
        """Becomes the machine that ``delta`` (over ``base``) and ``state`` were taken of, with its vCPUs still stopped.

        The machine was launched with ``restore``; this works once.
        """
        pipe, self._state = self._state, None
        if pipe is None:
            raise GuestError("machine_started", f"machine {self.spec_name} does not wait to be restored")
        try:
            # It answers when its devices are made, and so its memory is mapped.
            if await self.status() != "inmigrate":
                raise GuestError("machine_started", f"machine {self.spec_name} does not wait to be restored")
            # Memory first: loading a virtio device reads its rings from there.
            if delta is not None:
                await asyncio.to_thread(inject, self.vmm.pid, base, delta)
            await asyncio.to_thread(_write_all, pipe, state)
        finally:
            os.close(pipe)
        async with asyncio.timeout(timeout):
            while await self.status() == "inmigrate":  # noqa: ASYNC110 - the monitor tells it to who asks
                await asyncio.sleep(0.0005)

    async def kill(self) -> MachineExit:
        if self._exit is None:
            self._check_open()
            self._requested = True
            send_signal(self._shim_fd, 15)  # so that exit.json says it was asked for
            if self._vmm_fd is not None:
                send_signal(self._vmm_fd, 9)
        return await self.wait()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for fd in (self._shim_fd, self._vmm_fd, self._owner, self._state):
            if fd is not None:
                os.close(fd)
        qmp, self._qmp = self._qmp, None
        if qmp is not None:
            await qmp.close()

    def _check_open(self) -> None:
        if self._closed:
            raise GuestError("machine_closed", f"machine {self.spec_name} has been let go of")


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _mapped(spec: MachineSpec) -> Mapped | None:
    if spec.guest_memory is None or spec.guest_memory.shared:
        return None
    status = os.fstat(spec.guest_memory.fd)
    return (spec.guest_memory.fd, spec.memory), [status.st_dev, status.st_ino, status.st_rdev]


async def launch(spec: MachineSpec, settings: Settings) -> QemuMachine:
    """Starts the machine and returns when QEMU's program runs; its devices and the guest come up after that.

    What QEMU then finds wrong ends it: ``wait`` tells, and :func:`stoker.vmm.diagnosis.diagnose` puts it into words.
    """
    qemu = await qemu_facts(settings)
    check_memory(spec.kernel, spec.initrd, spec.memory)
    directory = spec.directory
    if shim.find(directory) is not None:
        raise Conflict("machine_running", f"a machine runs in {directory} already")
    for name in STALE:
        (directory / name).unlink(missing_ok=True)
    with ExitStack() as keep:
        with ExitStack() as close:
            opened = open_handles(spec, close, keep)
            argv = command(spec, qemu, opened.handles)
            memory = _mapped(spec)
            tap = spec.network.tap if isinstance(spec.network, TapNetwork) else None
            record = {"name": spec.name, "memory": memory, "tap": tap, "made_by": portable(spec, qemu)}
            (directory / "machine.json").write_text(json.dumps(record))
            pair = await shim.start(shim_path(), opened.options, argv, ENVIRONMENT, find_zygote(settings.run_dir, qemu.path))
        machine = QemuMachine(spec.name, directory, pair, opened.owner, opened.state, child=True, memory=memory)
        keep.pop_all()
        return machine


async def adopt(directory: Path) -> QemuMachine | None:
    """The machine that runs in this directory, after a restart of ours. ``None`` when its VMM is gone; ``exit.json`` may say how
    (:func:`stoker.vmm.shim.read_exit`)."""
    pair = shim.find(directory)
    if pair is None:
        return None
    try:
        record = json.loads((directory / "machine.json").read_bytes())
        memory: Mapped | None = None
        if (found := record.get("memory")) is not None:
            ((number, size), base) = found
            memory = ((int(number), int(size)), [int(part) for part in base])
        return QemuMachine(str(record["name"]), directory, pair, child=False, memory=memory)
    except ProcessLookupError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise HostError("machine_unreadable", f"{directory}/machine.json: {e}") from None
