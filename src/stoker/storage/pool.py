"""A pool: one directory with the disks of sandboxes, one process that works in it, one strategy for new disks.

The strategy is chosen when the pool is first opened, by making and using a small clone with each candidate in turn, and can be
overridden; disks made before keep theirs. Whoever opens a pool finds it put right: what a crash left half made is gone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stoker.errors import CapacityExhausted, Conflict, HostError, InvalidRequest, StokerError
from stoker.host import devicemapper
from stoker.host.files import allocated
from stoker.host.lock import try_flock
from stoker.storage.compose import Piece
from stoker.storage.copied import Copied
from stoker.storage.layout import LAYER, Layout, no_space
from stoker.storage.qcow2 import Qcow2
from stoker.storage.reflink import Reflink
from stoker.storage.snapshot_device import SnapshotDevices
from stoker.storage.strategy import Base, Clone, CloneStrategy, Strategy, Thing, Usage

__all__ = ["Pool", "Space", "Trial", "Unused", "prefer"]

FOR_QCOW2: Final = (Strategy.QCOW2, Strategy.REFLINK, Strategy.COPY)
FOR_RAW: Final = (Strategy.DM_SNAPSHOT, Strategy.REFLINK, Strategy.COPY)
"""In the order of preference: what shares the base's page cache first."""
SLOW: Final = 20.0
"""A candidate that takes so many times as long as the quickest is passed over."""
PROBE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes of the file system that a pool is in."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Unused:
    """A base that no disk stands on. ``current``: its image is what it was, so that it is known again with the next disk of it."""

    key: str
    current: bool
    bytes: int


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of a small clone: seconds until it was made, opened and removed, or why it could not be."""

    strategy: Strategy
    seconds: float
    error: str = ""
    full: bool = False
    """It was for want of space."""


def prefer(trials: Sequence[Trial]) -> Strategy:
    """The first that works and is not far slower than another. ``trials`` are in the order of preference."""
    works = [trial for trial in trials if not trial.error]
    if not works:
        raise HostError("pool_unusable", "no disk can be made: " + "; ".join(f"{t.strategy}: {t.error}" for t in trials))
    quickest = min(trial.seconds for trial in works)
    return next(trial.strategy for trial in works if trial.seconds <= quickest * SLOW or trial.strategy is works[-1].strategy)


class Pool:
    """Made by :meth:`open`; :meth:`close` lets go of it and leaves everything as it is."""

    def __init__(self, directory: Path, lock: int) -> None:
        self.directory = directory
        self._lock = lock
        self._layout = layout = Layout.make(directory)
        self._devices = SnapshotDevices(layout)
        self._qcow2 = Qcow2(layout)
        self._by_strategy: dict[Strategy, CloneStrategy] = {
            Strategy.QCOW2: self._qcow2,
            Strategy.DM_SNAPSHOT: self._devices,
            Strategy.REFLINK: Reflink(layout),
            Strategy.COPY: Copied(layout),
        }
        self.strategy = Strategy.COPY
        self._guard = threading.Lock()
        self._coming = 0
        """Clones that are being made: the bases they are to stand on may have no reference yet."""

    @classmethod
    def open(cls, directory: Path, strategy: Strategy | None = None, *, raw: bool = False, who: str = "stoker") -> Pool:
        """Opens the pool in an existing directory; an empty one becomes a pool.

        ``raw``: for virtual machines that open no qcow2. ``who`` is told to whoever comes second (``pool_in_use``, Conflict).
        Errors: ``pool_missing``, ``pool_unusable`` (HostError), ``strategy_unsupported`` (InvalidRequest).
        """
        lock = _take(directory, who)
        try:
            with no_space():
                pool = cls(directory, lock)
            pool.sweep()
            pool.strategy = pool._choose(strategy, raw)
        except BaseException:
            os.close(lock)
            raise
        return pool

    def _choose(self, wanted: Strategy | None, raw: bool) -> Strategy:
        chosen = self._layout.chosen()
        if chosen is not None and (wanted is chosen or (wanted is None and chosen in (FOR_RAW if raw else FOR_QCOW2))):
            return chosen
        found = self._try_all(wanted, raw)
        with no_space():
            self._layout.choose(found)
        return found

    def _try_all(self, wanted: Strategy | None, raw: bool) -> Strategy:
        if wanted is not None:
            trial = self._tried(wanted)
            if trial.error:
                hint = "another pool_strategy, or none: then the best that works here is taken"
                raise InvalidRequest("strategy_unsupported", f"{wanted} does not work in {self.directory}: {trial.error}", hint)
            return wanted
        trials = []
        for strategy in FOR_RAW if raw else FOR_QCOW2:
            trials.append(self._tried(strategy))
            if not raw and not trials[-1].error:
                break  # an overlay is not slower than a copy of anything
        return prefer(trials)

    def _tried(self, strategy: Strategy) -> Trial:
        """The same as :meth:`trial`. That there is no room says nothing of a strategy: ``no_space``."""
        trial = self.trial(strategy)
        if trial.full:
            raise CapacityExhausted("no_space", f"in {self.directory} no disk can be made: {trial.error}", "make room there")
        return trial

    def trial(self, strategy: Strategy) -> Trial:
        """Makes, opens and removes a small clone."""
        base, name = self.directory / ".probe", f"probe-{strategy.value}"
        began = time.perf_counter()
        try:
            if strategy is Strategy.DM_SNAPSHOT and devicemapper.available("snapshot") is None:
                return Trial(strategy, 0.0, "this kernel has no dm-snapshot, or it may not be used")
            with no_space():
                fd = os.open(base, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                try:
                    os.pwrite(fd, os.urandom(4096), 0)
                    os.ftruncate(fd, PROBE_BYTES)
                finally:
                    os.close(fd)
            disks = self._by_strategy[strategy]
            disks.remove(name)  # of a trial that was killed
            began = time.perf_counter()
            clone = disks.clone(Base(base, PROBE_BYTES), name, 0)
            with open(clone.path, "rb") as file:
                file.read(1)
            disks.remove(name)
            return Trial(strategy, time.perf_counter() - began)
        except (StokerError, OSError) as error:
            message = error.message if isinstance(error, StokerError) else str(error)
            return Trial(strategy, 0.0, message, full=isinstance(error, CapacityExhausted) and error.code == "no_space")
        finally:
            for key in self._layout.keys():
                if self._layout.image_of(key) == base:
                    self._layout.drop_base(key)
            base.unlink(missing_ok=True)

    def close(self) -> None:
        """Another process may open it now. Disks, and the devices of those that are open, stay."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def sweep(self) -> None:
        """Removes what a crash left: parts of disks, their devices, references of what is gone."""
        for name in self._layout.half_made():
            for thing in self.things(name):
                if thing.kind == "device":
                    devicemapper.remove(thing.name)
        self._layout.sweep()
        self._devices.sweep()

    # -- disks --------------------------------------------------------------------------------------------------------

    def _of(self, name: str) -> CloneStrategy:
        self._layout.check()
        return self._by_strategy[self._layout.record(name).strategy]

    def clone(self, base: Base, name: str, size: int = 0) -> Clone:
        """A new disk that begins as ``base``, of ``size`` bytes (0: the base's)."""
        with self._guard:
            self._coming += 1
        try:
            return self._by_strategy[self.strategy].clone(base, name, size)
        finally:
            with self._guard:
                self._coming -= 1

    def clone_of(self, name: str, new: str) -> Clone:
        return self._of(name).clone_of(name, new)

    def _layered(self, name: str) -> Qcow2:
        found = self._of(name)
        if not isinstance(found, Qcow2):
            raise InvalidRequest(
                "layers_unsupported",
                f"the disk {name} is made by {self._layout.record(name).strategy}: it has no layers that others could share",
                "make the sandbox anew in a pool with pool_strategy = qcow2",
            )
        return found

    def freeze(self, name: str) -> Clone:
        """See :meth:`stoker.storage.qcow2.Qcow2.freeze`; other strategies: ``layers_unsupported`` (InvalidRequest)."""
        return self._layered(name).freeze(name)

    def beside(self, name: str, new: str) -> Clone:
        """See :meth:`stoker.storage.qcow2.Qcow2.beside`."""
        return self._layered(name).beside(name, new)

    def streamed(self, name: str) -> None:
        """See :meth:`stoker.storage.qcow2.Qcow2.streamed`."""
        self._layered(name).streamed(name)

    def written(self, name: str, stack: ExitStack) -> tuple[int, list[tuple[int, Piece]]]:
        """See :meth:`stoker.storage.qcow2.Qcow2.written`."""
        return self._layered(name).written(name, stack)

    def receive(self, name: str) -> Path:
        """See :meth:`stoker.storage.qcow2.Qcow2.receive`. Its files are qcow2 whatever new disks here are made by."""
        return self._qcow2.receive(name)

    def received(self, name: str, base: Base) -> None:
        """See :meth:`stoker.storage.qcow2.Qcow2.received`."""
        with self._guard:
            self._coming += 1
        try:
            self._qcow2.received(name, base)
        finally:
            with self._guard:
                self._coming -= 1

    def open_clone(self, name: str) -> Clone:
        return self._of(name).open(name)

    def remove(self, name: str) -> None:
        """Whatever there is of it, in the right order. Nothing is fine too."""
        self._layout.check()
        try:
            record = self._layout.find(name)
        except HostError:
            # Its record makes no sense. What refers to it is found and dropped by the sweep.
            self._layout.discard(name)
            self.sweep()
            return
        if record is None:
            self.discard(name)
        else:
            self._by_strategy[record.strategy].remove(name)

    def flatten(self, name: str, target: Path) -> None:
        self._of(name).flatten(name, target)

    def grow(self, name: str, size: int) -> Clone:
        return self._of(name).grow(name, size)

    def usage(self, name: str) -> Usage:
        return self._of(name).usage(name)

    def names(self) -> list[str]:
        self._layout.check()
        return self._layout.names()

    def things(self, name: str) -> list[Thing]:
        """What a disk consists of on the host; of one that does not exist yet, what it would."""
        record = self._layout.find(name)
        return self._by_strategy[record.strategy if record is not None else self.strategy].things(name)

    # -- the pool itself ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises ``pool_unmounted`` (HostError) when the path does not lead here any more."""
        self._layout.check()

    def space(self) -> Space:
        found = os.statvfs(self.directory)
        return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    def users(self, base: Path) -> list[str]:
        """The disks that stand on an image."""
        return sorted(name for name in self._on(base) if not name.startswith(LAYER))

    def needs(self, base: Path) -> bool:
        """Whether anything stands on an image, frozen layers included."""
        return bool(self._on(base))

    def _on(self, base: Path) -> list[str]:
        layout, place = self._layout, Path(os.path.abspath(base))
        return [name for key in layout.keys() if layout.image_of(key) == place for name in layout.users(key)]

    def unused(self) -> list[Unused]:
        """Bases that nothing stands on and that are worth forgetting: their image is gone or another, or they have a copy here."""
        layout, found = self._layout, []
        for key in layout.keys():
            current = layout.is_current(key)
            if not layout.users(key) and (not current or (layout.bases / key / "image").exists()):
                found.append(Unused(key, current, allocated(layout.bases / key)))
        return found

    def drop(self, key: str) -> int | None:
        """Forgets a base that nothing stands on: the bytes that were freed. None: something does, or is about to."""
        self._layout.check()
        with self._guard:
            if self._coming or self._layout.users(key):
                return None
            return self._layout.drop_base(key)

    def stray(self) -> dict[str, list[Path]]:
        """What a crash left of disks that never were, or are gone: their names, and what refers to them or is left of them."""
        layout = self._layout
        found = {}
        for name in layout.half_made():
            places = [layout.place(name), *self.directory.glob(f"*/*/refs/{name}")]
            found[name] = [path for path in places if os.path.lexists(path)]
        return found

    def discard(self, name: str) -> None:
        """Removes what is left of a disk that is not whole."""
        self._layout.check()
        if self._layout.find(name) is not None:
            return
        self._by_strategy[self.strategy].remove(name)
        for path in self.directory.glob(f"*/*/refs/{name}"):
            path.unlink(missing_ok=True)

    @property
    def device_prefix(self) -> str:
        """How the names of this pool's device-mapper devices begin."""
        return f"stoker-{self._layout.id}-"

    def images(self) -> set[str]:
        """The files that bases are read from: they have shared loop devices while disks stand on them."""
        layout, found = self._layout, set()
        for key in layout.keys():
            if layout.users(key):
                found |= {str(layout.image_of(key)), str(layout.bases / key / "image")}
        return found

    def foreign(self) -> list[Path]:
        """What is in the pool's directories and not the pool's."""
        return self._layout.foreign()

    def collect(self) -> int:
        """Forgets bases that no disk stands on, with their copies in the pool. Returns the bytes that were freed."""
        self._layout.check()
        return sum(self.drop(key) or 0 for key in self._layout.keys())


def _take(directory: Path, who: str) -> int:
    """The pool's lock. Its file says who holds it, for the one that comes second."""
    try:
        with no_space():
            fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        raise HostError("pool_missing", f"the pool {directory} cannot be opened: {e.strerror}", "stoker pool ls") from None
    if not try_flock(fd):
        holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(fd)
        raise Conflict("pool_in_use", f"the pool {directory} is used by {holder}", "end that one, or give this daemon another pool")
    try:
        with no_space():
            # What is there is written over: it takes no new block.
            os.ftruncate(fd, os.pwrite(fd, f"{who} (process {os.getpid()})\n".encode(), 0))
    except BaseException:
        os.close(fd)
        raise
    return fd
