"""KVM or software emulation: decided by a guest that has to answer.

That ``/dev/kvm`` opens proves nothing: where virtualisation is nested badly the vCPU spins in its first instructions for ever. So
the kernel and initramfs that machines will use are booted once with KVM, and the agent must repeat a nonce. The verdict is kept in
``run_dir/accel.json`` for this boot of the host, this QEMU, this kernel and this device node; whoever changes one of them is
asked again. ``run_dir/accel.lock`` keeps a second probe waiting for the first one's answer. A crash leaves a ``probe-*``
directory and no process (the machine is attached); the next probe removes it.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from stoker.errors import HostError, StokerError
from stoker.host.process import boot_id
from stoker.host.sockets import unix_address
from stoker.settings import Settings
from stoker.vmm.machine import Accelerator, MachineExit, MachineSpec
from stoker.vmm.qemu.driver import QemuMachine, launch
from stoker.vmm.qemu.facts import QemuFacts, qemu_facts

__all__ = ["AccelVerdict", "verdict"]

DEVICE = Path("/dev/kvm")
FIRST_BYTE = 1 / 6
"""The part of the time in which a guest that runs has written to its console long before; one that spins never will."""
LIVELY = ("loglevel=7", "earlyprintk=ttyS0,115200", "ignore_loglevel")
PREAMBLE = b"\xf5STOKER-SYNC\r\n\x1a\n"
NO_ARCH_CAPABILITIES = "max,-arch-capabilities"
"""For hosts that refuse MSR 0x10a, where ``-cpu max`` makes QEMU 7 abort."""


@dataclass(frozen=True, slots=True)
class AccelVerdict:
    """What machines run on, and why. ``cpu`` is for :class:`MachineSpec` (empty: the driver's default)."""

    accelerator: Accelerator
    reason: str
    cached: bool
    cpu: str = ""


async def verdict(settings: Settings, kernel: Path, initrd: Path, *, fresh: bool = False) -> AccelVerdict:
    """The accelerator to use. ``fresh`` asks a guest again. Costs nothing where ``settings.accel`` decides, there is no usable
    ``/dev/kvm``, or the answer is known."""
    if settings.accel == "tcg":
        return AccelVerdict(Accelerator.TCG, "the setting accel = tcg", True)
    refused = _device_refused()
    if settings.accel == "kvm":
        if refused:
            raise HostError("kvm_unusable", f"accel = kvm, but {refused}", "unset STOKER_ACCEL, or: stoker doctor")
        qemu = await qemu_facts(settings)
        known = _load(settings, _key(qemu, kernel))
        return AccelVerdict(Accelerator.KVM, "the setting accel = kvm", True, known.cpu if known else "")
    if refused:
        return AccelVerdict(Accelerator.TCG, refused, True)
    qemu = await qemu_facts(settings)
    key = _key(qemu, kernel)
    if not fresh and (known := _load(settings, key)):
        return known
    settings.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with _lock(settings.run_dir / "accel.lock") as waited:
        if waited and (known := _load(settings, key)):
            return known  # the one before us has just asked
        found = await _probe(settings, kernel, initrd)
        _keep(settings, key, found)
        return found


def _device_refused() -> str:
    if not DEVICE.exists():
        return "there is no /dev/kvm"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return "/dev/kvm may not be opened by this user"
    return ""


def _key(qemu: QemuFacts, kernel: Path) -> list[object]:
    image = os.stat(kernel)
    binary = os.stat(qemu.path)
    return [
        boot_id(),
        qemu.path, list(qemu.version), binary.st_mtime_ns,
        os.stat(DEVICE).st_rdev, os.geteuid(),
        str(kernel), image.st_mtime_ns, image.st_size,
    ]  # fmt: skip


def _load(settings: Settings, key: list[object]) -> AccelVerdict | None:
    try:
        with open(settings.run_dir / "accel.json", "rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            record = json.load(file)
        if record["key"] != key:
            return None
        return AccelVerdict(Accelerator(record["accelerator"]), str(record["reason"]), True, str(record["cpu"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _keep(settings: Settings, key: list[object], found: AccelVerdict) -> None:
    path = settings.run_dir / "accel.json"
    beside = path.with_name(f"accel.json.{os.getpid()}")
    record = {"key": key, "accelerator": found.accelerator.value, "reason": found.reason, "cpu": found.cpu}
    beside.write_text(json.dumps(record))
    beside.replace(path)


@asynccontextmanager
async def _lock(path: Path) -> AsyncIterator[bool]:
    """Holds the lock; true when it had to be waited for."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    waited = False
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = True
                await asyncio.sleep(0.05)
        yield waited
    finally:
        os.close(fd)


async def _probe(settings: Settings, kernel: Path, initrd: Path) -> AccelVerdict:
    import shutil
    import tempfile

    for left in settings.run_dir.glob("probe-*"):  # under the lock, so whoever made it is gone
        shutil.rmtree(left, ignore_errors=True)
    found = AccelVerdict(Accelerator.TCG, "", False)
    for cpu in ("", NO_ARCH_CAPABILITIES):
        directory = Path(tempfile.mkdtemp(prefix="probe-", dir=settings.run_dir))
        try:
            spec = MachineSpec(
                name="kvm-probe",
                directory=directory,
                kernel=kernel,
                initrd=initrd,
                cmdline=LIVELY,
                cpus=1,
                memory=256 << 20,
                disks=(),
                network=None,
                accelerator=Accelerator.KVM,
                cpu=cpu,
            )
            found, again = await _ask(spec, settings)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        if not again:
            break
    return found


async def _ask(spec: MachineSpec, settings: Settings) -> tuple[AccelVerdict, bool]:
    """One guest's verdict, and whether it is worth asking with another CPU model."""
    negative = AccelVerdict(Accelerator.TCG, "", False)
    try:
        machine = await launch(spec, settings)
    except StokerError as e:
        return replace(negative, reason=e.message), False
    ended = asyncio.ensure_future(machine.wait())
    proof = asyncio.ensure_future(_proof(machine, settings.kvm_probe_timeout))
    try:
        await asyncio.wait({ended, proof}, return_when=asyncio.FIRST_COMPLETED)
        if proof.done():
            failure = proof.result()
            if not failure:
                return AccelVerdict(Accelerator.KVM, "a guest started with KVM and answered", False, spec.cpu), False
            return replace(negative, reason=failure), False
        log = await machine.vmm_tail()
        return replace(negative, reason=_ended(ended.result(), log)), any("0x10a" in line for line in log)
    finally:
        for future in (ended, proof):
            future.cancel()
        await asyncio.gather(ended, proof, return_exceptions=True)
        await asyncio.shield(asyncio.ensure_future(_end(machine)))


async def _end(machine: QemuMachine) -> None:
    await machine.kill()
    await machine.close()


def _ended(exit: MachineExit, log: tuple[str, ...]) -> str:
    how = f"signal {exit.signal}" if exit.signal is not None else f"code {exit.code}"
    return f"QEMU with KVM ended ({how}): {log[-1] if log else 'without a word'}"


async def _proof(machine: QemuMachine, timeout: float) -> str:
    """Empty when the agent repeated our nonce, else why that is not to be expected any more."""
    answer = asyncio.ensure_future(_answer(machine.channel()))
    console = machine.directory / "console.log"
    clock = asyncio.get_running_loop().time
    begin, spoke, silence = clock(), False, timeout * FIRST_BYTE
    try:
        while clock() < begin + timeout:
            await asyncio.wait({answer}, timeout=0.05)
            if answer.done():
                return "" if answer.result() else "a guest started with KVM, but gave a wrong answer"
            spoke = spoke or (console.exists() and console.stat().st_size > 0)
            if not spoke and clock() > begin + silence:
                return f"/dev/kvm opens, but a guest wrote nothing within {silence:g} s"
        return f"a guest started with KVM, but did not answer within {timeout:g} s"
    finally:
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)


async def _answer(channel: Path) -> bool:
    """Sends the agent's preamble (docs/agent-protocol.md) and waits for the same nonce to come back."""
    import zlib

    with unix_address(channel) as address:
        reader, writer = await asyncio.open_unix_connection(address)
    try:
        preamble = PREAMBLE + os.urandom(16)
        preamble += zlib.crc32(preamble).to_bytes(4, "little")
        writer.write(preamble)
        await writer.drain()
        return preamble == await reader.readexactly(len(preamble))
    except (asyncio.IncompleteReadError, OSError):
        await asyncio.sleep(3600)  # the machine is ending, which is what is looked at
        return False
    finally:
        writer.close()
