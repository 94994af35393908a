"""Where volumes are, and whether one may be mounted now."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.errors import Conflict
from stoker.storage import volume as files

if TYPE_CHECKING:
    from stoker.engine.core import Core
    from stoker.engine.state import Mounted

__all__ = ["volume_path", "volume_ready"]


def volume_path(core: Core, identity: str) -> Path:
    return core.settings.data_dir / "volumes" / f"{identity}.ext4"


async def volume_ready(core: Core, mounted: Mounted) -> None:
    """Before a boot: a volume that is only read must have been unmounted by who wrote to it last."""
    if mounted.read_only and await asyncio.to_thread(files.is_dirty, volume_path(core, mounted.id)):
        raise Conflict(
            "volume_dirty",
            f"volume {mounted.name} was not unmounted by its last writer: its journal has to be replayed first",
            f"stoker run -v {mounted.name}:/mnt debian:12 -- true",
        )
