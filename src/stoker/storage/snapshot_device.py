"""Clones as device-mapper snapshots: block devices, for virtual machines that take raw disks only, over one shared page cache.

Of a clone: a sparse copy-on-write file with room for every chunk of its disk, a loop device on it, the device ``stoker-POOL-NAME``
(``0 SECTORS snapshot ORIGIN COW P 8``), and, when the disk is larger than its base, ``stoker-POOL-NAME-base`` (the base, then
zeros) as origin. The base has one read-only loop device for all. Every loop device goes with its last user (autoclear), so the
references to a base that count are those on disk; a device that cannot be removed keeps its files and its reference.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from stoker.errors import HostError
from stoker.host import devicemapper as dm
from stoker.host import loop
from stoker.host.devicemapper import Target
from stoker.host.extents import own_and_shared
from stoker.host.loop import Loop
from stoker.host.priority import urgent
from stoker.host.reflink import data_ranges, share, sparse_copy
from stoker.host.trace import declare, trace
from stoker.storage.compose import Piece, compose
from stoker.storage.exceptions import CHUNK_SECTORS, capacity, check_store, pieces, render_header
from stoker.storage.layout import Layout, Record, no_space, write
from stoker.storage.strategy import Base, Clone, Strategy, Thing, Usage
from stoker.storage.target import new_file, raised_to

__all__ = ["SnapshotDevices", "origin_table", "snapshot_table"]

SECTOR = 512
ACTIVATE = declare("device.after_loops", "device.after_origin", "device.after_device")
DEACTIVATE = declare("device.after_remove", "device.after_detach")
GROW = declare("grow.after_store", "grow.after_record", "grow.after_device")
SUSPENDED = declare("device.while_suspended")
FREES = (1, 16, 0)
"""The snapshot target's version from which a discarded chunk is given back to the copy-on-write file."""


def snapshot_table(size: int, origin: str, store: str, *, discards: bool) -> list[Target]:
    """``origin`` and ``store``: ``MAJOR:MINOR``. ``size`` is bytes."""
    words = f"{origin} {store} P {CHUNK_SECTORS}" + (" 1 discard_zeroes_cow" if discards else "")
    return [Target(0, size // SECTOR, "snapshot", words)]


def origin_table(size: int, base: str, base_size: int) -> list[Target]:
    """The base, and zeros up to ``size``."""
    sectors = base_size // SECTOR
    return [Target(0, sectors, "linear", f"{base} 0"), Target(sectors, size // SECTOR - sectors, "zero", "")]


class SnapshotDevices:
    """See :class:`stoker.storage.strategy.CloneStrategy`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        """Held while devices are made and removed: a base's loop device must not go between being found and being used."""
        self._loops: dict[Path, int] = {}
        """The loop devices of bases as they were last seen: looking through all of a host's takes longer with each clone."""

    def _device(self, name: str) -> str:
        return f"stoker-{self._layout.id}-{name}"

    @urgent()
    def clone(self, base: Base, name: str, size: int) -> Clone:
        size = raised_to(size, base.size)
        record = Record(Strategy.DM_SNAPSHOT, size, self._layout.base_key(base), "", "disk.0")
        with self._layout.new(name, record) as disk:
            fd = os.open(disk, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(fd, render_header(), 0)
                os.ftruncate(fd, capacity(size))
            finally:
                os.close(fd)
        return self._activated(name)

    def clone_of(self, name: str, new: str) -> Clone:
        self._layout.check()
        record = self._layout.record(name)
        source = os.open(self._layout.disk(name, record), os.O_RDONLY | os.O_CLOEXEC)
        try:
            with self._layout.new(new, replace(record, disk="disk.0")) as disk, dm.suspended(self._device(name)):
                fd = os.open(disk, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    trace("device.while_suspended")
                    _copy(source, fd)
                finally:
                    os.close(fd)
        finally:
            os.close(source)
        return self._activated(new)

    def _activated(self, name: str) -> Clone:
        """A new clone with its device, or nothing of it. Nobody can have its file behind a device yet: none is looked for."""
        record = self._layout.record(name)
        path, base = self._layout.disk(name, record), self._layout.base_path(record.key)
        try:
            try:
                with self._lock, no_space():
                    device = self._activate(name, record, path, base)
            except HostError as error:
                if error.code != "device_exists":
                    raise
                return self.open(name)  # left by somebody who was killed
        except BaseException:
            self.remove(name)
            raise
        return _clone(name, device, record)

    def open(self, name: str) -> Clone:
        self._layout.check()
        record = self._layout.record(name)
        path, base = self._layout.disk(name, record), self._layout.base_path(record.key)
        with _store(path):
            pass
        with self._lock:
            device = dm.find(self._device(name))
            if device is None or not device.active or not self._is_ours(device.name, path):
                self._deactivate(name, path)
                with no_space():
                    device = self._activate(name, record, path, base)
            elif device.suspended or dm.table(device.name)[0].length * SECTOR != record.size:
                # Somebody was killed while it was copied, or made larger.
                with no_space(), ExitStack() as stack:
                    [store] = loop.find(path)
                    loop.refresh_size(store)
                    self._reload(name, record, base, store, stack)
            if dm.status(device.name)[0].words.startswith(("Invalid", "Overflow")):
                raise HostError(
                    "clone_corrupt", f"the disk {name} was given up by the kernel", "dmesg says why; remove its sandbox"
                )
        return _clone(name, device, record)

    def _is_ours(self, device: str, path: Path) -> bool:
        """Whether a device's store is this very file."""
        return (found := _store_of(device)) is not None and found.is_on(path)

    def _activate(self, name: str, record: Record, path: Path, base: Path) -> dm.Device:
        with ExitStack() as stack:
            below = self._base(base, stack)
            store = stack.enter_context(loop.opened(path, direct=True))
            trace("device.after_loops")
            origin = self._origin(name, record, base, below)
            trace("device.after_origin")
            device = dm.create(self._device(name), self._table(record, origin, store))
            trace("device.after_device")
        return device

    def _reload(self, name: str, record: Record, base: Path, store: Loop, stack: ExitStack) -> None:
        """The device of a clone as its record says; it goes on if it was suspended."""
        origin = self._origin(name, record, base, self._base(base, stack))
        dm.replace(self._device(name), self._table(record, origin, store))

    def sweep(self) -> None:
        """Devices that a process which was killed left suspended go on: a virtual machine may be waiting for one."""
        for name in self._layout.names():
            if self._layout.record(name).strategy is not Strategy.DM_SNAPSHOT:
                continue
            device = dm.find(self._device(name))
            if device is not None and device.suspended:
                self.open(name)

    def _table(self, record: Record, origin: str, store: Loop) -> list[Target]:
        return snapshot_table(
            record.size, origin, f"{loop.MAJOR}:{store.number}", discards=(dm.available("snapshot") or (0,)) >= FREES
        )

    def _origin(self, name: str, record: Record, base: Path, below: Loop) -> str:
        """``MAJOR:MINOR`` of what the clone stands on: the base, or the base and zeros."""
        size, number = os.stat(base).st_size, f"{loop.MAJOR}:{below.number}"
        if record.size <= size:
            return number
        origin, lines = f"{self._device(name)}-base", origin_table(record.size, number, size)
        device = dm.find(origin)
        if device is None:
            device = dm.create(origin, lines, read_only=True)
        else:
            dm.replace(origin, lines)
        return f"{os.major(device.number)}:{os.minor(device.number)}"

    def _base(self, path: Path, stack: ExitStack) -> Loop:
        """The one read-only loop device of a base: the one there is, or a new one that lasts as long as somebody uses it."""
        known = self._loops.get(path)
        found = loop.backing_of(known) if known is not None else None
        if found is None or not (found.read_only and found.is_on(path)):
            found = next((one for one in loop.find(path) if one.read_only), None)
        if found is None:
            found = stack.enter_context(loop.opened(path, read_only=True))
        self._loops[path] = found.number
        return found

    def _deactivate(self, name: str, path: Path) -> None:
        device = self._device(name)
        store = _store_of(device) if dm.find(device) is not None else None
        dm.remove(device)
        dm.remove(f"{device}-base")
        trace("device.after_remove")
        # It goes with its device; one without a device was left by somebody who was killed.
        for found in [store] if store is not None and store.is_on(path) else loop.find(path):
            loop.detach(found)
        trace("device.after_detach")

    def remove(self, name: str) -> None:
        self._layout.check()
        record = self._layout.find(name)
        place = self._layout.place(name)
        with self._lock:
            self._deactivate(name, place / (record.disk if record is not None else "disk.0"))
        self._layout.discard(name)
        if record is not None:
            self._layout.forget(name, record)

    def close(self, name: str) -> None:
        """Takes the devices away and keeps the clone: :meth:`open` makes them again."""
        with self._lock:
            self._deactivate(name, self._layout.disk(name, self._layout.record(name)))

    def flatten(self, name: str, target: Path) -> None:
        self._layout.check()
        record = self._layout.record(name)
        base = os.open(self._layout.base_path(record.key), os.O_RDONLY | os.O_CLOEXEC)
        try:
            with _store(self._layout.disk(name, record)) as store, new_file(target) as out, dm.suspended(self._device(name)):
                os.ftruncate(out, record.size)
                trace("device.while_suspended")
                layers = [
                    (store, pieces(store, self._layout.disk(name, record))),
                    (base, (Piece(start, length, start) for start, length in data_ranges(base))),
                ]
                compose(layers, record.size, out)
        finally:
            os.close(base)

    def grow(self, name: str, size: int) -> Clone:
        clone = self.open(name)
        if raised_to(size, clone.size) == clone.size:
            return clone
        record = replace(self._layout.record(name), size=size)
        path, base = self._layout.disk(name, record), self._layout.base_path(record.key)
        with self._lock, no_space(), ExitStack() as stack:
            os.truncate(path, capacity(size))
            [store] = loop.find(path)
            loop.refresh_size(store)
            trace("grow.after_store")
            write(self._layout.place(name), record)
            trace("grow.after_record")
            self._reload(name, record, base, store, stack)
            trace("grow.after_device")
        return self.open(name)

    def usage(self, name: str) -> Usage:
        self._layout.check()
        record = self._layout.record(name)
        store = os.open(self._layout.disk(name, record), os.O_RDONLY | os.O_CLOEXEC)
        try:
            # A clone of a clone shares blocks of its store, where the file system can do that.
            own, shared = own_and_shared(store)
        finally:
            os.close(store)
        return Usage(own, shared + os.stat(self._layout.base_path(record.key)).st_blocks * SECTOR, record.size)

    def things(self, name: str) -> list[Thing]:
        place, device = self._layout.place(name), self._device(name)
        found = [Thing("device", device), Thing("device", f"{device}-base"), Thing("loop", str(place / "disk.0"))]
        return [*found, Thing("directory", str(place))]


@contextmanager
def _store(path: Path) -> Iterator[int]:
    """A copy-on-write file, checked."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check_store(fd, path)
        yield fd
    finally:
        os.close(fd)


def _copy(source: int, target: int) -> None:
    try:
        share(source, target)
    except OSError:
        sparse_copy(source, target)


def _clone(name: str, device: dm.Device, record: Record) -> Clone:
    return Clone(name, Strategy.DM_SNAPSHOT, dm.node(device), "raw", (), record.size)


def _store_of(device: str) -> Loop | None:
    """The loop device with the copy-on-write file of a snapshot device."""
    lines = dm.table(device)
    if len(lines) != 1 or lines[0].kind != "snapshot":
        return None
    return loop.backing_of(int(lines[0].words.split()[1].partition(":")[2]))
