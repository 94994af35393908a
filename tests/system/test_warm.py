"""Warm sets: creates take over machines that wait, no two of them are twins, and nothing of a set is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from crashing import ADMIN, daemon, machines, whole
from engine_fixtures import own_data
from engine_guests import make, opened, run
from stoker.api.models import CreateSandbox, Origin, Sandbox, SandboxState, SetWarm, WarmSet
from stoker.engine.engine import Engine
from stoker.errors import CapacityExhausted, Conflict, InvalidRequest, NotFound
from stoker.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]
S = SandboxState
MIB = 1 << 20
WANTED = CreateSandbox(image="debian:12", memory=256 * MIB)
UNIQUE = (
    "cat /proc/sys/kernel/random/boot_id",
    "head -c 32 /dev/urandom | od -x",
    "cat /proc/sys/kernel/random/uuid",
    "hostname",
)


async def said(engine: Engine, name: str, script: str) -> str:
    code, data = await run(engine, name, script)
    assert code == 0, data
    return data.decode()


async def warm(engine: Engine, size: int, request: CreateSandbox = WANTED) -> WarmSet:
    return await engine.warm.set(ADMIN, SetWarm(sandbox=request, size=size))


async def waiting(engine: Engine, ready: int) -> None:
    """Until exactly so many machines wait."""
    async with asyncio.timeout(180):
        while sum(one.ready for one in await engine.warm.list(ADMIN)) != ready:
            await asyncio.sleep(0.02)


async def off(engine: Engine) -> None:
    for one in await engine.warm.list(ADMIN):
        await engine.warm.remove(ADMIN, one.id)
    # One that is just being made is thrown away when it is done.
    async with asyncio.timeout(60):
        while engine._core.boxes:
            await asyncio.sleep(0.02)


def hidden(engine: Engine) -> list[str]:
    return [box.id for box in engine._core.boxes.values() if box.record.warm]


async def test_creates_take_what_waits_and_are_no_twins(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        await warm(engine, 2)
        await waiting(engine, 2)
        assert (await engine.list(ADMIN)).items == [] and (await engine.latest_metrics(ADMIN)) == {}
        assert engine.facts()["sandboxes"] == 0 and engine._core.admission.totals().sandboxes == 2
        for identity in hidden(engine):
            with pytest.raises(NotFound):
                await engine.get(ADMIN, identity)
        one, two = await asyncio.gather(
            make(engine, name="one", env={"A": "b"}, labels={"k": "v"}),
            make(engine, name="two", hostname="tower", user="daemon", workdir="/var"),
        )
        for box in (one, two):
            assert (box.origin, box.state) == (Origin.WARM, S.RUNNING)
        assert one.labels == {"k": "v"} and one.created_at > 0
        for words in UNIQUE:
            assert await said(engine, "one", words) != await said(engine, "two", words)
        assert await said(engine, "one", "hostname; cat /etc/hostname; echo $A; id -un; pwd") == "one\none\nb\nroot\n/\n"
        assert await said(engine, "two", "hostname; echo $A; id -un; pwd") == "tower\n\ndaemon\n/var\n"
        assert (await engine.identity(ADMIN, "one")).hazards
        async with engine.events(ADMIN, sandbox="one", after=0) as events:
            assert [(await anext(events)).kind for _ in range(2)] == ["sandbox.created", "sandbox.state"]
        # Another shape is another machine; the set is filled again meanwhile.
        assert (await make(engine, name="cold", cold=True)).origin is Origin.BOOT
        await waiting(engine, 2)
        third = await make(engine)
        assert third.origin is Origin.WARM
        [found] = await engine.warm.list(ADMIN)
        assert (found.taken, found.size) == (3, 2)
        # It is a sandbox like any other from then on.
        assert (await engine.pause(ADMIN, third.id)).state is S.PAUSED
        assert await said(engine, third.id, "echo here") == "here\n"
        await _gone(engine)
        await off(engine)


async def _gone(engine: Engine) -> None:
    for box in (await engine.list(ADMIN)).items:
        await engine.destroy(ADMIN, box.id)


async def test_a_create_that_is_refused_leaves_the_machine_for_the_next(settings: Settings, short_dir: Path) -> None:
    async with opened(own_data(settings, short_dir)) as engine:
        await make(engine, name="taken", cold=True)
        await warm(engine, 1)
        await waiting(engine, 1)
        before = hidden(engine)
        with pytest.raises(Conflict, match="taken"):
            await make(engine, name="taken")
        assert hidden(engine) == before
        first = await engine.create(ADMIN, WANTED, idempotency_key="k")
        again = await engine.create(ADMIN, WANTED, idempotency_key="k")
        assert first.id == again.id and first.sandbox == before[0]
        await engine.wait_operation(ADMIN, first.id, 60)
        await _gone(engine)
        await off(engine)


async def test_what_cannot_be_taken_over_is_made(settings: Settings, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        await warm(engine, 1)
        await waiting(engine, 1)
        # Its image has been pulled anew since, say.
        with monkeypatch.context() as patch:
            patch.setattr(engine._core.booter, "still", _not)
            box = await make(engine, name="made")
        assert box.origin in (Origin.GOLDEN, Origin.BOOT) and box.state is S.RUNNING
        assert await said(engine, "made", "echo here") == "here\n"
        await waiting(engine, 1)
        # A machine that died is seen, and replaced.
        [identity] = hidden(engine)
        live = engine._core.boxes[identity].live
        assert live is not None
        os.kill(live.machine.vmm.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while identity in hidden(engine):
                await asyncio.sleep(0.02)
        await waiting(engine, 1)
        assert (await make(engine)).origin is Origin.WARM
        await _gone(engine)
        await off(engine)


async def _not(record: object) -> bool:
    return False


async def test_they_give_way_to_sandboxes(settings: Settings, short_dir: Path) -> None:
    own = replace(own_data(settings, short_dir), max_sandboxes=2)
    async with opened(own) as engine:
        await warm(engine, 5)
        await waiting(engine, 2)
        [found] = await engine.warm.list(ADMIN)
        async with asyncio.timeout(60):
            while (problem := (await engine.warm.list(ADMIN))[0].problem) is None:
                await asyncio.sleep(0.02)
        assert problem.code == "capacity_exhausted"
        other = await make(engine, cold=True)
        assert other.origin is Origin.BOOT and len(hidden(engine)) == 1
        assert (await make(engine)).origin is Origin.WARM
        with pytest.raises(CapacityExhausted):
            await make(engine)
        await engine.warm.remove(ADMIN, found.id)
        await _gone(engine)
        await off(engine)


async def test_sets_are_changed_and_refused(settings: Settings, short_dir: Path) -> None:
    async with opened(own_data(settings, short_dir)) as engine:
        made = await warm(engine, 2)
        assert (await warm(engine, 1)).id == made.id
        await waiting(engine, 1)
        for unfit in ({"name": "x"}, {"env": {"A": "b"}}, {"user": "daemon"}, {"cold": True}, {"lease": True}, {"app": "0" * 64}):
            with pytest.raises(InvalidRequest):
                await warm(engine, 1, CreateSandbox(image="debian:12", **unfit))  # type: ignore[arg-type]
        await warm(engine, 0)
        assert await engine.warm.list(ADMIN) == []
        # An image that there is not: told, and nothing is left of the try.
        await warm(engine, 1, CreateSandbox(image="ext4:/nonexistent.img", memory=256 * MIB))
        async with asyncio.timeout(60):
            while (await engine.warm.list(ADMIN))[0].problem is None:
                await asyncio.sleep(0.02)
        await off(engine)


async def test_they_end_with_the_daemon_and_are_made_again(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with Engine.open(own) as engine:
        await warm(engine, 1)
        await waiting(engine, 1)
    assert machines(own.run_dir) == set()
    async with opened(own) as engine:
        await waiting(engine, 1)
        box: Sandbox = await make(engine)
        assert box.origin is Origin.WARM
        await _gone(engine)
        await off(engine)


@pytest.mark.parametrize("point", ["warm.after_intent", "warm.after_frozen", "warm.after_thaw", "create.after_intent"])
async def test_crashes(settings: Settings, short_dir: Path, point: str) -> None:
    own = own_data(settings, short_dir)
    data, run_dir = own.data_dir, own.run_dir
    # The machine that waits is made by a create too, which passes none of these points but its own.
    async with daemon(data, run_dir, "real", point) as first:
        if await first.ask(do="warm", size=1) is not None:
            assert await first.ask(do="create", image="debian:12", name="box") is None, f"{point} was not reached"
    async with Engine.open(own, trace_kill="") as engine:
        for one in await engine.warm.list(ADMIN):
            await engine.warm.remove(ADMIN, one.id)
        async with asyncio.timeout(60):
            while hidden(engine):
                await asyncio.sleep(0.02)
        states = await whole(engine, data, run_dir)
        assert set(states.values()) <= {S.FAILED, S.RUNNING}
        await _gone(engine)
        assert await whole(engine, data, run_dir) == {}
