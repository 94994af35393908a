"""kill -9 of a daemon process with real guests: at every named point of create and destroy, machines live on or leave nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from command_line import CommandLine
from crashing import ADMIN, daemon, machines, output, whole
from engine_fixtures import own_data
from stoker.api.models import SandboxState, StartProcess
from stoker.engine import trace
from stoker.engine.engine import Engine
from stoker.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]
S = SandboxState
IMAGE = "debian:12"
SHORT = ("boot.after_launch", "create.after_running", "destroy.after_mark")
"""The points that the short run takes; the long one takes them all."""


async def _round(settings: Settings, point: str) -> None:
    """One crash at ``point`` beside a bystander with a job, and what the next engine makes of it."""
    data, run = settings.data_dir, settings.run_dir
    async with daemon(data, run, "real") as first:
        if not (await first.sure(do="list"))["boxes"]:
            await first.sure(do="create", image=IMAGE, name="bystander")
            await first.sure(do="job", name="bystander", script="i=0; while :; do i=$((i+1)); echo line $i; sleep 0.2; done")
        if point.startswith("destroy"):
            assert (await first.sure(do="create", image=IMAGE, name="victim"))["state"] == "running"
        await first.sure(do="arm", point=point)
        assert await first.ask(do=point.split(".")[0].replace("boot", "create"), name="victim", image=IMAGE) is None
    began = time.monotonic()
    async with Engine.open(settings, trace_kill="") as engine:
        boxes = await whole(engine, data, run)
        assert time.monotonic() - began < 2.0, "the next start took too long"
        assert boxes.pop("bystander") is S.RUNNING
        assert set(boxes.values()) <= {S.FAILED} if point != "create.after_running" else boxes == {"victim": S.RUNNING}, boxes
        text = await output(engine, "bystander", b"line 20\n")
        assert text.startswith("".join(f"line {n}\n" for n in range(1, 21)).encode())
        if boxes:
            await engine.destroy(ADMIN, "victim")
        assert set(await whole(engine, data, run)) == {"bystander"}


async def _all(settings: Settings, points: tuple[str, ...]) -> None:
    assert points
    for point in points:
        await _round(settings, point)
    async with Engine.open(settings, trace_kill="") as engine:
        assert (await engine.processes.get(ADMIN, "bystander", "job")).running
        await engine.destroy(ADMIN, "bystander")
        assert await whole(engine, settings.data_dir, settings.run_dir) == {}


async def test_crashes_at_some_points(settings: Settings, short_dir: Path) -> None:
    await _all(own_data(settings, short_dir), SHORT)


@pytest.mark.full
async def test_crashes_at_every_point_of_create_and_destroy(settings: Settings, short_dir: Path) -> None:
    points = tuple(p for p in (*trace.CREATE, *trace.DESTROY) if p not in ("create.after_admit", "destroy.before_mark"))
    await _all(own_data(settings, short_dir), points)


async def test_the_host_lost_everything_but_the_disk(settings: Settings, short_dir: Path) -> None:
    """Daemon and machine die together, as when the host does: the row says so, and the sandbox starts from its disk."""
    settings = own_data(settings, short_dir)
    data, run = settings.data_dir, settings.run_dir
    async with daemon(data, run, "real") as first:
        box = await first.sure(do="create", image=IMAGE, name="box")
        await first.sure(do="job", name="box", script="echo kept > /root/kept; sync; echo done")
        await first.sure(do="settle", name="box")
    record = json.loads((run / "sandboxes" / box["id"] / "shim.json").read_text())
    os.kill(record["shim"]["pid"], signal.SIGKILL)
    async with Engine.open(settings, trace_kill="") as engine:
        dead = await engine.wait(ADMIN, "box", frozenset({S.FAILED}), 2)
        assert dead.error is not None and dead.error.code == "machine_died"
        operation = await engine.start(ADMIN, "box")
        await engine.wait_operation(ADMIN, operation.id, 200)
        assert (await engine.get(ADMIN, "box")).state is S.RUNNING
        await engine.processes.start(ADMIN, "box", StartProcess(argv=["cat", "/root/kept"], tag="job"))
        assert await output(engine, "box", b"\n") == b"kept\n"
        await engine.destroy(ADMIN, "box")
        assert await whole(engine, data, run) == {}


def test_the_real_daemon_is_killed(settings: Settings, short_dir: Path) -> None:
    """``kill -9`` of ``stoker serve``'s process: the next word starts another, and machine, process and output are as they were."""
    own = own_data(settings, short_dir)
    directories = {"STOKER_DATA_DIR": str(own.data_dir), "STOKER_RUN_DIR": str(own.run_dir), "STOKER_CONFIG": str(own.config_file)}
    stoker = CommandLine(own, {**directories, "STOKER_ACCEL": own.accel})
    made = stoker("create", IMAGE, "--name", "box", "--memory", "256M")
    assert made.code == 0, made.error
    script = "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.1; done"
    started = stoker("exec", "-d", "--tag", "job", "box", "--", "sh", "-c", script)
    assert started.code == 0, started.error
    first = json.loads(stoker("daemon", "status", "--json").out)["pid"]
    os.kill(first, signal.SIGKILL)
    listed = json.loads(stoker("ls", "--json").out)
    assert [(box["name"], box["state"]) for box in listed] == [("box", "running")]
    assert json.loads(stoker("daemon", "status", "--json").out)["pid"] != first
    assert stoker("exec", "box", "--", "echo", "still here").text == "still here\n"
    [job] = [process for process in json.loads(stoker("ps", "box", "--json").out) if process["tag"] == "job"]
    assert job["running"] and job["argv"][0] == "sh"
    assert stoker("rm", "box").code == 0
    assert json.loads(stoker("ls", "--json").out) == []
    assert machines(own.run_dir) == set()
    assert stoker("daemon", "stop").code == 0
