"""Random operations, crashes and restarts of a daemon process; after each run nothing is where it should not be.

The model is small: which sandboxes there are, in which state, and whether a background job counts in them. Whatever the daemon
went through, it must agree with the model, the job's output must be whole from its first byte, and in the end rows, ledger, files
and processes must tell the same story, and then be gone. The same rules run with the real agent in place of guests (many short
runs), and with real guests (few).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
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
from engine_host import HostBooter
from stoker.api.models import SandboxState
from stoker.engine import trace
from stoker.engine.engine import Engine
from stoker.settings import Settings

pytestmark = pytest.mark.timeout(1800)
T = TypeVar("T")
NAMES = st.sampled_from(["a", "b", "c"])
COUNTER = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"


@dataclass
class Model:
    """What a sandbox must be now."""

    state: str = "running"
    job: bool = False


class Machine(RuleBasedStateMachine):
    """Rules over one daemon and at most three sandboxes."""

    kind: ClassVar[str] = "host"
    data: ClassVar[Path]
    run_dir: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.boxes: dict[str, Model] = {}
        self.context: Any = None
        self.daemon: Daemon | None = None

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 300))

    def ask(self, verb: str, **words: Any) -> dict[str, Any] | None:
        assert self.daemon is not None
        return self.do(self.daemon.ask(do=verb, image="debian:12", **words))

    def sure(self, verb: str, **words: Any) -> dict[str, Any]:
        answer = self.ask(verb, **words)
        assert answer is not None, f"the daemon died in {verb}"
        return answer

    def up(self) -> None:
        self.context = daemon(self.data, self.run_dir, self.kind)
        self.daemon = self.do(self.context.__aenter__())

    def down(self) -> None:
        """kill -9."""
        if self.context is not None:
            self.do(self.context.__aexit__(None, None, None))
        self.context = self.daemon = None

    @initialize()
    def begin(self) -> None:
        self.up()

    # -- operations ---------------------------------------------------------------------------------------------------

    @rule(name=NAMES)
    def create(self, name: str) -> None:
        answer = self.sure("create", name=name)
        if name in self.boxes:
            assert answer["error"] == "name_taken"
        else:
            assert answer["state"] == "running", answer
            self.boxes[name] = Model()

    @rule(name=NAMES)
    def destroy(self, name: str) -> None:
        answer = self.sure("destroy", name=name)
        assert answer == ({} if name in self.boxes else {"error": "sandbox_unknown"})
        self.boxes.pop(name, None)

    def turn(self, verb: str, name: str, allowed: tuple[str, ...], to: str) -> bool:
        box = self.boxes.get(name)
        answer = self.sure(verb, name=name)
        if box is None:
            assert answer == {"error": "sandbox_unknown"}
        elif box.state not in allowed:
            assert answer == {"error": "wrong_state"}
        else:
            assert answer.get("state") == to, answer
            return True
        return False

    @rule(name=NAMES)
    def stop(self, name: str) -> None:
        if self.turn("stop", name, ("running", "frozen"), "stopped"):
            self.boxes[name] = Model("stopped")

    @rule(name=NAMES)
    def start(self, name: str) -> None:
        if self.turn("start", name, ("stopped", "failed"), "succeeded"):
            self.boxes[name] = Model()

    @rule(name=NAMES)
    def freeze(self, name: str) -> None:
        if self.turn("freeze", name, ("running",), "frozen"):
            self.boxes[name].state = "frozen"

    @rule(name=NAMES)
    def thaw(self, name: str) -> None:
        if self.turn("thaw", name, ("frozen",), "running"):
            self.boxes[name].state = "running"

    @rule(name=NAMES)
    def start_a_job(self, name: str) -> None:
        box = self.boxes.get(name)
        if box is not None and box.state == "running" and not box.job:
            assert "process" in self.sure("job", name=name, script=COUNTER)
            box.job = True

    @rule(name=NAMES)
    def look_at_the_job(self, name: str) -> None:
        box = self.boxes.get(name)
        if box is not None and box.state == "running" and box.job:
            lines = self.sure("output", name=name, enough=30)["output"].split("\n")[:-1]
            assert len(lines) >= 10 and lines == [str(n + 1) for n in range(len(lines))]

    @rule(name=NAMES)
    def its_machine_dies(self, name: str) -> None:
        box = self.boxes.get(name)
        if box is not None and box.state in ("running", "frozen"):
            identity = self.sure("id", name=name)["id"]
            record = json.loads((self.run_dir / "sandboxes" / identity / "shim.json").read_text())
            os.kill(record["vmm"]["pid"], signal.SIGKILL)
            assert self.sure("wait", name=name, states=["failed"])["state"] == "failed"
            self.boxes[name] = Model("failed")

    # -- crashes ------------------------------------------------------------------------------------------------------

    @rule()
    def crash(self) -> None:
        self.down()
        self.up()

    @rule(name=NAMES, point=st.sampled_from(trace.POINTS))
    def crash_at(self, name: str, point: str) -> None:
        verb = point.partition(".")[0].replace("boot", "create")
        box = self.boxes.get(name)
        fits = {
            "create": box is None,
            "destroy": box is not None,
            "stop": box is not None and box.state == "running",
            "start": box is not None and box.state in ("stopped", "failed"),
        }
        if not fits[verb]:
            return
        self.sure("arm", point=point)
        assert self.ask(verb, name=name) is None, f"{point} was never reached"
        self.down()
        self.up()
        self.after(verb, point, name)

    def after(self, verb: str, point: str, name: str) -> None:
        if verb == "create" and point != "create.after_admit":
            if point == "create.after_running":
                self.boxes[name] = Model()
            else:
                # A failed row of a create; it has no disk, so it goes.
                assert self.sure("destroy", name=name) == {}
        elif verb == "destroy" and point != "destroy.before_mark":
            del self.boxes[name]
        elif verb == "stop":
            self.boxes[name] = Model("stopped")
        elif verb == "start":
            self.boxes[name] = Model("running" if point == "start.after_running" else "stopped")

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
        booter = HostBooter() if self.kind == "host" else None
        async with Engine.open(engine_daemon.settings(self.data, self.run_dir), booter=booter, trace_kill="") as engine:
            found = await whole(engine, self.data, self.run_dir)
            for box in (await engine.list(ADMIN)).items:
                await engine.destroy(ADMIN, box.id)
            assert await whole(engine, self.data, self.run_dir) == {}
            assert found == {name: SandboxState(box.state) for name, box in self.boxes.items()}
            owned = await engine._core.database.read(lambda db: db.execute("SELECT count(*) FROM owned").fetchone()[0])
            rows = await engine._core.database.read(lambda db: db.execute("SELECT count(*) FROM processes").fetchone()[0])
            assert (owned, rows) == (0, 0)


def play(root: Path, base: Settings | None, *, examples: int, steps: int) -> None:
    """Many runs, each in directories of its own."""

    class Fresh(Machine):
        kind = "host" if base is None else "real"

        def __init__(self) -> None:
            super().__init__()
            self.home = Path(tempfile.mkdtemp(prefix="s", dir=root))
            type(self).run_dir = self.home / "run"
            type(self).data = self.home / "data" if base is None else own_data(base, self.home).data_dir

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


def test_many_short_runs_without_guests(session_root: Path) -> None:
    play(session_root, None, examples=6, steps=14)


def test_a_run_with_guests(settings: Settings, short_dir: Path) -> None:
    play(short_dir, settings, examples=1, steps=8)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_very_many_runs_without_guests(session_root: Path) -> None:
    play(session_root, None, examples=int(os.environ.get("STOKER_TEST_EXAMPLES", "100")), steps=40)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_many_runs_with_guests(settings: Settings, short_dir: Path) -> None:
    play(short_dir, settings, examples=15, steps=25)
