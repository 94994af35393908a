"""``stoker bench density``: how many idle machines of one memory there is room for, and what each of them costs.

The daemon's budgets hold for this as for everything: for 500 machines it wants ``STOKER_BUDGET_MEMORY`` and ``STOKER_BUDGET_CPUS``
that are more than the host has, since what is admitted is what a machine may come to use.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from stoker.cli.bench.report import Report, percentile
from stoker.cli.options import SIZE
from stoker.errors import HostError, StokerError

if TYPE_CHECKING:
    from stoker.client.client import AsyncClient
    from stoker.client.sandbox import AsyncSandbox
    from stoker.host.smaps import Footprint

__all__ = ["density"]

MIB = 1 << 20
LONGEST = 4 * 3600.0
"""Seconds after which a copy ends by itself, should this program not get to it."""
AT_ONCE, LOOKS = 8, 10
T = TypeVar("T")


@dataclass
class Samples:
    """What came of it. ``made`` in seconds for all, ``answered`` for each; sizes are bytes."""

    labels: dict[str, str] = field(default_factory=lambda: {"stoker-bench": f"density-{os.urandom(4).hex()}"})
    copies: list[str] = field(default_factory=list)
    made: float = 0.0
    answered: list[float] = field(default_factory=list)
    vmm: list[Footprint] = field(default_factory=list)
    shim: list[Footprint] = field(default_factory=list)
    used: int = 0
    """How much less memory the host has available."""
    failures: list[str] = field(default_factory=list)


async def _each(items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    """For all of them, some at a time."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(item: T) -> None:
        async with turns:
            await work(item)

    await asyncio.gather(*(one(item) for item in items))


def _available() -> int:
    text = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
    return int(text.split()[0]) << 10


async def _fork(client: AsyncClient, box: AsyncSandbox, count: int, samples: Samples) -> bool:
    """So many more copies. False: there is no room for another."""
    from stoker.api.models import ForkResult, ForkSandbox, Timeout
    from stoker.client.api import path

    body = ForkSandbox(count=count, labels=samples.labels, timeout=Timeout(LONGEST))
    try:
        result = await client.api.call("POST", path("sandboxes", box.id, "fork"), ForkResult, body=body, timeout=600.0)
    except StokerError as error:
        samples.failures.append(error.message)
        return False
    samples.copies += [item.sandbox.id for item in result.items if item.sandbox is not None]
    samples.failures += [item.error.message for item in result.items if item.error is not None]
    return True


async def _create(client: AsyncClient, image: str, memory: int, samples: Samples) -> bool:
    from stoker.client.sandbox import AsyncSandbox

    try:
        box = await AsyncSandbox.create(image, memory=memory, labels=samples.labels, timeout=LONGEST, client=client)
    except StokerError as error:
        samples.failures.append(error.message)
        return False
    samples.copies.append(box.id)
    return True


def _footprints(run_dir: Path, sandbox: str, samples: Samples) -> None:
    from stoker.host.smaps import footprint

    with suppress(FileNotFoundError, ProcessLookupError):  # one that has ended is among the failures when it is asked
        record = json.loads((run_dir / "sandboxes" / sandbox / "shim.json").read_bytes())
        vmm, shim = footprint(record["vmm"]["pid"]), footprint(record["shim"]["pid"])
        samples.vmm.append(vmm)
        samples.shim.append(shim)


@asynccontextmanager
async def _gone_at_the_end(client: AsyncClient, samples: Samples) -> AsyncIterator[None]:
    """However it ends. What was only being made then is found by its label, too."""
    from stoker.client.sandbox import AsyncSandbox

    async def kill(box: AsyncSandbox) -> None:
        with suppress(StokerError):  # the next look says what is left
            await box.kill()

    try:
        yield
    finally:
        for _ in range(LOOKS):
            left = await AsyncSandbox.list(labels=samples.labels, client=client)
            await _each(left, kill)
            if not left:
                break
        else:
            raise HostError(
                "bench_left", f"{len(left)} sandboxes of it could not be destroyed", "stoker rm --all, or the daemon's log"
            )


async def _measure(
    image: str, memory: int, count: int, at_once: int, create: bool, commands: int, rest: float, run_dir: Path
) -> Samples:
    from stoker.client.client import AsyncClient
    from stoker.client.sandbox import AsyncSandbox

    samples = Samples()
    async with AsyncClient() as client, _gone_at_the_end(client, samples):
        box = await AsyncSandbox.create(image, memory=memory, client=client, lease=True)
        try:
            await box.commands.run("/bin/true", check=True)
            before, began = _available(), time.perf_counter()
            if create:
                while len(samples.copies) < count and await _create(client, image, memory, samples):
                    pass
            else:
                while (missing := count - len(samples.copies)) > 0 and len(samples.failures) < at_once:
                    if not await _fork(client, box, min(at_once, missing), samples):
                        break
            samples.made = time.perf_counter() - began
            await asyncio.sleep(rest)
            for sandbox in samples.copies:
                _footprints(run_dir, sandbox, samples)
            samples.used = before - _available()
            busy = set(samples.copies[:: max(1, len(samples.copies) // commands)] if commands else [])

            async def ask(sandbox: str) -> None:
                asked = time.perf_counter()
                try:
                    copy = await AsyncSandbox.connect(sandbox, client=client)
                    if sandbox in busy:
                        await copy.commands.run("/bin/true", check=True)
                    else:
                        await copy.files.stat("/")
                    samples.answered.append(time.perf_counter() - asked)
                except StokerError as error:
                    samples.failures.append(error.message)

            await _each(samples.copies, ask)
        finally:
            await box.kill()
    return samples


def _mib(values: Iterable[float]) -> dict[str, float]:
    found = list(values)
    return {f"p{share}": round(percentile(found, share / 100) / MIB, 1) for share in (50, 99)} if found else {}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-n", "--count", type=click.IntRange(1, 10000), default=500, show_default=True, help="How many machines.")
@click.option("--at-once", type=click.IntRange(1, 100), default=10, show_default=True, help="Copies of each fork.")
@click.option("--create", is_flag=True, help="Creates from golden memory instead of forks of one machine.")
@click.option("--commands", type=click.IntRange(0, 10000), default=50, show_default=True, help="So many run a command at the end.")
@click.option("--memory", "-m", type=SIZE, default="256M", show_default=True, help="Memory of each.")
@click.option("--rest", type=click.FloatRange(0, 600), default=5.0, show_default=True, help="Seconds before they are looked at.")
@click.argument("image", default="debian:12")
def density(*, as_json: bool, count: int, at_once: int, create: bool, commands: int, memory: int, rest: float, image: str) -> int:
    """Keep many idle machines, look at the memory of each (VMM and supervisor), and have each answer.

    Stops where the daemon has no room for more. The times are those of the answers, eight at a time: some run a command, which is
    no longer an idle machine's work, of the others the agent looks at a file.
    """
    from stoker.settings import load_settings

    samples = asyncio.run(_measure(image, memory, count, at_once, create, commands, rest, load_settings().run_dir))
    each = [vmm + shim for vmm, shim in zip(samples.vmm, samples.shim, strict=True)]
    more = {
        "machines": len(samples.copies),
        "wanted": count,
        "made_s": round(samples.made, 1),
        "private_mib": _mib(one.private for one in each),
        "private_of_the_supervisor_mib": _mib(one.private for one in samples.shim),
        "pss_mib": _mib(one.pss for one in each),
        "pss_together_mib": round(sum(one.pss for one in each) / MIB),
        "host_memory_used_mib": round(samples.used / MIB),
        "image": image,
    }
    Report("density", samples.answered, samples.failures, {}, more).print(as_json)
    return 1 if samples.failures else 0
