"""From a request to a running machine that answers: the one place where images, storage, network, vmm and guest meet.

What a boot makes is a process (the shim and its VMM) and the files in the machine's ``directory`` (sockets, logs, records); its
disk is made by the caller's ``disk``. A failed boot ends the process; the caller owns files and disk and removes them.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from stoker.engine.golden import Shape
from stoker.engine.networks import USUAL, Wire
from stoker.engine.start import Started, Watch, explained, start
from stoker.engine.state import Attached
from stoker.engine.trace import trace
from stoker.errors import InvalidRequest
from stoker.guest.copies import booted_copy
from stoker.guest.messages import Configuration, Mount, NetworkConfiguration, Resolver, RootMount
from stoker.host.binaries import agent_path
from stoker.images.initramfs import build_initramfs
from stoker.images.inventory import held_image, held_kernel
from stoker.images.progress import NullProgress, Progress
from stoker.storage.overlay import create_overlay
from stoker.storage.strategy import Base
from stoker.vmm.accel import verdict
from stoker.vmm.machine import Disk, Gate, MachineSpec, TapNetwork, UserNetwork

if TYPE_CHECKING:
    from stoker.engine.golden import Goldens
    from stoker.engine.pools import MakeDisk
    from stoker.guest.agent import Agent, MakeKeys
    from stoker.guest.copies import Report
    from stoker.guest.messages import Text
    from stoker.images.kernel import Kernel
    from stoker.images.rootfs import RootFilesystem
    from stoker.settings import Settings
    from stoker.storage.strategy import Clone
    from stoker.vmm.driver import Machine

__all__ = ["LiveMachine", "MachineRequest", "Plan", "boot", "boot_helper", "plan"]

MIB = 1 << 20
DEFAULT_MEMORY = 512 * MIB
MINIMUM_MEMORY = 48 * MIB
"""Below this a distribution kernel does not get as far as saying so."""
EXT4 = "noinit_itable,discard,no_prefetch_block_bitmaps"
"""Else the guest's kernel works in the background: it writes zeros over every unused inode table, all of it into the clone, and
reads every block bitmap. What the guest deletes is given back to the host. An older kernel is spared the last option."""
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class MachineRequest:
    """What to boot. Sizes are bytes; 0 or "" means the default (the image's own, where it has one)."""

    name: str
    image: str
    kernel: str = ""
    initrd: Path | None = None
    cpus: int = 1
    memory: int = DEFAULT_MEMORY
    disk: int = 0
    network: str = "user"
    wire: Wire | None = None
    """Its end of the slot it has, with the network ``nat``."""
    joined: tuple[Wire, ...] = ()
    """Those of its further interfaces."""
    hostname: str = ""
    env: tuple[tuple[str, str], ...] = ()
    user: str = ""
    workdir: str = ""
    cold: bool = False
    """Always boot; never start from memory that was put away. (There is nothing else yet.)"""
    gate: Gate | None = None
    """See :class:`stoker.vmm.machine.MachineSpec`. A machine with one writes to the host's journal."""
    golden_only: bool = False
    """Fails with ``no_golden`` where it would boot."""
    init: str = "agent"
    """``agent``: ours is process 1; ``image``: the image's own ``/sbin/init`` is, and the agent stays beside it."""
    attached: tuple[Attached, ...] = ()
    base_file: Path | None = None
    """Where a file of its memory's base gets another name, if there is one."""
    keys: MakeKeys | None = None
    """Of a machine whose memory or disk is another's: ids and ssh host keys are not left as they are there."""


@dataclass(slots=True)
class LiveMachine:
    """A machine that answers. ``timings`` are seconds: ``images``, ``accel``, ``clone``, ``vmm``, ``guest``, ``configure``."""

    request: MachineRequest
    machine: Machine
    agent: Agent
    rootfs: RootFilesystem
    kernel: Kernel
    disk: Clone
    timings: dict[str, float] = field(default_factory=dict)
    accelerator: str = ""
    golden: bool = False
    base: str = ""
    """The digest of what ``base_file`` is a name of."""
    report: Report | None = None
    """What became of what would make it a twin, where its memory or disk is another's."""
    held: ExitStack = field(default_factory=ExitStack)
    """Keeps its image and kernel from being removed until it is closed: by then a row names them, or the machine is gone."""

    async def end(self) -> None:
        """Ends the machine at once. What it wrote is not waited for: its disk is thrown away."""
        await self.agent.aclose()
        await self.machine.kill()
        await self.machine.close()
        self.held.close()


def check(request: MachineRequest) -> None:
    """Refuses what can never work, before anything is made."""
    if not 1 <= request.cpus <= 64:
        raise InvalidRequest("bad_cpus", f"a machine has 1 to 64 CPUs, not {request.cpus}", "--cpus 1")
    if request.memory < MINIMUM_MEMORY:
        raise InvalidRequest(
            "memory_too_small",
            f"{request.memory // MIB} MiB of memory cannot hold a Linux kernel and its first files",
            f"--memory {MINIMUM_MEMORY // MIB}M is the least, 128M the least for a distribution kernel",
        )
    if request.memory % MIB:
        raise InvalidRequest("bad_memory", f"memory is whole MiB, not {request.memory} bytes", "--memory 512M")
    wired = request.network in ("nat", "bridge")
    if request.network not in ("none", "user", "nat", "bridge") or wired != (request.wire is not None):
        raise InvalidRequest("bad_network", f"there is no network {request.network!r}", "--network none, user, nat or bridge:NAME")
    if request.init not in ("agent", "image"):
        raise InvalidRequest("bad_init", f"process 1 cannot be {request.init!r}", "--init agent or --init image")


def configuration(request: MachineRequest, rootfs: RootFilesystem, network: UserNetwork | Wire | None) -> Configuration:
    """The one message that makes a fresh guest this machine."""
    env = {"PATH": DEFAULT_PATH, **dict(rootfs.env), **dict(request.env)}
    hostname = request.hostname or request.name
    return Configuration(
        root=RootMount(
            device="/dev/vda",
            fstype=rootfs.fstype,
            options=EXT4 if rootfs.fstype == "ext4" else "",
            grow=request.disk > rootfs.size,
        ),
        hostname=hostname,
        hosts=[("127.0.0.1", "localhost"), ("::1", "localhost"), ("127.0.1.1", hostname)],
        resolv=Resolver(nameservers=[network.nameserver]) if network else None,
        network=told(network, 0) if network else None,
        interfaces=[told(wire, index) for index, wire in enumerate(request.joined, 1 if network else 0)],
        env=env,
        entropy=os.urandom(64),
        boot_id=str(uuid.uuid4()),
        machine_id=os.urandom(16).hex() if request.keys is not None else "",
        realtime=time.time_ns(),
        user=request.user or rootfs.user or "root",
        workdir=request.workdir or rootfs.workdir or "",
        init="" if request.init == "agent" else request.init,
        mounts=[mount_of(disk) for disk in request.attached],
    )


def told(network: UserNetwork | Wire, index: int) -> NetworkConfiguration:
    """What a guest is told of one of its interfaces."""
    words = NetworkConfiguration(f"eth{index}", network.address, network.gateway, network.mac, ipv6=False)
    if not isinstance(network, Wire):
        return words
    return replace(words, address6=network.address6, gateway6=network.gateway6, ipv6=network.ipv6)


def mount_of(disk: Attached) -> Mount:
    """How the guest mounts a further disk. Of one that is only read the journal is left alone; a larger one grows; what is deleted
    is given back to the host."""
    if disk.read_only:
        return Mount(disk.serial, disk.path, flags=("ro",), options="noload")
    return Mount(disk.serial, disk.path, options=EXT4, grow=True)


def disk_of(disk: Attached) -> Disk:
    """A volume's flushes reach the host's disk; an overlay goes with its sandbox."""
    if disk.base is not None:
        return Disk(disk.serial, disk.file, "qcow2", backing=(disk.base,), flush=True)
    return Disk(disk.serial, disk.file, "raw", read_only=disk.read_only, flush=True)


def _network(request: MachineRequest) -> UserNetwork | Wire | None:
    if request.network == "none" or request.wire is not None:
        return request.wire
    from stoker.host.addresses import host_addresses
    from stoker.network.user import plan_user_network

    return plan_user_network(host_addresses())


async def _clone(request: MachineRequest, rootfs: RootFilesystem, disk: MakeDisk) -> Clone:
    """The machine's own disk, upon its root file system."""
    if request.disk and request.disk < rootfs.size:
        raise InvalidRequest(
            "disk_too_small",
            f"{request.image} needs {rootfs.size // MIB} MiB of disk, more than {request.disk // MIB} MiB",
            f"--disk {rootfs.size // MIB}M or more",
        )
    return await disk(Base(rootfs.path, -(-os.stat(rootfs.path).st_size // 512) * 512), max(request.disk, rootfs.size))


async def boot(
    request: MachineRequest,
    settings: Settings,
    directory: Path,
    disk: MakeDisk,
    *,
    detached: bool,
    progress: Progress | None = None,
    cgroup: Path | None = None,
    goldens: Goldens | None = None,
) -> LiveMachine:
    """Boots a machine, or starts it from golden memory where there is some, and configures its guest.

    ``directory`` exists, is empty and only its owner's; ``disk`` makes the machine's disk upon its image, or opens the one that was
    made upon it before. With ``detached`` the machine outlives this process. Its processes begin in ``cgroup``. Raises a
    :class:`StokerError` that carries the console's last lines where they help.
    """
    check(request)
    with ExitStack() as held:
        live = await _boot(request, settings, directory, disk, detached, progress or NullProgress(), cgroup, goldens, held)
        live.held = held.pop_all()
        return live


@dataclass(frozen=True, slots=True)
class Plan:
    """A machine before it is started: everything it is made from has been found, made and held."""

    spec: MachineSpec
    rootfs: RootFilesystem
    kernel: Kernel
    clone: Clone
    network: UserNetwork | Wire | None


async def plan(
    request: MachineRequest,
    settings: Settings,
    directory: Path,
    disk: MakeDisk,
    watch: Watch,
    held: ExitStack,
    report: Progress,
    *,
    detached: bool,
    cgroup: Path | None,
) -> Plan:
    """Finds kernel and image, makes (or opens) the disks. The laps of ``watch`` are ``images``, ``accel`` and ``clone``."""
    kernel = await held_kernel(request.kernel or settings.default_kernel, settings, report, held)
    rootfs = await held_image(request.image, settings, report, held)
    initrd = await build_initramfs(
        kernel, agent_path(), settings, network=request.network != "none" or bool(request.joined), base=request.initrd
    )
    watch.lap("images")
    accel = await verdict(settings, kernel.vmlinux, initrd)
    watch.lap("accel")
    clone = await _clone(request, rootfs, disk)
    for attached in request.attached:
        if attached.base is not None and not attached.file.exists():
            create_overlay(attached.file, attached.base, 0)
    trace("boot.after_clone")
    network = _network(request)
    watch.lap("clone")
    spec = MachineSpec(
        name=request.name,
        directory=directory,
        kernel=kernel.vmlinux,
        initrd=initrd,
        cmdline=(),
        cpus=request.cpus,
        memory=request.memory,
        disks=(
            Disk(name="root", path=clone.path, format=clone.format, backing=clone.backing, flush=False),
            *(disk_of(attached) for attached in request.attached),
        ),
        network=TapNetwork(network.mac, network.tap) if isinstance(network, Wire) else network,
        taps=tuple(TapNetwork(wire.mac, wire.tap) for wire in request.joined),
        accelerator=accel.accelerator,
        cpu=accel.cpu,
        console_bytes=settings.console_bytes,
        detached=detached,
        cgroup=cgroup,
        gate=request.gate,
        journal=request.name if request.gate is not None else "",
    )
    return Plan(spec, rootfs, kernel, clone, network)


async def _boot(
    request: MachineRequest,
    settings: Settings,
    directory: Path,
    disk: MakeDisk,
    detached: bool,
    report: Progress,
    cgroup: Path | None,
    goldens: Goldens | None,
    held: ExitStack,
) -> LiveMachine:
    watch = Watch()
    made = await plan(request, settings, directory, disk, watch, held, report, detached=detached, cgroup=cgroup)
    words = configuration(request, made.rootfs, made.network)
    shape = await _shape(request, made.spec, words, made.clone, settings) if goldens is not None else None
    fresh: list[str] = []
    keys = _told(request.keys, fresh) if request.keys is not None else None

    up = await _bring_up(made.spec, settings, words, watch, goldens, shape, request.base_file, keys, request.golden_only)
    if goldens is not None and shape is not None and not up.golden:
        goldens.learn(shape)
    return LiveMachine(
        request,
        up.machine,
        up.agent,
        made.rootfs,
        made.kernel,
        made.clone,
        watch.laps,
        made.spec.accelerator.value,
        up.golden,
        up.base,
        booted_copy(fresh) if keys is not None else None,
    )


def _told(keys: MakeKeys, files: list[str]) -> MakeKeys:
    """The same, which notes down what it made."""

    async def make(paths: Sequence[str]) -> Sequence[tuple[str, int, Text]]:
        made = await keys(paths)
        files.extend(path for path, _, _ in made)
        return made

    return make


async def _shape(
    request: MachineRequest, spec: MachineSpec, words: Configuration, clone: Clone, settings: Settings
) -> Shape | None:
    """What golden memory for this machine is known by; None: it has to boot."""
    usual = request.init == "agent" and request.initrd is None and not request.attached
    # Only of an overlay is it known that the guest finds in it what it has read of the base.
    if request.cold or not usual or words.root is None or clone.format != "qcow2" or len(clone.backing) != 1:
        return None
    # Nobody's own addresses are in it.
    network = told(USUAL, 0) if request.wire is not None and request.wire.own else words.network
    return await Shape.of(spec, words.root, network, clone.size, settings)


async def _bring_up(
    spec: MachineSpec,
    settings: Settings,
    words: Configuration,
    watch: Watch,
    goldens: Goldens | None = None,
    shape: Shape | None = None,
    base_file: Path | None = None,
    keys: MakeKeys | None = None,
    golden_only: bool = False,
) -> Started:
    """Starts a machine and configures its guest; a failure ends it again."""
    async with AsyncExitStack() as undo:
        up = await start(spec, settings, watch, goldens, shape, base_file, golden_only)
        undo.push_async_callback(up.machine.close)
        undo.push_async_callback(up.machine.kill)
        undo.push_async_callback(up.agent.aclose)
        async with explained(up.machine, settings):
            await up.agent.configure(words, keys=keys)
        watch.lap("configure")
        trace("boot.after_configure")
        undo.pop_all()
    return up


async def boot_helper(name: str, settings: Settings, directory: Path, disk: Attached, memory: int) -> tuple[Machine, Agent]:
    """A machine that stays in its initramfs, with one disk mounted; it ends with this process. See :mod:`stoker.engine.helper`."""
    with ExitStack() as held:
        kernel = await held_kernel(settings.default_kernel, settings, NullProgress(), held)
        initrd = await build_initramfs(kernel, agent_path(), settings, network=False)
        accel = await verdict(settings, kernel.vmlinux, initrd)
        spec = MachineSpec(
            name=name,
            directory=directory,
            kernel=kernel.vmlinux,
            initrd=initrd,
            cmdline=(),
            cpus=1,
            memory=memory,
            disks=(disk_of(disk),),
            network=None,
            accelerator=accel.accelerator,
            cpu=accel.cpu,
            console_bytes=settings.console_bytes,
        )
        words = Configuration(
            env={"PATH": DEFAULT_PATH}, entropy=os.urandom(64), realtime=time.time_ns(), user="root", mounts=[mount_of(disk)]
        )
        up = await _bring_up(spec, settings, words, Watch())
        return up.machine, up.agent
