"""Bases in memory: what the machines of this daemon map that were put away with a base others have, too."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from stoker.vmm.kept import Kept, sealed_copy

__all__ = ["Bases"]

LOADED: Final = 2
"""So many are held for the next who wants them. A machine holds its own by itself."""


class Bases:
    """``known`` finds one that somebody else holds, by its digest."""

    def __init__(self, known: Callable[[str], int | None]) -> None:
        self._known = known
        self._loaded: OrderedDict[str, int] = OrderedDict()
        self._lock = asyncio.Lock()

    async def open(self, kept: Kept) -> int:
        """What a machine maps as its base: a descriptor, the caller's to close.

        A file that is one machine's alone is mapped itself: its VMM may be able to change it, but nobody else sees that. Everybody
        else maps a copy that is sealed.
        """
        if kept.alone:
            return os.open(kept.memory, os.O_RDWR | os.O_CLOEXEC)
        async with self._lock:
            if (fd := self._known(kept.digest)) is not None:
                return fd
            held = self._loaded.get(kept.digest)
            if held is None:
                held = self._loaded[kept.digest] = await asyncio.to_thread(sealed_copy, kept)
            self._loaded.move_to_end(kept.digest)
            while len(self._loaded) > LOADED:
                os.close(self._loaded.popitem(last=False)[1])
            return os.dup(held)

    def close(self) -> None:
        while self._loaded:
            os.close(self._loaded.popitem()[1])
