"""A process in a sandbox, held from outside: wait for it, read it, write to it, let go of it and come back."""

from __future__ import annotations

import asyncio
import base64
import codecs
import inspect
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from stoker.api.models import ProcessInfo, ResizeRequest, SignalRequest, WriteStdin
from stoker.client.api import Api, path
from stoker.client.attachment import Attachment, Offsets
from stoker.client.results import CommandResult, OnOutput, Output
from stoker.errors import Conflict, DeadlineExceeded, HostError, StokerError

if TYPE_CHECKING:
    from stoker.client.files import OnBytes
    from stoker.client.results import Data

__all__ = ["AsyncProcess"]

KEPT = 16 << 20
"""Bytes of each output that a result holds."""
RECONNECT_FOR = 30.0
INLINE = 1 << 20
LOST = frozenset({"connection_lost", "daemon_unreachable", "daemon_silent", "connection_closed"})


class _Text:
    """Feeds a callback with text: a character cut in two by a packet is given whole."""

    def __init__(self, function: OnOutput) -> None:
        self._function = function
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    async def __call__(self, data: bytes, final: bool = False) -> None:
        text = self._decoder.decode(data, final)
        if text:
            result = self._function(text)
            if inspect.isawaitable(result):
                await result


class _Kept:
    """The first so many bytes of an output."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.cut = False

    def add(self, output: Output) -> None:
        room = KEPT - len(self.data)
        self.data += output.data[:room]
        self.cut = self.cut or len(output.data) > room or output.lost > 0


class AsyncProcess:
    """A process by its handle. It goes on when the handle is dropped; a lost connection is taken up again where it broke."""

    def __init__(
        self,
        api: Api,
        sandbox: str,
        info: ProcessInfo,
        *,
        offsets: Offsets | None = None,
        command: str = "",
        attachment: Attachment | None = None,
    ) -> None:
        self._api = api
        self._sandbox = sandbox
        self._info = info
        self._offsets = offsets or Offsets()
        self._command = command or " ".join(info.argv)
        self._attachment = attachment
        self._attaching = asyncio.Lock()
        self._kept = {"stdout": _Kept(), "stderr": _Kept()}
        self._ended = False
        self._reading = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} in {self._sandbox}: {self._command[:60]!r}>"

    @property
    def id(self) -> int:
        """Its number in this sandbox, never used again."""
        return self._info.id

    @property
    def pid(self) -> int:
        """Its PID in the guest."""
        return self._info.pid

    @property
    def tag(self) -> str | None:
        return self._info.tag

    @property
    def info(self) -> ProcessInfo:
        """As it was when something was last heard of it; :meth:`refresh` asks."""
        return self._info

    def _path(self, *rest: str) -> str:
        return path("sandboxes", self._sandbox, "processes", self.id, *rest)

    async def refresh(self) -> ProcessInfo:
        """Asks how it is now."""
        self._info = await self._api.call("GET", self._path(), ProcessInfo)
        return self._info

    async def wait(
        self, *, timeout: float | None = None, on_stdout: OnOutput | None = None, on_stderr: OnOutput | None = None
    ) -> CommandResult:
        """Until it has ended, with what it wrote (the first 16 MiB of each output).

        After ``timeout`` seconds :class:`DeadlineExceeded` (``wait_timeout``); the process goes on. The callbacks get text.
        """
        try:
            async with asyncio.timeout(timeout):
                calls = {"stdout": on_stdout and _Text(on_stdout), "stderr": on_stderr and _Text(on_stderr)}
                if not self._ended:
                    async for output in self:
                        if call := calls[output.stream]:
                            await call(output.data)
                    for call in calls.values():
                        if call:
                            await call(b"", final=True)
        except TimeoutError:
            raise DeadlineExceeded("wait_timeout", f"{self._command or 'the process'} has not ended within {timeout:g} s") from None
        return self._result()

    def _result(self) -> CommandResult:
        info, out, err = self._info, self._kept["stdout"], self._kept["stderr"]
        return CommandResult(
            exit_code=info.exit_code if info.exit_code is not None else 128 + (info.signal or 0),
            stdout_bytes=bytes(out.data),
            stderr_bytes=bytes(err.data),
            duration=(info.duration_ms or 0.0) / 1000,
            signal=info.signal,
            timed_out=info.timed_out,
            truncated=out.cut or err.cut,
            command=self._command,
        )

    def __aiter__(self) -> AsyncIterator[Output]:
        return self._outputs(keep=True)

    def pieces(self) -> AsyncIterator[Output]:
        """Like iterating, but nothing is kept for :meth:`wait`: for output without end in constant memory."""
        return self._outputs(keep=False)

    async def _outputs(self, *, keep: bool) -> AsyncIterator[Output]:
        if self._reading:
            raise Conflict("already_reading", f"somebody reads {self!r} already", "connect to it again for a second reader")
        self._reading = True
        try:
            while not self._ended:
                attachment = await self._attached()
                try:
                    async for output in attachment:
                        if keep:
                            self._kept[output.stream].add(output)
                        yield output
                except HostError as e:
                    attachment.abort()
                    self._attachment = None
                    # Input that was under way may have arrived or not: only a process that is just read is taken up again.
                    if e.code not in LOST or attachment.pending:
                        raise
                    continue
                if attachment.exit is not None:
                    self._info, self._ended = attachment.exit, True
                await self.disconnect()
        finally:
            self._reading = False

    async def _attached(self) -> Attachment:
        async with self._attaching:  # a reader and a writer that begin together share one
            self._attachment = self._attachment or await self._reattach()
            return self._attachment

    async def _reattach(self) -> Attachment:
        deadline = asyncio.get_running_loop().time() + RECONNECT_FOR
        delay = 0.05
        while True:
            try:
                return await Attachment.attach(self._api, self._path("attach"), self._offsets)
            except HostError as e:
                if e.code not in LOST or asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(delay)
            delay = min(delay * 2, 2.0)

    async def send_stdin(self, data: str | bytes, *, timeout: float | None = 60.0) -> None:
        """Writes to its stdin (it was started with ``stdin=True`` or has a terminal). Waits while the guest has no room."""
        raw = data.encode() if isinstance(data, str) else data
        for start in range(0, len(raw), INLINE):
            await self._stdin(raw[start : start + INLINE], close=False, timeout=timeout)

    async def close_stdin(self) -> None:
        """End of input."""
        await self._stdin(b"", close=True, timeout=60.0)

    async def _stdin(self, data: bytes, *, close: bool, timeout: float | None) -> None:
        body = WriteStdin(data=base64.b64encode(data).decode(), base64=True, close=close)
        await self._api.send("POST", self._path("stdin"), body=body, timeout=timeout)

    async def write(self, data: bytes) -> bool:
        """Writes to its stdin in step with the guest, over the connection that reads it. False: nobody reads it any more.

        Somebody must read the process at the same time, or both wait for each other; :meth:`send_stdin` needs nobody.
        """
        return await (await self._attached()).write(data)

    async def end_input(self) -> None:
        """End of input, behind all that :meth:`write` wrote."""
        attachment = await self._attached()
        if not attachment.stdin_closed:
            await attachment.close_stdin()

    async def feed(self, data: Data, *, on_progress: OnBytes | None = None) -> None:
        """Writes everything of a source (bytes, a file, an iterable) and then the end of input, as :meth:`write` does."""
        from stoker.client.data import chunks

        written = 0
        async for piece in chunks(data):
            if not await self.write(piece):
                return
            written += len(piece)
            if on_progress:
                result = on_progress(written)
                if inspect.isawaitable(result):
                    await result
        await self.end_input()

    async def signal(self, signal: str | int, *, group: bool = True) -> None:
        """Sends a signal to its process group, or to it alone."""
        await self._api.send("POST", self._path("signal"), body=SignalRequest(signal=signal, group=group))

    async def kill(self, signal: str | int = "SIGKILL") -> bool:
        """Ends it. False: it had ended already."""
        try:
            await self.signal(signal)
        except Conflict as e:
            if e.code != "process_ended":
                raise
            return False
        return True

    async def resize(self, rows: int, cols: int) -> None:
        """The terminal's new size."""
        await self._api.send("POST", self._path("resize"), body=ResizeRequest(rows=rows, cols=cols))

    async def disconnect(self) -> None:
        """Lets go of its output. It goes on; reading again continues where this stopped."""
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            try:
                await attachment.close()
            except StokerError:
                attachment.abort()
