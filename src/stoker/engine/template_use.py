"""Sandboxes out of templates: what a create would do, its first row, and its work.

With memory that can be taken up, a create is a copy (:mod:`.copies`) that needs nothing but what is held already. Where it cannot
(another VMM, a damaged file), the sandbox boots from the template's disk, the start command is run in it and its readiness awaited;
an event says so, and the memory is made anew in the background, once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from msgspec.structs import replace

from stoker.api.models import CreateSandbox, Origin, Principal, Resources
from stoker.engine.build import begin, boot_up
from stoker.engine.copies import begin_copy
from stoker.engine.create import whole
from stoker.engine.ending import release_all
from stoker.engine.state import Record, SnapshotRecord
from stoker.engine.template_steps import begin_start, wait_ready
from stoker.engine.trace import trace
from stoker.engine.wake import Identity
from stoker.errors import Conflict, DeadlineExceeded, GuestError, StokerError

if TYPE_CHECKING:
    from stoker.engine.core import Box
    from stoker.engine.operations import Running
    from stoker.engine.templates import TemplateRecord, Templates

__all__ = ["Prospect", "Use", "prospect", "use"]

log = logging.getLogger(__name__)
Remake = Callable[["TemplateRecord"], None]


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a create of a template would do: take its memory up (``restores``), or boot from its disk, and then why."""

    template: TemplateRecord
    snapshot: SnapshotRecord
    restores: bool
    why: str = ""


def prospect(templates: Templates, template: TemplateRecord, request: CreateSandbox) -> Prospect:
    """Raises ``template_fixed`` (Conflict) for what cannot be had of this template, or only with ``cold``."""
    snapshot = templates.snapshot(template)
    row = snapshot.box
    if request.disk not in (0, row.resources.disk):
        raise Conflict(
            "template_fixed",
            f"the disk of {template.name} has {row.resources.disk >> 20} MiB, its sandboxes begin with as much",
            "stoker resize SANDBOX --disk SIZE, once it runs",
        )
    if request.cold or not snapshot.memory:
        return Prospect(template, snapshot, False, "asked for" if request.cold else "the template is of a disk alone")
    other = [f"{name} ({has} there)" for name, wanted, has in _shape(request, row) if wanted and wanted != has]
    if other:
        raise Conflict(
            "template_fixed",
            f"the machine in the template {template.name} is there already, with another {', '.join(other)}",
            "--cold boots one of that shape from the template's disk",
        )
    why = templates.unusable.get(snapshot.id, "")
    return Prospect(template, snapshot, not why, why)


def _shape(request: CreateSandbox, row: Record) -> list[tuple[str, object, object]]:
    """What a machine in memory has: names, what is asked for (empty: as it is), what it is."""
    return [
        ("cpus", request.cpus, row.resources.cpus),
        ("memory", request.memory and whole(request).memory, row.resources.memory),
        ("network", request.network, row.request.network),
        ("init", request.init, row.request.init),
        ("kernel", request.kernel if request.kernel not in (row.request.kernel, row.kernel, row.kernel_path) else "", row.kernel),
        ("initrd", request.initrd, row.request.initrd or "none"),
        ("interfaces", request.interfaces, "none"),
        ("volumes", request.volumes, "none"),
        ("app", request.app, "none"),
    ]


def use(templates: Templates, who: Principal, request: CreateSandbox, remake: Remake) -> Use | None:
    """The template that a request means, if it does, as the source of its sandbox."""
    template = templates.named(who, request.image)
    if template is None:
        return None
    return Use(templates, prospect(templates, template, request), request, remake)


@dataclass(frozen=True, slots=True)
class Use:
    """Fits :class:`stoker.engine.create.Source`."""

    templates: Templates
    prospect: Prospect
    request: CreateSandbox
    remake: Remake

    @property
    def key(self) -> str:
        return self.prospect.template.id

    @property
    def restores(self) -> bool:
        return self.prospect.restores

    def row(self, record: Record) -> Record:
        asked, snapshot, restores = self.request, self.prospect.snapshot, self.prospect.restores
        source = snapshot.box
        request = replace(
            record.request,
            image=source.request.image,
            kernel=asked.kernel or source.request.kernel,
            cpus=asked.cpus or source.resources.cpus,
            memory=asked.memory or source.resources.memory,
            network=asked.network or source.request.network,
            init=asked.init or source.request.init,
        )
        request = whole(request)
        return replace(
            record,
            request=request,
            resources=Resources(cpus=request.cpus or 1, memory=request.memory or 0, disk=source.resources.disk),
            image_digest=source.image_digest,
            image_path=source.image_path,
            kernel_path=source.kernel_path if asked.kernel in ("", source.request.kernel, source.kernel) else "",
            kernel=source.kernel,
            env={**source.env, **asked.env},
            user=asked.user or source.user,
            workdir=asked.workdir or source.workdir,
            command=source.command,
            volumes=[*source.volumes, *record.volumes],
            versions=replace(source.versions, daemon=record.versions.daemon),
            pool=source.pool,
            generation=source.generation if restores else 0,
            parent=snapshot.id,
            ancestor=snapshot.parent,
            disk_of="" if restores else snapshot.id,
            template=self.prospect.template.name,
        )

    def begin(self, box: Box, operation: Running) -> None:
        core, snapshot = self.templates.core, self.prospect.snapshot
        hold = ExitStack()
        hold.enter_context(self.templates.using(snapshot.id))
        if not self.prospect.restores:
            begin(core, box, operation, "create", partial(self._booted, box))
            if box.work is not None:
                box.work.add_done_callback(lambda _: hold.close())
            return
        record = box.record
        identity = Identity(
            record.generation + 1,
            copy=True,
            hostname=record.hostname or box.id,
            env=record.env,
            user=record.user,
            workdir=record.workdir,
            origin=Origin.TEMPLATE,
        )
        memory = self.templates.memories.taker(snapshot.id)
        rows = dict(self.prospect.template.processes)
        copy = begin_copy(core, box, snapshot.id, memory, rows, operation, identity, partial(self._instead, box, operation))

        def over(done: asyncio.Future[StokerError | None]) -> None:
            hold.close()
            error = done.result()
            operation.end(error, cancelled=error is not None and error.code == "cancelled")

        copy.add_done_callback(over)

    async def _booted(self, box: Box) -> None:
        """It runs: what was running in the template is started, and awaited."""
        template = self.prospect.template
        why = self.templates.unusable.get(self.prospect.snapshot.id)
        if why is not None and not self.request.cold:
            await self._say(box, "saved_unusable", why)
        core = self.templates.core
        if template.start:
            await begin_start(core, box, template.start)
        if template.start or template.ready:
            await wait_ready(core, box, template.ready, template.ready_timeout, started=bool(template.start))
        if why is not None and not box.record.builds:
            self.remake(template)

    async def _instead(self, box: Box, operation: Running, cause: StokerError) -> bool:
        """The memory could not be taken up: it boots, in the same work. The box's lock is held."""
        core, snapshot = self.templates.core, self.prospect.snapshot
        spoilt = isinstance(cause, GuestError | DeadlineExceeded) and cause.code != "copy_unsafe"
        if box.record.boots or box.record.doomed or not (spoilt or cause.code.startswith("saved_")):
            return False
        log.warning("the memory of template %s cannot be used, its sandboxes boot: %s", self.prospect.template.name, cause)
        self.templates.unusable[snapshot.id] = cause.message
        self.templates.memories.forget(snapshot.id)
        trace("template.after_unusable")
        await release_all(core, box)
        await core.save(box, disk_of=snapshot.id, generation=0)
        await boot_up(core, box, operation)
        await self._booted(box)
        return True

    async def _say(self, box: Box, code: str, why: str) -> None:
        words = {"template": self.prospect.template.name, "code": code, "message": why}
        await self.templates.core.happen(box, "template.unusable", **words)
