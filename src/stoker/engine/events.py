"""What happened, for whoever looks on: a bounded history of each sandbox and a bounded queue for each subscriber.

An event is written in the transaction of the change it tells of and is told after the commit. Ids grow through the whole engine's
life and are never used twice, restarts included.
"""

from __future__ import annotations

import asyncio
import heapq
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from stoker.api.models import Event, Principal

__all__ = ["HISTORY", "QUEUE", "Events"]

HISTORY = 256
"""Events kept of each sandbox, and of all that are gone together."""
QUEUE = 1024


class _Subscriber:
    """One reader's queue. What does not fit is counted, and told in one event."""

    def __init__(self, who: Principal, sandbox: str | None) -> None:
        self.who, self.sandbox = who, sandbox
        self.queue: deque[Event] = deque()
        self.missed = 0
        self.last = 0
        self.ready = asyncio.Event()

    def wants(self, owner: str, event: Event) -> bool:
        return (self.who.admin or owner == self.who.owner) and self.sandbox in (None, event.sandbox)

    def put(self, event: Event) -> None:
        if len(self.queue) >= QUEUE:
            self.missed += 1
        elif self.missed:
            # The gap is told in its place: before the first event after it, with the id of the last one before it.
            self.queue.append(Event(id=self.last, at=event.at, kind="events.lost", data={"missed": self.missed}))
            self.missed = 0
            self._append(event)
        else:
            self._append(event)
        self.ready.set()

    def _append(self, event: Event) -> None:
        self.queue.append(event)
        self.last = event.id

    async def stream(self) -> AsyncIterator[Event]:
        while True:
            while self.queue:
                yield self.queue.popleft()
            if self.missed:
                missed, self.missed = self.missed, 0
                yield Event(id=self.last, at=time.time(), kind="events.lost", data={"missed": missed})
                continue
            self.ready.clear()
            await self.ready.wait()


class Events:
    """Used from the event loop, except :meth:`insert_in`, which is a part of somebody's transaction."""

    def __init__(self) -> None:
        self._last = 0
        self._kept: dict[str, deque[Event]] = {}
        self._gone: deque[tuple[str, Event]] = deque(maxlen=HISTORY)
        self._owners: dict[str, str] = {}
        self._subscribers: set[_Subscriber] = set()

    def load(self, rows: Iterable[tuple[str, int, str]], owners: dict[str, str], last: int) -> None:
        """What the database kept: (sandbox, number, JSON), ascending."""
        self._owners.update(owners)
        for sandbox, number, text in rows:
            self._last = max(self._last, number)
            self._kept.setdefault(sandbox, deque(maxlen=HISTORY)).append(msgspec.json.decode(text.encode(), type=Event))
        self._last = max(self._last, last)

    def make(self, kind: str, sandbox: str | None, **data: Any) -> Event:
        self._last += 1
        return Event(id=self._last, at=time.time(), kind=kind, sandbox=sandbox, data=data)

    @staticmethod
    def insert_in(db: sqlite3.Connection, event: Event) -> None:
        db.execute(
            "INSERT OR REPLACE INTO events (sandbox, number, event) VALUES (?, ?, ?)",
            (event.sandbox, event.id, msgspec.json.encode(event).decode()),
        )
        db.execute(
            "DELETE FROM events WHERE sandbox = ?1 AND number <="
            f" (SELECT number FROM events WHERE sandbox = ?1 ORDER BY number DESC LIMIT 1 OFFSET {HISTORY})",
            (event.sandbox,),
        )

    def tell(self, owner: str, event: Event) -> None:
        """Keeps it and gives it to the subscribers. Its change is committed."""
        if event.sandbox is not None:
            self._owners[event.sandbox] = owner
            self._kept.setdefault(event.sandbox, deque(maxlen=HISTORY)).append(event)
        for subscriber in self._subscribers:
            if subscriber.wants(owner, event):
                subscriber.put(event)

    def forget(self, sandbox: str) -> None:
        """The sandbox is gone. Its last words stay a while among those of all that are gone."""
        owner = self._owners.pop(sandbox, "")
        kept = self._kept.pop(sandbox, None)
        if kept:
            self._gone.append((owner, kept[-1]))

    def since(self, who: Principal, sandbox: str | None, after: int) -> list[Event]:
        """What is kept and newer than ``after``, oldest first."""
        kept = [
            events
            for name, events in self._kept.items()
            if sandbox in (None, name) and (who.admin or self._owners.get(name) == who.owner)
        ]
        gone = [event for owner, event in self._gone if (who.admin or owner == who.owner) and sandbox in (None, event.sandbox)]
        return [event for event in heapq.merge(*kept, gone, key=lambda event: event.id) if event.id > after]

    @asynccontextmanager
    async def subscribe(self, who: Principal, sandbox: str | None, after: int | None) -> AsyncIterator[AsyncIterator[Event]]:
        """Events from now on; with ``after`` first what is kept."""
        subscriber = _Subscriber(who, sandbox)
        if after is not None:
            for event in self.since(who, sandbox, after)[-QUEUE:]:
                subscriber.put(event)
        self._subscribers.add(subscriber)
        stream = subscriber.stream()
        try:
            yield stream
        finally:
            self._subscribers.discard(subscriber)
            await stream.aclose()  # type: ignore[attr-defined]
