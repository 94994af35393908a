"""``stoker bench restore``: creates from memory (golden, a template's, or that of a machine that waits), against cold ones; each
until a first command has run."""

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
    from stoker.api.models import WarmSet
    from stoker.client.client import AsyncClient

__all__ = ["restore"]

LEARNING = 120.0
"""Seconds that golden memory, or a machine of a warm set, may take to be made."""
FROM_MEMORY = ("golden", "template", "warm")
LEFT = 600.0
"""Seconds after which a sandbox goes by itself, should this program be killed. (A lease would be one connection more.)"""
WARM = 2


@dataclass
class Samples:
    """Seconds: until the sandbox runs, until its first command's output is there; and the latter of cold creates."""

    ready: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    origins: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)


async def _one(client: AsyncClient, image: str, memory: int | None, cold: bool) -> tuple[str, float, float]:
    from stoker.client.sandbox import AsyncSandbox

    began = time.perf_counter()
    box = await AsyncSandbox.create(image, memory=memory, client=client, cold=cold, timeout=LEFT)
    try:
        ready = time.perf_counter() - began
        await box.commands.run(["/bin/true"], check=True)
        used = time.perf_counter() - began
        return str(box.info.origin), ready, used
    finally:
        await box.kill()


async def _all_wait(client: AsyncClient, warm: WarmSet | None) -> None:
    """Until the warm set is full."""
    async with asyncio.timeout(LEARNING):
        while warm is not None and not any(  # noqa: ASYNC110 - the daemon tells it to who asks
            one.id == warm.id and one.ready == one.size for one in await client.warm_sets()
        ):
            await asyncio.sleep(0.05)


async def _measure(image: str, memory: int | None, runs: int, cold: int, warm: bool, gap: float) -> Samples:
    from stoker.client.client import AsyncClient

    samples = Samples()
    async with AsyncClient() as client:
        deadline = time.monotonic() + LEARNING
        while (await _one(client, image, memory, False))[0] not in FROM_MEMORY:
            if time.monotonic() > deadline:
                raise GuestError("no_golden_memory", "no golden memory is made of this image", "see the daemon's log")
            await asyncio.sleep(1.0)
        waiting = await client.keep_warm(image, WARM, memory=memory) if warm else None
        try:
            for run in range(runs + cold):
                # Cold ones in between, so that a host that gets slower slows both.
                boots = run % max(1, (runs + cold) // cold) == 0 if cold else False
                try:
                    await _all_wait(client, waiting)
                    await asyncio.sleep(gap)
                    origin, ready, used = await _one(client, image, memory, boots)
                except (StokerError, TimeoutError) as error:
                    samples.failures.append(str(error) or "no machine waits")
                    continue
                if origin in FROM_MEMORY:
                    samples.ready.append(ready)
                    samples.used.append(used)
                    samples.origins.add(origin)
                else:
                    samples.cold.append(used)
        finally:
            if waiting is not None:
                await client.remove_warm_set(waiting.id)
    return samples


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-n", "--runs", type=click.IntRange(1, 10000), default=40, show_default=True, help="How many from golden memory.")
@click.option("--cold", type=click.IntRange(0, 1000), default=5, show_default=True, help="How many cold ones.")
@click.option("--memory", "-m", type=SIZE, help="Memory of each.  [default: 256M; a template's own]")
@click.option("--warm", is_flag=True, help="Have machines wait, and take one each time.")
@click.option(
    "--gap", type=click.FloatRange(0, 600), default=0.0, show_default=True, help="Seconds before each: time to park a machine."
)
@click.argument("image", default="debian:12")
def restore(as_json: bool, runs: int, cold: int, memory: int | None, warm: bool, gap: float, image: str) -> int:
    """Time creates from memory until the first command's output, against cold creates. IMAGE may be a template.

    One right after the other finds no parked machine; with a gap of a second or more each does.
    """
    if memory is None and ":" in image:
        memory = 256 << 20
    samples = asyncio.run(_measure(image, memory, runs, cold, warm, gap))
    ratios = {}
    if samples.cold and samples.used:
        ratios["cold_create"] = percentile(samples.used, 0.5) / percentile(samples.cold, 0.5)
    more = {
        "ready_p50_ms": round(1000 * percentile(samples.ready, 0.5), 1),
        "ready_p99_ms": round(1000 * percentile(samples.ready, 0.99), 1),
        "cold_p50_ms": round(1000 * percentile(samples.cold, 0.5), 1) if samples.cold else None,
        "image": image,
        "origin": ", ".join(sorted(samples.origins)),
    }
    Report("restore", samples.used, samples.failures, ratios, more).print(as_json)
    return 1 if samples.failures else 0
