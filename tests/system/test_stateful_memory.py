"""Random operations on memory and disks, crashes of machines and of the daemon; what each sandbox and snapshot contains is known.

The model knows of every sandbox its state and the seeds of the patterns in its memory and on its disk (:mod:`patterns`), and of
every snapshot those that it was taken with. After whatever brings a machine back its patterns are looked at page by page, and in
the end all of them, and what the host holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import engine_daemon
from crashing import ADMIN, Daemon, daemon, whole
from engine_fixtures import own_data
from engine_guests import run
from patterns import DISK, MEMORY, check, fill
from stoker.api.models import SandboxState
from stoker.engine.engine import Engine
from stoker.settings import Settings

pytestmark = pytest.mark.timeout(1800)
T = TypeVar("T")
MIB = 1 << 20
SIZE = 2 * MIB
BIG = 24 * MIB
"""More than what a delta may have: what is put away with it has a base of its own."""
MOST, SOME = 3, 8
SEEDS = st.integers(1, 2**31)
PLACES = st.sampled_from(["memory", "disk"])
PATHS = {"memory": MEMORY, "disk": DISK}
PICK = st.integers(0, 1000)


@dataclass(frozen=True)
class Content:
    """The pattern of each place: its seed (0: cleared) and size; ``None``: there is no such file."""

    memory: tuple[int, int] | None = None
    disk: tuple[int, int] | None = None

    def words(self) -> str:
        """The shell's, that fail unless it is so."""
        parts = []
        for place, path in PATHS.items():
            held = getattr(self, place)
            parts.append(check(path, *held) if held is not None else f"[ ! -e {path} ] || {{ echo {path} is there; false; }}")
        return "( " + " && ".join(parts) + " ) 2>&1"


@dataclass
class Box:
    """What a sandbox must be now."""

    state: str = "running"
    content: Content = Content()


def having(*states: str) -> Any:
    """A rule for when there is a sandbox in such a state."""
    return precondition(lambda self: self.of(0, *states) is not None)


class Machine(RuleBasedStateMachine):
    """Rules over one daemon, a few sandboxes and a few snapshots."""

    data: ClassVar[Path]
    run_dir: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.boxes: dict[str, Box] = {}
        self.snapshots: dict[str, Content] = {}
        self.made = 0
        self.asked = 0
        """How often something was asked of this daemon."""
        self.context: Any = None
        self.daemon: Daemon | None = None

    # -- the daemon ---------------------------------------------------------------------------------------------------

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 300))

    def sure(self, verb: str, **words: Any) -> dict[str, Any]:
        assert self.daemon is not None
        self.asked += 1
        answer = self.do(self.daemon.ask(do=verb, image="debian:12", **words))
        assert answer is not None, f"the daemon died in {verb}"
        assert answer.get("error") is None, (verb, words, answer)
        return answer

    def run(self, name: str, script: str) -> None:
        answer = self.sure("run", name=name, script=script)
        assert answer["code"] == 0, (name, self.boxes[name], answer["output"])

    def up(self) -> None:
        self.context = daemon(self.data, self.run_dir, "real")
        self.daemon = self.do(self.context.__aenter__())

    def down(self) -> None:
        """kill -9."""
        if self.context is not None:
            self.do(self.context.__aexit__(None, None, None))
        self.context = self.daemon = None

    # -- choosing -----------------------------------------------------------------------------------------------------

    def of(self, pick: int, *states: str) -> str | None:
        names = sorted(name for name, box in self.boxes.items() if box.state in states)
        return names[pick % len(names)] if names else None

    def one(self, pick: int, *states: str) -> str:
        name = self.of(pick, *states)
        assert name is not None
        return name

    def new(self) -> str:
        self.made += 1
        return f"m{self.made}"

    def look(self, name: str) -> None:
        self.run(name, self.boxes[name].content.words())

    @initialize()
    def begin(self) -> None:
        self.up()
        self.create()

    # -- contents -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.boxes) < MOST)
    @rule()
    def create(self) -> None:
        """It begins with something to lose."""
        name = self.new()
        assert self.sure("create", name=name)["state"] == "running"
        self.boxes[name] = Box()
        for place in PATHS:
            self.write(name, place, self.made, SIZE)

    def write(self, name: str, place: str, seed: int, size: int) -> None:
        box = self.boxes[name]
        held = getattr(box.content, place)
        shrink = f"rm -f {PATHS[place]}; " if held is not None and held[1] > size else ""
        self.run(name, shrink + fill(PATHS[place], seed, size) + ("; sync" if place == "disk" else ""))
        box.content = replace(box.content, **{place: (seed, size)})
        box.state = "running"

    @having("running", "paused")
    @rule(pick=PICK, place=PLACES, seed=SEEDS, size=st.sampled_from([SIZE, SIZE, BIG]))
    def writes(self, pick: int, place: str, seed: int, size: int) -> None:
        """A paused one is resumed by that."""
        self.write(self.one(pick, "running", "paused"), place, seed, size)

    @having("running")
    @rule(pick=PICK, place=PLACES)
    def clears(self, pick: int, place: str) -> None:
        """Pages of zeros, in place."""
        name = self.one(pick, "running")
        held = getattr(self.boxes[name].content, place)
        self.write(name, place, 0, SIZE if held is None else held[1])

    @having("running")
    @rule(pick=PICK, place=PLACES)
    def removes(self, pick: int, place: str) -> None:
        name = self.one(pick, "running")
        self.run(name, f"rm -f {PATHS[place]}; sync")
        self.boxes[name].content = replace(self.boxes[name].content, **{place: None})

    @having("running", "paused")
    @rule(pick=PICK)
    def looks(self, pick: int) -> None:
        """At the disk itself, too."""
        name = self.one(pick, "running", "paused")
        self.run(name, "sync; echo 3 > /proc/sys/vm/drop_caches")
        self.boxes[name].state = "running"
        self.look(name)

    # -- states -------------------------------------------------------------------------------------------------------

    @having("running", "frozen")
    @rule(pick=PICK)
    def pause(self, pick: int) -> None:
        name = self.one(pick, "running", "frozen")
        assert self.sure("pause", name=name)["state"] == "paused"
        self.boxes[name].state = "paused"

    @having("paused")
    @rule(pick=PICK)
    def resume(self, pick: int) -> None:
        name = self.one(pick, "paused")
        assert self.sure("resume", name=name)["state"] == "running"
        self.boxes[name].state = "running"
        self.look(name)

    @having("running")
    @rule(pick=PICK)
    def freeze(self, pick: int) -> None:
        name = self.one(pick, "running")
        assert self.sure("freeze", name=name)["state"] == "frozen"
        self.boxes[name].state = "frozen"

    @having("frozen")
    @rule(pick=PICK)
    def thaw(self, pick: int) -> None:
        name = self.one(pick, "frozen")
        assert self.sure("thaw", name=name)["state"] == "running"
        self.boxes[name].state = "running"
        self.look(name)

    @precondition(lambda self: len(self.snapshots) < MOST)
    @having("running", "frozen", "paused")
    @rule(pick=PICK)
    def snapshot(self, pick: int) -> None:
        name = self.one(pick, "running", "frozen", "paused")
        self.snapshots[self.sure("snapshot", name=name)["id"]] = self.boxes[name].content

    @precondition(lambda self: self.snapshots and len(self.boxes) < MOST)
    @rule(pick=PICK)
    def start_from_a_snapshot(self, pick: int) -> None:
        source = sorted(self.snapshots)[pick % len(self.snapshots)]
        name = self.new()
        assert self.sure("start_snapshot", snapshot=source, name=name) == {"state": "succeeded"}
        self.boxes[name] = Box(content=self.snapshots[source])
        self.look(name)

    @precondition(lambda self: len(self.snapshots) == MOST)
    @rule(pick=PICK)
    def remove_a_snapshot(self, pick: int) -> None:
        source = sorted(self.snapshots)[pick % len(self.snapshots)]
        self.sure("remove_snapshot", snapshot=source)
        del self.snapshots[source]

    @precondition(lambda self: len(self.boxes) < MOST)
    @having("running")
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        name, copy = self.one(pick, "running"), self.new()
        assert self.sure("fork", name=name, copy=copy)["copies"] == 1
        self.boxes[copy] = Box(content=self.boxes[name].content)
        self.look(copy)
        self.look(name)

    @precondition(lambda self: len(self.boxes) == MOST)
    @rule(pick=PICK)
    def destroy(self, pick: int) -> None:
        name = self.one(pick, "running", "frozen", "paused", "failed")
        self.sure("destroy", name=name)
        del self.boxes[name]

    # -- crashes ------------------------------------------------------------------------------------------------------

    @having("running", "frozen")
    @rule(pick=PICK)
    def its_machine_dies(self, pick: int) -> None:
        """Its disk is what it wrote out."""
        name = self.one(pick, "running", "frozen")
        if self.boxes[name].state == "running":
            self.run(name, "sync")
        identity = self.sure("id", name=name)["id"]
        record = json.loads((self.run_dir / "sandboxes" / identity / "shim.json").read_text())
        os.kill(record["vmm"]["pid"], signal.SIGKILL)
        assert self.sure("wait", name=name, states=["failed"])["state"] == "failed"
        self.boxes[name].state = "failed"
        self.boxes[name].content = replace(self.boxes[name].content, memory=None)

    @having("failed")
    @rule(pick=PICK)
    def start(self, pick: int) -> None:
        name = self.one(pick, "failed")
        assert self.sure("start", name=name)["state"] == "succeeded"
        self.boxes[name].state = "running"
        self.look(name)

    @precondition(lambda self: self.asked > SOME)
    @rule()
    def the_daemon_is_killed_and_restarts(self) -> None:
        self.down()
        self.up()
        self.asked = 0

    # -- what must always be so ---------------------------------------------------------------------------------------

    @invariant()
    @precondition(lambda self: self.daemon is not None)
    def they_agree(self) -> None:
        assert self.sure("list")["boxes"] == {name: box.state for name, box in self.boxes.items()}

    def teardown(self) -> None:
        try:
            self.down()
            self.do(self.look_around())
        finally:
            self.loop.close()

    async def look_around(self) -> None:
        """Everything is what it was, is made from every snapshot once more, and then is gone."""
        settings = engine_daemon.settings(self.data, self.run_dir)
        async with Engine.open(settings, trace_kill="") as engine:
            found = await whole(engine, self.data, self.run_dir)
            assert found == {name: SandboxState(box.state) for name, box in self.boxes.items()}
            for name, box in self.boxes.items():
                if box.state == "frozen":
                    await engine.thaw(ADMIN, name)
                if box.state != "failed":
                    code, output = await run(engine, name, box.content.words())
                    assert code == 0, (name, box, output)
                await engine.destroy(ADMIN, name)
            for snapshot, content in self.snapshots.items():
                words = {"do": "start_snapshot", "snapshot": snapshot, "name": "again"}
                assert await engine_daemon.command(engine, words) == {"state": "succeeded"}
                code, output = await run(engine, "again", content.words())
                assert code == 0, (snapshot, content, output)
                await engine.destroy(ADMIN, "again")
                await engine.snapshots.remove(ADMIN, snapshot)
            assert await whole(engine, self.data, self.run_dir) == {}
            owned = await engine._core.database.read(lambda db: db.execute("SELECT count(*) FROM owned").fetchone()[0])
            assert owned == 0


def play(base: Settings, root: Path, *, examples: int, steps: int) -> None:
    """Runs, each in directories of its own."""

    class Fresh(Machine):
        def __init__(self) -> None:
            super().__init__()
            self.home = Path(tempfile.mkdtemp(prefix="s", dir=root))
            type(self).run_dir = self.home / "run"
            type(self).data = own_data(base, self.home).data_dir

        def teardown(self) -> None:
            super().teardown()
            shutil.rmtree(self.home)

    chosen = hypothesis_settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=not os.environ.get("STOKER_TEST_RANDOM"),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Fresh, settings=chosen)


def test_some(settings: Settings, short_dir: Path) -> None:
    play(settings, short_dir, examples=6, steps=18)


@pytest.mark.full
@pytest.mark.timeout(4 * 3600)
def test_many(settings: Settings, short_dir: Path) -> None:
    play(settings, short_dir, examples=int(os.environ.get("STOKER_TEST_EXAMPLES", "30")), steps=40)
