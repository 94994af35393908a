"""``stoker fsck`` and ``stoker gc``: what differs from the books, and what nothing refers to."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from stoker.cli.remote import json_option, with_client
from stoker.cli.table import Column, clean, show, show_json

if TYPE_CHECKING:
    from stoker.api.models import Difference, Freed, FsckReport, GcReport
    from stoker.client.client import AsyncClient

__all__ = ["fsck", "gc"]

DIFFERENCES = 1
"""The exit code for a host that is not as the books have it."""


def _outcome(difference: Difference) -> str:
    if difference.error:
        return f"not mended: {difference.error}"
    if difference.repaired:
        return f"mended: {difference.repair}"
    return f"--repair: {difference.repair}" if difference.repair else "nothing mends it by itself"


def _lines(report: FsckReport) -> str:
    lines = [
        f"{one.kind} {one.name}\n  expected {one.expected}\n  found    {one.found}\n  {_outcome(one)}\n"
        for one in report.differences
    ]
    left = sum(not one.repaired for one in report.differences)
    looked = ", ".join(f"{number} {kind}" for kind, number in sorted(report.checked.items()))
    lines.append(f"{len(report.differences)} differences, {left} left (looked at: {looked or 'nothing'})\n")
    lines += [f"not looked at, something is being done to it: {name}\n" for name in report.busy]
    return "".join(clean(line) + "\n" for text in lines for line in text.splitlines())


@click.command()
@click.option("--repair", is_flag=True, help="Mend what differs.")
@click.option("--offline", is_flag=True, help="Without the daemon, when it cannot start.")
@json_option
def fsck(*, repair: bool, offline: bool, as_json: bool) -> int:
    """Compare the books with the host: processes, directories, disks, cgroups, the store, the database.

    Names every difference exactly. Exits with 0 when nothing differs (any more), with 1 when something does.
    """
    if offline:
        from stoker.engine.fsck.check import check_offline
        from stoker.settings import load_settings

        report = asyncio.run(check_offline(load_settings(), repair=repair))
    else:

        async def work(client: AsyncClient) -> FsckReport:
            return await client.fsck(repair=repair)

        report = with_client(work)
    if as_json:
        show_json(report)
    else:
        click.echo(_lines(report), nl=False)
    return 0 if report.clean else DIFFERENCES


def _size(value: int) -> str:
    from stoker.api.units import format_size

    return format_size(value)


FREED: tuple[Column[Freed], ...] = (
    Column("KIND", lambda f: f.kind, full=True),
    Column("NAME", lambda f: f.name[:40]),
    Column("FREED", lambda f: "-" if f.error else _size(f.bytes), right=True),
    Column("WHY", lambda f: f"not removed: {f.error}" if f.error else f.why),
)


@click.command()
@click.option("--dry-run", "-n", is_flag=True, help="Only say what would go.")
@json_option
def gc(*, dry_run: bool, as_json: bool) -> int:
    """Free what nothing refers to: superseded images and kernels, leftovers, caches beyond their bounds, old backups.

    What a sandbox uses stays, and what a name leads to.
    """

    async def work(client: AsyncClient) -> GcReport:
        return await client.gc(dry_run=dry_run)

    report = with_client(work)
    if as_json:
        show_json(report)
    else:
        show(FREED, report.items)
        for text in report.skipped:
            click.echo(f"left alone: {text}", err=True)
        parts = ", ".join(f"{kind} {_size(size)}" for kind, size in sorted(report.by_kind.items()))
        click.echo(f"{'would free' if dry_run else 'freed'} {_size(report.freed)}{f' ({parts})' if parts else ''}", err=True)
    return 1 if any(item.error for item in report.items) else 0
