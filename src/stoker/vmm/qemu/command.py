"""From a :class:`MachineSpec` to QEMU's command line: values in, words out, nothing asked of the host.

Every file and socket is a descriptor that the VMM inherits (:class:`Handles`), so the VMM needs no right to any path, and no
name has to be quoted for QEMU's option parsers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from stoker.errors import InvalidRequest
from stoker.vmm.machine import Accelerator, Channel, Disk, MachineSpec, TapNetwork, translated_code
from stoker.vmm.qemu.facts import QemuFacts

__all__ = ["DiskHandles", "Handles", "command", "kernel_cmdline"]

MIB = 1 << 20
MAX_CMDLINE = 2047  # the kernel's COMMAND_LINE_SIZE on x86, less its NUL

LAST_TRANSPORT = 23
MAX_DISKS = LAST_TRANSPORT - 3
"""Less those for further interfaces. Channel, entropy and network have a transport each, and number 0 stays empty: it is pin 0 of
the second IOAPIC, which QEMU takes for the ISA timer's and raises pin 2 instead, so its interrupts never arrive."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

WORDS = ("console=ttyS0", "quiet", "loglevel=1", "panic=-1", "reboot=t", "cryptomgr.notests")
"""A console that says what matters only; a panic that ends the machine (triple fault, ``-no-reboot``); no self-tests of the
kernel's ciphers, which take a fifth of a stock kernel's boot under TCG. Measured and left out, being lost in the noise:
no_timer_check, noreplace-smp, i8042.*, pci=off, rcupdate.rcu_expedited, random.trust_cpu, nowatchdog, audit=0. The guest's
mitigations stay, where they are any."""


@dataclass(frozen=True, slots=True)
class DiskHandles:
    """An open disk and what lies below it, from top to bottom. ``device``: it is a block device."""

    image: int
    backing: tuple[int, ...] = ()
    device: bool = False


@dataclass(frozen=True, slots=True)
class Handles:
    """Descriptors of the VMM: listening sockets, the console's pipe, open images; and the names it opens kernel and initrd by."""

    monitor: int
    console: int
    kernel: str
    initrd: str
    agent: int | None = None
    vsock: int | None = None
    disks: tuple[DiskHandles, ...] = ()
    net_out: int | None = None
    net_in: int | None = None
    tap: int | None = None
    taps: tuple[int, ...] = ()
    memory: int | None = None
    state: int | None = None
    """Where the device state of a restored machine comes from."""

    def descriptors(self) -> tuple[int, ...]:
        """All of them, each once, to be passed on."""
        single = (self.monitor, self.console, self.agent, self.vsock, self.net_out, self.net_in, self.tap, self.memory, self.state)
        both = [fd for disk in self.disks for fd in (disk.image, *disk.backing)]
        return tuple(fd for fd in (*single, *both, *self.taps) if fd is not None)


def kernel_cmdline(spec: MachineSpec, qemu: QemuFacts) -> str:
    """The driver's own words first, so that the caller's, which come later, win."""
    words = list(WORDS)
    if spec.accelerator is Accelerator.TCG:
        words += TCG_WORDS
        if qemu.version < KNOWS_CODE_BY_PLACE:
            words.append("norandmaps")
        if qemu.tsc_khz:
            words.append(f"tsc_early_khz={qemu.tsc_khz}")
    if spec.channel is Channel.VSOCK:
        words.append("stoker.channel=vsock")
    line = " ".join([*words, *spec.cmdline])
    if len(line.encode()) > MAX_CMDLINE:
        raise InvalidRequest("cmdline_too_long", f"the kernel's command line has {len(line.encode())} bytes, {MAX_CMDLINE} at most")
    return line


# Under TCG the guest reads the host's time stamp counter and has nothing steady to measure it against: on a busy host the
# calibration fails, the kernel gives the counter up, and hangs, as this machine type has no other timer for it. It is told instead.
# Debian's kernels fill every page with zeros before they hand it out, which costs a third of what goes through a pipe in emulation.
# A retpoline is no protection there, and costs three blocks of code for each indirect call: software emulation makes the same
# lookup and the same jump of the host's out of a return as out of an indirect branch.
TCG_WORDS = ("tsc=reliable", "init_on_alloc=0", "spectre_v2=off")

# An older TCG knows what it has translated by its virtual address. Where that is another in each process, it translates the loader
# and the C library anew for each: of /bin/true that is three quarters of the work. Nothing outside the guest is protected by it; a
# guest that wants it back sets kernel.randomize_va_space. (Measured: 7.2 needs it, 10.0 does not.)
KNOWS_CODE_BY_PLACE = (8,)


def command(spec: MachineSpec, qemu: QemuFacts, handles: Handles) -> list[str]:
    """QEMU's whole command line, the program first."""
    _check(spec)
    argv = [qemu.path, "-name", spec.name, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    argv += ["-sandbox", SANDBOX]
    argv += _machine(spec, qemu)
    argv += _memory(spec, handles)
    argv += ["-kernel", handles.kernel, "-initrd", handles.initrd, "-append", kernel_cmdline(spec, qemu)]
    fdsets = _FdSets()
    argv += _console(handles, fdsets)
    argv += ["-chardev", f"socket,id=monitor,fd={handles.monitor},server=on,wait=off", "-mon", "chardev=monitor,mode=control"]
    # A guest finds the transports from the last to the first: disks come first, so that vda is the first of them.
    devices = [_disk_device(index, disk) for index, disk in enumerate(spec.disks)]
    for index, (disk, opened) in enumerate(zip(spec.disks, handles.disks, strict=True)):
        argv += ["-blockdev", json.dumps(_blockdev(index, disk, opened, fdsets), separators=(",", ":"))]
    channel, device = _channel(spec, handles)
    argv += channel
    devices += [device, "virtio-rng-device,rng=rng"]
    # The kernel's own: a generator inside of QEMU is the same in all that fork from one zygote, until it notices.
    argv += ["-object", "rng-random,id=rng,filename=/dev/urandom"]
    if spec.network is not None:
        network, device = _network(spec, handles)
        argv += network
        devices.append(device)
    for index, (port, tap) in enumerate(zip(spec.taps, handles.taps, strict=True), 1):
        network, device = _tap(index, port.mac, tap)
        argv += network
        devices.append(device)
    for index, text in enumerate(devices):
        argv += ["-device", f"{text},bus=virtio-mmio-bus.{LAST_TRANSPORT - index}"]
    if spec.channel is Channel.VIRTIO_SERIAL:
        argv += ["-device", "virtserialport,chardev=agent,name=stoker.agent"]
    return [*argv[:1], *fdsets.options, *argv[1:]]


def _check(spec: MachineSpec) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", spec.name):
        raise InvalidRequest("bad_name", f"{spec.name!r} is not a name for a machine")
    if spec.memory <= 0 or spec.memory % MIB:
        raise InvalidRequest("bad_memory", f"memory is whole MiB, not {spec.memory} bytes")
    if not 1 <= spec.cpus <= 255:
        raise InvalidRequest("bad_cpus", f"{spec.cpus} vCPUs cannot be had: 1 to 255")
    if spec.restore and spec.guest_memory is None:
        raise InvalidRequest("bad_memory", "a machine that is restored needs the memory file it was made over")
    for disk in spec.disks:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,20}", disk.name):
            raise InvalidRequest("bad_disk", f"{disk.name!r} is not a name for a disk")
        if disk.format not in ("raw", "qcow2") or disk.backing_format not in ("raw", "qcow2"):
            raise InvalidRequest("bad_disk", f"disk {disk.name}: the format is raw or qcow2")
        if disk.backing and disk.format == "raw":
            raise InvalidRequest("bad_disk", f"disk {disk.name}: nothing lies below a raw disk")
    room = MAX_DISKS - len(spec.taps)
    if len(spec.disks) > room:
        raise InvalidRequest("too_many_disks", f"{len(spec.disks)} disks: this machine type has room for {room}")


class _FdSets:
    """``-add-fd`` options: the way an inherited descriptor becomes a file name (``/dev/fdset/N``) for QEMU."""

    def __init__(self) -> None:
        self.options: list[str] = []
        self.count = 0

    def add(self, fd: int) -> str:
        self.count += 1
        self.options += ["-add-fd", f"fd={fd},set={self.count}"]
        return f"/dev/fdset/{self.count}"


def _machine(spec: MachineSpec, qemu: QemuFacts) -> list[str]:
    tcg = spec.accelerator is Accelerator.TCG
    # QEMU before 9 emulates cmpxchg16b wrongly (the flags): kernels that find it in the CPU use it in the allocator, and oops.
    # "Fast" string instructions are emulated byte by byte: a kernel that believes in them copies memory six times slower.
    software = "max,-erms,-cx16" if qemu.version < (9, 0, 0) else "max,-erms"
    cpu = spec.cpu or (software if tcg else "max")
    return [
        "-M", "microvm,acpi=on,ioapic2=on,pcie=off,usb=off,rtc=on" + (",memory-backend=memory" if spec.guest_memory else ""),
        "-accel", f"tcg,thread=multi,tb-size={translated_code(spec.memory) // MIB}" if tcg else "kvm",
        "-cpu", cpu,
        "-smp", str(spec.cpus),
        "-m", f"{spec.memory // MIB}M",
        "-global", "virtio-mmio.force-legacy=off",
    ]  # fmt: skip


def _memory(spec: MachineSpec, handles: Handles) -> list[str]:
    if handles.memory is None:
        return []
    share = "on" if spec.guest_memory and spec.guest_memory.shared else "off"
    path = f"/proc/self/fd/{handles.memory}"
    argv = ["-object", f"memory-backend-file,id=memory,size={spec.memory // MIB}M,mem-path={path},share={share}"]
    # Device state alone, without the section that says which machine it is of, is what xen-save-devices-state writes.
    argv += ["-global", "migration.send-configuration=off"]
    if handles.state is not None:
        argv += ["-incoming", f"fd:{handles.state}", "-S"]
    return argv


def _console(handles: Handles, fdsets: _FdSets) -> list[str]:
    path = fdsets.add(handles.console)
    return ["-chardev", f"file,id=console,path={path},append=on", "-serial", "chardev:console"]


def _blockdev(index: int, disk: Disk, opened: DiskHandles, fdsets: _FdSets) -> dict[str, Any]:
    cache = {"direct": False, "no-flush": not disk.flush}

    def layer(kind: str, fd: int, name: str, read_only: bool, device: bool = False) -> dict[str, Any]:
        file = {
            "driver": "host_device" if device else "file",
            "filename": fdsets.add(fd),
            "aio": "threads",
            "read-only": read_only,
            "cache": cache,
            "discard": "unmap",
        }
        return {"driver": kind, "node-name": name, "read-only": read_only, "cache": cache, "discard": "unmap", "file": file}

    node = layer(disk.format, opened.image, f"disk{index}", disk.read_only, opened.device)
    below = node
    for depth, fd in enumerate(opened.backing):
        last = depth + 1 == len(opened.backing)
        name = f"disk{index}-base" if last else f"disk{index}-layer{depth}"
        below["backing"] = layer(disk.backing_format if last else "qcow2", fd, name, True)
        below = below["backing"]
    if below["driver"] == "qcow2":
        # Never absent: without this word QEMU opens whatever file the header names.
        below["backing"] = None
    return node


def _disk_device(index: int, disk: Disk) -> str:
    # A write that fails stops the guest, which goes on with that very write when there is room again (or never hears of it).
    return f"virtio-blk-device,drive=disk{index},serial={disk.name},werror=stop,rerror=report"


def _channel(spec: MachineSpec, handles: Handles) -> tuple[list[str], str]:
    if spec.channel is Channel.VSOCK:
        return [], f"vhost-vsock-device,guest-cid={spec.vsock_cid},vhostfd={handles.vsock}"
    return ["-chardev", f"socket,id=agent,fd={handles.agent},server=on,wait=off"], "virtio-serial-device"


def _tap(index: int, mac: str, tap: int | None) -> tuple[list[str], str]:
    # What it sends and takes may be larger than its wire: the vnet header says how, and the kernel sees to it.
    return ["-netdev", f"tap,id=net{index},fd={tap}"], f"virtio-net-device,netdev=net{index},mac={mac},guest_announce=off"


def _network(spec: MachineSpec, handles: Handles) -> tuple[list[str], str]:
    plan = spec.network
    assert plan is not None
    if isinstance(plan, TapNetwork):
        return _tap(0, plan.mac, handles.tap)
    prefix = plan.address.rpartition("/")[2]
    # The redirector takes every frame off the guest's queue to the shim's filter; only what comes back on netin goes on to slirp.
    # A machine that is restored has nobody to announce itself to: its wire is its own, and its address may be about to change.
    # No vnet header: the user network offers no offloads, so there is none on this wire.
    return [
        "-netdev", f"user,id=net0,net={plan.gateway}/{prefix},host={plan.gateway},dns={plan.nameserver},ipv6=off",
        "-chardev", f"socket,id=netout,fd={handles.net_out}",
        "-chardev", f"socket,id=netin,fd={handles.net_in}",
        "-object", "filter-redirector,id=netfilter,netdev=net0,queue=rx,outdev=netout,indev=netin",
    ], f"virtio-net-device,netdev=net0,mac={plan.mac},guest_announce=off"  # fmt: skip
