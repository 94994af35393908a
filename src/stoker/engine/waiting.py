"""Machines that are up, have run a command, and stand still until a create takes one over.

A waiting machine is a sandbox that nobody sees (:mod:`.hidden`): it is made the way every sandbox is, told who it is once and asked
to run a command (so that software emulation has translated what both take), and frozen. A create that may have such a machine takes
the row over, lets it go on, and tells it who it is now, as a copy is told (:mod:`.takeover`). What cannot be taken over is thrown
away, and the create makes a machine of its own.

Each waits in a :class:`Kind`: in one that somebody asked for (:mod:`.warm`), or *parked*, in one that is there because of a create
a moment ago. Kinds are filled up one machine at a time, when no create is going on; machines give way to sandboxes that find no
room; they end with the daemon, and what a crash leaves of them goes at the next start.

Where creates come one right after the other there is no time for all of that: on a host with a processor to spare the next machine
is made while the last one is used, without having run a command (it does once it is calm), and a create that finds it nearly there
waits for it: that is quicker than a machine of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from stoker.api.models import CreateSandbox, ErrorBody, InitMode, Principal, Quota, SandboxState
from stoker.engine.core import Box, Core
from stoker.engine.create import Source, begin_from, first_row
from stoker.engine.hidden import PARKED, common, discard, first_of, hide, kind_of
from stoker.engine.network_words import has_own_interfaces
from stoker.engine.operations import hidden
from stoker.engine.start import NO_GOLDEN
from stoker.engine.state import new_id, to_body
from stoker.engine.trace import trace
from stoker.engine.wake import Identity, introduce
from stoker.errors import HostError, StokerError
from stoker.guest.messages import ExecRequest

if TYPE_CHECKING:
    from stoker.engine.state import Record

__all__ = ["Kind", "Waiting"]

log = logging.getLogger(__name__)
S = SandboxState
CALM: Final = 0.3
"""Seconds without a create after which machines are made."""
RETRY: Final = 10.0
"""Seconds until it is tried again after a machine could not be made."""
FIRST: Final = (("/bin/true",), ("/bin/sh", "-c", ":"))
"""What a machine runs before it is frozen."""
KINDS: Final = 4
"""Kinds that machines are parked for at a time: those used last."""
IDLE: Final = 300.0
"""Seconds that a parked machine waits for nobody."""
SOON: Final = 0.25
"""Seconds that a create waits for a machine that is being made."""


@dataclass(slots=True)
class Kind:
    """Machines that the same creates may have. ``id`` is what their rows have as ``warm``."""

    id: str
    owner: str
    request: CreateSandbox
    size: int
    created_at: float = field(default_factory=time.time)
    parked: bool = False
    used: float = 0.0
    """Monotonic time of the last create of this kind."""
    kind: bytes = b""
    key: str | None = None
    """Its source's, when that was last looked at."""
    ready: deque[Box] = field(default_factory=deque)
    making: bool = False
    coming: asyncio.Future[None] | None = None
    """Of a machine that is nearly there: done when it is, or never will be. Taken away by whoever waits for it."""
    light: set[str] = field(default_factory=set)
    """Those of the machines that have run no command."""
    taken: int = 0
    problem: ErrorBody | None = None
    again_at: float = 0.0


Find = Callable[[Principal, CreateSandbox], Source | None]
"""What a request's image argument means, where that is more than an image."""


class Waiting:
    """All of them. ``parked``: how many wait for each kind of create without having been asked for. :meth:`begin` once;
    :meth:`aclose` ends them."""

    def __init__(self, core: Core, quota: Callable[[str], Quota | None], find: Find, parked: int) -> None:
        self._core = core
        self._quota = quota
        self._find = find
        self._parked = parked if core.booter.parks else 0
        self.kinds: dict[str, Kind] = {}
        self._wanted = asyncio.Event()
        self._used = 0.0
        self._spare = len(os.sched_getaffinity(0)) > 1

    def begin(self) -> None:
        self._core.spawn(self._keep(), "machines that wait")

    async def aclose(self) -> None:
        """Nobody could take them without a daemon."""
        for kind in self.kinds.values():
            await self.shrink(kind, 0)

    @property
    def parked(self) -> list[str]:
        """The ids of the machines that are parked."""
        return [box.id for kind in self.kinds.values() if kind.parked for box in kind.ready]

    # -- kinds --------------------------------------------------------------------------------------------------------

    def add(self, kind: Kind) -> None:
        self.kinds[kind.id] = kind
        self._wanted.set()

    async def shrink(self, kind: Kind, size: int | None = None) -> None:
        """Ends those that are more than wanted."""
        while len(kind.ready) > (kind.size if size is None else size):
            await discard(self._core, kind.ready.pop())

    def look(self, kind: Kind) -> bool:
        """Whether what a kind is of has become another: a template that was built anew."""
        try:
            return self.settle(kind)
        except StokerError as error:
            kind.problem = to_body(error)
            changed, kind.key, kind.kind = bool(kind.kind), None, b""
            return changed

    def settle(self, kind: Kind) -> bool:
        """The same, and what is wrong with it is raised."""
        source = self._find(Principal(owner=kind.owner, admin=False), kind.request)
        key = source.key if source is not None else ""
        if key == kind.key:
            return False
        changed, kind.key = bool(kind.kind), key
        kind.kind = kind_of(first_row(self._core, kind.owner, kind.request, [], source), source)
        return changed

    async def clear_parked(self) -> None:
        """Ends all that are parked; others come with the next creates."""
        for kind in [kind for kind in self.kinds.values() if kind.parked]:
            await self._forget(kind)

    # -- taking -------------------------------------------------------------------------------------------------------

    async def take(self, asked: CreateSandbox, record: Record, source: Source | None) -> Box | None:
        """A machine for the create of what was ``asked`` for, which begins with this row, if one waits, or nearly does. Either way,
        the next one finds one parked."""
        self._used = time.monotonic()
        if record.volumes or record.builds or asked.cold or not (self.kinds or self._parked):
            return None
        what, found = kind_of(record, source), False
        for kind in [*self.kinds.values()]:
            if kind.owner != record.owner or kind.kind != what:
                continue
            found, kind.used = True, self._used
            if not kind.ready and (coming := kind.coming) is not None:
                kind.coming = None
                await asyncio.wait({coming}, timeout=SOON)
            self._wanted.set()
            while kind.ready:
                box = kind.ready.popleft()
                kind.light.discard(box.id)
                if _waits(box):
                    kind.taken += 1
                    return box
                self._core.spawn(discard(self._core, box), f"waiting {box.id}")
        if not found and self._may_be_parked(asked, source):
            key = source.key if source is not None else ""
            kind = Kind(new_id(PARKED), record.owner, common(asked), self._parked, parked=True, used=self._used, kind=what, key=key)
            self.add(kind)
        return None

    def _may_be_parked(self, asked: CreateSandbox, source: Source | None) -> bool:
        usual = asked.app is None and not asked.initrd and not has_own_interfaces(asked) and asked.init in (None, InitMode.AGENT)
        return bool(self._parked) and usual and (source is None or source.restores)

    def put_back(self, box: Box) -> None:
        """The create was refused after all."""
        kind = self.kinds.get(box.record.warm)
        if kind is None:
            self._core.spawn(discard(self._core, box), f"waiting {box.id}")
        else:
            kind.taken -= 1
            kind.ready.appendleft(box)

    async def give_way(self, owner: str | None) -> bool:
        """Ends one machine that waits (of this owner's), so that somebody else's has room: first one that nobody asked for.
        False: there is none."""
        for kind in sorted(self.kinds.values(), key=lambda kind: not kind.parked):
            if kind.ready and owner in (None, kind.owner):
                box = kind.ready.pop()
                kind.again_at = time.monotonic() + RETRY
                await discard(self._core, box)
                return True
        return False

    # -- filling ------------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Fills up what is missing, for as long as the engine is open."""
        while True:
            self._wanted.clear()
            bell, wait = self._core.bell, await self._forget_old()
            for kind in sorted(self.kinds.values(), key=lambda kind: kind.parked):
                if self.look(kind):
                    await self.shrink(kind, 0)
                for box in [box for box in kind.ready if not _waits(box)]:
                    kind.ready.remove(box)
                    self._core.spawn(discard(self._core, box), f"waiting {box.id}")
                kind.light &= {box.id for box in kind.ready}
                if len(kind.ready) >= kind.size and not kind.light:
                    continue
                now = time.monotonic()
                again, calm = kind.again_at - now, self._used + CALM - now
                light = calm > 0 and kind.parked and self._spare and not kind.ready
                if (calm <= 0 or light) and again <= 0 and not self._core.operations.running:
                    await self._ready(kind, light=light)
                    self._wanted.set()
                else:
                    wait = min(wait or RETRY, max(again, 0.02 if light else calm, 0.02))
            await first_of((bell, self._wanted), wait)

    async def _ready(self, kind: Kind, *, light: bool) -> None:
        """One more machine, or one that is readier than it was."""
        coming: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        missing = len(kind.ready) < kind.size
        # For what takes longer nobody waits: a machine of one's own is as quick.
        kind.coming = coming if light or not missing else None
        try:
            if missing:
                await self._fill(kind, light=light)
            else:
                await self._exercise(kind, next(box for box in kind.ready if box.id in kind.light))
        finally:
            kind.coming = None
            coming.set_result(None)

    async def _forget_old(self) -> float | None:
        """Kinds that nobody used for a while, and all but the last ones, wait for nobody any more. Seconds until the next does."""
        parked = sorted((kind for kind in self.kinds.values() if kind.parked), key=lambda kind: -kind.used)
        now, kept = time.monotonic(), []
        for number, kind in enumerate(parked):
            if number >= KINDS or now - kind.used > IDLE:
                await self._forget(kind)
            else:
                kept.append(kind.used + IDLE - now + 0.1)
        return min(kept, default=None)

    async def _forget(self, kind: Kind) -> None:
        self.kinds.pop(kind.id, None)
        await self.shrink(kind, 0)

    async def _exercise(self, kind: Kind, box: Box) -> None:
        kind.ready.remove(box)
        kind.light.discard(box.id)
        try:
            async with box.lock, asyncio.timeout(60.0):
                if not _waits(box) or box.live is None:
                    raise HostError("warm_failed", "its machine has ended")
                await box.live.machine.thaw()
                await self._first(box)
                await box.live.machine.freeze()
            kind.ready.append(box)
        except (StokerError, TimeoutError, OSError) as error:
            log.info("a parked machine is thrown away: %s", error or "out of time")
            await discard(self._core, box)

    async def _fill(self, kind: Kind, *, light: bool) -> None:
        kind.making = True
        box: Box | None = None
        try:
            box = await self._made(kind, light=light)
            kind.problem = None
            if self.kinds.get(kind.id) is kind and len(kind.ready) < kind.size:
                kind.ready.append(box)
                if light:
                    kind.light.add(box.id)
                box = None
        except (StokerError, TimeoutError, OSError) as error:
            problem = error if isinstance(error, StokerError) else HostError("warm_failed", str(error) or "out of time")
            kind.problem = to_body(problem)
            kind.again_at = time.monotonic() + RETRY
            if not kind.parked:
                log.warning("no machine for the warm set %s: %s", kind.id, problem)
            elif problem.code != NO_GOLDEN:
                log.info("no machine is parked: %s", problem)
        finally:
            kind.making = False
            if box is not None:
                await discard(self._core, box)

    async def _made(self, kind: Kind, *, light: bool) -> Box:
        core = self._core
        who = Principal(owner=kind.owner, admin=False)
        source = self._find(who, kind.request)
        if kind.parked and source is not None and not source.restores:
            raise HostError(NO_GOLDEN, "its memory cannot be taken up")
        box = Box(first_row(core, kind.owner, kind.request, [], source, warm=kind.id))
        box.golden_only = kind.parked
        await hide(core, box, self._quota(kind.owner))
        operation = hidden("warm", box.id) if kind.parked else core.operations.begin("warm", kind.owner, box.id)
        trace("warm.after_intent")
        try:
            begin_from(core, box, operation, source, "warm")
            if box.work is not None:
                await asyncio.wait({box.work})
            await self._prepare(box, light=light)
        except BaseException:
            await core.shielded(discard(self._core, box))
            raise
        trace("warm.after_frozen")
        return box

    async def _prepare(self, box: Box, *, light: bool) -> None:
        live, error = box.live, box.record.error
        if box.record.state is not S.RUNNING or live is None or live.agent is None:
            said = error.message if error is not None else f"it is {box.record.state.value}"
            raise HostError(error.code if error is not None else "warm_failed", said, error.hint if error is not None else "")
        async with box.lock, asyncio.timeout(60.0):
            await introduce(live.agent, Identity(box.record.generation, copy=True, hostname=box.id), self._core.host_keys.take)
            if not light:
                await self._first(box)
            await live.machine.freeze()
            await self._core.save(box, state=S.FROZEN)

    async def _first(self, box: Box) -> None:
        live = box.live
        if live is None or live.agent is None:
            raise HostError("warm_failed", "its machine has ended")
        for argv in FIRST:
            await live.agent.run(ExecRequest(list(argv)), timeout=30.0)


def _waits(box: Box) -> bool:
    return not box.gone and box.record.state is S.FROZEN and box.live is not None and box.live.agent is not None
