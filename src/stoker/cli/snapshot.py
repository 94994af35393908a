"""``stoker snapshot``: what sandboxes were at a moment."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from stoker.cli.remote import SANDBOX, Following, each, json_option, with_client
from stoker.cli.table import Column, ago, show, show_json

if TYPE_CHECKING:
    from stoker.api.models import Snapshot
    from stoker.client.client import AsyncClient

__all__ = ["snapshot"]


def _size(value: int) -> str:
    from stoker.api.units import format_size

    return format_size(value)


COLUMNS: tuple[Column[Snapshot], ...] = (
    Column("NAME", lambda s: s.name or "-"),
    Column("ID", lambda s: s.id, full=True),
    Column("IMAGE", lambda s: s.image),
    Column("KIND", lambda s: "memory" if s.memory else "disk"),
    Column("OWN", lambda s: _size(s.own), right=True),
    Column("SHARED", lambda s: _size(s.shared), right=True),
    Column("AGE", lambda s: ago(s.created_at), right=True),
    Column("TAGS", lambda s: ",".join(s.tags)),
)


@click.group()
def snapshot() -> None:
    """Keep what sandboxes are at a moment, and start others from it: stoker create --from SNAPSHOT."""


@snapshot.command("create")
@click.option("--name", "-n", metavar="NAME", help="A name, unique among yours.")
@click.option("--tag", "-t", "tags", metavar="TAG", multiple=True, help="A word of your own about it.")
@click.option("--disk-only", is_flag=True, help="Leave memory and processes out; a copy boots.")
@click.option("--compact", is_flag=True, help="Leave out memory that the guest does not use. Takes it a moment.")
@json_option
@click.argument("sandbox", type=SANDBOX)
def create(*, name: str | None, tags: tuple[str, ...], disk_only: bool, compact: bool, as_json: bool, sandbox: str) -> None:
    """Keep what a sandbox is now: disk, memory, processes. It goes on."""

    async def work(client: AsyncClient) -> Snapshot:
        from stoker.client.sandbox import AsyncSandbox

        box = await AsyncSandbox.connect(sandbox, client=client)
        return await box.snapshot(name, tags=tags, memory=not disk_only, compact=compact)

    made = with_client(work)
    if as_json:
        show_json(made)
    else:
        click.echo(made.name or made.id)


@snapshot.command("ls")
@click.option("--quiet", "-q", is_flag=True, help="Ids only.")
@json_option
def ls(*, quiet: bool, as_json: bool) -> None:
    """List snapshots, newest first."""

    async def work(client: AsyncClient) -> list[Snapshot]:
        return await client.snapshots()

    found = with_client(work)
    if as_json:
        show_json(found)
    elif quiet:
        click.echo("".join(f"{one.id}\n" for one in found), nl=False)
    else:
        show(COLUMNS, found, empty="no snapshots; make one: stoker snapshot create SANDBOX")


def lineage(found: list[Snapshot]) -> list[str]:
    """One line for each snapshot, below the one it came after; oldest first."""
    known = {one.id for one in found}
    below: dict[str | None, list[Snapshot]] = {}
    for one in sorted(found, key=lambda one: one.created_at):
        below.setdefault(one.parent if one.parent in known else None, []).append(one)
    lines = []

    def add(parent: str | None, indent: str) -> None:
        rows = below.get(parent, [])
        for number, one in enumerate(rows):
            last = number + 1 == len(rows)
            mark, more = ("", "") if parent is None else ("└ ", "  ") if last else ("├ ", "│ ")
            lines.append(f"{indent}{mark}{one.name or one.id}  own {_size(one.own)}, shared {_size(one.shared)}")
            add(one.id, indent + more)

    add(None, "")
    return lines


@snapshot.command("tree")
def tree() -> None:
    """Show which snapshot came after which, with what each has of its own and what it shares."""

    async def work(client: AsyncClient) -> list[Snapshot]:
        return await client.snapshots()

    click.echo("".join(f"{line}\n" for line in lineage(with_client(work))), nl=False)


@snapshot.command("inspect")
@click.argument("snapshots", nargs=-1, required=True)
def inspect(*, snapshots: tuple[str, ...]) -> int:
    """Print all that is known of snapshots, as a JSON array."""
    found: dict[str, Snapshot] = {}

    async def work(client: AsyncClient) -> int:
        async def one(name: str) -> None:
            found[name] = await client.snapshot(name)

        return await each(snapshots, one)

    code = with_client(work)
    show_json([found[name] for name in dict.fromkeys(snapshots) if name in found])
    return code


@snapshot.command("rm")
@click.option("--force", "-f", is_flag=True, help="No error for what is not there.")
@click.argument("snapshots", nargs=-1, required=True)
def rm(*, force: bool, snapshots: tuple[str, ...]) -> int:
    """Remove snapshots. What was started from them stays."""
    from stoker.errors import NotFound

    async def work(client: AsyncClient) -> int:
        async def one(name: str) -> None:
            try:
                await client.remove_snapshot(name)
                click.echo(name)
            except NotFound:
                if not force:
                    raise

        return await each(snapshots, one)

    return with_client(work)


@snapshot.command("export")
@click.option("--no-image", is_flag=True, help="Leave the image out: for a host that has the same one.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@click.argument("name", metavar="SNAPSHOT")
@click.argument("file", metavar="FILE|-")
def export(*, no_image: bool, quiet: bool, name: str, file: str) -> None:
    """Write a snapshot into one file for another host: disk, memory, processes, and the image; '-' is standard output."""
    from stoker.errors import InvalidRequest

    if file == "-" and sys.stdout.isatty():
        raise InvalidRequest("terminal", "a snapshot is not for a terminal", f"stoker snapshot export {name} - > FILE")

    async def work(client: AsyncClient) -> None:
        from stoker.client.files import counted

        with Following(quiet) as following:
            report = following.bytes(f"copying {name}", None)
            if file != "-":
                return await client.export_snapshot(name, file, image=not no_image, on_progress=report)
            async with await client.read_snapshot(name, image=not no_image) as pieces:
                async for piece in counted(pieces, report):
                    sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()

    with_client(work)


@snapshot.command("import")
@click.option("--name", "-n", metavar="NAME", help="A name, unique among yours.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@json_option
@click.argument("file", metavar="FILE|-")
def import_(*, name: str | None, quiet: bool, as_json: bool, file: str) -> None:
    """Make a snapshot out of a file that another host exported; '-' is standard input.

    Its digests are checked before it is there. Take files from hosts you trust: memory goes on running.
    """

    async def work(client: AsyncClient) -> Snapshot:
        with Following(quiet) as following, sys.stdin.buffer if file == "-" else open(file, "rb") as source:
            return await client.import_snapshot(source, name=name, on_progress=following.bytes("reading", None))

    from stoker.errors import InvalidRequest

    if file != "-" and not os.path.isfile(file):
        raise InvalidRequest("file_missing", f"there is no file {file}", "stoker snapshot export SNAPSHOT FILE makes one")
    made = with_client(work)
    if as_json:
        return show_json(made)
    label = made.name or made.id
    click.echo(label)
    if made.unfit:
        click.echo(f"its memory is of no use here: {made.unfit}; stoker create --cold --from {label} boots from its disk", err=True)


@snapshot.command("prune")
def prune() -> None:
    """Remove the snapshots that have neither a name nor a tag."""

    async def work(client: AsyncClient) -> list[Snapshot]:
        return await client.prune_snapshots()

    click.echo("".join(f"{one.id}\n" for one in with_client(work)), nl=False)
