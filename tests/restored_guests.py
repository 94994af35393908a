"""Machines over one memory, at the floor of the driver: a base from a boot of its own, and machines restored from it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from stoker.engine.boot import MachineRequest, configuration
from stoker.engine.golden import SETTLE
from stoker.errors import HostError
from stoker.guest.agent import Agent
from stoker.guest.channel import connect
from stoker.guest.copies import BeforeSnapshot
from stoker.guest.messages import ExecRequest, Preparation
from stoker.host.binaries import agent_path
from stoker.images.initramfs import build_initramfs
from stoker.images.kernel import resolve_kernel
from stoker.images.progress import NullProgress
from stoker.images.rootfs import RootFilesystem, resolve_image
from stoker.settings import Settings
from stoker.storage.overlay import create_overlay
from stoker.vmm.accel import verdict
from stoker.vmm.machine import Disk, GuestMemory, MachineSpec, UserNetwork
from stoker.vmm.memory import Delta, new_memory, sealed
from stoker.vmm.qemu.driver import QemuMachine, launch

MIB = 1 << 20
MEMORY = 256 * MIB
REQUEST = MachineRequest(name="box", image="debian:12", memory=MEMORY, network="none")


@dataclass(frozen=True)
class Base:
    """Memory and devices of a machine that was told nothing yet, and what it was made from."""

    spec: MachineSpec
    rootfs: RootFilesystem
    settings: Settings
    memory: int
    state: bytes
    disk: bytes

    def own(self, name: str) -> MachineSpec:
        directory = self.spec.directory.parent / name
        directory.mkdir(mode=0o700)
        disk = directory / "root.qcow2"
        disk.write_bytes(self.disk)
        disks = (replace(self.spec.disks[0], path=disk),)
        return replace(self.spec, name=name, directory=directory, disks=disks, guest_memory=GuestMemory(self.memory), restore=True)

    def disk_of(self, machine: QemuMachine) -> bytes:
        """What a machine has written by now; it must be stopped."""
        return (machine.directory / "root.qcow2").read_bytes()

    @asynccontextmanager
    async def restored(self, name: str, delta: Delta | None = None, state: bytes = b"") -> AsyncIterator[tuple[QemuMachine, Agent]]:
        async with started(self.own(name), self.settings) as machine:
            await machine.restore(self.memory, delta, state or self.state)
            await machine.thaw()
            # A copy of a machine that spoke has a conversation to go on with, one of the base has none.
            async with await connect(machine.channel(), fresh=delta is None, timeout=60) as agent:
                if delta is None:
                    await agent.configure(configuration(REQUEST, self.rootfs, self.spec.network))
                yield machine, agent


@asynccontextmanager
async def started(spec: MachineSpec, settings: Settings) -> AsyncIterator[QemuMachine]:
    machine = await launch(spec, settings)
    try:
        yield machine
    finally:
        await machine.kill()
        await machine.close()


@asynccontextmanager
async def made_base(
    settings: Settings, short_dir: Path, network: UserNetwork | None = None, size: int = MEMORY, cpus: int = 2
) -> AsyncIterator[Base]:
    """A base of Debian, with this network so many bytes of memory and CPUs."""
    kernel = await resolve_kernel("debian:12", settings, NullProgress())
    rootfs = await resolve_image("debian:12", settings, NullProgress())
    initrd = await build_initramfs(kernel, agent_path(), settings, network=network is not None)
    accel = await verdict(settings, kernel.vmlinux, initrd)
    directory = short_dir / "base"
    directory.mkdir(mode=0o700)
    memory = new_memory("base", size)
    spec = MachineSpec(
        name="base",
        directory=directory,
        kernel=kernel.vmlinux,
        initrd=initrd,
        cmdline=(),
        cpus=cpus,
        memory=size,
        disks=(Disk(name="root", path=directory / "root.qcow2", format="qcow2", backing=(rootfs.path,)),),
        network=network,
        accelerator=accel.accelerator,
        cpu=accel.cpu,
        guest_memory=GuestMemory(memory, shared=True),
    )
    create_overlay(directory / "root.qcow2", rootfs.path, rootfs.size)
    async with started(spec, settings) as machine:
        async with await connect(machine.channel(), fresh=True, timeout=120) as agent:
            words = configuration(REQUEST, rootfs, network)
            await agent.prepare(Preparation(root=words.root, network=words.network or False))
            await agent.before_snapshot(BeforeSnapshot(hooks=False))
            await agent.run(ExecRequest(["/bin/true"]))
            await asyncio.sleep(SETTLE)
            try:
                sealed(memory)
            except HostError:
                pass
            else:
                raise AssertionError("memory that is still being written was sealed")
        await machine.freeze()
        state = await machine.device_state()
    try:
        yield Base(spec, rootfs, settings, sealed(memory), state, (directory / "root.qcow2").read_bytes())
    finally:
        os.close(memory)


async def said(agent: Agent, script: str) -> str:
    done = await agent.run(ExecRequest(["sh", "-c", script]))
    assert done.status.code == 0, done.stderr
    return done.stdout.decode()
