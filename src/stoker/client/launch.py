"""The daemon of this host: found, started when nobody runs one, and ended.

Starting: under the lock ``run_dir/start.lock`` (so that of two clients one starts it and the other waits and finds it) the client
looks once more whether somebody listens, then starts ``python -m stoker.cli serve --auto --ready-fd N`` in a session of its own.
The daemon binds its socket and then writes one line to that descriptor: ``ready``, or an error as JSON; if it dies first the
pipe's end tells. Its log is ``run_dir/daemon.log``; what else it says (a crash of the interpreter) ``run_dir/daemon.out``, emptied
at each start. What a crash leaves: an unlocked lock file, and a socket nobody listens
on, which the next daemon replaces.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.errors import DeadlineExceeded, HostError, StokerError, error_from_wire

if TYPE_CHECKING:
    from stoker.settings import Settings

__all__ = ["DaemonProcess", "listening", "start_daemon", "stop_daemon"]

STOP_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class DaemonProcess:
    """Who listens on a socket: held by a pidfd while it is signalled, so never somebody else with its old number."""

    pid: int
    uid: int


def listening(path: Path) -> DaemonProcess | None:
    """Who listens on a Unix socket; None when nobody does. With socket activation it is the one who bound it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(5.0)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except TimeoutError:
            raise DeadlineExceeded("connect_timeout", f"{path} takes no connection", "stoker daemon restart") from None
        except OSError as e:
            raise HostError("daemon_unreachable", f"cannot connect to {path}: {e.strerror}") from None
        raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid = int.from_bytes(raw[:4], sys.byteorder), int.from_bytes(raw[4:8], sys.byteorder)
    return DaemonProcess(pid, uid)


def _own_directory(path: Path) -> None:
    """Makes the directory; one that is there must be ours, or another user of /tmp could be the daemon."""
    path.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise HostError(
            "directory_not_private",
            f"{path} belongs to another user or others may write to it",
            f"ls -ld {path}; set STOKER_RUN_DIR",
        )


async def start_daemon(settings: Settings) -> None:
    """Returns when a daemon listens on ``settings.socket``: the one that was there, or the one this started."""
    from stoker.host.lock import locked

    timeout = settings.start_timeout
    try:
        _own_directory(settings.run_dir)
    except OSError as e:
        raise HostError("directory_refused", f"cannot make {settings.run_dir}: {e.strerror}", "set STOKER_RUN_DIR") from None
    try:
        async with asyncio.timeout(timeout), locked(settings.run_dir / "start.lock"):
            if listening(settings.socket) is None:
                await _start(settings.run_dir)
    except TimeoutError:
        log = settings.run_dir / "daemon.log"
        hint = f"see {log}; a slow host needs a larger start_timeout"
        raise DeadlineExceeded("daemon_start_timeout", f"the daemon was not ready after {timeout:g} s", hint) from None


async def _start(run_dir: Path) -> None:
    read, write = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(read, False)
    said = run_dir / "daemon.out"
    try:
        try:
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                _spawn(write, output)
            finally:
                os.close(output)
        finally:
            os.close(write)
        line = await _line(read)
    finally:
        os.close(read)
    if line != "ready":
        raise _failure(line, said)


def _spawn(ready: int, output: int) -> None:
    from stoker.host.run import spawn_detached

    # -P: a directory called "stoker" where the user stands must not become the daemon.
    argv = [sys.executable, "-P", "-m", "stoker.cli", "serve", "--auto", "--ready-fd", str(ready)]
    spawn_detached(argv, output=output, pass_fds=(ready,))


async def _line(fd: int) -> str:
    """One line from a pipe, or what there was when it ended."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < 65536:
            await readable.wait()
            readable.clear()
            try:
                piece = os.read(fd, 65536)
            except BlockingIOError:
                continue
            if not piece:
                break
            data += piece
    finally:
        loop.remove_reader(fd)
    return data.decode("utf-8", "replace").strip()


def _failure(line: str, said: Path) -> StokerError:
    import json

    try:
        wire = json.loads(line)
        return error_from_wire(503, wire if isinstance(wire, dict) else {})
    except ValueError:
        words = said.read_text(errors="replace").strip().rpartition("\n")[2][:300] if said.exists() else ""
        message = "the daemon ended before it was ready" + (f": {words}" if words else "")
        return HostError("daemon_start_failed", message, f"see {said.with_suffix('.log')}, or run: stoker serve")


def stop_daemon(pid: int, *, timeout: float = STOP_TIMEOUT) -> bool:
    """Ends the daemon with that number politely and waits. False: it was gone already. Machines live on."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        waiting = select.poll()
        waiting.register(fd, select.POLLIN)
        if waiting.poll(0):
            return False  # it has ended; its parent has not been told yet
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        if not waiting.poll(timeout * 1000):
            raise DeadlineExceeded(
                "daemon_stop_timeout", f"the daemon (pid {pid}) did not end within {timeout:g} s", f"kill -9 {pid}"
            )
    except PermissionError:
        raise HostError("daemon_not_yours", f"the daemon (pid {pid}) belongs to another user") from None
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True
