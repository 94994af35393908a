"""App archives as read-only ext4 images, addressed by the SHA-256 of the archive and made once.

::

    DATA_DIR/apps/DIGEST/app.ext4, facts.json    an archive's content: raw, sparse, never written to once it is here
    DATA_DIR/apps/staging/XXXX/                  what is being made (``archive``, ``tree/``); locked by who makes it
    DATA_DIR/apps/locks/DIGEST                   so that two at once make one
    DATA_DIR/apps/disks/SANDBOX.qcow2            the overlay of one sandbox (the engine's ledger knows it)

An image appears by renaming a complete and synced directory out of ``staging``. A staging directory whose lock is free is garbage,
which :func:`sweep_apps` removes. Its files get owners and modes by one offline edit, so no set-id program is ever one here.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec

from stoker.errors import InvalidRequest, TooLarge
from stoker.host.durable import sync_directory, sync_filesystem
from stoker.host.ext4 import measure, mke2fs_command, plan_size
from stoker.host.ext4_edit import Change, apply
from stoker.host.files import remove_tree
from stoker.host.lock import hold_directory, locked
from stoker.host.run import run
from stoker.storage.app_archive import Bounds, Entry, unpack
from stoker.storage.layout import no_space

__all__ = ["AppFacts", "app_image", "discard_app", "find_app", "make_app", "prepare_apps", "sweep_apps", "unused_apps", "use_app"]

FREE: Final = 1 << 30
"""What a guest can write into /app besides what is there. The file is sparse: it takes no room."""
MAX_ARCHIVE: Final = 8 << 30
_KINDS: Final = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "link": stat.S_IFLNK}


class AppFacts(msgspec.Struct, frozen=True):
    """What is known of an image: entries, and bytes in its files."""

    entries: int
    bytes: int


def app_image(data_dir: Path, digest: str) -> Path:
    return data_dir / "apps" / digest / "app.ext4"


def prepare_apps(data_dir: Path) -> None:
    """The directories."""
    for path in (data_dir / "apps", *(data_dir / "apps" / name for name in ("staging", "locks", "disks"))):
        path.mkdir(mode=0o711, exist_ok=True)


def find_app(data_dir: Path, digest: str) -> AppFacts | None:
    """The facts of an image that is there."""
    try:
        return msgspec.json.decode((data_dir / "apps" / digest / "facts.json").read_bytes(), type=AppFacts)
    except FileNotFoundError:
        return None


def use_app(data_dir: Path, digest: str) -> AppFacts | None:
    """The same, and notes that it was asked for just now."""
    facts = find_app(data_dir, digest)
    if facts is not None:
        os.utime(data_dir / "apps" / digest / "facts.json")
    return facts


def unused_apps(data_dir: Path, seconds: float) -> list[Path]:
    """Images that nobody has asked for in so long."""
    before = time.time() - seconds
    return sorted(path.parent for path in (data_dir / "apps").glob("*/facts.json") if path.stat().st_mtime < before)


def discard_app(data_dir: Path, digest: str) -> None:
    """Removes an image: away at once, by its name; what a crash leaves of it is the sweep's."""
    gone = data_dir / "apps" / "staging" / f"{digest}.{os.urandom(4).hex()}"
    try:
        os.rename(data_dir / "apps" / digest, gone)
    except FileNotFoundError:
        return
    remove_tree(gone)


def sweep_apps(data_dir: Path) -> None:
    """Removes what makers that were killed have left."""
    for path in list((data_dir / "apps" / "staging").iterdir()):
        if (fd := hold_directory(path)) is not None:
            try:
                remove_tree(path)
            finally:
                os.close(fd)


class _Stage:
    """A staging directory of ours, held by its lock."""

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / "apps" / "staging" / os.urandom(8).hex()
        # 0700: what is unpacked here is for nobody else to look at, or to run.
        self.path.mkdir(0o700)
        fd = hold_directory(self.path)
        if fd is None:
            raise FileExistsError(str(self.path))
        self.fd = fd

    def remove(self) -> None:
        try:
            remove_tree(self.path)
        finally:
            os.close(self.fd)


async def make_app(data_dir: Path, digest: str, source: AsyncIterator[bytes], bounds: Bounds | None = None) -> AppFacts:
    """Takes an archive in and makes its image, unless it is there already. ``source`` is read to its end in any case.

    Raises ``digest_mismatch`` and ``bad_archive``; then nothing is left.
    """
    stage = await asyncio.to_thread(_Stage, data_dir)
    try:
        with no_space():
            await _receive(stage.path / "archive", digest, source)
        async with locked(data_dir / "apps" / "locks" / digest):
            if (facts := use_app(data_dir, digest)) is not None:
                return facts
            with no_space():
                facts = await _build(stage, bounds)
            await asyncio.to_thread(_publish, stage.path / "image", data_dir / "apps" / digest)
            return facts
    finally:
        # A second cancellation ends our waiting, not the removal; what it leaves is the next sweep's.
        await asyncio.shield(asyncio.to_thread(stage.remove))


async def _receive(place: Path, digest: str, source: AsyncIterator[bytes]) -> None:
    sums, size = hashlib.sha256(), 0
    with open(place, "xb") as file:
        async for piece in source:
            size += len(piece)
            if size > MAX_ARCHIVE:
                raise TooLarge("bad_archive", f"the archive has more than {MAX_ARCHIVE} bytes")
            sums.update(piece)
            await asyncio.to_thread(file.write, piece)
    if sums.hexdigest() != digest:
        raise InvalidRequest(
            "digest_mismatch", f"the archive's SHA-256 is {sums.hexdigest()}, not {digest}", "upload it again, by its own checksum"
        )


async def _build(stage: _Stage, bounds: Bounds | None) -> AppFacts:
    tree, image, scratch = (stage.path / name for name in ("tree", "image", "scratch"))
    for path in (tree, image, scratch):
        path.mkdir(0o700)
    tree.chmod(0o755)  # the image's top is made like it
    entries = await asyncio.to_thread(unpack, stage.path / "archive", tree, bounds)
    (stage.path / "archive").unlink()
    blocks, inodes = await asyncio.to_thread(measure, tree)
    plan = plan_size(blocks, inodes, FREE)
    place = image / "app.ext4"
    await run(mke2fs_command(tree, place, plan, str(uuid.uuid4()), "app", lazy=True), pass_fds=(stage.fd,))
    await run(["debugfs", "-w", "-R", "rmdir lost+found", place], pass_fds=(stage.fd,))
    await apply(place, [_change(entry) for entry in entries if entry.kind != "same"], scratch, pass_fds=(stage.fd,))
    facts = AppFacts(len(entries), sum(entry.size for entry in entries))
    (image / "facts.json").write_bytes(msgspec.json.encode(facts))
    place.chmod(0o444)
    image.chmod(0o711)
    return facts


def _change(entry: Entry) -> Change:
    return Change(b"/" + os.fsencode(entry.path), uid=0, gid=0, mode=_KINDS[entry.kind] | entry.mode, mtime=entry.mtime)


def _publish(image: Path, place: Path) -> None:
    sync_filesystem(image)
    os.rename(image, place)
    sync_directory(place.parent)
