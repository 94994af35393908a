"""What rtnetlink refuses, in words."""

from __future__ import annotations

import errno
import os
import struct

from stoker.errors import HostError

__all__ = ["refusal", "said"]


def refusal(number: int, about: str, said: str = "") -> HostError:
    """The error for a refused request: ``link_exists``, ``link_unknown``, ``netlink_denied`` or ``netlink_failed``."""
    reason = f"{os.strerror(number)}{f' ({said})' if said else ''}"
    details = {"errno": errno.errorcode.get(number, str(number))}
    match number:
        case errno.EEXIST | errno.EBUSY:
            return HostError("link_exists", f"{about}: exists already", "ip link; ip address", details=details)
        case errno.ENODEV | errno.ENXIO | errno.ESRCH:
            return HostError("link_unknown", f"{about}: {reason}", details=details)
        case errno.EPERM | errno.EACCES:
            return HostError("netlink_denied", f"{about}: {reason}", "networks of one's own need root", details=details)
        case errno.EOPNOTSUPP | errno.EAFNOSUPPORT:
            return HostError("netlink_unsupported", f"{about}: {reason}", "stoker doctor", details=details)
        case _:
            return HostError("netlink_failed", f"{about}: {reason}", details=details)


def said(payload: bytes) -> str:
    """The kernel's own words in an extended acknowledgement (NLMSGERR_ATTR_MSG), if it gave any."""
    rest = payload[4 + 16 :]
    while len(rest) >= 4:
        length, kind = struct.unpack_from("=HH", rest)
        if length < 4:
            return ""
        if kind & 0x3FFF == 1:
            return rest[4:length].rstrip(b"\0").decode(errors="replace")
        rest = rest[(length + 3) & ~3 :]
    return ""
