"""The store: everything that is fetched or built once and then only read.

::

    data_dir/
      kernels/DIGEST/   vmlinux, modules/ (the content of lib/modules/RELEASE), config, manifest.json, SUMS, SEAL
      kernels/names/NAME        the digest a name stands for
      images/DIGEST/    rootfs.ext4, manifest.json, SUMS, SEAL
      images/names/NAME
      cache/            what can be made again at any time: initramfs/, apt/SUITE/
      staging/XXXX/     what is being made right now
      locks/KEY         one file per thing that must not be made twice at once

SUMS is what ``sha256sum`` writes and checks; the manifest holds SUMS' digest, and DIGEST is the manifest's own SHA-256. So a
digest stands for every byte below it, and :meth:`Store.verify` finds any that changed. SEAL holds the identity (inode, size, times)
that the entry's main file had when its content was last known to be right: while it fits, nothing is hashed again.

What a crash leaves behind:

* An entry appears by renaming a complete and synced directory out of ``staging``: it is whole or not there. Names are written
  beside their place, synced and renamed, after the entry they point to.
* Whoever makes a staging directory holds a lock on the directory itself for as long as it and the tools it started live (they
  inherit the descriptor). A staging directory whose lock is free is garbage, whatever is in it: :meth:`Store.sweep`, which
  every fetch and build begins with, removes it. Files of other owners (a build in a user namespace) are removed by the same means.
* ``cache/apt`` is kept on purpose: apt goes on with a partial download, and the package is hashed before it is used.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from stoker.errors import HostError, InvalidRequest, NotFound
from stoker.host.durable import sync_directory, sync_filesystem, write_atomically
from stoker.host.files import mounts_below, remove_tree, tree_sums
from stoker.host.lock import hold_directory, locked
from stoker.host.mounts import umount
from stoker.images.progress import NullProgress, Progress
from stoker.settings import Settings

__all__ = ["Manifest", "Stage", "Store", "described", "no_space", "translate_errors"]

log = logging.getLogger(__name__)
ELSEWHERE = ".elsewhere"
OWN = frozenset({"manifest.json", "SUMS", "SEAL"})
MAIN = {"kernels": "vmlinux", "images": "rootfs.ext4"}
VERSION = 1
"""Of the entries' layout and facts: an entry of another version counts as none, and is made again."""
FULL = (errno.ENOSPC, errno.EDQUOT)


class Manifest(msgspec.Struct, frozen=True):
    """What an entry is: ``kind`` (kernels or images), the name it was made for, facts of that kind, and the digest of SUMS."""

    kind: str
    name: str
    facts: dict[str, Any]
    sums: str
    version: int = VERSION


_DECODER = msgspec.json.Decoder(Manifest)


@dataclass(frozen=True, slots=True)
class Stage:
    """A staging directory and the descriptor of its lock (to be inherited by tools that write there)."""

    path: Path
    lock_fd: int

    def elsewhere(self, directory: Path) -> None:
        """Writes down a directory outside the store that belongs to this stage, *before* it is made."""
        with open(self.path / ELSEWHERE, "a") as file:
            file.write(f"{directory}\n")


class Store:
    """The directories of one ``data_dir``. Reading costs a few system calls; making anything takes a lock."""

    def __init__(self, settings: Settings) -> None:
        self.root = settings.data_dir.absolute()

    # ---- reading

    def entry(self, kind: str, digest: str) -> Path:
        return self.root / kind / digest

    def lookup(self, kind: str, name: str) -> tuple[str, Manifest] | None:
        """The digest and manifest a name (or a full digest) stands for, or None when it is not in the store.

        Raises ``image_corrupt`` for an entry that cannot be read.
        """
        digest = name
        try:
            if not _is_digest(name):
                digest = (self.root / kind / "names" / name).read_text().strip()
            manifest = _DECODER.decode((self.root / kind / digest / "manifest.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except msgspec.DecodeError as e:
            raise self._corrupt(kind, digest, [f"manifest.json cannot be read: {e}"]) from None
        except PermissionError as e:
            raise _unusable(e, self.root) from None
        return (digest, manifest) if manifest.version == VERSION else None

    def names(self, kind: str) -> dict[str, str]:
        """All names of a kind and their digests."""
        try:
            files = sorted((self.root / kind / "names").iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {file.name: file.read_text().strip() for file in files if not file.name.startswith(".")}

    def verify(self, kind: str, digest: str) -> list[str]:
        """Reads every byte of an entry; returns what is wrong with it, one line each (empty: intact)."""
        place = self.entry(kind, digest)
        if not place.is_dir():
            raise NotFound("image_unknown", f"{kind}/{digest} is not in the store")
        return self._damage(place, digest)

    def untouched(self, kind: str, digest: str) -> bool:
        """Whether nobody touched the entry's main file since its content was last known to be right."""
        place = self.entry(kind, digest)
        seal = _seal(place / MAIN[kind])
        try:
            return bool(seal) and (place / "SEAL").read_text() == seal
        except (FileNotFoundError, UnicodeDecodeError):
            return False

    async def require_intact(self, kind: str, digest: str, progress: Progress | None = None) -> None:
        """Raises ``image_corrupt`` if the entry's main file has been touched and any byte of the entry is not as it was made."""
        place = self.entry(kind, digest)
        seal = _seal(place / MAIN[kind])
        if self.untouched(kind, digest):
            return
        step = f"checking {place}, which has been touched"
        (progress or NullProgress()).step(step, None, None)
        if damage := await asyncio.to_thread(self.verify, kind, digest):
            raise self._corrupt(kind, digest, damage)
        try:
            write_atomically(place / "SEAL", seal.encode())
        except OSError as e:
            log.debug("%s cannot be sealed: %s", place, e)  # another user's store: it is checked each time

    def _corrupt(self, kind: str, digest: str, damage: list[str]) -> HostError:
        place = self.entry(kind, digest)
        more = f" and {len(damage) - 1} more" if len(damage) > 1 else ""
        hint = f"rm -rf {place}; the next run makes it again"
        return HostError("image_corrupt", f"{place} is damaged: {damage[0]}{more}", hint, details={"damage": damage[:50]})

    def _damage(self, place: Path, digest: str) -> list[str]:
        try:
            data = (place / "manifest.json").read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                return ["manifest.json has changed"]
            sums = (place / "SUMS").read_bytes()
            if hashlib.sha256(sums).hexdigest() != _DECODER.decode(data).sums:
                return ["SUMS has changed"]
            found = dict(tree_sums(place, without=OWN))
        except (OSError, msgspec.DecodeError) as e:
            return [f"it cannot be read: {e}"]
        wanted = {line[66:]: line[:64] for line in sums.decode().splitlines()}
        return [
            *(f"{file} is missing" for file in wanted if file not in found),
            *(f"{file} has changed" for file in wanted if found.get(file, wanted[file]) != wanted[file]),
            *(f"{file} does not belong there" for file in found if file not in wanted),
        ]

    # ---- making

    def directory(self, *parts: str) -> Path:
        """A directory of the store, made if need be; whatever the umask, an unprivileged VMM has to read its kernel here."""
        path = self.root.joinpath(*parts)
        if path.is_dir():
            return path
        try:
            if not self.root.is_dir():
                self.root.mkdir(parents=True, exist_ok=True)
                self.root.chmod(0o711)
            missing = [place for place in (path, *path.parents) if self.root in place.parents and not place.is_dir()]
            for place in reversed(missing):
                place.mkdir(exist_ok=True)
                place.chmod(0o755)
        except OSError as e:
            raise (no_space(self.root, "a directory") if e.errno in FULL else _unusable(e, path)) from None
        return path

    @asynccontextmanager
    async def lock(
        self, key: str, progress: Progress | None = None, waiting: str = "waiting for another run"
    ) -> AsyncIterator[None]:
        """Holds the lock of one thing; ``waiting`` is reported if another run is at it."""
        told = progress or NullProgress()
        path = self.directory("locks") / key
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise _unusable(PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)), path)
        async with locked(path, lambda: told.step(waiting, None, None)):
            yield

    @asynccontextmanager
    async def stage(self) -> AsyncIterator[Stage]:
        """A new directory for something that is being made; what is still in it at the end is removed."""
        parent = self.directory("staging")
        while True:
            path = parent / os.urandom(6).hex()
            path.mkdir()
            path.chmod(0o755)  # a build in a user namespace is another user
            if (fd := hold_directory(path)) is not None:
                break  # else a sweeper was quicker than our lock
        try:
            yield Stage(path, fd)
        finally:
            try:
                # A second cancellation ends our waiting, not the removal; what it leaves is the next sweep's.
                await asyncio.shield(asyncio.ensure_future(_remove_garbage(path)))
            finally:
                os.close(fd)

    async def sweep(self) -> None:
        """Removes what runs that were killed left in ``staging``."""
        for path in self.staged():
            await self.discard(path)

    def staged(self) -> list[Path]:
        """Every staging directory, with an owner or without."""
        try:
            return sorted((self.root / "staging").iterdir())
        except FileNotFoundError:
            return []

    async def discard(self, path: Path) -> bool:
        """Removes a staging directory and what it wrote down, unless its owner lives. True: nothing is left of it."""
        if (fd := hold_directory(path)) is None:
            return not os.path.lexists(path)
        try:
            await _remove_garbage(path)
        finally:
            os.close(fd)
        return not os.path.lexists(path)

    def publish(self, stage: Stage, tree: Path, kind: str, name: str, facts: dict[str, Any]) -> str:
        """Makes ``tree`` (inside the stage) an entry of the store and returns its digest. Names are left to the caller."""
        return self._publish(stage, tree, kind, *described(kind, name, facts, tree_sums(tree, without=OWN)))

    def publish_as(self, stage: Stage, tree: Path, data: bytes) -> str:
        """The same with a manifest that came along: ``digest_mismatch`` (InvalidRequest) when it is not that of just this."""
        manifest = _DECODER.decode(data)
        sums, _, _ = described(manifest.kind, manifest.name, manifest.facts, tree_sums(tree, without=OWN))
        if hashlib.sha256(sums).hexdigest() != manifest.sums:
            raise InvalidRequest("digest_mismatch", "the content is not what its manifest says")
        return self._publish(stage, tree, manifest.kind, sums, data, hashlib.sha256(data).hexdigest())

    def _publish(self, stage: Stage, tree: Path, kind: str, sums: bytes, data: bytes, digest: str) -> str:
        (tree / "SUMS").write_bytes(sums)
        (tree / "manifest.json").write_bytes(data)
        (tree / "SEAL").write_text(_seal(tree / MAIN[kind]))
        os.chmod(tree, 0o755)
        sync_filesystem(tree)
        place = self.directory(kind) / digest
        if place.exists():
            if not self._damage(place, digest):
                return digest
            os.rename(place, stage.path / f"damaged-{os.urandom(4).hex()}")  # goes with the stage
        try:
            os.rename(tree, place)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return digest  # another run, by another name, was at just the same content
        sync_directory(place.parent)
        return digest

    def point(self, kind: str, name: str, digest: str) -> None:
        """Makes a name stand for a digest."""
        write_atomically(self.directory(kind, "names") / name, f"{digest}\n".encode())

    def require_space(self, size: int, what: str) -> None:
        """Refuses to begin what cannot end: ``size`` bytes must be free where the store is."""
        status = os.statvfs(self.directory())
        free = status.f_bavail * status.f_frsize
        if free < size:
            raise no_space(self.root, what, size, free)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Around whatever fills the store: a full disk, met by us or by a tool, becomes ``no_space``."""
        with translate_errors(self.root, what):
            yield


def described(kind: str, name: str, facts: dict[str, Any], files: list[tuple[str, str]]) -> tuple[bytes, bytes, str]:
    """SUMS, the manifest and the digest of an entry with these files (name and SHA-256, sorted by name)."""
    sums = "".join(f"{digest}  {file}\n" for file, digest in files).encode()
    manifest = Manifest(kind, name, facts, hashlib.sha256(sums).hexdigest())
    data = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2)
    return sums, data, hashlib.sha256(data).hexdigest()


@contextmanager
def translate_errors(root: Path, what: str) -> Iterator[None]:
    """A full disk becomes ``no_space``, a directory that is not ours ``data_dir_refused``."""
    try:
        yield
    except PermissionError as e:
        raise _unusable(e, root) from e
    except OSError as e:
        if e.errno not in FULL:
            raise
        raise no_space(root, what) from e
    except HostError as e:
        told = " ".join(e.details.get("stderr", ())) + e.message
        if e.code in ("tool_failed", "fetch_failed") and ("No space left" in told or "Disk quota exceeded" in told):
            raise no_space(root, what) from e
        raise


def no_space(root: Path, what: str, needed: int = 0, free: int = 0) -> HostError:
    """The error for a full disk; with figures when it was found out beforehand."""
    figures = f": it needs {needed >> 20} MiB and {free >> 20} MiB are free" if needed else ""
    return HostError("no_space", f"no space on {root} for {what}{figures}", f"df -h {root}; or set STOKER_DATA_DIR to another disk")


def _unusable(e: OSError, path: Path) -> HostError:
    hint = "set STOKER_DATA_DIR to a directory of yours"
    return HostError("data_dir_refused", f"{e.filename or path} cannot be used: {e.strerror}", hint)


def _seal(path: Path) -> str:
    """What changes with every write to a file; empty if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ""
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\n"


def _is_digest(name: str) -> bool:
    return len(name) == 64 and all(c in "0123456789abcdef" for c in name)


async def _remove_garbage(path: Path) -> None:
    """Removes a stage and the directories it wrote down; a user namespace may own what is in them."""
    listed = path / ELSEWHERE
    trees = [Path(line) for line in listed.read_text().splitlines() if line] if listed.is_file() else []
    for tree in (*trees, path):
        if not os.path.lexists(tree):
            continue
        try:
            for mount in mounts_below(tree):
                umount(mount, lazily=True)  # a build that was killed where it could have no mount namespace of its own
            await asyncio.to_thread(remove_tree, tree)
        except PermissionError:
            from stoker.images.bootstrap import remove_foreign_tree

            await remove_foreign_tree(tree)
        except OSError as e:
            log.warning("%s cannot be removed: %s", tree, e)
            continue
        if os.path.lexists(tree):
            log.warning("%s could not be removed", tree)
