"""The one place that starts other programs and waits for them.

Arguments are lists, never shell strings; standard input is /dev/null unless given; the environment is small and in the C locale
unless given. None of the slow ways to spawn is used (``preexec_fn``, ``user=``: they lose vfork).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import CapacityExhausted, DeadlineExceeded, HostError

__all__ = ["Completed", "describe_exit", "run", "spawn_detached", "tool_environment"]

log = logging.getLogger(__name__)
NO_SPACE = os.strerror(errno.ENOSPC)
LIMIT = 8 << 20


@dataclass(frozen=True, slots=True)
class Completed:
    """How a program ended. ``stdout`` and ``stderr`` hold at most the last 8 MiB."""

    argv: tuple[str, ...]
    code: int
    stdout: bytes
    stderr: bytes


def tool_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment tools run in: PATH with the system directories, HOME, C locale, no terminal questions."""
    path = os.environ.get("PATH", "")
    for directory in ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"):
        if directory not in path.split(":"):
            path = f"{path}:{directory}" if path else directory
    env = {"PATH": path, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    kept = ("HOME", "TMPDIR", "USER", "LOGNAME", "http_proxy", "https_proxy", "no_proxy", "XDG_RUNTIME_DIR", "SSL_CERT_FILE")
    env.update({name: os.environ[name] for name in kept if name in os.environ})
    env.update(extra or {})
    return env


def describe_exit(code: int) -> str:
    """Words for an exit code as asyncio gives it (negative: a signal)."""
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"exited with {code}"


async def _collect(stream: asyncio.StreamReader | None, on_line: Callable[[str], None] | None) -> bytes:
    if stream is None:
        return b""
    kept, partial = bytearray(), b""
    while chunk := await stream.read(65536):
        kept += chunk
        if len(kept) > LIMIT:
            del kept[: len(kept) - LIMIT]
        if on_line is not None:
            *lines, partial = (partial + chunk).replace(b"\r", b"\n").split(b"\n")
            partial = partial[-65536:]
            for line in lines:
                on_line(line.decode(errors="replace"))
    if on_line is not None and partial:
        on_line(partial.decode(errors="replace"))
    return bytes(kept)


async def run(
    argv: Sequence[str | Path],
    *,
    check: bool = True,
    success: Sequence[int] = (0,),
    input: bytes | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
    pass_fds: Sequence[int] = (),
    on_line: Callable[[str], None] | None = None,
) -> Completed:
    """Runs a program to its end. With ``check``, an exit code outside ``success`` raises :class:`HostError` (``tool_failed``), or
    ``no_space`` (:class:`CapacityExhausted`) when that is what it said.

    ``on_line`` sees each line of both outputs as it comes (progress). Cancelled or out of time, the program's whole process
    group gets SIGTERM, and SIGKILL five seconds later.
    """
    words = tuple(str(word) for word in argv)
    log.debug("run %s", shlex.join(words))
    try:
        starting = asyncio.create_subprocess_exec(
            *words,
            stdin=stdin if stdin is not None else asyncio.subprocess.PIPE if input is not None else asyncio.subprocess.DEVNULL,
            stdout=stdout if stdout is not None else asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(env) if env is not None else tool_environment(),
            cwd=cwd,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
        process = await _started(asyncio.ensure_future(starting))
    except FileNotFoundError:
        raise HostError("tool_missing", f"{words[0]} is not installed", "stoker doctor", details={"tool": words[0]}) from None
    except PermissionError as e:
        raise HostError("tool_refused", f"{words[0]} cannot be executed: {e.strerror}", "stoker doctor") from None

    async def feed() -> None:
        if input is not None and process.stdin is not None:
            try:
                process.stdin.write(input)
                await process.stdin.drain()
            except (BrokenPipeError, ConnectionResetError):
                pass
            process.stdin.close()

    try:
        async with asyncio.timeout(timeout):
            _, out, err = await asyncio.gather(feed(), _collect(process.stdout, on_line), _collect(process.stderr, on_line))
            code = await process.wait()
    except TimeoutError:
        await _end(process)
        raise DeadlineExceeded("tool_timeout", f"{words[0]} did not end within {timeout:g} s") from None
    except BaseException:
        await asyncio.shield(asyncio.ensure_future(_end(process)))
        raise
    if check and code not in success:
        last = err.decode(errors="replace").strip().splitlines() or out.decode(errors="replace").strip().splitlines()
        message = f"{words[0]} {describe_exit(code)}: {last[-1][:300] if last else 'it said nothing'}"
        details = {"argv": list(words), "code": code, "stderr": [line[:500] for line in last[-20:]]}
        if any(NO_SPACE in line for line in last):
            raise CapacityExhausted("no_space", message, "stoker rm what is not needed, stoker gc", details=details)
        raise HostError("tool_failed", message, details=details)
    return Completed(words, code, out, err)


async def _started(starting: asyncio.Future[asyncio.subprocess.Process]) -> asyncio.subprocess.Process:
    """Cancelled meanwhile, it is ended: there may be a process before anybody has it."""
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:

        async def unwanted() -> None:
            with suppress(OSError):
                await _end(await starting)

        await asyncio.shield(asyncio.ensure_future(unwanted()))
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    for number, grace in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            async with asyncio.timeout(grace):
                await process.wait()
                break
        except TimeoutError:
            continue
    if process.returncode is None:
        await process.wait()


def spawn_detached(argv: Sequence[str | Path], *, output: int, pass_fds: Sequence[int] = ()) -> int:
    """Starts a program that outlives this one, in a session of its own, with our environment; gives its pid.

    Both its outputs go to ``output``. A thread waits for it, so that a caller that lives long keeps no zombie.
    """
    import subprocess
    import threading

    words = [str(word) for word in argv]
    log.debug("spawn %s", shlex.join(words))
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", pass_fds=tuple(pass_fds), start_new_session=True
        )
    except OSError as e:
        raise HostError("spawn_failed", f"cannot start {words[0]}: {e.strerror}") from e
    threading.Thread(target=process.wait, name=f"wait-{process.pid}", daemon=True).start()
    return process.pid
