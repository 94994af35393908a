"""Device-mapper by ioctl on ``/dev/mapper/control``: create, load, suspend, resume, remove, look at.

A table is a list of :class:`Target`. Device nodes are the kernel's own (``/dev/dm-N``, devtmpfs) or made here: nothing waits for
udev. Only "busy" is worth another try, and only for a while; then the error names who holds the device.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import HostError
from stoker.host.mounts import mounts

__all__ = [
    "Device",
    "Target",
    "available",
    "create",
    "find",
    "holders",
    "listed",
    "node",
    "remove",
    "replace",
    "status",
    "suspended",
    "table",
]

CONTROL = Path("/dev/mapper/control")
_HEAD = struct.Struct("=6Ii2I4xQ128s129s7x")
"""struct dm_ioctl: version, data size, data start, targets, open count, flags, event number, device, name, uuid."""
_SPEC = struct.Struct("=QQiI16s")
DEV_CREATE, DEV_REMOVE, DEV_SUSPEND, DEV_STATUS, TABLE_LOAD, TABLE_CLEAR, TABLE_STATUS, TARGET_VERSION = 3, 4, 6, 7, 9, 10, 12, 17
READ_ONLY, SUSPEND, ACTIVE, STATUS_TABLE, BUFFER_FULL, SKIP_LOCKFS, NOFLUSH = 1, 2, 1 << 5, 1 << 4, 1 << 8, 1 << 10, 1 << 11
PATIENCE = 2.0
"""Seconds a removal waits for somebody who only looks (udev's probes)."""
NAME_BYTES = 127


@dataclass(frozen=True, slots=True)
class Target:
    """One line of a table: sectors (of 512 bytes), the target's type and its words."""

    start: int
    length: int
    kind: str
    words: str

    def __str__(self) -> str:
        return f"{self.start} {self.length} {self.kind} {self.words}".rstrip()


@dataclass(frozen=True, slots=True)
class Device:
    """A device as it is now. ``number`` is its ``st_rdev``."""

    name: str
    number: int
    users: int
    active: bool
    suspended: bool
    read_only: bool

    @property
    def sysfs(self) -> Path:
        return Path(f"/sys/dev/block/{os.major(self.number)}:{os.minor(self.number)}")


def _request(command: int, name: str = "", *, flags: int = 0, targets: Sequence[Target] = (), room: int = 0) -> tuple[bytes, int]:
    """Runs one command: the answer's whole buffer and its flags. OSError as the kernel says it."""
    if len(name.encode()) > NAME_BYTES:
        raise ValueError(f"{name}: too long for a device's name")
    body = b"".join(_packed(target) for target in targets)
    size = _HEAD.size + max(len(body), room)
    head = _HEAD.pack(4, 0, 0, size, _HEAD.size, len(targets), 0, flags, 0, 0, name.encode(), b"")
    buffer = bytearray(head + body.ljust(size - _HEAD.size, b"\0"))
    control = _control()
    try:
        fcntl.ioctl(control, 3 << 30 | _HEAD.size << 16 | 0xFD << 8 | command, buffer)
    finally:
        os.close(control)
    return bytes(buffer), _HEAD.unpack_from(buffer)[7]


def _packed(target: Target) -> bytes:
    words = target.words.encode() + b"\0"
    words = words.ljust(-(-len(words) // 8) * 8, b"\0")
    return _SPEC.pack(target.start, target.length, 0, _SPEC.size + len(words), target.kind.encode()) + words


def _control() -> int:
    try:
        return os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        try:
            major, _, minor = Path("/sys/class/misc/device-mapper/dev").read_text().strip().partition(":")
        except FileNotFoundError:
            raise HostError(
                "device_mapper_missing", "this kernel has no device-mapper", "modprobe dm-mod dm-snapshot, or another pool_strategy"
            ) from None
        CONTROL.parent.mkdir(exist_ok=True)
        os.mknod(CONTROL, stat.S_IFCHR | 0o600, os.makedev(int(major), int(minor)))
        return os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        raise HostError("device_mapper_refused", f"{CONTROL}: not allowed", "device-mapper needs root") from None


def available(kind: str) -> tuple[int, int, int] | None:
    """The version of a target type; None when the kernel (or this user) has none."""
    if not CONTROL.exists() and not Path("/sys/class/misc/device-mapper/dev").exists():
        return None
    try:
        buffer, _ = _request(TARGET_VERSION, kind, room=4096)  # loads the target's module where it is one
    except (OSError, HostError):
        return None
    major, minor, patch = struct.unpack_from("=3I", buffer, _HEAD.unpack_from(buffer)[4] + 4)
    return major, minor, patch


def _device(buffer: bytes) -> Device:
    fields = _HEAD.unpack_from(buffer)
    flags, number, name = fields[7], fields[9], fields[10]
    device = os.makedev((number >> 8) & 0xFFF, (number & 0xFF) | ((number >> 12) & 0xFFF00))
    label = name.split(b"\0")[0].decode()
    return Device(label, device, fields[6], bool(flags & ACTIVE), bool(flags & SUSPEND), bool(flags & READ_ONLY))


def find(name: str) -> Device | None:
    """The device of exactly this name, if there is one. A kernel without device-mapper has none."""
    try:
        return _device(_request(DEV_STATUS, name)[0])
    except OSError as e:
        if e.errno == errno.ENXIO:
            return None
        raise
    except HostError as error:
        if error.code == "device_mapper_missing":
            return None
        raise


def listed() -> list[str]:
    """The names of all mapped devices."""
    found = []
    for entry in Path("/sys/block").glob("dm-*/dm/name"):
        try:
            found.append(entry.read_text().strip())
        except FileNotFoundError:
            continue  # removed meanwhile
    return sorted(found)


def create(name: str, targets: Sequence[Target], *, read_only: bool = False) -> Device:
    """A new, active device. A failure leaves none. Errors: ``device_exists``, ``device_refused`` (HostError)."""
    try:
        _request(DEV_CREATE, name)
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise HostError("device_exists", f"there is a device {name} already", f"dmsetup info {name}") from None
        raise HostError("device_refused", f"device {name}: {e.strerror}") from None
    try:
        _load(name, targets, read_only)
        # Without its flag this resumes, and makes the table active.
        return _device(_request(DEV_SUSPEND, name)[0])
    except BaseException as error:
        remove(name)
        if isinstance(error, OSError):
            raise _refused(name, targets, error) from None
        raise


def _load(name: str, targets: Sequence[Target], read_only: bool) -> None:
    _request(TABLE_LOAD, name, flags=READ_ONLY * read_only, targets=targets)


def _refused(name: str, targets: Sequence[Target], error: OSError) -> HostError:
    lines = "; ".join(map(str, targets))
    return HostError(
        "device_refused", f"device {name} ({lines}): {error.strerror}", "dmesg says why", details={"errno": error.errno}
    )


def replace(name: str, targets: Sequence[Target]) -> None:
    """Another table for a device that is in use. It is suspended first: a target that reads its metadata when it is loaded (a
    snapshot does) must not miss what is written meanwhile. A table that is refused leaves the one there was."""
    device = find(name)
    if device is None:
        raise HostError("device_missing", f"there is no device {name}")
    _request(DEV_SUSPEND, name, flags=SUSPEND | SKIP_LOCKFS)
    try:
        _load(name, targets, device.read_only)
        _request(DEV_SUSPEND, name)
    except OSError as e:
        _request(TABLE_CLEAR, name)
        _request(DEV_SUSPEND, name)
        raise _refused(name, targets, e) from None


class suspended:
    """A device without I/O: what was under way is done, what comes waits. Nothing when there is no such device."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._held = False

    def __enter__(self) -> None:
        if find(self._name) is not None:
            _request(DEV_SUSPEND, self._name, flags=SUSPEND)
            self._held = True

    def __exit__(self, *_: object) -> None:
        if self._held:
            _request(DEV_SUSPEND, self._name)


def _lines(name: str, flags: int) -> list[Target]:
    room = 4096
    while True:
        buffer, told = _request(TABLE_STATUS, name, flags=flags | NOFLUSH, room=room)
        if not told & BUFFER_FULL:
            break
        room *= 4
    fields = _HEAD.unpack_from(buffer)
    start, count = fields[4], fields[5]
    found, at = [], start
    for _ in range(count):
        begin, length, _, following, kind = _SPEC.unpack_from(buffer, at)
        words = buffer[at + _SPEC.size : buffer.index(b"\0", at + _SPEC.size)]
        found.append(Target(begin, length, kind.split(b"\0")[0].decode(), words.decode()))
        at = start + following
    return found


def table(name: str) -> list[Target]:
    """The active table. OSError ENXIO when there is no such device."""
    return _lines(name, STATUS_TABLE)


def status(name: str) -> list[Target]:
    """The same with the targets' state in place of their words."""
    return _lines(name, 0)


def node(device: Device) -> Path:
    """A block device node for it: the kernel's, or one made here."""
    for path in (Path(f"/dev/dm-{os.minor(device.number)}"), CONTROL.parent / device.name):
        try:
            found = os.stat(path)
        except FileNotFoundError:
            continue
        if stat.S_ISBLK(found.st_mode) and found.st_rdev == device.number:
            return path
    path = CONTROL.parent / device.name
    path.unlink(missing_ok=True)
    os.mknod(path, stat.S_IFBLK | 0o600, device.number)
    return path


def remove(name: str, *, timeout: float = PATIENCE) -> None:
    """Removes a device; there may be none. Busy for longer than ``timeout``: ``device_busy`` (HostError) with the holders."""
    deadline = time.monotonic() + timeout
    while (device := find(name)) is not None:
        try:
            _request(DEV_REMOVE, name)
        except OSError as e:
            if e.errno == errno.ENXIO:
                break
            if e.errno != errno.EBUSY:
                raise HostError("device_refused", f"device {name} cannot be removed: {e.strerror}") from None
            if time.monotonic() > deadline:
                found = holders(device)
                raise HostError(
                    "device_busy",
                    f"device {name} is in use by {', '.join(found) or 'somebody unknown'}",
                    "end them, then try again",
                    details={"holders": found},
                ) from None
            time.sleep(0.05)
    made = CONTROL.parent / name
    if made.is_block_device() or made.is_symlink():
        made.unlink(missing_ok=True)


def holders(device: Device) -> list[str]:
    """Who has a device open, in words: processes, mounts, devices upon it."""
    found = [f"the mount {mount.point}" for mount in mounts() if mount.device == device.number]
    try:
        found += [f"the device {path.name}" for path in (device.sysfs / "holders").iterdir()]
    except FileNotFoundError:
        pass
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(os.stat(fd).st_rdev == device.number for fd in (process / "fd").iterdir()):
                found.append(f"process {process.name} ({(process / 'comm').read_text().strip()})")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found
