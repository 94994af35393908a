"""``stoker bench restore``: creates from golden memory or a template, against cold ones, each until a first command has run."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from stoker.cli.bench.report import Report, percentile
from stoker.cli.options import SIZE
from stoker.errors import GuestError, StokerError

if TYPE_CHECKING:
    from stoker.client.client import AsyncClient

__all__ = ["restore"]

LEARNING = 120.0
"""Seconds that golden memory may take to be made."""
MEMORY = 256 << 20
RESTORED = ("golden", "template")


@dataclass
class Samples:
    """Seconds: until the sandbox runs, until its first command's output is there; and the latter of cold creates."""

    ready: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


async def _one(client: AsyncClient, image: str, memory: int | None, cold: bool) -> tuple[str, float, float]:
    from stoker.client.sandbox import AsyncSandbox

    began = time.perf_counter()
    box = await AsyncSandbox.create(image, memory=memory, client=client, cold=cold, lease=True)
    try:
        ready = time.perf_counter() - began
        await box.commands.run("/bin/true", check=True)
        used = time.perf_counter() - began
        return str(box.info.origin), ready, used
    finally:
        await box.kill()


async def _measure(image: str, memory: int | None, runs: int, cold: int) -> Samples:
    from stoker.client.client import AsyncClient
    from stoker.client.templates import AsyncTemplate

    samples = Samples()
    async with AsyncClient() as client:
        deadline = time.monotonic() + LEARNING
        name = image.removeprefix("template:")
        if memory is None and all(name not in (one.name, one.id) for one in await AsyncTemplate.list(client=client)):
            memory = MEMORY
        while (await _one(client, image, memory, False))[0] not in RESTORED:
            if time.monotonic() > deadline:
                raise GuestError("no_golden_memory", "no golden memory is made of this image", "see the daemon's log")
            await asyncio.sleep(1.0)
        for run in range(runs + cold):
            try:
                # Cold ones in between, so that a host that gets slower slows both.
                boots = run % max(1, (runs + cold) // cold) == 0 if cold else False
                origin, ready, used = await _one(client, image, memory, boots)
            except StokerError as error:
                samples.failures.append(error.message)
                continue
            if origin in RESTORED:
                samples.ready.append(ready)
                samples.used.append(used)
            else:
                samples.cold.append(used)
    return samples


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-n", "--runs", type=click.IntRange(1, 10000), default=40, show_default=True, help="How many from golden memory.")
@click.option("--cold", type=click.IntRange(0, 1000), default=5, show_default=True, help="How many cold ones.")
@click.option("--memory", "-m", type=SIZE, help="Memory of each.  [default: 256M, or the template's]")
@click.argument("image", default="debian:12")
def restore(as_json: bool, runs: int, cold: int, memory: int | None, image: str) -> int:
    """Time creates from golden memory, or from a template, until the first command's output, against cold creates."""
    samples = asyncio.run(_measure(image, memory, runs, cold))
    ratios = {}
    if samples.cold and samples.used:
        ratios["cold_create"] = percentile(samples.used, 0.5) / percentile(samples.cold, 0.5)
    more = {
        "ready_p50_ms": round(1000 * percentile(samples.ready, 0.5), 1),
        "cold_p50_ms": round(1000 * percentile(samples.cold, 0.5), 1) if samples.cold else None,
        "image": image,
    }
    Report("restore", samples.used, samples.failures, ratios, more).print(as_json)
    return 1 if samples.failures else 0
