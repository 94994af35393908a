"""Templates: names that sandboxes are created from. Here is which there are; :mod:`.template_build` makes them,
:mod:`.template_use` creates from them.

A template is a row and a snapshot (:mod:`.snapshots`) that nobody else sees. The row is written when the snapshot is whole, in the
transaction that takes the former row of that name away; then the former snapshot goes. So a crash leaves the old or the new, and a
snapshot that no row names, which the next start removes, as it does with the machine of a build.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from stoker.api.models import NetworkMode, Principal, SandboxState, Template
from stoker.engine.core import Core
from stoker.engine.hub import Started
from stoker.engine.snapshots import Snapshots
from stoker.engine.state import Record, SnapshotRecord
from stoker.engine.template_memory import Memories
from stoker.engine.trace import trace
from stoker.errors import CapacityExhausted, NotFound, StokerError

__all__ = ["EXPLICIT", "MOST", "TemplateRecord", "Templates", "row_of"]

log = logging.getLogger(__name__)
MOST: Final = 200
"""Templates of one owner."""
EXPLICIT: Final = "template:"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class TemplateRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A template as the database has it. What its sandboxes begin with is the row in its snapshot."""

    id: str
    owner: str
    name: str
    created_at: float
    snapshot: str
    made_from: str
    setup: list[str] = field(default_factory=list)
    start: str = ""
    ready: str = ""
    ready_timeout: float = 120.0
    processes: dict[int, Started] = field(default_factory=dict)
    """What was started in it, by the agent's numbers."""
    built: bool = True
    """It can be made again from its disk: nothing is in its memory but what ``start`` leads to."""
    operation: str | None = None
    steps: dict[str, float] = field(default_factory=dict)


def row_of(record: Record, *, env: dict[str, str], user: str | None, workdir: str | None) -> Record:
    """The row that a template's sandboxes begin with, out of the one that it is made of."""
    request = replace(
        record.request, name=None, labels={}, timeout=None, lease=False, start=False, cold=False, hostname=None, volumes=[]
    )
    return replace(
        record,
        state=SandboxState.CREATING,
        request=request,
        name=None,
        env={**record.env, **env},
        user=user or record.user,
        workdir=workdir or record.workdir,
        hostname="",
        timeout=None,
        expires_at=None,
        operation=None,
        error=None,
        main=None,
        saved="",
        certificate=None,
        builds="",
    )


class Templates:
    """All of them. Fits a part of :class:`stoker.server.template_ports.Templates`; the rest is the builds'."""

    def __init__(self, core: Core, snapshots: Snapshots) -> None:
        self.core = core
        self.snapshots = snapshots
        self.memories = Memories(core.settings.data_dir / "snapshots")
        self.unusable: dict[str, str] = {}
        """Snapshots whose memory could not be taken up here, and why."""
        self._used: Counter[str] = Counter()
        self._left = asyncio.Condition()

    async def begin(self) -> None:
        """Snapshots that no row names go."""
        core = self.core
        named = {one.snapshot for one in core.templates.values()}
        for one in [one for one in core.snapshots.values() if one.template and one.id not in named]:
            log.warning("removing %s, which belongs to no template", one.id)
            await self.snapshots.discard(one)

    # -- finding ------------------------------------------------------------------------------------------------------

    def find(self, who: Principal, reference: str) -> TemplateRecord:
        """By id or name; what belongs to others does not exist; an administrator's own names come first."""
        mine = [
            one for one in self.core.templates.values() if reference in (one.id, one.name) and (who.admin or one.owner == who.owner)
        ]
        if not mine:
            raise NotFound("template_unknown", f"there is no template {reference}", "stoker template ls")
        return min(mine, key=lambda one: (one.id != reference, one.owner != who.owner, one.created_at))

    def named(self, who: Principal, image: str) -> TemplateRecord | None:
        """The template that an image argument means: outright (``template:NAME``), or by a name of one of the user's own."""
        if image.startswith(EXPLICIT):
            return self.find(who, image.removeprefix(EXPLICIT))
        if _NAME.fullmatch(image) is None:
            return None
        return next((one for one in self.core.templates.values() if one.owner == who.owner and image in (one.name, one.id)), None)

    def snapshot(self, record: TemplateRecord) -> SnapshotRecord:
        return self.core.snapshots[record.snapshot]

    async def get(self, who: Principal, template: str) -> Template:
        record = self.find(who, template)
        row = await self.core.database.read(
            lambda db: db.execute("SELECT log FROM templates WHERE id = ?", (record.id,)).fetchone()
        )
        return await asyncio.to_thread(self._value, record, json.loads(row[0]) if row else [])

    async def list(self, who: Principal) -> Sequence[Template]:
        """Newest first."""
        found = [one for one in self.core.templates.values() if who.admin or one.owner == who.owner]
        found.sort(key=lambda one: one.created_at, reverse=True)
        return await asyncio.to_thread(lambda: [self._value(one, []) for one in found])

    def _value(self, record: TemplateRecord, lines: Sequence[str]) -> Template:
        snapshot = self.core.snapshots.get(record.snapshot)
        if snapshot is None:  # it was replaced, or removed, just now
            raise NotFound("template_unknown", f"there is no template {record.name}", "stoker template ls")
        own, shared = self.snapshots.sizes(snapshot)
        box = snapshot.box
        return Template(
            id=record.id,
            name=record.name,
            created_at=record.created_at,
            owner=record.owner,
            image=box.request.image,
            image_digest=box.image_digest,
            kernel=box.kernel,
            made_from=record.made_from,
            memory=snapshot.memory,
            resources=box.resources,
            network=box.request.network or NetworkMode.USER,
            env=box.env,
            user=box.user,
            workdir=box.workdir,
            setup=record.setup,
            start=record.start,
            ready=record.ready,
            unusable=self.unusable.get(record.snapshot, ""),
            own=own,
            shared=shared,
            operation=record.operation,
            steps=record.steps,
            log=list(lines),
        )

    # -- changing -----------------------------------------------------------------------------------------------------

    def check_room(self, owner: str, name: str) -> None:
        """Refuses one too many. One that is replaced takes no further room."""
        own = [one.name for one in self.core.templates.values() if one.owner == owner]
        if name not in own and len(own) >= MOST:
            raise CapacityExhausted("too_many_templates", f"there are {MOST} templates already", "stoker template rm")

    async def put(self, record: TemplateRecord, lines: Sequence[str]) -> None:
        """It is whole, and is the template of that name from now on; the former one goes. Its snapshot is there."""
        core = self.core
        former = [
            one for one in core.templates.values() if one.id == record.id or (one.owner == record.owner and one.name == record.name)
        ]

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM templates WHERE id = ? OR (owner = ? AND name = ?)", (record.id, record.owner, record.name))
            text = msgspec.json.encode(record).decode()
            values = (record.id, record.owner, record.name, record.created_at, text, json.dumps(list(lines)))
            db.execute("INSERT INTO templates (id, owner, name, created, record, log) VALUES (?, ?, ?, ?, ?, ?)", values)

        await core.database.write(work, durable=True)
        for one in former:
            core.templates.pop(one.id, None)
        core.templates[record.id] = record
        trace("template.after_row")
        for one in former:
            await self._drop(one.snapshot)
        trace("template.after_replaced")

    async def remove(self, who: Principal, template: str) -> None:
        """Sandboxes that were made from it stay."""
        await self.core.shielded(self._remove(self.find(who, template)))

    async def _remove(self, record: TemplateRecord) -> None:
        if self.core.templates.pop(record.id, None) is None:
            raise NotFound("template_unknown", f"there is no template {record.name}", "stoker template ls")
        await self.core.database.write(lambda db: db.execute("DELETE FROM templates WHERE id = ?", (record.id,)))
        trace("template.after_unmark")
        await self._drop(record.snapshot)

    async def _drop(self, snapshot: str) -> None:
        """Takes a snapshot away that no template has any more, once the creates that are just at it are done."""
        record = self.core.snapshots.get(snapshot)
        if record is None:
            return
        async with self._left:
            await self._left.wait_for(lambda: not self._used[snapshot])
        self.unusable.pop(snapshot, None)
        self.memories.forget(snapshot)
        try:
            await self.snapshots.discard(record)
        except (StokerError, OSError) as error:
            log.exception("%s could not be removed; the next start of the daemon does", snapshot)
            self.core.problems.append(f"{snapshot} could not be removed: {error}")

    @contextmanager
    def using(self, snapshot: str) -> Iterator[None]:
        """Keeps a snapshot that a sandbox is just being made from."""
        self._used[snapshot] += 1
        try:
            yield
        finally:
            self._used[snapshot] -= 1
            if not self._used[snapshot]:
                del self._used[snapshot]
                self.core.spawn(self._tell(), "template left")

    async def _tell(self) -> None:
        async with self._left:
            self._left.notify_all()
