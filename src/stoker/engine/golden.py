"""Golden memory: for each root file system, kernel and shape one machine that came up, was told nothing, and was put away.

A create that finds one starts from it instead of booting: its memory is mapped copy-on-write, its devices are loaded, and
`configure` makes it somebody's. It never comes from a user's machine, or one's secrets would be the next one's memory: the first
cold create of a shape has a machine of the shape booted in the background. What that wrote to its disk (an overlay like any
clone's; little more than a file system's notes that it is mounted) is put away with it: a machine that starts from it begins there.

Files: ``DATA_DIR/golden/KEY`` (:mod:`stoker.vmm.saved`), with ``KEY.lock`` held by who makes it; the machine lives in
``RUN_DIR/golden/KEY`` and ends with this process. One that does not load is removed, and made anew by the next cold create.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shutil
import time
from collections import OrderedDict
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stoker.errors import HostError, StokerError
from stoker.guest.channel import connect
from stoker.guest.copies import BeforeSnapshot
from stoker.guest.messages import ExecRequest, NetworkConfiguration, Preparation, RootMount
from stoker.host.lock import try_flock
from stoker.storage.overlay import allocated, create_overlay
from stoker.vmm.machine import GuestMemory, MachineSpec, TapNetwork
from stoker.vmm.memory import new_memory, sealed
from stoker.vmm.qemu.driver import launch
from stoker.vmm.qemu.facts import qemu_facts
from stoker.vmm.saved import ANY_MAC, Saved, fingerprint, load, save

if TYPE_CHECKING:
    from stoker.settings import Settings

__all__ = ["Golden", "Goldens", "Shape", "golden_key"]

log = logging.getLogger(__name__)
LOADED: Final = 4
"""So many are held in memory, those used last."""
KEPT: Final = 16
"""So many are kept on disk."""
ROOM: Final = 1 << 30
"""Bytes of disk that must be free before another is put away."""
NICE: Final = 5
PATIENCE: Final = 5
"""So many times as long as a machine that somebody waits for may take to come up."""
WARM: Final = ("/bin/true",)
"""Run once before the memory is put away: what every command needs is in the guest's page cache then."""
SETTLE: Final = 3.0
"""Seconds for what the kernel does a little later (asking whether its address is unique takes two, and memory is freed): else
each copy does it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A machine in every respect that its golden memory depends on. ``spec`` is one of those that want it."""

    spec: MachineSpec
    root: RootMount
    network: NetworkConfiguration | None
    disk: int
    """Bytes of the root disk: the guest learned them when it came up."""
    made_by: dict[str, Any]
    key: str

    @classmethod
    async def of(
        cls, spec: MachineSpec, root: RootMount, network: NetworkConfiguration | None, disk: int, settings: Settings
    ) -> Shape:
        """``network`` is the usual one; a machine that has another one gets it all the same."""
        made_by = {**fingerprint(replace(spec, guest_memory=GuestMemory(0)), await qemu_facts(settings)), "disk": disk}
        made_by["root"] = [root.device, root.fstype, root.options, *root.flags, root.grow]
        key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:24]
        return cls(spec, root, network, disk, made_by, key)


@dataclass(frozen=True, slots=True)
class Golden:
    """One that is loaded. Whoever took it closes ``saved.memory``."""

    key: str
    saved: Saved


async def _dead_end(undo: AsyncExitStack) -> TapNetwork:
    """A TAP like a machine's, in a namespace with nothing else in it."""
    from stoker.host.namespaces import Namespace
    from stoker.host.tun import open_tap

    namespace, tap = await asyncio.to_thread(Namespace.create, lambda _: open_tap("tap0", create=True))
    undo.callback(namespace.close)
    undo.callback(os.close, tap)
    return TapNetwork(ANY_MAC, tap)


class Goldens:
    """Those of one data directory. :meth:`aclose` ends what is being made."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._place = settings.data_dir / "golden"
        self._loaded: OrderedDict[str, Golden] = OrderedDict()
        self._useless: set[str] = set()
        """Shapes that no golden memory comes of here: not tried again by this daemon."""
        self._work: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    async def take(self, shape: Shape) -> Golden | None:
        """The golden memory of a shape, if there is one that can be used."""
        if shape.key not in self._loaded:
            if shape.key in self._useless:
                return None
            async with self._lock:
                if shape.key not in self._loaded:
                    await self._load(shape)
        found = self._loaded.get(shape.key)
        if found is None:
            return None
        self._loaded.move_to_end(shape.key)
        return replace(found, saved=replace(found.saved, memory=os.dup(found.saved.memory)))

    async def _load(self, shape: Shape) -> None:
        directory = self._place / shape.key
        try:
            saved = await asyncio.to_thread(load, directory, shape.made_by)
        except FileNotFoundError:
            return
        except (StokerError, OSError) as error:
            log.warning("golden memory %s cannot be used: %s", shape.key, error)
            await asyncio.to_thread(_remove, directory)
            return
        with suppress(OSError):
            os.utime(directory)
        self._loaded[shape.key] = Golden(shape.key, saved)
        while len(self._loaded) > LOADED:
            _, old = self._loaded.popitem(last=False)
            os.close(old.saved.memory)

    def link(self, golden: Golden, target: Path) -> bool:
        """Gives the file that this was loaded from another name, so that it is there as long as somebody's memory stands on it."""
        try:
            os.link(self._place / golden.key / "memory", target)
            status = os.stat(target)
            if (status.st_dev, status.st_ino) == golden.saved.file:
                return True
            target.unlink()  # it was made anew since
        except OSError as error:
            log.debug("golden memory %s cannot be linked to %s: %s", golden.key, target, error)
        return False

    def by_digest(self, digest: str) -> int | None:
        """The base with this content, if it is loaded: a descriptor, the caller's to close."""
        found = next((one for one in self._loaded.values() if one.saved.digest == digest), None)
        return None if found is None else os.dup(found.saved.memory)

    async def failed(self, golden: Golden, why: StokerError | TimeoutError) -> None:
        """A machine could not be started from it: it is not used again."""
        log.warning("golden memory %s does not work, machines boot instead: %s", golden.key, why or "out of time")
        self._useless.add(golden.key)
        held = self._loaded.pop(golden.key, None)
        if held is not None:
            os.close(held.saved.memory)
        await asyncio.to_thread(_remove, self._place / golden.key)

    def learn(self, shape: Shape) -> None:
        """Has the golden memory of a shape made in the background, unless there is one, or another is being made."""
        busy = self._work is not None and not self._work.done()
        if busy or shape.key in self._useless or shape.key in self._loaded or (self._place / shape.key).exists():
            return
        self._work = asyncio.get_running_loop().create_task(self._learn(shape), name=f"golden {shape.key}")

    async def _learn(self, shape: Shape) -> None:
        try:
            self._place.mkdir(mode=0o700, exist_ok=True)
            if shutil.disk_usage(self._place).free < ROOM + shape.spec.memory:
                return
            lock = os.open(self._place / f"{shape.key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if try_flock(lock) and not (self._place / shape.key).exists():
                    await asyncio.to_thread(self._make_room)
                    began = time.monotonic()
                    await self._make(shape)
                    log.info("golden memory %s made in %.1f s", shape.key, time.monotonic() - began)
            finally:
                os.close(lock)
        except (StokerError, OSError, TimeoutError) as error:
            self._useless.add(shape.key)
            log.warning("no golden memory of this shape: %s", error or "out of time")

    async def _make(self, shape: Shape) -> None:
        settings = self._settings
        directory = settings.run_dir / "golden" / shape.key
        await asyncio.to_thread(_remove, directory)
        directory.mkdir(mode=0o700, parents=True)
        async with AsyncExitStack() as undo:
            undo.callback(_remove, directory)
            memory = new_memory("golden", shape.spec.memory)
            undo.callback(os.close, memory)
            (root,) = shape.spec.disks
            disk = directory / "root.qcow2"
            create_overlay(disk, root.backing[-1], shape.disk)
            spec = replace(
                shape.spec,
                name=f"golden-{shape.key}",
                directory=directory,
                disks=(replace(root, path=disk),),
                guest_memory=GuestMemory(memory, shared=True),
                detached=False,
                cgroup=None,
                gate=None,
                journal="",
            )
            if isinstance(spec.network, TapNetwork):
                spec = replace(spec, network=await _dead_end(undo))
            spec = replace(spec, taps=tuple([await _dead_end(undo) for _ in spec.taps]))
            machine = await launch(spec, settings)
            undo.push_async_callback(machine.close)
            undo.push_async_callback(machine.kill)
            # Somebody waits for what else the host does now; nobody for this.
            os.setpriority(os.PRIO_PROCESS, machine.vmm.pid, NICE)
            async with await connect(machine.channel(), fresh=True, timeout=PATIENCE * settings.boot_timeout) as agent:
                await agent.prepare(
                    Preparation(root=shape.root, network=shape.network or spec.network is not None or bool(spec.taps))
                )
                await agent.before_snapshot(BeforeSnapshot(hooks=False))
                with suppress(StokerError):
                    await agent.run(ExecRequest(list(WARM)), timeout=30.0)
                await asyncio.sleep(SETTLE)
            await machine.freeze()
            state = await machine.device_state()
            await machine.kill()
            await asyncio.to_thread(save, self._place / shape.key, sealed(memory), state, shape.made_by, disk)

    def _make_room(self) -> None:
        """Removes what a crash left and, of too many, those not used for longest."""
        kept = []
        for entry in os.scandir(self._place):
            if entry.name.startswith("."):
                _remove(Path(entry.path))
            elif entry.is_dir(follow_symlinks=False):
                kept.append((entry.stat().st_mtime, Path(entry.path)))
        for _, path in sorted(kept)[: max(0, len(kept) - KEPT + 1)]:
            _remove(path)

    async def aclose(self) -> None:
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
        while self._loaded:
            _, golden = self._loaded.popitem()
            os.close(golden.saved.memory)


def begin_disk(path: Path, saved: Saved) -> bytes:
    """Gives a machine's fresh overlay, which nobody has written yet, what its memory expects; what the file was."""
    with open(path, "r+b") as file:
        if any(True for _ in allocated(file.fileno(), path)):
            raise HostError("disk_used", f"{path} was written to: no memory but its own agrees with it", "start it cold")
        before = file.read()
        file.truncate(saved.disk_length)
        for offset, data in saved.disk:
            os.pwrite(file.fileno(), data, offset)
    return before


def golden_key(path: Path) -> str:
    """The key of golden memory, or of a part of it that is not whole yet, by its directory."""
    return path.name.removeprefix(".").partition(".")[0]


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
