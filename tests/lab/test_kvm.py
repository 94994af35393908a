"""Machines under KVM: the verdict of a guest that answers, and what is different from software emulation."""

from __future__ import annotations

import json
import os
import platform
import socket
import time
import zlib
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from command_line import CommandLine
from engine_fixtures import own_data
from stoker.host.binaries import agent_path
from stoker.images.initramfs import build_initramfs
from stoker.images.kernel import resolve_kernel
from stoker.settings import Settings
from stoker.vmm.accel import PREAMBLE
from stoker.vmm.machine import Accelerator, Channel, MachineSpec
from stoker.vmm.qemu.driver import launch

pytestmark = pytest.mark.timeout(900)

IDENTITY = "hostname; cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | sha256sum"


@pytest.fixture
def undecided(settings: Settings, short_dir: Path) -> CommandLine:
    """A command line that has to find out by itself what this host can."""
    own = replace(own_data(settings, short_dir), accel="auto")
    return CommandLine(
        own,
        {
            "STOKER_DATA_DIR": str(own.data_dir),
            "STOKER_RUN_DIR": str(own.run_dir),
            "STOKER_ACCEL": "auto",
            "STOKER_CONFIG": str(own.config_file),
        },
    )


def test_a_guest_that_answers_proves_kvm_and_machines_run_under_it(undecided: CommandLine) -> None:
    try:
        created = undecided("create", "--json", "--network", "none", "debian:12", timeout=800)
        assert created.code == 0, created.error
        sandbox = json.loads(created.text)
        assert sandbox["versions"]["accelerator"] == "kvm"
        verdict = json.loads((undecided.settings.run_dir / "accel.json").read_text())
        assert (verdict["accelerator"], verdict["reason"]) == ("kvm", "a guest started with KVM and answered")
        done = undecided(
            "exec", sandbox["id"], "--", "sh", "-c", "uname -r; cat /sys/devices/system/clocksource/*/current_clocksource"
        )
        assert done.code == 0, done.error
        release, clock = done.text.split()
        assert release != platform.release() and clock == "kvm-clock"
    finally:
        undecided("rm", "--all")
        undecided("daemon", "stop")


def test_run_under_kvm(stoker: CommandLine) -> None:
    done = stoker("run", "debian:12", "--", "sh", "-c", "cat; grep -c ^processor /proc/cpuinfo; exit 7", input=b"in and out\n")
    assert (done.code, done.text) == (7, "in and out\n1\n"), done.error


@pytest.mark.lab("stable")
def test_memory_is_taken_and_taken_up_under_kvm(undecided: CommandLine) -> None:
    """The first create boots and has golden memory made, the second starts from it; each is itself. Then pause, fork, snapshot."""
    golden = undecided.settings.data_dir / "golden"
    stoker = replace(undecided, env={**undecided.env, "STOKER_GOLDEN": "1", "STOKER_ACCEL": "kvm"})
    create = ("create", "--json", "--network", "none", "debian:12")
    try:
        cold = stoker(*create)
        assert cold.code == 0, cold.error
        assert json.loads(cold.text)["origin"] == "boot"
        deadline = time.monotonic() + 400
        while not any(golden.glob("*/manifest.json")):
            assert time.monotonic() < deadline, "no golden memory was made"
            time.sleep(1)
        made = [stoker(*create) for _ in range(2)]
        assert [one.code for one in made] == [0, 0], [one.error for one in made]
        boxes = [json.loads(one.text) for one in made]
        assert [box["origin"] for box in boxes] == ["golden", "golden"]
        told = [stoker("exec", box["id"], "--", "sh", "-c", IDENTITY).text.splitlines() for box in boxes]
        assert all(len(one) == 3 for one in told) and not set(told[0]) & set(told[1])
        box = boxes[0]["id"]

        def said(machine: str, script: str) -> str:
            done = stoker("exec", machine, "--", "sh", "-c", script)
            assert done.code == 0, done.error
            return done.text

        pattern = said(box, "head -c 8M /dev/urandom > /dev/shm/p; echo disk > /root/d; md5sum < /dev/shm/p; cat /root/d")
        look = "md5sum < /dev/shm/p; cat /root/d"
        assert stoker("pause", box).code == 0
        assert said(box, look) == pattern
        forked, kept = stoker("fork", box), stoker("snapshot", "create", box)
        assert (forked.code, kept.code) == (0, 0), (forked.error, kept.error)
        started = stoker("create", "--from", kept.text.strip())
        assert started.code == 0, started.error
        copies = [forked.text.strip(), started.text.strip()]
        assert [said(one, look) for one in copies] == [pattern, pattern]
        identities = [said(one, IDENTITY) for one in (box, *copies)]
        assert len(set(identities)) == 3
    finally:
        stoker("rm", "--all")
        stoker("daemon", "stop")


@pytest.mark.anyio
async def test_the_agent_answers_on_vsock(settings: Settings, short_dir: Path) -> None:
    kernel = await resolve_kernel("debian:12", settings)
    initrd = await build_initramfs(kernel, agent_path(), settings, network=False)
    directory = short_dir / "machine"
    directory.mkdir(mode=0o700)
    spec = MachineSpec(
        name="vsock",
        directory=directory,
        kernel=kernel.vmlinux,
        initrd=initrd,
        cmdline=(),
        cpus=1,
        memory=256 << 20,
        disks=(),
        network=None,
        accelerator=Accelerator.KVM,
        channel=Channel.VSOCK,
        vsock_cid=77,
    )
    machine = await launch(spec, settings)
    try:
        preamble = PREAMBLE + os.urandom(16)
        preamble += zlib.crc32(preamble).to_bytes(4, "little")
        with anyio.fail_after(120):
            assert await anyio.to_thread.run_sync(_echo, 77, preamble, abandon_on_cancel=True) == preamble
    finally:
        await machine.kill()
        await machine.close()


def _echo(cid: int, preamble: bytes) -> bytes:
    """Connects as soon as the agent listens, and gives what it answers."""
    for _ in range(600):
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as channel:
            channel.settimeout(60)
            try:
                channel.connect((cid, 1024))
            except OSError:
                time.sleep(0.2)
                continue
            channel.sendall(preamble)
            return channel.recv(len(preamble), socket.MSG_WAITALL)
    return b""
