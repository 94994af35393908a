"""Guests for the VMM tests: the stock kernel and a probe of our own as init (tests/system/guest/probe.c)."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

from stoker.images.cpio import Archive
from stoker.images.initramfs import plan_modules
from stoker.images.kernel import Kernel, resolve_kernel
from stoker.images.progress import NullProgress
from stoker.settings import Settings
from stoker.vmm.machine import Accelerator, Disk, MachineSpec, UserNetwork
from stoker.vmm.qemu.driver import QemuMachine

PROBE = Path(__file__).parent / "system/guest/probe.c"
MIB = 1 << 20


def build_probe(directory: Path) -> Path:
    """The static probe program."""
    program = directory / "probe"
    compiler = "musl-gcc" if shutil.which("musl-gcc") else "cc"
    subprocess.run([compiler, "-Os", "-static", "-s", "-o", program, PROBE], check=True, capture_output=True)
    return program


async def probe_kernel(settings: Settings) -> Kernel:
    return await resolve_kernel("debian:12", settings, NullProgress())


def probe_initrd(kernel: Kernel, probe: Path, directory: Path) -> Path:
    """An initramfs with the modules of a networked guest and the probe as init."""
    lines, files = plan_modules(kernel, network=True)
    wanted = [
        name for kind, _, name in (line.rpartition(":") for line in lines) if kind in ("", "net") and not name.startswith("?")
    ]
    archive = Archive()
    for name in ("dev", "proc", "sys", "modules"):
        archive.directory(name)
    archive.character_device("dev/console", 5, 1)
    archive.file("init", probe.read_bytes(), 0o755)
    archive.file("modules/list", "".join(f"{name}\n" for name in wanted).encode())
    for name in wanted:
        archive.file(f"modules/{name}", files[name])
    path = directory / "initrd"
    path.write_bytes(archive.finish())
    return path


def probe_spec(
    kernel: Path,
    initrd: Path,
    directory: Path,
    *words: str,
    memory: int = 128 * MIB,
    disks: tuple[Disk, ...] = (),
    network: UserNetwork | None = None,
    detached: bool = False,
    console_bytes: int = 4 * MIB,
) -> MachineSpec:
    directory.mkdir(mode=0o700)
    return MachineSpec(
        name=directory.name,
        directory=directory,
        kernel=kernel,
        initrd=initrd,
        cmdline=words,
        cpus=1,
        memory=memory,
        disks=disks,
        network=network,
        accelerator=Accelerator.TCG,
        detached=detached,
        console_bytes=console_bytes,
    )


async def console_says(machine: QemuMachine, text: str, seconds: float = 90) -> tuple[str, ...]:
    """Waits for words on the console, and gives its lines."""
    async with asyncio.timeout(seconds):
        while True:
            lines = await machine.console_tail(200)
            if any(text in line for line in lines):
                return lines
            await asyncio.sleep(0.05)
