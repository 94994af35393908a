"""``stoker volume``: file systems that outlive sandboxes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stoker.cli.mounts import VOLUME
from stoker.cli.options import SIZE
from stoker.cli.remote import Following, each, json_option, with_client
from stoker.cli.table import Column, ago, show, show_json

if TYPE_CHECKING:
    from stoker.api.models import Volume
    from stoker.client.client import AsyncClient

__all__ = ["volume"]


@click.group()
def volume() -> None:
    """Make, list, copy and remove volumes: file systems that outlive sandboxes.

    A volume is mounted by stoker run -v NAME:/path IMAGE (or NAME:/path:ro), and create likewise.
    """


def _size(value: int) -> str:
    from stoker.api.units import format_size

    return format_size(value)


COLUMNS: tuple[Column[Volume], ...] = (
    Column("NAME", lambda v: v.name, full=True),
    Column("SIZE", lambda v: _size(v.size), right=True),
    Column("USED", lambda v: _size(v.used), right=True),
    Column("AGE", lambda v: ago(v.created_at), right=True),
    Column("USERS", lambda v: ",".join(f"{u.name}{':ro' if u.read_only else ''}" for u in v.users) or "-"),
)


def _said(made: Volume, as_json: bool) -> None:
    if as_json:
        show_json(made)
    else:
        click.echo(made.name)


@volume.command("create")
@click.option("--size", "-s", type=SIZE, default="1G", show_default=True, help="What it can hold.")
@json_option
@click.argument("name")
def create(*, size: int, as_json: bool, name: str) -> None:
    """Make an empty volume. It takes the room of what is in it."""

    async def work(client: AsyncClient) -> Volume:
        return await client.volumes.create(name, size=size)

    _said(with_client(work), as_json)


@volume.command("ls")
@click.option("--quiet", "-q", is_flag=True, help="Names only.")
@json_option
def ls(*, quiet: bool, as_json: bool) -> None:
    """List volumes, newest first."""

    async def work(client: AsyncClient) -> list[Volume]:
        return await client.volumes.list()

    found = with_client(work)
    if as_json:
        show_json(found)
    elif quiet:
        click.echo("".join(f"{one.name}\n" for one in found), nl=False)
    else:
        show(COLUMNS, found, empty="no volumes; make one: stoker volume create NAME")


@volume.command("inspect")
@click.argument("volumes", nargs=-1, required=True, type=VOLUME)
def inspect(*, volumes: tuple[str, ...]) -> int:
    """Print all that is known of volumes, their users too, as a JSON array."""
    found: dict[str, Volume] = {}

    async def work(client: AsyncClient) -> int:
        async def one(name: str) -> None:
            found[name] = await client.volumes.get(name)

        return await each(volumes, one)

    code = with_client(work)
    show_json([found[name] for name in dict.fromkeys(volumes) if name in found])
    return code


@volume.command("resize")
@json_option
@click.argument("name", metavar="VOLUME", type=VOLUME)
@click.argument("size", type=SIZE)
def resize(*, as_json: bool, name: str, size: int) -> None:
    """Make a volume larger.

    The sandbox that has it to write to may be running: the file system grows along. A volume that sandboxes only read is refused.
    """

    async def work(client: AsyncClient) -> Volume:
        return await client.volumes.resize(name, size)

    _said(with_client(work), as_json)


@volume.command("rm")
@click.option("--force", "-f", is_flag=True, help="No error for what is not there.")
@click.argument("volumes", nargs=-1, required=True, type=VOLUME)
def rm(*, force: bool, volumes: tuple[str, ...]) -> int:
    """Remove volumes and all that is in them."""
    from stoker.errors import NotFound

    async def work(client: AsyncClient) -> int:
        async def one(name: str) -> None:
            try:
                await client.volumes.remove(name)
                click.echo(name)
            except NotFound:
                if not force:
                    raise

        return await each(volumes, one)

    return with_client(work)


@volume.command("import")
@click.option("--size", "-s", type=SIZE, help="What it can hold.  [default: twice a directory, 10G of a tar]")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@json_option
@click.argument("name")
@click.argument("source", metavar="DIRECTORY|TAR|-")
def import_(*, size: int | None, quiet: bool, as_json: bool, name: str, source: str) -> None:
    """Make a volume with the content of a directory or a tar (or tar.gz); '-' is standard input.

    Owners, modes, links, times, extended attributes and holes are kept.
    """

    async def work(client: AsyncClient) -> Volume:
        with Following(quiet) as following:
            report = following.bytes(f"filling {name}", None)
            if source != "-" and os.path.isdir(source):
                return await client.volumes.import_directory(name, source, size=size, on_progress=report)
            with sys.stdin.buffer if source == "-" else open(source, "rb") as file:
                more: dict[str, Any] = {} if size is None else {"size": size}
                return await client.volumes.import_tar(name, _plain(file), on_progress=report, **more)

    from stoker.errors import InvalidRequest

    if source != "-" and not os.path.exists(source):
        raise InvalidRequest("file_missing", f"there is no {source}", "a directory, a tar or -")
    _said(with_client(work), as_json)


def _plain(file: Any) -> Any:
    """A tar that is packed is unpacked on the way."""
    import gzip
    import io

    reader = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)
    return gzip.GzipFile(fileobj=reader) if reader.peek(2)[:2] == b"\x1f\x8b" else reader


@volume.command("export")
@click.option(
    "--raw",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The ext4 file system itself, as a sparse file; '-': to standard output.",
)
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@click.argument("name", metavar="VOLUME", type=VOLUME)
@click.argument("target", metavar="TAR|-", required=False)
def export(*, raw: Path | None, quiet: bool, name: str, target: str | None) -> None:
    """Write a volume's content as a tar, to standard output unless TAR is given.

    Owners, modes, links, times, extended attributes and holes are kept. A volume that somebody writes to is refused.
    """
    from stoker.errors import InvalidRequest

    if raw is not None and target is not None:
        raise click.UsageError("a tar, or --raw FILE, not both")
    piped = raw == Path("-") or (raw is None and target in (None, "-"))
    if piped and sys.stdout.isatty():
        what = "a tar" if raw is None else "a file system"
        raise InvalidRequest("terminal", f"{what} is not for a terminal", f"stoker volume export {name} > FILE")

    async def work(client: AsyncClient) -> None:
        from stoker.client.archive import save
        from stoker.client.files import counted

        with Following(quiet) as following:
            report = following.bytes(f"copying {name}", None)
            if raw is not None and not piped:
                return await client.volumes.export_raw(name, raw, on_progress=report)
            volumes = client.volumes
            async with await (volumes.export_tar(name) if raw is None else volumes.read_raw(name)) as pieces:
                if not piped:
                    assert target is not None
                    return await save(counted(pieces, report), target, 0o600)
                async for piece in counted(pieces, report):
                    sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()

    with_client(work)
