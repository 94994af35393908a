"""Pause and resume with real guests: nothing of a paused machine is left on the host but files, and all of it comes back."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from crashing import ADMIN, daemon, machines, output, quiet, whole
from engine_fixtures import own_data
from engine_guests import make, opened, run
from stoker.api.models import OutputMode, SandboxState, StartProcess, Timeout, TimeoutMode
from stoker.engine import trace
from stoker.engine.engine import Engine
from stoker.errors import HostError, StokerError
from stoker.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]
S = SandboxState
MIB = 1 << 20
COUNTER = "i=0; exec 3>/root/held; rm /root/held; while :; do i=$((i+1)); echo line $i; echo $i >&3; sleep 0.1; done"
WHO = "cat /proc/sys/kernel/random/boot_id /etc/machine-id 2>/dev/null; hostname; ip -o addr 2>/dev/null; cat /proc/net/route"


async def said(engine: Engine, name: str, script: str) -> str:
    code, data = await run(engine, name, script)
    assert code == 0, data
    return data.decode()


def saved(settings: Settings, box: str) -> Path:
    [found] = [path for path in (settings.data_dir / "snapshots").iterdir() if path.name.startswith(box)]
    return found


async def lines(engine: Engine, name: str, last: int) -> None:
    """The job's output, without a gap, up to its line of this number."""
    text = await output(engine, name, b"line %d\n" % last)
    assert text.startswith("".join(f"line {n}\n" for n in range(1, last + 1)).encode())


@pytest.mark.parametrize("cold", [True, False], ids=["booted", "golden"])
async def test_everything_comes_back(settings: Settings, short_dir: Path, cold: bool) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        if not cold:
            await make(engine, name="first")
            async with asyncio.timeout(300):
                while (await make(engine)).origin == "boot":
                    await asyncio.sleep(1)
        box = await make(engine, name="box", cold=cold)
        await engine.processes.start(ADMIN, "box", StartProcess(argv=["sh", "-c", COUNTER], tag="job"))
        cat = await engine.processes.open(ADMIN, "box", StartProcess(argv=["cat"], stdin=True, mode=OutputMode.BLOCK))
        before = await said(engine, "box", WHO)
        for number in range(3):
            pattern = await said(engine, "box", f"yes {number} | head -c 24M > /dev/shm/pattern; md5sum /dev/shm/pattern")
            await said(engine, "box", f"echo {number} >> /root/kept")  # not synced
            paused = await engine.pause(ADMIN, "box")
            assert (paused.state, paused.reason, paused.error) == (S.PAUSED, "", None)
            assert set(paused.actions) >= {"resume", "destroy", "stop"} and "exec" not in paused.actions
            assert box.id not in machines(own.run_dir)
            assert not (own.data_dir / "memory" / box.id).exists()
            held = engine._core.admission.held(box.id)
            assert held is not None and (held.memory, held.cpus) == (0, 0) and held.disk
            steps = (await engine.operation(ADMIN, paused.operation or "")).steps
            assert {"mark", "stop", "take", "save", "end", "disk"} <= steps.keys()
            manifest = json.loads((saved(own, box.id) / "manifest.json").read_text())
            assert manifest["sandbox"] == box.id and manifest["image"]["digest"] == box.image_digest
            await whole(engine, own.data_dir, own.run_dir)
            back = await engine.resume(ADMIN, "box")
            assert back.state is S.RUNNING
            assert {"restore", "guest", "all"} <= (await engine.operation(ADMIN, back.operation or "")).steps.keys()
            assert await said(engine, "box", "md5sum /dev/shm/pattern") == pattern
            await cat.write(b"%d\n" % number)
            piece = await cat.read()
            assert piece is not None and piece.data == b"%d\n" % number
            await quiet(engine)
            assert not list((own.data_dir / "snapshots").iterdir())
        assert await said(engine, "box", "cat /root/kept") == "0\n1\n2\n"
        assert await said(engine, "box", WHO) == before
        await lines(engine, "box", 30)
        await cat.aclose()
        events = await engine._core.database.read(
            lambda db: db.execute("SELECT event FROM events WHERE sandbox = ? ORDER BY number", (box.id,)).fetchall()
        )
        states = [e["data"]["state"] for (text,) in events if (e := json.loads(text))["kind"] == "sandbox.state"]
        assert states[-4:] == ["pausing", "paused", "resuming", "running"]
        # Little changed since: what it is paused in is small, and its base is the same file.
        await engine.pause(ADMIN, "box")
        place = saved(own, box.id)
        assert (place / "delta").exists() and (place / "delta").stat().st_size < 17 * MIB
        await engine.resume(ADMIN, "box")
        await said(engine, "box", "true")


async def test_whoever_uses_it_resumes_it_once(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        box = await make(engine, name="box", timeout=Timeout(seconds=600, mode=TimeoutMode.IDLE))
        assert box.timeout is not None and box.timeout.action == "pause"
        await engine.pause(ADMIN, "box")
        answers = await asyncio.gather(*(said(engine, "box", f"echo {n}") for n in range(12)))
        assert answers == [f"{n}\n" for n in range(12)]
        resumes = [o for o in (await engine.operations(ADMIN, sandbox=box.id, limit=100, cursor=None)).items if o.kind == "resume"]
        assert len(resumes) == 1
        # Who looked on at a process all the time uses it by writing to it.
        cat = await engine.processes.open(ADMIN, "box", StartProcess(argv=["cat"], stdin=True, mode=OutputMode.BLOCK))
        await engine.pause(ADMIN, "box")
        await cat.write(b"here\n")
        assert (await cat.read()).data == b"here\n"  # type: ignore[union-attr]
        await cat.aclose()
        # While it is just being paused: it is paused, then resumed.
        pausing = asyncio.ensure_future(engine.pause(ADMIN, "box"))
        await engine.wait(ADMIN, "box", frozenset({S.PAUSING}), 30)
        assert await said(engine, "box", "echo on") == "on\n"
        await pausing
        assert (await engine.get(ADMIN, "box")).state is S.RUNNING
        # By itself, when nobody has used it for a while, however often.
        await engine.set_timeout(ADMIN, "box", Timeout(seconds=1, mode=TimeoutMode.IDLE))
        for _ in range(2):
            await engine.wait(ADMIN, "box", frozenset({S.PAUSED}), 60)
            assert (await engine.get(ADMIN, "box")).expires_at is None
            assert await said(engine, "box", "sleep 2; echo used") == "used\n"
        await engine.wait(ADMIN, "box", frozenset({S.PAUSED}), 60)


async def test_a_daemon_that_restarts_finds_it_paused(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with Engine.open(own, trace_kill="") as engine:
        box = await make(engine, name="box")
        await engine.processes.start(ADMIN, "box", StartProcess(argv=["sh", "-c", COUNTER], tag="job"))
        await lines(engine, "box", 3)
        # A machine that was adopted can be put away, too.
    async with Engine.open(own, trace_kill="") as engine:
        await engine.pause(ADMIN, "box")
        assert machines(own.run_dir) == set()
    async with opened(own) as engine:
        found = await engine.get(ADMIN, "box")
        assert (found.id, found.state) == (box.id, S.PAUSED)
        await engine.resume(ADMIN, "box")
        await lines(engine, "box", 10)
        # The base it maps now was written at the pause: it is this one's alone, and is not left behind.
        await engine.pause(ADMIN, "box")
        await engine.destroy(ADMIN, "box")
        assert await whole(engine, own.data_dir, own.run_dir) == {}


async def test_what_does_not_fit_is_refused_and_boots_from_its_disk(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        box = await make(engine, name="box")
        await said(engine, "box", "echo kept > /root/kept; sync")
        await engine.pause(ADMIN, "box")
        place = saved(own, box.id) / "manifest.json"
        manifest = json.loads(place.read_text())
        other = {**manifest, "made_by": {**manifest["made_by"], "vmm": "99.0.0"}}
        place.write_text(json.dumps(other))
        with pytest.raises(HostError, match=r"another vmm \(99.0.0 then, ") as refused:
            await engine.resume(ADMIN, "box")
        assert refused.value.code == "saved_unusable" and "stoker start box" in refused.value.hint
        paused = await engine.get(ADMIN, "box")
        assert paused.state is S.PAUSED and paused.error is not None and paused.error.code == "saved_unusable"
        with pytest.raises(StokerError):
            await said(engine, "box", "true")
        await whole(engine, own.data_dir, own.run_dir)
        # It was only the manifest: all is there, and is taken up.
        place.write_text(json.dumps(manifest))
        assert await said(engine, "box", "cat /root/kept") == "kept\n"
        await engine.pause(ADMIN, "box")
        memory = saved(own, box.id) / "state"
        memory.write_bytes(b"damaged" + memory.read_bytes()[7:])
        with pytest.raises(HostError, match="damaged"):
            await engine.resume(ADMIN, "box")
        stopped = await engine.stop(ADMIN, "box", 1)
        assert stopped.state is S.STOPPED and not list((own.data_dir / "snapshots").iterdir())
        operation = await engine.start(ADMIN, "box")
        await engine.wait_operation(ADMIN, operation.id, 300)
        assert await said(engine, "box", "cat /root/kept") == "kept\n"


async def test_what_it_is_paused_in_is_gone(settings: Settings, short_dir: Path) -> None:
    """The check sees it, and mends it: nothing brings the memory back, the disk is there."""
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        box = await make(engine, name="box")
        await said(engine, "box", "echo kept > /root/kept; sync")
        await engine.pause(ADMIN, "box")
        assert (await engine.upkeep.fsck(repair=False)).clean
        place = saved(own, box.id)
        (place / "state").unlink()
        for repair in (False, True):
            [found] = (await engine.upkeep.fsck(repair=repair)).differences
            assert (found.kind, found.name, found.found, found.repaired) == ("saved", str(place), "no file state", repair)
        stopped = await engine.get(ADMIN, "box")
        assert stopped.state is S.STOPPED and stopped.error is not None and stopped.error.code == "saved_lost"
        assert (await engine.upkeep.fsck(repair=False)).clean and not place.exists()
        operation = await engine.start(ADMIN, "box")
        await engine.wait_operation(ADMIN, operation.id, 300)
        assert await said(engine, "box", "cat /root/kept") == "kept\n"


async def test_a_pause_that_fails_lets_it_go_on(settings: Settings, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        await make(engine, name="box")
        await engine.processes.start(ADMIN, "box", StartProcess(argv=["sh", "-c", COUNTER], tag="job"))

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("stoker.host.durable.sync_directory", full)
        with pytest.raises(HostError, match="No space left"):
            await engine.pause(ADMIN, "box")
        assert (await engine.get(ADMIN, "box")).state is S.RUNNING
        await lines(engine, "box", 5)
        await whole(engine, own.data_dir, own.run_dir)
        monkeypatch.undo()
        await engine.freeze(ADMIN, "box")
        await engine.pause(ADMIN, "box")
        await lines(engine, "box", 8)


SHORT = ("pause.after_saved", "pause.after_process", "resume.after_restore", "resume.after_thaw")
"""The points that the short run takes; the long one takes them all."""


async def _crash(settings: Settings, point: str) -> None:
    """A daemon that is killed at ``point``. What runs in the sandbox goes on, whatever was reached: paused or not, it is there."""
    data, run_dir = settings.data_dir, settings.run_dir
    async with daemon(data, run_dir, "real") as first:
        await first.has_box(COUNTER)
        if point.startswith("resume"):
            assert (await first.sure(do="pause", name="box"))["state"] == "paused"
        await first.sure(do="arm", point=point)
        answer = await first.ask(do=point.partition(".")[0], name="box")
        if point != "resume.after_saved_gone":  # nobody waits for that one
            assert answer is None, answer
        else:
            await first.process.wait()
    async with Engine.open(settings, trace_kill="") as engine:
        state = (await whole(engine, data, run_dir))["box"]
        paused = point in ("pause.after_process", "pause.after_disk", "pause.after_paused")
        paused = paused or point in ("resume.after_mark", "resume.after_directory", "resume.after_launch", "resume.after_restore")
        assert state is (S.PAUSED if paused else S.RUNNING), (point, state)
        number = int((await run(engine, "box", "cat /proc/$(pgrep -f 'i=0')/fd/3 | tail -1"))[1] or b"1")
        await lines(engine, "box", number + 3)
        await whole(engine, data, run_dir)


@pytest.mark.parametrize(
    "points", [SHORT, pytest.param((*trace.PAUSE, *trace.RESUME), marks=pytest.mark.full)], ids=["some", "all"]
)
async def test_crashes(settings: Settings, short_dir: Path, points: tuple[str, ...]) -> None:
    own = own_data(settings, short_dir)
    for point in points:
        await _crash(own, point)
    async with opened(own):
        pass
