"""``stoker bench clone``: what a disk costs by each strategy: to make, to use, to keep many of, to flatten."""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stoker.cli.bench.report import Report, percentile
from stoker.cli.options import SIZE
from stoker.errors import HostError, StokerError

if TYPE_CHECKING:
    from stoker.storage.pool import Pool
    from stoker.storage.strategy import Base, Clone

__all__ = ["clone"]

MIB = 1 << 20
READ = 200 * MIB
USED, MANY = 50, 1000


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _make_base(path: Path, size: int) -> None:
    """Data all over: a copy has to copy every block of it."""
    block = os.urandom(4 * MIB)
    with open(path, "wb") as file:
        for index in range(0, size, len(block)):
            file.write(index.to_bytes(8, "big") + block[8:])
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, size: int = READ) -> None:
    with open(path, "rb", buffering=0) as file:
        while size > 0 and (data := file.read(min(size, MIB))):
            size -= len(data)


def _drop(*paths: Path) -> None:
    """Takes files out of the page cache."""
    for path in paths:
        if path.is_file():
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _use(clone: Clone) -> None:
    """Reads what a guest would: what the clone has not got itself comes from the file below."""
    _read(clone.backing[-1] if clone.backing else clone.path)


def _cached(path: Path) -> int:
    """Bytes of what :func:`_use` reads of a file that are in the page cache."""
    import ctypes
    import mmap

    with open(path, "rb") as file:
        size = min(READ, os.fstat(file.fileno()).st_size)
        with mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as area:
            pages = -(-size // mmap.PAGESIZE)
            found = (ctypes.c_ubyte * pages)()
            start = ctypes.c_char.from_buffer(area)
            ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), found)
            del start
        return sum(byte & 1 for byte in bytes(found)) * mmap.PAGESIZE


@contextmanager
def _place(strategy: str, root: Path, size: int) -> Iterator[Path]:
    """A directory for a pool; for reflinks a file system of its own where this one has none."""
    from stoker.host.mounts import umount
    from stoker.host.reflink import shares
    from stoker.storage import filesystem

    place = root / f"pool-{strategy}"
    place.mkdir()
    if strategy != "reflink" or shares(root):
        yield place
        return
    asyncio.run(filesystem.make(root / "pool.xfs", 3 * size + filesystem.LEAST))
    filesystem.attach(root / "pool.xfs", place)
    try:
        yield place
    finally:
        umount(place)


def _cp(how: str, source: Path, target: Path) -> None:
    from stoker.host.run import run

    done = asyncio.run(run(["cp", how, source, target], timeout=3600))
    if done.code != 0:
        raise HostError("cp_failed", f"cp: {done.stderr.decode(errors='replace').strip()}")


def _copy(base: Path, target: Path) -> float:
    seconds = _timed(lambda: _cp("--reflink=never", base, target))
    target.unlink()
    return seconds


def _strategy(pool: Pool, base: Base, root: Path, runs: int, many: int) -> tuple[list[float], dict[str, Any]]:
    from stoker.storage.strategy import Strategy

    copies = pool.strategy is Strategy.COPY
    found: dict[str, Any] = {}
    pool.clone(base, "first")  # brings the base into the pool, where that is needed; not counted
    runs = min(runs, 3) if copies else runs
    seconds = [_timed(lambda number=number: pool.clone(base, f"run{number}")) for number in range(runs)]  # type: ignore[misc]
    _read(base.path)
    warm = statistics.median(_timed(lambda: _read(base.path)) for _ in range(3))
    trials = [_timed(lambda number=number: _use(pool.clone(base, f"used{number}"))) for number in range(5)]  # type: ignore[misc]
    used = statistics.median(trials)
    found["used_over_reading_the_base"] = round(used / warm, 2)
    found["used_ms"] = round(used * 1000, 1)
    if not copies:
        found.update(_memory(pool, base))
        found.update(_crowd(pool, base, many))
    source = pool.open_clone("used0")
    flat, other = root / "flat", root / "flat-cp"
    # Both read from the disk.
    _drop(source.path, *source.backing)
    taken = _timed(lambda: pool.flatten(source.name, flat))
    _drop(flat)
    cp = _timed(lambda: _cp("--sparse=always", flat, other))
    found["flatten_s"], found["cp_sparse_s"] = round(taken, 2), round(cp, 2)
    found["flatten_speed_of_cp_sparse"] = round(cp / taken, 2)
    flat.unlink()
    other.unlink()
    for name in pool.names():
        pool.remove(name)
    pool.collect()
    return seconds, found


def _memory(pool: Pool, base: Base) -> dict[str, Any]:
    """The page cache that so many used clones hold, over that of one."""
    clones = []
    for number in range(USED):
        clones.append(pool.clone(base, f"mem{number}"))
        _use(clones[-1])
    one, files = min(READ, base.size), {(made.backing[-1] if made.backing else made.path) for made in clones}
    held = sum(_cached(path) for path in files if not path.is_block_device())
    return {"memory_of_50_over_one": round(held / one, 2)}


def _crowd(pool: Pool, base: Base, many: int) -> dict[str, Any]:
    before = pool.space().free
    taken = [_timed(lambda number=number: pool.clone(base, f"crowd{number}")) for number in range(many)]  # type: ignore[misc]
    os.sync()
    size, tenth = max(0, before - pool.space().free), max(1, many // 10)
    first, last = statistics.median(taken[:tenth]), statistics.median(taken[-tenth:])
    allocated = os.stat(base.path).st_blocks * 512
    return {
        "crowd": many,
        "crowd_percent_of_base": round(100 * size / allocated, 2),
        "crowd_last_over_first": round(last / first, 2),
    }


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each strategy.")
@click.option("-n", "--runs", type=click.IntRange(1, 10000), default=200, show_default=True, help="Clones that are timed.")
@click.option("--size", type=SIZE, default="4G", show_default=True, help="Size of the image.")
@click.option("--many", type=click.IntRange(10, 100000), default=MANY, show_default=True, help="Clones of one base at once.")
@click.option("--strategy", multiple=True, help="Only this one (qcow2, dm-snapshot, reflink, copy); may be repeated.")
@click.option(
    "--directory", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Where.  [default: the data directory]"
)
def clone(*, as_json: bool, runs: int, size: int, many: int, strategy: tuple[str, ...], directory: Path | None) -> int:
    """Time clones of an image by each strategy, against `cp` of the same file in the same run."""
    from stoker.settings import load_settings
    from stoker.storage.pool import Pool
    from stoker.storage.strategy import Base, Strategy

    wanted = [Strategy(name) for name in strategy] or list(Strategy)
    parent = directory or load_settings().data_dir
    parent.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    failed = 0
    try:
        base = Base(root / "base.img", size)
        _make_base(base.path, size)
        copy = _copy(base.path, root / "copy")
        for one in wanted:
            more: Mapping[str, Any] = {"cp_s": round(copy, 2)}
            try:
                with ExitStack() as stack:
                    place = stack.enter_context(_place(one.value, root, size))
                    pool = stack.enter_context(closing(Pool.open(place, one)))
                    seconds, found = _strategy(pool, base, root, runs, many)
            except StokerError as error:
                failed += 1
                Report(f"clone {one.value}", [], [error.message], {}, more).print(as_json)
                continue
            ratios = {"faster than cp --reflink=never": copy / percentile(seconds, 0.5)}
            Report(f"clone {one.value}", seconds, [], ratios, {**more, **found}).print(as_json)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return 1 if failed == len(wanted) else 0
