"""The sync half of the SDK: one background thread with one event loop, on which the async implementation runs.

A callback of a sync call is run by the thread that made the call, while it waits there: so it may block, print, or use the SDK
itself, and an exception in it comes out of the call.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import select
import selectors
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

__all__ = ["call", "calling_back", "iterate"]

T = TypeVar("T")
CLEAN_UP = 20.0
"""Seconds that something cancelled gets to undo what it did."""


class _Loop:
    """The loop and its thread. A forked child gets its own: threads do not survive a fork."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.selector = selectors.EpollSelector()
        self.loop = asyncio.SelectorEventLoop(self.selector)
        os.register_at_fork(after_in_child=self._forked)
        self.thread = threading.Thread(target=self._run, name="stoker-sdk", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            # What asyncio.run does at its end: generators close the connections they keep.
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self.loop.run_until_complete(asyncio.wait(tasks, timeout=CLEAN_UP))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def _forked(self) -> None:
        """In a child: what our parent's objects do to their loop when they are dropped here must not reach the parent.

        The epoll instance is shared across a fork, and unregistering a socket from it here would make the parent deaf. So an
        empty one takes its number.
        """
        if not self.loop.is_closed():
            with select.epoll() as empty:
                os.dup2(empty.fileno(), self.selector.fileno(), inheritable=False)

    def stop(self) -> None:
        if self.pid == os.getpid() and self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(timeout=CLEAN_UP + 2.0)


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


class _Call(Generic[T]):
    """One coroutine on the loop, and the thread that waits for it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T], on_end: Callable[[], object] = bool
    ) -> None:
        self._loop = loop
        self._on_end = on_end
        self._ended = threading.Event()
        self._task: asyncio.Task[T] | None = None
        loop.call_soon_threadsafe(self._begin, coroutine)

    def _begin(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(coroutine)
        self._task.add_done_callback(self._end)

    def _end(self, _: object) -> None:
        self._ended.set()
        self._on_end()

    def cancel(self) -> None:
        """Cancels it and gives it the time to clean up."""

        def cancel() -> None:
            if self._task is not None:
                self._task.cancel()

        self._loop.call_soon_threadsafe(cancel)
        self._ended.wait(CLEAN_UP)

    def result(self) -> T:
        try:
            self._ended.wait()
        except BaseException:
            self.cancel()
            raise
        assert self._task is not None
        return self._task.result()


def call(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs it on the loop and waits here. Ctrl-C cancels it, and comes out when it has cleaned up."""
    try:
        loop = _loop().loop
    except BaseException:
        coroutine.close()
        raise
    return _Call(loop, coroutine).result()


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
    running = _Call(_loop().loop, start(*arguments, **wrapped, **options), lambda: bridge.queue.put(None))
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
        running.cancel()
        raise
    return running.result()


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
