"""Where the tests of storage work: a pool, a base, small file systems; and what is left of them on the host."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from leaks import wait_gone
from stoker.host import devicemapper, loop
from stoker.host.mounts import mount, mounted_at, umount
from stoker.storage import filesystem
from stoker.storage.pool import Pool
from stoker.storage.strategy import Base, Strategy

KIB, MIB = 1 << 10, 1 << 20
BASE = 4 * MIB


@dataclass(frozen=True)
class Place:
    """Where a test works: a pool's directory, a base outside it, room for other files."""

    strategy: Strategy
    directory: Path
    base: Base
    scratch: Path

    @contextmanager
    def pool(self) -> Iterator[Pool]:
        with closing(Pool.open(self.directory, self.strategy)) as pool:
            yield pool


def make_base(path: Path, size: int = BASE) -> Base:
    """An image with data, holes, and data at its very end."""
    with open(path, "wb") as file:
        file.write(os.urandom(300_000))
        file.seek(size // 2)
        file.write(b"middle" * 20_000)
        file.seek(size - 5000)
        file.write(os.urandom(5000))
    return Base(path, size)


@contextmanager
def file_system(image: Path, point: Path, size: int, kind: str) -> Iterator[None]:
    """A small one, mounted."""
    point.mkdir()
    if kind == "xfs":
        # In a thread of its own: this one may be running an event loop.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: asyncio.run(filesystem.make(image, max(size, filesystem.LEAST)))).result()
        filesystem.attach(image, point)
    else:
        with open(image, "wb") as file:
            file.truncate(size)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal", image], check=True, timeout=60)
        with loop.opened(image) as device:
            mount(device.path, point, "ext4")
    try:
        yield
    finally:
        if mounted_at(point) is not None:
            try:
                umount(point)
            except OSError:
                umount(point, lazily=True)  # the host is not to suffer from a test that failed
                raise


def free(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def fill(directory: Path, leave: int) -> None:
    """Takes all space but so many bytes."""
    fd = os.open(directory / "filler", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, 0)
        os.fsync(fd)
        length = 0
        for step in (MIB, 64 * KIB, 4 * KIB):
            while free(directory) > leave + step:
                try:
                    os.posix_fallocate(fd, length, step)
                except OSError as e:
                    if e.errno != errno.ENOSPC:
                        raise
                    break
                length += step
    finally:
        os.close(fd)


def left_over(place: Place) -> list[str]:
    """What the kernel and the pool's directory still have of any disk."""
    root = str(place.directory)
    found = [f"loop {number}: {name}" for number, name in loop.listed() if name.startswith((f"{root}/", str(place.base.path)))]
    if devicemapper.CONTROL.exists() or Path("/sys/class/misc/device-mapper").exists():
        prefix = f"stoker-{os.readlink(place.directory / 'id')}-"
        names = (path.read_text().strip() for path in Path("/sys/block").glob("dm-*/dm/name"))
        found += [f"device {name}" for name in names if name.startswith(prefix)]
    for part in ("clones", "layers"):
        found += [str(path) for path in (place.directory / part).rglob("*")]
    found += [str(path) for path in (place.directory / "bases").glob("*/refs/*")]
    return found


def left(place: Place) -> list[str]:
    """The same, after a while for what is on its way out: udev may be looking at a loop device, which goes with its last user."""
    return wait_gone(lambda: left_over(place))


@contextmanager
def a_place(strategy: Strategy, root: Path) -> Iterator[Place]:
    """Below ``root``; all disks are removed at the end, and nothing of them may be left."""
    directory = root / "pool"
    with ExitStack() as stack:
        if strategy is Strategy.REFLINK:
            stack.enter_context(file_system(root / "pool.xfs", directory, 0, "xfs"))
        else:
            directory.mkdir()
        found = Place(strategy, directory, make_base(root / "base.img"), root)
        yield found
        with found.pool() as pool:
            for name in pool.names():
                pool.remove(name)
            pool.collect()
        assert left(found) == []
        assert list((directory / "bases").iterdir()) == []
