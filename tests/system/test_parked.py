"""Parked machines: up because of a create a moment ago, seen by nobody, and the next create's in every respect."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from crashing import ADMIN, daemon, machines, whole
from engine_fixtures import own_data
from engine_guests import make, opened, run
from stoker.api.models import (
    BuildTemplate,
    CreateKey,
    CreateSandbox,
    OperationState,
    Origin,
    Principal,
    Quota,
    Sandbox,
    SandboxState,
)
from stoker.engine.engine import Engine
from stoker.errors import CapacityExhausted, Conflict
from stoker.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]
S = SandboxState
MEMORY = 256 << 20
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
        while not engine._waiting.parked:
            for kind in engine._waiting.kinds.values():
                kind.again_at = 0.0
            engine._waiting._wanted.set()
            await asyncio.sleep(0.05)
    [found] = engine._waiting.parked
    return found


async def test_the_next_create_takes_it(own: Settings) -> None:
    async with opened(own) as engine:
        first = await make(engine, name="first")
        waits = await parked(engine)
        assert [box.id for box in (await engine.list(ADMIN)).items] == [first.id] and engine.facts()["sandboxes"] == 1
        assert not engine._core.operations.running
        second = await make(
            engine, name="second", hostname="tower", env={"A": "b"}, user="daemon", workdir="/var", labels={"k": "v"}
        )
        assert (second.id, second.origin, second.state, second.labels) == (waits, Origin.WARM, S.RUNNING, {"k": "v"})
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
        assert (await make(engine, cold=True)).id != waits and engine._waiting.parked == [waits]
        # A create that is refused leaves it where it is.
        with pytest.raises(Conflict, match="third"):
            await make(engine, name="third")
        assert await parked(engine) == waits
        # Who removes images is not kept from it by what waits over them.
        await engine._waiting.clear_parked()
        assert engine._waiting.parked == []
    assert machines(own.run_dir) == set()


async def test_one_right_after_the_other(own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a calm moment the next one is made all the same, and readied later; who comes while that goes on waits for it."""
    monkeypatch.setattr("stoker.engine.waiting.CALM", 600.0)
    async with opened(own) as engine:
        waiting = engine._waiting
        waiting._spare = True
        await make(engine, name="first")
        waits = await parked(engine)
        (kind,) = waiting.kinds.values()
        assert kind.light == {waits}
        second = await make(engine, name="second")
        assert (second.id, second.origin) == (waits, Origin.WARM)
        async with asyncio.timeout(60):
            while kind.coming is None:
                await asyncio.sleep(0.001)
        await asyncio.wait({kind.coming})
        waits = await parked(engine)
        monkeypatch.setattr("stoker.engine.waiting.CALM", 0.0)
        waiting._wanted.set()
        async with asyncio.timeout(60):
            while kind.light or not kind.ready:
                await asyncio.sleep(0.01)
        assert await parked(engine) == waits
        waiting._spare = False
        monkeypatch.setattr("stoker.engine.waiting.CALM", 600.0)
        third = await make(engine, name="third")
        assert (third.id, third.origin) == (waits, Origin.WARM)
        for words in UNIQUE:
            assert len({await said(engine, name, words) for name in ("first", "second", "third")}) == 3
        assert waiting.parked == [], "without a processor to spare nothing is made beside what goes on"
    assert machines(own.run_dir) == set()


async def test_one_that_is_lost_is_made_anew_and_makes_room(own: Settings) -> None:
    async with opened(replace(own, max_sandboxes=2)) as engine:
        await make(engine, name="first")
        box = engine._core.boxes[await parked(engine)]
        # Its supervisor and VMM end behind the engine's back: seen, and forgotten.
        record = (own.run_dir / "sandboxes" / box.id / "shim.json").read_text()
        os.kill(json.loads(record)["vmm"]["pid"], signal.SIGKILL)
        async with asyncio.timeout(30):
            while not box.gone:
                await asyncio.sleep(0.02)
        other = await parked(engine)
        assert other != box.id
        # It counts, and gives way.
        assert engine._core.admission.totals().sandboxes == 2
        made = await make(engine, cold=True)
        assert made.origin is Origin.BOOT and engine._waiting.parked == []


async def test_templates_and_owners(own: Settings) -> None:
    """A template's machines are parked with what runs in them; nobody gets another's, and nobody more than is allowed."""
    async with opened(own) as engine:
        service = "i=0; while :; do i=$((i+1)); echo $i > /run/new; mv /run/new /run/beat; sleep 0.1; done"
        request = BuildTemplate(
            name="tpl", memory=MEMORY, image="debian:12", setup=["echo made > /made"], start=service, ready="test -s /run/beat"
        )
        begun = await engine.build_template(ADMIN, request)
        assert (await engine.wait_operation(ADMIN, begun.id, 300)).state is OperationState.SUCCEEDED
        assert (await _made(engine, ADMIN, "tpl", "one")).origin is Origin.TEMPLATE
        waits = await parked(engine)
        two = await _made(engine, ADMIN, "tpl", "two")
        assert (two.id, two.origin, two.template) == (waits, Origin.WARM, "tpl")
        moving = "cat /made; a=$(cat /run/beat); sleep 1; test $(cat /run/beat) -gt $a && hostname"
        assert await said(engine, "two", moving) == "made\ntwo\n"
        assert (await engine.processes.get(ADMIN, "two", "start")).running
        # Built anew, nothing of the old is given away.
        waits = await parked(engine)
        begun = await engine.build_template(ADMIN, structs.replace(request, setup=["echo anew > /made"]))
        assert (await engine.wait_operation(ADMIN, begun.id, 300)).state is OperationState.SUCCEEDED
        three = await _made(engine, ADMIN, "tpl", "three")
        assert three.id != waits and await said(engine, "three", moving) == "anew\nthree\n"
        await engine._waiting.clear_parked()
        for name in ("one", "two", "three"):
            await engine.destroy(ADMIN, name)
        # Of two who ask for the same each has its own, within its own quota.
        key = await engine.create_key(CreateKey(name="other", quota=Quota(sandboxes=2)))
        other = Principal(owner=key.key.id, admin=False)
        await make(engine, name="mine")
        await _made(engine, other, "debian:12", "theirs")
        async with asyncio.timeout(120):
            while len(engine._waiting.parked) < 2:
                await asyncio.sleep(0.05)
        owners = {engine._core.boxes[identity].record.owner for identity in engine._waiting.parked}
        assert owners == {ADMIN.owner, other.owner}
        again = await _made(engine, other, "debian:12", "more")
        assert again.origin is Origin.WARM and again.owner == other.owner
        with pytest.raises(CapacityExhausted):
            await _made(engine, other, "debian:12", "too-much")
        await engine.templates.remove(ADMIN, "tpl")


async def _made(engine: Engine, who: Principal, image: str, name: str) -> Sandbox:
    memory = None if image == "tpl" else MEMORY
    operation = await engine.create(who, CreateSandbox(image=image, name=name, memory=memory))
    ended = await engine.wait_operation(who, operation.id, 120)
    assert ended.state is OperationState.SUCCEEDED, ended.error
    return await engine.get(who, name)


@pytest.mark.parametrize("point", ["", "create.after_intent:2", "warm.after_thaw", "create.after_running:3"])
async def test_crashes(own: Settings, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run_dir = own.data_dir, own.run_dir
    monkeypatch.setenv("STOKER_PARKED", "1")
    # What every create passes the first one passes, too, and some of it whoever makes the machine that waits.
    async with daemon(data, run_dir, "real", point) as first:
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
