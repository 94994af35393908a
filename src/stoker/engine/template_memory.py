"""The memory of templates as creates take it up: read and checked once, then held. Those used last, a few.

A base is mapped by all machines of its template and by nobody for writing: it is sealed.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stoker.engine.wake import Memory, TakeMemory
from stoker.errors import HostError
from stoker.vmm.kept import Kept, differs, load, sealed_copy

__all__ = ["Memories"]

LOADED: Final = 4


@dataclass(frozen=True, slots=True)
class _Held:
    kept: Kept
    base: int


class Memories:
    """``place`` is where snapshots are."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._lock = asyncio.Lock()

    def taker(self, snapshot: str) -> TakeMemory:
        """Errors: ``saved_unusable``, ``saved_damaged``, ``saved_missing`` (HostError)."""

        async def take(made_by: dict[str, Any]) -> Memory:
            held = self._held.get(snapshot)
            if held is None:
                async with self._lock:
                    held = self._held.get(snapshot) or await self._load(snapshot, made_by)
            self._held.move_to_end(snapshot)
            kept = held.kept
            if different := differs(kept.manifest, made_by):
                raise HostError("saved_unusable", f"its memory is of a machine with another {different}")
            return Memory(os.dup(held.base), kept.delta, kept.state, kept.digest, kept.memory)

        return take

    async def _load(self, snapshot: str, made_by: dict[str, Any]) -> _Held:
        try:
            kept = await asyncio.to_thread(load, self._place / snapshot, made_by)
            held = self._held[snapshot] = _Held(kept, await asyncio.to_thread(sealed_copy, kept))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EIO):
                raise  # such as no memory: nothing is wrong with what is there
            raise HostError("saved_damaged", f"its memory cannot be read: {error.strerror}") from None
        while len(self._held) > LOADED:
            os.close(self._held.popitem(last=False)[1].base)
        return held

    def forget(self, snapshot: str) -> None:
        """It is gone, or is not to be used again. Machines that map it go on."""
        held = self._held.pop(snapshot, None)
        if held is not None:
            os.close(held.base)

    def close(self) -> None:
        for snapshot in list(self._held):
            self.forget(snapshot)
