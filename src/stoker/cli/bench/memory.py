"""``stoker bench fork`` and ``stoker bench pause``: copies of a running machine, and machines put away and taken up again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from stoker.cli.bench.report import Report, percentile
from stoker.cli.options import SIZE
from stoker.errors import StokerError

if TYPE_CHECKING:
    from stoker.client.sandbox import AsyncSandbox

__all__ = ["fork", "pause"]


@dataclass
class Samples:
    """Seconds of what is measured and of what came before it; milliseconds of the operations' parts."""

    used: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    steps: dict[str, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def took(self, steps: dict[str, float]) -> None:
        for name, value in steps.items():
            self.steps.setdefault(name, []).append(value)

    def medians(self) -> dict[str, float]:
        return {name: round(percentile(values, 0.5), 2) for name, values in self.steps.items()}


@asynccontextmanager
async def _box(image: str, memory: int, dirty: int) -> AsyncIterator[AsyncSandbox]:
    """A machine that has changed so many bytes of its memory."""
    from stoker.client.client import AsyncClient
    from stoker.client.sandbox import AsyncSandbox

    async with AsyncClient() as client:
        box = await AsyncSandbox.create(image, memory=memory, client=client, lease=True)
        try:
            await box.commands.run(f"head -c {dirty} /dev/urandom > /dev/shm/dirty", check=True)
            yield box
        finally:
            await box.kill()


async def _fork(image: str, memory: int, dirty: int, runs: int, count: int) -> Samples:
    samples = Samples()
    async with _box(image, memory, dirty) as box:
        for _ in range(runs):
            began = time.perf_counter()
            try:
                copies = await box.fork(count)
                samples.other.append(time.perf_counter() - began)
                await asyncio.gather(*(copy.commands.run("/bin/true", check=True) for copy in copies))
                samples.used.append(time.perf_counter() - began)
                await asyncio.gather(*(copy.kill() for copy in copies))
                samples.took((await box.operation("fork")).steps)
            except StokerError as error:
                samples.failures.append(error.message)
    return samples


async def _pause(image: str, memory: int, dirty: int, runs: int) -> Samples:
    samples = Samples()
    async with _box(image, memory, dirty) as box:
        for _ in range(runs):
            try:
                began = time.perf_counter()
                await box.pause()
                samples.other.append(time.perf_counter() - began)
                samples.took({f"pause {name}": value for name, value in (await box.operation("pause")).steps.items()})
                began = time.perf_counter()
                await box.resume()
                samples.used.append(time.perf_counter() - began)
                samples.took({f"resume {name}": value for name, value in (await box.operation("resume")).steps.items()})
                await box.commands.run(f"head -c {dirty} /dev/urandom > /dev/shm/dirty", check=True)
            except StokerError as error:
                samples.failures.append(error.message)
    return samples


def _report(name: str, samples: Samples, other: str, image: str, as_json: bool) -> int:
    more = {f"{other}_p50_ms": round(1000 * percentile(samples.other, 0.5), 1), "steps_ms": samples.medians(), "image": image}
    Report(name, samples.used, samples.failures, {}, more).print(as_json)
    return 1 if samples.failures else 0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-n", "--runs", type=click.IntRange(1, 10000), default=20, show_default=True, help="How many times.")
@click.option("--count", type=click.IntRange(1, 100), default=1, show_default=True, help="Copies at a time.")
@click.option("--memory", "-m", type=SIZE, default="256M", show_default=True, help="Memory of the machine.")
@click.option("--dirty", type=SIZE, default="1M", show_default=True, help="Memory that it changes before.")
@click.argument("image", default="debian:12")
def fork(as_json: bool, runs: int, count: int, memory: int, dirty: int, image: str) -> int:
    """Time forks until each copy has run a command; `stopped` is how long the original stood."""
    return _report("fork", asyncio.run(_fork(image, memory, dirty, runs, count)), "answered", image, as_json)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-n", "--runs", type=click.IntRange(1, 10000), default=20, show_default=True, help="How many times.")
@click.option("--memory", "-m", type=SIZE, default="256M", show_default=True, help="Memory of the machine.")
@click.option("--dirty", type=SIZE, default="1M", show_default=True, help="Memory that it changes before each pause.")
@click.argument("image", default="debian:12")
def pause(as_json: bool, runs: int, memory: int, dirty: int, image: str) -> int:
    """Time resumes until the agent has answered, and pauses."""
    return _report("pause", asyncio.run(_pause(image, memory, dirty, runs)), "pause", image, as_json)
