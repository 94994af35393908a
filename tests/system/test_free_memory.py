"""A machine that used much memory once, and little now: its snapshot is little."""

from __future__ import annotations

from pathlib import Path

import pytest

from restored_guests import MIB, made_base, said, started
from stoker.guest.channel import connect
from stoker.guest.copies import BeforeSnapshot
from stoker.settings import Settings
from stoker.vmm.memory import Scratch, capture, changed_bytes

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]


async def test_free_memory_is_not_in_a_snapshot(settings: Settings, short_dir: Path) -> None:
    async with made_base(settings, short_dir, size=2048 * MIB) as base, base.restored("large") as (machine, agent):
        await said(agent, "perl -e '$x .= chr(120) x 1048576 for 1 .. 1750'")
        await said(agent, "head -c 150M /dev/urandom > /dev/shm/kept; md5sum < /dev/shm/kept > /dev/shm/sum")
        before = changed_bytes(machine.vmm.pid, base.memory)
        assert before > 1750 * MIB
        report = await agent.before_snapshot(BeforeSnapshot(drop_caches=True))
        assert not report.unhandled
        await machine.freeze()
        delta, state = capture(machine.vmm.pid, base.memory, Scratch(), zeros=True), await machine.device_state()
        assert 150 * MIB < delta.bytes < 250 * MIB
        disk = base.disk_of(machine)
        await machine.kill()
        spec = base.own("copy")
        spec.disks[0].path.write_bytes(disk)
        async with started(spec, settings) as copy:
            await copy.restore(base.memory, delta, state)
            assert changed_bytes(copy.vmm.pid, base.memory) < 300 * MIB
            await copy.thaw()
            async with await connect(copy.channel(), fresh=False, timeout=60) as other:
                assert await said(other, "md5sum < /dev/shm/kept | cmp - /dev/shm/sum; echo $?") == "0\n"
                # What was free is good memory: it can be had again, and is what is written to it.
                assert await said(other, "perl -e '$x .= chr(121) x 1048576 for 1 .. 1500; print $x =~ tr/y//'") == str(1500 * MIB)
