"""Machines parked at the door: VMMs that have started, over golden memory that they have not taken up yet, for the next create.

Starting a VMM takes longer than all the rest of such a create on the host. So after a create that golden memory may serve, another
of its kind is begun in the background and goes as far as its :class:`~stoker.engine.door.Door`; the next create of that kind gives
it its row and its words, and it goes the rest of the way. Nobody sees one that waits (:data:`PARKED` in its row). It is for whoever
comes; it goes when nobody came for a while, when there is no room, before images are removed, and with the daemon.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from stoker.api.models import CreateSandbox, InitMode
from stoker.engine.build import begin, machine_request
from stoker.engine.core import Box, Core
from stoker.engine.create import Source, first_row
from stoker.engine.door import NOT_PARKED, Door
from stoker.engine.hidden import PARKED, common, discard, first_of, hide, kind_of
from stoker.engine.operations import hidden
from stoker.errors import HostError, StokerError

if TYPE_CHECKING:
    from stoker.engine.state import Record

__all__ = ["Parking"]

log = logging.getLogger(__name__)
CALM: Final = 0.2
"""Seconds without a create after which a machine is parked: the last one's first command is done."""
KINDS: Final = 4
"""Kinds of creates that machines wait for at a time: those used last."""
IDLE: Final = 300.0
"""Seconds that one waits for nobody."""
RETRY: Final = 10.0
PATIENCE: Final = 30.0


@dataclass(slots=True)
class _Spot:
    request: CreateSandbox
    used: float
    waiting: deque[Box] = field(default_factory=deque)
    again_at: float = 0.0


class Parking:
    """``count``: how many wait for each kind of create."""

    def __init__(self, core: Core, count: int) -> None:
        self._core = core
        self._count = count if core.booter.parks else 0
        self._spots: OrderedDict[bytes, _Spot] = OrderedDict()
        self._changed = asyncio.Event()

    def begin(self) -> None:
        if self._count:
            self._core.spawn(self._keep(), "parked machines")

    @property
    def waiting(self) -> list[str]:
        """The ids of those that wait."""
        return [box.id for spot in self._spots.values() for box in spot.waiting]

    def take(self, record: Record, source: Source | None) -> Box | None:
        """A machine for the create that begins with this row, if one waits. Either way, the next one finds one."""
        request = record.request
        plain = source is None and not record.volumes and not record.builds and request.app is None and not request.initrd
        if not self._count or not plain or request.cold or request.init is not InitMode.AGENT:
            return None
        kind = kind_of(record, None)
        spot = self._spots.get(kind)
        if spot is None:
            spot = self._spots[kind] = _Spot(common(request), 0.0)
        self._spots.move_to_end(kind)
        spot.used = time.monotonic()
        self._changed.set()
        while spot.waiting:
            box = spot.waiting.popleft()
            if _waits(box):
                return box
            self._core.spawn(discard(self._core, box), f"parked {box.id}")
        return None

    def put_back(self, box: Box) -> None:
        """The create was refused after all."""
        self._core.spawn(discard(self._core, box), f"parked {box.id}")

    def let_in(self, box: Box) -> None:
        """Its row is the create's: it goes on."""
        assert box.door is not None
        box.door.open(machine_request(self._core, box.record, self._core.places(box.id)))

    async def give_way(self) -> bool:
        """Ends one that waits. False: there is none."""
        for spot in self._spots.values():
            if spot.waiting:
                spot.again_at = time.monotonic() + RETRY
                await discard(self._core, spot.waiting.pop())
                return True
        return False

    async def clear(self) -> None:
        """Ends all that wait; others come with the next creates."""
        while self._spots:
            _, spot = self._spots.popitem()
            while spot.waiting:
                await discard(self._core, spot.waiting.pop())

    async def _keep(self) -> None:
        while True:
            self._changed.clear()
            bell, wait, now = self._core.bell, IDLE, time.monotonic()
            for number, (kind, spot) in enumerate(reversed(list(self._spots.items()))):
                if number >= KINDS or now - spot.used > IDLE:
                    del self._spots[kind]
                    for box in spot.waiting:
                        await discard(self._core, box)
                    continue
                for box in [box for box in spot.waiting if not _waits(box)]:
                    spot.waiting.remove(box)
                    await discard(self._core, box)
                if len(spot.waiting) >= self._count:
                    continue
                ripe = max(spot.again_at, spot.used + CALM) - now
                if ripe <= 0 and not self._core.operations.running:
                    await self._park(kind, spot)
                    wait = 0.0
                else:
                    wait = min(wait, max(ripe, 0.02))
            if wait:
                await first_of((bell, self._changed), wait)

    async def _park(self, kind: bytes, spot: _Spot) -> None:
        try:
            box = await self._made(spot.request)
        except (StokerError, TimeoutError, OSError) as error:
            spot.again_at = time.monotonic() + RETRY
            if not (isinstance(error, StokerError) and error.code == NOT_PARKED):
                log.info("no machine is parked: %s", error or "out of time")
            return
        if self._spots.get(kind) is spot:
            spot.waiting.append(box)
        else:
            await discard(self._core, box)

    async def _made(self, request: CreateSandbox) -> Box:
        core = self._core
        box = Box(first_row(core, "", request, [], None, warm=PARKED))
        await hide(core, box, None)
        box.door = door = Door(hidden("create", box.id))
        try:
            begin(core, box, door.operation, "park")
            await first_of((door.there, box.changed), PATIENCE)
            if not _waits(box):
                error = box.record.error
                raise HostError(error.code if error else NOT_PARKED, error.message if error else "it ended, or took too long")
        except BaseException:
            await core.shielded(discard(core, box))
            raise
        return box


def _waits(box: Box) -> bool:
    door = box.door
    return not box.gone and box.work is not None and door is not None and door.there.is_set() and not door.opened
