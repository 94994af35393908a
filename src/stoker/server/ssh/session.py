"""A session of ssh: a shell, a command or sftp, as a process of the guest."""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import structlog
from asyncssh import SSHServerSession
from msgspec.structs import replace

from stoker.api.models import SandboxState, StartProcess, Terminal
from stoker.api.ssh import DEFAULT_USER
from stoker.errors import Conflict, StokerError, exit_code
from stoker.server.ssh.pump import EXTENDED_STDERR, Pump

if TYPE_CHECKING:
    from stoker.api.models import Principal
    from stoker.server.ports import Attachment, EngineProtocol

__all__ = ["Environment", "Guest", "Session"]

_log = structlog.get_logger("stoker.ssh")
ACCEPTED = re.compile(rb"LANG|LANGUAGE|LC_\w{1,32}|COLORTERM|NO_COLOR|TZ")
"""Variables that a client may set, as with an sshd's AcceptEnv; TERM comes with the terminal."""
MOST_VARIABLES, LONGEST_VALUE = 32, 1024
SHELL = 'case "$SHELL" in ""|*/nologin|*/false) SHELL=/bin/sh;; esac; exec "$SHELL" '
"""Whoever may use a sandbox may be anybody in it: a user whose shell says no gets one all the same."""
KNOWN = frozenset({"ABRT", "ALRM", "FPE", "HUP", "ILL", "INT", "KILL", "PIPE", "QUIT", "SEGV", "TERM", "USR1", "USR2"})
"""Signals with a name in ssh's protocol (RFC 4254)."""
HANG_UP = 5.0
MOST_SAID = 16 << 10


class Environment(dict[bytes, bytes]):
    """What a client sets; what is not accepted, or too much, is dropped as it comes."""

    def __setitem__(self, name: bytes, value: bytes) -> None:
        if ACCEPTED.fullmatch(name) and len(value) <= LONGEST_VALUE and b"\0" not in value and len(self) < MOST_VARIABLES:
            super().__setitem__(name, value)


class Guest:
    """The sandbox that a connection is to, and who asks. ``sandbox`` is its id; ``check`` raises once they may not any more."""

    def __init__(self, engine: EngineProtocol, who: Principal, sandbox: str, check: Callable[[], Awaitable[object]]) -> None:
        self.engine, self.who, self.sandbox, self.check = engine, who, sandbox, check
        self.user: str | None = None
        self.let_run = False
        """Nobody is hung up: it is the daemon that goes away."""

    def log_in(self, name: str) -> None:
        self.user = None if name == DEFAULT_USER else name

    async def shell(self, command: str | None, env: dict[str, str], terminal: Terminal | None) -> Attachment:
        """A login shell, or a command by the user's shell; in the user's home, if there is one."""
        words = [SHELL + "-l"] if command is None else [SHELL + '-c "$1"', "sh", command]
        request = StartProcess(
            argv=["/bin/sh", "-c", *words], env=env, user=self.user, cwd="~", stdin=True, terminal=terminal, tag="ssh"
        )
        try:
            return await self._start(request)
        except StokerError as error:
            # An image without a shell has programs all the same.
            if error.code != "no_such_command" or command is None:
                raise
            try:
                argv = shlex.split(command)
            except ValueError:
                raise error from None
            if not argv:
                raise
            return await self._start(replace(request, argv=argv))

    async def _start(self, request: StartProcess) -> Attachment:
        processes = self.engine.processes
        try:
            return await processes.open(self.who, self.sandbox, request, lossless=True)
        except StokerError as error:
            if error.code != "no_such_directory":
                raise
            return await processes.open(self.who, self.sandbox, replace(request, cwd="/"), lossless=True)

    async def sftp(self) -> Attachment:
        return await self.engine.processes.sftp(self.who, self.sandbox, self.user)

    async def hang_up(self, attachment: Attachment) -> None:
        """The client is gone: what it ran gets SIGHUP, as from a terminal. A machine that was put away is left alone."""
        if self.let_run:
            return
        try:
            async with asyncio.timeout(HANG_UP):
                if (await self.engine.get(self.who, self.sandbox)).state is SandboxState.RUNNING:
                    await attachment.signal(signal.SIGHUP)
        except (StokerError, TimeoutError) as error:
            _log.debug("not hung up", sandbox=self.sandbox, why=str(error))


class Session(Pump, SSHServerSession[bytes]):
    """One channel. asyncssh calls the methods without an underscore; ``spawn`` starts a task that the connection looks after."""

    def __init__(self, guest: Guest, spawn: Callable[[Any], asyncio.Task[None]]) -> None:
        super().__init__()
        self._guest = guest
        self._spawn = spawn
        self._terminal: Terminal | None = None
        self._term = ""
        self._command: str | None = None
        self._sftp = False
        self._said = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._asked: asyncio.Queue[tuple[str, int, int]] = asyncio.Queue(64)

    # -- what the client asks for ---------------------------------------------------------------------------------------

    def pty_requested(self, term_type: str, term_size: tuple[int, int, int, int], term_modes: Any) -> bool:
        self._term = term_type[:64]
        self._terminal = _terminal(term_size[0], term_size[1])
        return True

    def shell_requested(self) -> bool:
        return True

    def exec_requested(self, command: str) -> bool:
        self._command = command
        return "\0" not in command

    def subsystem_requested(self, subsystem: str) -> bool:
        self._sftp = subsystem == "sftp"
        return self._sftp

    def session_started(self) -> None:
        self._task = self._spawn(self._run())

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        if self._terminal is not None:
            self._terminal = _terminal(width, height)
            self._ask("resize", self._terminal.rows, self._terminal.cols)

    def signal_received(self, signal: str) -> None:
        number = _number(signal)
        if number is not None:
            self._ask("signal", number, 0)

    def break_received(self, msec: int) -> bool:
        return False

    def _ask(self, *what: Any) -> None:
        try:
            self._asked.put_nowait(what)
        except asyncio.QueueFull:
            pass  # the guest does not keep up with its own terminal's size

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    # -- what is done ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            attachment = await self._open()
        except StokerError as error:
            self._fail(error)
            return
        ended = False
        work = [asyncio.ensure_future(self.feed(attachment)), asyncio.ensure_future(self._control(attachment))]
        try:
            await self.drain(attachment)
            status = await attachment.wait()
            ended = True
            if self._sftp and status.exit_code != 0:
                self._fail(self._applet_failed(status.exit_code, status.signal))
            else:
                self._exit(status.exit_code, status.signal)
        except StokerError as error:
            ended = True
            self._fail(error)
        except BrokenPipeError:
            pass  # the client has closed the channel
        finally:
            for task in work:
                task.cancel()
            await asyncio.shield(self._spawn(self._leave(attachment, ended=ended)))

    async def _open(self) -> Attachment:
        await self._guest.check()
        if self._sftp:
            return await self._guest.sftp()
        env = {name: value for name, value in self.chan.get_environment().items() if isinstance(value, str)}
        if self._terminal is not None and self._term:
            env["TERM"] = self._term
        return await self._guest.shell(self._command, env, self._terminal)

    def send_error(self, data: bytes) -> None:
        if not self._sftp:
            super().send_error(data)
        elif len(self._said) < MOST_SAID:
            self._said += data

    def _applet_failed(self, code: int | None, number: int | None) -> StokerError:
        """What the agent's applet says on stderr is not for people."""
        from stoker.guest.files import applet_error

        error = applet_error("sftp", code, number, bytes(self._said))
        if error.code == "unsupported":
            error.hint = "its agent is older than that: stop and start the sandbox, or use scp -O or stoker cp"
        return error

    async def _leave(self, attachment: Attachment, *, ended: bool) -> None:
        if not ended:
            try:
                await attachment.close_stdin()
            except StokerError:
                pass
            await self._guest.hang_up(attachment)
        await attachment.aclose()

    async def _control(self, attachment: Attachment) -> None:
        while True:
            what, first, second = await self._asked.get()
            try:
                if what == "resize":
                    await attachment.resize(first, second)
                else:
                    await attachment.signal(first)
            except Conflict:
                pass  # it has just ended
            except StokerError as error:
                _log.debug("refused", what=what, why=str(error))

    def _exit(self, code: int | None, number: int | None) -> None:
        name = signal.Signals(number).name[3:] if number in set(signal.Signals) else ""
        if name in KNOWN:
            self.chan.exit_with_signal(name)
        else:
            self.chan.exit(code if code is not None else 128 + (number or 0))

    def _fail(self, error: StokerError) -> None:
        """What went wrong, for the client's stderr."""
        hint = f" ({error.hint})" if error.hint else ""
        try:
            self.chan.write(f"stoker: {error.message}{hint}\r\n".encode(), None if self._terminal else EXTENDED_STDERR)
        except BrokenPipeError:
            return  # nobody is there to read it
        self.chan.exit(exit_code(error))


def _terminal(width: int, height: int) -> Terminal:
    return Terminal(rows=min(max(height, 1), 4096) if height else 24, cols=min(max(width, 1), 4096) if width else 80)


def _number(name: str) -> int | None:
    try:
        return signal.Signals[f"SIG{name}"].value
    except KeyError:
        return None
