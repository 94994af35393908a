"""A VMM's program that was loaded once, for many machines (``agent/zygote.c`` has what happens in it).

Starting QEMU is half the loader's work, and what the loader wrote to is a sixth of an idle machine's memory. A zygote is a process
of that program that stands before its first function and forks for each machine: the fork becomes the shim, whose child is the VMM.
It is this process's own and ends with it, or before; machines do not. Where there is none, each VMM is started by itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from stoker.errors import HostError
from stoker.host.binaries import zygote_path

__all__ = ["Zygote", "end_zygote", "find_zygote", "want_zygote"]

log = logging.getLogger(__name__)
ROOM: Final = 24 << 10
"""Bytes for a VMM's command line, as others see it."""
PATIENCE: Final = 10.0
MOST_FDS: Final = 96
PACKET: Final = 128 << 10


class Zygote:
    """Made by :meth:`begin`; :meth:`close` ends it."""

    def __init__(self, program: str, key: tuple[int, ...], pid: int, sock: socket.socket) -> None:
        self.program, self.key = program, key
        self._pid = pid
        self._sock = sock
        self._turn = asyncio.Lock()
        self.broken = False

    @classmethod
    async def begin(cls, program: str) -> Zygote:
        """Loads the program. ``zygote_failed`` (HostError) where that cannot be done: it is a script, say."""
        key = _key(program)
        library = str(zygote_path())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fd = theirs.fileno()
            environment = {"LD_PRELOAD": library, "ZYGOTE_FD": str(fd), "ZYGOTE_EXE": os.path.realpath(program)}
            actions: list[tuple[object, ...]] = [(os.POSIX_SPAWN_DUP2, fd, fd), (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0)]
            actions += [(os.POSIX_SPAWN_DUP2, 0, number) for number in (1, 2)]
            try:
                pid = os.posix_spawn(program, [program, " " * ROOM], environment, file_actions=actions)  # noqa: ASYNC221 - a vfork
            except OSError as error:
                ours.close()
                raise HostError("zygote_failed", f"{program}: {error.strerror}") from None
        found = cls(program, key, pid, ours)
        try:
            ours.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * PACKET)
            await found._answer()
        except BaseException:
            await found.close()
            raise
        return found

    @property
    def current(self) -> bool:
        """Whether its program is still the one of this name."""
        return not self.broken and _key(self.program) == self.key

    async def start(self, words: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int], go: int | None) -> int:
        """Starts a shim: its words, ``--``, the VMM's. ``descriptors`` (of this process) have the same numbers there. It begins
        when a byte comes at ``go``.

        Returns a descriptor of the shim's process, the caller's to close. Errors (HostError): ``zygote_failed`` (nothing began),
        ``zygote_silent`` (it may yet).
        """
        passed = list(dict.fromkeys(descriptors))
        variables = [f"{name}={value}" for name, value in environment.items()]
        strings = [",".join(map(str, passed)), str(-1 if go is None else go), *variables, "", *words]
        data = b"".join(os.fsencode(text) + b"\0" for text in strings)
        if len(data) > PACKET or len(passed) > MOST_FDS:
            raise HostError("zygote_failed", f"{len(data)} bytes and {len(passed)} descriptors are too much for one start")
        async with self._turn:
            if self.broken:
                raise HostError("zygote_failed", f"the zygote of {self.program} has ended")
            # Asked once, it is heard out: the next answer must not be taken for this one's.
            asked = asyncio.ensure_future(self._ask(data, passed))
            try:
                process = await asyncio.shield(asked)
            except asyncio.CancelledError:
                self.broken = True
                asked.cancel()
                raise
        if process is None:
            raise HostError("zygote_failed", f"the zygote of {self.program} started nothing")
        return process

    async def _ask(self, data: bytes, passed: list[int]) -> int | None:
        try:
            socket.send_fds(self._sock, [data], passed)
        except OSError as error:
            self.broken = True
            raise HostError("zygote_failed", f"{self.program}: {error.strerror}") from None
        return await self._answer()

    async def _answer(self) -> int | None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def readable() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.add_reader(self._sock, readable)
        try:
            async with asyncio.timeout(PATIENCE):
                await ready
            data, fds, _, _ = socket.recv_fds(self._sock, 64, 1)
        except TimeoutError:
            self.broken = True
            raise HostError("zygote_silent", f"{self.program} has not answered in {PATIENCE:g} s", "do it again") from None
        except OSError:
            data, fds = b"", []
        finally:
            loop.remove_reader(self._sock)
        if not data:
            self.broken = True
            raise HostError("zygote_failed", f"{self.program} does not wait for machines")
        return fds[0] if fds else None

    async def close(self) -> None:
        """It ends by itself, at once; should it not, it is ended."""
        self.broken = True
        self._sock.close()
        pid, self._pid = self._pid, 0
        if pid:
            try:
                await asyncio.to_thread(_reap, pid)
            except ChildProcessError:
                pass


def _reap(pid: int) -> None:
    fd = os.pidfd_open(pid)
    try:
        if not select.select([fd], [], [], 2.0)[0]:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    finally:
        os.close(fd)
    os.waitpid(pid, 0)


def _key(program: str) -> tuple[int, ...]:
    try:
        status = os.stat(program)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns


_found: dict[Path, Zygote] = {}
_failed: dict[str, tuple[int, ...]] = {}
"""Programs (as they are) that do not do it."""
_coming: dict[Path, asyncio.Task[None]] = {}


def find_zygote(run_dir: Path, program: str) -> Zygote | None:
    """The one that :func:`want_zygote` made, if it is of this program."""
    found = _found.get(run_dir)
    return found if found is not None and found.program == program and found.current else None


def want_zygote(run_dir: Path, program: str) -> None:
    """Makes one in the background where there is none; :func:`end_zygote` ends it."""
    if find_zygote(run_dir, program) is None and run_dir not in _coming and _failed.get(program) != _key(program):
        _coming[run_dir] = asyncio.get_running_loop().create_task(_make(run_dir, program), name="zygote")


async def _make(run_dir: Path, program: str) -> None:
    try:
        if (former := _found.pop(run_dir, None)) is not None:
            await former.close()
        _found[run_dir] = await Zygote.begin(program)
    except (HostError, OSError) as error:
        log.info("VMMs are started one by one: %s", error)
        _failed[program] = _key(program)
    finally:
        _coming.pop(run_dir, None)


async def end_zygote(run_dir: Path) -> None:
    if (coming := _coming.get(run_dir)) is not None:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
    if (found := _found.pop(run_dir, None)) is not None:
        await found.close()
