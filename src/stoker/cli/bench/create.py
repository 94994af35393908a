"""``stoker bench create``: sandboxes one after the other, and as many at once; each is used before it counts."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import click

from stoker.cli.bench.report import Report, percentile
from stoker.cli.options import SIZE
from stoker.errors import StokerError

if TYPE_CHECKING:
    from stoker.client.client import AsyncClient
    from stoker.client.sandbox import AsyncSandbox

__all__ = ["create"]


async def _usable(client: AsyncClient, image: str, memory: int, cold: bool) -> AsyncSandbox:
    from stoker.client.sandbox import AsyncSandbox

    box = await AsyncSandbox.create(image, memory=memory, cold=cold, client=client, ready_timeout=3600.0, lease=True)
    try:
        await box.commands.run(["/bin/true"], check=True)
    except BaseException:
        await box.kill()
        raise
    return box


async def _measure(
    client: AsyncClient, image: str, memory: int, runs: int, at_once: int, cold: bool
) -> tuple[list[float], float, list[str]]:
    single: list[float] = []
    failures: list[str] = []
    await (await _usable(client, image, memory, cold)).kill()  # fetches and builds what there is to; not counted
    for _ in range(runs):
        began = time.perf_counter()
        try:
            box = await _usable(client, image, memory, cold)
        except StokerError as e:
            failures.append(e.message)
            continue
        single.append(time.perf_counter() - began)
        await box.kill()
    began = time.perf_counter()
    crowd = await asyncio.gather(*(_usable(client, image, memory, cold) for _ in range(at_once)), return_exceptions=True)
    together = time.perf_counter() - began
    for made in crowd:
        if isinstance(made, StokerError):
            failures.append(made.message)
        elif isinstance(made, BaseException):
            raise made
    await asyncio.gather(*(made.kill() for made in crowd if not isinstance(made, BaseException)))
    return single, together, failures


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-n", "--runs", type=click.IntRange(1, 1000), default=5, show_default=True, help="How many one after the other.")
@click.option("--at-once", type=click.IntRange(0, 1000), default=10, show_default=True, help="How many at once.")
@click.option("--memory", "-m", type=SIZE, default="256M", show_default=True, help="Memory of each.")
@click.option("--cold", is_flag=True, help="Boot each, golden memory or not.")
@click.argument("image", default="debian:12")
def create(as_json: bool, runs: int, at_once: int, memory: int, cold: bool, image: str) -> int:
    """Time creates until a command has run in each: one by one, and many at once against as many single ones."""

    async def main() -> tuple[list[float], float, list[str]]:
        from stoker.client.client import AsyncClient

        async with AsyncClient() as client:
            return await _measure(client, image, memory, runs, at_once, cold)

    single, together, failures = asyncio.run(main())
    ratios = {}
    if single and at_once:
        ratios["single_creates"] = together / (at_once * sum(single) / len(single))
    more = {
        "at_once": at_once,
        "at_once_s": round(together, 2),
        "single_p50_s": round(percentile(single, 0.5), 2) if single else None,
        "image": image,
    }
    Report("create", single, failures, ratios, more).print(as_json)
    return 1 if failures else 0
