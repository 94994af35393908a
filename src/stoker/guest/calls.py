"""Calls over a connection: request numbers, replies, pings, and what becomes of those who wait when the connection is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec import Struct

from stoker.errors import GuestError, StokerError
from stoker.guest import messages as m
from stoker.guest.frames import CALL, PING
from stoker.guest.streams import gone

if TYPE_CHECKING:
    from stoker.guest.channel import Channel

__all__ = ["CALL_TIMEOUT", "Caller"]

CALL_TIMEOUT: Final = 30.0
R = TypeVar("R", bound=Struct)


class _Pending:
    """A call that waits for its reply. ``then`` runs inside the reader, before any frame behind the reply is looked at.

    ``refused`` is for a call nobody waits for any more, but whose failure says that something never came to be.
    """

    __slots__ = ("future", "kind", "refused", "then", "what")

    def __init__(self, future: asyncio.Future[Any], kind: type[Struct], what: str, then: Callable[[Any], None] | None) -> None:
        self.future = future
        self.kind = kind
        self.what = what
        self.then = then
        self.refused: Callable[[], None] | None = None


class Caller:
    """The calling half of an :class:`~stoker.guest.agent.Agent`."""

    def __init__(self, channel: Channel) -> None:
        self._loop = asyncio.get_running_loop()
        self._channel = channel
        self._pending: dict[int, _Pending] = {}
        self._pings: dict[bytes, asyncio.Future[None]] = {}
        self._number = 0
        self.closed = asyncio.Event()
        self.reason: GuestError | None = None

    def post(self, method: str, **arguments: Any) -> None:
        """A call whose result nobody waits for."""
        if self.reason is None:
            self._send_call(m.call(method, **arguments))

    async def call(self, kind: type[R], method: str, timeout: float = CALL_TIMEOUT, **arguments: Any) -> R:
        """A call and its result. Raises what the agent answers instead, ``agent_timeout``, or why the connection is gone."""
        number = self._begin(method, m.call(method, **arguments), kind)
        result: R = await self._finish(number, timeout)
        return result

    def _check(self) -> None:
        if self.reason is not None:
            raise gone(self.reason)

    def _send_call(self, payload: bytes) -> int:
        self._number = (self._number + 1) & 0xFFFFFFFF
        self._channel.send(CALL, self._number, 0, payload)
        return self._number

    def _begin(self, what: str, payload: bytes, kind: type[Struct], then: Callable[[Any], None] | None = None) -> int:
        self._check()
        number = self._send_call(payload)
        self._pending[number] = _Pending(self._loop.create_future(), kind, what, then)
        return number

    async def _finish(self, number: int, timeout: float = CALL_TIMEOUT) -> Any:
        pending = self._pending[number]
        try:
            async with asyncio.timeout(timeout):
                return await pending.future
        except TimeoutError:
            raise GuestError("agent_timeout", f"the guest's agent did not answer {pending.what} within {timeout:g} s") from None
        finally:
            self._pending.pop(number, None)

    def _give_up(self, number: int, pending: _Pending, refused: Callable[[], None]) -> None:
        """Nobody waits for this reply any more; ``refused`` is called should it be an error."""
        if self.reason is None:
            pending.refused = refused
            pending.then = None
            self._pending[number] = pending

    def _on_reply(self, number: int, payload: bytes) -> None:
        pending = self._pending.pop(number, None)
        if pending is None:
            # A posted call, or one that was given up.
            return
        try:
            result = m.reply(pending.kind, payload, pending.what)
            if pending.then is not None:
                pending.then(result)
        except StokerError as e:
            if not pending.future.done():
                pending.future.set_exception(e)
            if pending.refused is not None:
                pending.refused()
            if e.code == "protocol_error":
                raise
        else:
            if not pending.future.done():
                pending.future.set_result(result)

    async def ping(self, timeout: float = 5.0) -> float:
        """The round trip to the agent and back in seconds."""
        self._check()
        self._number = (self._number + 1) & 0xFFFFFFFF
        payload = self._number.to_bytes(8, "little")
        future = self._pings[payload] = self._loop.create_future()
        begin = time.perf_counter()
        self._channel.send(PING, 0, 0, payload)
        try:
            async with asyncio.timeout(timeout):
                await future
        except TimeoutError:
            raise GuestError("agent_timeout", f"the guest's agent did not answer within {timeout:g} s") from None
        finally:
            self._pings.pop(payload, None)
        return time.perf_counter() - begin

    def _on_pong(self, payload: bytes) -> None:
        future = self._pings.pop(payload, None)
        if future is not None and not future.done():
            future.set_result(None)

    def _fail_waiting(self, reason: GuestError) -> None:
        self.reason = reason
        self.closed.set()
        waiting: list[asyncio.Future[Any]] = [pending.future for pending in self._pending.values()]
        for future in (*waiting, *self._pings.values()):
            if not future.done():
                future.set_exception(gone(reason))
                # Whoever waited may have been cancelled; then nobody fetches this, and that is no error.
                future.exception()
        self._pending.clear()
        self._pings.clear()
