"""QEMU and its supervisor with real guests: starting, watching, freezing, ending, adopting; and why a machine ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from leaks import processes, wait_gone
from stoker.errors import Conflict, HostError, InvalidRequest, StokerError
from stoker.host.process import ProcessIdentity
from stoker.settings import Settings
from stoker.storage.overlay import create_overlay
from stoker.vmm.accel import verdict
from stoker.vmm.console import tail
from stoker.vmm.diagnosis import explain
from stoker.vmm.machine import Accelerator, Disk, MachineExit
from stoker.vmm.qemu.driver import QemuMachine, adopt, launch
from vmm_guest import MIB, build_probe, console_says, probe_initrd, probe_kernel, probe_spec

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Guest:
    kernel: Path
    initrd: Path


@pytest.fixture
async def guest(settings: Settings, short_dir: Path) -> Guest:
    kernel = await probe_kernel(settings)
    return Guest(kernel.vmlinux, probe_initrd(kernel, build_probe(short_dir), short_dir))


async def test_a_machine_starts_answers_freezes_and_ends(settings: Settings, guest: Guest, short_dir: Path) -> None:
    spec = probe_spec(guest.kernel, guest.initrd, short_dir / "m", "probe=echo")
    machine = await launch(spec, settings)
    try:
        assert machine.vmm.alive() and machine.vmm.exe.endswith("qemu-system-x86_64")
        assert await machine.status() == "running"
        await console_says(machine, "echo 1")
        reader, writer = await asyncio.open_unix_connection(str(machine.channel()))
        writer.write(b"there and back")
        async with asyncio.timeout(20):
            assert await reader.readexactly(14) == b"there and back"
            await machine.freeze()
            assert await machine.status() == "paused"
            writer.write(b"while frozen")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await reader.readexactly(1)
            await machine.thaw()
            assert await reader.readexactly(12) == b"while frozen"
        writer.close()
        with pytest.raises(Conflict):
            await launch(spec, settings)
        waiting = asyncio.create_task(machine.wait())
        await asyncio.sleep(0)
        assert await machine.kill() == MachineExit(None, 9, True)
        assert await machine.kill() == await waiting == MachineExit(None, 9, True)
        assert json.loads((spec.directory / "exit.json").read_text())["cause"] == "term"
    finally:
        await machine.kill()
        await machine.close()
    assert not wait_gone(lambda: processes(spec.directory))
    # The same directory serves again.
    again = await launch(replace(spec, cmdline=("probe=poweroff",)), settings)
    async with asyncio.timeout(90):
        assert await again.wait() == MachineExit(0, None)
    await again.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give the VMM a user of its own")
async def test_as_root_the_vmm_is_nobody(settings: Settings, guest: Guest, short_dir: Path) -> None:
    secret = short_dir / "secret-kernel"
    secret.write_bytes(guest.kernel.read_bytes())
    secret.chmod(0o600)
    machine = await launch(probe_spec(secret, guest.initrd, short_dir / "m", "probe=echo"), settings)
    try:
        await console_says(machine, "echo 1")
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{machine.vmm.pid}/status").read_text().splitlines() if ":\t" in line
        )
        uids = {int(uid) for uid in status["Uid"].split()}
        assert len(uids) == 1 and 0x5A000000 <= uids.pop() < 0x5A100000
        assert {int(gid) for gid in status["Gid"].split()} == {int(uid) for uid in status["Uid"].split()}
        assert status["Groups"].strip() == ""
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == int(status["CapAmb"], 16) == 0
        assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    finally:
        await machine.kill()
        await machine.close()


async def test_disks_come_in_order_and_stay_apart(settings: Settings, guest: Guest, short_dir: Path) -> None:
    base, raw = short_dir / "base.raw", short_dir / "second.raw"
    base.write_bytes(b"from the base..." + bytes(8 * MIB - 16))
    raw.write_bytes(b"read-only disk.." + bytes(4 * MIB - 16))
    overlay = short_dir / "overlay.qcow2"
    create_overlay(overlay, base, 16 * MIB)
    more = tuple(Disk(f"more{number}", short_dir / f"more{number}", "raw") for number in range(8))
    for disk in more:
        disk.path.write_bytes(f"{disk.name:<16}".encode() + bytes(MIB - 16))
    disks = (Disk("root", overlay, "qcow2", backing=(base,)), Disk("second", raw, "raw", read_only=True), *more)
    machine = await launch(probe_spec(guest.kernel, guest.initrd, short_dir / "m", "probe=disks", disks=disks), settings)
    try:
        lines = await console_says(machine, "probe ends")
        assert f"disk vda root {16 * MIB // 512} rw from the base..." in lines
        assert f"disk vdb second {4 * MIB // 512} ro read-only disk.." in lines
        assert f"disk vdj more7 {MIB // 512} rw more7" in [line.rstrip() for line in lines], "none is lost, whatever its interrupt"
        async with asyncio.timeout(20):
            await machine.wait()
    finally:
        await machine.kill()
        await machine.close()
    assert b"written by guest" not in base.read_bytes()
    assert b"written by guest" in overlay.read_bytes()


async def test_two_machines_never_share_a_writable_disk(settings: Settings, guest: Guest, short_dir: Path) -> None:
    raw = short_dir / "disk.raw"
    raw.write_bytes(bytes(4 * MIB))
    first = await launch(
        probe_spec(guest.kernel, guest.initrd, short_dir / "a", "probe=echo", disks=(Disk("d", raw, "raw"),)), settings
    )
    try:
        assert await first.status() == "running"
        second = await launch(
            probe_spec(guest.kernel, guest.initrd, short_dir / "b", "probe=echo", disks=(Disk("d", raw, "raw"),)), settings
        )
        async with asyncio.timeout(20):
            error = await explain(second, await second.wait())
        await second.close()
        assert isinstance(error, Conflict) and error.code == "disk_in_use"
    finally:
        await first.kill()
        await first.close()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("probe=poweroff",), "machine_stopped"),
        (("probe=reboot",), "machine_stopped"),
        (("probe=die",), "init_died"),
        (("probe=fatal",), "no_channel"),
        (("rdinit=/nonexistent", "init=/nonexistent"), "kernel_panic"),
    ],
)
async def test_why_a_guest_ended(settings: Settings, guest: Guest, short_dir: Path, words: tuple[str, ...], code: str) -> None:
    machine = await launch(probe_spec(guest.kernel, guest.initrd, short_dir / "m", *words), settings)
    try:
        async with asyncio.timeout(90):
            error = await explain(machine, await machine.wait())
        assert error.code == code, error
        assert 0 < len(error.console) <= 20
    finally:
        await machine.kill()
        await machine.close()


async def _refused(settings: Settings, guest: Guest, directory: Path, **options: int) -> StokerError:
    with pytest.raises(StokerError) as caught:
        machine = await launch(probe_spec(guest.kernel, guest.initrd, directory, "probe=poweroff", **options), settings)
        try:
            async with asyncio.timeout(90):
                raise await explain(machine, await machine.wait())
        finally:
            await machine.kill()
            await machine.close()
    return caught.value


async def test_what_cannot_start_says_so(settings: Settings, guest: Guest, short_dir: Path) -> None:
    error = await _refused(settings, guest, short_dir / "a", memory=48 * MIB)
    assert isinstance(error, InvalidRequest) and error.code == "memory_too_small" and "--memory" in error.hint
    error = await _refused(settings, guest, short_dir / "b", memory=1 << 47)
    assert isinstance(error, HostError) and error.code == "host_out_of_memory"
    error = await _refused(replace(settings, qemu="qemu-system-nothing"), guest, short_dir / "c")
    assert isinstance(error, HostError) and error.code == "qemu_missing" and error.hint == "apt-get install qemu-system-x86"
    junk = short_dir / "junk"
    junk.write_bytes(b"not a kernel" * 1000)
    error = await _refused(settings, Guest(junk, guest.initrd), short_dir / "d")
    assert error.code == "kernel_unusable"


async def test_a_kill_by_somebody_else_is_told(settings: Settings, guest: Guest, short_dir: Path) -> None:
    machine = await launch(probe_spec(guest.kernel, guest.initrd, short_dir / "m", "probe=echo"), settings)
    os.kill(machine.vmm.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        ended = await machine.wait()
    assert ended == MachineExit(None, 9) and (await explain(machine, ended)).code == "machine_killed"
    await machine.close()


async def test_a_flood_on_the_console_stays_bounded(settings: Settings, guest: Guest, short_dir: Path) -> None:
    spec = probe_spec(guest.kernel, guest.initrd, short_dir / "m", "probe=flood", console_bytes=128 << 10)
    machine = await launch(spec, settings)
    try:
        rotated = spec.directory / "console.log.1"
        async with asyncio.timeout(120):
            while not rotated.exists():
                await asyncio.sleep(0.1)
        shim = json.loads((spec.directory / "shim.json").read_text())["shim"]["pid"]
        cpu, at = _cpu_seconds(shim), time.monotonic()
        seen = set()
        for _ in range(20):
            await asyncio.sleep(0.1)
            sizes = [path.stat().st_size for path in spec.directory.glob("console.log*")]
            assert max(sizes) <= 64 << 10 and len(sizes) <= 2
            seen.add(tuple(sizes))
            assert "x" * 90 in (await machine.console_tail(3))[0]
        assert len(seen) > 1, "the flood goes on"
        assert _cpu_seconds(shim) - cpu < 0.3 * (time.monotonic() - at), "watching a flood costs next to nothing"
        assert int(Path(f"/proc/{shim}/statm").read_text().split()[1]) * 4096 < 2 * MIB
    finally:
        await machine.kill()
        await machine.close()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


STARTER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from stoker.settings import load_settings
from stoker.vmm.qemu.driver import launch
from vmm_guest import probe_spec
async def main():
    detached, kernel, initrd, directory = sys.argv[2] == "detached", *map(Path, sys.argv[3:6])
    machine = await launch(probe_spec(kernel, initrd, directory, "probe=echo", detached=detached), load_settings())
    print(machine.vmm.pid, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


def _start_elsewhere(settings: Settings, guest: Guest, directory: Path, kind: str) -> tuple[subprocess.Popen[bytes], int]:
    """Another process of ours that starts a machine."""
    argv = [
        sys.executable,
        "-c",
        STARTER,
        str(Path(__file__).parent.parent),
        kind,
        str(guest.kernel),
        str(guest.initrd),
        str(directory),
    ]
    env = {**os.environ, "STOKER_RUN_DIR": str(settings.run_dir), "STOKER_DATA_DIR": str(settings.data_dir)}
    starter = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert starter.stdout is not None
    with starter.stdout:
        return starter, int(starter.stdout.readline())


async def test_an_attached_machine_ends_with_its_owner(settings: Settings, guest: Guest, short_dir: Path) -> None:
    starter, pid = _start_elsewhere(settings, guest, short_dir / "m", "attached")
    vmm = ProcessIdentity.of(pid)
    assert vmm.alive()
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 1.0
    while vmm.alive() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert not vmm.alive(), "kill -9 of the owner leaves no VMM for longer than a second"
    record = short_dir / "m/exit.json"  # written by the supervisor, which sees the VMM's end a moment later than we
    async with asyncio.timeout(20):
        while not record.exists():
            await asyncio.sleep(0.01)
    assert json.loads(record.read_text()) == {
        "code": None, "signal": 9, "cause": "owner", "errno": 0, "oom": False
    }  # fmt: skip
    assert await adopt(short_dir / "m") is None


async def test_a_detached_machine_is_adopted_and_ended(settings: Settings, guest: Guest, short_dir: Path) -> None:
    starter, pid = _start_elsewhere(settings, guest, short_dir / "m", "detached")
    starter.kill()
    starter.wait()
    machine = await adopt(short_dir / "m")
    assert machine is not None and machine.vmm.pid == pid and machine.spec_name == "m"
    try:
        assert await machine.status() == "running"
        await console_says(machine, "echo 1")
        await machine.close()
        machine = await adopt(short_dir / "m")
        assert machine is not None and await machine.status() == "running"
        shim = json.loads((short_dir / "m/shim.json").read_text())["shim"]["pid"]
        os.kill(shim, signal.SIGKILL)
        async with asyncio.timeout(1):
            assert await machine.wait() == MachineExit(None, 9)
        assert not machine.vmm.alive() and tail(short_dir / "m/console.log") != ()
    finally:
        if machine is not None:
            await machine.kill()
            await machine.close()
    assert await adopt(short_dir / "m") is None


async def test_starting_is_quick(settings: Settings, guest: Guest, short_dir: Path) -> None:
    """From launch() to a monitor that answers. The bound is for a busy machine; a quiet one takes a tenth."""
    taken = []
    for number in range(5):
        begin = time.perf_counter()
        machine: QemuMachine = await launch(
            probe_spec(guest.kernel, guest.initrd, short_dir / f"m{number}", "probe=echo"), settings
        )
        try:
            await machine.status()
            taken.append(time.perf_counter() - begin)
        finally:
            await machine.kill()
            await machine.close()
    assert min(taken[1:]) < 0.5, taken


@pytest.mark.skipif(not os.path.exists("/dev/kvm"), reason="there is no /dev/kvm to ask about")
async def test_the_verdict_on_kvm_is_reached_kept_and_asked_once(settings: Settings, guest: Guest) -> None:
    asked = replace(settings, accel="auto", kvm_probe_timeout=12.0)
    begin = time.monotonic()
    first, second = await asyncio.gather(verdict(asked, guest.kernel, guest.initrd), verdict(asked, guest.kernel, guest.initrd))
    # The probe is no agent, so even where KVM works it is not taken for one.
    assert first.accelerator is second.accelerator is Accelerator.TCG and first.reason
    assert {first.cached, second.cached} == {True, False}
    assert time.monotonic() - begin < 20
    again = await verdict(asked, guest.kernel, guest.initrd)
    assert again.cached and again.reason == first.reason
    assert list(settings.run_dir.glob("probe-*")) == []
