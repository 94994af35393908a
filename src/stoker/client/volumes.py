"""Volumes and app archives, from a program."""

from __future__ import annotations

import builtins
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator
from typing import IO

from stoker.api.codec import decode_answer
from stoker.api.models import AppInfo, CreateVolume, ResizeVolume, Volume, VolumePage
from stoker.api.units import parse_size
from stoker.client.api import Api, path
from stoker.client.data import chunks
from stoker.client.feed import AsyncFeed, bytes_feed
from stoker.client.files import OnBytes, counted
from stoker.client.results import Data
from stoker.errors import InvalidRequest, NotFound

__all__ = ["AsyncVolumes", "upload_app"]

STALL = 600.0
ROOM = 64 << 20


class AsyncVolumes:
    """``client.volumes``: file systems that outlive sandboxes. A volume is named by its name or its id."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def create(self, name: str, *, size: str | int = "1G") -> Volume:
        """Makes an empty volume. It takes the room of what is in it, up to ``size``."""
        return await self._api.call("POST", path("volumes"), Volume, body=CreateVolume(name=name, size=parse_size(size)))

    async def list(self) -> builtins.list[Volume]:
        """All of one's volumes, newest first."""
        items: list[Volume] = []
        cursor: str | None = None
        while True:
            page = await self._api.call("GET", path("volumes"), VolumePage, query={"limit": 500, "cursor": cursor})
            items.extend(page.items)
            cursor = page.next
            if cursor is None:
                return items

    async def get(self, volume: str) -> Volume:
        """One volume as it is now, with its users."""
        return await self._api.call("GET", path("volumes", volume), Volume)

    async def resize(self, volume: str, size: str | int) -> Volume:
        """Makes it larger, also while a running sandbox writes to it: the file system grows along. One that is read is refused."""
        body = ResizeVolume(size=parse_size(size))
        return await self._api.call("POST", path("volumes", volume, "resize"), Volume, body=body)

    async def remove(self, volume: str) -> None:
        """Removes it and all that is in it. :class:`Conflict` (``volume_in_use``) names its users."""
        await self._api.send("DELETE", path("volumes", volume))

    async def import_tar(self, name: str, data: Data, *, size: str | int = "10G", on_progress: OnBytes | None = None) -> Volume:
        """Makes a volume with the content of a tar: whole, or not at all."""
        pieces = counted(chunks(data), on_progress)
        query: dict[str, object] = {"size": parse_size(size)}
        async with self._api.stream("PUT", path("volumes", name, "tar"), query=query, body=pieces, timeout=None) as stream:
            return decode_answer(await stream.read(), Volume)

    async def import_directory(
        self, name: str, source: str | os.PathLike[str], *, size: str | int | None = None, on_progress: OnBytes | None = None
    ) -> Volume:
        """Makes a volume with a directory's contents: owners, modes, links, times, extended attributes and holes are kept.

        ``size``: twice what is in the directory, at least 1 GiB, unless given.
        """
        from stoker.client.archive import pack, packed_size

        if size is None:
            size = max(1 << 30, 2 * packed_size(source) + ROOM)
        return await self.import_tar(name, pack(source, exact=True), size=size, on_progress=on_progress)

    async def export_tar(self, volume: str) -> AsyncFeed[bytes]:
        """Its content as a tar: owners, modes, links, times, extended attributes and holes are kept."""
        feed, _ = await bytes_feed(self._api.stream("GET", path("volumes", volume, "tar"), timeout=300.0, idle=STALL))
        return feed

    async def export_raw(self, volume: str, destination: str | os.PathLike[str], *, on_progress: OnBytes | None = None) -> None:
        """Its ext4 file system as a raw, sparse file: there whole or not at all."""
        from stoker.client.archive import save

        async with await self.read_raw(volume) as pieces:
            await save(counted(pieces, on_progress), destination, 0o600, sparse=True)

    async def read_raw(self, volume: str) -> AsyncFeed[bytes]:
        """Its ext4 file system, as bytes."""
        feed, _ = await bytes_feed(self._api.stream("GET", path("volumes", volume, "raw"), idle=STALL))
        return feed


async def upload_app(api: Api, source: str | os.PathLike[str]) -> str:
    """Sees to it that the daemon has an app archive (a zip, tar or tar.gz) or a directory, and gives its SHA-256.

    One that is there already is not sent again.
    """
    with tempfile.TemporaryFile() as packed:
        if os.path.isdir(source):
            from stoker.client.archive import pack

            async for piece in pack(source):
                packed.write(piece)
            packed.seek(0)
            return await _upload(api, packed)
    try:
        with open(source, "rb") as file:
            return await _upload(api, file)
    except OSError as e:
        raise InvalidRequest("bad_app", f"{os.fspath(source)}: {e.strerror}", "a zip, tar, tar.gz or a directory") from None


async def _upload(api: Api, file: IO[bytes]) -> str:
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    try:
        await api.call("GET", path("apps", digest), AppInfo)
    except NotFound:
        file.seek(0)
        body: AsyncIterator[bytes] = chunks(file)
        async with api.stream("PUT", path("apps", digest), body=body, timeout=None) as stream:
            await stream.read()
    return digest
