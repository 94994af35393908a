"""Machines that nobody sees, because they wait for the create that takes them over (:mod:`.waiting`).

Each is a row like any other's (``warm`` in it says what it waits in), with its things in the ledger and its reservation.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from typing import Final

import msgspec
from msgspec.structs import replace

from stoker.api.models import CreateSandbox, Quota
from stoker.engine.core import Box, Core, put
from stoker.engine.create import Source
from stoker.engine.ending import destroy
from stoker.engine.ledger import Ledger
from stoker.engine.state import Record
from stoker.errors import StokerError

__all__ = ["PARKED", "common", "discard", "first_of", "hide", "kind_of"]

log = logging.getLogger(__name__)
PARKED: Final = "parked"
"""What ``warm`` begins with where nobody asked for it."""


def common(request: CreateSandbox) -> CreateSandbox:
    """The same without what is each create's own."""
    return replace(
        request,
        egress=None,
        publish=[],
        host_access=False,
        learn=False,
        rate_in=0,
        rate_out=0,
        connections=0,
        name=None,
        labels={},
        hostname=None,
        env={},
        user=None,
        workdir=None,
        timeout=None,
        lease=False,
        start=False,
    )


def kind_of(record: Record, source: Source | None) -> bytes:
    """What the first rows of two creates have to have in common to be served by the same machine."""
    return msgspec.json.encode([common(record.request), source.key if source is not None else ""], order="sorted")


async def hide(core: Core, box: Box, quota: Quota | None) -> None:
    """Admits it (nobody gives way to it) and writes down what it will consist of."""
    row = box.record
    core.filling.check(row.pool)
    core.admit_now(box, quota)
    things = core.places(box.id, row.pool).things(lease=False, sandbox=box.id)

    def work(db: sqlite3.Connection) -> None:
        put(db, row)
        Ledger.intend_in(db, box.id, things)

    try:
        await core.database.write(work, durable=True)
    except BaseException:
        core.admission.release(box.id)
        raise
    core.add(box)


async def discard(core: Core, box: Box) -> None:
    """Nothing is left of it."""
    if box.gone:
        return
    try:
        await destroy(core, box)
    except StokerError as error:
        log.warning("%s could not be taken away; the next start of the daemon does it: %s", box.id, error)


async def first_of(events: tuple[asyncio.Event, ...], timeout: float | None) -> None:
    """Until one of them is set, or for so many seconds."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
