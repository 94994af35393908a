"""Machines parked at the door: started, nobody's, and the next create's in every respect."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from crashing import ADMIN, daemon, machines, whole
from engine_fixtures import own_data
from engine_guests import make, opened, run
from stoker.api.models import Origin, SandboxState
from stoker.engine.engine import Engine
from stoker.errors import Conflict
from stoker.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]
S = SandboxState
UNIQUE = ("cat /proc/sys/kernel/random/boot_id", "head -c 32 /dev/urandom | od -x", "cat /proc/sys/kernel/random/uuid", "hostname")


async def said(engine: Engine, name: str, script: str) -> str:
    code, data = await run(engine, name, script)
    assert code == 0, data
    return data.decode()


@pytest.fixture
def own(settings: Settings, short_dir: Path) -> Settings:
    return replace(own_data(settings, short_dir), parked=1)


async def parked(engine: Engine) -> str:
    """The one that waits, once it does. Its kind is known from a create before; golden memory may have to be made first."""
    async with asyncio.timeout(300):
        while not engine._parking.waiting:
            for spot in engine._parking._spots.values():
                spot.again_at = 0.0
            engine._parking._changed.set()
            await asyncio.sleep(0.05)
    [found] = engine._parking.waiting
    return found


async def test_the_next_create_walks_in(own: Settings) -> None:
    async with opened(own) as engine:
        first = await make(engine, name="first")
        waits = await parked(engine)
        assert [box.id for box in (await engine.list(ADMIN)).items] == [first.id] and engine.facts()["sandboxes"] == 1
        assert not engine._core.operations.running
        second = await make(
            engine, name="second", hostname="tower", env={"A": "b"}, user="daemon", workdir="/var", labels={"k": "v"}
        )
        assert (second.id, second.origin, second.state, second.labels) == (waits, Origin.GOLDEN, S.RUNNING, {"k": "v"})
        assert second.owner == first.owner and abs(second.created_at - time.time()) < 60
        assert (
            await said(engine, "second", "hostname; tail -1 /etc/hosts; echo $A; id -un; pwd")
            == "tower\n127.0.1.1\ttower\nb\ndaemon\n/var\n"
        )
        third = await parked(engine)
        assert third != waits and (await make(engine, name="third")).id == third
        for words in UNIQUE:
            assert len({await said(engine, name, words) for name in ("first", "second", "third")}) == 3
        assert (await engine.pause(ADMIN, "third")).state is S.PAUSED
        assert await said(engine, "third", "echo here") == "here\n"
        # Another kind of create is none of its business.
        waits = await parked(engine)
        assert (await make(engine, cold=True)).id != waits and engine._parking.waiting == [waits]
        # A create that is refused takes it along; the next finds another.
        with pytest.raises(Conflict, match="third"):
            await make(engine, name="third")
        assert await parked(engine) != waits
        # Who removes images is not kept from it by what waits over them.
        await engine._parking.clear()
        assert engine._parking.waiting == []
    assert machines(own.run_dir) == set()


async def test_one_that_is_lost_is_made_anew_and_makes_room(own: Settings) -> None:
    async with opened(replace(own, max_sandboxes=2)) as engine:
        await make(engine, name="first")
        box = engine._core.boxes[await parked(engine)]
        # Its supervisor and VMM end behind the engine's back: seen, and forgotten.
        record = (own.run_dir / "sandboxes" / box.id / "shim.json").read_text()
        os.kill(json.loads(record)["vmm"]["pid"], signal.SIGKILL)
        async with asyncio.timeout(30):
            while box.work is not None:
                await asyncio.sleep(0.02)
        other = await parked(engine)
        assert other != box.id
        # It counts, and gives way.
        assert engine._core.admission.totals().sandboxes == 2
        made = await make(engine, cold=True)
        assert made.origin is Origin.BOOT and engine._parking.waiting == []


@pytest.mark.parametrize("point", ["", "create.after_intent", "boot.after_hello", "create.after_running"])
async def test_crashes(own: Settings, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run_dir = own.data_dir, own.run_dir
    monkeypatch.setenv("STOKER_PARKED", "1")
    # The points are passed by the first create, too: the second is the one that walks in.
    async with daemon(data, run_dir, "real", f"{point}:2" if point else "") as first:
        await first.sure(do="create", image="debian:12", name="one")
        await first.sure(do="park")
        if point:
            assert await first.ask(do="create", image="debian:12", name="two") is None, f"{point} was not reached"
    monkeypatch.setenv("STOKER_PARKED", "0")
    async with Engine.open(replace(own, parked=0), trace_kill="") as engine:
        states = await whole(engine, data, run_dir)
        assert states.pop("one") is S.RUNNING and set(states.values()) <= {S.FAILED, S.RUNNING}
        for box in (await engine.list(ADMIN)).items:
            await engine.destroy(ADMIN, box.id)
        assert await whole(engine, data, run_dir) == {}
