"""Clones as files that share blocks with their base (XFS, btrfs).

A base that lies in another file system is copied into the pool once, when its first clone is made, and kept until
:meth:`Reflink.collect`.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from stoker.errors import HostError
from stoker.host.reflink import share, sparse_copy
from stoker.host.trace import declare, trace
from stoker.storage.files import FileClones
from stoker.storage.layout import Layout, no_space
from stoker.storage.strategy import Base, Strategy

__all__ = ["Reflink"]


IMPORT = declare("base.after_copy")


class Reflink(FileClones):
    """Blocks are shared until somebody writes to them."""

    strategy = Strategy.REFLINK

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._lock = threading.Lock()
        """Held while a base is copied in."""

    def _fill(self, source: int, target: int) -> None:
        try:
            share(source, target)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY):
                raise
            raise HostError(
                "reflink_unsupported",
                f"files in {self._layout.directory} cannot share blocks: {e.strerror}",
                "stoker pool create makes a pool that can, or set pool_strategy",
            ) from None

    def _source(self, base: Base, key: str) -> Path:
        if os.stat(base.path).st_dev == os.stat(self._layout.directory).st_dev:
            return base.path
        image = self._layout.bases / key / "image"
        with self._lock:
            if not image.exists():
                self._import(base.path, image)
        return image

    def _import(self, path: Path, image: Path) -> None:
        self._layout.check()
        temporary = image.with_name(".image")
        temporary.unlink(missing_ok=True)
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with no_space():
                fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    sparse_copy(source, fd)
                    os.fsync(fd)
                finally:
                    os.close(fd)
                trace("base.after_copy")
                os.rename(temporary, image)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(source)
