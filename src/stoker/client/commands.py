"""Commands in a sandbox: run and wait, start and come back, terminals."""

from __future__ import annotations

import asyncio
import base64
import builtins
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from stoker.api.models import ExecRequest, ExecResult, ProcessInfo, ProcessList, StartProcess, Terminal
from stoker.client.api import Api, path
from stoker.client.attachment import Attachment, Offsets
from stoker.client.data import as_bytes
from stoker.client.process import AsyncProcess
from stoker.client.results import CommandResult, CommandTimeout, Data, OnOutput

__all__ = ["AsyncCommands", "AsyncPty", "Command", "open_process", "start_process"]

Command: TypeAlias = str | Sequence[str]
"""A line for ``/bin/sh -c``, or a program and its arguments."""

INLINE = 8 << 20
"""Input up to this size travels inside the request."""
OUTPUT = 16 << 20
ANSWER_GRACE = 30.0
"""Seconds an answer may take beyond the command's own time."""


def _argv(command: Command) -> builtins.list[str]:
    return ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)


def _words(command: Command) -> str:
    if isinstance(command, str):
        return command
    import shlex

    return shlex.join(command)


def _bytes(text: str, encoded: bool) -> bytes:
    return base64.b64decode(text) if encoded else text.encode()


class AsyncCommands:
    """``sandbox.commands``."""

    def __init__(self, api: Api, sandbox: str) -> None:
        self._api = api
        self._sandbox = sandbox

    def _path(self, *rest: object) -> str:
        return path("sandboxes", self._sandbox, *rest)

    async def run(
        self,
        command: Command,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        input: Data | None = None,
        check: bool = False,
        on_stdout: OnOutput | None = None,
        on_stderr: OnOutput | None = None,
        tag: str | None = None,
    ) -> CommandResult:
        """Runs a command and waits for its end.

        ``timeout`` seconds after its start the command is killed and :class:`CommandTimeout` raised (None: it may take for ever).
        With ``check``, an exit code that is not 0 raises :class:`CommandFailed`. ``input`` is its stdin. The result holds the first
        16 MiB of each output; the callbacks get all of it, as text. A command that does not exist is :class:`CommandNotFound`.
        """
        inline = b"" if input is None else as_bytes(input)
        if on_stdout is None and on_stderr is None and inline is not None and len(inline) <= INLINE:
            result = await self._exec(command, env, cwd, user, timeout, None if input is None else inline, tag)
        else:
            request = _start(command, env, cwd, user, timeout, tag, stdin=input is not None)
            result = await self._stream(request, input, on_stdout, on_stderr, _words(command))
        if result.timed_out:
            raise CommandTimeout(result, timeout or 0.0)
        return result.check() if check else result

    async def _exec(
        self,
        command: Command,
        env: Mapping[str, str] | None,
        cwd: str | None,
        user: str | None,
        timeout: float | None,
        stdin: bytes | None,
        tag: str | None,
    ) -> CommandResult:
        request = ExecRequest(
            argv=_argv(command),
            env=dict(env or {}),
            cwd=cwd,
            user=user,
            timeout=timeout,
            tag=tag,
            max_output=OUTPUT,
            stdin=None if stdin is None else base64.b64encode(stdin).decode(),
            stdin_base64=stdin is not None,
        )
        limit = None if timeout is None else timeout + ANSWER_GRACE
        answer = await self._api.call("POST", self._path("exec"), ExecResult, body=request, timeout=limit)
        return CommandResult(
            exit_code=answer.exit_code if answer.exit_code is not None else 128 + (answer.signal or 0),
            stdout_bytes=_bytes(answer.stdout, answer.stdout_base64),
            stderr_bytes=_bytes(answer.stderr, answer.stderr_base64),
            duration=answer.duration_ms / 1000,
            signal=answer.signal,
            timed_out=answer.timed_out,
            truncated=answer.stdout_truncated or answer.stderr_truncated,
            command=_words(command),
        )

    async def _stream(
        self, request: StartProcess, input: Data | None, on_stdout: OnOutput | None, on_stderr: OnOutput | None, words: str
    ) -> CommandResult:
        process = await open_process(self._api, self._sandbox, request, words)
        ended = False
        try:
            feeding = asyncio.create_task(process.feed(input)) if input is not None else None
            try:
                result = await process.wait(on_stdout=on_stdout, on_stderr=on_stderr)
            finally:
                if feeding is not None:
                    feeding.cancel()
                    await asyncio.gather(feeding, return_exceptions=True)
            ended = True
            if feeding is not None and not feeding.cancelled():
                feeding.result()
            return result
        finally:
            if not ended:
                # Whoever runs and waits wants no process that nobody waits for.
                await asyncio.shield(asyncio.wait_for(asyncio.gather(process.kill(), return_exceptions=True), 10.0))
            await process.disconnect()

    async def start(
        self,
        command: Command,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        stdin: bool = False,
        tag: str | None = None,
    ) -> AsyncProcess:
        """Starts a command in the background. It goes on when this client is gone, and ends with its sandbox.

        Its last MiB of output is kept for whoever reads it later. With ``stdin`` it can be written to; ``tag`` names it.
        """
        request = _start(command, env, cwd, user, timeout, tag, stdin=stdin)
        return await start_process(self._api, self._sandbox, request, _words(command))

    async def connect(self, process: int | str) -> AsyncProcess:
        """A handle on a process that is there, by its id or its tag. Its output begins with the oldest byte that is held."""
        info = await self._api.call("GET", self._path("processes", process), ProcessInfo)
        return AsyncProcess(self._api, self._sandbox, info)

    async def list(self, *, tag: str | None = None) -> builtins.list[ProcessInfo]:
        """The processes that run, and those that ended and are remembered."""
        return (await self._api.call("GET", self._path("processes"), ProcessList, query={"tag": tag})).items

    async def kill(self, process: int | str, signal: str | int = "SIGKILL") -> bool:
        """Sends a signal to a process. False: it had ended already."""
        return await (await self.connect(process)).kill(signal)


class AsyncPty:
    """``sandbox.pty``: processes with a terminal."""

    def __init__(self, api: Api, sandbox: str) -> None:
        self._api = api
        self._sandbox = sandbox

    async def create(
        self,
        command: Command = ("/bin/sh", "-l"),
        *,
        rows: int = 24,
        cols: int = 80,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        tag: str | None = None,
    ) -> AsyncProcess:
        """Starts a command on a new terminal. Write to it with ``send_stdin``; all it writes is its ``stdout``."""
        request = _start(command, env, cwd, user, timeout, tag, stdin=True, terminal=Terminal(rows=rows, cols=cols))
        return await start_process(self._api, self._sandbox, request, _words(command))

    async def connect(self, process: int | str) -> AsyncProcess:
        """A terminal that is there, by its process's id or tag."""
        return await AsyncCommands(self._api, self._sandbox).connect(process)

    async def kill(self, process: int | str) -> bool:
        """Hangs up. False: it had ended already."""
        return await AsyncCommands(self._api, self._sandbox).kill(process, "SIGHUP")


def _start(
    command: Command,
    env: Mapping[str, str] | None,
    cwd: str | None,
    user: str | None,
    timeout: float | None,
    tag: str | None,
    *,
    stdin: bool,
    terminal: Terminal | None = None,
) -> StartProcess:
    return StartProcess(
        argv=_argv(command), env=dict(env or {}), cwd=cwd, user=user, timeout=timeout, tag=tag, stdin=stdin, terminal=terminal
    )


async def start_process(api: Api, sandbox: str, request: StartProcess, words: str = "") -> AsyncProcess:
    """Starts a process in the background."""
    info = await api.call("POST", path("sandboxes", sandbox, "processes"), ProcessInfo, body=request)
    return AsyncProcess(api, sandbox, info, offsets=Offsets(0, 0), command=words)


async def open_process(api: Api, sandbox: str, request: StartProcess, words: str = "") -> AsyncProcess:
    """Starts a process and attaches to it in one round trip; it waits for its reader."""
    offsets = Offsets(0, 0)
    attachment = await Attachment.start(api, path("sandboxes", sandbox, "processes", "stream"), request, offsets)
    return AsyncProcess(api, sandbox, attachment.process, offsets=offsets, command=words, attachment=attachment)
