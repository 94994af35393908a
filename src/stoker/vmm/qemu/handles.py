"""Opening what a QEMU process inherits: sockets, pipes, images, kernel. Everything is entered into the caller's ExitStack, which
closes our copies once QEMU has its own."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import HostError
from stoker.host.sockets import listen_unix
from stoker.vmm.machine import Accelerator, Channel, MachineSpec, TapNetwork
from stoker.vmm.qemu.command import DiskHandles, Handles
from stoker.vmm.shim import ShimOptions, filter_rules

__all__ = ["Opened", "open_handles"]

KVM = Path("/dev/kvm")
FIRST_USER, USERS = 0x5A000000, 1 << 20


@dataclass(frozen=True, slots=True)
class Opened:
    """What the VMM and its shim are given. ``owner`` is the pipe's end that keeps an attached machine alive (the caller's to close;
    ``None`` for a detached one)."""

    handles: Handles
    options: ShimOptions
    owner: int | None
    state: int | None
    """Where the device state of a restored machine is written to; the caller's to close."""


def open_handles(spec: MachineSpec, close: ExitStack, keep: ExitStack) -> Opened:
    """Opens everything. What ``keep`` closes on failure is the caller's afterwards."""
    drop = has_user_of_its_own()
    console, vmm_console = _pipe(close)
    rules = tap = net_out = vmm_net_out = net_in = vmm_net_in = None
    if isinstance(spec.network, TapNetwork):
        tap = spec.network.tap
    elif spec.network is not None:
        net_out, vmm_net_out = _pair(close)
        net_in, vmm_net_in = _pair(close)
        rules = spec.directory / "net.deny"
        rules.write_text(filter_rules(spec.network))
    serial = spec.channel is Channel.VIRTIO_SERIAL
    kernel, kernel_fd = _boot_file(spec.kernel, drop, close)
    initrd, initrd_fd = _boot_file(spec.initrd, drop, close)
    state, state_in = _state_pipe(spec.restore, close, keep)
    handles = Handles(
        monitor=close.enter_context(listen_unix(spec.directory / "qmp.sock")).fileno(),
        console=vmm_console,
        kernel=kernel,
        initrd=initrd,
        agent=close.enter_context(listen_unix(spec.directory / "agent.sock")).fileno() if serial else None,
        vsock=None if serial else _open("/dev/vhost-vsock", os.O_RDWR, close),
        disks=tuple(
            DiskHandles(
                fd := _open(disk.path, os.O_RDONLY if disk.read_only else os.O_RDWR, close),
                tuple(_open(path, os.O_RDONLY, close) for path in disk.backing),
                stat.S_ISBLK(os.fstat(fd).st_mode),
            )
            for disk in spec.disks
        ),
        net_out=vmm_net_out,
        net_in=vmm_net_in,
        tap=tap,
        taps=tuple(port.tap for port in spec.taps),
        memory=spec.guest_memory.fd if spec.guest_memory else None,
        state=state,
    )
    owner = theirs = None
    if not spec.detached:
        theirs, owner = os.pipe2(os.O_CLOEXEC)
        close.callback(os.close, theirs)
        keep.callback(os.close, owner)
    groups, device = _kvm_access(spec.accelerator) if drop else ((), None)
    options = ShimOptions(
        directory=spec.directory,
        console=console,
        console_bytes=spec.console_bytes,
        owner=theirs,
        passed=(*handles.descriptors(), *(fd for fd in (kernel_fd, initrd_fd) if fd is not None)),
        user=FIRST_USER + int.from_bytes(os.urandom(4), "little") % USERS if drop else None,
        groups=groups,
        device=device,
        cgroup=spec.cgroup,
        gate=spec.gate,
        journal=spec.journal,
        net_out=net_out,
        net_in=net_in,
        net_deny=rules,
    )
    return Opened(handles, options, owner, state_in)


def has_user_of_its_own() -> bool:
    """Whether the VMM runs under another user than this process: only root can do that."""
    return os.geteuid() == 0


def _pipe(close: ExitStack) -> tuple[int, int]:
    ends = os.pipe2(os.O_CLOEXEC)
    for fd in ends:
        close.callback(os.close, fd)
    return ends


def _state_pipe(restore: bool, close: ExitStack, keep: ExitStack) -> tuple[int | None, int | None]:
    if not restore:
        return None, None
    theirs, ours = os.pipe2(os.O_CLOEXEC)
    close.callback(os.close, theirs)
    keep.callback(os.close, ours)
    return theirs, ours


def _pair(close: ExitStack) -> tuple[int, int]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    close.enter_context(ours)
    close.enter_context(theirs)
    return ours.fileno(), theirs.fileno()


def _open(path: Path | str, flags: int, close: ExitStack) -> int:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC)
    except OSError as e:
        raise HostError("file_unusable", f"{path}: {e.strerror}", details={"path": str(path)}) from None
    close.callback(os.close, fd)
    return fd


def _boot_file(path: Path, drop: bool, close: ExitStack) -> tuple[str, int | None]:
    """The name QEMU opens a kernel or initrd by. A VMM with a user of its own gets a descriptor: opening that anew needs no right
    to the directories; a file that not everybody may read is copied to memory."""
    if not drop:
        if not os.access(path, os.R_OK):
            raise HostError("file_unusable", f"{path} cannot be read", details={"path": str(path)})
        return str(path), None
    fd = _open(path, os.O_RDONLY, close)
    status = os.fstat(fd)
    if not status.st_mode & stat.S_IROTH:
        copy = os.memfd_create(path.name, os.MFD_CLOEXEC)
        close.callback(os.close, copy)
        offset = 0
        while offset < status.st_size and (sent := os.sendfile(copy, fd, offset, status.st_size - offset)):
            offset += sent
        fd = copy
    return f"/proc/self/fd/{fd}", fd


def _kvm_access(accelerator: Accelerator) -> tuple[tuple[int, ...], Path | None]:
    """What a VMM with a user of its own needs for /dev/kvm: the group it belongs to, or a node of its own."""
    if accelerator is not Accelerator.KVM:
        return (), None
    try:
        device = os.stat(KVM)
    except FileNotFoundError:
        raise HostError("kvm_missing", "there is no /dev/kvm", "stoker doctor") from None
    if device.st_mode & 0o006 == 0o006:
        return (), None
    if device.st_mode & 0o060 == 0o060 and device.st_gid:
        return (device.st_gid,), None
    return (), KVM
