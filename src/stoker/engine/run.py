"""One machine for one command, owned by this process.

A throw-away machine lives in ``RUN_DIR/runs/run-PID-START`` (sockets, logs) with its disk at ``DATA_DIR/runs/run-PID-START.qcow2``;
the disk is unlinked as soon as the VMM has it open. A process that was killed leaves its directory (the VMM is ended by its shim);
the next run removes directories and clones whose process, named by pid and start time, is gone.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.engine.boot import LiveMachine, MachineRequest, boot
from stoker.errors import HostError
from stoker.host.process import ProcessIdentity
from stoker.storage.overlay import create_overlay
from stoker.storage.strategy import Base, Clone, Strategy

if TYPE_CHECKING:
    from stoker.engine.pools import MakeDisk
    from stoker.images.progress import Progress
    from stoker.settings import Settings

__all__ = ["overlay_at", "running"]

_NAME = re.compile(r"run-(\d{1,10})-(\d{1,20})(\.qcow2)?")


def _private_directory(path: Path, mode: int = 0o700) -> None:
    """Makes a directory of ours; one that belongs to somebody else (a trap in /tmp) is refused."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        status = os.lstat(path)
    except OSError as e:
        raise HostError(
            "directory_refused", f"{path} cannot be made: {e.strerror}", "set STOKER_RUN_DIR and STOKER_DATA_DIR"
        ) from None
    if status.st_uid != os.geteuid() or path.is_symlink():
        raise HostError(
            "directory_refused", f"{path} is not a directory of this user's", f"remove it, or set another with STOKER_*_DIR: {path}"
        )


def _sweep(*places: Path) -> None:
    """Removes what runs that no longer live have left."""
    for place in places:
        for entry in os.scandir(place):
            match = _NAME.fullmatch(entry.name)
            if match is None:
                continue
            try:
                alive = ProcessIdentity.of(int(match[1])).start == int(match[2])
            except ProcessLookupError:
                alive = False
            if not alive and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif not alive:
                Path(entry.path).unlink(missing_ok=True)


def overlay_at(path: Path) -> MakeDisk:
    """A throw-away disk: an overlay in a file of the caller's."""

    async def make(base: Base, size: int) -> Clone:
        create_overlay(path, base.path, size)
        return Clone(path.stem, Strategy.QCOW2, path, "qcow2", (base.path,), size)

    return make


@asynccontextmanager
async def running(request: MachineRequest, settings: Settings, progress: Progress | None = None) -> AsyncIterator[LiveMachine]:
    """A machine that lives as long as the block, and not longer than this process."""
    runs, disks = settings.run_dir / "runs", settings.data_dir / "runs"
    _private_directory(settings.run_dir, 0o755)
    _private_directory(runs, 0o711)
    _private_directory(disks, 0o711)
    _sweep(runs, disks)
    me = ProcessIdentity.of(os.getpid())
    directory = runs / f"run-{me.pid}-{me.start}"
    clone = disks / f"{directory.name}.qcow2"
    try:
        directory.mkdir(mode=0o700)
        live = await boot(request, settings, directory, overlay_at(clone), detached=False, progress=progress)
        try:
            clone.unlink()
            yield live
        finally:
            await live.end()
    finally:
        clone.unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
