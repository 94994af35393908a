"""Run and wait, on top of an attachment: collects the output, within bounds."""

from __future__ import annotations

import signal
import time

import anyio
import structlog

from stoker.api.models import ExecRequest, ExecResult, OutputMode, Principal, ProcessInfo, StartProcess
from stoker.errors import Conflict, NotFound, StokerError
from stoker.server.bytes import inline_bytes, inline_text
from stoker.server.ports import Attachment, EngineProtocol

__all__ = ["run_and_wait"]

KILL_TIMEOUT = 5.0
_log = structlog.get_logger("stoker.server")


class _Collected:
    """The first ``limit`` bytes of one output; the rest is read and dropped, so that nothing waits for us."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.parts: list[bytes] = []
        self.size = 0
        self.truncated = False

    def add(self, data: bytes) -> None:
        room = self.limit - self.size
        if len(data) > room:
            self.truncated = True
            data = data[:room]
        if data:
            self.parts.append(data)
            self.size += len(data)


async def _feed(attachment: Attachment, data: bytes) -> None:
    try:
        if data:
            await attachment.write(data)
        await attachment.close_stdin()
    except (Conflict, NotFound):
        pass  # it ended, or does not read: neither is an error of the one who sent it


async def _collect(attachment: Attachment, stdin: bytes | None, out: _Collected, err: _Collected) -> ProcessInfo:
    async with anyio.create_task_group() as tasks:
        if stdin is not None:
            tasks.start_soon(_feed, attachment, stdin)
        while (piece := await attachment.read()) is not None:
            (out if piece.stream == 1 else err).add(piece.data)
        ended = await attachment.wait()
        tasks.cancel_scope.cancel()
    return ended


async def run_and_wait(engine: EngineProtocol, who: Principal, sandbox: str, request: ExecRequest) -> ExecResult:
    """A caller that is cancelled kills the process group."""
    stdin = None if request.stdin is None else await inline_bytes(request.stdin, request.stdin_base64)
    began = time.monotonic()
    attachment = await engine.processes.open(who, sandbox, _process(request, stdin is not None))
    out, err = _Collected(request.max_output), _Collected(request.max_output)
    ended: ProcessInfo | None = None
    try:
        ended = await _collect(attachment, stdin, out, err)
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(KILL_TIMEOUT):
            try:
                if ended is None:
                    await attachment.signal(signal.SIGKILL)
            except StokerError as e:
                _log.info("could not end a command", sandbox=sandbox, code=e.code)
            finally:
                await attachment.aclose()
    stdout, stdout_base64 = await inline_text(b"".join(out.parts))
    stderr, stderr_base64 = await inline_text(b"".join(err.parts))
    return ExecResult(
        id=ended.id,
        exit_code=ended.exit_code,
        signal=ended.signal,
        stdout=stdout,
        stderr=stderr,
        stdout_base64=stdout_base64,
        stderr_base64=stderr_base64,
        stdout_truncated=out.truncated,
        stderr_truncated=err.truncated,
        timed_out=ended.timed_out,
        duration_ms=ended.duration_ms if ended.duration_ms is not None else (time.monotonic() - began) * 1000,
    )


def _process(request: ExecRequest, stdin: bool) -> StartProcess:
    return StartProcess(
        argv=request.argv,
        env=request.env,
        clear_env=request.clear_env,
        cwd=request.cwd,
        user=request.user,
        tag=request.tag,
        umask=request.umask,
        rlimits=request.rlimits,
        timeout=request.timeout,
        stdin=stdin,
        mode=OutputMode.BLOCK,
    )
