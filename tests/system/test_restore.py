"""One memory, many machines, at the floor of the driver: a base from a boot of its own, clones of it, forks of forks."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restored_guests import MEMORY, Base, made_base, said, started
from stoker.guest.agent import Agent
from stoker.guest.channel import connect
from stoker.guest.messages import ExecRequest
from stoker.settings import Settings
from stoker.vmm.memory import Scratch, capture, changed_bytes

pytestmark = pytest.mark.anyio


@pytest.fixture
async def base(settings: Settings, short_dir: Path) -> AsyncIterator[Base]:
    async with made_base(settings, short_dir) as base:
        yield base


async def pattern(agent: Agent, generation: int) -> str:
    """Rewrites what memory (a tmpfs) and disk hold, with a writer that goes on; what they should read as afterwards."""
    word = f"{generation:07d}"
    await said(agent, f"yes {word} | head -c 16M > /dev/shm/pattern; yes {word} | head -c 4M > /srv/pattern; sync /srv/pattern")
    return (await said(agent, "cat /dev/shm/pattern /srv/pattern | md5sum")).split()[0]


async def test_forks_of_forks_of_a_restored_machine_go_on_each_with_its_own(base: Base) -> None:
    """Generation after generation: the parent is stopped for a moment, the child has its memory, its disk and its processes."""
    scratch = Scratch()
    async with base.restored("g0") as (parent, agent):
        process = await agent.exec(ExecRequest(["sh", "-c", "while read line; do echo $((n = n + 1)) $line; done"], stdin=True))
        await process.stdin.write(b"one\n")
        assert await process.stdout.read() == b"1 one\n"
        wanted = await pattern(agent, 0)
        await said(agent, "sync; echo 3 > /proc/sys/vm/drop_caches; (while :; do echo x > /dev/shm/log; done) & echo $!")
        assert 0 < changed_bytes(parent.vmm.pid, base.memory) < MEMORY
        await parent.freeze()
        delta, state = capture(parent.vmm.pid, base.memory, scratch), await parent.device_state()
        child_spec = base.own("g1")
        disk = child_spec.disks[0].path
        disk.write_bytes((parent.directory / "root.qcow2").read_bytes())
        async with started(child_spec, base.settings) as child:
            await child.restore(base.memory, delta, state)
            await parent.thaw()
            await child.thaw()
            async with await connect(child.channel(), fresh=False, timeout=60) as other:
                assert other.welcome.processes[0].id == process.id
                again = await other.attach(process.id)
                await again.stdin.write(b"child\n")
                await process.stdin.write(b"parent\n")
                assert await again.stdout.read() == b"1 one\n"  # what was buffered comes along
                assert await again.stdout.read() == b"2 child\n"
                assert await process.stdout.read() == b"2 parent\n"
                for each in (agent, other):
                    assert (await said(each, "cat /dev/shm/pattern /srv/pattern | md5sum")).split()[0] == wanted
                await pattern(other, 1)
                assert (await said(agent, "cat /dev/shm/pattern /srv/pattern | md5sum")).split()[0] == wanted


async def test_clones_of_one_base_do_not_see_each_other(base: Base) -> None:
    before = os.pread(base.memory, MEMORY, 0)
    async with base.restored("one") as (one, first), base.restored("two") as (two, second):
        assert await said(first, "echo first > /dev/shm/x; cat /dev/shm/x") == "first\n"
        assert await said(second, "ls /dev/shm") == ""
        # Memory that a guest frees is not taken out of the base.
        await said(first, "head -c 64M /dev/zero > /dev/shm/big; rm /dev/shm/big")
        for words in ("/proc/sys/kernel/random/boot_id", "/proc/sys/kernel/random/uuid", "/dev/urandom | head -c 16 | od"):
            assert await said(first, f"cat {words}") != await said(second, f"cat {words}")
        assert not await one.vmm_tail() or "error" not in "".join(await one.vmm_tail()).lower()
        assert changed_bytes(one.vmm.pid, base.memory) > changed_bytes(two.vmm.pid, base.memory) > 0
    assert os.pread(base.memory, MEMORY, 0) == before


async def test_the_disk_of_a_restored_machine_is_whole(base: Base, short_dir: Path) -> None:
    """The memory of a mounted file system goes on upon the disk that was put away with it, and is cut off in the middle."""
    async with base.restored("one") as (machine, agent):
        await said(agent, "for i in $(seq 50); do mkdir -p /srv/$i; seq 2000 > /srv/$i/f; done; sync; touch /srv/synced")
        await said(agent, "rm -r /srv/1?; yes | head -c 8M > /srv/big; (while :; do seq 999 > /srv/more; done) & echo $!")
        await asyncio.sleep(1)
        await machine.freeze()
        (short_dir / "overlay").write_bytes(base.disk_of(machine))
    raw = short_dir / "raw"
    assert await asyncio.to_thread(checked, short_dir / "overlay", base.rootfs.path, raw) == ""
    kept = await asyncio.to_thread(tool, "debugfs", "-R", "cat /srv/50/f", str(raw))
    assert kept.stdout == "".join(f"{n}\n" for n in range(1, 2001))
    raw.unlink()


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=120)


def checked(overlay: Path, backing: Path, raw: Path) -> str:
    """The disk as one file, after its journal was replayed as the next boot would; what is wrong with it."""
    layers: dict[str, object] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(overlay)}}
    layers["backing"] = {"driver": "raw", "file": {"driver": "file", "filename": str(backing)}}
    converted = tool("qemu-img", "convert", "-O", "raw", f"json:{json.dumps(layers)}", str(raw))
    assert converted.returncode == 0, converted.stderr
    tool("e2fsck", "-E", "journal_only", "-y", str(raw))
    found = tool("e2fsck", "-fn", str(raw))
    return found.stdout if found.returncode else ""


async def test_a_state_that_is_none_ends_the_machine(base: Base) -> None:
    async with started(base.own("bad"), base.settings) as machine:
        with pytest.raises(Exception, match="bad"):
            await machine.restore(base.memory, None, b"no state at all" * 100)
        exit = await asyncio.wait_for(machine.wait(), 30)
        assert exit.code == 1
