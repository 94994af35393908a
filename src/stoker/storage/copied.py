"""Clones as plain copies that keep holes: the last resort, which works everywhere."""

from __future__ import annotations

from stoker.host.reflink import sparse_copy
from stoker.storage.files import FileClones
from stoker.storage.strategy import Strategy

__all__ = ["Copied"]


class Copied(FileClones):
    """Every clone has all its blocks to itself."""

    strategy = Strategy.COPY

    def _fill(self, source: int, target: int) -> None:
        sparse_copy(source, target)
