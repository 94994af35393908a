"""Who is asking.

A Unix socket's peer is known by the kernel's word, taken when the connection was accepted (:mod:`stoker.server.protocol` puts it
into the connection's state). Everyone else shows an API key; so may a Unix peer, who then is that key's owner.
"""

from __future__ import annotations

import ctypes
import errno
import grp
import hashlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from stoker.api.models import ApiKey, Principal
from stoker.errors import Forbidden, Unauthenticated
from stoker.server.bodies import header

__all__ = ["GROUP", "Peer", "api_key", "group_id", "identify", "peer_of"]

GROUP = "stoker"
SO_PEERGROUPS = 59
MAX_GROUPS = 65536
"""The kernel's own limit (NGROUPS_MAX)."""
MAX_KEY = 256
_UCRED = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a Unix socket, as it was when it connected."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int]


def peer_of(sock: socket.socket) -> Peer | None:
    """None when it is not a Unix socket, or the kernel does not say."""
    if sock.family != socket.AF_UNIX:
        return None
    try:
        pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    except OSError:
        return None
    return Peer(pid, uid, gid, _groups(sock))


def _groups(sock: socket.socket) -> frozenset[int]:
    """A peer's supplementary groups."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)  # Python takes no longer answer
    except OSError as e:
        if e.errno != errno.ERANGE:
            return frozenset()  # before Linux 4.13 there is none; the primary group still counts
        buffer = (ctypes.c_uint * MAX_GROUPS)()
        size = ctypes.c_uint(ctypes.sizeof(buffer))
        if ctypes.CDLL(None).getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, buffer, ctypes.byref(size)):
            return frozenset()
        raw = bytes(buffer)[: size.value]
    return frozenset(struct.unpack(f"{len(raw) // 4}I", raw))


def group_id(name: str = GROUP) -> int | None:
    """The group whose members may use the daemon; None where the host has none."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def api_key(headers: list[tuple[bytes, bytes]]) -> str | None:
    """The key a request shows: ``Authorization: Bearer`` before ``X-API-Key``."""
    value = header(headers, b"authorization")
    if value is not None:
        scheme, _, credentials = value.partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated(
                "bad_authorization", "the Authorization header is not a Bearer token", "send: Authorization: Bearer KEY"
            )
        return credentials.strip()
    return header(headers, b"x-api-key")


def _trusted(peer: Peer, group: int | None) -> bool:
    return peer.uid in (0, os.geteuid()) or (group is not None and (peer.gid == group or group in peer.groups))


async def identify(
    peer: Peer | None, key: str | None, group: int | None, find_key: Callable[[bytes], Awaitable[ApiKey | None]]
) -> Principal:
    """The principal, or why there is none. A key that is shown is what counts, even a wrong one."""
    if key is not None:
        if not key or len(key) > MAX_KEY or not key.isascii() or not key.isprintable():
            raise Unauthenticated("bad_key", "the API key is not one", "make one with: stoker key create")
        # What is looked up is a hash of what was shown, so the time it takes tells nothing about a secret that exists.
        found = await find_key(hashlib.sha256(key.encode()).digest())
        if found is None:
            raise Unauthenticated("bad_key", "the API key is wrong or revoked", "make one with: stoker key create")
        return Principal(owner=found.id, admin=False)
    if peer is None:
        raise Unauthenticated(
            "key_required", "an API key is required here", "send: Authorization: Bearer KEY (stoker key create makes one)"
        )
    if not _trusted(peer, group):
        raise Forbidden("peer_refused", f"user {peer.uid} may not use this daemon", f"add the user to the group {GROUP}")
    return Principal(owner="local", admin=True, uid=peer.uid)
