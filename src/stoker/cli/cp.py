"""``stoker cp``: files and trees between this host and sandboxes, or from one sandbox into another."""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from stoker.cli.remote import SANDBOX_PATH, Following, with_client
from stoker.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from stoker.api.models import FileInfo
    from stoker.client.client import AsyncClient
    from stoker.client.files import AsyncFiles

__all__ = ["Place", "cp", "parse_place"]

_SANDBOX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Place:
    """A path, in a sandbox or (``sandbox`` None) on this host. ``contents``: of a directory, what is in it."""

    path: str
    sandbox: str | None = None

    @property
    def contents(self) -> bool:
        return self.path.endswith("/.") or self.path == "."

    @property
    def name(self) -> str:
        return posixpath.basename(os.path.abspath(self.path) if self.sandbox is None else posixpath.normpath(self.path))


def parse_place(word: str) -> Place:
    """``SANDBOX:PATH``, or a path of this host; ``./a:b`` is one too."""
    sandbox, colon, path = word.partition(":")
    if colon and _SANDBOX.fullmatch(sandbox):
        return Place(path or ".", sandbox)
    return Place(word)


def _files(client: AsyncClient, place: Place) -> AsyncFiles:
    from stoker.client.files import AsyncFiles

    assert place.sandbox is not None
    return AsyncFiles(client.api, place.sandbox)


async def _stat(client: AsyncClient, place: Place) -> FileInfo | None:
    try:
        return await _files(client, place).stat(place.path)
    except NotFound as e:
        if e.code != "file_not_found":
            raise
        return None


async def _target(client: AsyncClient, source: Place, place: Place, many: bool) -> str:
    """The path the copy gets: below a directory that is there, else the given one itself."""
    if place.sandbox is None:
        directory = os.path.isdir(place.path)
    else:
        info = await _stat(client, place)
        directory = info is not None and info.type == "directory"
    if many and not directory:
        raise InvalidRequest("not_directory", f"{place.path} is no directory, and several things go there")
    if not directory and place.path.endswith("/") and not await _is_directory(client, source):
        raise InvalidRequest("not_directory", f"{place.path} is no directory", "make it first, or leave out the last slash")
    if not directory or source.contents:
        return place.path
    return posixpath.join(place.path, source.name)


async def _is_directory(client: AsyncClient, place: Place) -> bool:
    if place.sandbox is None:
        return os.path.isdir(place.path)
    info = await _stat(client, place)
    return info is not None and info.type == "directory"


async def _copy(client: AsyncClient, source: Place, place: Place, many: bool, user: str | None, following: Following) -> None:
    from stoker.client.files import total_size

    if source.sandbox is None and place.sandbox is None:
        raise InvalidRequest("no_sandbox", "neither place is in a sandbox", "stoker cp SOURCE SANDBOX:PATH, or SANDBOX:PATH TARGET")
    if source.sandbox is None:
        if not os.path.lexists(source.path):
            raise NotFound("file_missing", f"there is no file {source.path}")
        target = await _target(client, source, place, many)
        report = following.bytes(source.name, total_size([source.path]))
        await _files(client, place).upload(source.path, target, user=user, on_progress=report)
        return
    info = await _files(client, source).stat(source.path)
    if place.sandbox is None:
        if place.path == "-":
            return await _to_stdout(client, source)
        target = await _target(client, source, place, many)
        report = following.bytes(source.name, info.size if info.type == "file" else None)
        await _files(client, source).download(source.path, target, user=user, on_progress=report)
        return
    target = await _target(client, source, place, many)
    if info.type == "directory":
        async with await _files(client, source).tar(source.path) as archive:
            await _files(client, place).untar(target, archive, user=user)
    else:
        async with await _files(client, source).read_stream(source.path) as content:
            await _files(client, place).write(target, content, user=user, mode=info.mode & 0o7777)


async def _to_stdout(client: AsyncClient, source: Place) -> None:
    from stoker.cli.streams import Writer

    with Writer(1) as out:
        async with await _files(client, source).read_stream(source.path) as content:
            async for piece in content:
                await out.write(piece)


@click.command()
@click.option("--user", "-u", metavar="U", help="Who owns and writes the files in the sandbox.  [default: its user]")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@click.argument("paths", nargs=-1, required=True, type=SANDBOX_PATH, metavar="SOURCE... TARGET")
def cp(*, user: str | None, quiet: bool, paths: tuple[str, ...]) -> None:
    """Copy files and trees: ./src web:/srv, web:/etc/hosts ., web:/a other:/b, web:/etc/os-release - .

    As with cp -r, a directory that is there gets a copy below it, otherwise the target is the copy. SOURCE/. is what is in SOURCE.
    """
    if len(paths) < 2:
        raise click.UsageError("name a source and a target")
    *sources, target = [parse_place(word) for word in paths]

    async def work(client: AsyncClient) -> None:
        with Following(quiet) as following:
            for source in sources:
                await _copy(client, source, target, len(sources) > 1, user, following)

    with_client(work)
