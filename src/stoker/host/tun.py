"""TAP devices by descriptor (``TUNSETIFF``): made in the namespace of the calling thread, handed to a VMM as an open file."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from typing import Final

from stoker.errors import HostError

__all__ = ["open_tap", "tap_name"]

DEVICE: Final = "/dev/net/tun"
TUNSETIFF, TUNSETPERSIST, TUNSETOWNER, TUNSETIFINDEX, TUNGETIFF = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454DA, 0x800454D2
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x8000


def open_tap(
    name: str, *, create: bool, persistent: bool = False, owner: int | None = None, index: int = 0, offloads: bool = True
) -> int:
    """The descriptor of a TAP. ``create``: it must not exist yet; otherwise it must (and nobody else may have it open).

    ``persistent``: it stays when the descriptor is closed. ``owner``: a user that may open it later. ``index``: the number it
    shall have in its namespace. ``offloads``: frames carry a virtio header, which lets segments cross unsplit; whoever reads the
    descriptor must know (QEMU asks). Errors: ``tap_exists``, ``tap_unknown``, ``tap_busy``, ``tap_refused`` (HostError).
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise HostError("tap_refused", f"{DEVICE}: {e.strerror}", "modprobe tun; TAPs need root") from None
    try:
        _attach(fd, name, create, index, offloads)
        if owner is not None:
            fcntl.ioctl(fd, TUNSETOWNER, owner)
        if create and persistent:
            fcntl.ioctl(fd, TUNSETPERSIST, 1)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _attach(fd: int, name: str, create: bool, index: int, offloads: bool) -> None:
    if not create and not _exists(name):
        raise HostError("tap_unknown", f"there is no TAP {name}")
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR * offloads | IFF_TUN_EXCL * create
    try:
        if index:
            fcntl.ioctl(fd, TUNSETIFINDEX, struct.pack("=I", index))
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as e:
        if e.errno in (errno.EBUSY, errno.EEXIST):
            code, words = ("tap_exists", "exists already") if create else ("tap_busy", "is in use")
            raise HostError(code, f"the TAP {name} {words}", f"ip -d link show {name}") from None
        hint = "TAPs need root" if e.errno in (errno.EPERM, errno.EACCES) else ""
        raise HostError("tap_refused", f"no TAP {name}: {e.strerror}", hint) from None


def _exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def tap_name(fd: int) -> str:
    """The name of an open TAP."""
    request = bytearray(40)
    fcntl.ioctl(fd, TUNGETIFF, request)
    return request[:16].split(b"\0")[0].decode()
