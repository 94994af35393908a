"""A local address that leads to a port inside a sandbox, by the daemon: no network of the sandbox's is needed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.client.attachment import Attachment, Offsets
from stoker.errors import HostError, StokerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stoker.client.api import Api

__all__ = ["AsyncForward"]

READ = 64 << 10


class AsyncForward:
    """Listens until it is closed; use it with ``async with``. Each connection taken is one to the port in the sandbox."""

    def __init__(self, api: Api, target: str, on_error: Callable[[StokerError], object] | None = None) -> None:
        self._api, self._target, self._on_error = api, target, on_error
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._path: Path | None = None
        self._where = ""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._where}>"

    async def __aenter__(self) -> AsyncForward:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def address(self) -> str:
        """``HOST:PORT``, or the path of a Unix socket."""
        return self._where

    @property
    def port(self) -> int:
        """The local port; 0 of a Unix socket."""
        return int(self._where.rpartition(":")[2]) if self._path is None else 0

    async def _listen(self, local: str) -> AsyncForward:
        try:
            if "/" in local:
                self._server = await asyncio.start_unix_server(self._take, local, limit=READ)
                self._path, self._where = Path(local), local
            else:
                host, _, port = local.rpartition(":")
                host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
                self._server = await asyncio.start_server(self._take, host, int(port), limit=READ)
                self._where = f"{host}:{self._server.sockets[0].getsockname()[1]}"
        except (OSError, ValueError, OverflowError) as error:
            raise HostError("cannot_listen", f"cannot listen on {local}: {getattr(error, 'strerror', None) or error}") from None
        return self

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._relay(reader, writer)
        except StokerError as error:
            if self._on_error is not None:
                self._on_error(error)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        attachment = await Attachment.attach(self._api, self._target, Offsets(0, 0))

        async def send() -> None:
            while data := await reader.read(READ):
                if not await attachment.write(data):
                    return
            await attachment.close_stdin()

        sending = asyncio.create_task(send())
        try:
            async for output in attachment:
                writer.write(output.data)
                await writer.drain()
            # The other end has closed.
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            attachment.abort() if attachment.exit is None else await attachment.close()

    async def close(self) -> None:
        """Listens no more, and ends the connections there are. May be called again."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._path is not None:
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass


async def listen(api: Api, target: str, local: str, on_error: Callable[[StokerError], object] | None = None) -> AsyncForward:
    """Listens on ``HOST:PORT`` (port 0: any free one) or the path of a Unix socket."""
    return await AsyncForward(api, target, on_error)._listen(local)
