"""Runs a command of this host through ``stoker.cli.attach``, as if it ran in a guest.

``local_attach.py [-i] [-t] [--timeout S] COMMAND...``
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

from stoker.cli.attach import Signals, attach
from stoker.cli.terminal import size


@dataclass
class Status:
    code: int | None
    signal: int | None


class PipeSink:
    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer

    async def write(self, data: bytes, /) -> None:
        try:
            self.writer.write(data)
            await self.writer.drain()
        except (BrokenPipeError, ConnectionResetError):
            from stoker.errors import Conflict

            raise Conflict("stdin_closed", "closed") from None

    def close(self) -> None:
        self.writer.close()


class TerminalSink:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    async def write(self, data: bytes, /) -> None:
        os.write(self.fd, data)

    def close(self) -> None:
        os.write(self.fd, b"\x04")


async def chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(65536):
        yield data


async def terminal_chunks(fd: int) -> AsyncIterator[bytes]:
    while True:
        try:
            data = await asyncio.to_thread(os.read, fd, 65536)
        except OSError:
            return
        if not data:
            return
        yield data


class LocalProcess:
    def __init__(self, process: asyncio.subprocess.Process, master: int | None) -> None:
        self.process = process
        self.master = master
        if master is not None:
            self.stdin: PipeSink | TerminalSink = TerminalSink(master)
            self.stdout = terminal_chunks(master)
            self.stderr = terminal_chunks(os.open("/dev/null", os.O_RDONLY))
        else:
            assert process.stdout is not None and process.stderr is not None
            if process.stdin is not None:
                self.stdin = PipeSink(process.stdin)
            self.stdout, self.stderr = chunks(process.stdout), chunks(process.stderr)

    async def wait(self) -> Status:
        # asyncio's own wait() waits for the pipes too, which is what must not be waited for here.
        while (code := self.process.returncode) is None:
            await asyncio.sleep(0.01)
        return Status(code, None) if code >= 0 else Status(None, -code)

    async def signal(self, number: int, /) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    async def resize(self, rows: int, cols: int, /) -> None:
        if self.master is not None:
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
            await self.signal(signal.SIGWINCH)


async def main(words: list[str]) -> int:
    stdin = tty = False
    timeout = None
    while words[0].startswith("-"):
        word = words.pop(0)
        stdin, tty = stdin or word == "-i", tty or word == "-t"
        if word == "--timeout":
            timeout = float(words.pop(0))
    master = slave = None
    if tty:
        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, size())
        # A session's leader that opens a terminal gets it as its own.
        words = ["sh", "-c", 'tty=$1; shift; exec "$@" <>"$tty" >&0 2>&1', "sh", os.ttyname(slave), *words]
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=slave if tty else asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
        stdout=slave if tty else asyncio.subprocess.PIPE,
        stderr=slave if tty else asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    if slave is not None:
        os.close(slave)
    local = LocalProcess(process, master)
    try:
        with Signals(lambda number: sys.exit(128 + number)) as signals:
            return await attach(local, signals, stdin=stdin, tty=tty, timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await local.wait()  # a loop that closes before its child is reaped says so on stderr


if __name__ == "__main__":
    from stoker.errors import StokerError

    try:
        result = asyncio.run(main(sys.argv[1:]))
    except StokerError as e:
        sys.stderr.write(f"{e.code}\n")
        result = 125
    sys.stderr.flush()
    os._exit(result)
