"""``stoker key``: API keys for those who come over TCP. Only over the daemon's own Unix socket."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from stoker.cli.options import SIZE
from stoker.cli.remote import each, json_option, with_client
from stoker.cli.table import Column, ago, show, show_json

if TYPE_CHECKING:
    from stoker.api.models import ApiKey, CreatedKey
    from stoker.client.client import AsyncClient

__all__ = ["key"]


@click.group()
def key() -> None:
    """Make, list and revoke API keys."""


@key.command("create")
@click.option("--sandboxes", type=click.IntRange(min=0), default=0, metavar="N", help="Most sandboxes.  [default: no bound]")
@click.option("--cpus", type=click.IntRange(min=0), default=0, metavar="N", help="Most CPUs together.  [default: no bound]")
@click.option("--memory", type=SIZE, default=0, help="Most memory together.  [default: no bound]")
@click.option("--disk", type=SIZE, default=0, help="Most disk together.  [default: no bound]")
@json_option
@click.argument("name", required=False, default="")
def create(*, sandboxes: int, cpus: int, memory: int, disk: int, as_json: bool, name: str) -> None:
    """Make a key and print its secret: this once, it is kept nowhere."""

    async def work(client: AsyncClient) -> CreatedKey:
        from stoker.api.models import Quota

        return await client.create_key(name, quota=Quota(sandboxes=sandboxes, cpus=cpus, memory=memory, disk=disk))

    made = with_client(work)
    if as_json:
        show_json(made)
        return
    click.echo(made.secret)
    if sys.stdout.isatty():
        click.echo(f"This is shown once. Use it as STOKER_API_KEY; revoke it with: stoker key revoke {made.key.id}", err=True)


COLUMNS: tuple[Column[ApiKey], ...] = (
    Column("ID", lambda k: k.id, full=True),
    Column("NAME", lambda k: k.name or "-"),
    Column("STATE", lambda k: "revoked" if k.revoked_at is not None else "valid", full=True),
    Column("AGE", lambda k: ago(k.created_at), right=True),
    Column("LAST USED", lambda k: ago(k.last_used_at), right=True),
)


@key.command("ls")
@json_option
def ls(*, as_json: bool) -> None:
    """List keys, revoked ones too, without their secrets."""

    async def work(client: AsyncClient) -> list[ApiKey]:
        return await client.keys()

    found = with_client(work)
    if as_json:
        show_json(found)
    else:
        show(COLUMNS, found, empty="no keys; make one: stoker key create NAME")


@key.command("revoke")
@click.argument("keys", nargs=-1, required=True)
def revoke(*, keys: tuple[str, ...]) -> int:
    """Make keys worthless, at once. Their sandboxes stay."""

    async def work(client: AsyncClient) -> int:
        return await each(keys, client.revoke_key)

    return with_client(work)
