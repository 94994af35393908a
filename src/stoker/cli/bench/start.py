"""``stoker bench start``: from the start of the process to the first byte of the command's output, and where the time went.

Runs of ``stoker run``, of the bare QEMU line and of a QEMU that only starts alternate, so that all see the same host. The parts:
*host* is Python, the daemon, the store, the disk's clone; *vmm* the supervisor and QEMU until its guest's first instruction;
*kernel* until the agent starts; *agent* until the guest is configured; *command* until the first byte.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stoker.cli.bench.report import Report, percentile
from stoker.cli.options import SIZE
from stoker.errors import StokerError

if TYPE_CHECKING:
    from stoker.settings import Settings

__all__ = ["start"]

WORD = "stoker-bench-first-byte"
PARTS = ("host", "vmm", "kernel", "agent", "command")


@dataclass(slots=True)
class Samples:
    """Seconds of each run."""

    total: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    failures: list[str] = field(default_factory=list)


async def _timed(argv: list[str], line: str, timeout: float = 60.0, input: bytes | None = None) -> tuple[float, float]:
    """Start of the process and arrival of the line, in seconds of CLOCK_MONOTONIC."""
    from stoker.host.run import run

    seen: list[float] = []
    said: list[str] = []

    def on_line(text: str) -> None:
        said.append(text)
        if line in text and not seen:
            seen.append(time.monotonic())

    began = time.monotonic()
    done = await run(argv, check=False, env=os.environ, input=input, timeout=timeout, on_line=on_line)
    if not seen:
        raise StokerError("no_output", f"{Path(argv[0]).name} ended with {done.code}: {said[-1] if said else 'it said nothing'}")
    return began, seen[0]


def split(began: float, arrived: float, timings: dict[str, Any], vmm_start: float) -> dict[str, float]:
    """The parts of one run, from its marks, the boot's laps, the guest's own clock, and the time QEMU needs to be ready.

    A kernel's clock starts late in its boot, so what the guest's lap holds besides QEMU's start and the agent is the kernel's.
    """
    marks, laps, guest = timings["marks"], timings["laps"], timings["guest"]
    command = marks["first_byte"] - marks["exec"]
    waiting = guest["ready"] - guest["started"]
    vmm = laps["vmm"] + min(vmm_start, laps["guest"])
    kernel = max(0.0, laps["guest"] - vmm_start - waiting)
    agent = waiting + laps["configure"]
    host = max(0.0, (arrived - began) - command - kernel - agent - vmm)
    return {"host": host, "vmm": vmm, "kernel": kernel, "agent": agent, "command": command}


def _stoker() -> list[str]:
    script = Path(sys.executable).with_name("stoker")
    return [str(script)] if script.exists() else [sys.executable, "-m", "stoker.cli.main"]


async def _measure(image: str, kernel: str, memory: int, runs: int, settings: Settings, directory: Path) -> tuple[Samples, str]:
    from stoker.cli.bench.bare import LINE, bare_command, idle_command, write_bare_initramfs
    from stoker.host.binaries import agent_path
    from stoker.images.initramfs import build_initramfs
    from stoker.images.kernel import resolve_kernel
    from stoker.images.progress import NullProgress
    from stoker.vmm.accel import verdict

    own = [*_stoker(), "run", "--cold", "--quiet", "--memory", str(memory), "--timings", str(directory / "timings")]
    own += [*(["--kernel", kernel] if kernel else []), image, "--", "echo", WORD]
    # The first run fetches, builds and proves what there is to; it is not counted.
    await _timed(own, WORD, 1800.0)
    found = await resolve_kernel(kernel or settings.default_kernel, settings, NullProgress())
    initrd = await build_initramfs(found, agent_path(), settings, network=True)
    accel = await verdict(settings, found.vmlinux, initrd)
    bare_initrd = directory / "bare.cpio"
    write_bare_initramfs(bare_initrd)
    cpu = "host" if accel.accelerator == "kvm" else "max,-cx16"
    bare = bare_command(settings.qemu, found.vmlinux, bare_initrd, memory, str(accel.accelerator), cpu)
    samples = Samples()
    for _ in range(runs):
        try:
            began, arrived = await _timed(own, WORD)
            bare_began, bare_arrived = await _timed(bare, LINE.decode().strip())
            vmm_began, vmm_ready = await _timed(
                idle_command(bare), '"QMP"', input=b'{"execute":"qmp_capabilities"}{"execute":"quit"}'
            )
            parts = split(began, arrived, json.loads((directory / "timings").read_text()), vmm_ready - vmm_began)
        except StokerError as e:
            samples.failures.append(e.message)
            continue
        samples.total.append(arrived - began)
        samples.bare.append(bare_arrived - bare_began)
        for part, seconds in parts.items():
            samples.parts[part].append(seconds)
    return samples, str(accel.accelerator)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-n", "--runs", type=click.IntRange(1, 1000), default=10, show_default=True, help="How many runs of each.")
@click.option("--kernel", metavar="K", default="", help="As for `stoker run`.")
@click.option("--memory", "-m", type=SIZE, default="512M", show_default=True, help="As for `stoker run`.")
@click.argument("image", default="debian:12")
def start(as_json: bool, runs: int, kernel: str, memory: int, image: str) -> int:
    """Time `stoker run IMAGE` from the start of the process to its command's first byte.

    Each run is followed by a hand-written QEMU line with the same kernel, memory and accelerator.
    """
    from stoker.settings import load_settings

    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as directory:
        samples, accelerator = asyncio.run(_measure(image, kernel, memory, runs, load_settings(), Path(directory)))
    medians = {part: percentile(values, 0.5) for part, values in samples.parts.items()}
    overhead = [host + vmm for host, vmm in zip(samples.parts["host"], samples.parts["vmm"], strict=True)]
    bare = percentile(samples.bare, 0.5)
    report = Report(
        "start",
        samples.total,
        samples.failures,
        {"bare_qemu": percentile(samples.total, 0.5) / bare} if samples.total else {},
        {
            "bare_qemu_p50_ms": round(bare * 1000, 1),
            "split_p50_ms": {part: round(value * 1000, 1) for part, value in medians.items()},
            "host_overhead_p50_ms": round(percentile(overhead, 0.5) * 1000, 1),
            "image": image,
            "accelerator": accelerator,
        },
    )
    report.print(as_json)
    return 1 if samples.failures else 0
