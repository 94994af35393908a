"""Templates without guests: what a build says, what a create would do, builds that fail and what they leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from engine_host import HostBooter
from stoker.api.models import (
    BuildTemplate,
    CreateSandbox,
    NetworkMode,
    Operation,
    OperationState,
    Principal,
    Quota,
    Resources,
    SandboxState,
    SnapshotState,
    VolumeMount,
)
from stoker.engine.engine import Engine
from stoker.engine.images import Images, is_used, users
from stoker.engine.state import Record, SnapshotRecord
from stoker.engine.template_steps import LINE, LINES, MOST, SIZE, Log, _Lines
from stoker.engine.template_use import prospect, use
from stoker.engine.templates import TemplateRecord, Templates
from stoker.errors import CapacityExhausted, Conflict, InvalidRequest, NotFound
from stoker.settings import Settings

pytestmark = pytest.mark.anyio
ADMIN = Principal()
MIB = 1 << 20


def test_a_log_holds_its_end() -> None:
    log = Log()
    for number in range(LINES + 10):
        log.line(f"line {number}")
    assert log.next == LINES + 10 and log.first == 10
    assert log.read(0, 2) == (["line 10", "line 11"], 12)
    assert log.read(LINES + 9) == ([f"line {LINES + 9}"], LINES + 10)
    assert log.read(LINES + 50) == ([], LINES + 50)
    for _ in range(SIZE // LINE + 5):
        log.line("x" * 3 * LINE)
    lines, _ = log.read(0, LINES)
    assert all(len(line) == LINE for line in lines) and sum(map(len, lines)) <= SIZE
    assert sum(len(line) + 1 for line in log.tail(5000)) <= 5000


def test_output_becomes_lines_that_harm_no_terminal() -> None:
    log = Log()
    lines = _Lines(log)
    lines.write(b"first\nse")
    lines.write("cond é".encode()[:-1])
    assert log.read(0)[0] == ["first"]
    lines.write("é".encode()[-1:] + b"\r\n10%\r50%\rdone\n\x1b]0;title\x07\xff\n")
    lines.write(b"rest")
    lines.end()
    assert log.read(0)[0] == [
        "first",
        "second é",
        "done",
        "\N{REPLACEMENT CHARACTER}]0;title" + "\N{REPLACEMENT CHARACTER}" * 2,
        "rest",
    ]
    lines.write(b"y\n" * 100_000)
    assert log.next == 5 + 1 + MOST and log.read(5, 1)[0] == [f"({100_000 - MOST} lines more)"]
    lines.write(b"z" * 50_000)
    assert len(lines._rest) <= 4 * LINE


async def test_a_log_is_followed_to_its_end() -> None:
    log = Log()
    log.line("a")
    found: list[str] = []

    async def follow() -> None:
        async for part in log.follow(0):
            found.extend(part.lines)

    task = asyncio.ensure_future(follow())
    await asyncio.sleep(0)
    log.line("b")
    await asyncio.sleep(0)
    assert not task.done()
    log.close()
    await task
    assert found == ["a", "b"] and [part async for part in log.follow(0)][0].lines == ["a", "b"]


def kept(memory: bool = True, name: str = "py", owner: str = "local") -> tuple[Templates, TemplateRecord]:
    request = CreateSandbox(image="debian:12", cpus=2, memory=256 * MIB, network=NetworkMode.USER)
    box = Record(
        id="sb-x",
        owner=owner,
        state=SandboxState.RUNNING,
        request=request,
        created_at=1.0,
        resources=Resources(cpus=2, memory=256 * MIB, disk=1 << 30),
        kernel="debian:12",
        env={"A": "b"},
    )
    snapshot = SnapshotRecord(
        id="sn-x", owner=owner, state=SnapshotState.READY, created_at=1.0, box=box, memory=memory, template="tp-x"
    )
    template = TemplateRecord(id="tp-x", owner=owner, name=name, created_at=1.0, snapshot="sn-x", made_from="debian:12")
    core: Any = SimpleNamespace(
        settings=SimpleNamespace(data_dir=Path("/nowhere")), snapshots={"sn-x": snapshot}, templates={"tp-x": template}
    )
    return Templates(core, None), template  # type: ignore[arg-type]


def test_what_a_create_would_do() -> None:
    templates, template = kept()

    def would(**words: Any) -> Any:
        return prospect(templates, template, CreateSandbox(image="py", **words))

    assert would().restores
    assert would(
        cpus=2, memory=256 * MIB - 5, network="user", kernel="debian:12", disk=1 << 30, env={"C": "d"}, hostname="h"
    ).restores
    other: list[dict[str, Any]] = [
        {"cpus": 1},
        {"memory": 512 * MIB},
        {"network": "none"},
        {"init": "image"},
        {"kernel": "debian:13"},
        {"initrd": "/x"},
        {"volumes": [VolumeMount(name="v", path="/v")]},
        {"app": "0" * 64},
    ]
    for words in other:
        with pytest.raises(Conflict) as refused:
            would(**words)
        assert (
            refused.value.code == "template_fixed" and "--cold" in refused.value.hint and next(iter(words)) in refused.value.message
        )
        found = would(cold=True, **words)
        assert (found.restores, found.why) == (False, "asked for")
    with pytest.raises(Conflict, match="MiB"):
        would(disk=2 << 30, cold=True)
    templates.unusable["sn-x"] = "another QEMU"
    found = would()
    assert (found.restores, found.why) == (False, "another QEMU")
    templates, template = kept(memory=False)
    assert not would(cpus=1).restores


def test_which_names_are_templates() -> None:
    templates, template = kept()
    owner, other = Principal(owner="local", admin=False), Principal(owner="key-x", admin=False)
    assert templates.named(owner, "py") is template and templates.named(owner, "tp-x") is template
    assert templates.named(owner, "template:py") is template and templates.named(other, "py") is None
    for image in ("debian:12", "docker:py", "py:latest", "./py", "nosuch"):
        assert templates.named(owner, image) is None
    for image in ("template:py", "template:", "template:nosuch"):
        with pytest.raises(NotFound):
            templates.named(other, image)
    used = use(templates, owner, CreateSandbox(image="py", env={"C": "d"}, cpus=2, name="n"), lambda _: None)
    assert used is not None and used.row(
        Record(id="sb-y", owner="local", state=SandboxState.CREATING, request=CreateSandbox(image="py", name="n"), created_at=2.0)
    ).env == {"A": "b", "C": "d"}


def test_what_a_template_stands_on_is_in_use() -> None:
    templates, _ = kept()
    core = templates.core
    box = msgspec.structs.replace(core.snapshots["sn-x"].box, image_digest="d1", image_path="/i/d1/rootfs.ext4", kernel_path="k1")
    core.snapshots["sn-x"] = msgspec.structs.replace(core.snapshots["sn-x"], box=box)
    core.boxes = {}
    core.pools = SimpleNamespace(opened=dict)  # type: ignore[assignment]
    for kind, digest in (("images", "d1"), ("kernels", "k1")):
        assert [user.label for user in users(core, kind, digest)] == ["template py"] and is_used(core, kind, digest)
        item: Any = SimpleNamespace(digest=digest)
        refused = Images._in_use(SimpleNamespace(_core=core), kind, "debian:12", item)  # type: ignore[arg-type]
        assert "template py" in refused.message and refused.hint == "stoker template rm py"
        assert not users(core, kind, "other")
    core.snapshots.clear()
    core.templates.clear()
    assert not is_used(core, "images", "d1")


def test_there_are_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    templates, _ = kept()
    monkeypatch.setattr("stoker.engine.templates.MOST", 1)
    templates.check_room("local", "py")  # it is replaced
    templates.check_room("other", "new")
    with pytest.raises(CapacityExhausted):
        templates.check_room("local", "new")


@pytest.mark.parametrize(
    "words",
    [
        {"name": "a b"},
        {"name": "template:x"},
        {"setup": ["true"] * 129},
        {"setup": ["x" * (64 << 10) + "x"]},
        {"setup": [""]},
        {"start": "a\0b"},
        {"step_timeout": 0},
        {"ready_timeout": 1e9},
        {"workdir": "relative"},
        {"from": "a/b"},
        {"source": "box"},
    ],
    ids=lambda words: next(iter(words)),
)
def test_requests_are_bounded(words: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"name": "x", "image": "debian:12", **words}, BuildTemplate)


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Engine]:
    settings = Settings(directory / "data", directory / "run", directory / "none.toml")
    async with Engine.open(settings, booter=HostBooter()) as engine:
        yield engine


async def ended(engine: Engine, who: Principal = ADMIN, **words: Any) -> Operation:
    operation = await engine.build_template(who, BuildTemplate(**{"name": "tpl", "image": "host", **words}))
    return await engine.wait_operation(who, operation.id, 60)


async def test_builds_that_fail_leave_nothing(short_dir: Path) -> None:
    async with opened(short_dir) as engine:
        for words in ({"image": None}, {"source": "box"}, {"image": None, "source": "x", "cpus": 2}):
            with pytest.raises(InvalidRequest):
                await ended(engine, **words)
        failed = await ended(engine, setup=["echo here", "echo there; exit 7"])
        assert failed.error is not None and failed.error.code == "template_step_failed"
        assert failed.error.details == {"step": "step 2 of 2", "exit_code": 7, "signal": None} and failed.error.console == ["there"]
        async with engine.operation_log(ADMIN, failed.id, 0) as parts:
            lines = [line async for part in parts for line in part.lines]
        assert lines[1:5] == ["==> step 1 of 2: echo here", "here", "==> step 2 of 2: echo there; exit 7", "there"]
        failed = await ended(engine, setup=["sleep 60 & disown; exit 0"], ready="exit 4", ready_timeout=0.3)
        assert failed.error is not None and failed.error.code == "template_not_ready"
        failed = await ended(engine, start="exit 3")
        assert failed.error is not None and failed.error.code == "template_start_failed"
        # An agent on the host has no memory to keep.
        failed = await ended(engine)
        assert failed.error is not None and failed.error.code == "memory_unknown"
        failed = await ended(engine, image=None, source="nosuch")
        assert failed.error is not None and failed.error.code == "sandbox_unknown"
        small = Principal(owner="key-small", admin=False)
        engine._keys.quota = lambda owner: Quota(memory=MIB) if owner == "key-small" else None  # type: ignore[method-assign]
        engine.builds._quota = engine._keys.quota
        failed = await ended(engine, small)
        assert failed.error is not None and failed.error.code == "capacity_exhausted"
        with pytest.raises(NotFound):
            async with engine.operation_log(small, lines and "op-" + "a" * 20, 0):
                pass
        assert (await engine.list(ADMIN)).items == [] == list(await engine.templates.list(ADMIN))
        assert not engine._core.snapshots and not await engine._core.ledger.all() and not engine.builds._making


async def test_a_cancelled_build_and_a_daemon_that_ends(short_dir: Path) -> None:
    async with opened(short_dir) as engine:
        for _ in range(2):
            begun = await engine.build_template(ADMIN, BuildTemplate(name="tpl", image="host", setup=["echo here; sleep 60"]))
            async with engine.operation_log(ADMIN, begun.id, 0) as parts:
                async for part in parts:
                    if "here" in part.lines:
                        break
            assert len((await engine.list(ADMIN)).items) == 1
            done = await engine.cancel_operation(ADMIN, begun.id)
            assert done.state is OperationState.CANCELLED and (await engine.list(ADMIN)).items == []
        begun = await engine.build_template(ADMIN, BuildTemplate(name="tpl", image="host", setup=["sleep 60"]))
        await asyncio.sleep(0.05)
    async with opened(short_dir) as engine:
        assert (await engine.list(ADMIN)).items == [] and not await engine._core.ledger.all()
