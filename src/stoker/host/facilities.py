"""What this host can do, asked of the kernel and the tools themselves: each probe tries the thing, and none leaves a trace.

A probe answers with a :class:`Facility`; it never raises. Probes that need a guest (KVM) are not here: a host
facility knows nothing of guests.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import re
import shutil
import socket
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from stoker.errors import StokerError
from stoker.host.run import run, tool_environment
from stoker.host.systemd import refused as systemd_refused

__all__ = ["Facility", "Status", "Tool", "kernel_facilities", "probe_tool", "which"]

FICLONE = 0x40049409
TUNGETFEATURES = 0x800454CF
DM_VERSION = 0xC138FD00
DM_IOCTL_SIZE = 312
KVM_GET_API_VERSION = 0xAE00
LOOP_CONTROL = "/dev/loop-control"
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
UFFD_USER_MODE_ONLY = 1
INSTALL = "apt-get install -y --no-install-recommends "


class Status(StrEnum):
    OK = "ok"
    MISSING = "missing"
    BROKEN = "broken"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Facility:
    """One row: whether it is there, what it enables, how to get it. ``required``: ``stoker run`` cannot work without it."""

    name: str
    status: Status
    detail: str
    enables: str
    get: str = ""
    required: bool = False


@dataclass(frozen=True, slots=True)
class Tool:
    """A program: its Debian package, the words that make it tell its version, what it enables."""

    name: str
    package: str
    enables: str
    version: tuple[str, ...] = ("--version",)
    required: bool = False
    get: str = ""


def which(name: str) -> str | None:
    """Where a tool is, in the system directories too (an unprivileged user's PATH often lacks them)."""
    return shutil.which(name, path=tool_environment()["PATH"])


async def probe_tool(tool: Tool) -> Facility:
    """Runs the tool for its version."""
    row = Facility(tool.name, Status.MISSING, "not installed", tool.enables, tool.get or INSTALL + tool.package, tool.required)
    path = which(tool.name)
    if path is None:
        return row
    if not tool.version:
        return replace(row, status=Status.OK, detail=path)
    try:
        done = await run([path, *tool.version], check=False, timeout=10)
    except StokerError as e:
        return replace(row, status=Status.BROKEN, detail=e.message)
    text = (done.stdout + done.stderr).decode(errors="replace")
    match = re.search(r"\d\w*(?:[.:~+-]\w+)+", text.strip().partition("\n")[0])
    if done.code != 0 and match is None:
        return replace(row, status=Status.BROKEN, detail=f"{path} ended with {done.code}")
    return replace(row, status=Status.OK, detail=match[0] if match else path)


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _open(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def _tun() -> Facility:
    row = Facility("tun", Status.OK, "/dev/net/tun", "a network of its own for each machine", "modprobe tun")
    try:
        fd = _open("/dev/net/tun")
    except OSError as e:
        return replace(row, status=Status.MISSING, detail=f"/dev/net/tun: {_why(e)}")
    try:
        fcntl.ioctl(fd, TUNGETFEATURES, bytearray(4))
    except OSError as e:
        return replace(row, status=Status.BROKEN, detail=f"/dev/net/tun: {_why(e)}")
    finally:
        os.close(fd)
    return row


def _reflink(data_dir: Path) -> Facility:
    row = Facility(
        "reflink",
        Status.OK,
        f"FICLONE works in {data_dir}",
        "disk snapshots without copying",
        "put the data directory (STOKER_DATA_DIR) on XFS or btrfs",
    )
    directory = next(path for path in (data_dir, *data_dir.parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=directory) as source, tempfile.TemporaryFile(dir=directory) as clone:
            source.write(bytes(65536))
            source.flush()
            fcntl.ioctl(clone.fileno(), FICLONE, source.fileno())
    except OSError as e:
        absent = e.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV)
        detail = f"the file system of {directory} has none" if absent else f"{directory}: {_why(e)}"
        return replace(row, status=Status.MISSING, detail=detail)
    return row


def _loop() -> Facility:
    row = Facility("loop", Status.OK, LOOP_CONTROL, "an XFS pool in a file, on any file system", "modprobe loop (as root)")
    try:
        os.close(_open(LOOP_CONTROL))
    except OSError as e:
        return replace(row, status=Status.MISSING, detail=f"{LOOP_CONTROL}: {_why(e)}")
    return row


def _device_mapper() -> Facility:
    row = Facility("device-mapper", Status.OK, "", "block-device snapshots (dm-snapshot)", "modprobe dm-snapshot (as root)")
    path = "/dev/mapper/control"
    try:
        fd = _open(path)
    except OSError as e:
        return replace(row, status=Status.MISSING, detail=f"{path}: {_why(e)}")
    try:
        request = bytearray(struct.pack("=IIIII", 4, 0, 0, DM_IOCTL_SIZE, DM_IOCTL_SIZE).ljust(DM_IOCTL_SIZE, b"\0"))
        fcntl.ioctl(fd, DM_VERSION, request)
        return replace(row, detail="version " + ".".join(map(str, struct.unpack_from("=III", request))))
    except OSError as e:
        return replace(row, status=Status.BROKEN, detail=f"{path}: {_why(e)}")
    finally:
        os.close(fd)


def _userfaultfd() -> Facility:
    row = Facility("userfaultfd", Status.OK, "", "memory brought in when it is touched", "sysctl vm.unprivileged_userfaultfd=1")
    number = SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        return replace(row, status=Status.UNKNOWN, detail=f"not asked on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    for flags, detail in ((0, "with kernel faults"), (UFFD_USER_MODE_ONLY, "user faults only")):
        fd = libc.syscall(number, os.O_CLOEXEC | flags)
        if fd >= 0:
            os.close(fd)
            return replace(row, detail=detail)
    return replace(row, status=Status.MISSING, detail=os.strerror(ctypes.get_errno()))


def _vsock() -> Facility:
    row = Facility("vsock", Status.OK, "/dev/vhost-vsock", "a faster channel to the guest", "modprobe vhost_vsock")
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
        os.close(_open("/dev/vhost-vsock"))
    except OSError as e:
        return replace(row, status=Status.MISSING, detail=f"/dev/vhost-vsock: {_why(e)}")
    return row


def _systemd() -> Facility:
    """Whether machines can be units. Connecting is not tried: that starts programs on some hosts."""
    row = Facility("systemd", Status.OK, "PID 1", "machines as units, socket activation", "boot the host with systemd as PID 1")
    why = systemd_refused()
    if not why:
        return row
    get = row.get if "PID 1" in why else INSTALL + "dbus"
    return replace(row, status=Status.MISSING, detail=f"{why}; machines get plain control groups, if any", get=get)


def _nftables() -> Facility:
    row = Facility("nftables", Status.OK, "", "firewall and published ports for machines", INSTALL + "nftables")
    try:
        library = ctypes.CDLL("libnftables.so.1")
    except OSError:
        return replace(row, status=Status.MISSING, detail="libnftables.so.1 is not installed")
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12).close()  # NETLINK_NETFILTER
    except OSError as e:
        return replace(row, status=Status.MISSING, detail=f"the kernel has no netfilter netlink: {_why(e)}")
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    for name, arguments in (("nft_ctx_free", 1), ("nft_ctx_buffer_output", 1), ("nft_ctx_buffer_error", 1)):
        getattr(library, name).argtypes = [ctypes.c_void_p] * arguments
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    context = library.nft_ctx_new(0)
    library.nft_ctx_buffer_output(context)
    library.nft_ctx_buffer_error(context)
    failed = library.nft_run_cmd_from_buffer(context, b"list tables")
    library.nft_ctx_free(context)
    if failed:
        why = "the kernel refuses to list tables" if os.geteuid() == 0 else "only root may list tables"
        return replace(row, status=Status.BROKEN if os.geteuid() == 0 else Status.UNKNOWN, detail=why)
    return replace(row, detail="libnftables lists tables")


def _user_namespaces() -> Facility:
    """Whether a process of this user's may have a user namespace, where mmdebstrap builds without root."""
    row = Facility("user-namespaces", Status.OK, "", "base systems built without root", "sysctl kernel.unprivileged_userns_clone=1")
    for path in ("/proc/sys/user/max_user_namespaces", "/proc/sys/kernel/unprivileged_userns_clone"):
        try:
            if int(Path(path).read_text()) == 0:
                return replace(row, status=Status.MISSING, detail=f"{path} is 0")
        except FileNotFoundError:
            continue
    return row


def kvm_node() -> str:
    """An empty string when ``/dev/kvm`` opens and answers, else why not. That it works is proved by a guest only."""
    try:
        fd = _open("/dev/kvm")
    except OSError as e:
        return f"/dev/kvm: {_why(e)}"
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
    except OSError as e:
        return f"/dev/kvm: {_why(e)}"
    finally:
        os.close(fd)
    return "" if version == 12 else f"/dev/kvm speaks version {version}, not 12"


def kernel_facilities(data_dir: Path) -> Sequence[Facility]:
    """Every facility of the host's kernel that something of ours uses."""
    return (
        _tun(),
        _reflink(data_dir),
        _loop(),
        _device_mapper(),
        _userfaultfd(),
        _vsock(),
        _nftables(),
        _systemd(),
        _user_namespaces(),
    )
