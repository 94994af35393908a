"""The sync half of the SDK: one background thread with one event loop, on which the async implementation runs.

A callback of a sync call is run by the thread that made the call, while it waits there: so it may block, print, or use the SDK
itself, and an exception in it comes out of the call.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["call", "calling_back", "iterate"]

T = TypeVar("T")


class _Loop:
    """The loop and its thread. A forked child gets its own: threads do not survive a fork."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="stoker-sdk", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            # What asyncio.run does at its end: generators close the connections they keep.
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def stop(self) -> None:
        if self.pid == os.getpid() and self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(timeout=2.0)


_lock = threading.Lock()
_current: _Loop | None = None


def _loop() -> _Loop:
    global _current
    with _lock:
        if _current is None or _current.pid != os.getpid():
            _current = _Loop()
            atexit.register(_current.stop)
        if threading.current_thread() is _current.thread:
            raise RuntimeError("the sync SDK cannot be used from its own event loop; use the async one there")
        return _current


def call(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs it on the loop and waits here. Ctrl-C cancels it, and it gets the time to clean up."""
    try:
        loop = _loop()
    except BaseException:
        coroutine.close()
        raise
    future = asyncio.run_coroutine_threadsafe(coroutine, loop.loop)
    return _result(future)


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except BaseException:
        if not future.done():
            future.cancel()
        raise


class _Callbacks:
    """Carries calls from the loop to the thread that waits, one at a time, each awaited by the loop."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[None], asyncio.AbstractEventLoop] | None] = (
            queue.SimpleQueue()
        )

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
        async def asynchronous(*arguments: Any) -> None:
            loop = asyncio.get_running_loop()
            done: asyncio.Future[None] = loop.create_future()
            self.queue.put((lambda: function(*arguments), done, loop))
            await done

        return asynchronous


def _finish(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def calling_back(
    start: Callable[..., Coroutine[Any, Any, T]],
    callbacks: dict[str, Callable[..., Any] | None],
    /,
    *arguments: Any,
    **options: Any,
) -> T:
    """Like :func:`call`, for a coroutine that calls back: the callbacks run in this thread."""
    if not any(callbacks.values()):
        return call(start(*arguments, **options))
    bridge = _Callbacks()
    wrapped = {name: bridge.wrap(function) if function else None for name, function in callbacks.items()}
    loop = _loop().loop
    future = asyncio.run_coroutine_threadsafe(start(*arguments, **wrapped, **options), loop)
    future.add_done_callback(lambda _: bridge.queue.put(None))
    try:
        while (item := bridge.queue.get()) is not None:
            function, done, where = item
            error: BaseException | None = None
            try:
                function()
            except Exception as e:  # handed to the coroutine, and through it to our caller
                error = e
            where.call_soon_threadsafe(_finish, done, error)
    except BaseException:
        future.cancel()
        raise
    return _result(future)


def iterate(source: AsyncIterator[T]) -> Iterator[T]:
    """The same iterator for a thread. Leaving it early closes the other end too."""

    async def step() -> tuple[bool, T | None]:
        try:
            return True, await anext(source)
        except StopAsyncIteration:
            return False, None

    try:
        while True:
            more, item = call(step())
            if not more:
                return
            yield item  # type: ignore[misc]
    finally:
        close: Callable[[], Coroutine[Any, Any, None]] | None = getattr(source, "aclose", None)
        if close is not None:
            call(close())
