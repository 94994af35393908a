"""The verdict on KVM, with a program in QEMU's place that behaves as asked."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stoker.errors import HostError
from stoker.settings import Settings, load_settings
from stoker.vmm import accel
from stoker.vmm.accel import AccelVerdict, verdict
from stoker.vmm.machine import Accelerator
from stoker.vmm.qemu import handles

pytestmark = pytest.mark.anyio

FAKE = """#!{python}
import os, re, socket, sys, time
if "--version" in sys.argv:
    print("QEMU emulator version 7.2.0")
    sys.exit()
line = " ".join(sys.argv)
fd = lambda pattern: int(re.search(pattern, line)[1])
console = fd(r"fd=(\\d+),set=1")
agent = socket.socket(fileno=fd(r"id=agent,fd=(\\d+)"))
cpu = sys.argv[sys.argv.index("-cpu") + 1]
with open("{log}", "a") as log:
    log.write(cpu + "\\n")
{behaviour}
"""
ANSWERS = """
os.write(console, b"Linux version 6.1")
peer, _ = agent.accept()
peer.sendall(peer.recv(100))
time.sleep(600)
"""
WRONG = """
peer, _ = agent.accept()
peer.sendall(bytes(len(peer.recv(100))))
time.sleep(600)
"""
TALKS = """
os.write(console, b"Linux version 6.1")
time.sleep(600)
"""
SPINS = "time.sleep(600)"
ABORTS = """
if "arch-capabilities" not in cpu:
    sys.stderr.write("qemu: error: failed to set MSR 0x10a to 0x0\\n")
    sys.stderr.flush()
    os.abort()
"""


@pytest.fixture
def device(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for /dev/kvm, and short patience."""
    path = short_dir / "kvm"
    path.touch()
    path.chmod(0o666)
    monkeypatch.setattr(accel, "DEVICE", path)
    monkeypatch.setattr(handles, "KVM", path)
    monkeypatch.setattr(handles, "has_user_of_its_own", lambda: False)  # which could not execute this Python
    monkeypatch.setattr(accel, "FIRST_BYTE", 0.5)
    yield path


@pytest.fixture
def fake(session_root: Path, short_dir: Path, device: Path) -> Callable[[str], Settings]:
    """Makes a QEMU of the given behaviour, and settings that name it."""
    (short_dir / "kernel").write_bytes(b"kernel")
    (short_dir / "initrd").write_bytes(b"initrd")

    def make(behaviour: str) -> Settings:
        log = session_root / f"{short_dir.name}.log"
        log.touch()
        log.chmod(0o666)
        program = session_root / f"{short_dir.name}.qemu"  # where a VMM that is nobody can reach it
        program.write_text(FAKE.format(python=os.path.realpath(sys.executable), log=log, behaviour=behaviour))
        program.chmod(0o755)
        return replace(
            load_settings({"STOKER_RUN_DIR": str(short_dir / "run"), "STOKER_QEMU": str(program), "STOKER_CONFIG": "/nonexistent"}),
            kvm_probe_timeout=3.0,
        )

    return make


async def ask(settings: Settings, short_dir: Path, *, fresh: bool = False) -> AccelVerdict:
    found = await verdict(settings, short_dir / "kernel", short_dir / "initrd", fresh=fresh)
    assert list(settings.run_dir.glob("probe-*")) == []
    return found


def asked(session_root: Path, short_dir: Path) -> list[str]:
    """The CPU models of the guests that were started."""
    return (session_root / f"{short_dir.name}.log").read_text().split()


async def test_a_guest_that_answers_proves_kvm(fake: Callable[[str], Settings], session_root: Path, short_dir: Path) -> None:
    settings = fake(ANSWERS)
    assert await ask(settings, short_dir) == AccelVerdict(Accelerator.KVM, "a guest started with KVM and answered", False)
    assert (await ask(settings, short_dir)).cached and len(asked(session_root, short_dir)) == 1
    assert not (await ask(settings, short_dir, fresh=True)).cached
    # Another boot of the host, another kernel: asked again. A damaged or foreign record: too.
    record = json.loads((settings.run_dir / "accel.json").read_text())
    record["key"][0] = "another boot"
    for text in (json.dumps(record), "nonsense", "{}"):
        (settings.run_dir / "accel.json").write_text(text)
        assert not (await ask(settings, short_dir)).cached
    (short_dir / "kernel").write_bytes(b"another kernel")
    assert not (await ask(settings, short_dir)).cached


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (SPINS, "wrote nothing within 1.5 s"),
        (TALKS, "did not answer within 3 s"),
        (WRONG, "wrong answer"),
        ("sys.exit(3)", "QEMU with KVM ended (code 3)"),
    ],
)
async def test_anything_else_does_not(fake: Callable[[str], Settings], short_dir: Path, behaviour: str, reason: str) -> None:
    found = await ask(fake(behaviour), short_dir)
    assert found.accelerator is Accelerator.TCG and reason in found.reason and not found.cached


async def test_a_host_that_refuses_an_msr_gets_another_cpu(
    fake: Callable[[str], Settings], session_root: Path, short_dir: Path
) -> None:
    settings = fake(ABORTS + ANSWERS)
    found = await ask(settings, short_dir)
    assert found.accelerator is Accelerator.KVM and found.cpu == "max,-arch-capabilities"
    assert asked(session_root, short_dir) == ["max", "max,-arch-capabilities"]
    assert (await ask(settings, short_dir)).cpu == "max,-arch-capabilities"
    assert (await ask(replace(settings, accel="kvm"), short_dir)).cpu == "max,-arch-capabilities"


async def test_two_at_once_ask_one_guest(fake: Callable[[str], Settings], session_root: Path, short_dir: Path) -> None:
    settings = fake(ANSWERS)
    found = await asyncio.gather(*(ask_quietly(settings, short_dir) for _ in range(3)))
    assert sorted(one.cached for one in found) == [False, True, True] and len(asked(session_root, short_dir)) == 1


async def ask_quietly(settings: Settings, short_dir: Path) -> AccelVerdict:
    return await verdict(settings, short_dir / "kernel", short_dir / "initrd")


async def test_a_cancelled_probe_leaves_nothing(fake: Callable[[str], Settings], session_root: Path, short_dir: Path) -> None:
    settings = fake(TALKS)
    probe = asyncio.create_task(ask_quietly(settings, short_dir))
    async with asyncio.timeout(10):
        while not (session_root / f"{short_dir.name}.log").exists() or not asked(session_root, short_dir):
            await asyncio.sleep(0.02)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert list(settings.run_dir.glob("probe-*")) == [] and not (settings.run_dir / "accel.json").exists()


async def test_settings_and_a_missing_device_decide_without_a_guest(
    fake: Callable[[str], Settings], session_root: Path, short_dir: Path, device: Path
) -> None:
    settings = fake(ANSWERS)
    assert (await ask_quietly(replace(settings, accel="tcg"), short_dir)).accelerator is Accelerator.TCG
    assert (await ask_quietly(replace(settings, accel="kvm"), short_dir)).accelerator is Accelerator.KVM
    device.unlink()
    assert (await ask_quietly(settings, short_dir)).accelerator is Accelerator.TCG
    with pytest.raises(HostError) as caught:
        await ask_quietly(replace(settings, accel="kvm"), short_dir)
    assert caught.value.code == "kvm_unusable"
    assert asked(session_root, short_dir) == []
