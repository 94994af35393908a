"""Golden memory: the second create of a shape starts where the first had to boot, and is nobody's twin."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from crashing import ADMIN
from engine_fixtures import own_data
from engine_guests import make, opened, run
from leaks import processes
from stoker.api.models import Origin, SandboxState
from stoker.engine.engine import Engine
from stoker.settings import Settings
from stoker.vmm.saved import orphaned

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]


@pytest.fixture
def own(settings: Settings, short_dir: Path) -> Settings:
    """A data directory with golden memory of its own, none at first."""
    own = own_data(settings, short_dir)
    (own.data_dir / "golden").unlink()
    return own


async def learned(own: Settings) -> Path:
    """The golden memory that is being made, once it is there."""
    async with asyncio.timeout(300):
        while not (found := list((own.data_dir / "golden").glob("[!.]*/manifest.json"))):
            await asyncio.sleep(0.1)
        # It is there a moment before the directory of its machine is gone.
        while list((own.run_dir / "golden").iterdir()):
            await asyncio.sleep(0.02)
    return found[0].parent


async def said(engine: Engine, name: str, script: str) -> str:
    code, data = await run(engine, name, script)
    assert code == 0, data
    return data.decode()


async def test_later_creates_start_from_it_and_are_no_twins(own: Settings) -> None:
    async with opened(own) as engine:
        first = await make(engine, name="first")
        assert first.origin is Origin.BOOT
        golden = await learned(own)
        assert not list((own.run_dir / "golden").iterdir()), "its machine is gone"
        assert orphaned(golden) == "", "what it was made from is there"
        one, two = await asyncio.gather(make(engine, name="one", env={"A": "b"}), make(engine, name="two", hostname="tower"))
        assert (one.origin, two.origin) == (Origin.GOLDEN, Origin.GOLDEN)
        assert one.versions == first.versions and one.resources == first.resources
        for words in ("cat /proc/sys/kernel/random/boot_id", "cat /proc/sys/kernel/random/uuid", "head -c 32 /dev/urandom | od -x"):
            assert await said(engine, "one", words) != await said(engine, "two", words)
        assert await said(engine, "one", "hostname; cat /etc/hostname; echo $A") == "one\none\nb\n"
        assert await said(engine, "two", "hostname; tail -1 /etc/hosts") == "tower\n127.0.1.1\ttower\n"
        assert abs(float(await said(engine, "two", "date +%s.%N")) - time.time()) < 30, "the clock is that of the host"
        # Their disks are their own, and whole.
        await said(engine, "one", "echo one > /root/x; dd if=/dev/zero of=/root/big bs=1M count=40 2>&1; sync")
        assert await said(engine, "two", "ls /root") == ""
        again = await make(engine, name="cold", cold=True)
        assert again.origin is Origin.BOOT
        # A disk that was used agrees with no memory but its own: it boots.
        await engine.stop(ADMIN, "one", 5.0)
        operation = await engine.start(ADMIN, "one")
        await engine.wait_operation(ADMIN, operation.id, 300)
        assert (await engine.get(ADMIN, "one")).origin is Origin.BOOT
        assert await said(engine, "one", "cat /root/x; stat -c %s /root/big") == "one\n41943040\n"
        # Another shape is another memory.
        assert (await make(engine, name="larger", disk=4 << 30)).origin is Origin.BOOT
        assert golden.exists()


async def test_what_cannot_be_used_is_replaced_and_the_create_boots(own: Settings) -> None:
    async with opened(own) as engine:
        await make(engine)
        golden = await learned(own)
    manifest = json.loads((golden / "manifest.json").read_bytes())
    # Damaged on the disk: seen before it is used.
    with open(golden / "memory", "r+b") as file:
        os.pwrite(file.fileno(), b"damage", 1 << 20)
    async with opened(own) as engine:
        assert (await make(engine)).origin is Origin.BOOT
        assert await learned(own) == golden
        assert (await make(engine)).origin is Origin.GOLDEN
    # Whole, but the VMM does not take it: seen by its end.
    state = b"not a state" * 100
    import hashlib

    (golden / "state").write_bytes(state)
    manifest = json.loads((golden / "manifest.json").read_bytes())
    manifest["state"] = {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    (golden / "manifest.json").write_text(json.dumps(manifest))
    async with opened(own) as engine:
        box = await make(engine)
        assert (box.origin, box.state) == (Origin.BOOT, SandboxState.RUNNING)
        assert not golden.exists()


async def test_without_it_nothing_is_made(own: Settings) -> None:
    async with opened(replace(own, golden=0)) as engine:
        await make(engine)
        await asyncio.sleep(0.5)
    assert not (own.data_dir / "golden").exists() and not (own.run_dir / "golden").exists()


async def test_an_engine_that_ends_meanwhile_leaves_no_machine(own: Settings, short_dir: Path) -> None:
    async with opened(own) as engine:
        await make(engine)
        async with asyncio.timeout(60):
            while not list((own.run_dir / "golden").glob("*/shim.json")):
                await asyncio.sleep(0.02)
    assert not processes(short_dir)
    assert not list((own.run_dir / "golden").iterdir())
    assert not list((own.data_dir / "golden").glob("*/"))


async def test_an_idle_machine_rests(settings: Settings, short_dir: Path) -> None:
    """The VMM's main thread has the timers: with the one that nobody reads it wakes 87 times a second, without 40 at most."""

    def woken(pid: int) -> int:
        text = Path(f"/proc/{pid}/task/{pid}/status").read_text()
        return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    async with opened(own_data(settings, short_dir)) as engine:
        box = await make(engine, name="box")
        assert await said(engine, "box", "cat /proc/sys/vm/compaction_proactiveness") == "0\n"
        live = engine._core.boxes[box.id].live
        assert live is not None
        await asyncio.sleep(5)
        # The quietest of some seconds: what else the host does wakes it, too.
        counts = [woken(live.machine.vmm.pid)]
        for _ in range(8):
            await asyncio.sleep(2)
            counts.append(woken(live.machine.vmm.pid))
        assert min(after - before for before, after in pairwise(counts)) < 2 * 60
