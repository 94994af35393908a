"""Files of the guests: placeholder until guest/files.py is there."""

from __future__ import annotations

from stoker.engine.core import Core

__all__ = ["Files"]


class Files:
    def __init__(self, core: Core) -> None:
        self._core = core
