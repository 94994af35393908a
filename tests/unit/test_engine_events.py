"""Events: a bounded history, bounded queues, a gap that is told; pages."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stoker.api.models import Event, Principal
from stoker.engine.database import Database
from stoker.engine.events import HISTORY, QUEUE, Events
from stoker.engine.pages import page_after
from stoker.errors import InvalidRequest

pytestmark = pytest.mark.anyio
ADMIN, ONE, TWO = Principal(), Principal(owner="one", admin=False), Principal(owner="two", admin=False)


async def take(stream: object, count: int) -> list[Event]:
    found = []
    async with asyncio.timeout(2):
        async for event in stream:  # type: ignore[attr-defined]
            found.append(event)
            if len(found) == count:
                break
    return found


async def test_everyone_hears_their_own() -> None:
    events = Events()
    async with events.subscribe(ADMIN, None, None) as admin, events.subscribe(ONE, None, None) as one:
        for owner in ("one", "two", "one"):
            events.tell(owner, events.make("sandbox.state", f"sb-{owner}"))
        assert [e.sandbox for e in await take(admin, 3)] == ["sb-one", "sb-two", "sb-one"]
        assert [e.sandbox for e in await take(one, 2)] == ["sb-one", "sb-one"]
    assert [e.sandbox for e in events.since(TWO, None, 0)] == ["sb-two"]


async def test_history_is_bounded_in_memory_and_on_disk(tmp_path: Path) -> None:
    events = Events()
    async with Database.open(tmp_path / "stoker.db") as database:
        for _ in range(HISTORY + 50):
            event = events.make("tick", "sb-a")
            await database.write(lambda db, e=event: events.insert_in(db, e))  # type: ignore[misc]
            events.tell("one", event)
        rows = await database.read(lambda db: db.execute("SELECT sandbox, number, event FROM events ORDER BY number").fetchall())
    kept = events.since(ADMIN, "sb-a", 0)
    assert len(kept) == len(rows) == HISTORY
    again = Events()
    again.load(rows, {"sb-a": "one"}, 0)
    assert again.since(ADMIN, "sb-a", 0) == kept
    assert again.make("next", "sb-a").id > kept[-1].id


async def test_replay_then_live_without_a_gap_or_a_repeat() -> None:
    events = Events()
    told = [events.make("tick", "sb-a") for _ in range(5)]
    for event in told:
        events.tell("one", event)
    async with events.subscribe(ONE, "sb-a", told[1].id) as stream:
        more = events.make("tick", "sb-a")
        events.tell("one", more)
        assert [e.id for e in await take(stream, 4)] == [told[2].id, told[3].id, told[4].id, more.id]


async def test_a_slow_reader_is_told_what_it_missed() -> None:
    events = Events()
    async with events.subscribe(ADMIN, None, None) as stream:
        for _ in range(QUEUE + 10):
            events.tell("one", events.make("tick", "sb-a"))
        first = await take(stream, QUEUE)
        (lost,) = await take(stream, 1)
        assert lost.kind == "events.lost" and lost.data == {"missed": 10} and lost.id == first[-1].id
        events.tell("one", events.make("tick", "sb-a"))
        assert (await take(stream, 1))[0].kind == "tick"


async def test_the_last_word_of_what_is_gone() -> None:
    events = Events()
    events.tell("one", events.make("sandbox.destroyed", "sb-a"))
    events.forget("sb-a")
    assert [e.kind for e in events.since(ONE, None, 0)] == ["sandbox.destroyed"]
    assert events.since(TWO, None, 0) == []


def test_pages_survive_what_comes_and_goes() -> None:
    values = [(float(n), f"v{n}") for n in range(10, 0, -1)]
    page, cursor = page_after(values, 3, None, lambda v: v)
    assert [v[1] for v in page] == ["v10", "v9", "v8"]
    values = [(11.0, "new"), *values[:4], *values[5:]]
    page, cursor = page_after(values, 3, cursor, lambda v: v)
    assert [v[1] for v in page] == ["v7", "v5", "v4"]
    page, cursor = page_after(values, 10, cursor, lambda v: v)
    assert [v[1] for v in page] == ["v3", "v2", "v1"] and cursor is None
    for wrong in ("x", "!!", "bnVsbA", ""):
        with pytest.raises(InvalidRequest) as caught:
            page_after(values, 3, wrong, lambda v: v)
        assert caught.value.code == "bad_cursor"
