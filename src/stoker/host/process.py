"""Which process is meant: number, start time and executable, held by a pidfd. A bare number is never enough.

Start times are field 22 of ``/proc/PID/stat`` (clock ticks since boot), so an identity is good for one boot of the host:
whoever writes one to disk writes :func:`boot_id` beside it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["ProcessIdentity", "boot_id", "descriptor_of", "send_signal", "wait_pidfd"]

_libc = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD = 438


@cache
def boot_id() -> str:
    """The kernel's name for this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> tuple[str, int]:
    """State letter and start time; :class:`ProcessLookupError` when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    # The second field is the name in parentheses, and may itself hold blanks and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def _executable(pid: int) -> str:
    """Empty where it cannot be told: another user's process, or one that is ending."""
    try:
        return os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process of this boot. ``exe`` is empty where it could not be told, and then not compared."""

    pid: int
    start: int
    exe: str = ""

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """The process that has this number now; :class:`ProcessLookupError` when none has."""
        _, start = _stat(pid)
        return cls(pid, start, _executable(pid))

    def alive(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        try:
            state, start = _stat(self.pid)
        except ProcessLookupError:
            return False
        if start != self.start or state in "ZX":
            return False
        exe = _executable(self.pid) if self.exe else ""
        return not exe or exe == self.exe

    def open_pidfd(self) -> int:
        """A descriptor that means this process for good. :class:`ProcessLookupError` when it is gone, also as a zombie."""
        fd = os.pidfd_open(self.pid)
        # The number may have been given away between our reading it and now; the descriptor cannot change any more.
        if not self.alive():
            os.close(fd)
            raise ProcessLookupError(f"process {self.pid} started at {self.start} is gone")
        return fd


def descriptor_of(pidfd: int, number: int) -> int:
    """A copy of another process's descriptor: pidfd_getfd(2), which wants ptrace rights. OSError."""
    found = int(_libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def send_signal(pidfd: int, number: int) -> bool:
    """Sends a signal; false when the process is gone already."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True


async def wait_pidfd(pidfd: int) -> None:
    """Returns when the process has ended. Any number may wait, on descriptors of their own: a duplicate is made."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    fd = os.dup(pidfd)

    def readable() -> None:
        loop.remove_reader(fd)
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(fd, readable)
    try:
        await ended
    finally:
        loop.remove_reader(fd)
        os.close(fd)
