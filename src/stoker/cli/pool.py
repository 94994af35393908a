"""``stoker pool``: where the disks of sandboxes are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stoker.cli.options import SIZE
from stoker.cli.remote import each, json_option, with_client
from stoker.cli.table import Column, show, show_json

if TYPE_CHECKING:
    from stoker.api.models import Pool
    from stoker.client.client import AsyncClient

__all__ = ["pool"]


def _size(value: int) -> str:
    from stoker.api.units import format_size

    return format_size(value)


def _name(pool: Pool) -> str:
    return pool.name or "directory"


COLUMNS: tuple[Column[Pool], ...] = (
    Column("NAME", lambda p: _name(p) + (" *" if p.default else ""), full=True),
    Column("STRATEGY", lambda p: p.strategy or "-"),
    Column("DISKS", lambda p: str(p.disks), right=True),
    Column("FREE", lambda p: _size(p.free), right=True),
    Column("TOTAL", lambda p: _size(p.total), right=True),
    Column("PATH", lambda p: p.error or p.path, full=True),
)


@click.group()
def pool() -> None:
    """Make, list and remove pools: where the disks of sandboxes are.

    New disks go to the one marked with a star. "directory" is the data directory itself.
    """


@pool.command("create")
@click.option("--size", "-s", type=SIZE, required=True, help="What it can hold, such as 50G. It takes the room of what is in it.")
@json_option
@click.argument("name", default="main")
def create(*, size: int, as_json: bool, name: str) -> None:
    """Make a pool with a file system (XFS) of its own, whose files share blocks."""

    async def work(client: AsyncClient) -> Pool:
        return await client.create_pool(name, size=size)

    made = with_client(work)
    if as_json:
        show_json(made)
    else:
        click.echo(made.name)


@pool.command("ls")
@json_option
def ls(*, as_json: bool) -> None:
    """List pools."""

    async def work(client: AsyncClient) -> list[Pool]:
        return await client.pools()

    found = with_client(work)
    if as_json:
        show_json(found)
    else:
        show(COLUMNS, found, empty="no pools")


@pool.command("inspect")
@click.argument("name", default="main")
def inspect(*, name: str) -> None:
    """Print all that is known of a pool, and what a clone costs there by each strategy."""

    async def work(client: AsyncClient) -> Pool:
        return await client.pool(name)

    show_json(with_client(work))


@pool.command("rm")
@click.argument("names", nargs=-1, required=True)
def rm(*, names: tuple[str, ...]) -> int:
    """Remove pools that no disk is in."""

    async def work(client: AsyncClient) -> int:
        return await each(names, client.remove_pool)

    return with_client(work)
