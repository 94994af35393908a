"""Figures of each sandbox, sampled into rings: 10 min every 0.5 s, 2 h every 30 s, 24 h every 5 min.

The host's half (CPU, resident memory, disk) is read from /proc in one thread hop for all machines; the guest's half comes from
its agent, and asking all of them takes at most a twentieth of the host: many slow guests (in software emulation) are asked less
often than every half second, and their last figures stand. With no machine the sampler sleeps.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stoker.api.models import Metrics, MetricsSample, SandboxState
from stoker.errors import StokerError

if TYPE_CHECKING:
    from stoker.engine.core import Box, Core
    from stoker.guest.messages import GuestInfo

__all__ = ["RINGS", "HostSample", "Ring", "Rings", "read_host", "sample"]

log = logging.getLogger(__name__)
RINGS: Final = ((0.5, 600.0), (30.0, 7200.0), (300.0, 86400.0))
STEP: Final = 0.5
FIELDS: Final = (
    "at",
    "cpu_percent",
    "cpu_seconds",
    "memory_host",
    "disk_host",
    "memory_guest_used",
    "memory_guest_total",
    "disk_read",
    "disk_written",
    "network_received",
    "network_sent",
)
FLOATS: Final = 3
"""So many of the fields are fractions; the others are whole numbers, or NaN where the guest did not say."""
GUESTS_SHARE: Final = 0.05
"""The part of the host's CPUs that asking all guests together may take."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Ring:
    """Samples at a fixed step in one compact array that grows to its size and then goes round."""

    def __init__(self, step: float, window: float) -> None:
        self.step, self.window = step, window
        self.size = round(window / step)
        self._values = array("d")
        self._next = 0
        self._last: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self._values) // len(FIELDS)

    def add(self, row: list[float]) -> None:
        """Takes a row when the step has passed since the last; its CPU share is over just that time."""
        at, cpu = row[0], row[2]
        if self._last is not None:
            passed = at - self._last[0]
            # Half a sample early is on time: the sampler's ticks are not exact.
            if passed < self.step - STEP / 2:
                return
            row = [at, max(0.0, (cpu - self._last[1]) / passed * 100), *row[2:]]
        self._last = (at, cpu)
        if len(self) < self.size:
            self._values.extend(row)
        else:
            start = self._next * len(FIELDS)
            self._values[start : start + len(FIELDS)] = array("d", row)
            self._next = (self._next + 1) % self.size

    def rows(self) -> Iterator[array[float]]:
        """Oldest first."""
        width = len(FIELDS)
        for position in range(len(self)):
            start = ((self._next + position) % len(self)) * width
            yield self._values[start : start + width]


class Rings:
    """All rings of one sandbox."""

    def __init__(self) -> None:
        self._rings = tuple(Ring(step, window) for step, window in RINGS)
        self.guest: GuestInfo | None = None
        self.asking: asyncio.Task[None] | None = None
        self.next_ask = 0.0
        self.latest: MetricsSample | None = None

    def add(self, host: HostSample) -> None:
        row = [time.time(), 0.0, host.cpu, float(host.memory), float(host.disk), *_guest_values(self.guest)]
        for ring in self._rings:
            ring.add(row)
        *_, newest = self._rings[0].rows()
        self.latest = to_sample(newest)

    def restart(self) -> None:
        """Another machine: its counters begin anew."""
        for ring in self._rings:
            ring._last = None
        self.guest = None

    def read(self, sandbox: str, window: float, since: float | None) -> Metrics:
        """The finest ring that covers ``window``."""
        ring = next((r for r in self._rings if r.window >= window), self._rings[-1])
        begin = max(time.time() - window, -math.inf if since is None else since)
        samples = [to_sample(row) for row in ring.rows() if row[0] > begin]
        return Metrics(sandbox=sandbox, step=ring.step, window=ring.window, samples=samples)


def to_sample(row: array[float]) -> MetricsSample:
    values: dict[str, Any] = {}
    for position, (name, value) in enumerate(zip(FIELDS, row, strict=True)):
        values[name] = value if position < FLOATS else None if math.isnan(value) else int(value)
    values["cpu_percent"] = round(values["cpu_percent"], 2)
    return MetricsSample(**values)


def _guest_values(info: GuestInfo | None) -> list[float]:
    if info is None:
        return [math.nan] * 6
    memory = info.memory
    return [
        float(max(0, memory.total - memory.available)),
        float(memory.total),
        float(sum(disk.read_bytes for disk in info.disks)),
        float(sum(disk.written_bytes for disk in info.disks)),
        float(sum(network.rx_bytes for network in info.networks if network.name != "lo")),
        float(sum(network.tx_bytes for network in info.networks if network.name != "lo")),
    ]


@dataclass(frozen=True, slots=True)
class HostSample:
    """What the host says of a machine: CPU seconds, resident bytes, bytes of its files."""

    cpu: float
    memory: int
    disk: int


def read_host(pid: int, clone: Path) -> HostSample | None:
    """None when the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/statm", "rb") as f:
            resident = int(f.read().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        disk = sum(entry.stat(follow_symlinks=False).st_blocks for entry in os.scandir(clone)) * 512
    except FileNotFoundError:
        disk = 0
    return HostSample((int(fields[11]) + int(fields[12])) / _TICKS, resident, disk)


async def sample(core: Core) -> None:
    """Samples every machine for as long as the engine is open."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        boxes = [box for box in core.boxes.values() if box.live is not None]
        if not boxes:
            await core.bell.wait()
            due = loop.time()
            continue
        await _round(core, boxes)
        # What was missed is not made up for.
        due = max(due + STEP, loop.time())
        await asyncio.sleep(due - loop.time())


async def _round(core: Core, boxes: list[Box]) -> None:
    places = [(box, box.live.machine.vmm.pid, core.places(box.id).clone) for box in boxes if box.live is not None]
    read = await asyncio.to_thread(lambda: [read_host(pid, clone) for _, pid, clone in places])
    now = asyncio.get_running_loop().time()
    share = GUESTS_SHARE * (os.cpu_count() or 1) / len(places)
    for (box, _, _), host in zip(places, read, strict=True):
        if host is None or box.live is None:
            continue
        rings = box.rings
        rings.add(host)
        if box.record.state is SandboxState.RUNNING and rings.asking is None and now >= rings.next_ask:
            rings.asking = core.spawn(_ask(box, share), f"metrics of {box.id}")


async def _ask(box: Box, share: float) -> None:
    rings, live = box.rings, box.live
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        if live is not None and live.agent is not None:
            rings.guest = await live.agent.info()
    except StokerError as error:
        log.debug("%s: no figures from its guest: %s", box.id, error)
        rings.guest = None
    finally:
        took = loop.time() - began
        rings.next_ask = began + max(STEP * 0.8, took / share)
        rings.asking = None
