"""The daemon's sockets: its own Unix socket, those systemd passes, and TCP where asked for.

``run_dir/stoker.sock`` is bound under a draft name with its mode and group already right, and renamed into place: a client
never meets one it may not use, and one that a dead daemon left is replaced. ``run_dir/daemon.lock`` (flock, never removed)
makes sure that there is one daemon for a run_dir. A crash leaves the socket, and perhaps a draft ``.stoker.sock.PID``, which
the next start removes.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path

from stoker.errors import HostError, InvalidRequest
from stoker.host.lock import try_flock

__all__ = ["activated_sockets", "bind_tcp", "bind_unix", "listens", "notify", "prepare_run_dir", "remove_unix", "take_lock"]

BACKLOG = 1024
SUN_PATH = 107
FIRST_FD = 3


def prepare_run_dir(path: Path) -> None:
    """Makes it, and refuses one that another user could have put there."""
    root = os.geteuid() == 0
    try:
        mode = 0o755 if root else 0o700
        with suppress(FileExistsError):
            path.mkdir(mode=mode, parents=True)
            path.chmod(mode)
        status = path.lstat()
    except OSError as e:
        raise HostError("directory_refused", f"cannot make {path}: {e.strerror}", "set STOKER_RUN_DIR") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise HostError("directory_refused", f"{path} belongs to another user, or others may write to it", "set STOKER_RUN_DIR")


def listens(path: Path) -> bool:
    """Whether a daemon takes connections there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except TimeoutError:
            return True
        except OSError:
            return False
    return True


def take_lock(path: Path, sock: Path, patience: float = 20.0) -> int:
    """The lock's descriptor. A daemon that is just ending (it listens no more) is waited for. Blocks: before the loop runs."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + patience
    while not try_flock(fd):
        if listens(sock) or time.monotonic() > deadline:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise HostError(
                "daemon_running", f"a daemon (pid {holder or '?'}) runs on {sock.parent} already", "stoker daemon status"
            )
        time.sleep(0.1)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def bind_unix(path: Path, group: int | None) -> socket.socket:
    """Listens, in place. Only with the daemon's lock."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    if len(os.fsencode(draft)) > SUN_PATH:
        raise HostError(
            "path_too_long", f"{path} is too long for a socket ({SUN_PATH} bytes)", "set STOKER_RUN_DIR to a shorter path"
        )
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        mask = os.umask(0o177)
        try:
            sock.bind(str(draft))
        finally:
            os.umask(mask)
        if group is not None:
            try:
                os.chown(draft, -1, group)
            except PermissionError:
                group = None
        os.chmod(draft, 0o600 if group is None else 0o660)
        sock.listen(BACKLOG)
        os.rename(draft, path)
    except BaseException as e:
        sock.close()
        draft.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise HostError("cannot_listen", f"cannot listen on {path}: {e.strerror}") from None
        raise
    return sock


def remove_unix(path: Path, inode: int) -> None:
    """Takes the name away, if it is still that of our socket, which is closed by now."""
    with suppress(OSError):
        if path.lstat().st_ino == inode:
            path.unlink()


def bind_tcp(address: str) -> socket.socket:
    """``HOST:PORT``, ``[IPV6]:PORT`` or ``:PORT`` (loopback)."""
    host, found, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if not found or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise InvalidRequest("bad_address", f"{address!r} is not HOST:PORT", "such as 127.0.0.1:7070")
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, proto)
    except OSError as e:
        raise HostError("cannot_listen", f"cannot listen on {address}: {e.strerror or e}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except OSError as e:
        sock.close()
        hint = "another program has the port" if e.errno == errno.EADDRINUSE else ""
        raise HostError("cannot_listen", f"cannot listen on {address}: {e.strerror}", hint) from None
    return sock


def activated_sockets(environ: dict[str, str], pid: int) -> list[socket.socket]:
    """Those that systemd passed to this very process."""
    if environ.get("LISTEN_PID") != str(pid) or not environ.get("LISTEN_FDS", "").isdigit():
        return []
    sockets = [socket.socket(fileno=fd) for fd in range(FIRST_FD, FIRST_FD + int(environ["LISTEN_FDS"]))]
    for sock in sockets:
        sock.setblocking(False)
        sock.set_inheritable(False)
    return sockets


def notify(environ: dict[str, str], message: str) -> None:
    """Tells systemd, where there is one that wants to know (sd_notify)."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.sendto(message.encode(), "\0" + address[1:] if address[0] == "@" else address)
