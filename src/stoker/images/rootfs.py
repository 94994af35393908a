"""Root file systems: what an image argument stands for, as an ext4 file that is only ever read.

``debian:12`` (or ``base:debian:12``) is a minimal Debian, built once from the distribution's packages; ``ext4:PATH`` is a ready
file of the user's. Whatever a machine writes goes into an overlay of its own.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import HostError, InvalidRequest, NotFound
from stoker.images.progress import NullProgress, Progress
from stoker.images.store import Store
from stoker.settings import Settings

__all__ = ["RootFilesystem", "resolve_image"]

KIND = "images"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_SIZE = 64 << 40


@dataclass(frozen=True, slots=True)
class RootFilesystem:
    """A root file system and what an image says of how to run in it. ``path`` is a raw file, ``size`` its length in bytes."""

    path: Path
    size: int
    digest: str
    name: str
    fstype: str = "ext4"
    env: tuple[tuple[str, str], ...] = (("PATH", PATH),)
    user: str = "root"
    workdir: str = "/"
    command: tuple[str, ...] = ("/bin/bash",)


async def resolve_image(
    reference: str, settings: Settings, progress: Progress | None = None, *, refresh: bool = False
) -> RootFilesystem:
    """The root file system for ``debian:SUITE``, ``base:debian:SUITE`` or ``ext4:PATH``; built if need be.

    ``refresh`` builds anew although there is one. Raises :class:`NotFound` (``image_unknown``) without asking the network,
    :class:`InvalidRequest` (``image_invalid``), and :class:`HostError` (``tool_missing``, ``no_space``, ``fetch_failed``...).
    """
    if reference.startswith("ext4:"):
        return _open_ext4(reference)
    base = reference.removeprefix("base:")
    if not base.startswith("debian:"):
        from stoker.images.suites import known_references

        raise NotFound("image_unknown", f"there is no image {reference!r}", f"{known_references()}, and ext4:PATH")
    store, version, told = Store(settings), base.removeprefix("debian:"), progress or NullProgress()
    if not refresh and version.isalnum():
        from stoker.images.suites import SUITES

        if (found := await _stored(store, f"debian-{SUITES.get(version, version)}", reference, told)) is not None:
            return found
    return await _build(store, settings, version, reference, told, refresh)


async def _stored(store: Store, pointer: str, reference: str, progress: Progress) -> RootFilesystem | None:
    found = store.lookup(KIND, pointer)
    if found is None:
        return None
    digest, manifest = found
    await store.require_intact(KIND, digest, progress)
    return RootFilesystem(store.entry(KIND, digest) / "rootfs.ext4", manifest.facts["size"], digest, reference)


async def _build(
    store: Store, settings: Settings, version: str, reference: str, progress: Progress, refresh: bool
) -> RootFilesystem:
    import asyncio

    from stoker.images import bootstrap
    from stoker.images.suites import parse_suite

    suite = parse_suite(version, "image_unknown", "image")
    pointer = f"debian-{suite}"
    async with store.lock(f"image-{pointer}", progress, f"another run is building {reference}"):
        if not refresh and (found := await _stored(store, pointer, reference, progress)) is not None:
            return found  # the other run was at just this
        await store.sweep()
        store.require_space(bootstrap.BUILD_SPACE, f"building {reference}")
        with store.writing(f"building {reference}"):
            async with store.stage() as stage:
                archive = await bootstrap.bootstrap(suite, settings, stage, progress)
                tree = stage.path / "image"
                tree.mkdir()
                plan = await bootstrap.make_ext4(archive, stage, tree / "rootfs.ext4", progress)
                facts = {"size": plan.size, "suite": suite, "fstype": "ext4"}
                step = "storing the root file system"
                progress.step(step, 0, 1)
                digest = await asyncio.to_thread(store.publish, stage, tree, KIND, f"debian:{suite}", facts)
                progress.step(step, 1, 1)
        store.point(KIND, pointer, digest)
    found = await _stored(store, pointer, reference, progress)
    if found is None:
        raise HostError("image_corrupt", f"{store.entry(KIND, digest)} vanished right after it was made", "try again")
    return found


def _open_ext4(reference: str) -> RootFilesystem:
    from stoker.host.ext4 import read_superblock

    path = Path(reference.removeprefix("ext4:"))
    hint = "give the path of a raw ext4 file: ext4:PATH (mke2fs -t ext4 -d DIR FILE SIZE makes one)"
    if not str(path) or str(path) == ".":
        raise InvalidRequest("image_invalid", "ext4: without a path", hint)
    try:
        # O_NONBLOCK: a FIFO in place of a file must not hold us.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound("image_unknown", f"there is no file {path}", hint) from None
    except OSError as e:
        raise InvalidRequest("image_invalid", f"{path}: {e.strerror}", hint) from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidRequest("image_invalid", f"{path} is not a regular file", hint)
        superblock = read_superblock(fd)
    finally:
        os.close(fd)
    if superblock is None:
        raise InvalidRequest("image_invalid", f"{path} holds no ext4 file system", hint)
    if superblock.size > found.st_size:
        why = f"its file system covers {superblock.size} bytes, the file has {found.st_size}"
        raise InvalidRequest("image_invalid", f"{path} is truncated: {why}", "copy it again, or e2fsck -f it")
    if found.st_size > MAX_SIZE:
        raise InvalidRequest("image_invalid", f"{path} is larger than {MAX_SIZE >> 40} TiB", hint)
    real = path.resolve()
    identity = f"{real}|{found.st_dev}|{found.st_ino}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}"
    return RootFilesystem(real, found.st_size, hashlib.sha256(identity.encode()).hexdigest(), reference)
