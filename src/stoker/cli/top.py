"""``stoker top``: what the sandboxes use, now and again."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from stoker.cli.options import DURATION
from stoker.cli.remote import SANDBOX, json_option, with_client
from stoker.cli.table import Column, ago, render_table, show, show_json
from stoker.cli.terminal import is_terminal, size
from stoker.errors import StokerError

if TYPE_CHECKING:
    from stoker.api.models import Metrics, MetricsSample, Sandbox
    from stoker.client.client import AsyncClient

__all__ = ["top"]

ALIVE = ("running", "frozen")


@dataclass(frozen=True, slots=True)
class Row:
    """A sandbox and its last two samples: figures, and how fast they grow."""

    sandbox: Sandbox
    last: MetricsSample | None = None
    before: MetricsSample | None = None

    def rate(self, name: str) -> str:
        if self.last is None or self.before is None or self.last.at <= self.before.at:
            return "-"
        new, old = getattr(self.last, name), getattr(self.before, name)
        return "-" if new is None or old is None else _size(max(0, new - old) / (self.last.at - self.before.at)) + "/s"

    def value(self, name: str) -> str:
        found = None if self.last is None else getattr(self.last, name)
        return "-" if found is None else _size(found)


def _size(value: float) -> str:
    from stoker.api.units import format_size

    return format_size(int(value))


COLUMNS: tuple[Column[Row], ...] = (
    Column("NAME", lambda r: r.sandbox.name or r.sandbox.id),
    Column("STATE", lambda r: r.sandbox.state.value, full=True),
    Column("CPU%", lambda r: "-" if r.last is None else f"{r.last.cpu_percent:.0f}", right=True),
    Column("MEM", lambda r: r.value("memory_guest_used"), right=True),
    Column("OF", lambda r: _size(r.sandbox.resources.memory), right=True),
    Column("HOST MEM", lambda r: r.value("memory_host"), right=True),
    Column("DISK", lambda r: r.value("disk_host"), right=True),
    Column("READ", lambda r: r.rate("disk_read"), right=True),
    Column("WRITE", lambda r: r.rate("disk_written"), right=True),
    Column("RECV", lambda r: r.rate("network_received"), right=True),
    Column("SEND", lambda r: r.rate("network_sent"), right=True),
    Column("AGE", lambda r: ago(r.sandbox.started_at or r.sandbox.created_at), right=True),
)


async def _row(client: AsyncClient, info: Sandbox) -> Row:
    from stoker.client.sandbox import AsyncSandbox

    try:
        metrics: Metrics = await AsyncSandbox(client, info).metrics(window=5.0)
    except StokerError:
        return Row(info)  # it ended between the list and this
    samples = metrics.samples
    return Row(info, samples[-1] if samples else None, samples[-3] if len(samples) >= 3 else samples[0] if samples else None)


async def _rows(client: AsyncClient, wanted: tuple[str, ...]) -> list[Row]:
    found = [s for s in await client.sandboxes(states=ALIVE) if not wanted or s.id in wanted or (s.name or "") in wanted]
    rows = await asyncio.gather(*(_row(client, info) for info in found))
    return sorted(rows, key=lambda row: -(row.last.cpu_percent if row.last else 0.0))


def _draw(rows: list[Row]) -> None:
    height, width = size()
    text = render_table(COLUMNS, rows[: max(1, height - 2)], width, colour=True)
    sys.stdout.write("\033[H" + text.replace("\n", "\033[K\n") + "\033[J")
    sys.stdout.flush()


@click.command()
@click.option("--interval", "-d", type=DURATION, default="1s", show_default=True, metavar="T", help="Time between two looks.")
@click.option("--once", "-1", is_flag=True, help="Print once and end; so it does in a pipe.")
@json_option
@click.argument("sandboxes", nargs=-1, type=SANDBOX)
def top(*, interval: float, once: bool, as_json: bool, sandboxes: tuple[str, ...]) -> None:
    """Show what sandboxes use: CPU (of one: 200 is two busy ones), memory, disk and network. Ctrl-C ends it."""

    async def work(client: AsyncClient) -> None:
        if as_json or once or not is_terminal(1):
            rows = await _rows(client, sandboxes)
            if as_json:
                show_json([{"sandbox": row.sandbox.id, "name": row.sandbox.name, "sample": row.last} for row in rows])
            else:
                show(COLUMNS, rows, empty="no sandbox runs")
            return
        sys.stdout.write("\033[?1049h\033[?25l")
        try:
            while True:
                _draw(await _rows(client, sandboxes))
                await asyncio.sleep(interval)
        finally:
            sys.stdout.write("\033[?25h\033[?1049l")
            sys.stdout.flush()

    with_client(work)
