"""``stoker bench files``: a big file into a sandbox and out again, and what the daemon's memory does meanwhile."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stoker.cli.bench.api import resident
from stoker.cli.bench.report import Report
from stoker.cli.options import SIZE
from stoker.errors import StokerError

if TYPE_CHECKING:
    from stoker.client.client import AsyncClient
    from stoker.client.sandbox import AsyncSandbox

__all__ = ["files"]

SMALL = 20


async def _small(box: AsyncSandbox) -> list[float]:
    """Seconds of writing and reading a small file."""
    seconds = []
    for number in range(SMALL):
        began = time.perf_counter()
        await box.files.write(f"/root/small-{number}", b"x" * 1000)
        await box.files.read(f"/root/small-{number}")
        seconds.append(time.perf_counter() - began)
    return seconds


async def _measure(client: AsyncClient, image: str, size: int) -> Report:
    from stoker.client.sandbox import AsyncSandbox

    pid = (await client.version()).pid if client.endpoint.socket is not None else 0
    box = await AsyncSandbox.create(image, disk=size + (2 << 30), client=client, lease=True)
    failures: list[str] = []
    more: dict[str, object] = {"size_mib": size >> 20, "image": image}
    seconds: list[float] = []
    try:
        seconds = await _small(box)
        with tempfile.TemporaryDirectory(prefix="stoker-bench-") as directory:
            source, back = Path(directory, "source"), Path(directory, "back")
            _fill(source, size)
            before = resident(pid) if pid else 0
            began = time.perf_counter()
            await box.files.upload(source, "/root/big")
            more["upload_mb_s"] = round(size / 1e6 / (time.perf_counter() - began), 1)
            began = time.perf_counter()
            await box.files.download("/root/big", back)
            more["download_mb_s"] = round(size / 1e6 / (time.perf_counter() - began), 1)
            if back.stat().st_size != size:
                failures.append("what came back has another size")
            if pid:
                more["daemon_grew_mib"] = round((resident(pid) - before) / 1024, 1)
    except StokerError as e:
        failures.append(e.message)
    finally:
        await box.kill()
    return Report("files", seconds, failures, {}, more)


def _fill(path: Path, size: int) -> None:
    """Random once, repeated: not compressible at a glance, and quick to make."""
    block = os.urandom(1 << 20)
    with open(path, "wb") as file:
        for _ in range(size >> 20):
            file.write(block)
        file.write(block[: size & ((1 << 20) - 1)])


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--size", type=SIZE, default="256M", show_default=True, help="Size of the big file.")
@click.argument("image", default="debian:12")
def files(as_json: bool, size: int, image: str) -> int:
    """Time small files, a big upload and a big download."""

    async def main() -> Report:
        from stoker.client.client import AsyncClient

        async with AsyncClient() as client:
            return await _measure(client, image, size)

    report = asyncio.run(main())
    report.print(as_json)
    return 1 if report.failures else 0
