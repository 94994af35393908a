"""One sandbox, paused and resumed over and over, and generations of copies: nothing is lost, nothing leaks, nothing grows.

The patterns in memory and on the disk say of each page which it is (:mod:`patterns`); between the cycles they are rewritten,
cleared or left alone, by a known seed, while a process writes to the disk all the time.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import pytest

from crashing import ADMIN, whole
from engine_fixtures import own_data
from engine_guests import make, opened, run
from patterns import DISK, MEMORY, Holdings, check, fill, holdings
from stoker.api.models import CopySandbox, CreateSnapshot, ForkSandbox, OperationState, SandboxState, StartProcess
from stoker.engine import layers
from stoker.engine.engine import Engine
from stoker.settings import Settings
from stoker.vmm.driver import Captured
from stoker.vmm.kept import MOST_DELTA
from stoker.vmm.qemu.driver import QemuMachine

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]
MIB = 1 << 20
PATTERN = 64 * MIB
CHURN = "dd if=/dev/urandom of=/root/churn bs=64k count=8 conv=fsync 2>/dev/null"
WRITER = f"i=0; while :; do i=$((i+1)); echo $i >> /root/log; {CHURN}; done"
LOG = "i=0; while read n; do i=$((i+1)); [ $n = $i ] || { echo line $i is $n; exit 1; }; done < /root/log; echo $i"
"""The writer's lines are all there, in their order."""
DROP = "sync; echo 3 > /proc/sys/vm/drop_caches"


async def said(engine: Engine, name: str, script: str) -> str:
    code, data = await run(engine, name, f"( {script} ) 2>&1")
    assert code == 0, data.decode()
    return data.decode()


@dataclass
class Patterns:
    """What is in a machine's memory and on its disk now."""

    memory: int = 0
    disk: int = 0

    async def change(self, engine: Engine, name: str, chance: random.Random) -> None:
        """Rewrites, clears, or leaves alone, each for itself."""
        for place in (MEMORY, DISK):
            kind = "memory" if place is MEMORY else "disk"
            seed = chance.choice((chance.getrandbits(31) | 1, chance.getrandbits(31) | 1, 0, getattr(self, kind)))
            if seed != getattr(self, kind):
                await said(engine, name, fill(place, seed, PATTERN))
                setattr(self, kind, seed)

    async def check(self, engine: Engine, name: str, *, from_disk: bool = False) -> None:
        await said(engine, name, check(MEMORY, self.memory, PATTERN))
        await said(engine, name, (f"{DROP}; " if from_disk else "") + check(DISK, self.disk, PATTERN))


async def same(engine: Engine, settings: Settings, before: Holdings) -> None:
    """Nothing more is held than before, once what is on its way out is gone."""
    deadline = time.monotonic() + 10
    while (now := await holdings(engine, settings)) != before and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert now == before


@pytest.mark.parametrize(
    "cycles", [30, pytest.param(1000, marks=[pytest.mark.full, pytest.mark.timeout(4 * 3600)])], ids=["some", "all"]
)
async def test_cycles(settings: Settings, short_dir: Path, cycles: int) -> None:
    own = replace(own_data(settings, short_dir), golden=0)  # nothing else is made in the background
    chance = random.Random(cycles)
    paused: list[float] = []
    resumed: list[float] = []
    async with opened(own) as engine:
        await make(engine, name="box", cpus=2)
        await engine.processes.start(ADMIN, "box", StartProcess(argv=["sh", "-c", WRITER], tag="writer"))
        patterns, settled = Patterns(), None
        for place in (MEMORY, DISK):
            await said(engine, "box", fill(place, 0, PATTERN))
        for cycle in range(cycles):
            if cycle % 3 == 0:
                await patterns.change(engine, "box", chance)
            began = time.monotonic()
            assert (await engine.pause(ADMIN, "box")).state is SandboxState.PAUSED
            paused.append(time.monotonic() - began)
            began = time.monotonic()
            await engine.resume(ADMIN, "box")
            resumed.append(time.monotonic() - began)
            if cycle % 3 == 2:
                await patterns.check(engine, "box", from_disk=cycle % 2 == 0)
            if cycle == 5:
                settled = await holdings(engine, own)
            elif settled is not None and cycle % max(10, cycles // 10) == 9:
                await same(engine, own, settled)
        await patterns.check(engine, "box", from_disk=True)
        assert int(await said(engine, "box", LOG)) > 0
        await whole(engine, own.data_dir, own.run_dir)
    tenth = cycles // 10
    for word, times in (("pause", paused), ("resume", resumed)):
        first, last = median(times[:tenth]), median(times[-tenth:])
        tenths = [1000 * median(times[at : at + tenth]) for at in range(0, cycles, tenth)]
        print(f"{word}, of {cycles} cycles a tenth at a time:", *(f"{ms:.0f}" for ms in tenths), "ms")
        assert cycles < 100 or last < 1.5 * first


@pytest.mark.parametrize(
    ("depth", "latest"), [(4, 3), pytest.param(20, layers.LATEST, marks=pytest.mark.full)], ids=["some", "all"]
)
@pytest.mark.parametrize("size", [1 * MIB, 24 * MIB], ids=["deltas", "bases"])
async def test_generations(
    settings: Settings, short_dir: Path, monkeypatch: pytest.MonkeyPatch, depth: int, latest: int, size: int
) -> None:
    """Each generation is a fork of the one before, the first of a restored snapshot, and changes as much as all others. The layers
    are joined only when they must be."""
    monkeypatch.setattr(layers, "SOON", 1000)
    monkeypatch.setattr(layers, "LATEST", latest)
    taken: list[Captured] = []
    capture = QemuMachine.capture

    async def seen(self: QemuMachine, *words: object, **more: object) -> Captured:
        taken.append(await capture(self, *words, **more))  # type: ignore[arg-type]
        return taken[-1]

    own = own_data(settings, short_dir)
    depths = []
    async with opened(own) as engine:
        box = await make(engine, name="box", cpus=2)
        await engine.processes.start(ADMIN, "box", StartProcess(argv=["sh", "-c", WRITER], tag="writer"))
        await said(engine, "box", f"{fill(MEMORY, 1, size)}; {fill(DISK, 1, size)}")
        snapshot = await engine.snapshot(ADMIN, "box", CreateSnapshot())
        await engine.destroy(ADMIN, box.id)
        operation = await engine.wait_operation(
            ADMIN, (await engine.start_snapshot(ADMIN, snapshot.id, CopySandbox(name="g0"))).id, 300
        )
        assert operation.state is OperationState.SUCCEEDED, operation.error
        await engine.snapshots.remove(ADMIN, snapshot.id)
        monkeypatch.setattr(QemuMachine, "capture", seen)
        for number in range(1, depth + 1):
            parent, child = f"g{number - 1}", f"g{number}"
            await said(engine, parent, f"{check(MEMORY, number, size)}; {check(DISK, number, size)}")
            # Every third one is cleared first, and the child has to see that.
            again = (0, number + 1) if number % 3 == 0 else (number + 1,)
            for seed in again:
                await said(engine, parent, f"{fill(MEMORY, seed, size)}; {fill(DISK, seed, size)}")
            [made] = (await engine.fork(ADMIN, parent, ForkSandbox(name=child))).items
            assert made.error is None, made.error
            depths.append(await layers.depth(engine._core, engine._core.boxes[made.sandbox.id]))  # type: ignore[union-attr]
            # The parent goes on as it was, and is gone before its child is used; in between its child's child is made.
            await said(engine, parent, f"{check(MEMORY, number + 1, size)}; {fill(MEMORY, 99, size)}; {fill(DISK, 99, size)}")
            await engine.destroy(ADMIN, parent)
        await said(engine, child, f"{check(MEMORY, number + 1, size)}; {DROP}; {check(DISK, number + 1, size)}")
        assert int(await said(engine, child, LOG)) > 0
        await engine.stop(ADMIN, child, 5)
        operation = await engine.wait_operation(ADMIN, (await engine.start(ADMIN, child)).id, 300)
        assert operation.state is OperationState.SUCCEEDED, operation.error
        await said(engine, child, check(DISK, number + 1, size))
    deltas = [one.delta.bytes for one in taken]
    stopped = [1000 * one.steps["stopped"] for one in taken]
    print(
        "deltas MiB:",
        *(f"{delta / MIB:.1f}" for delta in deltas),
        "stopped ms:",
        *(f"{ms:.1f}" for ms in stopped),
        "layers:",
        *depths,
    )
    # One more each time, and when there are too many, one again.
    assert max(depths) == latest and depths.count(1) >= depth // latest, depths
    if size > MOST_DELTA:
        # A new base each time: what a generation changed, and no more.
        assert all(0.8 < delta / median(deltas[1:]) < 1.2 for delta in deltas[1:]), deltas
    else:
        assert max(deltas) < MOST_DELTA + 2 * deltas[0], deltas
