"""The engine without guests: the way of a create, what failures leave, restarts, states, leases, timeouts."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine_host import Faults, HostBooter
from stoker.api.models import (
    CreateKey,
    CreateSandbox,
    OperationState,
    Principal,
    Quota,
    Sandbox,
    SandboxState,
    StartProcess,
    Timeout,
    TimeoutAction,
    TimeoutMode,
)
from stoker.engine.engine import Engine
from stoker.errors import CapacityExhausted, Conflict, DeadlineExceeded, GuestError, NotFound
from stoker.settings import Settings

pytestmark = pytest.mark.anyio
ADMIN = Principal()
S = SandboxState
RUNNING = frozenset({S.RUNNING})
ENDED = frozenset({S.FAILED, S.STOPPED, S.RUNNING})


@pytest.fixture
def settings(short_dir: Path) -> Settings:
    return Settings(short_dir / "data", short_dir / "run", short_dir / "none.toml")


@asynccontextmanager
async def opened(settings: Settings, faults: Faults | None = None, **options: Any) -> AsyncIterator[Engine]:
    async with Engine.open(settings, booter=HostBooter(faults), **options) as engine:
        yield engine


async def make(engine: Engine, who: Principal = ADMIN, **values: Any) -> Sandbox:
    operation = await engine.create(who, CreateSandbox(image="host", **values))
    assert operation.sandbox is not None
    return await engine.wait(who, operation.sandbox, ENDED, 20)


async def clean(engine: Engine) -> None:
    while items := (await engine.list(ADMIN)).items:
        for box in items:
            await engine.destroy(ADMIN, box.id)


def nothing_left(settings: Settings, engine: Engine) -> None:
    assert list((settings.run_dir / "sandboxes").iterdir()) == []
    assert list((settings.data_dir / "pool" / "clones").iterdir()) == []


async def owned(engine: Engine) -> list[str]:
    return [f"{entry.kind} {entry.name}" for entry in await engine._core.ledger.all()]


async def test_a_sandbox_lives_and_goes(settings: Settings) -> None:
    async with opened(settings) as engine:
        box = await make(engine, name="web", labels={"team": "a"})
        assert box.state is S.RUNNING and box.started_at and box.versions.agent
        assert await engine.get(ADMIN, "web") == await engine.get(ADMIN, box.id)
        assert await engine.ping(ADMIN, "web") > 0
        assert [b.id for b in (await engine.list(ADMIN, labels={"team": "a"})).items] == [box.id]
        assert (await engine.list(ADMIN, labels={"team": "b"})).items == []
        await engine.destroy(ADMIN, "web")
        with pytest.raises(NotFound):
            await engine.get(ADMIN, box.id)
        assert await owned(engine) == []
        nothing_left(settings, engine)


async def test_one_engine_at_a_time(settings: Settings) -> None:
    async with opened(settings):
        with pytest.raises(Conflict) as caught:
            async with opened(settings):
                pass
    assert caught.value.code == "engine_running"


async def test_a_failed_create_leaves_its_row_and_nothing_else(settings: Settings) -> None:
    async def fail() -> None:
        raise GuestError("guest_panicked", "it panicked", "hint", console=("line one", "line two"))

    async with opened(settings, Faults(after=fail)) as engine:
        box = await make(engine, name="x")
        assert box.state is S.FAILED and box.error is not None
        assert (box.error.code, box.error.console) == ("guest_panicked", ["line one", "line two"])
        operation = await engine.operation(ADMIN, box.operation or "")
        assert operation.state is OperationState.FAILED and operation.error == box.error
        assert await owned(engine) == []
        nothing_left(settings, engine)
        assert engine._core.admission.totals().sandboxes == 0
        with pytest.raises(Conflict) as caught:
            await engine.start(ADMIN, box.id)
        assert caught.value.code == "no_disk"
        await engine.destroy(ADMIN, "x")


async def test_failed_rows_are_bounded(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        raise GuestError("nope", "no")

    monkeypatch.setattr("stoker.engine.build.FAILED_KEPT", 3)
    async with opened(settings, Faults(before=fail)) as engine:
        boxes = [await make(engine) for _ in range(6)]
        expected = [box.id for box in reversed(boxes[3:])]
        async with asyncio.timeout(5):
            while [box.id for box in (await engine.list(ADMIN)).items] != expected:
                await asyncio.sleep(0.01)


async def test_names_are_unique_per_key(settings: Settings) -> None:
    one, two = Principal(owner="key-one", admin=False), Principal(owner="key-two", admin=False)
    async with opened(settings) as engine:
        first = await make(engine, one, name="web")
        second = await make(engine, two, name="web")
        with pytest.raises(Conflict) as caught:
            await engine.create(one, CreateSandbox(image="host", name="web"))
        assert caught.value.code == "name_taken"
        assert (await engine.get(one, "web")).id == first.id
        assert (await engine.get(two, "web")).id == second.id
        with pytest.raises(NotFound):
            await engine.get(two, first.id)
        with pytest.raises(NotFound):
            await engine.destroy(two, first.id)
        assert len((await engine.list(one)).items) == 1
        await engine.destroy(one, "web")
        assert (await make(engine, one, name="web")).state is S.RUNNING
        await clean(engine)


async def test_idempotency(settings: Settings) -> None:
    request = CreateSandbox(image="host", name="a")
    async with opened(settings) as engine:
        first, second = await asyncio.gather(
            engine.create(ADMIN, request, idempotency_key="k"), engine.create(ADMIN, request, idempotency_key="k")
        )
        assert first.id == second.id and first.sandbox == second.sandbox
        with pytest.raises(Conflict) as caught:
            await engine.create(ADMIN, CreateSandbox(image="other"), idempotency_key="k")
        assert caught.value.code == "idempotency_mismatch"
        await engine.wait(ADMIN, "a", RUNNING, 10)
    async with opened(settings) as engine:
        third = await engine.create(ADMIN, request, idempotency_key="k")
        assert third.sandbox == first.sandbox and third.id == first.id
        assert engine._core.admission.totals().sandboxes == 1
        await clean(engine)


async def test_a_cancelled_caller_leaves_the_work_going(settings: Settings) -> None:
    gate = asyncio.Event()
    async with opened(settings, Faults(before=gate.wait)) as engine:  # type: ignore[arg-type]
        task = asyncio.create_task(engine.create(ADMIN, CreateSandbox(image="host", name="a")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gate.set()
        async with asyncio.timeout(10):
            while not (await engine.list(ADMIN)).items:
                await asyncio.sleep(0.01)
        assert (await engine.wait(ADMIN, "a", RUNNING, 10)).state is S.RUNNING
        await clean(engine)


async def test_destroy_while_creating(settings: Settings) -> None:
    gate = asyncio.Event()
    async with opened(settings, Faults(after=gate.wait)) as engine:  # type: ignore[arg-type]
        operation = await engine.create(ADMIN, CreateSandbox(image="host"))
        assert operation.sandbox is not None
        await asyncio.sleep(0.1)
        await engine.destroy(ADMIN, operation.sandbox)
        nothing_left(settings, engine)
        assert await owned(engine) == []
        assert (await engine.operation(ADMIN, operation.id)).state is OperationState.CANCELLED


@pytest.mark.parametrize("delay", [0.0, 0.1])
async def test_cancelling_a_create_leaves_a_failed_row(settings: Settings, delay: float) -> None:
    gate = asyncio.Event()
    async with opened(settings, Faults(after=gate.wait)) as engine:  # type: ignore[arg-type]
        operation = await engine.create(ADMIN, CreateSandbox(image="host"))
        await asyncio.sleep(delay)
        ended = await engine.cancel_operation(ADMIN, operation.id)
        assert ended.state is OperationState.CANCELLED
        box = await engine.get(ADMIN, operation.sandbox or "")
        assert box.state is S.FAILED and box.error is not None and box.error.code == "cancelled"
        assert await owned(engine) == []
        nothing_left(settings, engine)


async def test_states_allow_and_refuse(settings: Settings) -> None:
    async with opened(settings) as engine:
        box = await make(engine)
        assert set(box.actions) >= {"stop", "freeze", "destroy"} and "thaw" not in box.actions
        with pytest.raises(Conflict) as caught:
            await engine.thaw(ADMIN, box.id)
        assert caught.value.code == "wrong_state"
        assert caught.value.details["state"] == "running" and caught.value.details["allowed"] == ["frozen"]
        assert (await engine.freeze(ADMIN, box.id)).state is S.FROZEN
        with pytest.raises(Conflict) as caught:
            await engine.processes.list(ADMIN, box.id)
        assert "thaw" in caught.value.hint
        assert (await engine.thaw(ADMIN, box.id)).state is S.RUNNING
        assert (await engine.resume(ADMIN, box.id)).state is S.RUNNING  # it does already
        with pytest.raises(GuestError, match="no guests"):
            await engine.pause(ADMIN, box.id)
        assert (await engine.get(ADMIN, box.id)).state is S.RUNNING
        assert not list((settings.data_dir / "snapshots").iterdir())
        by_default = [Timeout(seconds=9, mode=mode) for mode in TimeoutMode]
        set_to = [(await engine.set_timeout(ADMIN, box.id, timeout)).timeout for timeout in by_default]
        assert [timeout and timeout.action for timeout in set_to] == [TimeoutAction.PAUSE, TimeoutAction.DESTROY]
        await engine.set_timeout(ADMIN, box.id, None)
        await clean(engine)


async def test_a_wrong_state_is_refused_at_once(settings: Settings) -> None:
    """Nobody waits for the end of a create to hear that the sandbox is not running."""
    gate = asyncio.Event()
    async with opened(settings, Faults(before=gate.wait)) as engine:  # type: ignore[arg-type]
        operation = await engine.create(ADMIN, CreateSandbox(image="host"))
        name = operation.sandbox or ""
        async with asyncio.timeout(1):
            for refused in (engine.stop(ADMIN, name, 0), engine.freeze(ADMIN, name), engine.start(ADMIN, name)):
                with pytest.raises(Conflict) as caught:
                    await refused
                assert caught.value.details["state"] == "creating" and "stoker wait" in caught.value.hint
        await engine.destroy(ADMIN, name)


async def test_an_idle_timeout_does_not_run_while_stopped(settings: Settings) -> None:
    async with opened(settings) as engine:
        box = await make(engine, timeout=Timeout(seconds=1.0, mode=TimeoutMode.IDLE))
        stopped = await engine.stop(ADMIN, box.id, 0)
        assert stopped.expires_at is None
        await asyncio.sleep(1.5)
        assert (await engine.get(ADMIN, box.id)).state is S.STOPPED
        await clean(engine)


async def test_stop_keeps_the_disk_and_start_boots_from_it(settings: Settings) -> None:
    faults = Faults()
    async with opened(settings, faults) as engine:
        box = await make(engine, env={"A": "1"})
        clone = settings.data_dir / "pool" / "clones" / box.id / "disk.0"
        with clone.open("ab") as disk:
            disk.write(b"written by the guest")
        stopped = await engine.stop(ADMIN, box.id, 0.0)
        assert stopped.state is S.STOPPED and stopped.ended_at is not None
        assert engine._core.admission.totals().memory == 0 and engine._core.admission.totals().sandboxes == 1
        assert (await engine.console(ADMIN, box.id, offset=None, limit=100))[1].startswith(b"boot of")
        operation = await engine.start(ADMIN, box.id)
        assert operation.kind == "start"
        assert (await engine.wait_operation(ADMIN, operation.id, 10)).state is OperationState.SUCCEEDED
        again = await engine.get(ADMIN, box.id)
        assert again.state is S.RUNNING and clone.read_bytes().endswith(b"written by the guest")
        assert faults.boots == 2
        await clean(engine)
        nothing_left(settings, engine)


async def test_a_failed_start_keeps_the_disk(settings: Settings) -> None:
    faults = Faults()
    async with opened(settings, faults) as engine:
        box = await make(engine)
        await engine.stop(ADMIN, box.id, 0.0)

        async def fail() -> None:
            raise GuestError("nope", "not now")

        faults.before = fail
        operation = await engine.start(ADMIN, box.id)
        assert (await engine.wait_operation(ADMIN, operation.id, 10)).state is OperationState.FAILED
        assert (await engine.get(ADMIN, box.id)).state is S.FAILED
        faults.before = None
        operation = await engine.start(ADMIN, box.id)
        assert (await engine.wait_operation(ADMIN, operation.id, 10)).state is OperationState.SUCCEEDED
        await clean(engine)


async def test_a_machine_that_dies_is_seen_at_once(settings: Settings) -> None:
    async with opened(settings) as engine:
        box = await make(engine)
        live = engine._core.boxes[box.id].live
        assert live is not None
        os.kill(live.machine.vmm.pid, signal.SIGKILL)
        failed = await engine.wait(ADMIN, box.id, frozenset({S.FAILED}), 1.0)
        assert failed.error is not None and failed.error.code == "machine_died"
        assert failed.error.console == ["the last line of its console"]
        with pytest.raises(Conflict):
            await engine.processes.list(ADMIN, box.id)
        await clean(engine)
        nothing_left(settings, engine)


async def test_machines_outlive_the_engine(settings: Settings) -> None:
    async with opened(settings) as engine:
        box = await make(engine, name="web")
        dead = await make(engine, name="dead")
        await make(engine, name="frozen")
        await engine.freeze(ADMIN, "frozen")
        started = await engine.processes.start(
            ADMIN, box.id, StartProcess(argv=["sh", "-c", "echo before; sleep 1; echo after; sleep 100"], tag="job")
        )
        pid = engine._core.boxes[dead.id].live.machine.vmm.pid  # type: ignore[union-attr]
        events = len(engine._core.events.since(ADMIN, box.id, 0))
    os.kill(pid, signal.SIGKILL)
    async with opened(settings) as engine:
        assert (await engine.get(ADMIN, "web")).state is S.RUNNING
        failed = await engine.wait(ADMIN, "dead", frozenset({S.FAILED}), 1)
        assert failed.error is not None and failed.error.code == "machine_died"
        assert (await engine.get(ADMIN, "frozen")).state is S.FROZEN
        known = await engine.processes.get(ADMIN, "web", "job")
        assert known.id == started.id and known.running and known.argv == started.argv and known.pid == started.pid
        attached = await engine.processes.attach(ADMIN, "web", "job", None, None)
        seen = b""
        async with asyncio.timeout(10):
            while b"after" not in seen:
                piece = await attached.read()
                assert piece is not None
                seen += piece.data
        assert seen == b"before\nafter\n"
        await attached.aclose()
        await engine.thaw(ADMIN, "frozen")
        assert await engine.ping(ADMIN, "frozen") > 0
        assert len(engine._core.events.since(ADMIN, box.id, 0)) >= events
        await clean(engine)
        nothing_left(settings, engine)
        assert await owned(engine) == []


async def test_a_destroy_takes_the_rows_of_its_processes_along(settings: Settings) -> None:
    def rows(db: Any) -> int:
        return int(db.execute("SELECT count(*) FROM processes").fetchone()[0])

    async with opened(settings) as engine:
        box = await make(engine)
        await engine.processes.start(ADMIN, box.id, StartProcess(argv=["sleep", "100"]))
        await asyncio.sleep(0.1)
        assert await engine._core.database.read(rows) == 1
        await engine.processes.start(ADMIN, box.id, StartProcess(argv=["sleep", "100"]))
        await engine.destroy(ADMIN, box.id)
        await asyncio.sleep(0.1)
        assert await engine._core.database.read(rows) == 0


async def test_an_unfinished_destroy_is_finished(settings: Settings) -> None:
    async with opened(settings) as engine:
        box = await make(engine)
        core = engine._core
        await core.save(core.boxes[box.id], doomed=True, state=S.STOPPING)
    async with opened(settings) as engine:
        assert (await engine.list(ADMIN)).items == []
        nothing_left(settings, engine)
        assert await owned(engine) == []


async def test_leases(settings: Settings) -> None:
    async with opened(settings, lease_grace=0.3) as engine:
        box = await make(engine, lease=True)
        async with engine.lease(ADMIN, box.id):
            await asyncio.sleep(0.5)
            assert (await engine.get(ADMIN, box.id)).state is S.RUNNING
        await engine.wait(ADMIN, box.id, frozenset(), 1.0)
        forgotten = await make(engine, lease=True)
        await engine.wait(ADMIN, forgotten.id, frozenset(), 3.0)
        plain = await make(engine)
        with pytest.raises(Conflict) as caught:
            async with engine.lease(ADMIN, plain.id):
                pass
        assert caught.value.code == "no_lease"
        await clean(engine)
        nothing_left(settings, engine)


async def test_a_lease_outlives_a_restart_but_not_its_client(settings: Settings) -> None:
    async with opened(settings, lease_grace=5) as engine:
        kept, lost = await make(engine, lease=True), await make(engine, lease=True)
        async with engine.lease(ADMIN, kept.id), engine.lease(ADMIN, lost.id):
            engine.retire()
    async with opened(settings, lease_grace=0.5) as engine:
        async with engine.lease(ADMIN, kept.id):
            await engine.wait(ADMIN, lost.id, frozenset(), 5)
            assert (await engine.get(ADMIN, kept.id)).state is S.RUNNING
        await engine.wait(ADMIN, kept.id, frozenset(), 2)


async def test_timeouts(settings: Settings) -> None:
    async with opened(settings) as engine:
        absolute = await make(engine, timeout=Timeout(seconds=1.0))
        idle = await make(engine, timeout=Timeout(seconds=1.0, mode=TimeoutMode.IDLE, action=TimeoutAction.DESTROY))
        kept = await make(engine, timeout=Timeout(seconds=1.0))
        assert absolute.expires_at is not None
        await engine.set_timeout(ADMIN, kept.id, None)
        job = await engine.processes.start(ADMIN, idle.id, StartProcess(argv=["sleep", "60"]))
        attached = await engine.processes.attach(ADMIN, idle.id, job.id, None, None)
        await engine.wait(ADMIN, absolute.id, frozenset(), 3)
        await asyncio.sleep(0.5)
        assert (await engine.get(ADMIN, idle.id)).state is S.RUNNING
        assert (await engine.get(ADMIN, kept.id)).state is S.RUNNING
        await attached.aclose()
        with pytest.raises(DeadlineExceeded):
            await engine.wait(ADMIN, idle.id, frozenset(), 0.5)
        await engine.wait(ADMIN, idle.id, frozenset(), 3)
        await clean(engine)


async def test_quota_and_budget(settings: Settings) -> None:
    settings = replace(settings, budget_memory=1 << 30, max_sandboxes=10)
    async with opened(settings) as engine:
        key = (await engine.create_key(CreateKey(name="k", quota=Quota(sandboxes=1)))).key
        who = Principal(owner=key.id, admin=False)
        await make(engine, who, memory=64 << 20)
        with pytest.raises(CapacityExhausted) as caught:
            await engine.create(who, CreateSandbox(image="host"))
        assert caught.value.details["scope"] == "key"
        with pytest.raises(CapacityExhausted) as caught:
            await engine.create(ADMIN, CreateSandbox(image="host", memory=1 << 30))
        assert caught.value.details["resource"] == "memory" and 0 < caught.value.details["fits"] < 1 << 30
        fits = caught.value.details["fits"] // (1 << 20) * (1 << 20)
        assert (await make(engine, memory=fits)).state is S.RUNNING
        await clean(engine)


async def test_boots_take_turns_and_owners_too(settings: Settings) -> None:
    gate = asyncio.Event()
    faults = Faults(before=gate.wait)  # type: ignore[arg-type]
    async with opened(settings, faults, boots=2) as engine:
        many = Principal(owner="key-many", admin=False)
        few = Principal(owner="key-few", admin=False)
        operations = [await engine.create(many, CreateSandbox(image="host")) for _ in range(10)]
        last = await engine.create(few, CreateSandbox(image="host"))
        gate.set()
        for operation in [*operations, last]:
            ended = await engine.wait_operation(ADMIN, operation.id, 30)
            assert ended.state is OperationState.SUCCEEDED
        assert faults.peak <= 2
        assert faults.order.index(last.sandbox or "") <= 3
        await clean(engine)


async def test_events_tell_the_story(settings: Settings) -> None:
    async with opened(settings) as engine, engine.events(ADMIN) as stream:
        box = await make(engine)
        await engine.stop(ADMIN, box.id, 0)
        await engine.destroy(ADMIN, box.id)
        seen = []
        async with asyncio.timeout(5):
            async for event in stream:
                seen.append((event.kind, event.data.get("state")))
                if event.kind == "sandbox.destroyed":
                    break
        assert seen == [
            ("sandbox.created", None),
            ("sandbox.state", "running"),
            ("sandbox.state", "stopping"),
            ("sandbox.state", "stopped"),
            ("sandbox.state", "stopping"),
            ("sandbox.destroyed", None),
        ]


async def test_keys(settings: Settings) -> None:
    import hashlib

    async with opened(settings) as engine:
        created = await engine.create_key(CreateKey(name="ci"))
        digest = hashlib.sha256(created.secret.encode()).digest()
        found = await engine.find_key(digest)
        assert found is not None and found.id == created.key.id and found.last_used_at is not None
        assert await engine.find_key(hashlib.sha256(b"wrong").digest()) is None
        assert created.secret not in (settings.database).read_bytes().decode("latin-1")
    async with opened(settings) as engine:
        assert (await engine.find_key(digest)) is not None
        await engine.revoke_key(created.key.id)
        assert (await engine.find_key(digest)) is None
        page = await engine.keys(limit=10, cursor=None)
        assert [key.revoked_at is not None for key in page.items] == [True]


async def test_metrics_are_sampled(settings: Settings) -> None:
    async with opened(settings) as engine:
        box = await make(engine)
        await asyncio.sleep(1.3)
        metrics = await engine.metrics(ADMIN, box.id, window=600, since=None)
        assert 2 <= len(metrics.samples) <= 4 and metrics.step == 0.5
        assert metrics.samples[-1].memory_host > 0 and metrics.samples[-1].memory_guest_total
        assert (await engine.latest_metrics(ADMIN))[box.id].samples == [metrics.samples[-1]]
        await clean(engine)
