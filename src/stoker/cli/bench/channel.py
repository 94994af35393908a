"""``stoker bench channel``: round trips to the agent, bytes out of and into a command, and what the agent weighs."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from stoker.cli.bench.report import Report
from stoker.cli.options import SIZE
from stoker.errors import InternalError

if TYPE_CHECKING:
    from stoker.engine.boot import LiveMachine

__all__ = ["channel"]

MB = 1_000_000
BLOCK = 256 << 10


@dataclass(frozen=True, slots=True)
class Figures:
    trips: list[float]
    out_rate: float
    in_rate: float
    agent_bytes: int
    agent_resident: int


async def _trips(live: LiveMachine, count: int) -> list[float]:
    for _ in range(10):
        await live.agent.ping()
    return [await live.agent.ping() for _ in range(count)]


async def _out(live: LiveMachine, size: int) -> float:
    """Bytes a second through a command's standard output."""
    from stoker.guest.messages import ExecRequest

    process = await live.agent.exec(ExecRequest(argv=["head", "-c", str(size), "/dev/zero"]))
    began, seen = time.monotonic(), 0
    async for data in process.stdout:
        seen += len(data)
    took = time.monotonic() - began
    await process.wait()
    if seen != size:
        raise InternalError("bytes_lost", f"{seen} of {size} bytes came out of the guest")
    return size / took


async def _in(live: LiveMachine, size: int) -> float:
    """Bytes a second into a command's standard input, which counts them."""
    from stoker.guest.messages import ExecRequest

    process = await live.agent.exec(ExecRequest(argv=["wc", "-c"], stdin=True))
    block, left, began = bytes(BLOCK), size, time.monotonic()
    while left:
        await process.stdin.write(block[: min(BLOCK, left)])
        left -= min(BLOCK, left)
    process.stdin.close()
    counted = b""
    async for data in process.stdout:
        counted += data
    took = time.monotonic() - began
    await process.wait()
    if int(counted or b"-1") != size:
        raise InternalError("bytes_lost", f"{counted.decode().strip()} of {size} bytes came into the guest")
    return size / took


async def _resident(live: LiveMachine) -> int:
    """Bytes of memory that the agent holds in the guest."""
    from stoker.guest.messages import ExecRequest

    process = await live.agent.exec(ExecRequest(argv=["cat", "/proc/1/status"]))
    text = b""
    async for data in process.stdout:
        text += data
    await process.wait()
    return int(text.decode().split("VmRSS:")[1].split()[0]) * 1024


async def _measure(image: str, kernel: str, trips: int, size: int) -> Figures:
    from stoker.cli.progress import progress_for
    from stoker.engine.boot import MachineRequest
    from stoker.engine.run import running
    from stoker.host.binaries import agent_path
    from stoker.settings import load_settings

    progress = progress_for(False)
    request = MachineRequest(name=f"bench-{os.getpid()}", image=image, kernel=kernel)
    try:
        async with running(request, load_settings(), progress) as live:
            progress.close()
            resident = await _resident(live)
            times = await _trips(live, trips)
            out_rate, in_rate = await _out(live, size), await _in(live, size)
            return Figures(times, out_rate, in_rate, agent_path().stat().st_size, resident)
    finally:
        progress.close()


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-n", "--trips", type=click.IntRange(1, 1_000_000), default=1000, show_default=True, help="How many round trips.")
@click.option("--size", type=SIZE, default="1G", show_default=True, help="How much goes through each way.")
@click.option("--kernel", metavar="K", default="", help="As for `stoker run`.")
@click.argument("image", default="debian:12")
def channel(as_json: bool, trips: int, size: int, kernel: str, image: str) -> int:
    """Time the channel between host and guest."""
    figures = asyncio.run(_measure(image, kernel, trips, size))
    more = {
        "out_mb_s": round(figures.out_rate / MB, 1),
        "in_mb_s": round(figures.in_rate / MB, 1),
        "bytes_each_way": size,
        "agent_kib": round(figures.agent_bytes / 1024, 1),
        "agent_resident_kib": figures.agent_resident // 1024,
    }
    Report("channel", figures.trips, more=more).print(as_json)
    return 0
