"""ssh host keys for copies of machines: made ahead of time, so that no copy waits for a prime number, and given away once.

``DATA_DIR/host-keys`` (0700) holds a few sets, one file (0600) each, written beside, synced and renamed; ``.making`` is where
ssh-keygen writes. A set is taken off the disk, and that made durable, before anybody gets it: those in :attr:`HostKeys._ready` are
in no file any more. A daemon that is killed loses them, and nobody gets them twice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from stoker.errors import HostError, StokerError
from stoker.host.durable import sync_directory, write_atomically
from stoker.host.run import run

__all__ = ["HostKeys"]

log = logging.getLogger(__name__)
STOCK: Final = 12
"""Sets that are kept, those on the disk and those in memory together."""
READY: Final = 4
"""Sets of these that wait in memory."""
LATER: Final = 15.0
"""Seconds after the daemon's start before it begins with this: what it was started for comes first."""
AGAIN: Final = 60.0
"""Seconds until a stock that could not be filled is tried again."""
KINDS: Final = {"ed25519": (), "ecdsa": ("-b", "256"), "rsa": ("-b", "3072")}
"""What OpenSSH's own packages make, with ssh-keygen's words for it."""
PLACE: Final = "/etc/ssh/ssh_host_{0}_key"
MOST: Final = 64 << 10
Keys = dict[str, tuple[str, str]]
"""Kind to private and public key."""


class HostKeys:
    """The stock of one data directory."""

    def __init__(self, data_dir: Path) -> None:
        self._place = data_dir / "host-keys"
        self._ready: deque[Keys] = deque()
        self._wanted = asyncio.Event()
        self._disk = asyncio.Lock()

    async def take(self, paths: Sequence[str]) -> list[tuple[str, int, str]]:
        """Files in place of the private keys at ``paths``: path, mode and content. A kind that is not known here gets none; a
        guest that has none but such gets one of each."""
        keys = await self._take()
        kinds = [kind for kind in KINDS if PLACE.format(kind) in paths] or list(KINDS)
        return [
            file
            for kind in kinds
            for file in ((PLACE.format(kind), 0o600, keys[kind][0]), (PLACE.format(kind) + ".pub", 0o644, keys[kind][1]))
        ]

    async def _take(self) -> Keys:
        self._wanted.set()
        if not self._ready:
            async with self._disk:
                await self._load(READY)
        return self._ready.popleft() if self._ready else await self._make()

    async def keep_filled(self) -> None:
        """Until it is cancelled: what was taken is made anew, by the way."""
        await asyncio.sleep(LATER)
        while True:
            self._wanted.clear()
            try:
                async with self._disk:
                    await self._load(READY)
                while await asyncio.to_thread(self._stored) + len(self._ready) < STOCK:
                    await self._store(await self._make("nice", "-n", "19"))
                async with self._disk:
                    await self._load(READY)
            except (StokerError, OSError) as error:
                log.warning("no ssh host keys are made ahead of time: %s", error)
                await asyncio.sleep(AGAIN)
            else:
                await self._wanted.wait()

    def _stored(self) -> int:
        self._place.mkdir(mode=0o700, exist_ok=True)
        return len(list(self._place.glob("*.json")))

    async def _store(self, keys: Keys) -> None:
        path = self._place / f"{os.urandom(8).hex()}.json"
        await asyncio.to_thread(write_atomically, path, msgspec.json.encode(keys), 0o600)

    async def _load(self, wanted: int) -> None:
        """Takes sets off the disk until so many are in memory."""
        if (missing := wanted - len(self._ready)) > 0:
            self._ready += await asyncio.to_thread(self._unlinked, missing)

    def _unlinked(self, count: int) -> list[Keys]:
        found = []
        for path in sorted(self._place.glob("*.json"))[:count]:
            data = path.read_bytes()[:MOST]
            path.unlink()
            try:
                keys = msgspec.json.decode(data, type=Keys)
            except msgspec.DecodeError:
                continue
            if keys.keys() >= KINDS.keys():
                found.append(keys)
        if found:
            sync_directory(self._place)
        return found

    async def _make(self, *before: str) -> Keys:
        await asyncio.to_thread(self._place.mkdir, 0o700, exist_ok=True)
        directory = self._place / f".making.{os.urandom(4).hex()}"
        directory.mkdir(mode=0o700)
        try:
            for kind, more in KINDS.items():
                await run([*before, "ssh-keygen", "-q", "-t", kind, *more, "-N", "", "-C", "", "-f", directory / kind], timeout=60)
            return {kind: ((directory / kind).read_text(), (directory / f"{kind}.pub").read_text()) for kind in KINDS}
        except HostError as error:
            if error.code == "tool_missing":
                error.hint = "apt-get install openssh-client"
            raise
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True))

    def sweep(self) -> None:
        """What a crash left half made goes."""
        for path in self._place.glob(".*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
