"""Clones that are raw files of their own: what reflinked and copied ones have in common."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from stoker.errors import HostError
from stoker.host.extents import own_and_shared
from stoker.host.reflink import share, sparse_copy
from stoker.storage.layout import Layout, Record, no_space
from stoker.storage.strategy import Base, Clone, Strategy, Thing, Usage
from stoker.storage.target import new_file, raised_to

__all__ = ["FileClones"]


class FileClones:
    """See :class:`stoker.storage.strategy.CloneStrategy`. ``_fill`` is the strategy."""

    strategy: Strategy

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def _fill(self, source: int, target: int) -> None:
        """Makes an empty file the same as another."""
        raise NotImplementedError

    def _source(self, base: Base, key: str) -> Path:
        """The file that clones of a base are made from."""
        return base.path

    def clone(self, base: Base, name: str, size: int) -> Clone:
        size = raised_to(size, base.size)
        key = self._layout.base_key(base)
        return self._make(name, self._source(base, key), size, Record(self.strategy, 0, key, "", "disk.0"))

    def clone_of(self, name: str, new: str) -> Clone:
        whole = self.open(name)
        return self._make(new, whole.path, whole.size, self._layout.record(name))

    def _make(self, name: str, source: Path, size: int, record: Record) -> Clone:
        with self._layout.new(name, replace(record, disk="disk.0")) as disk:
            below = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fd = os.open(disk, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    self._fill(below, fd)
                    os.ftruncate(fd, size)
                finally:
                    os.close(fd)
            finally:
                os.close(below)
        return self.open(name)

    def open(self, name: str) -> Clone:
        self._layout.check()
        record = self._layout.record(name)
        path = self._layout.disk(name, record)
        size = os.stat(path).st_size
        if not size or size % 512 or not path.is_file() or path.is_symlink():
            raise HostError("clone_corrupt", f"the disk {path} cannot be used: it has {size} bytes", "remove its sandbox")
        return Clone(name, self.strategy, path, "raw", (), size)

    def remove(self, name: str) -> None:
        self._layout.check()
        record = self._layout.find(name)
        self._layout.discard(name)
        if record is not None:
            self._layout.forget(name, record)

    def flatten(self, name: str, target: Path) -> None:
        clone = self.open(name)
        source = os.open(clone.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with new_file(target) as out:
                try:
                    share(source, out)
                except OSError:
                    sparse_copy(source, out)
        finally:
            os.close(source)

    def grow(self, name: str, size: int) -> Clone:
        clone = self.open(name)
        size = raised_to(size, clone.size)
        with no_space():
            os.truncate(clone.path, size)
        return self.open(name)

    def usage(self, name: str) -> Usage:
        clone = self.open(name)
        fd = os.open(clone.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            own, shared = own_and_shared(fd)
        finally:
            os.close(fd)
        return Usage(own, shared, clone.size)

    def things(self, name: str) -> list[Thing]:
        return [Thing("directory", str(self._layout.place(name)))]
