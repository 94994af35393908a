"""``stoker bench api``: the daemon at rest and its plainest answers, with as many sandboxes as asked for in the list.

The rows are creates of an image that is not there: they fail before a machine is made, and are removed at the end.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stoker.cli.bench.report import Report, percentile
from stoker.errors import StokerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stoker.client.client import AsyncClient

__all__ = ["api", "processor", "resident"]

LABEL = "stoker-bench"
SHARE = 25


def resident(pid: int) -> int:
    """KiB of memory that a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def processor(pid: int) -> float:
    """Seconds of processor time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _rows(client: AsyncClient, wanted: int, keys: list[str]) -> None:
    """Fills the list up. The daemon keeps so many failed creates of one owner: the rows are spread over keys made for it."""
    from stoker.client.client import AsyncClient

    missing = wanted - len(await client.sandboxes())
    for start in range(0, missing, SHARE):
        made = await client.create_key("stoker bench api")
        keys.append(made.key.id)
        async with AsyncClient(str(client.endpoint), made.secret) as owner:
            await asyncio.gather(*(_row(owner, number) for number in range(min(SHARE, missing - start))))


async def _row(client: AsyncClient, number: int) -> None:
    from stoker.client.sandbox import AsyncSandbox

    try:
        await AsyncSandbox.create("stoker-bench-no-such-image", name=f"bench-{number}", labels={LABEL: "api"}, client=client)
    except StokerError:
        pass  # so it is meant: the row stays


async def _clean(client: AsyncClient, keys: list[str]) -> None:
    from stoker.client.sandbox import AsyncSandbox

    await asyncio.gather(*(box.kill() for box in await AsyncSandbox.list(labels={LABEL: "api"}, client=client)))
    for key in keys:
        await client.revoke_key(key)


async def _times(work: Callable[[], Awaitable[object]], runs: int) -> list[float]:
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        await work()
        seconds.append(time.perf_counter() - began)
    return seconds


async def _words(runs: int) -> list[float]:
    from stoker.host.run import run

    script = Path(sys.executable).with_name("stoker")

    async def once() -> None:
        await run([script, "ls"], env=dict(os.environ))

    return await _times(once, runs)


async def _measure(runs: int, rows: int, words: int, rest: float) -> Report:
    from stoker.client.client import AsyncClient

    async with AsyncClient() as client:
        version = await client.version()
        local = client.endpoint.socket is not None
        keys: list[str] = []
        try:
            await _rows(client, rows, keys)
            await _times(client.sandboxes, 10)
            listed = await _times(client.sandboxes, runs)
            plain = await _times(client.version, runs)
            shown = await _words(words)
            idle = 0.0
            if local and rest:
                before = processor(version.pid)
                await asyncio.sleep(rest)
                idle = (processor(version.pid) - before) / rest
            more = {
                "rows": len(await client.sandboxes()),
                "version_p50_ms": round(1000 * percentile(plain, 0.5), 3),
                "ls_p50_ms": round(1000 * percentile(shown, 0.5), 1) if shown else None,
                "daemon_resident_mib": round(resident(version.pid) / 1024, 1) if local else None,
                "daemon_cpu_percent_at_rest": round(100 * idle, 2) if local and rest else None,
            }
            return Report("api", listed, (), {}, more)
        finally:
            await _clean(client, keys)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-n", "--runs", type=click.IntRange(1, 100_000), default=200, show_default=True, help="How many lists.")
@click.option("--rows", type=click.IntRange(0, 1000), default=100, show_default=True, help="Sandboxes in the list.")
@click.option("--words", type=click.IntRange(0, 1000), default=10, show_default=True, help="How many times `stoker ls`.")
@click.option("--rest", type=click.FloatRange(0, 600), default=5.0, show_default=True, help="Seconds to watch it do nothing.")
def api(as_json: bool, runs: int, rows: int, words: int, rest: float) -> int:
    """Time `GET /v1/sandboxes` and `stoker ls`, and look at the daemon's memory and processor time at rest."""
    asyncio.run(_measure(runs, rows, words, rest)).print(as_json)
    return 0
