"""kill -9 of a daemon process at every named point, with the real agent in place of guests: nothing lost, nothing left."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from crashing import ADMIN, daemon, output, whole
from engine_daemon import settings
from engine_host import HostBooter
from stoker.api.models import SandboxState
from stoker.engine import trace
from stoker.engine.engine import Engine
from stoker.errors import InvalidRequest

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
S = SandboxState
JOB = "for i in 1 2 3; do echo line $i; done; sleep 0.5; echo last; sleep 1000"


@pytest.mark.parametrize("point", trace.POINTS)
async def test_a_daemon_that_dies_here(short_dir: Path, point: str) -> None:
    """A bystander with a background job lives through it, whatever the victim was at."""
    data, run = short_dir / "data", short_dir / "run"
    victim_exists = point.startswith(("destroy", "stop", "start"))
    async with daemon(data, run, "host") as first:
        await first.sure(do="create", image="host", name="bystander")
        await first.sure(do="job", name="bystander", script=JOB)
        if victim_exists:
            await first.sure(do="create", image="host", name="victim")
        if point.startswith("start"):
            await first.sure(do="stop", name="victim")
        await first.sure(do="arm", point=point)
        verb = "create" if not victim_exists else point.partition(".")[0]
        assert await first.ask(do=verb, name="victim", image="host") is None, "the point was never reached"
    began = time.monotonic()
    async with Engine.open(settings(data, run), booter=HostBooter(), trace_kill="") as engine:
        boxes = await whole(engine, data, run)
        assert time.monotonic() - began < 2.0
        assert boxes.pop("bystander") is S.RUNNING
        assert boxes == expected(point)
        assert await output(engine, "bystander", b"last") == b"line 1\nline 2\nline 3\nlast\n"
        assert (await engine.processes.get(ADMIN, "bystander", "job")).running
        for box in (await engine.list(ADMIN)).items:
            await engine.destroy(ADMIN, box.id)
        assert await whole(engine, data, run) == {}


def expected(point: str) -> dict[str, SandboxState]:
    verb = point.partition(".")[0]
    if point == "create.after_admit":
        return {}
    if point == "create.after_running" or point == "destroy.before_mark":
        return {"victim": S.RUNNING}
    if verb in ("create", "boot"):
        return {"victim": S.FAILED}
    if verb == "destroy":
        return {}
    if point == "start.after_running":
        return {"victim": S.RUNNING}
    return {"victim": S.STOPPED}


async def test_a_crash_during_the_clean_up_of_a_crash(short_dir: Path) -> None:
    data, run = short_dir / "data", short_dir / "run"
    async with daemon(data, run, "host") as first:
        for name in ("a", "b"):
            await first.sure(do="create", image="host", name=name)
    for name in ("a", "b"):
        async with daemon(data, run, "host", "destroy.after_process") as dying:
            assert await dying.ask(do="destroy", name=name) is None
    async with Engine.open(settings(data, run), booter=HostBooter(), trace_kill="") as engine:
        assert await whole(engine, data, run) == {}


def test_an_unknown_point_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        trace.arm("nowhere")
    trace.arm("")
