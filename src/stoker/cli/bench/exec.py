"""``stoker bench exec``: a command in a running sandbox through the API, the agent's own share of it, and SSH.

*API* is ``commands.run("true")`` from the call to its result. *Agent* is what the agent itself took in the guest for the very same
commands, from before its fork until it had their exit and the end of their output. *ssh* is a fresh login that runs the same.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stoker.cli.bench.report import Report, percentile
from stoker.errors import StokerError

if TYPE_CHECKING:
    from stoker.client.client import AsyncClient
    from stoker.client.sandbox import AsyncSandbox

__all__ = ["exec_bench"]

WARM = 10


@dataclass(slots=True)
class Samples:
    """Seconds of each run."""

    api: list[float] = field(default_factory=list)
    agent: list[float] = field(default_factory=list)
    ssh: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


async def _api(box: AsyncSandbox, samples: Samples) -> None:
    began = time.perf_counter()
    try:
        done = await box.commands.run("true", check=True)
    except StokerError as e:
        samples.failures.append(e.message)
        return
    samples.api.append(time.perf_counter() - began)
    samples.agent.append(done.duration)


async def _ssh(words: list[str], samples: Samples) -> None:
    from stoker.cli.bench.ssh import login

    began = time.perf_counter()
    try:
        await login(words, "true")
    except StokerError as e:
        samples.failures.append(e.message)
        return
    samples.ssh.append(time.perf_counter() - began)


async def _measure(client: AsyncClient, image: str, runs: int, logins: int) -> Samples:
    from stoker.cli.bench.ssh import ssh_server
    from stoker.client.sandbox import AsyncSandbox
    from stoker.settings import load_settings

    samples = Samples()
    box = await AsyncSandbox.create(image, client=client, lease=True)
    try:
        for _ in range(WARM):
            await box.commands.run("true")
        with tempfile.TemporaryDirectory(prefix="stoker-bench-") as directory:
            if not logins:
                for _ in range(runs):
                    await _api(box, samples)
                return samples
            # Both see the same host: a login after every so many commands.
            async with ssh_server(client, box, load_settings(), Path(directory)) as words:
                await _ssh(words, Samples())
                for number in range(runs):
                    await _api(box, samples)
                    if number * logins // runs != (number + 1) * logins // runs:
                        await _ssh(words, samples)
    finally:
        await box.kill()
    return samples


@click.command("exec")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-n", "--runs", type=click.IntRange(1, 100_000), default=200, show_default=True, help="How many commands.")
@click.option("--logins", type=click.IntRange(0, 1000), default=10, show_default=True, help="How many SSH logins; 0: none.")
@click.argument("image", default="debian:12")
def exec_bench(as_json: bool, runs: int, logins: int, image: str) -> int:
    """Time `commands.run("true")` through the API against the agent's own work and a fresh SSH login to the same guest."""

    async def main() -> Samples:
        from stoker.client.client import AsyncClient

        async with AsyncClient() as client:
            return await _measure(client, image, runs, logins)

    samples = asyncio.run(main())
    api, agent, ssh = (percentile(values, 0.5) for values in (samples.api, samples.agent, samples.ssh))
    ratios = {"agent_exec": api / agent} if samples.api else {}
    if samples.ssh:
        ratios["ssh_per_exec"] = ssh / api
    more = {
        "agent_p50_ms": round(agent * 1000, 3) if samples.agent else None,
        "ssh_p50_ms": round(ssh * 1000, 1) if samples.ssh else None,
        "image": image,
    }
    Report("exec", samples.api, samples.failures, ratios, more).print(as_json)
    return 1 if samples.failures else 0
