"""Machines as units of systemd's, in a host that has it: limits that hold, survival, machinectl, the journal, and every bad end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import STOKER, CommandLine
from crashing import ADMIN, daemon, whole
from engine_fixtures import own_data
from stoker.api.models import CreateSandbox, SandboxState
from stoker.engine.engine import Engine
from stoker.engine.units import Units, unit_name
from stoker.host import systemd
from stoker.host.binaries import shim_path
from stoker.host.cgroups import Limits
from stoker.settings import Settings
from stoker.vmm.shim import ShimOptions, start

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1200), pytest.mark.usefixtures("no_slice")]
S = SandboxState
MIB = 1 << 20
IMAGE = "debian:12"
BOMB = """
import _thread, os, sys
open(sys.argv[1] + '/cgroup.procs', 'w').write('0')
held, tasks = _thread.allocate_lock(), 0
held.acquire()
try:
    while tasks < 2000:
        _thread.start_new_thread(held.acquire, ())
        tasks += 1
    print('no end')
except RuntimeError:
    try:
        os.fork()
        print('a fork is not refused')
    except BlockingIOError:
        print(tasks, flush=True)
os._exit(0)
"""
GLUTTON = """
import sys
open(sys.argv[1] + '/cgroup.procs', 'w').write('0')
hoard = bytearray()
while True:
    hoard += b'x' * (16 << 20)
"""


@pytest.fixture(scope="module")
def no_slice() -> Iterator[None]:
    """The slice stays when its last unit is gone, as systemd has it; the lab is to be as it was."""
    yield
    say("systemctl", "stop", "stoker.slice")


def say(*argv: str | Path, check: bool = True) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280, check=False)
    assert not check or done.returncode == 0, (argv, done.stderr)
    return done.stdout


def shown(unit: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in say("systemctl", "show", unit).splitlines() if "=" in line)


def until(condition: Callable[[], Any], what: str, patience: float = 240.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def inspect(stoker: CommandLine, name: str) -> dict[str, Any]:
    done = stoker("inspect", name)
    assert done.code == 0, done.error
    return dict(json.loads(done.out)[0])


def journal(unit: str) -> str:
    return say("journalctl", "--no-pager", "-o", "cat", "-u", unit)


def test_a_machine_is_a_unit_with_limits_that_hold(stoker: CommandLine) -> None:
    made = stoker("create", IMAGE, "--name", "box", "--memory", "256M")
    assert made.code == 0, made.error
    box = inspect(stoker, "box")
    unit = unit_name(box["id"])
    found = shown(unit)
    limit = (256 + 384) * MIB
    wanted = {
        "ActiveState": "active",
        "Slice": "stoker.slice",
        "Description": f"Stoker sandbox box ({IMAGE})",
        "Delegate": "yes",
        "MemoryMax": str(limit),
        "MemorySwapMax": "0",
        "TasksMax": "512",
        "CPUQuotaPerSecUSec": "1s",
        "Transient": "yes",
    }
    assert {name: found[name] for name in wanted} == wanted
    group = Path("/sys/fs/cgroup", found["ControlGroup"].lstrip("/"))
    assert group == Path("/sys/fs/cgroup/stoker.slice", unit) and int((group / "memory.max").read_text()) == limit
    shim = json.loads((stoker.settings.run_dir / "sandboxes" / box["id"] / "shim.json").read_text())
    assert {int(pid) for pid in (group / "cgroup.procs").read_text().split()} == {shim["shim"]["pid"], shim["vmm"]["pid"]}
    # All of the VMM's memory is charged here: it was born here.
    charged = int((group / "memory.current").read_text())
    resident = int(Path(f"/proc/{shim['vmm']['pid']}/statm").read_text().split()[1]) * 4096
    assert charged > resident / 2, (charged, resident)
    forked = int(say(sys.executable, "-c", BOMB, group))
    assert 400 < forked < 512  # the shim, the VMM and its threads are tasks too
    done = subprocess.run([sys.executable, "-c", GLUTTON, group], stdin=subprocess.DEVNULL, timeout=280, check=False)
    assert done.returncode == -signal.SIGKILL
    assert "oom_kill 1\n" in (group / "memory.events").read_text()
    assert stoker("exec", "box", "--", "true").code == 0, "the machine went with the one that took too much"
    # machined and the journal know it.
    until(lambda: box["id"] in say("machinectl", "list", "--no-legend"), "machined does not know it")
    machine = dict(line.split("=", 1) for line in say("machinectl", "show", box["id"]).splitlines())
    assert (machine["Class"], machine["Service"], machine["Unit"], machine["Leader"]) == (
        "vm",
        "stoker",
        unit,
        str(shim["vmm"]["pid"]),
    )
    assert unit in say("machinectl", "status", box["id"], "--no-pager")
    assert stoker("exec", "box", "--", "sh", "-c", "echo written in the guest > /dev/console").code == 0
    until(lambda: "written in the guest" in journal(unit), "the console is not in the journal")
    assert f"the machine began as process {shim['vmm']['pid']}" in journal(unit)
    report = stoker("fsck", "--json")
    assert report.code == 0, report.text
    stopped = stoker("daemon", "restart")
    assert stopped.code == 0, stopped.error
    assert stoker("exec", "box", "--", "true").code == 0, "the machine did not outlive the daemon"
    assert shown(unit)["ActiveState"] == "active"
    assert stoker("rm", "box").code == 0
    assert shown(unit)["LoadState"] == "not-found" and not group.exists()
    until(lambda: box["id"] not in say("machinectl", "list", "--no-legend"), "machined still knows it")
    until(lambda: "the machine was ended by signal 9, as it was asked to" in journal(unit), "the end is not in the journal")


def test_ends_from_outside(stoker: CommandLine) -> None:
    made = stoker("create", IMAGE, "--name", "box", "--memory", "256M")
    assert made.code == 0, made.error
    box = inspect(stoker, "box")
    unit = unit_name(box["id"])
    until(lambda: box["id"] in say("machinectl", "list", "--no-legend"), "machined does not know it")
    outside = (("machinectl", "terminate", box["id"]), ("systemctl", "stop", unit))
    for words in outside:
        say(*words)
        assert stoker("wait", "box", "--state", "stopped", "--timeout", "120s").code == 0
        ended = inspect(stoker, "box")
        assert ended["state"] == "stopped" and ended["error"]["code"] == "stopped_outside", ended["error"]
        assert shown(unit)["LoadState"] == "not-found"
        assert stoker("start", "box").code == 0
        assert shown(unit)["ActiveState"] == "active"
    say("systemctl", "kill", "--signal=KILL", unit)
    assert stoker("wait", "box", "--state", "failed", "--timeout", "120s").code == 0
    assert inspect(stoker, "box")["error"]["code"] == "machine_died"
    until(lambda: shown(unit)["LoadState"] == "not-found", "a unit that failed is kept")
    # And while the daemon is away.
    assert stoker("start", "box").code == 0 and stoker("daemon", "stop").code == 0
    say("systemctl", "stop", unit)
    ended = inspect(stoker, "box")
    assert ended["state"] == "stopped" and ended["error"]["code"] == "stopped_outside", ended["error"]
    assert stoker("fsck").code == 0


def test_machines_outlive_the_daemons_own_unit(settings: Settings, short_dir: Path) -> None:
    """The daemon as a service with systemd's own defaults: what stops it ends everything in its control group, and no machine."""
    own = own_data(settings, short_dir)
    env = {
        "STOKER_DATA_DIR": str(own.data_dir),
        "STOKER_RUN_DIR": str(own.run_dir),
        "STOKER_ACCEL": own.accel,
        "STOKER_CONFIG": str(own.config_file),
    }
    stoker = CommandLine(own, {**env, "STOKER_URL": f"unix:{own.socket}"})
    service = f"stoker-test-{os.getpid()}.service"
    setting = [f"--setenv={name}={value}" for name, value in env.items()]

    def serve() -> None:
        say("systemd-run", "--quiet", "--collect", f"--unit={service}", "--service-type=notify", *setting, STOKER, "serve")

    serve()
    try:
        made = stoker("create", IMAGE, "--name", "box", "--memory", "256M")
        assert made.code == 0, made.error
        assert stoker("exec", "-d", "--tag", "job", "box", "--", "sh", "-c", "echo begun; exec sleep 1000").code == 0
        assert shown(service)["KillMode"] == "control-group"
        vmm = inspect(stoker, "box")["id"]
        pid = json.loads((own.run_dir / "sandboxes" / vmm / "shim.json").read_text())["vmm"]["pid"]
        for word in ("stop", "kill --signal=KILL"):
            say("systemctl", *word.split(), service)
            until(lambda: shown(service)["ActiveState"] in ("inactive", "failed"), "the daemon does not end")
            assert Path(f"/proc/{pid}").exists(), f"the machine went with the daemon ({word})"
            serve()
            [job] = json.loads(stoker("ps", "box", "--json").out)
            assert job["running"] and job["tag"] == "job"
            assert stoker("exec", "box", "--", "echo", "still here").text == "still here\n"
        assert stoker("fsck").code == 0
        assert stoker("rm", "box").code == 0
    finally:
        say("systemctl", "stop", service, check=False)


@pytest.mark.anyio
async def test_killed_right_after_the_unit_was_made(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with daemon(own.data_dir, own.run_dir, "real", "unit.after_enter") as dying:
        assert await dying.ask(do="create", name="victim", image=IMAGE) is None
    async with Engine.open(own, trace_kill="") as engine:
        assert await whole(engine, own.data_dir, own.run_dir) == {"victim": S.FAILED}
        assert (await engine.upkeep.fsck(repair=False)).clean
        await engine.destroy(ADMIN, "victim")
    assert "stoker-sb-" not in say("systemctl", "list-units", "--all", "--no-legend", "stoker-sb-*")


@pytest.mark.anyio
async def test_without_systemd_there_are_plain_groups(settings: Settings, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start, and when it goes away between the daemon's start and a create; the check puts that one into a unit later."""
    own = own_data(settings, short_dir)

    async def create(engine: Engine, name: str) -> str:
        operation = await engine.create(ADMIN, CreateSandbox(image=IMAGE, name=name, memory=256 * MIB))
        box = await engine.wait(ADMIN, operation.sandbox or "", frozenset({S.RUNNING, S.FAILED}), 200)
        assert box.state is S.RUNNING, box.error
        return box.id

    with monkeypatch.context() as patched:
        patched.setattr(systemd, "refused", lambda: "it is not there")
        async with Engine.open(own, trace_kill="") as engine:
            box = await create(engine, "plain")
            group = engine._core.places(box).cgroup
            assert group is not None and int((group / "memory.max").read_text()) == (256 + 384) * MIB
            assert (group / "cgroup.procs").read_text().split()
            assert (await engine.upkeep.fsck(repair=False)).clean
            await engine.destroy(ADMIN, "plain")
            assert not group.exists()
    group.parent.rmdir()
    async with Engine.open(own, trace_kill="") as engine:
        with monkeypatch.context() as patched:

            async def silent(*_: object) -> None:
                raise systemd._unreachable("a test")

            patched.setattr(Units, "enter", silent)
            box = await create(engine, "late")
        kinds = {entry.kind.value for entry in await engine._core.ledger.of(box)}
        assert "cgroup" in kinds and "unit" not in kinds
        assert (await engine.upkeep.fsck(repair=False)).clean
        await engine.destroy(ADMIN, "late")
    group.parent.rmdir()


@pytest.mark.anyio
async def test_the_check_knows_units(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with Engine.open(own, trace_kill="") as engine:
        operation = await engine.create(ADMIN, CreateSandbox(image=IMAGE, name="box", memory=256 * MIB))
        box = await engine.wait(ADMIN, operation.sandbox or "", frozenset({S.RUNNING}), 200)
        core, unit = engine._core, unit_name(box.id)
        where = systemd.unit_of(core.boxes[box.id].live.machine.vmm.pid)  # type: ignore[union-attr]
        assert where == (unit, Path("/sys/fs/cgroup/stoker.slice") / unit)
        await core.database.write(lambda db: db.execute("DELETE FROM owned WHERE kind = 'unit'").rowcount)
        report = await engine.upkeep.fsck(repair=True)
        assert [(one.kind, one.name, one.repaired) for one in report.differences] == [("unit", unit, True)]
        # Somebody moved it out.
        for pid in (where[1] / "cgroup.procs").read_text().split():
            Path("/sys/fs/cgroup/cgroup.procs").write_text(pid)
        until(lambda: shown(unit)["LoadState"] == "not-found", "an empty scope is kept")
        report = await engine.upkeep.fsck(repair=True)
        assert [(one.kind, one.name, one.repaired) for one in report.differences] == [("unit", unit, True)]
        assert systemd.unit_of(core.boxes[box.id].live.machine.vmm.pid) == where  # type: ignore[union-attr]
        assert (await engine.upkeep.fsck(repair=True)).differences == []
        await engine.destroy(ADMIN, "box")


@pytest.mark.anyio
async def test_what_a_unit_costs() -> None:
    """The time a create waits for its unit, told; and that two of a name are refused, and one that is gone is no error."""
    async with Units() as units:
        assert units.usable, units.problem
        times = []
        for number in range(20):
            sandbox = f"sb-{'z' * 18}{'abcdefghijklmnopqrst'[number]}2"
            process = await asyncio.create_subprocess_exec("/bin/sleep", "100")
            began = time.perf_counter()
            await units.enter(sandbox, [process.pid], "a test", Limits(memory=64 * MIB, pids=10, cpus=1))
            times.append((time.perf_counter() - began) * 1000)
            if number == 0:
                with pytest.raises(Exception, match="already"):
                    await units.enter(sandbox, [process.pid], "a test", Limits())
            await units.release(unit_name(sandbox))
            await units.release(unit_name(sandbox))
            assert await process.wait() == -signal.SIGTERM
        print(f"a unit: p50 {statistics.median(times):.1f} ms, worst {max(times):.1f} ms")


@pytest.mark.anyio
async def test_a_flood_costs_lines_and_not_the_journal(short_dir: Path) -> None:
    sandbox = "sb-" + "y" * 20
    read, write = os.pipe2(os.O_CLOEXEC)
    async with Units() as units:

        async def gate(pid: int) -> None:
            await units.enter(sandbox, [pid], "a test", Limits())

        options = ShimOptions(directory=short_dir, console=read, console_bytes=1 << 20, gate=gate, journal=sandbox)
        pair = await start(shim_path(), options, ["/bin/sleep", "1000"], {})
        os.close(read)
        lines = "".join(f"line {number}\x1b[31m\r\n" for number in range(20000)).encode()
        with open(write, "wb", closefd=True) as console:
            await asyncio.to_thread(console.write, lines)
        unit = unit_name(sandbox)
        until(lambda: "lines of the console were left out" in journal(unit), "a flood was not bounded")
        said = journal(unit).splitlines()
        assert "line 0[31m" in said and f"the machine began as process {pair.vmm.pid}" in said
        told = sum(line.startswith("line ") for line in said)
        left_out = sum(int(line.split()[0]) for line in said if line.endswith("were left out"))
        assert 200 <= told < 10000 and left_out > 0
        assert "\x1b" not in "".join(said)
        await units.release(unit)
    await asyncio.to_thread(os.waitpid, pair.shim.pid, 0)
    until(lambda: "the machine was ended by signal" in journal(unit), "the end is not in the journal")
    assert (short_dir / "console.log").read_bytes().startswith(b"line 0")
