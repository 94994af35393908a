"""Clones as qcow2 overlays on the shared base. All of them read through the base's one page cache; a clone is a few blocks.

A clone of a clone freezes what the first one has: its disk becomes a *layer*, and both go on in overlays of their own above it. The
step from the old disk to the new one is the replacement of the record, so a crash finds either.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from stoker.errors import Conflict
from stoker.host.reflink import data_ranges
from stoker.host.trace import trace
from stoker.storage.compose import Piece, compose, visible
from stoker.storage.layout import LAYER, Layout, Record, no_space, write
from stoker.storage.overlay import allocated, grow_overlay, read_header, write_overlay
from stoker.storage.strategy import Base, Clone, Strategy, Thing, Usage
from stoker.storage.target import new_file, raised_to

__all__ = ["Qcow2"]


class Qcow2:
    """See :class:`stoker.storage.strategy.CloneStrategy`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        """Held while layers and what stands on them change."""

    def clone(self, base: Base, name: str, size: int) -> Clone:
        key = self._layout.base_key(base)
        record = Record(Strategy.QCOW2, 0, key, "", "disk.0")
        with self._layout.new(name, record) as disk:
            write_overlay(disk, raised_to(size, base.size))
        return self._clone(name, record)

    def clone_of(self, name: str, new: str) -> Clone:
        layout = self._layout
        layout.check()
        with self._lock:
            if layout.find(new) is not None:
                raise Conflict("clone_exists", f"there is a disk {new} in the pool already", f"stoker rm {new}, or another name")
            before = layout.record(name)
            size = self._header(name, before)
            with no_space():
                after = self._freeze(name, before, size)
            with layout.new(new, replace(after, disk="disk.0")) as disk:
                write_overlay(disk, size)
        return self._clone(new, replace(after, disk="disk.0"))

    def freeze(self, name: str) -> Clone:
        """What the clone has so far becomes a layer that others may stand on; the clone goes on in the empty overlay that is
        returned. A virtual machine that has it open is to be switched there; until it is, nobody else may use the layer."""
        self._layout.check()
        with self._lock:
            before = self._layout.record(name)
            with no_space():
                after = self._freeze(name, before, self._header(name, before))
        return self._clone(name, after)

    def beside(self, name: str, new: str) -> Clone:
        """A new clone with what the clone stands on, and nothing of what it wrote since."""
        self._layout.check()
        with self._lock:
            record = replace(self._layout.record(name), disk="disk.0")
            with self._layout.new(new, record) as disk:
                write_overlay(disk, self._header(name, self._layout.record(name)))
        return self._clone(new, record)

    def streamed(self, name: str) -> None:
        """The clone has in its own overlay by now whatever it had in layers: it stands on its base alone."""
        self._layout.check()
        with self._lock:
            before = self._layout.record(name)
            if before.parent:
                write(self._layout.place(name), replace(before, parent=""))
                self._layout.leave(before.parent, name)

    def _header(self, name: str, record: Record) -> int:
        path = self._layout.disk(name, record)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return read_header(fd, path).size
        finally:
            os.close(fd)

    def _freeze(self, name: str, before: Record, size: int) -> Record:
        """The clone's disk becomes a layer, and the clone goes on above it."""
        layout = self._layout
        layer = secrets.token_hex(6)
        place, clone = layout.layers / layer, layout.place(name)
        after = replace(before, parent=layer, disk=f"disk.{int(before.disk.partition('.')[2]) + 1}")
        try:
            (place / "refs").mkdir(parents=True, mode=0o700)
            layout.refer(LAYER + layer, before)
            trace("layer.after_directory")
            os.link(clone / before.disk, place / "disk.0")
            write(place, replace(before, disk="disk.0"))
            layout.refer(name, after)
            trace("layer.after_link")
            write_overlay(clone / after.disk, size)
            trace("layer.after_next")
            write(clone, after)
        except BaseException:
            (clone / after.disk).unlink(missing_ok=True)
            layout.leave(layer, name)
            layout.forget(LAYER + layer, before)
            raise
        trace("layer.after_switch")
        (clone / before.disk).unlink()
        if before.parent:
            layout.leave(before.parent, name)
        trace("layer.after_parent")
        return after

    def open(self, name: str) -> Clone:
        self._layout.check()
        return self._clone(name, self._layout.record(name))

    def _clone(self, name: str, record: Record) -> Clone:
        path = self._layout.disk(name, record)
        return Clone(name, Strategy.QCOW2, path, "qcow2", self._below(record), self._header(name, record))

    def _below(self, record: Record) -> tuple[Path, ...]:
        found = []
        while record.parent:
            layer = record.parent
            record = self._layout.layer(layer)
            found.append(self._layout.layers / layer / record.disk)
        return (*found, self._layout.base_path(record.key))

    def written(self, name: str, stack: ExitStack) -> tuple[int, list[tuple[int, Piece]]]:
        """The size of a clone, and what it has besides its base: pieces, ascending, each with the open file that it is in."""
        clone = self.open(name)
        files = [(_opened(path, stack), path) for path in (clone.path, *clone.backing[:-1])]
        shown = visible([allocated(fd, path) for fd, path in files], clone.size)
        return clone.size, sorted(((files[number][0], piece) for number, piece in shown), key=lambda one: one[1].start)

    def receive(self, name: str) -> Path:
        """Where to write the overlay of a disk that comes from elsewhere. Until :meth:`received` it is half made."""
        self._layout.check()
        if self._layout.find(name) is not None:
            raise Conflict("clone_exists", f"there is a disk {name} in the pool already", f"stoker rm {name}, or another name")
        self._layout.discard(name)
        with no_space():
            self._layout.place(name).mkdir(mode=0o700)
        return self._layout.place(name) / "disk.0"

    def received(self, name: str, base: Base) -> None:
        """That overlay is whole, on the host's disk, and stands on ``base``: it becomes a layer, with an empty clone above it."""
        record = Record(Strategy.QCOW2, 0, self._layout.base_key(base), "", "disk.0")
        with no_space():
            self._layout.refer(name, record)
            write(self._layout.place(name), record)
        self.freeze(name)

    def remove(self, name: str) -> None:
        self._layout.check()
        with self._lock:
            record = self._layout.find(name)
            self._layout.discard(name)
            if record is not None:
                self._layout.forget(name, record)

    def flatten(self, name: str, target: Path) -> None:
        clone = self.open(name)
        *overlays, base = clone.path, *clone.backing
        with ExitStack() as stack, new_file(target) as out:
            os.ftruncate(out, clone.size)
            layers: list[tuple[int, Iterable[Piece]]] = []
            for path in overlays:
                fd = _opened(path, stack)
                layers.append((fd, allocated(fd, path)))
            fd = _opened(base, stack)
            layers.append((fd, (Piece(start, length, start) for start, length in data_ranges(fd))))
            compose(layers, clone.size, out)

    def grow(self, name: str, size: int) -> Clone:
        clone = self.open(name)
        if raised_to(size, clone.size) != clone.size:
            fd = os.open(clone.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                with no_space():
                    grow_overlay(fd, clone.path, size)
            finally:
                os.close(fd)
        return self.open(name)

    def usage(self, name: str) -> Usage:
        clone = self.open(name)
        own, *below = (os.stat(path).st_blocks * 512 for path in (clone.path, *clone.backing))
        return Usage(own, sum(below), clone.size)

    def things(self, name: str) -> list[Thing]:
        return [Thing("directory", str(self._layout.place(name)))]


def _opened(path: Path, stack: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
