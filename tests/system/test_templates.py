"""Templates with real guests: built whole or not at all, and the same for every sandbox that is made of one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from crashing import ADMIN, daemon, machines, quiet, whole
from engine_fixtures import own_data
from engine_guests import opened, run
from stoker.api.models import (
    BuildTemplate,
    CreateSandbox,
    CreateSnapshot,
    Event,
    Operation,
    OperationState,
    Principal,
    Sandbox,
    SandboxState,
    StartProcess,
    Template,
)
from stoker.engine import trace
from stoker.engine.engine import Engine
from stoker.engine.fsck.check import check_offline
from stoker.errors import Conflict, InvalidRequest, NotFound
from stoker.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]
S = SandboxState
MIB = 1 << 20
SERVICE = "i=0; while :; do i=$((i+1)); echo $i > /run/new; mv /run/new /run/beat; sleep 0.1; done"
READY = "test -s /run/beat"


async def said(engine: Engine, name: str, script: str) -> str:
    code, data = await run(engine, name, script)
    assert code == 0, data
    return data.decode()


async def ended(engine: Engine, **words: object) -> Operation:
    request = BuildTemplate(**{"name": "tpl", "memory": 256 * MIB, "image": "debian:12", **words})  # type: ignore[arg-type]
    operation = await engine.build_template(ADMIN, request)
    return await engine.wait_operation(ADMIN, operation.id, 600)


async def built(engine: Engine, **words: object) -> Template:
    operation = await ended(engine, **words)
    assert operation.state is OperationState.SUCCEEDED, operation.error
    return await engine.templates.get(ADMIN, operation.template or "")


async def tried(engine: Engine, image: str, **words: object) -> Operation:
    operation = await engine.create(ADMIN, CreateSandbox(image=image, **words))  # type: ignore[arg-type]
    return await engine.wait_operation(ADMIN, operation.id, 300)


async def made(engine: Engine, image: str, **words: object) -> Sandbox:
    operation = await tried(engine, image, **words)
    assert operation.state is OperationState.SUCCEEDED, operation.error
    return await engine.get(ADMIN, operation.sandbox or "")


async def log_of(engine: Engine, operation: str) -> list[str]:
    found: list[str] = []
    async with engine.operation_log(ADMIN, operation, 0) as parts:
        async for part in parts:
            found += part.lines
    return found


def events(engine: Engine, sandbox: str) -> list[Event]:
    return engine._core.events.since(ADMIN, sandbox, 0)


async def jobless(engine: Engine) -> None:
    """Until no template is being made."""
    async with asyncio.timeout(300):
        while any(task.get_name().startswith("template ") for task in engine._core._tasks):
            await asyncio.sleep(0.05)


async def emptied(engine: Engine) -> None:
    for one in await engine.templates.list(ADMIN):
        await engine.templates.remove(ADMIN, one.id)


async def failure(engine: Engine, **words: object) -> tuple[str, str, list[str]]:
    """Code, message and last lines of a build that fails; nothing of it is left."""
    operation = await ended(engine, **words)
    assert operation.state is OperationState.FAILED and operation.error is not None
    assert (await engine.list(ADMIN)).items == []
    assert not engine._core.snapshots or [one.template for one in engine._core.snapshots.values()] == list(engine._core.templates)
    return operation.error.code, operation.error.message, operation.error.console


async def test_sandboxes_of_one_have_all_that_was_set_up_and_are_no_twins(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        request = BuildTemplate(
            name="py",
            image="debian:12",
            memory=256 * MIB,
            setup=["echo set up by $(id -un) > /root/made; pwd; echo $GREETING", "useradd -m app && printf 'no newline'"],
            start=f"echo {'x' * 8} >/dev/null; {SERVICE}",
            ready=READY,
            env={"GREETING": "hello", "OTHER": "there"},
            user="root",
            workdir="/srv/work",
        )
        begun = await engine.build_template(ADMIN, request)
        with pytest.raises(Conflict, match="just being made"):
            await engine.build_template(ADMIN, request)
        lines = await log_of(engine, begun.id)  # live, and ends with the build
        operation = await engine.wait_operation(ADMIN, begun.id, 10)
        assert operation.state is OperationState.SUCCEEDED, operation.error
        assert {"snapshot", "step_1", "step_2", "machine", "boot", "start"} <= set(operation.steps)
        for line in ("/srv/work", "hello", "no newline", "==> step 2 of 2: useradd -m app && printf 'no newline'"):
            assert line in lines
        assert (await engine.list(ADMIN)).items == [], "the machine of the build is gone"
        template = await engine.templates.get(ADMIN, "py")
        assert template.id == operation.template and template.memory and template.log == lines
        assert (template.setup, template.start, template.workdir, template.user) == (
            request.setup,
            request.start,
            "/srv/work",
            "root",
        )
        assert template.own and [one.id for one in await engine.templates.list(ADMIN)] == [template.id]
        assert list(await engine.snapshots.list(ADMIN)) == list(await engine.snapshots.prune(ADMIN)) == []
        with pytest.raises(NotFound):
            await engine.snapshots.get(ADMIN, engine._core.templates[template.id].snapshot)

        first = await made(engine, "py", name="a", env={"OTHER": "mine"}, labels={"k": "v"})
        second = await made(engine, "template:py", name="b", user="app", workdir="/tmp", hostname="bee")
        for box in (first, second):
            assert (box.origin, box.template, box.image) == ("template", "py", "debian:12")
            assert (box.resources.memory, box.state) == (256 * MIB, S.RUNNING)
        assert first.labels == {"k": "v"}
        twins = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid"
        assert await said(engine, "a", twins) != await said(engine, "b", twins)
        assert await said(engine, "a", "hostname; id -un; pwd; echo $GREETING $OTHER; cat /root/made") == (
            "a\nroot\n/srv/work\nhello mine\nset up by root\n"
        )
        assert await said(engine, "b", "hostname; id -un; pwd; echo $GREETING $OTHER") == "bee\napp\n/tmp\nhello there\n"
        for name in ("a", "b"):
            process = await engine.processes.get(ADMIN, name, "start")
            assert process.running and process.argv == ["/bin/sh", "-c", request.start]
            before = int(await said(engine, name, "cat /run/beat"))
            assert int(await said(engine, name, "sleep 1; cat /run/beat")) > before
        # What the machine in memory is, cannot be another's.
        for words in ({"cpus": 2}, {"memory": 512 * MIB}, {"network": "none"}, {"init": "image"}):
            with pytest.raises(Conflict, match="is there already") as refused:
                await engine.create(ADMIN, CreateSandbox(image="py", **words))  # type: ignore[arg-type]
            assert "--cold" in refused.value.hint
        with pytest.raises(Conflict, match="disk of py"):
            await engine.create(ADMIN, CreateSandbox(image="py", disk=64 << 30))
        cold = await made(engine, "py", name="c", cpus=2, cold=True)
        assert (cold.origin, cold.resources.cpus, cold.resources.memory) == ("boot", 2, 256 * MIB)
        assert await said(engine, "c", "nproc; cat /root/made; test -s /run/beat; pwd") == "2\nset up by root\n/srv/work\n"
        # Who sees it, and who uses what it stands on.
        stranger = Principal(owner="key-other", admin=False)
        with pytest.raises(NotFound):
            await engine.templates.get(stranger, "py")
        with pytest.raises(NotFound):
            await engine.create(stranger, CreateSandbox(image="template:py"))
        for box in (first, second, cold):
            await engine.destroy(ADMIN, box.id)
        image = await engine.images.image(ADMIN, "debian:12")
        assert image.used_by == ["template py"]
        with pytest.raises(Conflict) as refused:
            await engine.images.remove("images", image.digest)
        assert refused.value.code in ("image_shared", "image_in_use")
        # It goes while sandboxes are just being made from it: they are made.
        begun = [await engine.create(ADMIN, CreateSandbox(image="py")) for _ in range(3)]
        await engine.templates.remove(ADMIN, "py")
        boxes = [(await engine.wait_operation(ADMIN, one.id, 120)).sandbox for one in begun]
        last, *others = [await engine.get(ADMIN, one or "") for one in boxes]
        assert [one.origin for one in (last, *others)] == ["template"] * 3
        assert (await said(engine, last.id, "cat /root/made")).startswith("set up")
        await engine.pause(ADMIN, last.id)
        assert (await said(engine, last.id, "cat /root/made")).startswith("set up")
        with pytest.raises(NotFound):
            await engine.create(ADMIN, CreateSandbox(image="template:py"))


async def test_builds_that_fail_leave_what_was_there(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        with pytest.raises(InvalidRequest):
            await engine.build_template(ADMIN, BuildTemplate(name="x"))
        with pytest.raises(InvalidRequest, match="setup cannot be chosen"):
            await engine.build_template(ADMIN, BuildTemplate(name="x", source="box", setup=["true"]))
        assert (await failure(engine, image="debian:nosuch"))[0] == "image_unknown"
        kept = await built(engine, setup=["echo old > /made"], start=SERVICE, ready=READY)
        code, message, lines = await failure(engine, setup=["true", "echo first; echo last >&2; exit 3"])
        assert code == "template_step_failed" and "step 2 of 2" in message and "status 3" in message and lines[-1] == "last"
        code, message, lines = await failure(engine, setup=["echo begun; sleep 100"], step_timeout=1.0)
        assert code == "template_step_timeout" and lines == ["begun"]
        code, message, lines = await failure(engine, start="echo cannot >&2; exit 1", ready="false")
        assert code == "template_start_failed" and "status 1" in message and lines == ["cannot"]
        code, message, lines = await failure(engine, start="sleep 1000", ready="echo not yet; exit 1", ready_timeout=1.5)
        assert code == "template_not_ready" and "not yet" in message
        code, message, _ = await failure(engine, setup=["kill -9 $$"])
        assert code == "template_step_failed" and "signal 9" in message
        # Cancelled while a step runs.
        begun = await engine.build_template(ADMIN, BuildTemplate(name="tpl", image="debian:12", setup=["echo here; sleep 100"]))
        async with engine.operation_log(ADMIN, begun.id, 0) as parts:
            async for part in parts:
                if "here" in part.lines:
                    break
        [machine] = (await engine.list(ADMIN)).items
        assert machine.labels == {"stoker.build": "tpl"} and machine.state is S.RUNNING
        assert (await engine.cancel_operation(ADMIN, begun.id)).state is OperationState.CANCELLED
        assert (await engine.list(ADMIN)).items == []
        assert (await engine.templates.get(ADMIN, "tpl")).id == kept.id
        # Replaced by what is whole; what stood on the old one goes on.
        box = await made(engine, "tpl", name="old")
        fresh = await built(engine, image="tpl", setup=["cat /made; echo new > /made"], memory=None)
        assert fresh.id != kept.id and "old" in fresh.log and fresh.made_from == "tpl"
        with pytest.raises(NotFound):
            await engine.templates.get(ADMIN, kept.id)
        assert [one.id for one in await engine.templates.list(ADMIN)] == [fresh.id]
        assert await said(engine, box.id, "cat /made; test -s /run/beat") == "old\n"
        assert await said(engine, (await made(engine, "tpl")).id, "cat /made") == "new\n"


async def test_memory_that_cannot_be_used_is_replaced(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        template = await built(engine, setup=["echo kept > /made"], start=SERVICE, ready=READY)
        assert (await made(engine, "tpl")).origin == "template"
        place = own.data_dir / "snapshots" / engine._core.templates[template.id].snapshot
    # The daemon at rest knows what is a template's, too.
    assert (await check_offline(own, repair=True)).clean and place.exists()
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**manifest, "made_by": {**manifest["made_by"], "vmm": "99.0.0"}}))
    async with opened(own) as engine:
        boxes = await asyncio.gather(*(made(engine, "tpl") for _ in range(2)))
        for box in boxes:
            assert (box.origin, box.template) == ("boot", "tpl")
            assert await said(engine, box.id, "cat /made; test -s /run/beat") == "kept\n"
            assert (await engine.processes.get(ADMIN, box.id, "start")).running
            [told] = [event for event in events(engine, box.id) if event.kind == "template.unusable"]
            assert told.data["template"] == "tpl" and "vmm (99.0.0 then" in told.data["message"]
        assert "99.0.0" in (await engine.templates.get(ADMIN, "tpl")).unusable or not place.exists()
        await jobless(engine)
        made_anew = [
            one for one in (await engine.operations(ADMIN, sandbox=None, limit=100, cursor=None)).items if one.kind == "template"
        ]
        assert [one.state for one in made_anew] == [OperationState.SUCCEEDED]
        again = await engine.templates.get(ADMIN, "tpl")
        assert (again.id, again.unusable, place.exists()) == (template.id, "", False)
        assert (await engine.upkeep.fsck(repair=True)).clean
        box = await made(engine, "tpl")
        assert box.origin == "template" and await said(engine, box.id, "cat /made; test -s /run/beat") == "kept\n"
        assert (await engine.processes.get(ADMIN, box.id, "start")).running
        place = own.data_dir / "snapshots" / engine._core.templates[template.id].snapshot
    with open(place / "memory", "r+b") as file:
        file.seek(40 * MIB)
        file.write(b"damage")
    async with opened(own) as engine:
        assert (await made(engine, "tpl", name="x")).origin == "boot"
        await jobless(engine)
        assert (await made(engine, "tpl")).origin == "template"
        place = own.data_dir / "snapshots" / engine._core.templates[template.id].snapshot
        (place / "state").unlink()
        report = await engine.upkeep.fsck(repair=False)
        assert [(one.kind, one.found) for one in report.differences] == [("template", "no file state")]
        assert (await made(engine, "tpl")).origin == "template", "what is loaded is not read again"
        await engine.templates.remove(ADMIN, "tpl")


async def test_of_a_disk_alone_a_snapshot_and_a_sandbox(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        disk = await built(engine, name="disk", setup=["echo d > /made"], start=SERVICE, ready=READY, disk_only=True)
        assert not disk.memory
        box = await made(engine, "disk", name="box", cpus=2)
        assert (box.origin, box.resources.cpus) == ("boot", 2)
        assert await said(engine, "box", "cat /made; test -s /run/beat; nproc") == "d\n2\n"
        assert not [event for event in events(engine, box.id) if event.kind == "template.unusable"]
        await engine.processes.start(ADMIN, "box", StartProcess(argv=["sleep", "1000"], tag="mine"))
        live = await built(engine, name="live", image=None, source="box", memory=None, env={"A": "b"}, workdir="/tmp")
        assert (await engine.get(ADMIN, "box")).state is S.RUNNING and live.made_from == "box"
        await said(engine, "box", "head -c 3M /dev/zero | tr '\\0' x > /dev/shm/x; echo s > /made; sync")
        await engine.snapshot(ADMIN, "box", CreateSnapshot(name="kept"))
        await engine.pause(ADMIN, "box")
        await built(engine, name="snapped", image=None, source="kept", memory=None)
        await built(engine, name="asleep", image=None, source="box", memory=None)
        assert (await engine.get(ADMIN, "box")).state is S.PAUSED
        await engine.snapshots.remove(ADMIN, "kept")
        await engine.destroy(ADMIN, "box")
        for name, expected in (("live", "d b /tmp 0"), ("snapped", "s  / 3145728"), ("asleep", "s  / 3145728")):
            copy = await made(engine, name)
            assert (copy.origin, copy.resources.cpus, copy.template) == ("template", 2, name)
            words = 'echo $(cat /made) "$A" $(pwd) $(cat /dev/shm/x 2>/dev/null | wc -c)'
            assert await said(engine, copy.id, words) == f"{expected}\n"
            assert (await engine.processes.get(ADMIN, copy.id, "mine")).running
        assert list(await engine.snapshots.list(ADMIN)) == []
        await emptied(engine)


async def _crash(settings: Settings, point: str) -> None:
    data, run_dir = settings.data_dir, settings.run_dir
    async with daemon(data, run_dir, "real") as first:
        await first.sure(do="template", name="tpl", words="old")
        removing = point == "template.after_unmark"
        await first.sure(do="arm", point=point)
        if removing:
            assert await first.ask(do="remove_template", name="tpl") is None
        else:
            assert await first.ask(do="template", name="tpl", words="new") is None
    async with Engine.open(settings, trace_kill="") as engine:
        assert await whole(engine, data, run_dir) == {}, point
        found = list(await engine.templates.list(ADMIN))
        assert len(found) == (not removing)
        if found:
            box = await made(engine, "tpl")
            newer = point in ("template.after_row", "template.after_replaced", "snapshot.after_unmark", "snapshot.after_gone")
            assert await said(engine, box.id, "cat /made; test -s /run/beat") == ("new\n" if newer else "old\n"), point
            await engine.destroy(ADMIN, box.id)
            await emptied(engine)
        await quiet(engine)
        await whole(engine, data, run_dir)


SHORT = ("template.after_setup", "template.after_snapshot", "template.after_row", "template.after_unmark")
ALL = tuple(point for point in trace.TEMPLATE if point not in ("template.after_unusable", "template.after_again"))


@pytest.mark.parametrize("points", [SHORT, pytest.param(ALL + trace.SNAPSHOT, marks=pytest.mark.full)], ids=["some", "all"])
async def test_crashes(settings: Settings, short_dir: Path, points: tuple[str, ...]) -> None:
    own = own_data(settings, short_dir)
    for point in points:
        await _crash(own, point)
    async with opened(own):
        pass
    assert machines(own.run_dir) == set()


@pytest.mark.full
@pytest.mark.parametrize("point", ["template.after_unusable", "template.after_again", "snapshot.after_ready", "template.after_row"])
async def test_crashes_while_memory_is_made_anew(settings: Settings, short_dir: Path, point: str) -> None:
    own = own_data(settings, short_dir)
    async with Engine.open(own, trace_kill="") as engine:
        template = await built(engine, setup=["echo kept > /made"], start=SERVICE, ready=READY)
        place = own.data_dir / "snapshots" / engine._core.templates[template.id].snapshot
    (place / "memory").unlink()
    async with daemon(own.data_dir, own.run_dir, "real") as first:
        await first.sure(do="arm", point=point)
        assert await first.ask(do="create", image="tpl", name="box", wait=True) is None
    async with opened(own) as engine:
        box = await made(engine, "tpl")
        assert await said(engine, box.id, "cat /made; test -s /run/beat") == "kept\n"
        await jobless(engine)
        assert (await made(engine, "tpl")).origin == "template"
        await emptied(engine)
